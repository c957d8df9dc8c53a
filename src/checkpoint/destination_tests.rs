use std::os::unix::fs::symlink;

use super::*;
use crate::Kind;

fn destination(out: &Path, overwrite: bool, inputs: &[&Path]) -> Destination {
    let mut all = Inputs::default();
    inputs.iter().for_each(|input| all.add(input));
    Destination { out: out.to_owned(), overwrite, inputs: all }
}

#[track_caller]
fn refused(out: &Path, overwrite: bool, inputs: &[&Path], part: &str) {
    let error = destination(out, overwrite, inputs).check().unwrap_err();
    assert!(error.to_string().contains(part), "{error}");
    assert!(error.hint_text().is_some());
    assert_eq!(error.kind(), Kind::Usage);
}

/// A checkpoint as this program writes it, with hashes of its files, or as it did before there were any.
fn checkpoint(dir: &Path, with_hashes: bool) {
    fs_err::create_dir_all(dir).unwrap();
    for name in ["config.json", "model.safetensors", "LICENSE"] {
        fs_err::write(dir.join(name), "{}").unwrap();
    }
    let hash = serde_json::json!({ "sha256": "0".repeat(64) });
    let mut atom = serde_json::json!({ "format_version": 1, "tensors": { "w": hash } });
    if with_hashes {
        atom["files"] = serde_json::json!({ "config.json": hash, "LICENSE": hash });
    }
    fs_err::write(dir.join("atom.json"), atom.to_string()).unwrap();
}

#[test]
fn a_new_name_an_empty_directory_and_an_old_checkpoint_may_be_written() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name);
    let new = destination(&path("a/b/new"), false, &[]).check().unwrap();
    assert_eq!(new, fs_err::canonicalize(home.path()).unwrap().join("a/b/new"));
    assert!(!path("a").exists(), "nothing is made");
    fs_err::create_dir(path("empty")).unwrap();
    assert!(destination(&path("empty"), false, &[]).check().is_ok());
    for with_hashes in [true, false] {
        checkpoint(&path("old"), with_hashes);
        refused(&path("old"), false, &[], "exists");
        assert!(destination(&path("old"), true, &[]).check().is_ok());
    }
}

#[test]
fn what_the_checkpoint_there_does_not_list_is_named_and_kept() {
    let home = tempfile::tempdir().unwrap();
    let old = home.path().join("old");
    for foreign in ["README.md", "plan.json", "tokenizer.json", "model-00001-of-00001.safetensors"]
    {
        checkpoint(&old, true);
        fs_err::write(old.join(foreign), "mine").unwrap();
        let why = if foreign == "README.md" { "is not as atom wrote it" } else { "the checkpoint" };
        refused(&old, true, &[], &format!("holds {foreign}, which {why}"));
        fs_err::remove_file(old.join(foreign)).unwrap();
    }
    fs_err::create_dir(old.join(".git")).unwrap();
    fs_err::write(old.join("notes"), "").unwrap();
    refused(&old, true, &[], "holds .git and 1 more");
    fs_err::remove_dir(old.join(".git")).unwrap();
    fs_err::remove_file(old.join("notes")).unwrap();
    // A link in the place of a file of the checkpoint is somebody else's.
    fs_err::remove_file(old.join("LICENSE")).unwrap();
    symlink("/etc/hostname", old.join("LICENSE")).unwrap();
    refused(&old, true, &[], "holds LICENSE");
}

#[test]
fn a_directory_without_a_manifest_of_ours_is_never_replaced() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("precious");
    fs_err::create_dir(&dir).unwrap();
    fs_err::write(dir.join("thesis.tex"), "x").unwrap();
    refused(&dir, false, &[], "exists");
    refused(&dir, true, &[], "is not an Atom checkpoint and is not overwritten");
    for content in ["[]", "{}", "{", "null", r#"{"format_version": 1}"#, r#"{"tensors": {}}"#] {
        fs_err::write(dir.join("atom.json"), content).unwrap();
        refused(&dir, true, &[], "is not an Atom checkpoint and is not overwritten");
    }
    refused(&dir.join("thesis.tex"), true, &[], "is not a directory");
    refused(Path::new("/"), true, &[], "not a directory of its own");
}

#[test]
fn an_output_is_no_input_holds_none_and_lies_in_none() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("m/model");
    checkpoint(&model, true);
    let text = home.path().join("texts/a.txt");
    fs_err::create_dir(home.path().join("texts")).unwrap();
    fs_err::write(&text, "words").unwrap();
    let inputs = [model.as_path(), text.as_path()];
    refused(&model, true, &inputs, "is ");
    refused(&home.path().join("m"), true, &inputs, "holds");
    refused(&home.path().join("texts"), true, &inputs, "holds");
    refused(&model.join("out"), false, &inputs, "lies inside");
    refused(&model.join("a/../out"), false, &inputs, "and back");
    refused(&home.path().join("m/../m/model"), true, &inputs, "is ");
    symlink(&model, home.path().join("link")).unwrap();
    refused(&home.path().join("link"), true, &inputs, "is ");
    refused(&home.path().join("link/out"), false, &inputs, "lies inside");
    // What a link in an input leads to is an input too.
    let blobs = home.path().join("blobs");
    fs_err::create_dir(&blobs).unwrap();
    fs_err::write(blobs.join("w"), "w").unwrap();
    symlink(blobs.join("w"), model.join("linked")).unwrap();
    refused(&blobs, true, &inputs, "holds");
    assert!(destination(&home.path().join("m/out"), false, &inputs).check().is_ok());
}

#[test]
fn a_link_that_leads_nowhere_is_found_before_the_work() {
    let home = tempfile::tempdir().unwrap();
    let link = home.path().join("link");
    symlink(home.path().join("gone"), &link).unwrap();
    refused(&link, true, &[], "is a link to");
    let below = destination(&link.join("out"), false, &[]).check().unwrap_err();
    assert!(below.hint_text().is_some(), "{below}");
    fs_err::write(home.path().join("file"), "").unwrap();
    let below = destination(&home.path().join("file/out"), false, &[]).check().unwrap_err();
    assert!(below.to_string().to_lowercase().contains("not a directory"), "{below}");
}
