/*! An Atom checkpoint in the format of another program: a file a format, behind one trait.

**An export copies codes and scales and never rounds them again.** Where a checkpoint holds something that a format cannot
say, the export is refused before any work, with every setting in the way and a recipe that would do. `dense` is the
exception that takes any checkpoint: it multiplies codes with scales, undoes order and transform in f32, and rounds
once.

A format is a constant of type [`Format`] in [`FORMATS`]. It says what is in the way ([`Format::obstacles`]) and gives the
output as a list of parts, each with its tensors' names, types and shapes and a closure that makes their bytes
([`Format::contents`]). [`run`] does the rest for all of them: it lays the file or files out, reserves their room, makes
one part after another while the one before it is hashed and written, continues an unfinished run, copies the side
files, and gives the finished output its name in one step (`checkpoint::Writer`). */

mod card;
mod cast;
mod compressed_tensors;
mod config;
mod dense;
mod exact;
mod format;
mod gguf;
mod gptq;
mod model;
mod obstacle;
mod outcome;
mod run;
mod schemes;

pub use format::{Container, Contents, FORMATS, Format, Part, Published, find};
pub use gguf::MatrixType;
pub use model::{ExportedModel, Subject};
pub use obstacle::{Obstacle, check, check_planned};
pub use outcome::{ExportDryRun, ExportOutcome};
pub use run::{Export, dry_run, export};
