/*! Text sets and files -> token windows.

A text set ([`TextSet`]) is one long string, or separate documents. The model's tokenizer turns the string into ids
([`Tokenizer`]), piece by piece but with the ids of the entire string ([`pieces`]). The ids are cut into windows as
the method's reference cuts them: at random places for calibration ([`TextSet::calibration_windows`]), consecutively
for perplexity ([`TextSet::evaluation_windows`]). From documents, both draw at random. [`rows`] reads data files;
[`tasks`] are questions with a right answer. Nothing here depends on models. */

mod csv_rows;
mod detokenizer;
mod documents;
mod evaluation;
mod file;
mod guarded;
mod ids;
mod named;
mod parquet_rows;
mod part;
mod pattern;
mod pieces;
mod python_random;
mod reach;
mod rows;
mod set;
pub mod tasks;
mod tokenizer;
mod windows;

pub use detokenizer::Detokenizer;
pub use evaluation::Evaluation;
pub use python_random::PythonRandom;
pub use rows::rows;
pub use set::{CalibrationWindows, TextSet};
pub use tokenizer::{Tokenizer, check_tokens};
pub use windows::{Rounds, WindowDraw};

/// The use of a text: named sets have a different part for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Statistics and weights are fitted to it.
    Calibration,
    /// Perplexity is measured on it.
    Evaluation,
}
