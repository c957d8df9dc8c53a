/*! A model of either kind: a source or an Atom checkpoint. */

use std::path::Path;

use crate::Result;
use crate::checkpoint::{AtomCheckpoint, Source, is_atom};
use crate::hub::{self, Hub, Resolved};

/// A source or an Atom checkpoint.
pub enum Model {
    /// A Hugging Face checkpoint.
    Source(Source),
    /// An Atom checkpoint.
    Atom(AtomCheckpoint),
}

impl Model {
    /// Opens a directory of either kind, or a model by its name.
    pub fn open(hub: &Hub<'_>, model: &str, revision: Option<&str>) -> Result<Self> {
        match hub::resolve(hub, model, revision)? {
            Resolved::Directory(dir) | Resolved::Repository(dir, _) if is_atom(&dir) => {
                Ok(Self::Atom(AtomCheckpoint::open(&dir)?))
            }
            Resolved::Directory(dir) => Ok(Self::Source(Source::open(&dir)?)),
            Resolved::Repository(dir, place) => {
                Ok(Self::Source(Source::open(&dir)?.from_hub(place)))
            }
            Resolved::Bundled => Ok(Self::Source(hub::tiny_llama()?)),
        }
    }

    /// Its directory, unless it is bundled.
    pub fn dir(&self) -> Option<&Path> {
        match self {
            Self::Source(source) => source.dir(),
            Self::Atom(checkpoint) => checkpoint.dir(),
        }
    }
}
