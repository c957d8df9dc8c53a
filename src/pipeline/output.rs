/*! Where a checkpoint goes. */

use std::path::Path;

use crate::checkpoint::{Destination, Source};

/// Where the checkpoint goes and what may be there already.
pub struct Output {
    /// Its directory, and what may not be touched.
    pub destination: Destination,
    /// Never throw an unfinished run away.
    pub resume: bool,
}

impl Output {
    /// The destination, with the source and more files among what may not be touched.
    pub(super) fn protecting<'p>(
        &self,
        source: &'p Source,
        more: impl IntoIterator<Item = &'p Path>,
    ) -> Destination {
        let mut destination = self.destination.clone();
        for path in source.dir().into_iter().chain(more) {
            destination.inputs.add(path);
        }
        destination
    }
}
