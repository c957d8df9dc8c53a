/*! Refuses weights that are already quantized, by `quantization_config`. */

use super::config::{Config, shortened};
use crate::{Error, Result};

/// Readable names of the methods in `config.json`.
const NAMES: [(&str, &str); 6] = [
    ("gptq", "GPTQ"),
    ("awq", "AWQ"),
    ("bitsandbytes", "bitsandbytes"),
    ("fp8", "block-wise FP8"),
    ("fbgemm_fp8", "FBGEMM FP8"),
    ("mxfp4", "MXFP4"),
];

/// Name of this program's own method.
const OWN: &str = "atom";

/// Refuses weights that another program has quantized.
///
/// # Errors
/// A method other than this program's own, or a field of a wrong type.
pub(super) fn check(config: &Config) -> Result<()> {
    for key in ["quantization_config", "compression_config"] {
        let Some(settings) = config.object(key)? else { continue };
        let method = match settings.given("quant_method") {
            None => "a method that it does not name".to_owned(),
            Some(_) => match settings.text("quant_method")?.unwrap_or_default() {
                OWN => continue,
                named => {
                    let known = NAMES.iter().find(|(method, _)| *method == named);
                    known.map_or_else(
                        || format!("`{}`", shortened(named)),
                        |(_, name)| (*name).to_owned(),
                    )
                }
            },
        };
        return Err(quantized(config, key, &method));
    }
    // What mlx-lm writes.
    match config.object("quantization")? {
        Some(_) => Err(quantized(config, "quantization", "MLX")),
        None => Ok(()),
    }
}

fn quantized(config: &Config, key: &str, method: &str) -> Error {
    Error::input(format!(
        "{}: the weights are quantized already, by {method} (`{key}`)",
        config.file()
    ))
    .hint(format!(
        "give the checkpoint that it was made from, with weights in BF16, F16 or F32; if these are, take `{key}` out \
         of config.json"
    ))
}
