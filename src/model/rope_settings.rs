/*! Reads the rotary position embedding of `config.json`.

Fields are resolved as transformers 5 does (`convert_rope_params_to_dict`, `standardize_rope_params`). */

use super::config::Config;
use super::rope::{Rope, RopeScaling};
use crate::{Error, Result};

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
