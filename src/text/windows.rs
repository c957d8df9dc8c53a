/*! Token windows: where calibration and perplexity cut the ids of a text.

Both are the reference's. Calibration draws window starts with Python's generator, and windows may overlap;
perplexity takes consecutive windows from the first id and drops the rest at the end. One thing differs: a text is
never calibrated on more often than once. Where as many windows are requested as it holds, they are the consecutive
ones. */

use std::collections::HashSet;

use super::PythonRandom;
use crate::{Error, Result};

/// The most tokens of a calibration; their hidden states would take terabytes.
const MOST_TOKENS: usize = 1 << 30;

/// What follows where more windows are requested than a text holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    /// Nothing: each token is taken once.
    One,
    /// Rounds through the text that are shifted by a half of a window, a quarter, three quarters, an eighth, and so on: every token
    /// again, with other tokens before it.
    Shifted,
}

/// Which windows are drawn from a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowDraw {
    /// How many; of all sets of a mix together.
    pub samples: usize,
    /// Tokens in each.
    pub seq_len: usize,
    /// Seed of the draw.
    pub seed: u64,
    /// What follows where the text holds fewer.
    pub rounds: Rounds,
}

impl WindowDraw {
    /// Windows of one round.
    pub fn once(samples: usize, seq_len: usize, seed: u64) -> Self {
        Self { samples, seq_len, seed, rounds: Rounds::One }
    }
}

/// Where calibration windows of `seq_len` tokens begin in a text of `tokens`. Fewer than it holds: each at `randint(0,
/// tokens - seq_len - 1)` after `random.seed(seed)`. Otherwise: consecutive windows, after `random.shuffle`, because
/// sensitivity is measured on the first ones and these should not be the beginning of the text, and then those of further `rounds`.
///
/// # Errors
/// If there are fewer than `seq_len + 1` tokens, no windows are requested, or more than memory could hold.
pub(super) fn calibration_starts(tokens: usize, draw: &WindowDraw) -> Result<Vec<usize>> {
    let WindowDraw { samples, seq_len, seed, rounds } = *draw;
    check_asked(samples, seq_len)?;
    // One more than a window: the reference's range of starts leaves out the very last one.
    let needed = seq_len.saturating_add(1);
    if tokens < needed {
        return Err(too_short(tokens, needed, seq_len));
    }
    check_size(samples, seq_len)?;
    let last_start = (tokens - needed) as u64;
    let mut random = PythonRandom::new(seed);
    let held = tokens / seq_len;
    if samples < held {
        return Ok((0..samples).map(|_| random.randint(0, last_start) as usize).collect());
    }
    let mut starts = Vec::new();
    let most = match rounds {
        Rounds::One => 1,
        // There are no other shifts.
        Rounds::Shifted => seq_len.next_power_of_two(),
    };
    let mut taken = HashSet::new();
    let offsets = (0..most as u32).map(|round| shift(round, seq_len));
    for offset in offsets.filter(|offset| taken.insert(*offset)) {
        let windows = (tokens - offset) / seq_len;
        let mut round: Vec<usize> = (0..windows).map(|window| offset + window * seq_len).collect();
        random.shuffle(&mut round);
        starts.extend(round);
        if starts.len() >= samples {
            break;
        }
    }
    if rounds == Rounds::Shifted {
        starts.truncate(samples);
    }
    Ok(starts)
}

/// The shift of a round: the digits of `round` in base 2, reversed after the point, times a window's length.
fn shift(round: u32, seq_len: usize) -> usize {
    ((seq_len as u64 * u64::from(round.reverse_bits())) >> 32) as usize
}

/// The number of consecutive windows of `seq_len` in a text of `tokens`, at most `limit`; the rest at the end is
/// dropped.
///
/// # Errors
/// If the text is shorter than a window.
pub(super) fn evaluation_count(
    tokens: usize,
    seq_len: usize,
    limit: Option<usize>,
) -> Result<usize> {
    if tokens < seq_len {
        return Err(too_short(tokens, seq_len, seq_len));
    }
    Ok((tokens / seq_len).min(limit.unwrap_or(usize::MAX)))
}

/// Refuses to draw no windows.
pub(super) fn check_asked(windows: usize, seq_len: usize) -> Result<()> {
    for (flag, count) in [("the number of windows", windows), ("--seq-len", seq_len)] {
        if count == 0 {
            return Err(Error::usage(format!("{flag} must be at least 1")));
        }
    }
    Ok(())
}

/// Refuses more windows than any memory holds.
///
/// # Errors
/// Wrong usage, with the number of tokens.
pub(super) fn check_size(windows: usize, seq_len: usize) -> Result<()> {
    if windows.checked_mul(seq_len).is_some_and(|tokens| tokens <= MOST_TOKENS) {
        return Ok(());
    }
    let tokens = windows as u128 * seq_len as u128;
    Err(Error::usage(format!(
        "{windows} windows of {seq_len} are {tokens} tokens, more than {MOST_TOKENS}"
    ))
    .hint("use a smaller --samples, --windows or --seq-len"))
}

