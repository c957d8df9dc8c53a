/*! Speed, always beside a baseline measured in the same process and in turn with it. */

mod attention;
mod cpu;
mod device;
mod gemm;
mod gemm_models;
mod prefill;
mod quantize;
mod random_block;
mod rate;
mod serve;
mod svg;
mod synthetic;

use serde::Serialize;
use serde_json::{Map, Value};

pub use attention::{
    ATTENTION_MODELS, AttentionModel, AttentionOutcome, AttentionRow, AttentionSettings, attention,
    attention_models,
};
pub use cpu::{LLAMA_2_7B, Product, SMOLLM2_135M, products};
pub use gemm::{GemmOutcome, GemmRow, GemmSettings, gemm};
pub use gemm_models::{GEMM_MODELS, GemmModel, gemm_models};
pub use prefill::{PrefillSettings, prefill};
pub use quantize::{KernelTimes, quantize};
pub use serve::{
    Batch, Device, NetworkShape, RowKind, ServeOutcome, ServeRow, ServeSettings, StepTime,
    Workload, serve,
};
pub use synthetic::{SHAPES, SyntheticModel};

use crate::Result;
use crate::backend::cpu::isa::Isa;

/// The result of `atom bench`: rows of named figures, printed as a table in the order of their keys.
#[derive(Clone, Debug, Serialize)]
pub struct BenchOutcome {
    /// For example `name, m, n, k, gflops, baseline_gflops, ratio`.
    pub rows: Vec<Map<String, Value>>,
    /// What holds for all rows.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub facts: Map<String, Value>,
}

impl BenchOutcome {
    fn of(rows: &[impl Serialize]) -> Self {
        let row = |row| match serde_json::to_value(row) {
            Ok(Value::Object(row)) => row,
            _ => unreachable!("a row is a struct of numbers and text"),
        };
        Self { rows: rows.iter().map(row).collect(), facts: Map::new() }
    }
}

/// `atom bench cpu`: f32 and W4A4 products beside faer's f32 product, on one thread and, with more
/// than one, on all. A build without the feature `bench-faer` has our products only, and says so.
pub fn cpu() -> Result<BenchOutcome> {
    let isa = Isa::detect()?;
    let shapes = [&SMOLLM2_135M[..], &LLAMA_2_7B[..]].concat();
    let mut rows = products(isa, 1, &shapes)?;
    let threads = rayon::current_num_threads();
    if threads > 1 {
        rows.extend(products(isa, threads, &shapes)?);
    }
    let mut outcome = BenchOutcome::of(&rows);
    if rows.iter().all(|row| row.ratio.is_none()) {
        outcome.facts.insert("baseline".into(), NO_BASELINE.into());
    }
    Ok(outcome)
}

const NO_BASELINE: &str = "none; build atom with `cargo build --release --features bench-faer`";

/// One measured kernel.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What was measured, and on which instruction set.
    pub name: String,
    /// Rows of the product.
    pub m: usize,
    /// Columns of the product.
    pub n: usize,
    /// Depth of its sums.
    pub k: usize,
    /// Threads, of ours and of the baseline.
    pub threads: usize,
    /// Our rate, in 10^9 multiplications and additions a second.
    pub gflops: f64,
    /// The baseline's rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline_gflops: Option<f64>,
    /// The first over the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

impl Row {
    /// A row from the median seconds of ours and, where there is one, of the baseline.
    pub fn new(name: String, product: Product, threads: usize, seconds: &[f64]) -> Self {
        let Product { m, n, k } = product;
        let rate = |seconds: &f64| 2.0 * m as f64 * n as f64 * k as f64 / seconds / 1e9;
        let (gflops, baseline_gflops) = (rate(&seconds[0]), seconds.get(1).map(rate));
        let ratio = baseline_gflops.map(|baseline| gflops / baseline);
        Self { name, m, n, k, threads, gflops, baseline_gflops, ratio }
    }
}

/// What is measured.
pub type Work<'a> = Box<dyn FnMut() + Send + 'a>;

/// Seconds of each work, medians of `rounds` (at least one) in which each runs once, so that a change in
/// the processor's clock meets all. A first round warms up.
pub fn medians(rounds: usize, works: &mut [Work<'_>]) -> Vec<f64> {
    let mut seconds = vec![Vec::new(); works.len()];
    for round in 0..=rounds.max(1) {
        for (work, seconds) in works.iter_mut().zip(&mut seconds) {
            let start = std::time::Instant::now();
            work();
            if round > 0 {
                // A clock too coarse for the work must not make a rate infinite.
                seconds.push(start.elapsed().as_secs_f64().max(1e-9));
            }
        }
    }
    seconds.iter_mut().map(|seconds| median(seconds)).collect()
}

/// The middle value, the lower one of two.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_leave_out_the_first_round_and_alternate() {
        let order = std::sync::Mutex::new(String::new());
        let names = &order;
        let work = |name| -> Work<'_> { Box::new(move || names.lock().unwrap().push(name)) };
        assert_eq!(medians(2, &mut [work('o'), work('b')]).len(), 2);
        assert_eq!(order.into_inner().unwrap(), "obobob");
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0]), 1.0);
    }

    #[test]
    fn a_row_counts_two_operations_a_product() {
        let row = |seconds| Row::new("x".into(), Product { m: 1000, n: 1000, k: 500 }, 1, seconds);
        let Row { gflops, baseline_gflops, ratio, .. } = row(&[0.5, 1.0]);
        assert_eq!((gflops, baseline_gflops, ratio), (2.0, Some(1.0), Some(2.0)));
        let alone = serde_json::to_value(row(&[0.5])).unwrap();
        assert_eq!(alone["gflops"], 2.0);
        assert!(alone.get("baseline_gflops").is_none() && alone.get("ratio").is_none());
    }
}
