/*! What is in the way of an export, collected over all sites and linears of a checkpoint. */

use std::fmt::Display;

use super::format::Format;
use super::model::Subject;
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
    /// How many sites or linears have it.
    pub places: usize,
}

/// Collects obstacles: one for each setting, whatever the number of places.
#[derive(Default)]
#[allow(dead_code, reason = "the first format that is not dense uses it")]
pub(super) struct Obstacles(Vec<Obstacle>);

#[allow(dead_code, reason = "the first format that is not dense uses it")]
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
            Some(known) => known.places += 1,
            None => self.0.push(Obstacle {
                setting,
                found: found.to_string(),
                needed: needed.to_string(),
                first: place.to_owned(),
                places: 1,
            }),
        }
    }

    pub(super) fn into_vec(self) -> Vec<Obstacle> {
        self.0
    }
}

/// Refuses a checkpoint that a format cannot hold exactly, with every setting in the way.
///
/// # Errors
/// Input: the settings, what the format takes, and a recipe that would do.
pub fn check(format: &dyn Format, subject: &Subject<'_>, name: &str) -> Result<()> {
    let obstacles = format.obstacles(subject);
    if obstacles.is_empty() {
        return Ok(());
    }
    let sentence = |obstacle: &Obstacle| {
        let Obstacle { setting, found, needed, first, places } = obstacle;
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
