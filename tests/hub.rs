/*! Models and text sets of the Hub, through the program, against a stand-in on this machine. */

mod common;
#[path = "hub/contents.rs"]
mod contents;
#[path = "hub/credentials.rs"]
mod credentials;
#[path = "hub/huggingface.rs"]
mod huggingface;
#[path = "hub/interrupts.rs"]
mod interrupts;
#[path = "hub/servers.rs"]
mod servers;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::stand_in::{COMMIT, OTHER, StandIn, blob_name};
use common::{Dtype, Home, RandomModel, Run, SMALL};
use fs_err as fs;

/// A run that looks at the model and computes nothing.
const DRY: &str = "quantize --model org/model --dry-run --group 32 --outliers 16 --samples 4 \
                   --seq-len 64 --windows 2 --out out";

/// A stand-in with `org/model`, and the directory in which the program runs.
struct Scene {
    home: Home,
    hub: StandIn,
}

impl Scene {
    /// With a model in one file.
    fn new() -> Self {
        Self::sharded(1)
    }

    fn sharded(shards: usize) -> Self {
        let (home, hub) = (Home::new(), StandIn::start());
        let files = Home::new();
        RandomModel::new(2).write(&files.path("model"), Dtype::F16, shards);
        hub.add_dir("org/model", &files.path("model"));
        for (name, content) in [
            ("README.md", "# A model"),
            ("generation_config.json", "{}"),
            ("pytorch_model.bin", "the same weights"),
            ("consolidated.00.pth", "the same weights"),
            ("consolidated.safetensors", "the same weights"),
            ("onnx/model.safetensors", "the same weights"),
        ] {
            hub.add(&format!("org/model/{name}"), content.as_bytes());
        }
        Self { home, hub }
    }

    /// Runs the program with variables of its own, and with the stand-in as the Hub.
    fn run_with(&self, line: &str, variables: &[(&str, &str)]) -> Run {
        let mut command = self.home.command(line);
        command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", self.hub.endpoint());
        command.envs(variables.iter().copied());
        Run::new(line, command.output().unwrap())
    }

    fn run(&self, line: &str) -> Run {
        self.run_with(line, &[])
    }

    /// Starts the program with the stand-in as the Hub.
    fn start(&self, line: &str, variables: &[(&str, &str)]) -> std::process::Child {
        let mut command = self.home.command(line);
        command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", self.hub.endpoint());
        command.envs(variables.iter().copied()).stdout(Stdio::null()).spawn().unwrap()
    }

    /// Where the content of a file of the model is in the cache.
    fn blob(&self, file: &str) -> PathBuf {
        let snapshot = self.cache().join("snapshots").join(COMMIT);
        fs::canonicalize(snapshot.join(file)).unwrap()
    }

    /// The file that holds what came of the weights so far.
    fn partial(&self) -> PathBuf {
        let blob = blob_name("model.safetensors", &self.weights());
        self.cache().join("blobs").join(format!("{blob}.incomplete"))
    }

    /// The model's directory in the cache.
    fn cache(&self) -> PathBuf {
        self.home.path("hf/hub/models--org--model")
    }

    fn weights(&self) -> Vec<u8> {
        let files = Home::new();
        RandomModel::new(2).write(&files.path("model"), Dtype::F16, 1);
        fs::read(files.path("model/model.safetensors")).unwrap()
    }

    /// The bytes of weights that the stand-in has sent since the last call, and the ranges asked for.
    fn sent(&self) -> (usize, Vec<Option<String>>) {
        let requests = self.hub.requests().into_iter();
        let bodies = requests.filter(|request| request.path.starts_with("/cdn/"));
        bodies.fold((0, Vec::new()), |(sum, mut ranges), request| {
            ranges.push(request.range);
            (sum + request.sent, ranges)
        })
    }
}

