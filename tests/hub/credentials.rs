/*! Tokens and passwords: where they are sent, and that they are never shown. */

use super::*;
use crate::common::stand_in::Act;

const SECRET: &str = "s3cret";

/// An address of the stand-in with a user and a password.
fn with_password(hub: &StandIn) -> String {
    hub.endpoint().replace("http://", &format!("http://me:{SECRET}@"))
}

#[track_caller]
fn keeps_the_secret(run: &Run) {
    for said in [&run.stdout, &run.stderr] {
        assert!(!said.contains(SECRET), "{said}");
        assert!(!said.contains("bWU6czNjcmV0"), "{said}");
    }
}

#[test]
fn a_token_is_not_sent_to_another_port_or_scheme_or_host() {
    let token = [("HF_TOKEN", "hf_mine")];
    for (host, origin) in [("127.0.0.1", "another port"), ("localhost", "another host and port")] {
        let scene = Scene::new();
        let other = StandIn::start();
        other.add("org/model/model.safetensors", &scene.weights());
        let elsewhere = other.endpoint().replace("127.0.0.1", host);
        scene.hub.state().elsewhere = Some(elsewhere);
        scene.run_with(DRY, &token).done();
        let (there, here) = (other.requests(), scene.hub.requests());
        assert_eq!(there.len(), 1, "{origin}: {there:?}");
        assert_eq!(there[0].authorization, None, "{origin}");
        assert!(here.iter().all(|request| request.token.as_deref() == Some("hf_mine")), "{here:?}");
    }
}

#[test]
fn a_token_is_not_sent_where_other_answers_redirect_to() {
    let scene = Scene::new();
    let other = StandIn::start();
    other.add_dir("org/model", &Home::with_model().path("model"));
    for (asked, path) in [
        ("GET /api/", "/api/models/org/model/revision/main"),
        ("HEAD /org/", "/org/model/resolve/main/config.json"),
    ] {
        let to = format!("{}{path}", other.endpoint());
        scene.hub.act(asked, 1, Act::answer("307 Moved", &[("Location", &to)], b""));
        let run = scene.run_with(DRY, &[("HF_TOKEN", "hf_mine")]);
        run.fails(4, &["did not answer as the Hub does: it redirects to http://127.0.0.1:"]);
        assert!(other.requests().is_empty(), "a description is taken from the Hub alone");
    }
    // A small file may lie elsewhere: its hash comes from the Hub.
    let to = format!("{}/cdn/org/model/config.json", other.endpoint());
    scene.hub.act(
        "GET /org/model/resolve/",
        1,
        Act::answer("302 Found", &[("Location", &to)], b""),
    );
    scene.run_with(DRY, &[("HF_TOKEN", "hf_mine")]).done();
    let requests = other.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert_eq!(requests[0].authorization, None);
}

#[test]
fn a_redirect_back_to_the_hub_gets_the_token_again() {
    let scene = Scene::new();
    let to = format!("{}/cdn/org/model/model.safetensors", scene.hub.endpoint());
    let found = Act::answer("302 Found", &[("Location", &to)], b"");
    scene.hub.act(
        "GET /org/model/resolve/1111111111111111111111111111111111111111/model.",
        1,
        found,
    );
    scene.run_with(DRY, &[("HF_TOKEN", "hf_mine")]).done();
    let requests = scene.hub.requests();
    let cdn = requests.iter().find(|request| request.path.starts_with("/cdn/")).unwrap();
    assert_eq!(cdn.token.as_deref(), Some("hf_mine"));
}

#[test]
fn a_password_in_the_endpoint_is_used_and_never_shown() {
    let scene = Scene::new();
    let endpoint = with_password(&scene.hub);
    let variables = [("HF_ENDPOINT", &*endpoint), ("HF_TOKEN", "hf_mine")];
    let line = format!("quantize --model org/model {SMALL} --no-eval --no-gptq --out out --json");
    let run = scene.run_with(&line, &variables).done();
    keeps_the_secret(&run);
    let (cdn, own): (Vec<_>, Vec<_>) =
        scene.hub.requests().into_iter().partition(|request| request.path.starts_with("/cdn/"));
    // `printf me:s3cret | base64`
    let basic = Some("Basic bWU6czNjcmV0");
    assert!(own.iter().all(|request| request.authorization.as_deref() == basic), "{own:?}");
    assert!(cdn.iter().all(|request| request.authorization.is_none()), "{cdn:?}");
    for (path, content) in tree(&scene.home.path("")) {
        let shown = String::from_utf8_lossy(&content).into_owned();
        assert!(!shown.contains(SECRET), "{}", path.display());
    }
    keeps_the_secret(&scene.run_with("doctor", &variables));
    keeps_the_secret(&scene.run_with("doctor --json", &variables));
}

