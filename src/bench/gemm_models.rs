/*! Linears of known models, those of a site as the one product that they are for a server. */

use crate::{Error, Result};

/// A model's linears.
#[derive(Clone, Copy, Debug)]
pub struct GemmModel {
    /// The model.
    pub name: &'static str,
    /// Name, output and input features.
    pub linears: &'static [(&'static str, usize, usize)],
}

/// The models of `atom bench gemm`.
pub const GEMM_MODELS: [GemmModel; 4] = [
    GemmModel {
        name: "llama-2-7b",
        linears: &[
            ("qkv", 12288, 4096),
            ("o", 4096, 4096),
            ("gate+up", 22016, 4096),
            ("down", 4096, 11008),
        ],
    },
    GemmModel {
        name: "llama-2-13b",
        linears: &[
            ("qkv", 15360, 5120),
            ("o", 5120, 5120),
            ("gate+up", 27648, 5120),
            ("down", 5120, 13824),
        ],
    },
    GemmModel {
        name: "llama-2-70b",
        linears: &[
            ("qkv", 10240, 8192),
            ("o", 8192, 8192),
            ("gate+up", 57344, 8192),
            ("down", 8192, 28672),
        ],
    },
    GemmModel {
        name: "mixtral-8x7b",
        linears: &[
            ("qkv", 6144, 4096),
            ("o", 4096, 4096),
            ("expert gate+up", 28672, 4096),
            ("expert down", 4096, 14336),
        ],
    },
];

impl GemmModel {
    /// Its linears, each with the model's name and its own.
    pub(super) fn linears(&self) -> impl Iterator<Item = (String, usize, usize)> {
        self.linears.iter().map(|(name, n, k)| (format!("{} {name}", self.name), *n, *k))
    }
}

/// The model of a name, or `all`.
///
/// # Errors
/// A usage error that lists the names.
pub fn gemm_models(name: &str) -> Result<Vec<GemmModel>> {
    let found: Vec<GemmModel> =
        GEMM_MODELS.into_iter().filter(|model| name == "all" || model.name == name).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let known: Vec<&str> = GEMM_MODELS.iter().map(|model| model.name).collect();
    Err(Error::usage(format!("there are no shapes named `{name}`"))
        .hint(format!("the shapes are {} and all", known.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_found_by_name() {
        assert_eq!(gemm_models("llama-2-70b").unwrap()[0].linears[3], ("down", 8192, 28672));
        assert_eq!(gemm_models("all").unwrap().len(), 4);
        let error = gemm_models("llama").unwrap_err();
        assert!(error.hint_text().unwrap().contains("mixtral-8x7b and all"));
    }
}
