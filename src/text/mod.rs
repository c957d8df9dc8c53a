/*! Text sets and files -> token windows.

A text set ([`TextSet`]) is one long string, or documents that stay apart. The model's tokenizer turns
the string, once and whole, into ids ([`Tokenizer`]); the ids are cut into windows as the method's
reference cuts them, at random places for calibration ([`calibration_windows`]) and side by side for
perplexity ([`evaluation_windows`]). Of documents, both draw. [`rows`] reads data files for others.
Tasks with a right answer are [`tasks`]' business. Nothing here knows what a model is. */

mod documents;
mod named;
mod python_random;
mod rows;
mod set;
pub mod tasks;
mod tokenizer;
mod windows;

pub use python_random::PythonRandom;
pub use rows::rows;
pub use set::{SetUsed, Split, TextSet};
pub use tokenizer::Tokenizer;
pub use windows::{calibration_windows, evaluation_windows};
