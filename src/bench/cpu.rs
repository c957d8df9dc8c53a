/*! The CPU's matrix products, f32 and W4A4, beside faer's f32 product, at the shapes of real models'
linears.

Ours read weights that are packed once and used for every batch, as in calibration and evaluation;
packing is not counted, and neither is quantizing the activations of the W4A4 product. The baseline, which builds with the feature
`bench-faer` have, is faer's product on the weight as it lies in the checkpoint, `[n, k]`; several threads share its rows. */

use super::{Row, Work, medians};
use crate::backend::cpu::gemm::{Panels, Rows, par_gemm};
use crate::backend::cpu::integer::{IntegerLinear, linear};
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::quantize::quantize_rows;
use crate::quant::codebook::Codebook;
use crate::quant::grid::Scaling;
use crate::quant::number::{NumberFormat, OutlierFormat, RowFormat, ScaleFormat};
use crate::quant::order::channel_order;
use crate::quant::site::{SiteFormat, Transform};
use crate::quant::weights::round_to_nearest;
use crate::{Error, Result};

/// The sizes of a product `[m, k] x [n, k]^T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Tokens.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
}

/// The linears of SmolLM2-135M and its head, one window of 2048 tokens.
pub const SMOLLM2_135M: [Product; 5] = [
    Product { m: 2048, n: 576, k: 576 },
    Product { m: 2048, n: 192, k: 576 },
    Product { m: 2048, n: 1536, k: 576 },
    Product { m: 2048, n: 576, k: 1536 },
    Product { m: 2048, n: 49152, k: 576 },
];

/// Two linears of Llama-2-7B, 512 tokens.
pub const LLAMA_2_7B: [Product; 2] =
    [Product { m: 512, n: 4096, k: 4096 }, Product { m: 512, n: 11008, k: 4096 }];

/// Measures each product on random values with the given number of threads, by medians of a few
/// rounds: more for small products, three for the largest.
///
/// # Errors
/// A machine error if the threads cannot be started.
pub fn products(isa: Isa, threads: usize, products: &[Product]) -> Result<Vec<Row>> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| {
        Error::machine(format!("{threads} threads cannot be started: {error}"))
            .hint("ask for fewer with --threads")
    })?;
    let kernels = [Kernel::F32, Kernel::W4A4];
    let rows = kernels.into_iter().flat_map(|kernel| {
        products.iter().map(move |product| measure(isa, threads, *product, kernel))
    });
    Ok(pool.install(|| rows.collect()))
}

/// What is measured beside faer's product.
#[derive(Clone, Copy)]
enum Kernel {
    F32,
    /// Groups of 64, 64 INT8 outlier channels.
    W4A4,
}

fn measure(isa: Isa, threads: usize, product: Product, kernel: Kernel) -> Row {
    let Product { m, n, k } = product;
    let (x, w) = (random(m * k, 1), random(n * k, 2));
    let mut y = vec![0.0; m * n];
    let ours: Work<'_> = match kernel {
        Kernel::F32 => {
            let panels = Panels::from_rows(&w, n, k);
            let x = &x;
            Box::new(move || par_gemm(isa, Rows::new(x, m, k), &panels, &mut y, n, false))
        }
        Kernel::W4A4 => {
            let site = identity_site(k, 64, if k > 64 { 64 } else { 0 });
            let weights = site.row.weights(4, Codebook::Int, 1);
            let arranged: Vec<f32> = w.chunks(k).flat_map(|row| arranged(&site, row)).collect();
            let w = round_to_nearest(&arranged, n, &weights, Scaling::clipped(1.0));
            let w = IntegerLinear::new(&w.expect("random weights are finite"));
            let x = quantize_rows(isa, &x, m, &site).expect("random activations are finite");
            Box::new(move || linear(isa, &x, &w, &mut y))
        }
    };
    let operations = 2.0 * m as f64 * n as f64 * k as f64;
    let rounds = (3e10 / operations.max(1.0)).clamp(3.0, 15.0) as usize;
    let mut works: Vec<_> =
        [Some(ours), baseline(threads, product, &x, &w)].into_iter().flatten().collect();
    let seconds = medians(rounds, &mut works);
    let name = match kernel {
        Kernel::F32 => "f32",
        Kernel::W4A4 => "w4a4",
    };
    Row::new(format!("{name} ({})", isa.name()), product, threads, &seconds)
}

