/*! The ids of a long text: in memory up to a limit, then in an unnamed temporary file. */

use std::io::{BufWriter, Read, Seek, SeekFrom, Write};

use tempfile::SpooledTempFile;

use super::documents::no_room;
use crate::Result;

/// Bytes that stay in memory: the ids of some 60 MB of text.
const MEMORY_BYTES: usize = 64 << 20;

/// Ids that are appended, then read at any position.
pub(super) struct Ids {
    file: BufWriter<SpooledTempFile>,
    count: usize,
}

impl Ids {
    pub(super) fn new() -> Self {
        let file = tempfile::spooled_tempfile(MEMORY_BYTES);
        Self { file: BufWriter::with_capacity(1 << 16, file), count: 0 }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn append(&mut self, ids: &[u32]) -> Result<()> {
        self.file.write_all(bytemuck::cast_slice(ids)).map_err(no_room)?;
        self.count += ids.len();
        Ok(())
    }

    /// Appends `len` ids from `start` on to `out`.
    pub(super) fn read(&mut self, start: usize, len: usize, out: &mut Vec<u32>) -> Result<()> {
        self.file.flush().map_err(no_room)?;
        let first = out.len();
        out.resize(first + len, 0);
        let file = self.file.get_mut();
        file.seek(SeekFrom::Start(4 * start as u64)).map_err(no_room)?;
        file.read_exact(bytemuck::cast_slice_mut(&mut out[first..])).map_err(no_room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_at_any_position() {
        let mut ids = Ids::new();
        let many: Vec<u32> = (0..100_000).collect();
        many.chunks(777).for_each(|some| ids.append(some).unwrap());
        assert_eq!(ids.count(), 100_000);
        let mut out = vec![7];
        ids.read(99_990, 10, &mut out).unwrap();
        ids.read(0, 3, &mut out).unwrap();
        assert_eq!(out, [&[7][..], &many[99_990..], &many[..3]].concat());
        assert!(ids.read(99_999, 2, &mut out).is_err());
    }
}
