/*! Ranks that are threads of one process. */

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use super::Collectives;
use crate::{Error, Result};

/// One of the ranks of a process.
pub struct ThreadRank {
    rank: usize,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
}

/// Ranks that are connected with each other, each for a thread of its own.
pub fn thread_ranks(ranks: usize) -> Vec<ThreadRank> {
    let mut to: Vec<Vec<Sender<Vec<u8>>>> = (0..ranks).map(|_| Vec::new()).collect();
    let mut from: Vec<Vec<Mutex<Receiver<Vec<u8>>>>> = (0..ranks).map(|_| Vec::new()).collect();
    for receiver in &mut from {
        for sender in &mut to {
            let (send, receive) = channel();
            sender.push(send);
            receiver.push(Mutex::new(receive));
        }
    }
    let all = to.into_iter().zip(from).enumerate();
    all.map(|(rank, (to, from))| ThreadRank { rank, to, from }).collect()
}

impl Collectives for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.to.len()
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<()> {
        self.to[to].send(bytes.to_vec()).map_err(|_| ended(to))
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<()> {
        let receiver = self.from[from].lock().unwrap_or_else(PoisonError::into_inner);
        let received = receiver.recv().map_err(|_| ended(from))?;
        assert_eq!(received.len(), bytes.len(), "rank {} and rank {from} disagree", self.rank);
        bytes.copy_from_slice(&received);
        Ok(())
    }
}

fn ended(rank: usize) -> Error {
    Error::machine(format!("rank {rank} has ended"))
}

#[cfg(test)]
#[path = "threads_tests.rs"]
mod tests;
