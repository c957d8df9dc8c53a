/*! Rotary position embedding: its frequencies and tables by `config.json`.

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
    /// YaRN (arXiv 2309.00071): blended by the number of a pair, and cosines and sines multiplied.
    Yarn {
        /// Divisor of low frequencies.
        factor: f64,
        /// Tokens of the original context.
        original: f64,
        /// Turns in the original context of the first and of the last pair that is blended.
        turns: [f64; 2],
        /// Whether these pairs are rounded to whole numbers.
        truncated: bool,
        /// Factor of cosines and sines.
        attention: f64,
    },
    /// LongRoPE (arXiv 2402.13753): each frequency divided by a factor of its own, and cosines and sines multiplied.
    LongRope {
        /// Factors for windows of the original context.
        short: Vec<f64>,
        /// Factors for longer ones.
        long: Vec<f64>,
        /// Tokens of the original context.
        original: f64,
        /// Factor of cosines and sines.
        attention: f64,
    },
}

/// What a family has where config.json is silent.
#[derive(Clone, Copy, Debug)]
pub(super) struct RopeDefaults {
    /// `rope_theta`.
    pub theta: f64,
    /// `partial_rotary_factor`; none where the family rotates entire heads and does not read it.
    pub share: Option<f64>,
    /// Whether a pair is two neighbouring channels.
    pub interleaved: bool,
    /// `original_max_position_embeddings` of the file, where the family has a default that counts before the settings' own.
    pub original: Option<f64>,
    /// Whether there is no scaling but `longrope`, of which `su` and `yarn` are older names (Phi-3).
    pub longrope_alone: bool,
}

/// What the embedding of a network depends on besides its settings.
#[derive(Clone, Copy)]
pub(super) struct RopeContext<'a> {
    pub config: &'a Config<'a>,
    pub defaults: &'a RopeDefaults,
    pub head_dim: usize,
    pub max_positions: usize,
}

const THETA: &str = "rope_theta";
const SHARE: &str = "partial_rotary_factor";

/// What this version supports, for hints.
const KNOWN: &str = "this version knows the RoPE types `default`, `linear`, `llama3`, `yarn` and `longrope`, the same for \
                     all blocks where a family has no others";

impl RopeContext<'_> {
    /// Reads `rope_theta`, `rope_scaling` and `rope_parameters`. A non-empty `rope_scaling` replaces `rope_parameters`;
    /// `rope_theta` in either takes precedence over the file's own, which takes precedence over the family's default.
    ///
    /// # Errors
    /// A field of a wrong type, or an embedding that this version does not compute.
    pub(super) fn read(&self) -> Result<Rope> {
        let [scaling, parameters] =
            ["rope_scaling", "rope_parameters"].map(|key| self.config.object(key));
        let given = [scaling?, parameters?].into_iter().flatten();
        let given = given.into_iter().find(|settings| settings.keys().next().is_some());
        self.settings(given.as_ref(), Some(THETA), self.defaults.theta)
    }

    /// Reads settings; `outer` is the file's own field of the base, `theta` the base without one.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn settings(
        &self,
        given: Option<&Config>,
        outer: Option<&str>,
        theta: f64,
    ) -> Result<Rope> {
        let Self { config, defaults, .. } = *self;
        let inner = match given {
            Some(settings) => {
                self.check_settings(settings)?;
                settings.positive(THETA)?
            }
            None => None,
        };
        // With a value inside, null means nothing.
        let outer = match outer {
            None => None,
            Some(outer) if config.given(outer).is_none() && inner.is_some() => None,
            Some(outer) => config.positive(outer)?,
        };
        let share = self.share(given)?;
        let scaling = match given {
            Some(settings) => self.scaling(settings, share)?,
            None => RopeScaling::None,
        };
        let theta = inner.or(outer).unwrap_or(theta);
        if matches!(scaling, RopeScaling::Yarn { .. }) && theta <= 1.0 {
            return Err(config.unsupported(THETA, "yarn divides by the logarithm of the base"));
        }
        Ok(Rope { theta, scaling, share, interleaved: defaults.interleaved })
    }

    /// The share of each head that is rotated, by `partial_rotary_factor` in the settings or in the file itself.
    fn share(&self, given: Option<&Config>) -> Result<f64> {
        const RIGHT: &str =
            "a number above 0 and up to 1 that leaves pairs of channels to be rotated";
        let Self { config, defaults, head_dim, .. } = *self;
        let places = given.into_iter().chain([config]);
        let Some(place) = places.into_iter().find(|place| place.given(SHARE).is_some()) else {
            return match defaults.share {
                // transformers makes 1 of null.
                Some(_) if config.has(SHARE) => Err(config.wrong(SHARE, RIGHT)),
                share => Ok(share.unwrap_or(1.0)),
            };
        };
        let share = place.number(SHARE)?.unwrap_or(1.0);
        if defaults.share.is_none() && share != 1.0 {
            return Err(place.unsupported(SHARE, KNOWN));
        }
        let rotated = (head_dim as f64 * share) as usize;
        if !(share > 0.0 && share <= 1.0) || rotated == 0 || !rotated.is_multiple_of(2) {
            return Err(place.wrong(SHARE, RIGHT));
        }
        Ok(share)
    }

    fn scaling(&self, settings: &Config, share: f64) -> Result<RopeScaling> {
        let Self { config, defaults, max_positions, .. } = *self;
        let required = |key| settings.positive(key)?.ok_or_else(|| lacks(settings, key));
        let original = || -> Result<f64> {
            let found = original_positions(config, settings, defaults.original)?;
            Ok(found.unwrap_or(max_positions as f64))
        };
        match rope_type(settings)? {
            "default" => Ok(RopeScaling::None),
            "longrope" => self.longrope(settings, share, original()?),
            "su" | "yarn" if defaults.longrope_alone => self.longrope(settings, share, original()?),
            "linear" if !defaults.longrope_alone => Ok(RopeScaling::Linear(required("factor")?)),
            "llama3" if !defaults.longrope_alone => {
                let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
                if low >= high {
                    let right = format!("greater than `low_freq_factor`, {low}");
                    return Err(settings.wrong("high_freq_factor", &right));
                }
                let original = original()?;
                Ok(RopeScaling::Llama3 { factor: required("factor")?, low, high, original })
            }
            "yarn" => yarn(settings, original()?),
            _ => {
                let key = if settings.given("rope_type").is_some() { "rope_type" } else { "type" };
                Err(settings.unsupported(key, KNOWN))
            }
        }
    }

    /// LongRoPE (`_compute_longrope_parameters` of transformers).
    fn longrope(&self, settings: &Config, share: f64, original: f64) -> Result<RopeScaling> {
        let pairs = (self.head_dim as f64 * share) as usize / 2;
        let factors = |key| -> Result<Vec<f64>> {
            let right =
                format!("a list of {pairs} numbers above zero, one for each pair of channels");
            let list = settings.list(key, &right)?.unwrap_or_default();
            let list: Vec<f64> = list.iter().filter_map(serde_json::Value::as_f64).collect();
            let fits = list.len() == pairs && list.iter().all(|factor| *factor > 0.0);
            fits.then_some(list).ok_or_else(|| settings.wrong(key, &right))
        };
        let factor = optional(settings, "factor")?;
        let factor = factor.unwrap_or(self.max_positions as f64 / original);
        let usual = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
        Ok(RopeScaling::LongRope {
            short: factors("short_factor")?,
            long: factors("long_factor")?,
            original,
            attention: optional(settings, "attention_factor")?.unwrap_or(usual),
        })
    }

    /// Refuses settings by layer type, and settings that this version does not compute.
    fn check_settings(&self, settings: &Config) -> Result<()> {
        let of_layers = |key: &&str| {
            key.ends_with("_attention")
                || settings.given(key).is_some_and(|value| value.is_object())
        };
        if let Some(layers) = settings.keys().find(of_layers) {
            return Err(settings.unsupported(layers, KNOWN));
        }
        let multiplies = matches!(rope_type(settings)?, "yarn" | "longrope" | "su");
        for neutral in ["attention_factor", "mscale", "mscale_all_dim"] {
            if !multiplies
                && settings.given(neutral).is_some()
                && settings.number(neutral)? != Some(1.0)
            {
                return Err(settings.unsupported(neutral, KNOWN));
            }
        }
        if settings.given("mrope_section").is_some() {
            return Err(settings.unsupported("mrope_section", KNOWN));
        }
        Ok(())
    }
}

/// The field of the file itself that holds a base, where one is read, and the base without it.
pub(super) type OuterTheta = (Option<&'static str>, f64);

/// Those of blocks without and with a sliding window.
pub(super) struct OuterThetas {
    pub full: OuterTheta,
    pub sliding: OuterTheta,
}

/// The embeddings of blocks without and with a sliding window.
pub(super) struct RopeByLayerType {
    pub full: Rope,
    pub sliding: Rope,
}

impl RopeContext<'_> {
    /// Reads `rope_parameters` of a family that has one for each type of block; `rope_scaling` is of the blocks without a sliding
    /// window.
    ///
    /// # Errors
    /// As [`read`](Self::read), and settings in both fields.
    pub(super) fn read_by_layer_type(&self, thetas: &OuterThetas) -> Result<RopeByLayerType> {
        const OTHERS: &str =
            "this version reads `full_attention` and `sliding_attention` for networks of this type";
        let [scaling, parameters] =
            ["rope_scaling", "rope_parameters"].map(|key| self.config.object(key));
        let (scaling, parameters) = (scaling?, parameters?);
        let known = ["full_attention", "sliding_attention"];
        if let Some(parameters) = &parameters
            && let Some(other) = parameters.keys().find(|key| !known.contains(key))
        {
            return Err(parameters.unsupported(other, OTHERS));
        }
        let of = |kind| match &parameters {
            None => Ok(None),
            Some(parameters) => parameters.object(kind),
        };
        let (mut full, sliding) = (of("full_attention")?, of("sliding_attention")?);
        if let Some(scaling) = scaling.filter(|scaling| scaling.keys().next().is_some()) {
            if full.is_some() {
                return Err(self
                    .config
                    .contradiction("rope_scaling", "`rope_parameters` is given too"));
            }
            full = Some(scaling);
        }
        let read = |given: Option<Config>, (outer, theta): OuterTheta| {
            self.settings(given.as_ref(), outer, theta)
        };
        Ok(RopeByLayerType {
            full: read(full, thetas.full)?,
            sliding: read(sliding, thetas.sliding)?,
        })
    }
}

/// YaRN (`_compute_yarn_parameters` of transformers).
fn yarn(settings: &Config, original: f64) -> Result<RopeScaling> {
    let factor = settings.positive("factor")?.ok_or_else(|| lacks(settings, "factor"))?;
    let [mscale, of_all] = ["mscale", "mscale_all_dim"].map(|key| match settings.given(key) {
        None => Ok(0.0),
        Some(_) => Ok::<f64, Error>(settings.number(key)?.unwrap_or_default()),
    });
    let multiplier = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let usual = match (mscale?, of_all?) {
        (mscale, of_all) if mscale != 0.0 && of_all != 0.0 => {
            multiplier(mscale) / multiplier(of_all)
        }
        _ => multiplier(1.0),
    };
    let fast = optional(settings, "beta_fast")?.unwrap_or(32.0);
    let slow = optional(settings, "beta_slow")?.unwrap_or(1.0);
    if fast < slow {
        return Err(settings.wrong("beta_fast", &format!("at least `beta_slow`, {slow}")));
    }
    Ok(RopeScaling::Yarn {
        factor,
        original,
        turns: [fast, slow],
        truncated: settings.given("truncate").is_none() || settings.flag("truncate")?,
        attention: optional(settings, "attention_factor")?.unwrap_or(usual),
    })
}

/// A number above zero, if it is there and not null.
fn optional(settings: &Config, key: &str) -> Result<Option<f64>> {
    settings.given(key).map_or(Ok(None), |_| settings.positive(key))
}

impl Rope {
    /// Channels of a head that are rotated, an even number.
    pub fn rotated(&self, head_dim: usize) -> usize {
        (head_dim as f64 * self.share) as usize / 2 * 2
    }

    /// The order of a head's channels in which pair `i` is channel `i` of either half, as the tables and every backend have
    /// it, `[head_dim]`: pairs that are not rotated come last in both halves. None where the channels are in that order.
    /// Scores do not change where queries and keys are reordered alike.
    pub fn head_order(&self, head_dim: usize) -> Option<Vec<usize>> {
        let (half, rotated) = (head_dim / 2, self.rotated(head_dim));
        let pair = |pair: usize| match pair.checked_sub(rotated / 2) {
            Some(rest) => [rotated + rest, rotated + rest + half - rotated / 2],
            None if self.interleaved => [2 * pair, 2 * pair + 1],
            None => [pair, pair + rotated / 2],
        };
        let order: Vec<usize> = (0..head_dim).map(|slot| pair(slot % half)[slot / half]).collect();
        (!order.iter().copied().eq(0..head_dim)).then_some(order)
    }

    /// Cosines and sines `[seq_len, head_dim / 2]` of positions 0..seq_len, for heads in the order of
    /// [`head_order`](Self::head_order).
    pub fn tables(&self, head_dim: usize, seq_len: usize) -> [Vec<f32>; 2] {
        let frequencies = self.frequencies(head_dim, seq_len);
        let unrotated = head_dim / 2 - frequencies.len();
        let factor = self.scaling.attention_factor() as f32;
        let table = |value: fn(f64) -> f64, otherwise: f32| {
            let row = |position: usize| {
                let angles = frequencies.iter().map(move |frequency| {
                    factor * value(f64::from((position as f64 * frequency) as f32)) as f32
                });
                angles.chain(std::iter::repeat_n(otherwise, unrotated))
            };
            (0..seq_len).flat_map(row).collect()
        };
        [table(f64::cos, 1.0), table(f64::sin, 0.0)]
    }

    /// Radians per position of each pair of channels that is rotated, in windows of `seq_len` tokens.
    pub(super) fn frequencies(&self, head_dim: usize, seq_len: usize) -> Vec<f64> {
        let unscaled: Vec<f64> = self.unscaled(head_dim).collect();
        match &self.scaling {
            RopeScaling::Yarn { factor, .. } => {
                let [low, high] = self.blended_pairs(head_dim);
                let kept = |pair: usize| 1.0 - ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let blend = |(pair, frequency): (usize, f64)| {
                    frequency * (kept(pair) + (1.0 - kept(pair)) / factor)
                };
                unscaled.into_iter().enumerate().map(blend).collect()
            }
            RopeScaling::LongRope { short, long, original, .. } => {
                let factors = if seq_len as f64 > *original { long } else { short };
                unscaled.iter().zip(factors).map(|(frequency, factor)| frequency / factor).collect()
            }
            scaling => unscaled.into_iter().map(|frequency| scaling.scaled(frequency)).collect(),
        }
    }

    /// YaRN's first pair that is blended, and the last one.
    fn blended_pairs(&self, head_dim: usize) -> [f64; 2] {
        let RopeScaling::Yarn { original, turns, truncated, .. } = self.scaling else {
            unreachable!("asked for with YaRN alone")
        };
        let rotated = self.rotated(head_dim) as f64;
        let pair = |turns: f64| {
            rotated * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln())
        };
        let [low, high] = turns.map(pair);
        let [low, high] = if truncated { [low.floor(), high.ceil()] } else { [low, high] };
        let [low, high] = [low.max(0.0), high.min(rotated - 1.0)];
        [low, if low == high { high + 0.001 } else { high }]
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
        let rotated = self.rotated(head_dim);
        let exponent = move |pair: usize| (2 * pair) as f32 / rotated as f32;
        (0..rotated / 2).map(move |pair| f64::from(1.0 / (self.theta as f32).powf(exponent(pair))))
    }

    /// Positions that a network with `max_position_embeddings` supports. By the conventions of transformers that field is
    /// the original length for linear scaling, the extended one for `llama3` and `longrope`, and either for `yarn`.
    pub fn positions(&self, max_positions: usize) -> usize {
        match &self.scaling {
            RopeScaling::Linear(factor) => (max_positions as f64 * factor.max(1.0)) as usize,
            RopeScaling::Yarn { factor, original, .. } => {
                max_positions.max((original * factor) as usize)
            }
            _ => max_positions,
        }
    }
}

impl RopeScaling {
    /// A frequency under a scaling that does not depend on its pair.
    fn scaled(&self, frequency: f64) -> f64 {
        match *self {
            Self::Linear(factor) => frequency / factor,
            Self::Llama3 { factor, low, high, original } => {
                let turns = original * frequency / std::f64::consts::TAU;
                let blend = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (blend + (1.0 - blend) / factor)
            }
            Self::None | Self::Yarn { .. } | Self::LongRope { .. } => frequency,
        }
    }

    /// Factor of cosines and sines.
    fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn { attention, .. } | Self::LongRope { attention, .. } => *attention,
            Self::None | Self::Linear(_) | Self::Llama3 { .. } => 1.0,
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

/// `original_max_position_embeddings`, in the settings or in the file itself, where the family may have a default.
fn original_positions(
    config: &Config,
    settings: &Config,
    family: Option<f64>,
) -> Result<Option<f64>> {
    const KEY: &str = "original_max_position_embeddings";
    let outer = config.given(KEY).map(|_| config.positive(KEY)).transpose()?.flatten();
    let outer = outer.or(family);
    match (settings.positive(KEY)?, outer) {
        (Some(inner), Some(outer)) if inner != outer => {
            Err(settings.contradiction(KEY, &format!("{KEY} of the file itself is {outer}")))
        }
        (inner, outer) => Ok(inner.or(outer)),
    }
}

fn lacks(settings: &Config, key: &str) -> Error {
    settings.wrong(key, "a number above zero for this type of RoPE")
}
