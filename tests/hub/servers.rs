/*! Servers that are slow, busy, wrong or hostile. */

use std::time::{Duration, Instant};

use super::*;
use crate::common::stand_in::{Act, message};

/// Makes deadlines short.
const SHORT: [(&str, &str); 2] = [("HF_HUB_ETAG_TIMEOUT", "1"), ("HF_HUB_DOWNLOAD_TIMEOUT", "1")];
const LISTING: &str = "GET /api/models/org/model/";
const DESCRIPTION: &str =
    "HEAD /org/model/resolve/1111111111111111111111111111111111111111/config.json";
const SMALL_FILE: &str =
    "GET /org/model/resolve/1111111111111111111111111111111111111111/config.json";
const LARGE_FILE: &str = "GET /cdn/org/model/model.safetensors";
const QUESTIONS: [&str; 4] = [LISTING, DESCRIPTION, SMALL_FILE, LARGE_FILE];

/// Checks all cases at the same time, since most of them wait.
fn each<T: Send>(cases: impl IntoIterator<Item = T>, check: impl Fn(T) + Sync) {
    std::thread::scope(|threads| {
        for case in cases {
            threads.spawn(|| check(case));
        }
    });
}

#[test]
fn a_server_that_sends_a_byte_a_connection_ends_the_run() {
    let scene = Scene::new();
    scene.hub.state().cut_each = Some(1);
    let run = scene.run(DRY);
    run.fails(4, &["the download of model.safetensors was cut at 4 of", "hint: run it again"]);
    assert_eq!(scene.sent().0, 4);
    // Without ranges each of them brings the same bytes.
    scene.hub.state().cut_each = Some(100_000);
    scene.hub.state().no_ranges = true;
    scene.run(DRY).fails(4, &["the download of model.safetensors was cut at 100000 of"]);
    assert!(!scene.cache().join("refs/main").exists());
}

#[test]
fn a_bad_network_that_brings_the_file_further_is_good_enough() {
    let scene = Scene::new();
    let length = scene.weights().len();
    scene.hub.state().cut_each = Some(10_000);
    scene.run(DRY).done();
    let (sent, ranges) = scene.sent();
    assert_eq!((sent, ranges.len()), (length, length.div_ceil(10_000)), "no byte came twice");
}

#[test]
fn a_busy_hub_is_asked_again() {
    let statuses = ["500 No", "502 No", "503 No", "504 No", "429 No", "408 No"];
    let busy = statuses.map(|status| Act::answer(status, &[], b"busy"));
    // A connection that is closed without an answer, or in the middle of one.
    let cut = [&b""[..], b"HTTP/1.1 200 OK\r\nContent-Le"].map(|said| Act::Send(said.to_vec()));
    each(busy.into_iter().chain(cut), |act| {
        let scene = Scene::new();
        for asked in QUESTIONS {
            scene.hub.act(asked, 1, act.clone());
        }
        scene.run(DRY).done();
    });
}

#[test]
fn the_hub_is_left_alone_as_long_as_it_asks_for() {
    let two = ("Retry-After", "2");
    let window = ("RateLimit", "\"api\";r=0;t=2");
    each([(LISTING, two), (DESCRIPTION, two), (LARGE_FILE, two), (LISTING, window)], |case| {
        let (asked, header) = case;
        let scene = Scene::new();
        scene.hub.act(asked, 1, Act::answer("429 No", &[header], b""));
        let began = Instant::now();
        let run = scene.run(DRY).done();
        let took = began.elapsed();
        assert!(took >= Duration::from_secs(2), "{asked}: {took:?}");
        let said = "the Hub asks to wait: going on in 2.0 s";
        assert!(run.stderr.contains(said), "{}", run.stderr);
    });
    let date = std::time::SystemTime::now() + Duration::from_secs(86_400);
    let date = httpdate::fmt_http_date(date);
    for (wait, said) in [
        ("86400", "hint: the Hub asks to wait 86400 seconds"),
        (&date, "hint: the Hub asks to wait 86"),
    ] {
        let scene = Scene::new();
        scene.hub.act("", 9, Act::answer("429 No", &[("Retry-After", wait)], b""));
        let began = Instant::now();
        scene.run(DRY).fails(4, &["fewer requests (429)", said]);
        assert!(began.elapsed() < Duration::from_secs(120), "a day is not waited for");
        assert_eq!(scene.hub.requests().len(), 1);
    }
}

