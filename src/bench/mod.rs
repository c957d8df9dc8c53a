/*! Speed, always beside a baseline measured in the same process and in turn with it. */

mod attention;
#[cfg(any(test, feature = "bench-faer"))]
pub(crate) mod cpu;
mod device;
mod gemm;
mod gemm_models;
mod operands;
mod prefill;
mod quantize;
mod rate;
mod svg;
mod synthetic;

use serde::Serialize;
use serde_json::{Map, Value};

pub use attention::{
    ATTENTION_MODELS, AttentionModel, AttentionOutcome, AttentionRow, AttentionSettings, attention,
    attention_models,
};
#[cfg(any(test, feature = "bench-faer"))]
pub use cpu::cpu;
pub use gemm::{GemmOutcome, GemmRow, GemmSettings, gemm};
pub use gemm_models::{GEMM_MODELS, GemmModel, gemm_models};
pub use operands::Product;
pub use prefill::{PrefillSettings, prefill};
pub use quantize::{KernelTimes, quantize};
pub use synthetic::{SHAPES, SyntheticModel};

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

/// `atom bench cpu`, in a build that has its baseline: feature `bench-faer`.
///
/// # Errors
/// Always.
#[cfg(not(any(test, feature = "bench-faer")))]
pub fn cpu() -> crate::Result<BenchOutcome> {
    Err(crate::Error::machine(
        "this build of atom has no baseline to compare the CPU's products with",
    )
    .hint("build it with `cargo build --release --features bench-faer`"))
}

/// The middle value, the lower one of two.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(0.0)
}
