/*! Where a source checkpoint was downloaded from. */

use serde::{Deserialize, Serialize};

/// Where on the Hub a model came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubOrigin {
    /// The repository.
    pub repo: String,
    /// The revision that was asked for.
    pub revision: String,
    /// The commit that it meant.
    pub commit: String,
}
