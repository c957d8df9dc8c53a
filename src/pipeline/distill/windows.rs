//! Which windows are trained on, in which order, and which are held back to choose the step that is kept.

use std::collections::HashSet;

use crate::text::PythonRandom;

/// A window is held back for so many of the drawn ones, until they have so many tokens.
const DRAWN_PER_HELD: usize = 8;
const HELD_TOKENS: usize = 16_384;
/// Tokens in a row that two windows have in common only where they are cut from the same text.
const RUN: usize = 64;

/// Windows by their numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Division {
    /// Trained on.
    pub(super) trained: Vec<usize>,
    /// Held back.
    pub(super) held: Vec<usize>,
}

/// How many of `drawn` windows of `seq_len` tokens are held back.
pub(super) fn held_of(drawn: usize, seq_len: usize) -> usize {
    (drawn / DRAWN_PER_HELD).min(HELD_TOKENS.div_ceil(seq_len)).max(1)
}

impl Division {
    /// Holds back windows that lie evenly among the drawn ones, and leaves out those that share text with them.
    pub(super) fn of(tokens: &[u32], seq_len: usize) -> Self {
        let windows: Vec<&[u32]> = tokens.chunks_exact(seq_len).collect();
        let count = held_of(windows.len(), seq_len).min(windows.len());
        let held: Vec<usize> =
            (0..count).map(|i| (2 * i + 1) * windows.len() / (2 * count)).collect();
        let run = RUN.min(seq_len);
        let mut runs: HashSet<&[u32]> = HashSet::new();
        held.iter().for_each(|window| runs.extend(windows[*window].windows(run)));
        let shares = |window: &[u32]| window.windows(run).any(|run| runs.contains(run));
        let trained = (0..windows.len()).filter(|window| !held.contains(window));
        Self { trained: trained.filter(|window| !shares(windows[*window])).collect(), held }
    }

    /// The windows of step `step`, `per_step` of them: all windows in a shuffled order, then in another.
    pub(super) fn of_step(&self, step: usize, per_step: usize, seed: u64) -> Vec<usize> {
        let count = self.trained.len();
        let mut shuffled: Option<(usize, Vec<usize>)> = None;
        let window = |at: usize| {
            let round = at / count;
            if shuffled.as_ref().is_none_or(|(of, _)| *of != round) {
                let mut order = self.trained.clone();
                PythonRandom::new(seed.wrapping_add(round as u64)).shuffle(&mut order);
                shuffled = Some((round, order));
            }
            shuffled.as_ref().expect("made above").1[at % count]
        };
        (step * per_step..(step + 1) * per_step).map(window).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_window_that_is_trained_on_shares_text_with_one_that_is_held_back() {
        let seq_len = 100;
        let text: Vec<u32> = (0..40_000u32).map(|i| i.wrapping_mul(2_654_435_761) >> 7).collect();
        let starts = (0..64).map(|window| window * 30);
        let tokens: Vec<u32> =
            starts.clone().flat_map(|s| &text[s..s + seq_len]).copied().collect();
        let found = Division::of(&tokens, seq_len);
        assert_eq!(found.held.len(), 8);
        let starts: Vec<usize> = starts.collect();
        let apart = |a: usize, b: usize| starts[a].abs_diff(starts[b]) > seq_len - RUN;
        for window in 0..64 {
            let expected = found.held.iter().all(|held| apart(window, *held));
            assert_eq!(found.trained.contains(&window), expected, "{window}");
        }
        assert_eq!(found.trained.len(), 64 - 8 - 2 * 8);
    }

    #[test]
    fn a_round_takes_every_window_once_and_the_next_another_order() {
        let division = Division { trained: (0..10).collect(), held: vec![10] };
        let steps: Vec<Vec<usize>> = (0..5).map(|step| division.of_step(step, 4, 7)).collect();
        let all: Vec<usize> = steps.concat();
        let (mut first, mut second) = (all[..10].to_vec(), all[10..].to_vec());
        assert_ne!(first, second);
        first.sort_unstable();
        second.sort_unstable();
        assert_eq!((first, second), (division.trained.clone(), division.trained.clone()));
        assert_ne!(division.of_step(0, 4, 8), steps[0]);
    }
}
