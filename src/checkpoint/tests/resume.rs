use super::*;
use crate::Kind;
use crate::checkpoint::{AtomCheckpoint, Options, Writer};
use serde_json::json;
use std::path::PathBuf;

const RESUME: Options =
    Options { overwrite: false, resume: true, max_shard_bytes: super::super::DEFAULT_SHARD_BYTES };

fn job() -> Value {
    json!({"recipe": {"bits": 4, "clip": 0.9}, "source": {"fingerprint": "f".repeat(64)}})
}

/// A run that stopped after block `a`; returns the output and the work directory.
fn interrupted(home: &Path) -> (PathBuf, PathBuf) {
    let out = home.join("out");
    let mut writer = Writer::create(&out, specs(), &job(), Options::default()).unwrap();
    writer.write_block("a", block_a(), json!({"error": 0.25})).unwrap();
    drop(writer);
    (out, home.join(".out.atom-work"))
}

#[test]
fn an_interrupted_run_goes_on_at_the_next_block() {
    let home = tempfile::tempdir().unwrap();
    let (out, work) = interrupted(home.path());
    assert!(!out.exists());
    let mut writer = Writer::create(&out, specs(), &job(), RESUME).unwrap();
    assert_eq!(writer.done().len(), 1);
    assert_eq!(writer.done()[0].block, "a");
    assert_eq!(writer.done()[0].extra["error"], 0.25);
    assert_eq!(writer.read_back("a.weight_codes").unwrap(), [1, 2, 3]);
    assert_eq!(
        writer.read_back("b.order").unwrap_err().message(),
        "tensor `b.order` is not written yet"
    );
    writer.write_block("b", block_b(), Value::Null).unwrap();
    writer.finish(&json!({}), json!({"format_version": 1}), &[]).unwrap();
    assert!(!work.exists());
    let resumed = AtomCheckpoint::open(&out).unwrap();
    resumed.names().for_each(|name| resumed.verify_tensor(name).unwrap());

    // It is the same, byte for byte, as one that was never interrupted.
    let whole = home.path().join("whole");
    let mut writer = Writer::create(&whole, specs(), &job(), Options::default()).unwrap();
    writer.write_block("a", block_a(), Value::Null).unwrap();
    writer.write_block("b", block_b(), Value::Null).unwrap();
    writer.finish(&json!({}), json!({"format_version": 1}), &[]).unwrap();
    for file in ["model.safetensors", "atom.json", "config.json"] {
        assert_eq!(fs_err::read(out.join(file)).unwrap(), fs_err::read(whole.join(file)).unwrap());
    }
}

#[test]
fn without_resume_or_without_work_the_run_begins_anew() {
    let home = tempfile::tempdir().unwrap();
    let (out, _) = interrupted(home.path());
    let writer = Writer::create(&out, specs(), &job(), Options::default()).unwrap();
    assert!(writer.done().is_empty());
    assert!(writer.read_back("a.weight_codes").is_err());
    drop(writer);
    let fresh = Writer::create(&home.path().join("fresh"), specs(), &job(), RESUME).unwrap();
    assert!(fresh.done().is_empty());
}

#[test]
fn a_torn_last_line_is_dropped_and_its_block_done_again() {
    let home = tempfile::tempdir().unwrap();
    let (out, work) = interrupted(home.path());
    let log = work.join("done.jsonl");
    let whole = fs_err::read(&log).unwrap();
    // Torn in the middle, and complete but for the end of the line.
    let mut torn_lines = vec![whole[..whole.len() / 2].to_vec(), whole[..whole.len() - 1].to_vec()];
    torn_lines.push(Vec::new());
    for torn in torn_lines {
        write(&log, [&whole[..], &torn].concat());
        let writer = Writer::create(&out, specs(), &job(), RESUME).unwrap();
        assert_eq!(writer.done().len(), 1);
        drop(writer);
        assert_eq!(fs_err::read(&log).unwrap(), whole);
    }
    write(&log, &whole[..whole.len() - 3]);
    let mut writer = Writer::create(&out, specs(), &job(), RESUME).unwrap();
    assert!(writer.done().is_empty());
    writer.write_block("a", block_a(), json!({"error": 0.25})).unwrap();
    drop(writer);
    assert_eq!(fs_err::read(&log).unwrap(), whole);

    write(&log, [b"garbage\n", &whole[..]].concat());
    let error = error_of(Writer::create(&out, specs(), &job(), RESUME));
    assert_eq!(error.kind(), Kind::Input);
    assert!(error.message().ends_with("done.jsonl is damaged at byte 0"));
}

#[test]
fn another_job_is_refused_and_the_differences_are_listed() {
    let home = tempfile::tempdir().unwrap();
    let (out, work) = interrupted(home.path());
    let mut other = job();
    other["recipe"]["bits"] = json!(3);
    other["recipe"]["gptq"] = json!(false);
    other["source"]["fingerprint"] = json!("0".repeat(64));
    let error = error_of(Writer::create(&out, specs(), &other, RESUME));
    assert_eq!(error.kind(), Kind::Input);
    let (f, zero) = ("f".repeat(39), "0".repeat(39));
    assert_eq!(
        error.message(),
        format!(
            "the unfinished run in {} differs: job.recipe.bits was 4, now 3; \
             job.recipe.gptq was null, now false; \
             job.source.fingerprint was \"{f}..., now \"{zero}...",
            work.display()
        )
    );
    assert!(error.hint_text().unwrap().contains("--resume"));

    let mut longer = specs();
    longer[0].shape = vec![4];
    let error = error_of(Writer::create(&out, longer, &job(), RESUME));
    assert!(
        error.message().ends_with("differs: tensors.a.weight_codes was \"U8 [3]\", now \"U8 [4]\"")
    );
    // The refusals have left the work as it was.
    assert_eq!(Writer::create(&out, specs(), &job(), RESUME).unwrap().done().len(), 1);
}

#[test]
fn work_that_was_tampered_with_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let (out, work) = interrupted(home.path());
    let shard = work.join("checkpoint/model.safetensors");
    let whole = fs_err::read(&shard).unwrap();
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    write(&shard, &damaged);
    let writer = Writer::create(&out, specs(), &job(), RESUME).unwrap();
    let error = writer.read_back("a.weight_codes").unwrap_err();
    assert!(error.message().ends_with("is not what was written"));
    drop(writer);

    // With atom.json there the run had come to its last step: everything is compared at once.
    write(&work.join("checkpoint/atom.json"), "{}");
    let error = error_of(Writer::create(&out, specs(), &job(), RESUME));
    assert!(error.message().ends_with("is not what was written"));

    write(&shard, &whole[..whole.len() - 1]);
    let error = error_of(Writer::create(&out, specs(), &job(), RESUME));
    assert!(error.message().ends_with("is not as the unfinished run left it"));
    assert!(error.hint_text().unwrap().contains("leave out --resume"));
}

#[test]
fn an_output_left_aside_by_a_killed_replacement_comes_back() {
    let home = tempfile::tempdir().unwrap();
    let (out, work) = interrupted(home.path());
    fs_err::create_dir(work.join("replaced")).unwrap();
    write(&work.join("replaced/atom.json"), "{}");
    let error = error_of(Writer::create(&out, specs(), &job(), Options::default()));
    assert_eq!(error.kind(), Kind::Usage);
    assert!(out.join("atom.json").exists());
}
