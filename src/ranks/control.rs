/*! What ranks tell each other about the run itself: that they are alive, that they have ended, and with which error.

Each rank but the first has a connection with rank 0 for it. An error of one rank reaches all of them through rank 0,
closes their data connections, so that no process waits for ever, and is the error that each of them ends with. A process
that does not notice, since it waits inside of a library, is ended after a moment. */

use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::frames::{read_frame, write_frame};
use crate::{Error, Kind};

/// How long ranks wait before they say so or give up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Between two signs of life.
    pub(super) beat: Duration,
    /// Without a sign of life for so long, a rank is named.
    pub(super) silent: Duration,
    /// Without a sign of life for so long, a rank is given up.
    pub(super) gone: Duration,
    /// Ranks that wait for another for so long say for which.
    pub(super) waiting: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let [beat, silent, gone, waiting] = [1, 30, 300, 60].map(Duration::from_secs);
        Self { beat, silent, gone, waiting }
    }
}

/// What a process has from the error of another rank to its own end.
const GRACE: Duration = Duration::from_secs(5);

/// An error on its way to other ranks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    rank: usize,
    /// Its kind, as the exit code.
    code: u8,
    message: String,
    hint: Option<String>,
    /// Whether the rank said nothing itself.
    vanished: bool,
}

impl Failure {
    fn of(rank: usize, error: &Error) -> Self {
        Self {
            rank,
            code: error.kind() as u8,
            message: error.to_string(),
            hint: error.hint_text().map(str::to_owned),
            vanished: false,
        }
    }

    /// The error as other ranks end with it.
    fn error(&self) -> Error {
        let kinds = [Kind::Check, Kind::Usage, Kind::Input, Kind::Machine, Kind::Interrupted];
        let kind = kinds.into_iter().find(|kind| *kind as u8 == self.code);
        let error = Error::new(
            kind.unwrap_or(Kind::Machine),
            format!("rank {}: {}", self.rank, self.message),
        );
        match &self.hint {
            Some(hint) => error.hint(hint.clone()),
            None => error,
        }
    }
}

/// A message about the run.
#[derive(Serialize, Deserialize)]
enum Message {
    /// A rank is alive, and has waited for another for so many seconds, or for none.
    Alive { waiting: Option<(usize, u64)> },
    /// A rank has ended with an error.
    Failed(Failure),
    /// A rank has done its work.
    Done,
}

/// What is known of another rank.
struct Seen {
    last: Instant,
    waiting: Option<(usize, u64)>,
    done: bool,
    said: bool,
}

#[derive(Default)]
struct State {
    failure: Option<Failure>,
    /// This rank has done its work, or ended with an error.
    ended: bool,
    waiting: Option<(usize, Instant)>,
    seen: Vec<Option<Seen>>,
}

/// What takes sentences for the person who waits.
pub(super) type Notify = Arc<dyn Fn(String) + Send + Sync>;

/// The part of a rank in the run's control.
pub(super) struct Control {
    rank: usize,
    hosts: Vec<String>,
    state: Mutex<State>,
    changed: Condvar,
    links: Vec<(usize, Mutex<TcpStream>)>,
    data: Mutex<Vec<TcpStream>>,
    notify: Notify,
    /// Whether a failure that the work does not notice ends the process.
    ends_process: bool,
    patience: Patience,
}

