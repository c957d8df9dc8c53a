/*! Guards calls into parsers that panic, hang or take unbounded memory on some damaged files.

A panic of such a call is an error about the file and not a fault of this program, so its message is
caught and not printed. A call that may not return runs on its own thread, and its caller watches
the time and the process's memory. An abandoned thread keeps running; the error ends the process. */

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

thread_local! {
    /// Whether a panic of this thread is caught here.
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// The result of `work`, or the message of its panic, which is not printed. Panics of other threads print as before.
pub(super) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let former = take_hook();
        set_hook(Box::new(move |info| {
            if !CATCHING.try_with(Cell::get).unwrap_or(false) {
                former(info);
            }
        }));
    });
    let nested = CATCHING.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    CATCHING.set(nested);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        text.or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "it panics".to_owned())
    })
}

/// What a watched call may use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    /// Wall-clock time.
    pub(super) time: Duration,
    /// Bytes by which the process's resident memory may grow.
    pub(super) bytes: u64,
}

/// The result of `work`.
///
/// # Errors
/// The message of its panic, or that it exceeded the allowance, or that `stop` returned true.
pub(super) fn watched<T: Send + 'static>(
    allowance: Allowance,
    stop: &dyn Fn() -> bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let watched = Watched::begin(allowance, |send| {
        send(work());
    })?;
    let result = watched.next(stop)?.ok_or_else(|| "its thread ended".to_owned());
    watched.join();
    result
}

/// Work on its own thread that sends results one after another, at most two ahead of the receiver.
pub(super) struct Watched<T> {
    results: Receiver<Result<T, String>>,
    allowance: Allowance,
    thread: JoinHandle<()>,
}

impl<T: Send + 'static> Watched<T> {
    /// Begins `work`, which passes its results to its argument until that returns false.
    pub(super) fn begin(
        allowance: Allowance,
        work: impl FnOnce(&mut dyn FnMut(T) -> bool) + Send + 'static,
    ) -> Result<Self, String> {
        let (sender, results) = sync_channel(1);
        let work = move || {
            if let Err(panic) = caught(|| work(&mut |result| sender.send(Ok(result)).is_ok())) {
                // The receiver is dropped if the caller has given up.
                let _ = sender.send(Err(panic));
            }
        };
        let thread = std::thread::Builder::new()
            .stack_size(8 << 20)
            .spawn(work)
            .map_err(|error| format!("no thread can be started: {error}"))?;
        Ok(Self { results, allowance, thread })
    }

    /// Returns when the thread has ended, so that another one takes over its heap. It has sent its last result.
    fn join(self) {
        drop(self.results);
        // A panic was sent as a result.
        let _ = self.thread.join();
    }

    /// The next result, or none after the last.
    ///
    /// # Errors
    /// The message of the work's panic, or that it exceeded the allowance while waiting, or that `stop` returned true.
    pub(super) fn next(&self, stop: &dyn Fn() -> bool) -> Result<Option<T>, String> {
        const INTERVAL: Duration = Duration::from_millis(50);
        let Self { results, allowance, .. } = self;
        let before = resident_bytes().unwrap_or(0);
        // Intervals are counted instead of reading the clock: a suspended process did not use the time.
        let mut waited = Duration::ZERO;
        loop {
            match results.recv_timeout(INTERVAL) {
                Ok(result) => return result.map(Some),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => waited += INTERVAL,
            }
            if stop() {
                return Err("it was stopped".to_owned());
            }
            if waited > allowance.time {
                return Err(format!("it takes longer than {} s", allowance.time.as_secs()));
            }
            let grown = resident_bytes().unwrap_or(0).saturating_sub(before);
            if grown > allowance.bytes {
                let most = allowance.bytes >> 20;
                return Err(format!("it takes more than {most} MB of memory"));
            }
        }
    }
}

/// The process's resident memory in bytes, on systems with Linux's `/proc`.
fn resident_bytes() -> Option<u64> {
    let text = fs_err::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use super::*;

    const SHORT: Allowance = Allowance { time: Duration::from_millis(200), bytes: 100 << 20 };

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(caught(|| 3), Ok(3));
        assert_eq!(caught(|| panic!("at {}", 7)), Err::<(), _>("at 7".to_owned()));
        assert_eq!(watched(SHORT, &|| false, || panic!("plain")), Err::<(), _>("plain".to_owned()));
        assert!(!CATCHING.get());
    }

    #[test]
    fn results_come_in_order_and_a_panic_after_them() {
        let begin = |panics: bool| {
            let work = move |send: &mut dyn FnMut(u32) -> bool| {
                assert!((0..5).all(send) && !panics, "no sixth");
            };
            Watched::begin(SHORT, work).unwrap()
        };
        for panics in [false, true] {
            let results = begin(panics);
            let next = || results.next(&|| false);
            (0..5).for_each(|index| assert_eq!(next(), Ok(Some(index))));
            assert_eq!(next(), if panics { Err("no sixth".to_owned()) } else { Ok(None) });
        }
    }

    #[test]
    fn a_call_that_takes_too_long_or_too_much_is_abandoned() {
        assert_eq!(watched(SHORT, &|| false, || 5), Ok(5));
        let sleep = || std::thread::sleep(Duration::from_secs(2));
        let late = watched(SHORT, &|| false, sleep);
        assert_eq!(late, Err("it takes longer than 0 s".to_owned()));
        assert_eq!(watched(SHORT, &|| true, sleep), Err("it was stopped".to_owned()));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let long = Allowance { time: Duration::from_secs(60), ..SHORT };
        // Other tests release memory at the same time.
        let large = watched(long, &|| false, move || {
            let mut held = Vec::new();
            while held.len() < 40 && !stopped.load(Relaxed) {
                held.push(vec![1_u8; 50 << 20]);
                std::thread::sleep(Duration::from_millis(60));
            }
        });
        stop.store(true, Relaxed);
        assert_eq!(large, Err("it takes more than 100 MB of memory".to_owned()));
    }
}
