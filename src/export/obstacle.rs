/*! What is in the way of an export, collected over all sites and linears of a checkpoint. */

use std::fmt::Display;

use super::format::Format;
use super::model::{Subject, model_dtype};
use crate::checkpoint::Source;
use crate::checkpoint::plan::BlockPlan;
use crate::model::Architecture;
use crate::recipe::Recipe;
use crate::{Error, Result};

/// A setting that a format cannot say, at one or more places of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// The setting as recipes name it: `order`, `outliers`.
    pub setting: &'static str,
    /// What the checkpoint has.
    pub found: String,
    /// What the format takes.
    pub needed: String,
    /// The first site or linear that has it.
    pub first: String,
    /// The last one.
    last: String,
    /// How many sites or linears have it.
    pub places: usize,
}

/// Collects obstacles: one for each setting, whatever the number of places.
#[derive(Default)]
pub(super) struct Obstacles(Vec<Obstacle>);

impl Obstacles {
    /// Notes that `place` has `found` where the format takes `needed`, unless it `fits`.
    pub(super) fn check(
        &mut self,
        fits: bool,
        setting: &'static str,
        place: &str,
        found: impl Display,
        needed: impl Display,
    ) {
        if fits {
            return;
        }
        match self.0.iter_mut().find(|known| known.setting == setting) {
            // A site is asked about once for each of its linears.
            Some(known) if known.last == place => {}
            Some(known) => {
                known.places += 1;
                known.last = place.to_owned();
            }
            None => self.0.push(Obstacle {
                setting,
                found: found.to_string(),
                needed: needed.to_string(),
                first: place.to_owned(),
                last: place.to_owned(),
                places: 1,
            }),
        }
    }

    pub(super) fn into_vec(self) -> Vec<Obstacle> {
        self.0
    }
}

/// Refuses what a plan would make of a source, if a format cannot hold it exactly: before the checkpoint is made.
///
/// # Errors
/// Those of [`check`], and those of a source without an embedding.
pub fn check_planned(
    format: &dyn Format,
    source: &Source,
    architecture: &Architecture,
    blocks: &[BlockPlan],
    recipe: &Recipe,
) -> Result<()> {
    let stored = source.tensor(architecture.outer_tensors()[0].name)?.dtype;
    let dtype = model_dtype(source.config()).unwrap_or(stored);
    let subject = Subject { architecture, blocks, recipe, dtype };
    check(format, &subject, &format!("a checkpoint of {}", source.name()))
}

/// Refuses a family whose programs expect several linears in one tensor: a checkpoint holds each by itself.
fn check_stored_alone(architecture: &Architecture, name: &str) -> Result<()> {
    let fused: Vec<&str> = architecture.fused.iter().map(|fused| fused.stored).collect();
    if fused.is_empty() {
        return Ok(());
    }
    Err(Error::input(format!(
        "{name} cannot be exported: programs that load networks of type {} expect {} as one tensor each, and the \
         checkpoint holds their linears one by one",
        architecture.family,
        fused.join(" and ")
    ))
    .hint("no format of this version holds such networks: run the checkpoint with atom"))
}

/// Refuses a checkpoint that a format cannot hold exactly, with every setting in the way.
///
/// # Errors
/// Input: the settings, what the format takes, and a recipe that would do.
pub fn check(format: &dyn Format, subject: &Subject<'_>, name: &str) -> Result<()> {
    check_stored_alone(subject.architecture, name)?;
    let obstacles = format.obstacles(subject);
    if obstacles.is_empty() {
        return Ok(());
    }
    let sentence = |obstacle: &Obstacle| {
        let Obstacle { setting, found, needed, first, places, .. } = obstacle;
        let more = if *places > 1 { format!(" and {} more", places - 1) } else { String::new() };
        format!("{setting} is {found} and must be {needed} ({first}{more})")
    };
    let sentences: Vec<String> = obstacles.iter().map(sentence).collect();
    let message = format!(
        "{name} cannot be exported as {} without rounding it again: {}",
        format.name(),
        sentences.join("; ")
    );
    let recipes: Vec<String> =
        format.recipes().iter().map(|recipe| format!("--recipe {recipe}")).collect();
    Err(Error::input(message).hint(format!(
        "quantize the source with {}; `atom export --format dense` takes any checkpoint",
        recipes.join(" or ")
    )))
}
