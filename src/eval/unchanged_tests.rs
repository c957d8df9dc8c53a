//! A measurement of weights that were written to meanwhile is an error.

use std::path::Path;
use std::time::SystemTime;

use crate::Kind;
use crate::backend::cpu::Cpu;
use crate::checkpoint::Source;
use crate::eval::source_perplexity;
use crate::progress::Silent;
use crate::text::{Evaluation, Split, TextSet};

#[test]
fn a_perplexity_of_changed_weights_is_an_error() {
    let home = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-llama");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs_err::copy(model.join(file), home.path().join(file)).unwrap();
    }
    let evaluation =
        Evaluation { text: TextSet::sample(Split::Evaluation), seq_len: 32, windows: Some(1) };
    let (cpu, source) = (Cpu::new().unwrap(), Source::open(home.path()).unwrap());
    source_perplexity(&cpu, &source, &evaluation, &Silent).unwrap();
    let shard = home.path().join("model.safetensors");
    let file = fs_err::OpenOptions::new().write(true).open(&shard).unwrap();
    file.file().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let error = source_perplexity(&cpu, &source, &evaluation, &Silent).unwrap_err();
    assert_eq!(error.message(), format!("{} changed during the run", shard.display()));
    assert_eq!(error.kind(), Kind::Input);
}