#[test]
fn a_silent_or_dripping_hub_has_a_deadline() {
    let pause = Duration::from_millis(300);
    let drip = |message: Vec<u8>| Act::Drip(message, pause);
    let slow = || Act::SlowBody(message("200 OK", &[], &[b'x'; 100_000]), pause);
    let no_answer = "no answer in 1 seconds";
    let too_slow = "fewer than 1024 bytes a second came in 1 seconds";
    let cases = [
        (LISTING, Act::Silence, no_answer),
        (LISTING, drip(message("200 OK", &[], b"{}")), no_answer),
        (DESCRIPTION, drip(message("200 OK", &[], b"")), no_answer),
        (SMALL_FILE, Act::Silence, no_answer),
        (LARGE_FILE, drip(message("200 OK", &[], b"x")), no_answer),
        (LISTING, slow(), too_slow),
        (SMALL_FILE, slow(), too_slow),
        (LARGE_FILE, slow(), too_slow),
    ];
    each(cases, |(asked, act, said)| {
        let scene = Scene::new();
        scene.hub.act(asked, 99, act);
        let began = Instant::now();
        let run = scene.run_with(DRY, &SHORT);
        run.fails(4, &["cannot reach http://127.0.0.1:", said, "HF_HUB_ETAG_TIMEOUT"]);
        assert!(began.elapsed() < Duration::from_secs(120), "{asked}: {:?}", began.elapsed());
    });
}

#[test]
fn what_is_cached_stands_in_for_a_hub_that_does_not_answer() {
    let scene = Scene::new();
    scene.run(DRY).done();
    for act in [Act::Silence, Act::answer("503 No", &[], b""), Act::answer("429 No", &[], b"")] {
        scene.hub.act(LISTING, 99, act);
        let run = scene.run_with(DRY, &SHORT).done();
        assert!(run.stderr.contains("going on with what the Hub's cache holds"), "{}", run.stderr);
        scene.hub.behave();
    }
}

#[test]
fn listings_that_are_none_are_refused() {
    let json = |text: &str| {
        Act::answer("200 OK", &[("Content-Type", "application/json")], text.as_bytes())
    };
    let head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
    let names = [&head[..], b"{\"sha\": \"x\", \"siblings\": ["].concat();
    for (what, act, said) in [
        ("nothing", json(""), "JSON"),
        ("no JSON", json("<html>\u{1b}[2Jhello</html>"), "JSON"),
        ("an array", json("[]"), "JSON"),
        ("deep", json(&"[".repeat(1_000_000)), "JSON"),
        ("no commit", json("{\"siblings\": []}"), "JSON"),
        (
            "a path for a commit",
            json("{\"sha\": \"../../../x\", \"siblings\": []}"),
            "commit is no hash",
        ),
        (
            "endless names",
            Act::Endless(names, b"{\"rfilename\": \"x\"},".repeat(1000)),
            "list of files is longer",
        ),
        ("endless spaces", Act::Endless(head, vec![b' '; 100_000]), "list of files is longer"),
        (
            "endless headers",
            Act::Endless(b"HTTP/1.1 200 OK\r\n".to_vec(), b"X-A: aaaaaaaaaaaaaaa\r\n".repeat(100)),
            "header",
        ),
        (
            "a circle",
            Act::answer("302 Found", &[("Location", "/api/models/org/model/x")], b""),
            "in a circle",
        ),
        (
            "a file",
            Act::answer("302 Found", &[("Location", "file:///etc/passwd")], b""),
            "no address of HTTP",
        ),
        ("nowhere", Act::answer("302 Found", &[], b""), "no address of HTTP"),
    ] {
        let scene = Scene::new();
        scene.hub.act(LISTING, 99, act);
        let run = scene.run(DRY).fails(4, &["did not answer as the Hub does", said, "hint: "]);
        assert!(!run.stderr.contains('\u{1b}'), "{what}");
        assert!(!scene.home.path("hf").exists(), "{what}: nothing is written");
    }
}

#[test]
fn names_that_are_no_files_of_a_repository_are_refused() {
    for shard in [
        "../evil.safetensors",
        "/evil.safetensors",
        "a/../../evil.safetensors",
        "a\u{1b}[2J.safetensors",
    ] {
        let scene = Scene::sharded(2);
        let index = serde_json::json!({ "weight_map": { "x": shard } }).to_string();
        scene.hub.add("org/model/model.safetensors.index.json", index.as_bytes());
        scene.hub.add(&format!("org/model/{shard}"), b"evil");
        let run = scene.run(DRY).fails(4, &["is no name of a file in a repository", "hint: "]);
        assert!(!run.stderr.contains('\u{1b}'), "{}", run.stderr);
        let fetched = scene.hub.fetched();
        assert!(fetched.iter().all(|file| !file.contains("evil")), "{fetched:?}");
        assert!(
            tree(&scene.home.path("")).iter().all(|(path, _)| !path.ends_with("evil.safetensors"))
        );
    }
    let scene = Scene::sharded(2);
    let index = serde_json::json!({ "weight_map": { "x": "a.safetensors", "y": "a.safetensors/b.safetensors" } });
    scene.hub.add("org/model/model.safetensors.index.json", index.to_string().as_bytes());
    scene.hub.add("org/model/a.safetensors", b"a");
    scene.hub.add("org/model/a.safetensors/b.safetensors", b"b");
    scene.run(DRY).fails(4, &["`a.safetensors` is a file and a directory on the Hub"]);
}

