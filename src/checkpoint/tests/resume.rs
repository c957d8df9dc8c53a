use super::*;
use crate::checkpoint::{AtomCheckpoint, Options, Writer};
use crate::{Error, Kind};
use serde_json::json;
use std::path::PathBuf;

const RESUME: Options = Options {
    resume: true,
    max_shard_bytes: super::super::DEFAULT_SHARD_BYTES,
    side_bytes: 0,
    kind: super::super::DirectoryKind::Checkpoint,
};

fn job() -> Value {
    json!({"recipe": {"bits": 4, "clip": 0.9}, "source": {"fingerprint": "f".repeat(64)}})
}

/// A run that stopped after block `a`; returns the output and the work directory.
fn interrupted(home: &Path) -> (PathBuf, PathBuf) {
    let out = home.join("out");
    let mut writer =
        Writer::create(&to(&out, false), specs(), &job(), Options::default(), &|| Ok(())).unwrap();
    writer.write_block("a", block_a(), json!({"error": 0.25})).unwrap();
    drop(writer);
    (out, home.join(".out.atom-work"))
}

#[test]
fn an_interrupted_run_goes_on_at_the_next_block() {
    let home = tempfile::tempdir().unwrap();
    let (out, work) = interrupted(home.path());
    assert!(!out.exists());
    let mut writer = Writer::create(&to(&out, false), specs(), &job(), RESUME, &|| Ok(())).unwrap();
    assert_eq!(writer.done().len(), 1);
    assert_eq!(writer.done()[0].block, "a");
    assert_eq!(writer.done()[0].extra["error"], 0.25);
    assert_eq!(writer.read_back("a.weight_codes").unwrap(), [1, 2, 3]);
    assert_eq!(
        writer.read_back("b.order").unwrap_err().message(),
        "tensor `b.order` is not written yet"
    );
    writer.write_block("b", block_b(), Value::Null).unwrap();
    writer.finish(&json!({}), &manifest(), &[]).unwrap();
    assert!(!work.exists());
    let resumed = AtomCheckpoint::open(&out).unwrap();
    resumed.names().for_each(|name| resumed.verify_tensor(name, &|| Ok(())).unwrap());

    // It is the same, byte for byte, as one that was never interrupted.
    let whole = home.path().join("whole");
    let mut writer =
        Writer::create(&to(&whole, false), specs(), &job(), Options::default(), &|| Ok(()))
            .unwrap();
    writer.write_block("a", block_a(), Value::Null).unwrap();
    writer.write_block("b", block_b(), Value::Null).unwrap();
    writer.finish(&json!({}), &manifest(), &[]).unwrap();
    for file in ["model.safetensors", "atom.json", "config.json"] {
        assert_eq!(fs_err::read(out.join(file)).unwrap(), fs_err::read(whole.join(file)).unwrap());
    }
}

#[test]
fn a_run_that_is_stopped_while_it_is_compared_is_kept() {
    let home = tempfile::tempdir().unwrap();
    let (out, work) = interrupted(home.path());
    let before = fs_err::read_dir(&work).unwrap().count();
    for overwrite in [false, true] {
        let stop = || Err(Error::interrupted());
        let options = Options::default();
        let error = error_of(Writer::create(&to(&out, overwrite), specs(), &job(), options, &stop));
        assert_eq!(error.kind(), Kind::Interrupted);
        assert_eq!(fs_err::read_dir(&work).unwrap().count(), before);
    }
    let writer = Writer::create(&to(&out, false), specs(), &job(), RESUME, &|| Ok(())).unwrap();
    assert_eq!(writer.done().len(), 1);
}

