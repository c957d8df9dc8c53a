/*! The named text sets: `calibration-data/sets.toml`, which is part of the program. */

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Split;

const SETS: &str = include_str!("../../calibration-data/sets.toml");

/// How rows become token windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Windowing {
    /// One text, a blank line between two rows.
    Joined,
    /// Each window is cut from one row.
    Documents,
}

/// How a plain text file of the set is split into rows: as the data set's own script on the Hub does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LineSplit {
    /// LineSplit with their ends; a blank one is an empty row.
    Kept,
    /// LineSplit without the white space around them.
    Trimmed,
    /// Not split: a row may have several lines.
    None,
}

/// A named text set.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NamedSet {
    pub(super) repo: String,
    pub(super) revision: String,
    calibration: String,
    evaluation: String,
    pub(super) field: String,
    pub(super) rows: Windowing,
    pub(super) lines: LineSplit,
}

impl NamedSet {
    /// The file in the repository.
    pub(super) fn file(&self, split: Split) -> &str {
        match split {
            Split::Calibration => &self.calibration,
            Split::Evaluation => &self.evaluation,
        }
    }
}

/// All named sets.
pub(super) fn sets() -> BTreeMap<String, NamedSet> {
    toml::from_str(SETS).expect("the tests read the table that is part of the program")
}

/// The set of this name.
pub(super) fn set(name: &str) -> Option<NamedSet> {
    sets().remove(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_holds_the_references_sets() {
        let names: Vec<String> = sets().into_keys().collect();
        assert_eq!(names, ["c4", "ptb", "wikitext2"]);
        // The reference evaluates ptb on its validation part and not on its test part.
        assert_eq!(
            set("ptb").unwrap().file(Split::Evaluation),
            "penn_treebank/validation/0000.parquet"
        );
        assert_eq!(set("c4").unwrap().rows, Windowing::Documents);
        assert!(set("wikitext").is_none());
    }
}
