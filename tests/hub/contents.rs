/*! What lies in the cache already: damage, links, modes. */

use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::process::CommandExt;

use super::*;

/// Ways in which a content is damaged.
fn damage(path: &Path, way: &str) {
    let content = fs::read(path).unwrap();
    let half = content.len() / 2;
    match way {
        "cut" => fs::write(path, &content[..half]).unwrap(),
        "empty" => fs::write(path, "").unwrap(),
        "longer" => fs::write(path, [&content[..], b" "].concat()).unwrap(),
        "changed" => {
            let mut changed = content;
            changed[half] ^= 1;
            fs::write(path, changed).unwrap();
        }
        "gone" => fs::remove_file(path).unwrap(),
        _ => unreachable!(),
    }
}

#[test]
fn a_damaged_content_is_fetched_again_and_alone() {
    let scene = Scene::new();
    scene.run(DRY).done();
    let intact = tree(&scene.cache());
    for file in ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"] {
        for way in ["cut", "empty", "longer", "changed", "gone"] {
            let blob = scene.blob(file);
            damage(&blob, way);
            let said = if way == "gone" { "" } else { " is damaged: " };
            let damaged = tree(&scene.cache());

            let offline = scene.run(&format!("{DRY} --offline"));
            let parts =
                [file, said, "--offline keeps it from being fetched", "hint: run once without"];
            offline.fails(4, &parts);
            assert_eq!(tree(&scene.cache()), damaged, "offline changes nothing");

            scene.hub.requests();
            let run = scene.run(DRY).done();
            assert_eq!(scene.hub.fetched(), [file], "{way}");
            if way != "gone" {
                let name = blob.file_name().unwrap().to_str().unwrap();
                assert!(run.stderr.contains(name), "{}", run.stderr);
                assert!(run.stderr.contains("fetching it again"), "{}", run.stderr);
            }
            assert_eq!(tree(&scene.cache()), intact, "{file}, {way}");
        }
    }
}

#[test]
fn a_damaged_content_is_not_what_is_left_without_network() {
    let scene = Scene::new();
    scene.run(DRY).done();
    damage(&scene.blob("model.safetensors"), "cut");
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    scene
        .run_with(DRY, &[("HF_ENDPOINT", &format!("http://{closed}"))])
        .fails(4, &["cannot reach http://127.0.0.1:"]);
    // `inspect` fetches nothing.
    scene.run("inspect org/model").fails(4, &["model.safetensors is damaged: ", "fetches nothing"]);
}

#[test]
fn a_damaged_shard_of_a_commit_is_fetched_again() {
    let scene = Scene::sharded(3);
    let line = DRY.replace("org/model", &format!("org/model@{COMMIT}"));
    scene.run(&line).done();
    let shard = "model-00002-of-00003.safetensors";
    for (file, way) in
        [(shard, "cut"), (shard, "gone"), ("model.safetensors.index.json", "changed")]
    {
        damage(&scene.blob(file), way);
        scene.run(&format!("{line} --offline")).fails(4, &[file, "hint: "]);
        scene.hub.requests();
        scene.run(&line).done();
        assert_eq!(scene.hub.fetched(), [file], "{way}");
        scene.hub.requests();
        scene.run(&line).done();
        assert!(scene.hub.requests().is_empty(), "what is sound is not asked for");
    }
    // A shard of an older upload, which the index does not name.
    let snapshot = scene.cache().join("snapshots").join(COMMIT);
    symlink("../../blobs/gone", snapshot.join("model-00009-of-00009.safetensors")).unwrap();
    scene.run(&format!("{line} --offline")).done();
}

