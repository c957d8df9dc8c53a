use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{MatMut, MatRef, Par, Side};

use super::super::gemm::tests::{on_threads, random};
use super::super::gram::gram_add;
use super::*;

/// The sizes at which a panel, a block, a strip or a kernel's tile is full, or one row more or less.
const SIZES: [usize; 17] = [1, 2, 5, 6, 7, 31, 63, 64, 65, 127, 191, 193, 255, 256, 257, 449, 530];

/// The definition, one element after the other.
fn plain_inverse_factor(mut work: Vec<f32>, n: usize) -> Option<Vec<f32>> {
    for r in 0..n {
        for i in 0..r {
            for j in r..n {
                work[r * n + j] = work[i * n + r].mul_add(work[i * n + j], work[r * n + j]);
            }
        }
        let root = root(-work[r * n + r])?;
        work[r * n + r] = root;
        (r + 1..n).for_each(|j| work[r * n + j] /= -root);
    }
    let mut x = vec![0.0; n * n];
    for r in 0..n {
        x[r * n + r] = -1.0;
        for i in 0..r {
            for j in 0..=i {
                x[r * n + j] = work[i * n + r].mul_add(x[i * n + j], x[r * n + j]);
            }
        }
        (0..=r).for_each(|j| x[r * n + j] /= -work[r * n + r]);
    }
    Some(x)
}

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

/// `-a` in the upper triangle, NaN below it.
fn work(a: &[f32], n: usize) -> Vec<f32> {
    (0..n * n).map(|at| if at % n < at / n { f32::NAN } else { -a[at] }).collect()
}

/// `L^-1` of faer's `A = L L^T`.
fn of_faer(a: &[f32], n: usize) -> Option<Vec<f32>> {
    let factor = MatRef::from_row_major_slice(a, n, n).llt(Side::Lower).ok()?;
    let mut x = vec![0.0; n * n];
    invert_lower_triangular(MatMut::from_row_major_slice_mut(&mut x, n, n), factor.L(), Par::Seq);
    Some(x)
}

#[test]
fn every_set_and_thread_count_gives_the_bits_of_the_definition() {
    for n in SIZES {
        let work = work(&matrix(n), n);
        let expected = plain_inverse_factor(work.clone(), n).unwrap();
        assert!(expected.iter().all(|value| value.is_finite()));
        for isa in Isa::available() {
            for threads in [1, 3] {
                let work = work.clone();
                let found = on_threads(threads, || inverse_factor(isa, work, n)).unwrap();
                for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let same = found.to_bits() == expected.to_bits();
                    // Zeros above the diagonal may have a sign.
                    let zero = at % n > at / n && *found == 0.0;
                    assert!(same || zero, "{isa:?} {n}, {threads} threads: {at}");
                }
            }
        }
    }
}

#[test]
fn the_inverse_factor_is_faers() {
    for n in SIZES {
        let a = matrix(n);
        let expected = of_faer(&a, n).unwrap();
        let found = inverse_factor(Isa::detect().unwrap(), work(&a, n), n).unwrap();
        let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
        for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!((found - expected).abs() <= 1e-4 * largest, "{n}: {at} {found} {expected}");
        }
    }
}

#[test]
fn matrices_that_are_not_positive_definite_have_no_factor() {
    let isa = Isa::detect().unwrap();
    for n in SIZES {
        // The pivot that fails comes first, last, and where blocks and panels begin.
        for row in [0, 63, 64, 255, 256, n - 1].into_iter().filter(|row| *row < n) {
            for pivot in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut a = matrix(n);
                a[row * n + row] = pivot;
                assert_eq!(inverse_factor(isa, work(&a, n), n), None, "{n}: {row} {pivot}");
                // faer takes an infinite pivot.
                assert!(pivot == f32::INFINITY || of_faer(&a, n).is_none(), "{n}: {row} {pivot}");
            }
        }
        let mut a = matrix(n);
        a[n - 1] = f32::NAN;
        assert_eq!(inverse_factor(isa, work(&a, n), n), None, "{n}");
    }
    assert_eq!(inverse_factor(isa, Vec::new(), 0), Some(Vec::new()));
}

/// Prints seconds of ours and of faer: `cargo test --release cholesky -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement of some seconds"]
#[expect(clippy::print_stderr, reason = "the measurement's result")]
fn seconds_against_faer() {
    for n in [576, 1536, 4096] {
        let a = matrix(n);
        let negated = work(&a, n);
        for threads in [1, 2] {
            let (ours, faer) = on_threads(threads, || {
                crate::bench::cpu::medians(
                    5,
                    || drop(inverse_factor(Isa::detect().unwrap(), negated.clone(), n)),
                    || drop(of_faer(&a, n)),
                )
            });
            eprintln!("{n}, {threads} threads: {ours:.4} s, faer {faer:.4} s");
        }
    }
}
