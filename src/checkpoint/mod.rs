/*! Bytes on disk <-> named tensors: Hugging Face shards in, Atom shards out.

This room knows names, element types, shapes and bytes, and never what the numbers mean. Reading
maps the files, so nothing is loaded before it is asked for and a block's pages can be given back.
Writing happens in a work directory next to the output and ends in one rename, so that the output
is there whole or not at all. `docs/format.md` is the written form of what [`Writer`] and
[`linear`] put on disk. */

mod atom;
mod card;
mod destination;
mod differences;
mod distilled;
mod dtype;
mod envelope;
mod files;
mod fingerprint;
pub(crate) mod foreign;
mod json;
mod layout;
pub mod linear;
pub mod linear_message;
mod manifest;
mod naming;
mod options;
mod origin;
mod output;
mod output_file;
pub mod packing;
mod pattern;
pub mod plan;
mod provenance;
mod regular;
mod shards;
mod side_files;
mod source;
mod tensor;
mod tensor_bytes;
#[cfg(test)]
mod tests;
mod work;
mod writer;

pub use atom::{AtomCheckpoint, FORMAT_VERSION, is_atom};
pub use card::{CARD, replace_card, signed_card};
pub use destination::{Destination, Inputs};
pub(crate) use differences::{Difference, differences};
pub use distilled::{DistillationRates, DistillationRecord, DistilledStep};
pub use dtype::{Dtype, TensorSpec};
pub use envelope::DirectoryKind;
pub use fingerprint::sha256_hex;
pub(crate) use json::text as utf8_text;
pub use layout::{SingleFile, TensorFiles};
pub use manifest::{Manifest, SourceRecord};
pub use naming::RowRange;
pub use options::{DEFAULT_SHARD_BYTES, Options};
pub use origin::HubOrigin;
pub use output::free_bytes;
pub use output_file::{FileKind, OutputFile};
pub(crate) use pattern::fits;
pub use provenance::{DataFile, NOT_YET_KNOWN, Provenance, SetUsed};
pub(crate) use regular::read_named;
pub use side_files::{SideFile, SideFiles};
pub(crate) use side_files::{is_legal_file, is_side_file};
pub use source::Source;
pub use tensor::Tensor;
pub use tensor_bytes::{StoredBytes, TensorBytes};
pub use work::DoneBlock;
pub use writer::{Preview, Writer};

use std::borrow::Cow;

use crate::Result;

/// Where stored tensors can be fetched from: a finished checkpoint, or the work of an unfinished
/// run.
pub trait Stored {
    /// The little-endian bytes of the tensor that `spec` names, or an error that says how the
    /// stored one differs from `spec`.
    fn fetch(&self, spec: &TensorSpec) -> Result<Cow<'_, [u8]>>;
}

/// Named tensors that stay in their files until they are used.
pub trait Tensors: Sync {
    /// The tensor of this name.
    fn tensor(&self, name: &str) -> Result<Tensor<'_>>;

    /// Refuses files that were written to since they were opened: for the end of a run.
    ///
    /// # Errors
    /// Bad input that names the file.
    fn check_unchanged(&self) -> Result<()>;
}

impl Tensors for Source {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        Self::tensor(self, name)
    }

    fn check_unchanged(&self) -> Result<()> {
        Self::check_unchanged(self)
    }
}

impl Tensors for AtomCheckpoint {
    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        Self::tensor(self, name)
    }

    fn check_unchanged(&self) -> Result<()> {
        Self::check_unchanged(self)
    }
}
