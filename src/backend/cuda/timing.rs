/*! Seconds of device work: a graph of many calls, replayed between two events. Nothing of the host's is
in what is measured, and the clocks are as the device sets them. */

use cudarc::driver::DriverError;
use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::Cuda;
use super::driver_error::failed;
use super::gpu::{Stream, TRACE_VARIABLE};
use crate::{Error, Result};

/// Replays of a measurement, after one that warms up.
pub const REPLAYS: usize = 15;
/// Replays by which the fastest of several is found.
pub const TRIAL_REPLAYS: usize = 3;
/// Seconds that a replay takes at least: compared with them the graph's start is negligible.
const REPLAY_SECONDS: f64 = 1e-3;
/// Calls of a graph at most, so that it is made in no time.
const CALLS: usize = 512;
/// Bytes that are touched before an operand is used again: several times the L2 of any device.
const ROTATED_BYTES: usize = 320 << 20;

/// How many operand sets of `bytes` each have to be used one after another for none to be in L2 when it is used again.
/// Not more than a graph holds.
pub fn rotation(bytes: usize) -> usize {
    ROTATED_BYTES.div_ceil(bytes.max(1)).clamp(2, CALLS)
}

/// How often all sets are gone through in a replay, where once takes `seconds`.
fn passes(sets: usize, seconds: f64) -> usize {
    let enough = (REPLAY_SECONDS / seconds.max(1e-9)).ceil() as usize;
    enough.min(CALLS / sets.max(1)).max(1)
}

impl Cuda {
    /// Seconds of one call of `work`, by each of so many replays. It gets the number of the operand set to use, `0..sets`
    /// one after another, and issues kernels to the main stream without allocating.
    ///
    /// # Errors
    /// A usage error where every kernel is synchronized to be traced.
    pub fn replays(
        &self,
        sets: usize,
        replays: usize,
        work: impl Fn(usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        // Compiles kernels, and plans those of cuBLASLt.
        work(0)?;
        let pass = self.replay(sets, 1, 1, &work)?[0] * sets as f64;
        self.replay(sets, passes(sets, pass), replays, &work)
    }

    /// The same, by `replays` replays of `passes` over all sets.
    fn replay(
        &self,
        sets: usize,
        passes: usize,
        replays: usize,
        work: &impl Fn(usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        if self.gpu.is_traced() {
            return Err(Error::usage("kernels that are waited for one by one cannot be timed")
                .hint(format!("unset {TRACE_VARIABLE}")));
        }
        self.gpu.wait(Stream::Main)?;
        let stream = self.gpu.main();
        let timed = |error: DriverError| failed("timing kernels", error);
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(timed)?;
        let issued = (0..passes * sets).try_for_each(|call| work(call % sets));
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        issued?;
        let Some(graph) = graph.map_err(timed)? else {
            return Ok(vec![0.0; replays]);
        };
        let replay = || {
            let mark = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
            let start = mark()?;
            graph.launch()?;
            Ok::<_, DriverError>(f64::from(start.elapsed_ms(&mark()?)?) / 1e3)
        };
        let mut seconds = Vec::with_capacity(replays);
        replay().map_err(timed)?;
        for _ in 0..replays {
            seconds.push(replay().map_err(timed)? / (passes * sets) as f64);
        }
        Ok(seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_as_many_as_defeat_the_cache() {
        assert_eq!(rotation(25 << 20), 13);
        assert_eq!(rotation(1 << 30), 2);
        assert_eq!(rotation(0), CALLS);
    }

    #[test]
    fn a_replay_is_long_enough_and_no_longer_than_a_graph_may_be() {
        assert_eq!(passes(13, 1e-4), 10);
        assert_eq!(passes(13, 1e-5), CALLS / 13);
        assert_eq!(passes(2, 1.0), 1);
        assert_eq!(passes(1000, 1e-4), 1);
    }

    #[test]
    fn replays_go_through_the_sets_and_take_time() {
        let test = "replays_go_through_the_sets_and_take_time";
        let Some(cuda) = super::super::tests::device(test) else { return };
        let buffers: Vec<_> = (0..3).map(|_| cuda.gpu.alloc(64 << 20).unwrap()).collect();
        let work = |set: usize| buffers[set].fill(set as u8, Stream::Main);
        let seconds = cuda.replays(3, REPLAYS, work).unwrap();
        assert_eq!(seconds.len(), REPLAYS);
        // No device writes 64 MiB in less than 5 microseconds, nor needs a tenth of a second.
        assert!(seconds.iter().all(|seconds| (5e-6..0.1).contains(seconds)), "{seconds:?}");
        for (set, buffer) in buffers.iter().enumerate() {
            assert_eq!(buffer.download::<u8>(0..16).unwrap(), [set as u8; 16]);
        }
        // The first call is made outside of a graph, the second one inside.
        let calls = std::cell::Cell::new(0);
        let failed = cuda.replays(1, 1, |set| {
            calls.set(calls.get() + 1);
            if calls.get() == 1 { work(set) } else { Err(Error::usage("no")) }
        });
        assert_eq!(failed.unwrap_err().message(), "no");
        assert_eq!(calls.get(), 2);
        // The stream works again.
        assert!(cuda.replays(3, REPLAYS, work).is_ok());
    }
}
