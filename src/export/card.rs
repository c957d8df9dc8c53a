/*! The model card of an export. */

use super::format::{Format, Published};
use super::model::ExportedModel;
use crate::card::{Card, Form, Perplexity, SourceCard};
use crate::checkpoint::SideFile;

/// The card of an export of `bytes` bytes; `perplexities` are the checkpoint's, which the export has as well where
/// activations are computed alike.
pub(super) fn card(
    format: &dyn Format,
    model: &ExportedModel<'_>,
    bytes: u64,
    perplexities: &[Perplexity],
) -> SideFile {
    let Published { library, tags, usage } = format.published();
    let own = |text: &&str| (*text).to_owned();
    let name = Form::atom(&model.manifest).name;
    let form = Form {
        title: format!("an Atom checkpoint exported as {}", format.name()),
        library: library.to_owned(),
        tags: ["atom"].iter().chain(tags).map(own).collect(),
        usage: usage.iter().map(|(what, command)| (own(what), own(command))).collect(),
        steps: vec![format!("atom export {name} --format {}", format.name())],
        name: format!("{name}-{}", format.name()),
    };
    // The checkpoint's card says of the source what the source's card said.
    let source = &SourceCard::of(model.checkpoint.readme(), model.progress);
    Card { manifest: &model.manifest, source, bytes, perplexities, form: &form }.file()
}
