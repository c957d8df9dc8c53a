use super::*;

fn text(tokens: &[u32], scored: usize) -> ScoredText {
    ScoredText { tokens: tokens.to_vec(), scored }
}

/// The tokens that stand in each window, up to and with those of `len`.
fn window(batch: &Batch, number: usize, len: usize) -> Vec<u32> {
    let rows = &batch.placement.windows[number * batch.seq_len..][..len];
    rows.iter().map(|row| batch.tokens[*row as usize]).collect()
}

#[test]
fn a_common_prefix_is_computed_once() {
    // Two choices after 1 2 3, one choice that another begins with, and a text of its own.
    let texts =
        vec![text(&[1, 2, 3, 4, 5, 6], 3), text(&[1, 2, 3, 7, 8], 2), text(&[1, 2, 3, 4], 1)];
    let batch = &batches(&[texts], |_, _| false)[0];
    assert_eq!(batch.tokens, [1, 2, 3, 4, 5, 7]);
    assert_eq!((batch.seq_len, batch.placement.windows.len()), (5, 10));
    assert_eq!(window(batch, 0, 5), [1, 2, 3, 4, 5]);
    assert_eq!(window(batch, 1, 4), [1, 2, 3, 7]);
    for (row, position) in batch.placement.rows.iter().enumerate() {
        assert_eq!(batch.placement.windows[*position as usize], row as u32);
    }
    assert_eq!(batch.texts, [(0, 0..3), (1, 3..5), (2, 5..6)]);
    assert_eq!(batch.targets, [(0, 4), (1, 5), (2, 6), (0, 7), (3, 8), (0, 4)]);
    let from: Vec<u32> = batch.from.iter().map(|row| batch.tokens[*row as usize]).collect();
    assert_eq!(from, [3, 4, 5, 7]);
}

#[test]
fn batches_are_cut_where_they_are_full_and_begin_with_the_longest() {
    let questions =
        [vec![text(&[1, 2], 1)], vec![text(&[3, 4, 5, 6], 1)], vec![text(&[7, 8, 9], 2)]];
    let cut = batches(&questions, |rows, positions| rows > 3 || positions > 5);
    let numbers: Vec<Vec<usize>> =
        cut.iter().map(|batch| batch.texts.iter().map(|text| text.0).collect()).collect();
    assert_eq!(numbers, [vec![1, 2], vec![0]]);
    // A question's texts stay together, whatever their lengths.
    let questions = [vec![text(&[1, 2], 1), text(&[1, 2, 3, 4, 5], 1)], vec![text(&[6, 7, 8], 1)]];
    let together = batches(&questions, |_, _| true);
    let numbers: Vec<usize> = together[0].texts.iter().map(|text| text.0).collect();
    assert_eq!((numbers, together.len()), (vec![0, 1], 2));
    assert_eq!(cut[0].seq_len, 3);
    // After the shorter text's own two tokens its last row repeats.
    assert_eq!(cut[0].placement.windows[3..], [3, 4, 4]);
}