#[test]
fn the_same_job_continues_with_any_flags_and_another_one_is_never_thrown_away_unasked() {
    let home = tempfile::tempdir().unwrap();
    let (out, work) = interrupted(home.path());
    for (overwrite, options) in
        [(false, Options::default()), (true, Options::default()), (true, RESUME)]
    {
        let destination = to(&out, overwrite);
        let found = Writer::preview(&destination, specs(), &job(), options).unwrap();
        assert_eq!((found.done.len(), found.needed_bytes), (1, 0));
        let writer = Writer::create(&destination, specs(), &job(), options, &|| Ok(())).unwrap();
        assert_eq!(writer.done().len(), 1);
    }
    let other = json!({"recipe": {"bits": 3}});
    for (overwrite, options) in [(false, Options::default()), (false, RESUME), (true, RESUME)] {
        let destination = to(&out, overwrite);
        for error in [
            error_of(Writer::create(&destination, specs(), &other, options, &|| Ok(()))),
            error_of(Writer::preview(&destination, specs(), &other, options)),
        ] {
            assert!(error.message().contains("it has finished 2 of 3 tensors"), "{error}");
            assert!(error.hint_text().unwrap().contains("--overwrite"));
        }
    }
    let destination = to(&out, true);
    let found = Writer::preview(&destination, specs(), &other, Options::default()).unwrap();
    assert!(found.done.is_empty() && found.needed_bytes > 0);
    assert!(work.join("done.jsonl").exists(), "a preview changes nothing");
    let writer =
        Writer::create(&destination, specs(), &other, Options::default(), &|| Ok(())).unwrap();
    assert!(writer.done().is_empty());
    assert!(writer.read_back("a.weight_codes").is_err());
    let error = error_of(Writer::preview(&destination, specs(), &other, Options::default()));
    assert!(error.message().starts_with("another atom run is writing"), "{error}");
    drop(writer);
    let fresh =
        Writer::create(&to(&home.path().join("fresh"), false), specs(), &job(), RESUME, &|| Ok(()))
            .unwrap();
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
        let writer = Writer::create(&to(&out, false), specs(), &job(), RESUME, &|| Ok(())).unwrap();
        assert_eq!(writer.done().len(), 1);
        drop(writer);
        assert_eq!(fs_err::read(&log).unwrap(), whole);
    }
    write(&log, &whole[..whole.len() - 3]);
    let mut writer = Writer::create(&to(&out, false), specs(), &job(), RESUME, &|| Ok(())).unwrap();
    assert!(writer.done().is_empty());
    writer.write_block("a", block_a(), json!({"error": 0.25})).unwrap();
    drop(writer);
    assert_eq!(fs_err::read(&log).unwrap(), whole);

    write(&log, [b"garbage\n", &whole[..]].concat());
    let error = error_of(Writer::create(&to(&out, false), specs(), &job(), RESUME, &|| Ok(())));
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
    let error = error_of(Writer::create(&to(&out, false), specs(), &other, RESUME, &|| Ok(())));
    assert_eq!(error.kind(), Kind::Input);
    let (f, zero) = ("f".repeat(39), "0".repeat(39));
    assert_eq!(
        error.message(),
        format!(
            "the unfinished run in {} differs: job.recipe.bits was 4, now 3; \
             job.recipe.gptq was null, now false; \
             job.source.fingerprint was \"{f}..., now \"{zero}...; it has finished 2 of 3 tensors",
            work.display()
        )
    );
    assert!(error.hint_text().unwrap().contains("--overwrite"));

    let mut longer = specs();
    longer[0].shape = vec![4];
    let error = error_of(Writer::create(&to(&out, false), longer, &job(), RESUME, &|| Ok(())));
    let part = "differs: tensors.a.weight_codes was \"U8 [3]\", now \"U8 [4]\"";
    assert!(error.message().contains(part), "{error}");
    // The refusals have left the work as it was.
    assert_eq!(
        Writer::create(&to(&out, false), specs(), &job(), RESUME, &|| Ok(())).unwrap().done().len(),
        1
    );
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
    let error = error_of(Writer::create(&to(&out, false), specs(), &job(), RESUME, &|| Ok(())));
    assert!(error.message().ends_with("is not what was written"));

    write(&shard, &whole[..whole.len() - 1]);
    let error = error_of(Writer::create(&to(&out, false), specs(), &job(), RESUME, &|| Ok(())));
    assert!(error.message().ends_with("is not as the unfinished run left it"));
    assert!(error.hint_text().unwrap().contains("--overwrite"));
}

#[test]
fn an_output_left_aside_by_a_killed_replacement_comes_back() {
    let home = tempfile::tempdir().unwrap();
    let (out, work) = interrupted(home.path());
    fs_err::create_dir(work.join("replaced")).unwrap();
    write(&work.join("replaced/atom.json"), "{}");
    let error =
        error_of(Writer::create(&to(&out, false), specs(), &job(), Options::default(), &|| Ok(())));
    assert_eq!(error.kind(), Kind::Usage);
    assert!(out.join("atom.json").exists());
}

