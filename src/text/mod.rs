/*! Text sets and files -> token windows.

A text set is one long string ([`TextSet`]); the model's tokenizer turns it, once and whole, into ids
([`Tokenizer`]); the ids are cut into windows as the method's reference cuts them, at random places
for calibration ([`calibration_windows`]) and side by side for perplexity ([`evaluation_windows`]).
Tasks with a right answer are [`tasks`]' business. Nothing here knows what a model is. */

mod python_random;
mod rows;
mod set;
pub mod tasks;
mod tokenizer;
mod windows;

pub use python_random::PythonRandom;
pub use rows::rows;
pub use set::{Split, TextSet};
pub use tokenizer::Tokenizer;
pub use windows::{calibration_windows, evaluation_windows};