fn too_short(tokens: usize, needed: usize, seq_len: usize) -> Error {
    Error::input(format!(
        "the text has {tokens} tokens, but windows of {seq_len} need at least {needed}"
    ))
    .hint("use a smaller --seq-len or a longer text")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    fn draw(samples: usize, seq_len: usize, seed: u64, rounds: Rounds) -> WindowDraw {
        WindowDraw { samples, seq_len, seed, rounds }
    }

    fn starts(tokens: usize, samples: usize, seq_len: usize, seed: u64) -> Result<Vec<usize>> {
        calibration_starts(tokens, &WindowDraw::once(samples, seq_len, seed))
    }

    #[test]
    fn calibration_starts_where_python_starts() {
        // random.seed(0); [random.randint(0, 109 - 10 - 1) for _ in range(5)], and seed 42.
        for (seed, expected) in [(0, [49, 97, 53, 5, 33]), (42, [81, 14, 3, 94, 35])] {
            assert_eq!(starts(109, 5, 10, seed).unwrap(), expected);
        }
    }

    #[test]
    fn every_token_is_drawn_once_where_windows_would_repeat_the_text() {
        // Shuffled as by Python: starts = [0, 10, 20, 30, 40]; random.seed(0); random.shuffle(starts), and seed 42.
        for (seed, expected) in [(0, [20, 10, 0, 40, 30]), (42, [30, 10, 20, 40, 0])] {
            for samples in [5, 6, 128] {
                assert_eq!(starts(59, samples, 10, seed).unwrap(), expected);
            }
            assert_eq!(starts(59, 4, 10, seed).unwrap().len(), 4);
        }
    }

    #[test]
    fn further_rounds_are_shifted_and_end_when_there_are_enough() {
        // A text of 59 tokens holds 5 windows of 10; shifted by 5 tokens also 5, by 2 and by 7 also 5.
        let starts = calibration_starts(59, &draw(17, 10, 0, Rounds::Shifted)).unwrap();
        assert_eq!(starts.len(), 17);
        assert_eq!(starts[..5], [20, 10, 0, 40, 30], "the first round is that of one");
        for (round, offset) in [(0, 0), (1, 5), (2, 2)] {
            let mut own = starts[round * 5..(round + 1) * 5].to_vec();
            own.sort_unstable();
            assert_eq!(own, [0, 10, 20, 30, 40].map(|start| start + offset));
        }
        assert!(starts[15..].iter().all(|start| start % 10 == 7));
        // No window twice, however many are wanted: 8 shifts of 2, 5, 7, 1, 3, 6 and 8 tokens and none, and 8 more.
        let mut all = calibration_starts(59, &draw(1000, 10, 0, Rounds::Shifted)).unwrap();
        assert!(all.len() >= 10 * 4);
        assert!(all.iter().all(|start| start + 10 <= 59));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all, (0..50).collect::<Vec<_>>());
        // Where the text holds enough, nothing is different.
        for samples in [1, 4] {
            let of = |rounds| calibration_starts(109, &draw(samples, 10, 0, rounds)).unwrap();
            assert_eq!(of(Rounds::Shifted), of(Rounds::One));
        }
    }

    #[test]
    fn calibration_needs_one_token_more_than_a_window() {
        assert_eq!(starts(17, 3, 16, 0).unwrap(), [0]);
        let error = starts(16, 3, 16, 0).unwrap_err();
        assert_eq!(error.kind(), Kind::Input);
        assert_eq!(error.message(), "the text has 16 tokens, but windows of 16 need at least 17");
        assert_eq!(error.hint_text(), Some("use a smaller --seq-len or a longer text"));
    }

    #[test]
    fn evaluation_windows_are_consecutive_and_the_tail_is_dropped() {
        for (seq_len, limit, windows) in
            [(5, None, 4), (5, Some(2), 2), (5, Some(9), 4), (23, None, 1)]
        {
            assert_eq!(evaluation_count(23, seq_len, limit).unwrap(), windows);
        }
        let error = evaluation_count(23, 24, None).unwrap_err();
        assert_eq!(error.message(), "the text has 23 tokens, but windows of 24 need at least 24");
    }

    #[test]
    fn asking_for_nothing_or_for_more_than_there_is_memory_is_wrong_usage() {
        for error in [
            starts(23, 0, 5, 0).unwrap_err(),
            starts(23, 5, 0, 0).unwrap_err(),
            starts(23, 1 << 29, 5, 0).unwrap_err(),
            starts(23, usize::MAX, 5, 0).unwrap_err(),
        ] {
            assert_eq!(error.kind(), Kind::Usage, "{error}");
        }
        let error = check_size(1_000_000_000_000_000_000, 2048).unwrap_err();
        let parts = "1000000000000000000 windows of 2048 are 2048000000000000000000 tokens";
        assert!(error.message().starts_with(parts), "{error}");
        assert_eq!(starts(23, 5, usize::MAX, 0).unwrap_err().kind(), Kind::Input);
    }
}
