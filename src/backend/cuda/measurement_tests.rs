//! Losses, predictions and divergences compared with the CPU's, over odd shapes.

use half::f16;

use super::tests::{Random, bytes_of, device};
use crate::backend::cpu::Cpu;
use crate::backend::{Forward, Matrix, Measurement, Memory, Quantization};
use crate::checkpoint::{Dtype, Tensor as Stored};

/// A target for each row.
fn targets(tokens: &[u32]) -> Vec<(u32, u32)> {
    (0..).zip(tokens.iter().copied()).collect()
}

#[test]
fn losses_agree_with_the_cpu() {
    let Some(cuda) = device("losses_agree_with_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(6);
    for (windows, seq_len, hidden, vocabulary) in
        [(1, 2, 64, 3), (3, 17, 172, 1000), (2, 100, 64, 32007)]
    {
        let rows = windows * seq_len;
        let bytes = bytes_of(&random.values(vocabulary * hidden), Dtype::F16);
        let shape = [vocabulary, hidden];
        let stored = Stored::in_memory("head", Dtype::F16, &shape, &bytes);
        let x = Matrix { rows, columns: hidden, data: random.values(rows * hidden) };
        let tokens: Vec<u32> = (0..rows).map(|i| (i * 7919 % vocabulary) as u32).collect();
        let head = cpu.dense(&cpu.load(stored).unwrap(), None).unwrap();
        let host = cpu.upload(x.clone()).unwrap();
        let expected = cpu.cross_entropy(&host, &head, &tokens, seq_len).unwrap();
        let head = cuda.dense(&cuda.load(stored).unwrap(), None).unwrap();
        let found = cuda.cross_entropy(&cuda.half_tensor(&x), &head, &tokens, seq_len).unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-4 * expected.abs().max(1.0),
                "{found} {expected}"
            );
        }
    }
}

#[test]
fn predictions_of_selected_rows_agree_with_the_cpu() {
    let Some(cuda) = device("predictions_of_selected_rows_agree_with_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(13);
    for (rows, hidden, vocabulary) in [(1, 16, 3), (5, 64, 1000), (33, 172, 32_007)] {
        let bytes = bytes_of(&random.values(vocabulary * hidden), Dtype::F16);
        let shape = [vocabulary, hidden];
        let stored = Stored::in_memory("head", Dtype::F16, &shape, &bytes);
        let x = Matrix { rows, columns: hidden, data: random.values(rows * hidden) };
        let selected: Vec<u32> = (0..3 * rows).map(|i| (i * 7 % rows) as u32).collect();
        let head = cpu.dense(&cpu.load(stored).unwrap(), None).unwrap();
        let host = cpu.select_rows(&cpu.upload(x.clone()).unwrap(), &selected).unwrap();
        let floats = cuda.select_hidden(&cuda.upload(x.clone()).unwrap(), &selected).unwrap();
        assert_eq!(cuda.values(&floats), host.values());
        let halves = cuda.select_rows(&cuda.half_tensor(&x), &selected).unwrap();
        // A row's argmax, some other token, and the argmax of the row before.
        let every: Vec<u32> = (0..vocabulary as u32).collect();
        let argmax = |row: usize| {
            let row = cpu.select_rows(&host, &vec![row as u32; vocabulary]).unwrap();
            let found = cpu.predict(&row, &head, &targets(&every)).unwrap();
            found.iter().position(|prediction| prediction.argmax).unwrap() as u32
        };
        let tokens: Vec<u32> = (0..3 * rows)
            .map(|row| if row % 2 == 0 { argmax(row) } else { (row * 7919 % vocabulary) as u32 })
            .collect();
        let expected = cpu.predict(&host, &head, &targets(&tokens)).unwrap();
        let head = cuda.dense(&cuda.load(stored).unwrap(), None).unwrap();
        let found = cuda.predict(&halves, &head, &targets(&tokens)).unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            let (found_nats, nats) = (found.nats, expected.nats);
            assert!((found_nats - nats).abs() < 1e-3 * nats.abs().max(1.0), "{found_nats} {nats}");
            assert_eq!(found.argmax, expected.argmax);
        }
        assert!(expected.iter().step_by(2).all(|prediction| prediction.argmax));
    }
    // Of equal logits the first counts, wherever in the row they stand.
    let vocabulary = 3000;
    let mut weights = vec![0f32; vocabulary];
    weights[700] = 1.0;
    weights[2900] = 1.0;
    let bytes = bytes_of(&weights, Dtype::F16);
    let shape = [vocabulary, 1];
    let head = cuda.load(Stored::in_memory("head", Dtype::F16, &shape, &bytes)).unwrap();
    let head = cuda.dense(&head, None).unwrap();
    let x = cuda.half_tensor(&Matrix { rows: 3, columns: 1, data: vec![1.0, 1.0, -1.0] });
    let found = cuda.predict(&x, &head, &targets(&[700, 2900, 0])).unwrap();
    let argmax: Vec<bool> = found.iter().map(|prediction| prediction.argmax).collect();
    assert_eq!(argmax, [true, false, true]);
}

#[test]
fn changes_and_divergences_agree_with_the_cpu() {
    let Some(cuda) = device("changes_and_divergences_agree_with_the_cpu") else { return };
    let cpu = Cpu::new().unwrap();
    let mut random = Random(11);
    for (rows, hidden, vocabulary) in
        [(1, 16, 3), (5, 64, 1000), (33, 576, 4099), (700, 32, 50_000)]
    {
        let original = Matrix { rows, columns: hidden, data: random.values(rows * hidden) };
        let changed =
            original.data.iter().map(|x| f16::from_f32(x + random.value() / 8.0).to_f32());
        let mut changed = Matrix { rows, columns: hidden, data: changed.collect() };
        // A row that stays as it is.
        changed.data[..hidden].copy_from_slice(&original.data[..hidden]);
        let on_cpu = |matrix: &Matrix| cpu.upload(matrix.clone()).unwrap();
        let on_gpu = |matrix: &Matrix| cuda.upload(matrix.clone()).unwrap();
        let expected = cpu.relative_squared_error(&on_cpu(&changed), &on_cpu(&original)).unwrap();
        let found = cuda.relative_squared_error(&on_gpu(&changed), &on_gpu(&original)).unwrap();
        assert_eq!(found.len(), rows);
        assert_eq!((found[0], expected[0]), (0.0, 0.0));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 1e-9 * expected, "{found} {expected}");
        }

        let shape = [vocabulary, hidden];
        let bytes: Vec<u8> = (0..vocabulary * hidden)
            .flat_map(|_| f16::from_f32(random.value() / (hidden as f32).sqrt()).to_le_bytes())
            .collect();
        let stored = Stored::in_memory("head", Dtype::F16, &shape, &bytes);
        let head = cpu.dense(&cpu.load(stored).unwrap(), None).unwrap();
        let expected = cpu.kl_divergence(&on_cpu(&changed), &on_cpu(&original), &head).unwrap();
        let head = cuda.dense(&cuda.load(stored).unwrap(), None).unwrap();
        let (changed, original) = (cuda.half_tensor(&changed), cuda.half_tensor(&original));
        let found = cuda.kl_divergence(&changed, &original, &head).unwrap();
        assert_eq!(found.len(), rows);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= 2e-6 + 1e-3 * expected, "{found} {expected}");
        }
    }
}
