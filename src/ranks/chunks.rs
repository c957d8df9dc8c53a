/*! Chunks of calibration windows: the units that sums are made of.

A sum over windows is always made chunk by chunk, each from zero, and the chunks are added one after the other in one
order. So it has the same bits on one rank and on several, whichever rank a chunk's sum comes from. In bit-reversed
order (0, 4, 2, 6, 1, 5, 3, 7) every rank of 2, 4 or 8 has one chunk of each round, and no rank holds more than one sum
that is not added yet. */

use std::ops::Range;

/// How many chunks there are, where there are windows enough.
pub const CHUNKS: usize = 8;

/// The chunks of some windows, divided among ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    windows: usize,
    ranks: usize,
}

/// What a rank does next on its way to a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Makes the sum of a chunk of its own: the one at this position of [`Chunks::own`].
    Sum(usize),
    /// Has a part in adding this chunk's sum: it sends the sum, adds it, or neither.
    Add(usize),
}

impl Chunks {
    /// Those of so many windows, divided among so many ranks.
    ///
    /// # Panics
    /// If there are no ranks.
    pub fn new(windows: usize, ranks: usize) -> Self {
        assert!(ranks > 0, "chunks are divided among ranks");
        Self { windows, ranks }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        CHUNKS.min(self.windows)
    }

    /// The windows of a chunk.
    pub fn windows(&self, chunk: usize) -> Range<usize> {
        let begin = |chunk: usize| chunk * self.windows / self.count();
        begin(chunk)..begin(chunk + 1)
    }

    /// The most windows that a chunk of so many has.
    pub fn most_windows(windows: usize) -> usize {
        windows.div_ceil(CHUNKS.min(windows).max(1))
    }

    /// All chunks in the order in which their sums are added.
    pub fn order(&self) -> impl Iterator<Item = usize> {
        let count = self.count();
        let bits = count.next_power_of_two().trailing_zeros();
        let reversed = move |at: usize| match bits {
            0 => at,
            bits => at.reverse_bits() >> (usize::BITS - bits),
        };
        (0..1 << bits).map(reversed).filter(move |chunk| *chunk < count)
    }

    /// The rank that a chunk's windows are with. Each has chunks that follow each other.
    pub fn rank(&self, chunk: usize) -> usize {
        let begin = |rank: usize| rank * self.count() / self.ranks;
        let ranks = 0..self.ranks;
        ranks
            .into_iter()
            .find(|rank| chunk < begin(rank + 1))
            .expect("the last rank ends at the last chunk")
    }

    /// The chunks of a rank, in the order in which their sums are added.
    pub fn own(&self, rank: usize) -> Vec<usize> {
        self.order().filter(|chunk| self.rank(*chunk) == rank).collect()
    }

    /// What a rank does to make a sum: additions in the one order, and its own sums as soon as the one before is
    /// added and others wait for it. Ranks that follow their steps never wait for each other in a circle: a sum waits
    /// for no rank.
    pub fn steps(&self, rank: usize) -> Vec<Step> {
        let own = self.own(rank);
        let mut steps = Vec::new();
        // Sums made so far, and of these added.
        let (mut made, mut added) = (0, 0);
        let mut round = vec![0; self.ranks];
        for chunk in self.order() {
            let from = self.rank(chunk);
            if made == added && made < own.len() && made <= round[from] {
                steps.push(Step::Sum(made));
                made += 1;
            }
            steps.push(Step::Add(chunk));
            round[from] += 1;
            added += usize::from(from == rank);
        }
        steps
    }
}

#[cfg(test)]
#[path = "chunks_tests.rs"]
mod tests;
