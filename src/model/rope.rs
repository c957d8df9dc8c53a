//! Rotary position embedding: its frequencies and tables.

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
            unreachable!("called with YaRN alone")
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
