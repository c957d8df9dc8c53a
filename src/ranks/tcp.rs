/*! Ranks that are processes, on one host or several. */

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use super::control::{Control, Notify, Patience};
use super::rendezvous::{Connections, Waiting, meet};
use super::{Collectives, Place};
use crate::{Error, Result};

/// A rank that is a process.
pub struct TcpRanks {
    place: Place,
    control: Arc<Control>,
    peers: Vec<Option<Peer>>,
}

/// The data connection with another rank.
struct Peer {
    reader: Mutex<TcpStream>,
    writer: Mutex<TcpStream>,
}

/// What happens to a process whose work does not notice that another rank has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unnoticed {
    /// It is ended after some seconds, with the error and its exit code.
    EndsProcess,
    /// Nothing.
    GoesOn,
}

impl TcpRanks {
    /// Takes a place among the ranks of a run. `listener` is rank 0's where it listens already; `notify` takes sentences
    /// for the person who waits, and an error of `check` ends the waiting.
    ///
    /// # Errors
    /// Machine: the others do not come or cannot be reached. Usage: they disagree about the run.
    pub fn join(
        place: Place,
        listener: Option<TcpListener>,
        notify: Notify,
        unnoticed: Unnoticed,
        check: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let connections = meet(&place, listener, &mut Waiting { notify: &*notify, check })?;
        Self::of(place, connections, notify, (unnoticed, Patience::default()))
            .map_err(|error| Error::machine(format!("a connection between ranks failed: {error}")))
    }

    fn of(
        place: Place,
        connections: Connections,
        notify: Notify,
        (unnoticed, patience): (Unnoticed, Patience),
    ) -> io::Result<Self> {
        let Connections { control, data, hosts } = connections;
        let mut peers: Vec<Option<Peer>> = (0..place.ranks).map(|_| None).collect();
        let mut closed = Vec::new();
        for (other, stream) in data {
            stream.set_nodelay(true)?;
            closed.push(stream.try_clone()?);
            let reader = Mutex::new(stream.try_clone()?);
            peers[other] = Some(Peer { reader, writer: Mutex::new(stream) });
        }
        for (_, link) in &control {
            link.set_nodelay(true)?;
        }
        let ends = unnoticed == Unnoticed::EndsProcess;
        let ends = (ends, patience);
        let control = Control::begin(place.rank, hosts, control, closed, notify, ends)?;
        Ok(Self { place, control, peers })
    }

    /// Ends this rank's part of the run with its result: what others have failed with is an error here too, and an error
    /// ends them.
    pub fn finish<T>(&self, result: Result<T>) -> Result<T> {
        match result {
            Ok(value) => self.control.done().map(|()| value),
            Err(error) => Err(self.control.failed(error)),
        }
    }

    /// Whether rank 0 knows the error that this rank has ended with.
    pub fn told(&self) -> bool {
        self.control.told()
    }

    fn peer(&self, other: usize) -> &Peer {
        self.peers[other].as_ref().expect("every other rank is connected")
    }
}

impl Collectives for TcpRanks {
    fn rank(&self) -> usize {
        self.place.rank
    }

    fn ranks(&self) -> usize {
        self.place.ranks
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<()> {
        let mut stream = self.peer(to).writer.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = self.control.waiting(to, || stream.write_all(bytes));
        sent.map_err(|error| self.control.lost(to, &error))
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        let mut stream = self.peer(from).reader.lock().unwrap_or_else(PoisonError::into_inner);
        let received = self.control.waiting(from, || stream.read_exact(bytes));
        received.map_err(|error| self.control.lost(from, &error))
    }
}

#[cfg(test)]
#[path = "tcp_tests.rs"]
mod tests;
