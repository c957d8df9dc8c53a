/*! Rotary position embedding: its frequencies by `config.json`.

Fields are resolved as transformers 5 does (`convert_rope_params_to_dict`, `standardize_rope_params`). */

use super::config::Config;
use crate::{Error, Result};

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Change of the frequencies for long contexts.
    pub scaling: RopeScaling,
    /// Share of a head's channels that are rotated, the first ones.
    pub share: f64,
    /// Whether a pair is two neighbouring channels instead of one of each half.
    pub interleaved: bool,
}

/// How RoPE's frequencies are changed.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by a factor.
    Linear(f64),
    /// Llama 3.1's: low frequencies divided, high ones unchanged, blended in between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Turns in the original context below which a frequency is low.
        low: f64,
        /// Turns above which it is high; greater than `low`.
        high: f64,
        /// Tokens of the original context.
        original: f64,
    },
}

const THETA: &str = "rope_theta";

/// What this version supports, for hints.
const KNOWN: &str = "this version knows the RoPE types `default`, `linear` and `llama3`, the same for all blocks and \
                     over all channels of a head";

impl Rope {
    /// Reads `rope_theta`, `rope_scaling` and `rope_parameters`. A non-empty `rope_scaling` replaces `rope_parameters`;
    /// `rope_theta` in either takes precedence over the file's own, which takes precedence over the family's default.
    ///
    /// # Errors
    /// A field of a wrong type, or an embedding that this version does not compute.
    pub fn from_config(config: &Config, family_theta: f64, max_positions: usize) -> Result<Self> {
        check_full_rotation(config)?;
        let [scaling, parameters] =
            ["rope_scaling", "rope_parameters"].map(|key| config.object(key));
        let given = [scaling?, parameters?].into_iter().flatten();
        let given = given.into_iter().find(|settings| settings.keys().next().is_some());
        let inner = match &given {
            Some(settings) => {
                check_settings(settings)?;
                settings.positive(THETA)?
            }
            None => None,
        };
        // With a value inside, null means nothing.
        let outer = match config.given(THETA) {
            None if inner.is_some() => None,
            _ => config.positive(THETA)?,
        };
        let scaling = match &given {
            Some(settings) => RopeScaling::from_config(config, settings, max_positions)?,
            None => RopeScaling::None,
        };
        let theta = inner.or(outer).unwrap_or(family_theta);
        Ok(Self { theta, scaling, share: 1.0, interleaved: false })
    }

    /// Radians per position of each pair of channels.
    pub(super) fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        self.unscaled(head_dim).map(|frequency| self.scaling.scaled(frequency)).collect()
    }

    /// What each frequency is divided by `[head_dim / 2]`, where that is not the same for all: with Llama 3.1's scaling.
    pub fn divisors(&self, head_dim: usize) -> Option<Vec<f32>> {
        let RopeScaling::Llama3 { .. } = self.scaling else { return None };
        let divisor = |frequency| (frequency / self.scaling.scaled(frequency)) as f32;
        Some(self.unscaled(head_dim).map(divisor).collect())
    }

    /// The frequencies before they are scaled.
    fn unscaled(&self, head_dim: usize) -> impl Iterator<Item = f64> {
        // f32 steps as in the models' own code, so that angles agree with it.
        let exponent = move |pair: usize| (2 * pair) as f32 / head_dim as f32;
        (0..head_dim / 2).map(move |pair| f64::from(1.0 / (self.theta as f32).powf(exponent(pair))))
    }
}

impl RopeScaling {
    /// A frequency under this scaling.
    fn scaled(&self, frequency: f64) -> f64 {
        match *self {
            Self::None => frequency,
            Self::Linear(factor) => frequency / factor,
            Self::Llama3 { factor, low, high, original } => {
                let turns = original * frequency / std::f64::consts::TAU;
                let blend = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (blend + (1.0 - blend) / factor)
            }
        }
    }

    fn from_config(config: &Config, settings: &Config, max_positions: usize) -> Result<Self> {
        let required = |key| settings.positive(key)?.ok_or_else(|| lacks(settings, key));
        match rope_type(settings)? {
            "default" => Ok(Self::None),
            "linear" => Ok(Self::Linear(required("factor")?)),
            "llama3" => {
                let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
                if low >= high {
                    let right = format!("greater than `low_freq_factor`, {low}");
                    return Err(settings.wrong("high_freq_factor", &right));
                }
                let original = original_positions(config, settings)?;
                let original = original.unwrap_or(max_positions as f64);
                Ok(Self::Llama3 { factor: required("factor")?, low, high, original })
            }
            _ => {
                let key = if settings.given("rope_type").is_some() { "rope_type" } else { "type" };
                Err(settings.unsupported(key, KNOWN))
            }
        }
    }

    /// The factor by which the context is longer than `max_position_embeddings`. By the conventions of transformers that
    /// field is the original length for linear scaling, and the extended one for `llama3`.
    pub fn extension(&self) -> f64 {
        match self {
            Self::Linear(factor) => factor.max(1.0),
            Self::None | Self::Llama3 { .. } => 1.0,
        }
    }
}

/// The kind of scaling: `rope_type`, or `type` in older files.
fn rope_type<'a>(settings: &Config<'a>) -> Result<&'a str> {
    let (new, old) = (settings.text("rope_type")?, settings.text("type")?);
    match (new, old) {
        (Some(new), Some(old)) if new != old => {
            let what = format!("`type` is {old:?}; versions of transformers disagree which counts");
            Err(settings.contradiction("rope_type", &what))
        }
        (new, old) => Ok(new.or(old).unwrap_or("default")),
    }
}

/// `original_max_position_embeddings`, in the settings or in the file itself.
fn original_positions(config: &Config, settings: &Config) -> Result<Option<f64>> {
    const KEY: &str = "original_max_position_embeddings";
    let outer = config.given(KEY).map(|_| config.positive(KEY)).transpose()?.flatten();
    match (settings.positive(KEY)?, outer) {
        (Some(inner), Some(outer)) if inner != outer => {
            Err(settings.contradiction(KEY, &format!("{KEY} of the file itself is {outer}")))
        }
        (inner, outer) => Ok(inner.or(outer)),
    }
}

/// Refuses settings by layer type, and settings that this version does not compute.
fn check_settings(settings: &Config) -> Result<()> {
    let of_layers = |key: &&str| {
        key.ends_with("_attention") || settings.given(key).is_some_and(|value| value.is_object())
    };
    if let Some(layers) = settings.keys().find(of_layers) {
        return Err(settings.unsupported(layers, KNOWN));
    }
    for neutral in ["attention_factor", "mscale", "mscale_all_dim"] {
        if settings.given(neutral).is_some() && settings.number(neutral)? != Some(1.0) {
            return Err(settings.unsupported(neutral, KNOWN));
        }
    }
    if settings.given("mrope_section").is_some() {
        return Err(settings.unsupported("mrope_section", KNOWN));
    }
    check_full_rotation(settings)
}

/// Refuses a `partial_rotary_factor` that leaves channels of a head unrotated.
fn check_full_rotation(config: &Config) -> Result<()> {
    const KEY: &str = "partial_rotary_factor";
    if config.given(KEY).is_none() || config.number(KEY)? == Some(1.0) {
        return Ok(());
    }
    Err(config.unsupported(KEY, KNOWN))
}

fn lacks(settings: &Config, key: &str) -> Error {
    settings.wrong(key, "a number above zero for this type of RoPE")
}
