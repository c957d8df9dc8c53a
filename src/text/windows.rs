/*! Token windows: where calibration and perplexity cut the ids of a text.

Both cuts are the reference's. Calibration draws window starts with Python's generator, overlaps
allowed; perplexity lays windows side by side from the first id and drops the ragged tail. */

use super::PythonRandom;
use crate::{Error, Result};

/// Draws calibration windows, `[samples, seq_len]` flat: each starts at
/// `randint(0, tokens - seq_len - 1)` after `random.seed(seed)`.
///
/// # Errors
/// If there are fewer than `seq_len + 1` tokens, or nothing is asked for.
pub fn calibration_windows(
    tokens: &[u32],
    samples: usize,
    seq_len: usize,
    seed: u64,
) -> Result<Vec<u32>> {
    check_asked("--samples", samples)?;
    check_asked("--seq-len", seq_len)?;
    // One more than a window: the reference's range of starts leaves out the very last one.
    let needed = seq_len.saturating_add(1);
    if tokens.len() < needed {
        return Err(too_short(tokens.len(), needed, seq_len));
    }
    let last_start = (tokens.len() - needed) as u64;
    let mut random = PythonRandom::new(seed);
    let mut windows = Vec::with_capacity(samples.saturating_mul(seq_len));
    for _ in 0..samples {
        let start = random.randint(0, last_start) as usize;
        windows.extend_from_slice(&tokens[start..start + seq_len]);
    }
    Ok(windows)
}

/// Cuts the tokens into windows of `seq_len` side by side, at most `limit` of them; what is left
/// over at the end is dropped.
///
/// # Errors
/// If there is not one whole window, or nothing is asked for.
pub fn evaluation_windows(
    tokens: &[u32],
    seq_len: usize,
    limit: Option<usize>,
) -> Result<Vec<&[u32]>> {
    check_asked("--windows", limit.unwrap_or(usize::MAX))?;
    check_asked("--seq-len", seq_len)?;
    if tokens.len() < seq_len {
        return Err(too_short(tokens.len(), seq_len, seq_len));
    }
    Ok(tokens.chunks_exact(seq_len).take(limit.unwrap_or(usize::MAX)).collect())
}

fn check_asked(flag: &str, count: usize) -> Result<()> {
    if count == 0 {
        return Err(Error::usage(format!("{flag} must be at least 1")));
    }
    Ok(())
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

    fn counting(count: u32) -> Vec<u32> {
        (0..count).collect()
    }

    #[test]
    fn calibration_starts_where_python_starts() {
        // random.seed(0); [random.randint(0, 109 - 10 - 1) for _ in range(5)], and seed 42.
        let tokens = counting(109);
        for (seed, starts) in [(0, [49, 97, 53, 5, 33]), (42, [81, 14, 3, 94, 35])] {
            let windows = calibration_windows(&tokens, 5, 10, seed).unwrap();
            let expected: Vec<u32> = starts.into_iter().flat_map(|i| i..i + 10).collect();
            assert_eq!(windows, expected);
        }
    }

    #[test]
    fn calibration_needs_one_token_more_than_a_window() {
        let windows = calibration_windows(&counting(17), 3, 16, 0).unwrap();
        assert_eq!(windows, [counting(16), counting(16), counting(16)].concat());
        let error = calibration_windows(&counting(16), 3, 16, 0).unwrap_err();
        assert_eq!(error.kind(), Kind::Input);
        assert_eq!(error.message(), "the text has 16 tokens, but windows of 16 need at least 17");
        assert_eq!(error.hint_text(), Some("use a smaller --seq-len or a longer text"));
    }

    #[test]
    fn evaluation_lays_windows_side_by_side_and_drops_the_tail() {
        let tokens = counting(23);
        let windows = evaluation_windows(&tokens, 5, None).unwrap();
        assert_eq!(windows.concat(), counting(20));
        assert!(windows.iter().all(|window| window.len() == 5));
        assert_eq!(evaluation_windows(&tokens, 5, Some(2)).unwrap().concat(), counting(10));
        assert_eq!(evaluation_windows(&tokens, 5, Some(9)).unwrap().len(), 4);
        assert_eq!(evaluation_windows(&tokens, 23, None).unwrap().len(), 1);
        let error = evaluation_windows(&tokens, 24, None).unwrap_err();
        assert_eq!(error.message(), "the text has 23 tokens, but windows of 24 need at least 24");
    }

    #[test]
    fn asking_for_nothing_is_wrong_usage() {
        let tokens = counting(23);
        for error in [
            calibration_windows(&tokens, 0, 5, 0).unwrap_err(),
            calibration_windows(&tokens, 5, 0, 0).unwrap_err(),
            evaluation_windows(&tokens, 0, None).unwrap_err(),
            evaluation_windows(&tokens, 5, Some(0)).unwrap_err(),
        ] {
            assert_eq!(error.kind(), Kind::Usage, "{error}");
        }
    }
}
