/*! Text sets and files -> token windows.

A text set ([`TextSet`]) is one long string, or documents that stay apart. The model's tokenizer turns
the string into ids ([`Tokenizer`]), by pieces that give the ids of the string at once ([`pieces`]); the ids are
cut into windows as the method's reference cuts them, at random places for calibration
([`TextSet::calibration_windows`]) and side by side for perplexity ([`TextSet::evaluation_windows`]). Of documents,
both draw. [`rows`] reads data files. Tasks with a right answer are [`tasks`]' business. Nothing here knows what a
model is. */

mod csv_rows;
mod documents;
mod evaluation;
mod file;
mod guarded;
mod ids;
mod named;
mod parquet_rows;
mod pattern;
mod pieces;
mod python_random;
mod reach;
mod rows;
mod set;
pub mod tasks;
mod tokenizer;
mod windows;

pub use evaluation::Evaluation;
pub use python_random::PythonRandom;
pub use rows::rows;
pub use set::{CalibrationWindows, SetUsed, TextSet};
pub use tokenizer::{Tokenizer, check_tokens};

/// What a text is wanted for: named sets have a different part for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Statistics and weights are fitted to it.
    Calibration,
    /// Perplexity is measured on it.
    Evaluation,
}
