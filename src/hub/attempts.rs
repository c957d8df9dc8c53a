/*! How often the Hub is asked again, and how long is waited before.

A request is made at most four times, with pauses of half a second, one and two; or as long as the Hub
asks for, five minutes of a run in all. A file that comes in parts may take more requests: what counts
is that four in a row bring it no further. */

use std::time::{Duration, Instant, SystemTime};

use super::failure::{Failure, Nature};
use crate::progress::Progress;
use crate::units;
use crate::{Error, Result};

/// Requests without success.
const ATTEMPTS: u32 = 4;
/// The first pause; each one after it is twice as long.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a run waits in all because the Hub asks for it.
const WAITS: Duration = Duration::from_secs(300);
/// How often a wait looks whether the run is to stop.
pub(super) const POLL: Duration = Duration::from_millis(100);

/// What is left of a run's waits.
#[derive(Debug)]
pub(super) struct Waits {
    left: std::sync::Mutex<Duration>,
}

impl Waits {
    pub(super) fn new() -> Self {
        Self { left: std::sync::Mutex::new(WAITS) }
    }

    /// Takes a wait out of what is left; returns false if there is less.
    fn take(&self, wait: Duration) -> bool {
        let mut left = self.left.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let rest = left.checked_sub(wait);
        *left = rest.unwrap_or(*left);
        rest.is_some()
    }
}

/// Attempts at one thing.
pub(super) struct Attempts {
    failed: u32,
    /// Time that attempts took, without the pauses.
    spent: Duration,
    began: Instant,
    /// After so much time there is no further attempt.
    limit: Duration,
    /// Whether no way to the Hub is worth another attempt.
    through_outages: bool,
}

impl Attempts {
    /// For a question: where there is no way to the Hub, it is given up immediately.
    pub(super) fn at_question(limit: Duration) -> Self {
        Self {
            failed: 0,
            spent: Duration::ZERO,
            began: Instant::now(),
            limit,
            through_outages: false,
        }
    }

    /// For a file of which a part may be here already.
    pub(super) fn at_file() -> Self {
        Self { through_outages: true, ..Self::at_question(Duration::MAX) }
    }

    /// Waits before the next attempt.
    ///
    /// # Errors
    /// The failure itself if there is to be none; an interruption.
    pub(super) fn pause(
        &mut self,
        failure: Failure,
        waits: &Waits,
        progress: &dyn Progress,
    ) -> Result<(), Failure> {
        self.failed += 1;
        self.spent += self.began.elapsed();
        let asked = match failure.nature {
            Nature::Final => return Err(failure),
            Nature::Unreachable if !self.through_outages => return Err(failure),
            Nature::Unreachable => None,
            Nature::Passing { wait } => wait,
        };
        if self.failed >= ATTEMPTS || self.spent >= self.limit {
            return Err(failure);
        }
        let pause = PAUSE * (1 << (self.failed - 1));
        if let Some(asked) = asked.filter(|asked| *asked > pause) {
            if !waits.take(asked) {
                return Err(too_long(failure, asked));
            }
            let seconds = units::seconds(asked.as_secs_f64());
            progress.info(&format!("the Hub asks to wait: going on in {seconds}"));
        }
        sleep(asked.unwrap_or_default().max(pause), progress)?;
        self.began = Instant::now();
        Ok(())
    }
}

fn too_long(failure: Failure, asked: Duration) -> Failure {
    let seconds = asked.as_secs();
    let Failure { error, nature } = failure;
    let hint = format!(
        "the Hub asks to wait {seconds} seconds before the next run; a token in HF_TOKEN raises the limit"
    );
    Failure { error: error.hint(hint), nature }
}

/// Sleeps, unless the run is to stop.
fn sleep(time: Duration, progress: &dyn Progress) -> Result<()> {
    let began = Instant::now();
    loop {
        progress.check_stop()?;
        match time.checked_sub(began.elapsed()) {
            Some(left) if !left.is_zero() => std::thread::sleep(left.min(POLL)),
            _ => return Ok(()),
        }
    }
}

/// How long a `retry-after` header asks for: seconds, or a date of HTTP. `now` is when it came.
pub(super) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value.trim()).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// How long a `ratelimit` header says that the window of requests lasts: `"api";r=0;t=55`, as the
/// Hub sends it where it sends no `retry-after`.
pub(super) fn rate_limit_reset(value: &str) -> Option<Duration> {
    let seconds = value.split(';').find_map(|part| part.trim().strip_prefix("t="))?;
    seconds.parse().ok().map(Duration::from_secs)
}

/// The error of a run that was stopped while it waited.
pub(super) fn stopped(progress: &dyn Progress) -> Result<(), Failure> {
    progress.check_stop().map_err(|error: Error| error.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;
    use crate::progress::Silent;

    fn asked(wait: Option<u64>) -> Failure {
        let wait = wait.map(Duration::from_secs);
        Failure { error: Error::machine("busy"), nature: Nature::Passing { wait } }
    }

    #[test]
    fn a_wait_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        for (value, wait) in [
            ("120", seconds(120)),
            (" 0 ", seconds(0)),
            ("Sun, 06 Nov 1994 08:50:07 GMT", seconds(30)),
            ("Sunday, 06-Nov-94 08:50:07 GMT", seconds(30)),
            ("Sun, 06 Nov 1994 08:49:07 GMT", seconds(0)),
            ("18446744073709551615", seconds(u64::MAX)),
            ("-1", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(value, now), wait, "{value}");
        }
        assert_eq!(rate_limit_reset("\"api\";r=0;t=55"), seconds(55));
        assert_eq!(rate_limit_reset("\"api\";r=0"), None);
    }

    #[test]
    fn waits_of_a_run_are_bounded_together() {
        let waits = Waits::new();
        assert!(waits.take(WAITS / 2));
        assert!(!waits.take(WAITS));
        assert!(waits.take(WAITS / 2));
        let error = Attempts::at_file().pause(asked(Some(u64::MAX)), &waits, &Silent).unwrap_err();
        assert!(error.error.hint_text().unwrap().contains("wait 18446744073709551615 seconds"));
    }

    #[test]
    fn what_cannot_change_is_not_tried_again() {
        let waits = Waits::new();
        for nature in [Nature::Final, Nature::Unreachable] {
            let failure = Failure { error: Error::machine("no"), nature };
            let mut attempts = Attempts::at_question(Duration::MAX);
            assert_eq!(attempts.pause(failure, &waits, &Silent).unwrap_err().nature, nature);
        }
        let mut attempts = Attempts::at_question(Duration::ZERO);
        attempts.pause(asked(None), &waits, &Silent).unwrap_err();
    }

    #[test]
    fn a_pause_ends_when_the_run_is_stopped() {
        struct Stopped;
        impl Progress for Stopped {
            fn begin(&self, _: &str, _: usize) {}
            fn advance(&self, _: &str) {}
            fn end(&self) {}
            fn info(&self, _: &str) {}
            fn warn(&self, _: &str) {}
            fn stop_requested(&self) -> bool {
                true
            }
        }
        let waits = Waits::new();
        let error = Attempts::at_file().pause(asked(Some(60)), &waits, &Stopped).unwrap_err();
        assert_eq!(error.error.kind(), Kind::Interrupted);
        assert_eq!(stopped(&Stopped).unwrap_err().error.kind(), Kind::Interrupted);
    }
}
