/*! Ctrl-C while the Hub is silent: the run ends at the signal and not at a deadline, and what came stays. */

use std::io::Read;
use std::os::fd::AsRawFd;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::*;
use crate::common::send;
use crate::common::stand_in::Act;

/// Sends Ctrl-C and checks how the run ends, and when.
#[track_caller]
fn interrupt(mut child: Child) {
    send(Signal::INT, &child);
    let began = Instant::now();
    let status = child.wait().unwrap();
    let took = began.elapsed();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(status.code(), Some(130), "{said}");
    // Within a second where the machine is idle. Without the signal the shortest of these waits is 30 s.
    assert!(took < Duration::from_secs(20), "{took:?}: {said}");
}

#[test]
fn a_silent_hub_does_not_hold_a_run() {
    for asked in ["GET /api/", "HEAD /org/model/resolve/", "GET /org/model/resolve/", "GET /cdn/"] {
        let scene = Scene::new();
        scene.hub.act(asked, 1, Act::Silence);
        let child = scene.start(DRY, &[]);
        scene.hub.wait_for(asked);
        interrupt(child);
    }
}

#[test]
fn a_dripping_hub_does_not_hold_a_run() {
    let scene = Scene::new();
    let head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{".to_vec();
    scene.hub.act("GET /api/", 1, Act::Drip(head, Duration::from_millis(50)));
    let child = scene.start(DRY, &[]);
    scene.hub.wait_for("GET /api/");
    interrupt(child);
}

#[test]
fn a_body_that_stalls_does_not_hold_a_run_and_its_bytes_stay() {
    let scene = Scene::new();
    let length = scene.weights().len();
    scene.hub.state().stall = Some(50_000);
    let child = scene.start(DRY, &[]);
    while fs::metadata(scene.partial()).map_or(0, |metadata| metadata.len()) < 50_000 {
        std::thread::sleep(Duration::from_millis(5));
    }
    interrupt(child);
    scene.hub.state().stall = None;
    scene.sent();
    scene.run(DRY).done();
    let (sent, ranges) = scene.sent();
    assert_eq!((sent, ranges), (length - 50_000, vec![Some("bytes=50000-".to_owned())]));
}

#[test]
fn a_wait_that_the_hub_asks_for_does_not_hold_a_run() {
    for (status, headers) in [("429 No", &[("Retry-After", "60")][..]), ("503 No", &[])] {
        let scene = Scene::new();
        scene.hub.act("GET /api/", 9, Act::answer(status, headers, b""));
        let child = scene.start(DRY, &[]);
        scene.hub.wait_for("GET /api/");
        std::thread::sleep(Duration::from_millis(100));
        interrupt(child);
    }
}

#[test]
fn the_lock_of_another_program_does_not_hold_a_run() {
    let scene = Scene::new();
    let model = Home::with_model();
    let config = fs::read(model.path("model/config.json")).unwrap();
    let blob = blob_name("config.json", &config);
    let lock = scene.home.path("hf/hub/.locks/models--org--model").join(format!("{blob}.lock"));
    fs::create_dir_all(lock.parent().unwrap()).unwrap();
    let lock = std::fs::File::create(lock).unwrap();
    lock.lock().unwrap();
    let child = scene.start(DRY, &[]);
    scene.hub.wait_for(
        "HEAD /org/model/resolve/1111111111111111111111111111111111111111/tokenizer.json",
    );
    std::thread::sleep(Duration::from_millis(300));
    interrupt(child);
}

#[test]
fn a_connection_that_is_not_taken_does_not_hold_a_run() {
    let scene = Scene::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    // SAFETY: the descriptor is the listener's, which lives on.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let address = listener.local_addr().unwrap();
    // Fills the queue of connections that wait to be taken: the next one is not answered.
    let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200));
    let taken: Vec<_> =
        std::iter::repeat_with(connect).take_while(Result::is_ok).take(64).collect();
    let child = scene.start(DRY, &[("HF_ENDPOINT", &format!("http://{address}"))]);
    std::thread::sleep(Duration::from_millis(500));
    interrupt(child);
    drop(taken);
}