#[test]
fn a_damaged_text_set_is_fetched_again() {
    let scene = Scene::new();
    add_sets(&scene.hub);
    let line = "eval-ppl --model tiny-llama --seq-len 64 --windows 2 --json --dataset wikitext2";
    let first = scene.run(line).done().json();
    let file = "wikitext-2-raw-v1/test-00000-of-00001.parquet";
    let snapshot = scene.home.path("hf/hub/datasets--Salesforce--wikitext/snapshots").join(COMMIT);
    let blob = fs::canonicalize(snapshot.join(file)).unwrap();
    for way in ["changed", "cut", "empty", "gone"] {
        damage(&blob, way);
        scene.run(&format!("{line} --offline")).fails(4, &[file, "--offline keeps it", "hint: "]);
        scene.hub.requests();
        let again = scene.run(line).done().json();
        assert_eq!(again["perplexity"], first["perplexity"]);
        assert_eq!(scene.hub.fetched(), [file], "{way}");
    }
}

#[test]
fn a_directory_where_a_content_should_be_is_named_and_left_alone() {
    let scene = Scene::new();
    scene.run(DRY).done();
    let blob = scene.blob("config.json");
    fs::remove_file(&blob).unwrap();
    fs::create_dir(&blob).unwrap();
    fs::write(blob.join("mine"), "mine").unwrap();
    let before = tree(&scene.cache());
    for line in [DRY.to_owned(), format!("{DRY} --offline")] {
        scene.run(&line).fails(4, &["is a directory, where the Hub's cache", "hint: move it away"]);
        assert_eq!(tree(&scene.cache()), before);
    }
}

#[test]
fn planted_links_are_not_written_through() {
    let scene = Scene::new();
    let blob = blob_name("model.safetensors", &scene.weights());
    let lock = scene.home.path("hf/hub/.locks/models--org--model").join(format!("{blob}.lock"));
    let reference = scene.cache().join("refs/main");
    for path in [scene.partial(), lock, reference.clone()] {
        for there in [true, false] {
            let _ = fs::remove_dir_all(scene.home.path("hf"));
            let mine = scene.home.path("mine");
            let _ = fs::remove_file(&mine);
            if there {
                fs::write(&mine, "mine").unwrap();
            }
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(&mine, &path).unwrap();
            let run = scene.run(DRY);
            if path == reference {
                run.done();
                assert!(!path.is_symlink(), "the link itself is replaced");
            } else {
                let named = path.file_name().unwrap().to_str().unwrap();
                run.fails(4, &[named, "is a link", "hint: remove it"]);
                assert!(path.is_symlink());
            }
            assert_eq!(mine.exists(), there);
            if there {
                assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
            }
        }
    }
}

#[test]
fn modes_are_those_that_the_umask_leaves() {
    for (umask, files, directories) in [(0o027, 0o640, 0o750), (0o002, 0o664, 0o775)] {
        let scene = Scene::new();
        let mut command = scene.home.command(DRY);
        command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", scene.hub.endpoint());
        // SAFETY: umask may be called between fork and exec.
        unsafe {
            command.pre_exec(move || {
                libc::umask(umask);
                Ok(())
            });
        }
        Run::new(DRY, command.output().unwrap()).done();
        let mut below = vec![scene.home.path("hf")];
        let mut seen = Vec::new();
        while let Some(path) = below.pop() {
            let mode = fs::symlink_metadata(&path).unwrap().mode() & 0o777;
            if path.is_symlink() {
                continue;
            }
            seen.push(path.display().to_string());
            if path.is_dir() {
                assert_eq!(mode, directories, "{}: {mode:o}", path.display());
                below.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            } else {
                assert_eq!(mode, files, "{}: {mode:o}", path.display());
            }
        }
        for part in ["refs/main", "/blobs/", ".lock"] {
            assert!(seen.iter().any(|path| path.contains(part)), "{part}: {seen:?}");
        }
    }
}

#[test]
fn a_cache_that_only_others_may_write_is_read() {
    let scene = Scene::new();
    scene.run(DRY).done();
    fs::remove_dir_all(scene.cache().join("refs")).unwrap();
    // A file where the directory of references would be: writing one fails for root too.
    fs::write(scene.cache().join("refs"), "").unwrap();
    let run = scene.run(DRY).done();
    assert!(run.stderr.contains("warning: `main` of org/model is not noted"), "{}", run.stderr);
}