#[test]
fn errors_and_warnings_do_not_show_a_password() {
    let scene = Scene::new();
    let endpoint = with_password(&scene.hub);
    let variables = [("HF_ENDPOINT", &*endpoint)];
    for (denied, code) in [
        ((401, "GatedRepo"), 4),
        ((403, ""), 4),
        ((404, "RepoNotFound"), 3),
        ((404, "RevisionNotFound"), 3),
        ((418, ""), 4),
    ] {
        scene.hub.state().denied = Some(denied);
        let run = scene.run_with(DRY, &variables).fails(code, &["hint: "]);
        keeps_the_secret(&run);
        keeps_the_secret(&scene.run_with(&format!("{DRY} --json"), &variables));
    }
    scene.hub.state().denied = None;
    let circle = Act::answer("307 Moved", &[("Location", "/api/models/org/model")], b"");
    for act in [
        circle,
        Act::answer("200 OK", &[], b"<html>"),
        Act::Send(b"no HTTP at all".to_vec()),
        Act::answer("302 Found", &[("Location", "file:///etc/passwd")], b""),
    ] {
        scene.hub.act("GET /api/", 20, act);
        keeps_the_secret(&scene.run_with(DRY, &variables).fails(4, &["as the Hub does"]));
        scene.hub.behave();
    }
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nowhere = format!("http://me:{SECRET}@{closed}");
    let nowhere = [("HF_ENDPOINT", &*nowhere)];
    let said = format!("cannot reach http://{closed}");
    keeps_the_secret(&scene.run_with(DRY, &nowhere).fails(4, &[&said]));
    scene.run_with(DRY, &variables).done();
    let run = scene.run_with(DRY, &nowhere).done();
    assert!(run.stderr.contains(&format!("warning: {said}")), "{}", run.stderr);
    keeps_the_secret(&run);
}

#[test]
fn addresses_that_are_none_do_not_show_a_password_either() {
    let scene = Scene::new();
    for wrong in ["me:s3cret@hub.example", "ftp://me:s3cret@hub.example", "http://me:s3/s3cret@[x"]
    {
        let run = scene.run_with(DRY, &[("HF_ENDPOINT", wrong)]).fails(2, &["HF_ENDPOINT is `"]);
        keeps_the_secret(&run);
        keeps_the_secret(&scene.run_with("doctor", &[("HF_ENDPOINT", wrong)]));
    }
    let key = format!("{}/?key={SECRET}&path=", scene.hub.endpoint());
    keeps_the_secret(
        &scene.run_with(DRY, &[("HF_ENDPOINT", &key)]).fails(3, &["there is no org/model"]),
    );
    keeps_the_secret(&scene.run_with("doctor", &[("HF_ENDPOINT", &key)]));
    let proxy = [("ALL_PROXY", "htp://me:s3cret@proxy.example"), ("NO_PROXY", "")];
    keeps_the_secret(
        &scene.run_with(DRY, &proxy).fails(2, &["ALL_PROXY is no address of a proxy"]),
    );
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let proxy = format!("http://me:{SECRET}@{closed}");
    let proxy = [("ALL_PROXY", &*proxy), ("NO_PROXY", "")];
    keeps_the_secret(
        &scene.run_with(DRY, &proxy).fails(4, &["cannot reach", "hint: look at the network"]),
    );
}

#[test]
fn a_refused_password_is_told_from_a_refused_token() {
    let scene = Scene::new();
    scene.hub.state().denied = Some((401, ""));
    let endpoint = with_password(&scene.hub);
    let run = scene.run_with(DRY, &[("HF_ENDPOINT", &endpoint)]);
    keeps_the_secret(&run.fails(4, &["refuses the user and password", "in HF_ENDPOINT"]));
}
