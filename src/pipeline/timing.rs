/*! Seconds by stage, and the memory a process took. */

use std::time::Instant;

use super::outcome::StageSeconds;

/// Adds up the wall-clock seconds of named stages.
#[derive(Default)]
pub struct Timing {
    stages: Vec<StageSeconds>,
}

impl Timing {
    /// Runs `work` and books its time to `stage`.
    pub fn measure<T>(&mut self, stage: &str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        let seconds = start.elapsed().as_secs_f64();
        match self.stages.iter_mut().find(|known| known.stage == stage) {
            Some(known) => known.seconds += seconds,
            None => self.stages.push(StageSeconds { stage: stage.to_owned(), seconds }),
        }
        result
    }

    /// The stages in the order they first began.
    pub fn finish(self) -> Vec<StageSeconds> {
        self.stages
    }
}

/// Highest resident memory of this process so far.
pub fn peak_rss_bytes() -> u64 {
    usage().ru_maxrss as u64 * 1024
}

/// CPU seconds, user and system, that this process has used so far.
pub fn cpu_seconds() -> f64 {
    let usage = usage();
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn usage() -> libc::rusage {
    // SAFETY: getrusage fills the struct it is given, for which all zeros is a valid value.
    unsafe {
        let mut usage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    }
}
