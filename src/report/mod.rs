/*! Outcomes -> what a person or a program reads.

Each outcome is plain data that serializes as its `--json` object; here it gets a text form as well.
How anything was computed is not known here. */

mod allocation;
mod bench;
mod distill;
mod doctor;
mod dry_run;
mod export;
mod files;
pub mod generate;
pub(crate) mod html;
mod inspect;
mod layout;
mod linears;
mod perplexity;
mod quantize;
mod serve;
mod tasks;
mod verify;

pub use export::Exported;

use serde::Serialize;

/// A result that can be printed, as text or as a JSON object.
pub trait Report: Serialize {
    /// The result as lines of text, the last one ended by a newline. It may hold ANSI colours, which
    /// the stream drops where they are not wanted.
    fn text(&self) -> String;
}