#[test]
fn descriptions_that_are_none_are_refused() {
    let commit = ("X-Repo-Commit", COMMIT);
    let etag = ("ETag", "\"8baef1b4abc478178b004d62031cf7fe6db6f903\"");
    for headers in [
        &[commit, ("ETag", "\"../../../../evil\""), ("Content-Length", "4")][..],
        &[commit, ("ETag", "\"abc\""), ("Content-Length", "4")],
        &[("X-Repo-Commit", "../../evil"), etag, ("Content-Length", "4")],
        &[commit, etag, ("X-Linked-Size", "-1")],
        &[etag, ("Content-Length", "4")],
    ] {
        let scene = Scene::new();
        scene.hub.act(DESCRIPTION, 99, Act::answer("200 OK", headers, b""));
        scene.run(DRY).fails(4, &["did not answer as the Hub does", "it names no commit"]);
        assert!(tree(&scene.home.path("")).is_empty(), "nothing is written");
    }
    let scene = Scene::new();
    scene.hub.act(DESCRIPTION, 99, Act::answer("304 Not Modified", &[], b""));
    scene.run(DRY).fails(4, &["the Hub answered 304"]);
}

#[test]
fn bodies_that_are_not_the_file_never_become_it() {
    let scene = || {
        let scene = Scene::new();
        scene.hub.state().cuts = [30_000].into();
        scene
    };
    let range = |range: &str| Act::answer("206 Partial", &[("Content-Range", range)], b"evil");
    for (act, said) in [
        (range("bytes 0-3/4"), "another part of the file"),
        (range("bytes 99999999999999999999-3/4"), "another part of the file"),
        (range(""), "another part of the file"),
        (Act::answer("206 Partial", &[], b"evil"), "another part of the file"),
        (Act::answer("304 Not Modified", &[], b""), "the Hub answered 304"),
        (Act::answer("204 Nothing", &[], b""), "the Hub answered 204"),
        (
            Act::answer("302 Found", &[("Location", "file:///etc/passwd")], b""),
            "no address of HTTP",
        ),
        (
            Act::answer("302 Found", &[("Location", "/cdn/org/model/model.safetensors")], b""),
            "in a circle",
        ),
    ] {
        let scene = scene();
        // The first request is cut; the second meets the act.
        scene.hub.skip(LARGE_FILE, 1);
        scene.hub.act(LARGE_FILE, 99, act);
        scene.run(DRY).fails(4, &[said, "hint: "]);
        assert_eq!(fs::metadata(scene.partial()).unwrap().len(), 30_000, "what came stays");
        assert!(!scene.cache().join("refs/main").exists());
    }
    let start = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
    let cases = [
        (Act::answer("200 OK", &[], b""), "was cut at 0 of"),
        (Act::answer("200 OK", &[], b"little"), "was cut at 6 of"),
        (Act::answer("416 No", &[], b""), "was cut at 0 of"),
        (Act::Endless(start, b"evil".repeat(1000)), "arrived damaged"),
    ];
    each(cases, |(act, said)| {
        let scene = Scene::new();
        scene.hub.act(LARGE_FILE, 99, act);
        scene.run(DRY).fails(4, &[said, "hint: run it again"]);
        assert!(!scene.cache().join("refs/main").exists());
    });
}

#[test]
fn a_file_that_arrives_damaged_once_is_fetched_once_more() {
    let scene = Scene::new();
    scene.hub.act(LARGE_FILE, 1, Act::answer("200 OK", &[], &vec![7; scene.weights().len()]));
    let run = scene.run(DRY).done();
    assert!(
        run.stderr.contains("model.safetensors arrived damaged: fetching it again"),
        "{}",
        run.stderr
    );
}

#[test]
fn a_repository_that_moved_is_found_by_any_form_of_address() {
    for to in [
        "/api/models/org/model/revision/main",
        "../../model/revision/main",
        "//HOST/api/models/org/model/revision/main",
    ] {
        let scene = Scene::new();
        let endpoint = scene.hub.endpoint();
        let to = to.replace("HOST", endpoint.strip_prefix("http://").unwrap());
        let moved = Act::answer("301 Moved", &[("Location", &to)], b"");
        scene.hub.act("GET /api/models/org/old/", 1, moved);
        scene.hub.state().renamed = Some(("org/old", "org/model"));
        scene.run(&DRY.replace("org/model", "org/old")).done();
    }
}

#[test]
fn wrong_numbers_of_seconds_are_refused() {
    let scene = Scene::new();
    for name in ["HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"] {
        scene.run_with(DRY, &[(name, "soon")]).fails(2, &[name, "is `soon`", "hint: set it to"]);
    }
    assert!(scene.hub.requests().is_empty());
}
