use serde::{Deserialize, Serialize};

use crate::quant::ranges::GROUP_MULTIPLE;

/// The group of wide sites with [`Group::Auto`].
pub(super) const WIDEST_GROUP: usize = 128;
/// The narrowest group with [`Group::Auto`]: kernels for narrower ones are slow.
const NARROWEST: usize = 32;
/// Groups that a site has at least with [`Group::Auto`], if its channels allow it.
const FEWEST: usize = 4;
/// The part of its channels that a site may have as padding with [`Group::Auto`]: one of so many.
const PADDING_PART: usize = 8;

/// How many channels share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "toml::Value", into = "GroupRepr")]
pub enum Group {
    /// All channels of a row before its outliers.
    Row,
    /// 128, halved down to 32 where a site would have fewer than four groups, or more than an eighth of its channels as padding.
    Auto,
    /// This many channels, a multiple of 16.
    Size(usize),
}

#[derive(Serialize)]
#[serde(untagged)]
enum GroupRepr {
    Word(&'static str),
    Size(usize),
}

impl From<Group> for GroupRepr {
    fn from(group: Group) -> Self {
        match group {
            Group::Row => Self::Word("row"),
            Group::Auto => Self::Word("auto"),
            Group::Size(size) => Self::Size(size),
        }
    }
}

impl TryFrom<toml::Value> for Group {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Self, String> {
        match value {
            toml::Value::String(text) if text == "row" => Ok(Self::Row),
            toml::Value::String(text) if text == "auto" => Ok(Self::Auto),
            toml::Value::Integer(size) if size > 0 && size % 16 == 0 => {
                Ok(Self::Size(usize::try_from(size).map_err(|_| "group is too large")?))
            }
            other => Err(format!(
                "group must be a multiple of 16 channels, \"row\" or \"auto\", not {other}"
            )),
        }
    }
}

impl Group {
    /// Channels that share a scale where `grouped` channels are no outliers. Without padding the group is halved until
    /// they are a multiple of it.
    pub(super) fn of(self, grouped: usize, padded: bool) -> usize {
        let mut size = match self {
            Self::Row => {
                return grouped.next_multiple_of(GROUP_MULTIPLE).max(GROUP_MULTIPLE);
            }
            Self::Auto => WIDEST_GROUP,
            Self::Size(size) => size,
        };
        let unfit = |size: usize| {
            let padding = grouped.next_multiple_of(size) - grouped;
            grouped.div_ceil(size) < FEWEST || PADDING_PART * padding > grouped
        };
        while self == Self::Auto && size > NARROWEST && unfit(size) {
            size /= 2;
        }
        let halves = |size: usize| size.is_multiple_of(2 * GROUP_MULTIPLE);
        while !padded && !grouped.is_multiple_of(size) && halves(size) {
            size /= 2;
        }
        size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_128_where_four_groups_of_it_are_filled_and_never_below_32() {
        for (grouped, group) in [
            (48, 32),
            (96, 32),
            (97, 32),
            (193, 32),
            (240, 64),
            (384, 64),
            (385, 32),
            (544, 64),
            (568, 64),
            (569, 128),
            (736, 128),
            (3968, 128),
        ] {
            assert_eq!(Group::Auto.of(grouped, true), group, "{grouped}");
            assert_eq!(Group::Size(96).of(grouped, true), 96);
        }
        assert_eq!(Group::Auto.of(576, false), 64, "unpadded groups divide the channels");
    }

    #[test]
    fn it_is_written_as_a_word_or_a_number() {
        for (group, json) in
            [(Group::Auto, "\"auto\""), (Group::Row, "\"row\""), (Group::Size(64), "64")]
        {
            assert_eq!(serde_json::to_string(&group).unwrap(), json);
            assert_eq!(serde_json::from_str::<Group>(json).unwrap(), group);
        }
    }
}
