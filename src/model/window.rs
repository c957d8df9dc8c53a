/*! Sliding windows: the number of tokens that a token attends to in each block, where that is limited. */

use super::config::Config;
use crate::Result;

/// Wider windows limit no text.
const WIDEST: usize = 1 << 30;

/// What this version supports, for hints.
pub(super) const ALIKE: &str = "this version runs networks whose blocks attend alike";

/// `sliding_window`: `default` where the field is absent, none where it is null.
pub(super) fn field(config: &Config, default: Option<usize>) -> Result<Option<usize>> {
    let window = config.nullable_count("sliding_window", 1..=usize::MAX)?;
    Ok(window.unwrap_or(default).filter(|window| *window < WIDEST))
}

/// The windows of a family whose reference implementation has one for all blocks and does not read `layer_types`.
///
/// # Errors
/// `layer_types` that say something else.
pub(super) fn of_all(
    config: &Config,
    blocks: usize,
    window: Option<usize>,
) -> Result<Vec<Option<usize>>> {
    match layer_types(config, blocks)? {
        Some(slides) if slides.iter().any(|slides| *slides != window.is_some()) => {
            let what = match window {
                Some(window) => format!("a window of {window} tokens slides over all blocks"),
                None => "every block attends to all tokens".to_owned(),
            };
            let model_type = config.given("model_type").and_then(|name| name.as_str());
            let what = format!("in a {} {what}", model_type.unwrap_or("network"));
            Err(config.contradiction("layer_types", &what).hint(ALIKE))
        }
        _ => Ok(vec![window; blocks]),
    }
}

/// The windows of Qwen2 and Qwen3: of the blocks that `layer_types` names, or else of those from `max_window_layers`
/// (28) on, where `use_sliding_window` is set.
///
/// # Errors
/// Blocks with a window, and no length given.
pub(super) fn of_later_blocks(config: &Config, blocks: usize) -> Result<Vec<Option<usize>>> {
    let used = config.flag("use_sliding_window")?;
    let window = config.nullable_count("sliding_window", 1..=usize::MAX)?.unwrap_or(Some(4096));
    let window = window.filter(|_| used);
    let first = config.nullable_count("max_window_layers", 0..=usize::MAX)?.unwrap_or(Some(28));
    let slides = match (layer_types(config, blocks)?, window, first) {
        (Some(slides), ..) => slides,
        (None, None, _) => vec![false; blocks],
        (None, Some(_), Some(first)) => (0..blocks).map(|block| block >= first).collect(),
        (None, Some(_), None) => {
            return Err(config.wrong("max_window_layers", "a whole number of 0 or more"));
        }
    };
    if window.is_none() && slides.contains(&true) {
        let what = "`use_sliding_window` and `sliding_window` give no window";
        return Err(config.contradiction("layer_types", what));
    }
    let window = window.filter(|window| *window < WIDEST);
    Ok(slides.into_iter().map(|slides| window.filter(|_| slides)).collect())
}

/// The windows of a family that reads `layer_types`, and where they are not given has one in the blocks for which `slides` is
/// true.
///
/// # Errors
/// Blocks with a window, and no length given.
pub(super) fn of_layer_types(
    config: &Config,
    blocks: usize,
    window: Option<usize>,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>> {
    let slides = layer_types(config, blocks)?.unwrap_or_else(|| (0..blocks).map(slides).collect());
    if window.is_none() && config.given("sliding_window").is_none() && slides.contains(&true) {
        let what = "`layer_types` or the family's pattern gives blocks a window";
        return Err(config.contradiction("sliding_window", what));
    }
    Ok(slides.into_iter().map(|slides| window.filter(|_| slides)).collect())
}

/// Whether each block has a sliding window, by `layer_types`.
fn layer_types(config: &Config, blocks: usize) -> Result<Option<Vec<bool>>> {
    const RIGHT: &str = "a list of texts, one for each block";
    let Some(types) = config.list("layer_types", RIGHT)? else { return Ok(None) };
    if types.len() != blocks {
        let what = format!("it has {} entries for {blocks} blocks", types.len());
        return Err(config.contradiction("layer_types", &what));
    }
    let slides = types.iter().map(|kind| match kind.as_str() {
        // The second name is an older one.
        Some("full_attention" | "attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        Some(_) => Err(config.unsupported("layer_types", ALIKE)),
        None => Err(config.wrong("layer_types", RIGHT)),
    });
    slides.collect::<Result<_>>().map(Some)
}
