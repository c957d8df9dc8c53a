//! Weights on their way to the device, and hidden states that do not fit there.

use super::Cuda;
use super::tensor::{Hidden, HiddenValues};
use super::tests::{Random, bytes_of, device};
use crate::backend::{Matrix, Memory, Quantization};
use crate::checkpoint::{Dtype, Tensor as Stored};

#[test]
fn weights_that_are_not_finite_are_named() {
    let Some(cuda) = device("weights_that_are_not_finite_are_named") else { return };
    let shape = [3, 50];
    for (value, dtype) in
        [(f32::NAN, Dtype::F32), (f32::INFINITY, Dtype::BF16), (f32::NAN, Dtype::F16)]
    {
        let mut values = vec![1.0; 150];
        values[107] = value;
        let bytes = bytes_of(&values, dtype);
        let error = cuda.load(Stored::in_memory("w", dtype, &shape, &bytes)).err().unwrap();
        assert_eq!(error.message(), format!("tensor `w` holds {value} at [2, 7]"));
    }
    let mut values = vec![1.0; 150];
    values[149] = 1e6;
    let bytes = bytes_of(&values, Dtype::F32);
    let weight = cuda.load(Stored::in_memory("w", Dtype::F32, &shape, &bytes)).unwrap();
    let error = cuda.dense(&weight, None).err().unwrap();
    assert!(error.message().contains("row 2, column 49"), "{error}");
}

#[test]
fn what_does_not_fit_is_offloaded_or_refused() {
    let test = "what_does_not_fit_is_offloaded_or_refused";
    let Some(cuda) = device(test) else { return };
    let mut random = Random(9);
    let matrix = Matrix { rows: 50, columns: 100, data: random.values(5000) };
    cuda.reserve(cuda.gpu.limit_bytes() - 30_000).unwrap();
    let mut tensors: Vec<Hidden> = (0..2).map(|_| cuda.upload(matrix.clone()).unwrap()).collect();
    for _ in 0..2 {
        tensors.iter_mut().for_each(|tensor| cuda.offload(tensor).unwrap());
        assert!(matches!(tensors[0].values, HiddenValues::Resident(_)), "20 of 30 KB");
        assert!(matches!(tensors[1].values, HiddenValues::Offloaded(_)), "40 of 30 KB");
        let copy = cuda.duplicate(&tensors[1]).unwrap();
        assert_eq!(cuda.values(&copy), matrix.data);
        for tensor in &mut tensors {
            cuda.reload(tensor).unwrap();
            assert_eq!(cuda.values(tensor), matrix.data);
        }
    }
    drop(tensors);
    assert_eq!(cuda.offloaded_bytes.load(std::sync::atomic::Ordering::Relaxed), 0);

    let error = cuda.reserve(1 << 60).unwrap_err();
    assert_eq!(error.kind(), crate::Kind::Machine);
    assert!(error.message().contains("too little memory"), "{error}");
    let error = cuda.gpu.alloc(1 << 50).err().unwrap();
    assert_eq!(error.kind(), crate::Kind::Machine);
    assert!(error.message().contains("bytes were needed"), "{error}");
    // And it goes on.
    assert_eq!(cuda.values(&cuda.upload(matrix.clone()).unwrap()), matrix.data);
    let small = Cuda::open(0, Some(200 << 20)).unwrap();
    assert!(small.gpu.alloc(300 << 20).is_err() && small.gpu.alloc(100 << 20).is_ok());
    assert!(Cuda::open(0, Some(1 << 50)).is_err());
}
