/*! Prefetch: the next block is loaded while the current one is computed. */

use std::ops::Range;
use std::sync::mpsc::sync_channel;

use crate::{Error, Result};

/// Calls `load` for every index on its own thread, and `consume` with the results in order. At most one loaded
/// item waits while another is consumed. The first error ends both.
pub fn prefetch<T: Send>(
    range: Range<usize>,
    load: impl Fn(usize) -> Result<T> + Send,
    mut consume: impl FnMut(usize, &mut dyn FnMut() -> Result<T>) -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(0);
        let indices = range.clone();
        let loading = move || {
            for index in indices {
                let loaded = load(index);
                let failed = loaded.is_err();
                // The receiver is dropped when the other side has failed.
                if sender.send(loaded).is_err() || failed {
                    return;
                }
            }
        };
        std::thread::Builder::new().spawn_scoped(scope, loading).map_err(no_thread)?;
        let mut receive = || receiver.recv().expect("the loader sends until its first error");
        let result = range.into_iter().try_for_each(|index| consume(index, &mut receive));
        drop(receiver);
        result
    })
}

/// The error if no thread can be started.
pub fn no_thread(error: std::io::Error) -> Error {
    Error::machine(format!("cannot start a thread: {error}"))
        .hint("raise the limits on processes and memory (`ulimit -u`, `ulimit -v`)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_come_in_order_and_errors_end_both_sides() {
        let mut seen = Vec::new();
        prefetch(2..6, Ok, |index, next| {
            seen.push((index, next()?));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [(2, 2), (3, 3), (4, 4), (5, 5)]);

        let load = |index| if index == 1 { Err(Error::input("no")) } else { Ok(index) };
        let error = prefetch(0..9, load, |_, next| next().map(drop)).unwrap_err();
        assert_eq!(error.message(), "no");

        let mut calls = 0;
        let error = prefetch(0..9, Ok, |_, _| {
            calls += 1;
            Err(Error::input("stop"))
        });
        assert!(error.is_err() && calls == 1);
    }
}
