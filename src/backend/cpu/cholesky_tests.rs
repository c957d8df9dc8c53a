use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{MatMut, MatRef, Par, Side};

use super::super::factor::{Factor, inverse_factor};
use super::super::gemm::tests::{bits, on_threads, random};
use super::super::gram::gram_add;
use super::*;

/// The sizes at which a tile is full, or has one row more or less.
const SIZES: [usize; 12] = [1, 2, 5, 31, 63, 64, 65, 127, 128, 191, 193, 257];

/// A matrix like a damped Hessian's: `X^T X` of fewer tokens than channels, and a diagonal.
fn matrix(n: usize) -> Vec<f32> {
    let x = random(n.div_ceil(2) * n, n as u64);
    let mut a = vec![0.0; n * n];
    gram_add(Isa::Portable, &x, n.div_ceil(2), n, &mut a);
    for i in 0..n {
        a[i * n + i] += 0.5;
        (0..i).for_each(|j| a[j * n + i] = a[i * n + j]);
    }
    a
}

fn found(isa: Isa, a: &[f32], n: usize) -> Option<Factor> {
    inverse_factor(isa, n, |i, j| a[i * n + j])
}

/// U by faer, in f64 or f32.
fn of_faer<T: faer::traits::RealField + Copy + From<f32>>(a: &[f32], n: usize) -> Option<Vec<T>> {
    let reversed: Vec<T> = a.iter().rev().map(|value| T::from(*value)).collect();
    let factor = MatRef::from_row_major_slice(&reversed, n, n).llt(Side::Lower).ok()?;
    let mut u = vec![T::from(0.0); n * n];
    invert_lower_triangular(MatMut::from_row_major_slice_mut(&mut u, n, n), factor.L(), Par::Seq);
    u.reverse();
    Some(u)
}

#[test]
fn every_set_and_thread_count_gives_the_same_bits() {
    for n in SIZES {
        let a = matrix(n);
        let expected = found(Isa::Plain, &a, n).unwrap();
        for isa in Isa::available() {
            for threads in [1, 3] {
                let u = on_threads(threads, || found(isa, &a, n)).unwrap();
                assert!(bits(&u) == bits(&expected), "{isa:?} {n}, {threads} threads");
            }
        }
    }
}

#[test]
fn the_factor_is_faers_in_f64_but_for_its_rounding() {
    let far = |found: &[f32], expected: &[f64]| {
        let largest = expected.iter().fold(0f64, |most, value| most.max(value.abs()));
        let pairs = found.iter().zip(expected);
        let far = |(found, expected): (&f32, &f64)| (f64::from(*found) - expected).abs() / largest;
        pairs.map(far).fold(0.0, f64::max)
    };
    for n in SIZES {
        let a = matrix(n);
        let expected = of_faer::<f64>(&a, n).unwrap();
        let u = found(Isa::detect().unwrap(), &a, n).unwrap();
        assert_eq!(u.len(), n * n);
        assert!(far(&u, &expected) < 6e-8, "{n}: {}", far(&u, &expected));
        assert!(far(&u, &expected) <= far(&of_faer::<f32>(&a, n).unwrap(), &expected), "{n}");
    }
}

#[test]
fn matrices_that_are_not_positive_definite_have_no_factor() {
    let isa = Isa::detect().unwrap();
    for n in SIZES {
        // The pivot that fails comes first, last, and where tiles begin.
        for row in [0, 63, 64, n - 1].into_iter().filter(|row| *row < n) {
            for pivot in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut a = matrix(n);
                a[row * n + row] = pivot;
                assert!(found(isa, &a, n).is_none(), "{n}: {row} {pivot}");
                // faer takes an infinite pivot.
                let faer = of_faer::<f64>(&a, n);
                assert!(pivot == f32::INFINITY || faer.is_none(), "{n}: {row} {pivot}");
            }
        }
        let mut a = matrix(n);
        a[(n - 1) * n] = f32::NAN;
        assert!(found(isa, &a, n).is_none(), "{n}");
    }
}

/// Prints seconds of ours in f64 and of faer in f32: `cargo test --release cholesky -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement of some seconds"]
#[expect(clippy::print_stderr, reason = "the measurement's result")]
fn seconds_against_faer() {
    for n in [576, 1536, 4096, 11008] {
        let a = matrix(n);
        let seconds = |threads, work: &(dyn Fn() + Sync)| {
            let start = std::time::Instant::now();
            on_threads(threads, work);
            start.elapsed().as_secs_f64()
        };
        for threads in [1, 2, 1, 2] {
            let ours = seconds(threads, &|| drop(found(Isa::detect().unwrap(), &a, n)));
            let faer = seconds(threads, &|| drop(of_faer::<f32>(&a, n)));
            eprintln!("{n}, {threads} threads: {ours:.4} s, faer {faer:.4} s");
        }
    }
}
