//! Flags of the choice of tokens.

use clap::Args;

use super::values;
use crate::Result;
use crate::network::Model;
use crate::serve::{GenerationSettings, Sampling, stop_tokens};

#[derive(Args, Debug)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingFlags {
    /// New tokens at most
    #[arg(long, value_name = "N", default_value = "256", value_parser = values::count)]
    max_new_tokens: usize,
    /// What logits are divided by; 0 takes the most probable token each time
    #[arg(long, value_name = "T", default_value = "0", value_parser = values::temperature)]
    temperature: f64,
    /// Draw among the K most probable tokens; 0 for all
    #[arg(long, value_name = "K", default_value = "0", value_parser = values::top_k)]
    top_k: usize,
    /// Draw among the most probable tokens that together have this probability
    #[arg(long, value_name = "P", default_value = "1", value_parser = values::top_p)]
    top_p: f64,
    /// Leave out tokens less probable than this share of the most probable one
    #[arg(long, value_name = "P", default_value = "0", value_parser = values::min_p)]
    min_p: f64,
    /// Seed of the draws, a whole number
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Go on after tokens that end a text, to exactly --max-new-tokens
    #[arg(long)]
    ignore_eos: bool,
}

impl SamplingFlags {
    /// What the flags and the model's files say.
    pub(crate) fn settings(&self, model: &Model) -> Result<GenerationSettings> {
        let stop = if self.ignore_eos { Vec::new() } else { stop_tokens(model)? };
        let Self { temperature, top_k, top_p, min_p, .. } = *self;
        Ok(GenerationSettings {
            most_new: self.max_new_tokens,
            stop,
            sampling: Sampling { temperature, top_k, top_p, min_p },
            seed: self.seed,
        })
    }
}
