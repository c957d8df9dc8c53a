/*! Messages between the ranks of a run.

Every rank calls the same operations in the same order; what is sent to a rank is received there in that order. Sums
are made by the receivers, never by a transport. */

use crate::Result;

/// The ranks of a run, as one of them sees them: bytes go from one to another.
pub trait Collectives: Send + Sync {
    /// This rank, from 0 on.
    fn rank(&self) -> usize;
    /// How many there are.
    fn ranks(&self) -> usize;
    /// Sends bytes to another rank, which receives as many.
    ///
    /// # Errors
    /// The one that another rank has ended with; a machine error if it cannot be reached.
    fn send(&self, to: usize, bytes: &[u8]) -> Result<()>;
    /// Fills `bytes` with what another rank sends.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<()>;

    /// Whether this rank is the one that writes and reports.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Sends a message of any length.
    fn send_message(&self, to: usize, message: &[u8]) -> Result<()> {
        self.send(to, &(message.len() as u64).to_le_bytes())?;
        self.send(to, message)
    }

    /// Receives a message of any length.
    fn receive_message(&self, from: usize) -> Result<Vec<u8>> {
        let mut length = [0; 8];
        self.receive(from, &mut length)?;
        let mut message = vec![0; u64::from_le_bytes(length) as usize];
        self.receive(from, &mut message)?;
        Ok(message)
    }

    /// The message of rank `root`, on all ranks; the others' are ignored. It goes along a binary tree.
    fn broadcast(&self, root: usize, message: Vec<u8>) -> Result<Vec<u8>> {
        let (ranks, from_root) = (self.ranks(), (self.rank() + self.ranks() - root) % self.ranks());
        let rank = |from_root: usize| (from_root + root) % ranks;
        let message = match from_root {
            0 => message,
            at => self.receive_message(rank((at - 1) / 2))?,
        };
        for child in [2 * from_root + 1, 2 * from_root + 2] {
            if child < ranks {
                self.send_message(rank(child), &message)?;
            }
        }
        Ok(message)
    }

    /// The messages of all ranks, on rank 0; nothing on the others.
    fn gather(&self, message: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        if self.rank() > 0 {
            self.send_message(0, &message)?;
            return Ok(Vec::new());
        }
        let mut all = vec![message];
        for rank in 1..self.ranks() {
            all.push(self.receive_message(rank)?);
        }
        Ok(all)
    }

    /// The messages of all ranks, on all ranks.
    fn gather_all(&self, message: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let all = self.gather(message)?;
        let mut packed = Vec::new();
        for message in &all {
            packed.extend((message.len() as u64).to_le_bytes());
            packed.extend_from_slice(message);
        }
        let packed = self.broadcast(0, packed)?;
        let mut rest = &packed[..];
        let messages = (0..self.ranks()).map(|_| {
            let (length, after) = rest.split_at(8);
            let length = u64::from_le_bytes(length.try_into().expect("8 bytes"));
            let (message, after) = after.split_at(length as usize);
            rest = after;
            message.to_vec()
        });
        Ok(messages.collect())
    }

    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<()> {
        self.gather(Vec::new())?;
        self.broadcast(0, Vec::new()).map(drop)
    }
}

/// A run of one rank.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Collectives for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        1
    }

    fn send(&self, to: usize, _bytes: &[u8]) -> Result<()> {
        unreachable!("a single rank sends nothing to rank {to}")
    }

    fn receive(&self, from: usize, _bytes: &mut [u8]) -> Result<()> {
        unreachable!("a single rank receives nothing of rank {from}")
    }
}
