/*! A model of either kind: a source or an Atom checkpoint. */

use std::borrow::Cow;
use std::path::Path;

use serde_json::Value;

use crate::Result;
use crate::checkpoint::{AtomCheckpoint, Source, is_atom};
use crate::hub::{self, Hub, Resolved};
use crate::text::Tokenizer;

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

    /// A short name.
    pub fn name(&self) -> &str {
        match self {
            Self::Source(source) => source.name(),
            Self::Atom(checkpoint) => checkpoint.name(),
        }
    }

    /// The content of `config.json`.
    pub fn config(&self) -> &Value {
        match self {
            Self::Source(source) => source.config(),
            Self::Atom(checkpoint) => checkpoint.config(),
        }
    }

    /// The content of one of its files besides configuration and weights, if there is one of this name.
    pub fn file(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Source(source) => source.file(name),
            Self::Atom(checkpoint) => checkpoint.file(name),
        }
    }

    /// What messages call one of its files.
    pub fn path_of(&self, name: &str) -> String {
        match self {
            Self::Source(source) => source.path_of(name),
            Self::Atom(checkpoint) => checkpoint.path_of(name),
        }
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// Input: there is none, or it cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let content = match self {
            Self::Source(source) => source.tokenizer()?,
            Self::Atom(checkpoint) => checkpoint.tokenizer()?,
        };
        Tokenizer::from_bytes(&content, &self.path_of("tokenizer.json"))
    }

    /// Its directory, unless it is bundled.
    pub fn dir(&self) -> Option<&Path> {
        match self {
            Self::Source(source) => source.dir(),
            Self::Atom(checkpoint) => checkpoint.dir(),
        }
    }
}
