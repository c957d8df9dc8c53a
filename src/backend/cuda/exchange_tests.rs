//! What GPUs hand to each other arrives, through NCCL where there are two of them, and through the hosts' memory.

use super::super::libraries;
use super::super::tensor::Weight;
use super::super::tests::{Random, bytes_of, device, sites};
use super::*;
use crate::backend::{Calibration, Matrix, Memory, Quantization, Unquantized};
use crate::checkpoint::{Dtype, Tensor as Stored};
use crate::quant::grid::Scaling;
use crate::quant::linear::QuantizedLinear;
use crate::ranks::thread_ranks;

fn floats(buffer: &Buffer, count: usize) -> Vec<f32> {
    buffer.download(0..4 * count).unwrap()
}

#[test]
fn sums_of_chunks_are_added() {
    let Some(cuda) = device("sums_of_chunks_are_added") else { return };
    let mut random = Random(31);
    // Rows that end in the middle of four values, too.
    for (tokens, n) in [(7, 3), (40, 33), (100, 576)] {
        let mut part = || {
            let x = Matrix { rows: tokens, columns: n, data: random.values(tokens * n) };
            let x = cuda.upload_activation(x).unwrap();
            let mut gram = cuda.gram(n).unwrap();
            Calibration::add_gram(&cuda, &mut gram, &x).unwrap();
            let mut cross = cuda.cross_covariance(n, n).unwrap();
            Calibration::add_cross_covariance(&cuda, &mut cross, &x, &x).unwrap();
            (gram, cross)
        };
        let ((mut gram, mut cross), other) = (part(), part());
        let sum = |a: &Buffer, b: &Buffer| -> Vec<f32> {
            floats(a, n * n).iter().zip(floats(b, n * n)).map(|(a, b)| a + b).collect()
        };
        let expected = [sum(&gram.data, &other.0.data), sum(&cross.data, &other.1.data)];
        cuda.join_gram(&mut gram, &other.0).unwrap();
        cuda.join_cross_covariance(&mut cross, &other.1).unwrap();
        assert_eq!([floats(&gram.data, n * n), floats(&cross.data, n * n)], expected, "{n}");
    }
}

/// Sends from one GPU what the other must have: a Gram matrix, and the second of two linears that were made together.
fn exchange(mut gpus: Vec<Cuda>) {
    let (receiver, sender) = (gpus.pop().unwrap(), gpus.pop().unwrap());
    let mut random = Random(32);
    let formats = sites(&mut random);
    let n = 130;
    let x = Matrix { rows: 50, columns: n, data: random.values(50 * n) };
    let weights: Vec<Vec<f32>> =
        formats.iter().map(|format| random.values(2 * 64 * format.channels)).collect();
    let shape = |format: &crate::quant::site::SiteFormat| {
        let numbers = format.row.numbers;
        (64, format.row.weights(4, numbers.codebook, 1))
    };
    let (sent, received) = std::thread::scope(|scope| {
        let formats = &formats;
        let (x, weights) = (&x, &weights);
        let sending = scope.spawn(move || {
            sender.gpu.bind().unwrap();
            let mut gram = sender.gram(n).unwrap();
            let rows = sender.upload_activation(x.clone()).unwrap();
            Calibration::add_gram(&sender, &mut gram, &rows).unwrap();
            sender.send_gram(1, &gram).unwrap();
            let mut linears = Vec::new();
            for (format, weights) in formats.iter().zip(weights) {
                let site = sender.site(format).unwrap();
                let (_, own) = shape(format);
                let halves = weights.chunks(64 * format.channels).map(|half| {
                    let bytes = bytes_of(half, Dtype::BF16);
                    let shape = [64, format.channels];
                    sender.load(Stored::in_memory("w", Dtype::BF16, &shape, &bytes)).unwrap()
                });
                let halves: Vec<Weight> = halves.collect();
                let scaling = Scaling { clip: 0.9, search: false };
                let last = halves.last().unwrap();
                let linear = Unquantized { name: "w", weight: last, format: own, scaling };
                let made = sender.round(&linear, &site).unwrap();
                let made = sender.broadcast_quantized(0, Some(made), shape(format)).unwrap();
                linears.push(sender.fetch(made).unwrap());
            }
            (floats(&gram.data, n * n), linears)
        });
        receiver.gpu.bind().unwrap();
        let mut gram = receiver.gram(n).unwrap();
        receiver.receive_gram(0, &mut gram).unwrap();
        let linears: Vec<QuantizedLinear> = formats
            .iter()
            .map(|format| {
                let made = receiver.broadcast_quantized(0, None, shape(format)).unwrap();
                receiver.fetch(made).unwrap()
            })
            .collect();
        (sending.join().unwrap(), (floats(&gram.data, n * n), linears))
    });
    assert!(sent.0 == received.0 && sent.0.iter().any(|value| *value != 0.0));
    assert_eq!(sent.1, received.1);
}

#[test]
fn what_is_sent_through_the_hosts_memory_arrives() {
    if device("what_is_sent_through_the_hosts_memory_arrives").is_none() {
        return;
    }
    let gpus = thread_ranks(2).into_iter().map(|rank| {
        let mut cuda = Cuda::open(0, None).unwrap();
        cuda.ranks = Arc::new(rank);
        cuda
    });
    exchange(gpus.collect());
}

#[test]
fn what_is_sent_through_nccl_arrives() {
    const TEST: &str = "what_is_sent_through_nccl_arrives";
    if device(TEST).is_none() {
        return;
    }
    if libraries::driver().unwrap().devices < 2 {
        return super::super::skipped(TEST, "there is one GPU");
    }
    // Each rank joins while the others do.
    let gpus = std::thread::scope(|scope| {
        let threads = thread_ranks(2).into_iter().enumerate().map(|(ordinal, rank)| {
            scope.spawn(move || {
                let mut cuda = Cuda::open(ordinal, None).unwrap();
                cuda.join(Arc::new(rank)).unwrap();
                cuda
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    exchange(gpus);
}