impl Control {
    /// Begins to listen to `links`, and to send signs of life. `data` are closed where a rank fails.
    pub(super) fn begin(
        rank: usize,
        hosts: Vec<String>,
        links: Vec<(usize, TcpStream)>,
        data: Vec<TcpStream>,
        notify: Notify,
        (ends_process, patience): (bool, Patience),
    ) -> std::io::Result<Arc<Self>> {
        let mut readers = Vec::new();
        let mut seen: Vec<Option<Seen>> = hosts.iter().map(|_| None).collect();
        for (other, link) in &links {
            readers.push((*other, link.try_clone()?));
            let last = Instant::now();
            seen[*other] = Some(Seen { last, waiting: None, done: false, said: false });
        }
        let links = links.into_iter().map(|(other, link)| (other, Mutex::new(link))).collect();
        let control = Arc::new(Self {
            rank,
            hosts,
            state: Mutex::new(State { seen, ..State::default() }),
            changed: Condvar::new(),
            links,
            data: Mutex::new(data),
            notify,
            ends_process,
            patience,
        });
        for (other, link) in readers {
            let control = Arc::clone(&control);
            spawn(move || control.listen(other, link));
        }
        let beating = Arc::clone(&control);
        spawn(move || beating.beat());
        Ok(control)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `rank 3 on gpu-7`.
    fn name(&self, rank: usize) -> String {
        format!("rank {rank} on {}", self.hosts[rank])
    }

    /// Reads what another rank says until it has ended.
    fn listen(&self, other: usize, mut link: TcpStream) {
        loop {
            let message = read_frame(&mut link);
            let mut state = self.state();
            let Some(seen) = &mut state.seen[other] else { return };
            seen.last = Instant::now();
            match message {
                Ok(Message::Alive { waiting }) => {
                    if std::mem::take(&mut seen.said) {
                        (self.notify)(format!("{} is back", self.name(other)));
                    }
                    seen.waiting = waiting;
                }
                Ok(Message::Done) => {
                    seen.done = true;
                    self.changed.notify_all();
                }
                Ok(Message::Failed(failure)) => {
                    drop(state);
                    return self.fail(failure);
                }
                Err(_) => {
                    let (done, own_end) = (seen.done, state.ended);
                    drop(state);
                    if !done && !own_end {
                        let host = &self.hosts[other];
                        let error = Error::machine(format!("it has ended without a word on {host}"))
                            .hint("was it killed, or did its host's memory run out? Its own output may say more");
                        self.fail(Failure { vanished: true, ..Failure::of(other, &error) });
                    }
                    return;
                }
            }
        }
    }

    /// Sends a message to all that this rank is linked with; those that are gone are noticed elsewhere.
    fn send(&self, message: &Message) {
        for (_, link) in &self.links {
            let mut link = link.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = write_frame(&mut *link, message);
        }
    }

    /// Has all ranks end with a failure, unless one came before it.
    fn fail(&self, failure: Failure) {
        {
            let mut state = self.state();
            if state.failure.is_some() {
                return;
            }
            state.failure = Some(failure.clone());
        }
        self.send(&Message::Failed(failure.clone()));
        for data in &*self.data.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = data.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
        if self.ends_process && failure.rank != self.rank {
            let error = failure.error();
            let notify = Arc::clone(&self.notify);
            spawn(move || {
                sleep(GRACE);
                let hint = error.hint_text().map(|hint| format!("\nhint: {hint}"));
                notify(format!("error: {error}{}", hint.unwrap_or_default()));
                std::process::exit(i32::from(failure.code));
            });
        }
    }

    /// Signs of life, and on rank 0 a look at those of the others.
    fn beat(&self) {
        let mut said_waiting = Instant::now();
        loop {
            let waiting = {
                let state = self.state();
                if state.ended || state.failure.is_some() {
                    return;
                }
                state.waiting.map(|(other, since)| (other, since.elapsed().as_secs()))
            };
            self.send(&Message::Alive { waiting });
            if let Some(failure) = self.silent() {
                return self.fail(failure);
            }
            if self.rank == 0 && said_waiting.elapsed() > self.patience.waiting {
                said_waiting = Instant::now();
                self.name_late(waiting);
            }
            sleep(self.patience.beat);
        }
    }

    /// Names ranks that give no sign of life; the failure of one that has given none for too long.
    fn silent(&self) -> Option<Failure> {
        let mut state = self.state();
        for (other, seen) in state.seen.iter_mut().enumerate() {
            let Some(seen) = seen.as_mut().filter(|seen| !seen.done) else { continue };
            let silent = seen.last.elapsed();
            if silent > self.patience.gone {
                let (host, seconds) = (&self.hosts[other], silent.as_secs());
                let message = format!("no sign of life from {host} for {seconds} s");
                let error = Error::machine(message);
                let error = error.hint("is it stopped, or its host or network down?");
                return Some(Failure { vanished: true, ..Failure::of(other, &error) });
            }
            if silent > self.patience.silent && !std::mem::replace(&mut seen.said, true) {
                let (name, seconds) = (self.name(other), silent.as_secs());
                (self.notify)(format!(
                    "{name} has given no sign of life for {seconds} s: is it stopped, or its host or network down?"
                ));
            }
        }
        None
    }

    /// Names the ranks that others have been waiting for, where these wait for none themselves.
    fn name_late(&self, own: Option<(usize, u64)>) {
        let state = self.state();
        let waiting = |rank: usize| match rank == self.rank {
            true => own,
            false => state.seen[rank].as_ref().and_then(|seen| seen.waiting),
        };
        let long = |(_, seconds): &(usize, u64)| *seconds >= self.patience.waiting.as_secs();
        let mut late: Vec<(usize, u64)> =
            (0..self.hosts.len()).filter_map(|rank| waiting(rank).filter(long)).collect();
        late.retain(|(other, _)| waiting(*other).is_none());
        late.sort_unstable();
        late.dedup_by_key(|(other, _)| *other);
        for (other, seconds) in late {
            let name = self.name(other);
            (self.notify)(format!("{name} is what other ranks have waited for, for {seconds} s"));
        }
    }

    /// Notes that this rank waits for another while `work` is done.
    pub(super) fn waiting<T>(&self, other: usize, work: impl FnOnce() -> T) -> T {
        self.state().waiting = Some((other, Instant::now()));
        let result = work();
        self.state().waiting = None;
        result
    }

    /// The error of a connection that broke: that of the rank that has failed, where one has.
    pub(super) fn lost(&self, other: usize, error: &std::io::Error) -> Error {
        // The word of it may be on its way.
        let state = self.state();
        let waited = self.changed.wait_timeout_while(state, GRACE, |state| state.failure.is_none());
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &state.failure {
            Some(failure) => failure.error(),
            None => {
                let name = self.name(other);
                Error::machine(format!("the connection with {name} was lost: {error}"))
            }
        }
    }

    /// Tells the others that this rank has done its work. Rank 0 waits for them.
    ///
    /// # Errors
    /// That of a rank that has failed.
    pub(super) fn done(&self) -> Result<(), Error> {
        let mut state = self.state();
        if self.rank == 0 {
            let open = |state: &mut State| {
                let done = state.seen.iter().flatten().all(|seen| seen.done);
                state.failure.is_none() && !done
            };
            state = self.changed.wait_while(state, open).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(failure) = state.failure.clone() {
            state.ended = true;
            return Err(failure.error());
        }
        state.ended = true;
        drop(state);
        self.send(&Message::Done);
        Ok(())
    }

    /// Whether rank 0 knows the error that this rank has ended with: unless it is rank 0 that is gone.
    pub(super) fn told(&self) -> bool {
        self.state().failure.as_ref().is_some_and(|failure| failure.rank != 0 || !failure.vanished)
    }

    /// Gives no sign of life any more, as a process that is stopped.
    #[cfg(test)]
    pub(super) fn freeze(&self) {
        self.state().ended = true;
    }

    /// Closes everything, as the system does for a process that was killed.
    #[cfg(test)]
    pub(super) fn vanish(&self) {
        self.state().ended = true;
        for (_, link) in &self.links {
            let link = link.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = link.shutdown(Shutdown::Both);
        }
        for data in &*self.data.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = data.shutdown(Shutdown::Both);
        }
    }

    /// Ends this rank with an error, and all others; the error that counts, that of the rank that failed first.
    pub(super) fn failed(&self, error: Error) -> Error {
        self.fail(Failure::of(self.rank, &error));
        let mut state = self.state();
        state.ended = true;
        match &state.failure {
            Some(failure) if failure.rank != self.rank => failure.error(),
            _ => error,
        }
    }
}
