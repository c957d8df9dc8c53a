use super::*;
use crate::Kind;
use crate::backend::cpu::Cpu;
use crate::hub;
use crate::progress::Silent;

fn text(windows: usize, seq_len: usize, seed: u64) -> OwnText {
    OwnText { windows, seq_len, seed, beginnings: Vec::new() }
}

fn sampled(text: &OwnText) -> Vec<u32> {
    let source = hub::tiny_llama().unwrap();
    text.sample(&Cpu::new().unwrap(), &source, &Silent).unwrap()
}

#[test]
fn windows_depend_on_their_seed_alone() {
    let one = sampled(&text(5, 24, 3));
    assert_eq!(one.len(), 5 * 24);
    assert_eq!(one, sampled(&text(5, 24, 3)));
    assert_ne!(one, sampled(&text(5, 24, 4)));
    // The first windows of a longer run begin alike, and are the same where they are as long.
    assert_eq!(one[..3 * 24], sampled(&text(3, 24, 3))[..]);
    let windows: Vec<&[u32]> = one.chunks(24).collect();
    assert!(windows.windows(2).all(|pair| pair[0] != pair[1]), "{windows:?}");
}

#[test]
fn windows_begin_with_the_given_lines_in_turn() {
    let source = hub::tiny_llama().unwrap();
    let path = source.tokenizer_path();
    let tokenizer = Tokenizer::from_bytes(&source.tokenizer().unwrap(), &path).unwrap();
    let lines = ["The first line", "and another one"];
    let beginnings = lines.map(str::to_owned).to_vec();
    let windows = sampled(&OwnText { beginnings: beginnings.clone(), ..text(3, 20, 0) });
    for (window, tokens) in windows.chunks(20).enumerate() {
        let line = tokenizer.encode_as_it_is(lines[window % 2], &Silent).unwrap();
        let begun = [tokenizer.before(), &line].concat();
        assert_eq!(tokens[..begun.len()], begun[..], "{window}");
    }
    let short = OwnText { beginnings, ..text(3, 2, 0) };
    let refused = short.sample(&Cpu::new().unwrap(), &source, &Silent).unwrap_err();
    assert_eq!(refused.kind(), Kind::Input);
    assert!(refused.message().contains("leaves nothing to sample"), "{refused}");
}

#[test]
fn more_tokens_than_positions_are_refused() {
    let source = hub::tiny_llama().unwrap();
    let refused = text(1, 1 << 20, 0).sample(&Cpu::new().unwrap(), &source, &Silent);
    let refused = refused.unwrap_err();
    assert_eq!(refused.kind(), Kind::Usage);
    assert!(refused.message().contains("positions"), "{refused}");
}

#[test]
fn a_vocabulary_without_text_is_refused() {
    let source = hub::tiny_llama().unwrap();
    let path = source.tokenizer_path();
    let tokenizer = Tokenizer::from_bytes(&source.tokenizer().unwrap(), &path).unwrap();
    let mut random = PythonRandom::new(0);
    let refused = random_token(&mut random, &tokenizer, 0).unwrap_err();
    assert_eq!(refused.kind(), Kind::Input);
    assert!(refused.message().contains("is text to begin with"), "{refused}");
    assert!(random_token(&mut random, &tokenizer, 4096).unwrap() < 4096);
}

#[test]
fn waves_are_alike() {
    assert_eq!([batch(128, 14), batch(128, 1000), batch(5, 0), batch(7, 3)], [13, 128, 1, 3]);
}
