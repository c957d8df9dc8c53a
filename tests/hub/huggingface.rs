/*! huggingface_hub of PyPI, in the version that tests/requirements.txt pins, against the stand-in and over one cache with the
program: where it finds nothing to object to, the stand-in is a hub and our cache is one of the Hub's. */

use std::process::Command;

use serde_json::{Value, json};

use super::*;

/// Runs `huggingface.py` with the stand-in as the Hub; none where there is no huggingface_hub, loudly.
fn huggingface(scene: &Scene, words: &[&str]) -> Option<Value> {
    let python = std::env::var("ATOM_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let found = Command::new(&python).args(["-c", "import huggingface_hub"]).output();
    if !found.is_ok_and(|found| found.status.success()) {
        assert!(std::env::var_os("CI").is_none(), "{python} has no huggingface_hub");
        common::skipped("huggingface_hub", &format!("{python} has no huggingface_hub"));
        return None;
    }
    let output = Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hub/huggingface.py"))
        .args(words)
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("HF_TOKEN")
        .env("HF_HOME", scene.home.path("hf"))
        .env("HF_ENDPOINT", scene.hub.endpoint())
        .env("HF_HUB_CACHE", scene.home.path("hf/hub"))
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    Some(serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("no JSON: {output:?}")))
}

#[test]
fn what_huggingface_hub_has_fetched_is_read() {
    for shards in [1, 3] {
        let scene = Scene::sharded(shards);
        let Some(found) = huggingface(&scene, &["download", "org/model", "main"]) else { return };
        assert_eq!(found["warnings"], json!([]));
        assert_eq!(found["repos"], json!({ "org/model": ["main"] }));
        let files = found["files"].as_array().unwrap();
        assert!(files.contains(&json!("pytorch_model.bin")), "all of the repository: {files:?}");
        let sound = huggingface(&scene, &["verify", "org/model", "main"]).unwrap();
        assert_eq!(sound["mismatches"], json!([]));
        assert_eq!(sound["checked"], files.len());

        scene.hub.requests();
        scene.run(&format!("{DRY} --offline")).done();
        assert!(scene.hub.requests().is_empty());
        scene.run(DRY).done();
        assert!(scene.hub.fetched().is_empty(), "everything is there");
        let snapshot = PathBuf::from(found["directory"].as_str().unwrap());
        scene.run(&DRY.replace("org/model", snapshot.to_str().unwrap())).done();
        scene.run(&DRY.replace("org/model", scene.cache().to_str().unwrap())).done();
    }
}

#[test]
fn what_the_program_has_fetched_is_read_by_huggingface_hub() {
    for (revision, commit) in [("main", COMMIT), ("v1", OTHER)] {
        let scene = Scene::sharded(3);
        scene.run(&DRY.replace("org/model", &format!("org/model@{revision}"))).done();
        let files = scene.hub.fetched();
        let names: Vec<&str> = files.iter().map(String::as_str).collect();
        let words = |task| [&[task, "org/model", revision], &names[..]].concat();
        let Some(found) = huggingface(&scene, &words("read")) else { return };
        assert!(scene.hub.requests().is_empty());
        let snapshot = scene.cache().join("snapshots").join(commit);
        assert_eq!(found["directory"], snapshot.to_str().unwrap());
        assert_eq!(found["warnings"], json!([]));
        assert_eq!(found["repos"], json!({ "org/model": [revision] }));
        assert_eq!(found["files"], json!(files));
        for name in &names {
            assert_eq!(found["paths"][name], snapshot.join(name).to_str().unwrap());
        }
        huggingface(&scene, &words("again")).unwrap();
        assert!(scene.hub.fetched().is_empty(), "no content is fetched twice");
        let sound = huggingface(&scene, &["verify", "org/model", revision]).unwrap();
        assert_eq!((&sound["checked"], &sound["mismatches"]), (&json!(names.len()), &json!([])));
        // The check can fail.
        let weights = snapshot.join(names.iter().find(|name| name.ends_with("s")).unwrap());
        let blob = fs::canonicalize(&weights).unwrap();
        let mut content = fs::read(&blob).unwrap();
        *content.last_mut().unwrap() ^= 1;
        fs::write(&blob, content).unwrap();
        let damaged = huggingface(&scene, &["verify", "org/model", revision]).unwrap();
        assert_eq!(damaged["mismatches"].as_array().unwrap().len(), 1, "{damaged}");
    }
}

#[test]
fn a_model_card_is_one_for_huggingface_hub() {
    let scene = Scene::new();
    let readme = "---\nlicense: other\nlicense_name: our licence\nlicense_link: LICENSE\n\
                  language:\n- en\n- no\nmodel-index: broken\n---\n# The source's words\n";
    scene.hub.add("org/model/README.md", readme.as_bytes());
    let line = format!("quantize --model org/model {SMALL} --no-gptq --out out");
    let done = scene.run(&format!("{line} --json")).done().json();
    assert_eq!(done["upload"], "hf upload ORG/out out");
    let path = scene.home.path("out/README.md");
    let Some(card) = huggingface(&scene, &["card", path.to_str().unwrap()]) else { return };
    assert_eq!(
        card["data"],
        json!({
            "license": "other",
            "license_name": "our licence",
            "license_link": "LICENSE",
            "language": ["en", "no"],
            "base_model": "org/model",
            "base_model_relation": "quantized",
            "library_name": "atom",
            "pipeline_tag": "text-generation",
            "tags": ["atom", "quantized", "4-bit", "w4a4"],
        })
    );
    let text = card["text"].as_str().unwrap();
    assert!(!text.contains("The source's words"), "{text}");
    assert!(text.contains(&format!("at commit `{COMMIT}`")), "{text}");
    let measured = done["perplexity"]["after"].as_f64().unwrap();
    assert!(text.contains(&format!("| {measured:.3} |")), "{text}");
}
