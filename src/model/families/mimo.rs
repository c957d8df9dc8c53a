//! MiMo, dense: Qwen2 and blocks that predict further tokens. transformers has no class of it; the repository's own extends that
//! of Qwen2.

use super::Family;
use super::glm4_moe::prediction_blocks;
use super::qwen2::QWEN2;

pub(super) const MIMO: Family = Family {
    name: "mimo",
    class: "MiMo",
    differences: |config, network| {
        network.prediction_blocks = prediction_blocks(config, 0)?;
        (QWEN2.differences)(config, network)
    },
    ..QWEN2
};
