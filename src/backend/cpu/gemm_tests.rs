use super::*;

const SHAPES: [(usize, usize, usize); 15] = [
    (1, 1, 1),
    (1, 33, 7),
    (7, 1, 172),
    (5, 32, 1),
    (13, 31, 33),
    (31, 33, 65),
    (12, 64, 576),
    (25, 172, 64),
    (64, 172, 172),
    (3, 576, 321),
    (251, 40, 20),
    (13, 130, 1600),
    (4, 5, 0),
    (0, 5, 4),
    (5, 0, 4),
];

pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub(crate) fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

#[test]
fn every_set_and_thread_count_gives_the_bits_of_the_definition() {
    for (m, n, k) in SHAPES {
        let (a, w) = (random(m * k, 1), random(n * k, 2));
        let panels = Panels::from_rows(&w, n, k);
        let stride = n + 3;
        for accumulate in [false, true] {
            // What is overwritten starts as NaN; what lies outside must stay NaN.
            let inside = |i: usize| i % stride < n && i / stride < m;
            let start: Vec<f32> = random((m + 1) * stride, 3)
                .into_iter()
                .enumerate()
                .map(|(i, value)| if accumulate && inside(i) { value } else { f32::NAN })
                .collect();
            let mut expected = start.clone();
            let rows = Rows::new(&a, m, k);
            plain_gemm(rows, &panels, &mut expected, stride, accumulate);
            let as_expected = |(i, value): (usize, &f32)| value.is_nan() != inside(i);
            assert!(expected.iter().enumerate().all(as_expected));
            for isa in Isa::available() {
                let mut c = start.clone();
                gemm(isa, rows, &panels, &mut c, stride, accumulate);
                assert_eq!(bits(&c), bits(&expected), "{isa:?} {m}x{n}x{k}");
                for threads in [1, 3] {
                    let mut c = start.clone();
                    on_threads(threads, || {
                        par_gemm(isa, rows, &panels, &mut c, stride, accumulate)
                    });
                    assert_eq!(bits(&c), bits(&expected), "{isa:?} {m}x{n}x{k} {threads}");
                }
            }
        }
    }
}

/// The panic's sentence.
pub(crate) fn refusal(work: impl FnOnce() + std::panic::UnwindSafe) -> String {
    let panic = std::panic::catch_unwind(work).expect_err("it is refused");
    let sentence = panic.downcast_ref::<String>().cloned();
    sentence.unwrap_or_else(|| (*panic.downcast_ref::<&str>().unwrap()).to_owned())
}

#[test]
fn sizes_that_wrap_are_refused() {
    const HUGE: usize = 1 << 63;
    let values = [1.0f32; 64];
    for isa in Isa::available() {
        let product = |a: Rows<'static>, c_stride: usize, parallel: bool| {
            refusal(move || {
                let panels = Panels::from_rows(&[1.0; 8], 4, 2);
                let mut c = [0.0; 64];
                if parallel {
                    par_gemm(isa, a, &panels, &mut c, c_stride, false);
                } else {
                    gemm(isa, a, &panels, &mut c, c_stride, false);
                }
            })
        };
        static DATA: [f32; 64] = [1.0; 64];
        let rows =
            |rows, row_stride, column_stride| Rows { data: &DATA, rows, row_stride, column_stride };
        for parallel in [false, true] {
            // Twice the stride is 0, and so would be where the last row begins.
            let last_row = product(rows(3, 1, 1), HUGE, parallel);
            assert!(last_row.contains("C is smaller than 3 x 4"), "{last_row}");
            let many = product(rows(HUGE + 1, 0, 1), 4, parallel);
            assert!(many.contains("C is smaller than"), "{many}");
            let stride = product(rows(3, HUGE, 1), 4, parallel);
            assert!(stride.contains("A has fewer than 2 columns"), "{stride}");
            let column = product(rows(2, 1, usize::MAX), 4, parallel);
            assert!(column.contains("A has fewer than 2 columns"), "{column}");
        }
    }
    let weight = refusal(move || drop(Panels::from_rows(&values, HUGE, 2)));
    assert!(weight.contains("has only 64 values"), "{weight}");
    let columns = refusal(move || drop(Panels::from_columns(&values, 3, 4, HUGE)));
    assert!(columns.contains("has only 64 values"), "{columns}");
    let panels = refusal(|| drop(Panels::from_rows_with(PANEL, 1 << 58, |_, _| {})));
    assert!(panels.contains("fit no memory"), "{panels}");
}

#[test]
fn the_definition_is_a_matrix_product() {
    let (m, n, k) = (5, 37, 70);
    let (a, w) = (random(m * k, 4), random(n * k, 5));
    let mut c = vec![f32::NAN; m * n];
    plain_gemm(Rows::new(&a, m, k), &Panels::from_rows(&w, n, k), &mut c, n, false);
    for (i, value) in c.into_iter().enumerate() {
        let products = (0..k).map(|d| f64::from(a[i / n * k + d]) * f64::from(w[i % n * k + d]));
        assert!((products.sum::<f64>() - f64::from(value)).abs() < 1e-5);
    }
}

#[test]
fn parts_and_transposed_rows_give_the_same_bits() {
    let (m, n, k) = (30, 150, 50);
    let (a, b) = (random(k * m, 6), random(k * n, 7));
    let a_rows: Vec<f32> = (0..m * k).map(|i| a[i % k * m + i / k]).collect();
    let panels = Panels::from_columns(&b, k, n, n);
    for isa in Isa::available() {
        let mut expected = vec![f32::NAN; m * n];
        gemm(isa, Rows::new(&a_rows, m, k), &panels, &mut expected, n, false);
        let mut pieces = vec![f32::NAN; m * n];
        for columns in [0..64, 64..128, 128..150] {
            for depth in [0..20, 20..50] {
                let left = Rows { data: &a[depth.start * m..], ..Rows::transposed(&a, m) };
                let part = panels.part(columns.clone(), depth.clone());
                gemm(isa, left, part, &mut pieces[columns.start..], n, depth.start > 0);
            }
        }
        assert_eq!(bits(&pieces), bits(&expected), "{isa:?}");
    }
}
