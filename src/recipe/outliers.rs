use serde::{Deserialize, Serialize};

/// The share of a site's channels that are outliers with [`Outliers::Auto`]: Atom's 128 of 4096.
const SHARE: usize = 32;
/// What [`Outliers::Auto`] rounds up to: an INT8 product takes outliers by so many.
const MULTIPLE: usize = 16;
/// The most outliers with [`Outliers::Auto`]: more do not pay on wide sites (Atom, section 4.1).
const MOST: usize = 128;

/// How many channels of a site are outliers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "toml::Value", into = "OutliersRepr")]
pub enum Outliers {
    /// A thirty-second of the site's channels, rounded up to a multiple of 16, at most 128.
    Auto,
    /// This many of every site.
    Count(usize),
}

impl Outliers {
    /// The outliers of a site of `channels`.
    pub fn of(self, channels: usize) -> usize {
        match self {
            Self::Auto => channels.div_ceil(SHARE).next_multiple_of(MULTIPLE).min(MOST),
            Self::Count(count) => count,
        }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum OutliersRepr {
    Auto(&'static str),
    Count(usize),
}

impl From<Outliers> for OutliersRepr {
    fn from(outliers: Outliers) -> Self {
        match outliers {
            Outliers::Auto => Self::Auto("auto"),
            Outliers::Count(count) => Self::Count(count),
        }
    }
}

impl TryFrom<toml::Value> for Outliers {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Self, String> {
        match value {
            toml::Value::String(text) if text == "auto" => Ok(Self::Auto),
            toml::Value::Integer(count) if count >= 0 => {
                Ok(Self::Count(usize::try_from(count).map_err(|_| "outliers are too many")?))
            }
            other => Err(format!("outliers must be a number of channels or \"auto\", not {other}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_a_thirty_second_of_the_channels_in_sixteens_up_to_128() {
        for (channels, outliers) in [
            (64, 16),
            (256, 16),
            (512, 16),
            (513, 32),
            (576, 32),
            (1536, 48),
            (2048, 64),
            (4096, 128),
            (11008, 128),
        ] {
            assert_eq!(Outliers::Auto.of(channels), outliers, "{channels}");
            assert_eq!(Outliers::Count(7).of(channels), 7);
        }
    }

    #[test]
    fn it_is_written_as_auto_or_a_number() {
        for (outliers, json) in
            [(Outliers::Auto, "\"auto\""), (Outliers::Count(0), "0"), (Outliers::Count(96), "96")]
        {
            assert_eq!(serde_json::to_string(&outliers).unwrap(), json);
            assert_eq!(serde_json::from_str::<Outliers>(json).unwrap(), outliers);
        }
        for json in ["\"many\"", "-1", "1.5", "true"] {
            assert!(serde_json::from_str::<Outliers>(json).is_err(), "{json}");
        }
    }
}