#[test]
fn a_link_in_the_work_directory_is_never_written_through() {
    let home = tempfile::tempdir().unwrap();
    let precious = home.path().join("precious");
    for name in ["job.json", "done.jsonl", "job.json.new", "lock", "checkpoint/model.safetensors"] {
        for hard in [false, true] {
            let (out, work) = interrupted(home.path());
            write(&precious, "mine");
            let path = work.join(name);
            let _ = fs_err::remove_file(&path);
            match hard {
                true => fs_err::hard_link(&precious, &path).unwrap(),
                false => std::os::unix::fs::symlink(&precious, &path).unwrap(),
            }
            for overwrite in [false, true] {
                if let Ok(mut writer) = Writer::create(
                    &to(&out, overwrite),
                    specs(),
                    &job(),
                    Options::default(),
                    &|| Ok(()),
                ) {
                    let _ = writer.write_block("b", block_b(), Value::Null);
                }
                assert_eq!(fs_err::read(&precious).unwrap(), b"mine", "{name} {hard} {overwrite}");
            }
            fs_err::remove_dir_all(&work).unwrap();
        }
    }
}

#[test]
fn a_work_directory_that_is_a_link_or_holds_more_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let other = json!({"recipe": {"bits": 3}});
    let begin = |out: &Path| {
        Writer::create(&to(out, true), specs(), &other, Options::default(), &|| Ok(()))
    };
    for (name, target) in [("", "dir"), ("checkpoint", "dir"), ("replaced", "dir")] {
        let (out, work) = interrupted(home.path());
        let dir = home.path().join(target);
        fs_err::create_dir_all(&dir).unwrap();
        write(&dir.join("model.safetensors"), "mine");
        let path = if name.is_empty() { work.clone() } else { work.join(name) };
        let _ = fs_err::remove_dir_all(&path);
        std::os::unix::fs::symlink(&dir, &path).unwrap();
        let error = error_of(begin(&out));
        assert!(error.message().contains("is a link or no plain file"), "{name}: {error}");
        assert_eq!(fs_err::read(dir.join("model.safetensors")).unwrap(), b"mine");
        fs_err::remove_file(&path).unwrap();
        let _ = fs_err::remove_dir_all(&work);
    }
    let (out, work) = interrupted(home.path());
    write(&work.join("checkpoint/thesis.tex"), "mine");
    let error = error_of(begin(&out));
    assert!(error.message().contains("holds thesis.tex"), "{error}");
    assert!(work.join("checkpoint/model.safetensors").exists());
}

#[test]
fn a_replacement_that_was_killed_after_the_exchange_is_completed() {
    let home = tempfile::tempdir().unwrap();
    let (out, work) = interrupted(home.path());
    let mut writer =
        Writer::create(&to(&out, false), specs(), &job(), Options::default(), &|| Ok(())).unwrap();
    writer.write_block("b", block_b(), Value::Null).unwrap();
    writer.finish(&json!({}), &manifest(), &[]).unwrap();
    let finished = fs_err::read(out.join("model.safetensors")).unwrap();

    // The same again in place of another checkpoint, stopped between the exchange and what follows it.
    let (_, old) = (home.path().join("new"), home.path().join("old"));
    fs_err::rename(&out, &old).unwrap();
    let (_, _) = interrupted(home.path());
    let mut writer =
        Writer::create(&to(&out, true), specs(), &job(), Options::default(), &|| Ok(())).unwrap();
    writer.write_block("b", block_b(), Value::Null).unwrap();
    drop(writer);
    // `old` is the finished one; what the work holds becomes another by a flipped byte.
    let shard = work.join("checkpoint/model.safetensors");
    let mut bytes = fs_err::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    write(&shard, bytes);
    write(&work.join("checkpoint/atom.json"), "{}");
    fs_err::rename(&old, &out).unwrap();
    let writer =
        Writer::create(&to(&out, true), specs(), &job(), Options::default(), &|| Ok(())).unwrap();
    assert_eq!(writer.done().len(), 2);
    assert_eq!(fs_err::read(shard).unwrap(), finished);
}

#[test]
fn what_is_not_known_before_the_run_is_no_difference() {
    let home = tempfile::tempdir().unwrap();
    let (out, _) = interrupted(home.path());
    let preview = |job: &Value| Writer::preview(&to(&out, false), specs(), job, Options::default());
    let mut unknown = job();
    unknown["source"]["fingerprint"] = crate::checkpoint::NOT_YET_KNOWN.into();
    assert_eq!(preview(&unknown).unwrap().done.len(), 1);
    unknown["recipe"]["bits"] = 3.into();
    let refused = preview(&unknown).err().unwrap();
    assert!(refused.message().contains("recipe.bits was 4, now 3"), "{refused}");
    assert!(!refused.message().contains("fingerprint"), "{refused}");
}