/// faer's f32 product of the same sizes.
#[cfg(any(test, feature = "bench-faer"))]
fn baseline<'a>(threads: usize, product: Product, x: &'a [f32], w: &'a [f32]) -> Option<Work<'a>> {
    use faer::linalg::matmul::matmul;
    use faer::{Accum, MatMut, MatRef, Par};
    use rayon::prelude::*;

    let Product { m, n, k } = product;
    let mut y = vec![0.0; m * n];
    let rows_of_thread = m.div_ceil(threads.max(1)).max(1);
    Some(Box::new(move || {
        let outputs = y.par_chunks_mut((rows_of_thread * n).max(1));
        outputs.zip(x.par_chunks((rows_of_thread * k).max(1))).for_each(|(y, x)| {
            let rows = x.len() / k;
            matmul(
                MatMut::from_row_major_slice_mut(y, rows, n),
                Accum::Replace,
                MatRef::from_row_major_slice(x, rows, k),
                MatRef::from_row_major_slice(w, n, k).transpose(),
                1.0,
                Par::Seq,
            );
        });
    }))
}

/// Without the feature there is none.
#[cfg(not(any(test, feature = "bench-faer")))]
fn baseline<'a>(_: usize, _: Product, _: &'a [f32], _: &'a [f32]) -> Option<Work<'a>> {
    None
}

/// All channels in their own order, the last of them outliers: integers of 4 bits.
pub(super) fn identity_site(
    channels: usize,
    group_size: usize,
    outlier_channels: usize,
) -> SiteFormat {
    let order = channel_order(&vec![0.0; channels], false, outlier_channels, group_size);
    let row = RowFormat {
        numbers: NumberFormat {
            bits: 4,
            codebook: Codebook::Int,
            group_size,
            scale: ScaleFormat::F16,
        },
        groups: (channels - outlier_channels).div_ceil(group_size),
        outlier_channels,
        outlier_format: OutlierFormat::Int8,
    };
    SiteFormat { channels, order, row, clip: 1.0, transform: Transform::None }
}

fn arranged(site: &SiteFormat, row: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; site.width()];
    site.permute(row, &mut out);
    out
}

/// Values in -1..1, the same in every run.
pub(super) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            // Knuth's 64-bit linear congruence; its high bits are good enough for timing.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_product_has_a_row_with_finite_rates() {
        let products = [Product { m: 5, n: 7, k: 9 }, Product { m: 1, n: 40, k: 3 }];
        for threads in [1, 3] {
            let rows = super::products(Isa::Portable, threads, &products).unwrap();
            assert_eq!(rows.len(), 4);
            for (row, product) in rows.iter().zip(products.iter().cycle().copied()) {
                assert_eq!(Product { m: row.m, n: row.n, k: row.k }, product);
                assert!(row.name.contains("portable") && row.threads == threads);
                assert!(row.gflops > 0.0 && row.ratio.unwrap().is_finite());
            }
        }
    }

    /// Prints the rates on one thread: `cargo test --release rates_beside_faer -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement of some seconds"]
    #[expect(clippy::print_stderr, reason = "the measurement's result")]
    fn rates_beside_faer() {
        let products = [SMOLLM2_135M.split_at(4).0, LLAMA_2_7B.split_at(1).0].concat();
        for row in super::products(Isa::detect().unwrap(), 1, &products).unwrap() {
            let Row { name, m, n, k, gflops, baseline_gflops, ratio, .. } = row;
            let (baseline_gflops, ratio) = (baseline_gflops.unwrap(), ratio.unwrap());
            eprintln!("{name} {m} x {n} x {k}: {gflops:.1}, faer {baseline_gflops:.1}, {ratio:.3}");
        }
    }
}
