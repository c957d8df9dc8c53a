/*! One request and its answer, on a thread of their own, so that the run can stop at any moment and no
server can hold it: nothing here waits longer than [`POLL`] without looking up.

A body must keep up a rate: bytes that come too slowly are a cut like any other. */

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use ureq::http::request::Request;
use ureq::http::response::Parts;
use ureq::{Agent, Body};

use super::attempts::{POLL, stopped};
use super::failure::Failure;
use super::settings::Endpoint;
use crate::Error;
use crate::progress::Progress;

/// Bytes a second below which a body counts as cut.
const RATE: u64 = 1024;
/// Bytes that are handed over in one piece, and how many of these may wait to be taken.
const CHUNK: usize = 64 << 10;
const QUEUE: usize = 8;

/// An answer whose body is on its way.
pub(super) struct Answer<'a> {
    /// Status and headers.
    pub(super) head: Parts,
    pub(super) body: Incoming<'a>,
}

/// A body on its way.
pub(super) struct Incoming<'a> {
    chunks: Receiver<io::Result<Vec<u8>>>,
    endpoint: &'a Endpoint,
    progress: &'a dyn Progress,
    pace: Pace,
}

/// Sends a request; the head of the answer must be here within `patience`.
///
/// # Errors
/// What keeps the answer from coming; an interruption.
pub(super) fn send<'a>(
    agent: &Agent,
    request: Request<()>,
    endpoint: &'a Endpoint,
    patience: Duration,
    progress: &'a dyn Progress,
) -> Result<Answer<'a>, Failure> {
    stopped(progress)?;
    let (to_head, head) = sync_channel(1);
    let (to_body, chunks) = sync_channel(QUEUE);
    let agent = agent.clone();
    let thread = std::thread::Builder::new().name("hub".to_owned());
    let work = move || match agent.run(request) {
        // Where the receivers are gone, the run has gone on without this answer.
        Err(error) => drop(to_head.send(Err(error))),
        Ok(response) => {
            let (head, body) = response.into_parts();
            drop(to_head.send(Ok(head)));
            hand_over(body, &to_body);
        }
    };
    thread.spawn(work).map_err(|error| {
        Failure::from(Error::machine(format!("there is no thread for a request: {error}")))
    })?;
    let began = Instant::now();
    loop {
        stopped(progress)?;
        match head.recv_timeout(POLL) {
            Ok(Ok(head)) => {
                let pace = Pace { patience, waited: Duration::ZERO, bytes: 0 };
                return Ok(Answer { head, body: Incoming { chunks, endpoint, progress, pace } });
            }
            Ok(Err(error)) => return Err(Failure::of_request(&error, endpoint)),
            Err(RecvTimeoutError::Timeout) if began.elapsed() < patience => {}
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("no answer in {} seconds", patience.as_secs());
                return Err(Failure::too_slow(endpoint, &what));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::passing(Error::machine(format!(
                    "the request to {endpoint} ended without an answer"
                ))));
            }
        }
    }
}

/// Passes on what comes until it ends or is not wanted any more.
fn hand_over(body: Body, chunks: &SyncSender<io::Result<Vec<u8>>>) {
    let mut body = body.into_reader();
    let mut buffer = vec![0; CHUNK];
    loop {
        let chunk = match body.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => Ok(buffer[..count].to_vec()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
        let ended = chunk.is_err();
        if chunks.send(chunk).is_err() || ended {
            return;
        }
    }
}

impl Incoming<'_> {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// What cut the body, its slowness included; an interruption.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            stopped(self.progress)?;
            let began = Instant::now();
            let received = self.chunks.recv_timeout(POLL);
            let bytes = received.as_ref().map_or(0, |chunk| chunk.as_ref().map_or(0, Vec::len));
            match received {
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Ok(Err(error)) => {
                    let error = ureq::Error::from(error);
                    return Err(Failure::of_request(&error, self.endpoint).into_cut());
                }
                Ok(Ok(_)) | Err(RecvTimeoutError::Timeout) => {}
            }
            if !self.pace.keeps_up(began.elapsed(), bytes as u64) {
                let seconds = self.pace.patience.as_secs();
                let what = format!("fewer than {RATE} bytes a second came in {seconds} seconds");
                return Err(Failure::too_slow(self.endpoint, &what));
            }
            if let Ok(Ok(chunk)) = received {
                return Ok(Some(chunk));
            }
        }
    }

    /// All of it, if it is no longer than `limit` bytes and here within `deadline`; `None` if it is not.
    ///
    /// # Errors
    /// As [`Incoming::next`].
    pub(super) fn all(
        mut self,
        limit: usize,
        deadline: Duration,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let began = Instant::now();
        let mut all = Vec::new();
        while let Some(chunk) = self.next()? {
            if all.len() + chunk.len() > limit || began.elapsed() > deadline {
                return Ok(None);
            }
            all.extend(chunk);
        }
        Ok(Some(all))
    }
}

/// Measures whether a body comes fast enough. Only waiting counts: a slow disk is not the network's fault.
struct Pace {
    patience: Duration,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Adds a wait and what it brought; returns false at the end of a period with too little.
    fn keeps_up(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < self.patience {
            return true;
        }
        let enough = self.bytes >= RATE.saturating_mul(self.patience.as_secs());
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_must_keep_up_its_rate_in_every_period() {
        let second = Duration::from_secs(1);
        let mut pace = Pace { patience: 10 * second, waited: Duration::ZERO, bytes: 0 };
        assert!(pace.keeps_up(9 * second, 0), "a period is not over yet");
        assert!(pace.keeps_up(second, 10 * RATE));
        assert!(pace.keeps_up(9 * second, 10 * RATE - 1));
        assert!(!pace.keeps_up(second, 0), "what came before the period does not count");
    }
}