/// Every file under a directory with its bytes, links by their target.
fn tree(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut below = vec![dir.to_path_buf()];
    while let Some(dir) = below.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten() {
            let path = entry.unwrap().path();
            if let Ok(target) = std::fs::read_link(&path) {
                found.push((path, target.into_os_string().into_encoded_bytes()));
            } else if path.is_dir() {
                below.push(path);
            } else {
                let content = fs::read(&path).unwrap();
                found.push((path, content));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_model_is_fetched_once_into_the_cache_that_others_share() {
    let scene = Scene::new();
    scene.run(DRY).done();
    let needed = [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ];
    assert_eq!(scene.hub.fetched(), needed);

    let cache = scene.cache();
    assert_eq!(fs::read_to_string(cache.join("refs/main")).unwrap(), COMMIT);
    let snapshot = cache.join("snapshots").join(COMMIT);
    assert_eq!(common::names(&snapshot), needed);
    let mut blobs = Vec::new();
    for (name, content) in common::contents(&snapshot) {
        let blob = blob_name(&name, &content);
        let link = fs::read_link(snapshot.join(&name)).unwrap();
        assert_eq!(link, PathBuf::from(format!("../../blobs/{blob}")));
        blobs.push(blob);
    }
    blobs.sort();
    assert_eq!(common::names(&cache.join("blobs")), blobs);

    // Asked again, the Hub only says that nothing changed; offline it is not asked.
    scene.run(DRY).done();
    let requests = scene.hub.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert_eq!(requests[0].path, "/api/models/org/model/revision/main");
    scene.run(&format!("{DRY} --offline")).done();
    scene.run_with(DRY, &[("HF_HUB_OFFLINE", "1")]).done();
    assert!(scene.hub.requests().is_empty());
}

#[test]
fn shards_are_those_of_the_index_and_another_cache_can_be_named() {
    let scene = Scene::sharded(3);
    let cache = scene.home.path("elsewhere");
    scene.run_with(DRY, &[("HF_HUB_CACHE", cache.to_str().unwrap())]).done();
    let files = scene.hub.fetched();
    assert_eq!(files.iter().filter(|file| file.ends_with(".safetensors")).count(), 3);
    assert!(files.contains(&"model.safetensors.index.json".to_owned()), "{files:?}");
    assert!(cache.join("models--org--model/refs/main").is_file());
    assert!(!scene.home.path("hf").exists());
}

#[test]
fn the_checkpoint_says_which_commit_it_was_made_from() {
    let scene = Scene::new();
    let line = |model: &str, out: &str| {
        format!("quantize --model {model} {SMALL} --no-eval --no-gptq --out {out}")
    };
    scene.run(&line("org/model", "a")).done();
    scene.run(&line("org/model@v1", "b")).done();
    scene.run(&line("org/model --revision v1", "c")).done();
    let source = |out: &str| {
        let text = fs::read_to_string(scene.home.path(out).join("atom.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["source"].clone()
    };
    let hub = |revision: &str, commit: &str| serde_json::json!({ "repo": "org/model", "revision": revision, "commit": commit });
    assert_eq!(source("a")["hub"], hub("main", COMMIT));
    assert_eq!(source("b")["hub"], hub("v1", OTHER));
    assert_eq!(source("c"), source("b"));
    assert_eq!(source("a")["name"], "model");
}

#[test]
fn a_commit_that_is_here_is_not_asked_for() {
    let scene = Scene::new();
    let line = DRY.replace("org/model", &format!("org/model@{OTHER}"));
    scene.run(&line).done();
    scene.hub.requests();
    scene.run(&line).done();
    assert!(scene.hub.requests().is_empty());
    assert!(!scene.cache().join("refs").exists(), "a commit needs no reference");
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_was_cut() {
    let scene = Scene::new();
    let length = scene.weights().len();
    scene.hub.state().cuts = [20_000, 20_000].into();
    scene.run(DRY).done();
    let (sent, ranges) = scene.sent();
    let range = |from: usize| Some(format!("bytes={from}-"));
    assert_eq!(ranges, [None, range(20_000), range(40_000)]);
    assert_eq!(sent, length, "no byte came twice");
}

#[test]
fn a_run_that_gives_up_leaves_what_came_to_the_next() {
    let scene = Scene::new();
    let length = scene.weights().len();
    scene.hub.state().cuts = [20_000, 0, 0, 0, 0].into();
    let said = format!("the download of model.safetensors was cut at 20000 of {length} bytes");
    scene.run(DRY).fails(4, &[&said, "hint: run it again: it goes on from there"]);
    assert!(!scene.cache().join("refs/main").exists(), "an unfinished download is not in use");
    scene.hub.requests();
    scene.run(DRY).done();
    let (sent, ranges) = scene.sent();
    assert_eq!((sent, ranges), (length - 20_000, vec![Some("bytes=20000-".to_owned())]));
}

#[test]
fn a_killed_run_loses_nothing_that_was_written() {
    let scene = Scene::new();
    let length = scene.weights().len();
    let part = length - 5_000;
    scene.hub.state().stall = Some(part);
    let mut command = scene.home.command(DRY);
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", scene.hub.endpoint());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let partial = scene
        .cache()
        .join("blobs")
        .join(format!("{}.incomplete", blob_name("model.safetensors", &scene.weights())));
    while fs::metadata(&partial).map_or(0, |metadata| metadata.len()) < part as u64 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!scene.cache().join("refs/main").exists(), "an unfinished download is not in use");
    scene.hub.state().stall = None;
    scene.sent();
    scene.run(DRY).done();
    let (sent, ranges) = scene.sent();
    assert_eq!(ranges, [Some(format!("bytes={part}-"))]);
    assert_eq!(sent, length - part);
}

#[test]
fn a_server_without_ranges_sends_the_whole_again() {
    let scene = Scene::new();
    scene.hub.state().cuts = [20_000].into();
    scene.hub.state().no_ranges = true;
    scene.run(DRY).done();
    let (sent, ranges) = scene.sent();
    assert_eq!((sent, ranges.len()), (20_000 + scene.weights().len(), 2));
}

#[test]
fn damaged_content_is_refused_and_never_kept() {
    let scene = Scene::new();
    scene.hub.state().corrupt = 10;
    let run = scene.run(DRY).fails(4, &["arrived damaged", "the Hub says", "hint: run it again"]);
    assert!(run.stdout.is_empty());
    assert!(common::names(&scene.cache().join("blobs")).is_empty());
    scene.hub.state().corrupt = 0;
    // The remains of another content, as long as they are.
    let blob = blob_name("model.safetensors", &scene.weights());
    let partial = scene.cache().join("blobs").join(format!("{blob}.incomplete"));
    fs::write(&partial, vec![7; 10_000]).unwrap();
    scene.hub.requests();
    let run = scene.run(DRY).done();
    assert!(run.stderr.contains("what was left of model.safetensors is damaged"), "{}", run.stderr);
    let (_, ranges) = scene.sent();
    assert_eq!(ranges, [Some("bytes=10000-".to_owned()), None]);
    assert_eq!(fs::read(scene.cache().join("blobs").join(blob)).unwrap(), scene.weights());
}

#[test]
fn refusals_say_what_to_do() {
    let scene = Scene::new();
    let token = [("HF_TOKEN", "hf_mine")];
    for (denied, variables, code, parts) in [
        (
            (401, "GatedRepo"),
            &[][..],
            4,
            &["accepted its licence", "hint: accept it at", "set HF_TOKEN"][..],
        ),
        ((401, "RepoNotFound"), &[], 3, &["there is no org/model on the Hub", "HF_TOKEN"]),
        ((401, ""), &token, 4, &["refuses the token", "hint: make a new token"]),
        (
            (403, "GatedRepo"),
            &token,
            4,
            &["denies access to org/model (403)", "hint: accept the licence"],
        ),
        ((404, "RepoNotFound"), &token, 3, &["there is no org/model", "hint: "]),
        ((429, ""), &[], 4, &["fewer requests (429)", "hint: wait"]),
        ((503, ""), &[], 4, &["the Hub answered 503", "hint: try again later"]),
    ] {
        scene.hub.state().denied = Some(denied);
        let run = scene.run_with(DRY, variables).fails(code, parts);
        assert!(!run.stderr.contains("hf_mine"), "a token is not for the screen");
    }
    scene.hub.state().denied = None;
    let line = DRY.replace("org/model", "org/model@v9");
    scene.run(&line).fails(3, &["org/model has no revision `v9`", "hint: "]);
    let line = DRY.replace("org/model", "org/absent");
    scene.run(&line).fails(3, &["there is no org/absent", "hint: "]);
    scene.hub.add("org/torch/config.json", b"{}");
    scene.hub.add("org/torch/pytorch_model.bin", b"weights");
    let line = DRY.replace("org/model", "org/torch");
    scene.run(&line).fails(3, &["org/torch holds no safetensors", "hint: choose"]);
    assert!(scene.hub.fetched().is_empty(), "nothing is fetched of what cannot be used");
}

#[test]
fn the_token_opens_what_is_gated_and_goes_to_the_hub_alone() {
    let scene = Scene::new();
    scene.hub.state().denied = Some((401, "GatedRepo"));
    scene.hub.state().token = Some("hf_mine");
    fs::create_dir_all(scene.home.path("hf")).unwrap();
    fs::write(scene.home.path("hf/token"), "hf_mine\n").unwrap();
    scene.run(DRY).done();
    let requests = scene.hub.requests();
    let (cdn, own): (Vec<_>, Vec<_>) =
        requests.iter().partition(|request| request.path.starts_with("/cdn/"));
    assert_eq!(cdn.len(), 1);
    assert!(cdn.iter().all(|request| request.token.is_none()), "{cdn:?}");
    assert!(own.iter().all(|request| request.token.as_deref() == Some("hf_mine")), "{own:?}");
}

#[test]
fn without_network_the_cache_is_used_and_said_so() {
    let scene = Scene::new();
    // A port without a listener: it is dropped before the program connects.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nowhere = format!("http://{closed}");
    let nowhere = [("HF_ENDPOINT", &*nowhere)];
    scene
        .run_with(DRY, &nowhere)
        .fails(4, &["cannot reach http://127.0.0.1:", "hint: look at the network"]);
    scene.run(DRY).done();
    let run = scene.run_with(DRY, &nowhere).done();
    assert!(run.stderr.contains("warning: cannot reach http://127.0.0.1:"), "{}", run.stderr);
    assert!(run.stderr.contains("going on with what the Hub's cache holds"), "{}", run.stderr);
}

#[test]
fn offline_never_asks() {
    let scene = Scene::new();
    let run = scene.run(&format!("{DRY} --offline"));
    run.fails(4, &["org/model at revision `main`", "--offline keeps it", "hint: run once without"]);
    scene.run_with(DRY, &[("HF_HUB_OFFLINE", "true")]).fails(4, &["HF_HUB_OFFLINE keeps it"]);
    let line = "eval-ppl --model tiny-llama --dataset ptb --offline";
    scene.run(line).fails(4, &["`ptb` cannot be fetched", "--offline keeps it", "`ptb=FILE`"]);
    // It loads no weights, so it fetches none.
    let run =
        scene.run("inspect org/model").fails(4, &["atom inspect fetches nothing", "hf download"]);
    assert!(run.stdout.is_empty());
    assert!(scene.hub.requests().is_empty());
    assert!(scene.home.names().is_empty());
}

#[test]
fn a_download_that_the_disk_has_no_room_for_does_not_begin() {
    let scene = Scene::new();
    scene.hub.state().announced = Some(1 << 60);
    scene.run(DRY).fails(4, &["org/model needs", "bytes free", "set HF_HUB_CACHE"]);
    assert!(scene.hub.fetched().is_empty());
}

#[test]
fn a_cache_that_cannot_be_written_is_the_machines_fault() {
    let scene = Scene::new();
    fs::write(scene.home.path("file"), "").unwrap();
    let cache = scene.home.path("file/hub");
    scene
        .run_with(DRY, &[("HF_HUB_CACHE", cache.to_str().unwrap())])
        .fails(4, &["the Hub's cache cannot be written", "hint: "]);
}

#[test]
fn a_renamed_repository_is_found_under_its_old_name() {
    let scene = Scene::new();
    scene.hub.state().renamed = Some(("old/name", "org/model"));
    scene.run(&DRY.replace("org/model", "old/name")).done();
    assert!(scene.home.path("hf/hub/models--old--name/refs/main").is_file());
}

/// Adds the named sets, all with the same paragraphs.
fn add_sets(hub: &StandIn) {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/paragraphs.parquet");
    let parquet = fs::read(data).unwrap();
    for part in ["train", "test"] {
        let file = format!("wikitext-2-raw-v1/{part}-00000-of-00001.parquet");
        hub.add(&format!("datasets/Salesforce/wikitext/{file}"), &parquet);
    }
    for part in ["train", "validation"] {
        let file = format!("penn_treebank/{part}/0000.parquet");
        hub.add(&format!("datasets/ptb-text-only/ptb_text_only/{file}"), &parquet);
    }
    let rows = atom::text::rows(data.as_ref()).unwrap();
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut gzip, lines.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    for file in ["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"] {
        hub.add(&format!("datasets/allenai/c4/{file}"), &gzip);
    }
}

#[test]
fn text_sets_are_fetched_by_name_once() {
    let scene = Scene::new();
    add_sets(&scene.hub);
    let files = Home::new();
    RandomModel::new(1).write(&files.path("model"), Dtype::F16, 1);
    let model = files.path("model").display().to_string();
    for (set, fetched) in [
        ("wikitext2", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
        ("ptb", "penn_treebank/validation/0000.parquet"),
        ("c4", "en/c4-validation.00000-of-00008.json.gz"),
    ] {
        let line =
            format!("eval-ppl --model {model} --seq-len 64 --windows 3 --json --dataset {set}");
        let first = scene.run(&line).done().json();
        assert_eq!((first["dataset"].as_str(), first["windows"].as_u64()), (Some(set), Some(3)));
        let asked = scene.hub.fetched();
        assert_eq!(asked.len(), 1);
        assert!(asked[0].ends_with(fetched), "{asked:?}");
        let second = scene.run(&format!("{line} --offline")).done().json();
        assert_eq!(first["perplexity"], second["perplexity"]);
        assert!(scene.hub.requests().is_empty());
    }
    let cache = scene.home.path("hf/hub");
    let ptb = cache.join("datasets--ptb-text-only--ptb_text_only");
    assert_eq!(fs::read_to_string(ptb.join("refs/refs/convert/parquet")).unwrap(), OTHER);
    assert!(cache.join("datasets--allenai--c4/refs/main").is_file());
}

#[test]
fn a_mix_of_sets_is_recorded_with_commits_and_hashes() {
    let scene = Scene::new();
    add_sets(&scene.hub);
    let small = SMALL.replace("--samples 4", "--samples 5");
    let line = format!(
        "quantize --model org/model {small} --no-eval --no-gptq --calib wikitext2,c4 --out out"
    );
    scene.run(&line).done();
    let text = fs::read_to_string(scene.home.path("out/atom.json")).unwrap();
    let atom: serde_json::Value = serde_json::from_str(&text).unwrap();
    let calibration = &atom["calibration"];
    assert_eq!(calibration["dataset"], "wikitext2,c4");
    let sets = calibration["sets"].as_array().unwrap();
    assert_eq!((&sets[0]["name"], &sets[0]["samples"]), (&"wikitext2".into(), &3.into()));
    assert_eq!((&sets[1]["name"], &sets[1]["samples"]), (&"c4".into(), &2.into()));
    for (set, repo) in sets.iter().zip(["Salesforce/wikitext", "allenai/c4"]) {
        let file = &set["file"];
        assert_eq!(file["repo"], repo);
        assert_eq!((&file["revision"], &file["commit"]), (&"main".into(), &COMMIT.into()));
        let key = format!("datasets/{repo}/{}", file["file"].as_str().unwrap());
        let cached = scene
            .home
            .path("hf/hub")
            .join(format!("datasets--{}", repo.replace('/', "--")))
            .join("blobs")
            .join(file["sha256"].as_str().unwrap());
        let content = fs::read(cached).unwrap();
        assert_eq!(file["sha256"], blob_name(&key, &content));
    }
    assert!(text.find("\"path\"").is_none(), "where a file lay says nothing elsewhere");
}
