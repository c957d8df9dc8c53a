/*! A stand-in for the Hub on this machine: the few addresses that the Hub's tools request, and its failures. */

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit of every repository's `main`.
pub(crate) const COMMIT: &str = "1111111111111111111111111111111111111111";
/// The commit of every other revision that is known: `v1` and `refs/convert/parquet`.
pub(crate) const OTHER: &str = "2222222222222222222222222222222222222222";

/// A request that arrived.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
    /// The `authorization` header.
    pub authorization: Option<String>,
    /// Bytes of content that went out.
    pub sent: usize,
}

/// What a server does instead of answering as the Hub does.
#[derive(Clone)]
pub(crate) enum Act {
    /// Sends these bytes, head and body, and closes the connection.
    Send(Vec<u8>),
    /// Sends these bytes one by one, with a pause before each.
    Drip(Vec<u8>, Duration),
    /// Sends the head of these bytes immediately and the body as [`Act::Drip`] does.
    SlowBody(Vec<u8>, Duration),
    /// Sends the first bytes, then the others again and again until the other side goes away.
    Endless(Vec<u8>, Vec<u8>),
    /// Sends nothing until the other side goes away.
    Silence,
}

impl Act {
    /// An answer with a status, headers and a body, whose length is added.
    pub(crate) fn answer(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Self {
        Self::Send(message(status, headers, body))
    }
}

/// The bytes of an answer.
pub(crate) fn message(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !headers.iter().any(|(name, _)| *name == "Content-Length") {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    [format!("{head}\r\n").as_bytes(), body].concat()
}

/// What goes wrong, and what there is.
#[derive(Default)]
pub(crate) struct State {
    /// Content by `org/name/file`, of data sets by `datasets/org/name/file`.
    files: BTreeMap<String, Vec<u8>>,
    pub log: Vec<Request>,
    /// Ends the next bodies of large files after so many bytes each.
    pub cuts: VecDeque<usize>,
    /// Leaves bodies of large files open after so many bytes, for ever.
    pub stall: Option<usize>,
    /// Sends the last byte of this many bodies changed.
    pub corrupt: usize,
    /// Ignores ranges.
    pub no_ranges: bool,
    /// Refuses everything without the token, or with it, by status and code.
    pub denied: Option<(u16, &'static str)>,
    /// The token that may see what is denied.
    pub token: Option<&'static str>,
    /// Says that files are this long.
    pub announced: Option<u64>,
    /// The new name of a repository that was renamed.
    pub renamed: Option<(&'static str, &'static str)>,
    /// Ends each body of a large file after so many bytes.
    pub cut_each: Option<usize>,
    /// Where the content of large files is, if not on `localhost`.
    pub elsewhere: Option<String>,
    /// Acts for requests whose `METHOD PATH` holds a text, so many times each; the first that fits is
    /// taken, and without an act the answer is the Hub's.
    acts: Vec<(String, usize, Option<Act>)>,
}

/// The running stand-in; it stops with the test.
pub(crate) struct StandIn {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl StandIn {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || serve(stream.unwrap(), port, &shared));
            }
        });
        Self { port, state }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn add(&self, path: &str, content: &[u8]) {
        self.state().files.insert(path.to_owned(), content.to_vec());
    }

    /// Adds every file of a directory.
    pub(crate) fn add_dir(&self, repo: &str, dir: &std::path::Path) {
        for (name, content) in super::contents(dir) {
            self.add(&format!("{repo}/{name}"), &content);
        }
    }

    /// Lets the next `times` requests whose `METHOD PATH` holds `text` meet with `act`.
    pub(crate) fn act(&self, text: &str, times: usize, act: Act) {
        self.state().acts.push((text.to_owned(), times, Some(act)));
    }

    /// Lets the next `times` of such requests have their answers before acts begin.
    pub(crate) fn skip(&self, text: &str, times: usize) {
        self.state().acts.push((text.to_owned(), times, None));
    }

    /// Forgets all acts.
    pub(crate) fn behave(&self) {
        self.state().acts.clear();
    }

    /// Waits until a request has come whose `METHOD PATH` holds `text`.
    pub(crate) fn wait_for(&self, text: &str) {
        let here =
            |request: &Request| format!("{} {}", request.method, request.path).contains(text);
        while !self.state().log.iter().any(here) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The requests since the last call.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().log)
    }

    /// The names of the files whose content was asked for since the last call, sorted.
    pub(crate) fn fetched(&self) -> Vec<String> {
        let gets = self.requests().into_iter().filter(|request| request.method == "GET");
        let resolved = gets.filter_map(|request| {
            request.path.split_once("/resolve/")?.1.split_once('/').map(|(_, file)| file.to_owned())
        });
        let mut files: Vec<String> = resolved.collect();
        files.sort();
        files
    }
}

/// The name of a content in the cache.
pub(crate) fn blob_name(file: &str, content: &[u8]) -> String {
    if is_large(file) {
        hex::encode(Sha256::digest(content))
    } else {
        let mut hash = Sha1::new();
        hash.update(format!("blob {}\0", content.len()));
        hash.update(content);
        hex::encode(hash.finalize())
    }
}

/// Whether the Hub stores such files elsewhere and redirects to them.
fn is_large(file: &str) -> bool {
    [".safetensors", ".parquet", ".gz"].iter().any(|end| file.ends_with(end))
}

/// Status, headers and body of an answer.
type Answer = (String, Vec<(&'static str, String)>, Vec<u8>);

/// An answer without a file, by the error code of the Hub if it has one.
fn missing(code: Option<&str>) -> Answer {
    let headers = code.map(|code| ("X-Error-Code", code.to_owned()));
    ("404 No".to_owned(), headers.into_iter().collect(), Vec::new())
}

/// Answers one request and closes the connection.
fn serve(mut stream: TcpStream, port: u16, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let Some(request) = read_request(&mut reader) else { return };
    let mut state = state.lock().unwrap();
    state.log.push(request.clone());
    let line = format!("{} {}", request.method, request.path);
    let found = state.acts.iter_mut().find(|(text, times, _)| *times > 0 && line.contains(text));
    if let Some((_, times, act)) = found {
        *times -= 1;
        if let Some(act) = act.clone() {
            drop(state);
            return play(stream, reader, act);
        }
    }
    let ((status, headers, body), stalls) = answer(&mut state, &request, port);
    let headers: Vec<(&str, &str)> =
        headers.iter().map(|(name, value)| (*name, &**value)).collect();
    let body = if request.method == "HEAD" { &[][..] } else { &body };
    let _ = stream.write_all(&message(&status, &headers, body));
    drop(state);
    if stalls {
        // Until the other side goes away.
        let _ = std::io::copy(&mut reader, &mut std::io::sink());
    }
}

/// The request line and headers; none if the connection was closed.
fn read_request(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return None;
    }
    let mut words = line.split_whitespace();
    let (method, path) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
    let (mut range, mut authorization) = (None, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        let Some((name, value)) = header.trim().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_owned()),
            "authorization" => authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let bearer = authorization.as_deref();
    let token = bearer.and_then(|value| value.strip_prefix("Bearer ")).map(str::to_owned);
    Some(Request { method, path, range, token, authorization, sent: 0 })
}

/// The Hub's answer, and whether the connection stays open without the rest of the body.
fn answer(state: &mut State, request: &Request, port: u16) -> (Answer, bool) {
    let path = request.path.replace("%2F", "/");
    let path = path.strip_prefix('/').unwrap();
    // Content of large files, on what counts as another host: `localhost`.
    let file = path.strip_prefix("cdn/");
    if file.is_none()
        && let Some(answer) = refused(state, request, path)
    {
        return (answer, false);
    }
    if let Some(rest) = path.strip_prefix("api/models/") {
        return (listing(state, rest), false);
    }
    let resolved = match file {
        Some(key) => Ok((key.to_owned(), COMMIT)),
        None => resolved(path),
    };
    let (key, commit) = match resolved {
        Ok(resolved) => resolved,
        Err(code) => return (missing(code), false),
    };
    let Some(content) = state.files.get(&key).cloned() else {
        return (missing(Some("EntryNotFound")), false);
    };
    let etag = format!("\"{}\"", blob_name(&key, &content));
    let length = state.announced.unwrap_or(content.len() as u64).to_string();
    let commit = commit.to_owned();
    if file.is_none() && is_large(&key) {
        let host = state.elsewhere.clone().unwrap_or(format!("http://localhost:{port}"));
        let headers = vec![
            ("Location", format!("{host}/cdn/{key}")),
            ("X-Repo-Commit", commit),
            ("X-Linked-Etag", etag),
            ("X-Linked-Size", length),
        ];
        return (("302 Found".to_owned(), headers, Vec::new()), false);
    }
    if request.method == "HEAD" {
        let headers = vec![("ETag", etag), ("X-Repo-Commit", commit), ("Content-Length", length)];
        return (("200 OK".to_owned(), headers, Vec::new()), false);
    }
    body(state, request, &content, file.is_some())
}

/// The answer to everything that is denied or renamed.
fn refused(state: &State, request: &Request, path: &str) -> Option<Answer> {
    let permitted = state.token.is_some() && state.token == request.token.as_deref();
    if let Some((status, code)) = state.denied.filter(|_| !permitted) {
        let headers = vec![("X-Error-Code", code.to_owned())];
        return Some((format!("{status} No"), headers, b"denied".to_vec()));
    }
    let (old, new) = state.renamed.filter(|(old, _)| path.contains(old))?;
    let to = format!("/{}", path.replace(old, new));
    Some(("307 Moved".to_owned(), vec![("Location", to)], Vec::new()))
}

/// The files of a repository at a revision, by what follows `api/models/`: their names, or as a tree their hashes too.
fn listing(state: &State, rest: &str) -> Answer {
    let rest = rest.split_once('?').map_or(rest, |(path, _)| path);
    let (found, is_tree) = match rest.split_once("/revision/") {
        Some(found) => (found, false),
        None => (rest.split_once("/tree/").unwrap(), true),
    };
    let (repo, revision) = found;
    let prefix = format!("{repo}/");
    let files = state
        .files
        .iter()
        .filter_map(|(file, content)| Some((file.strip_prefix(&prefix)?, content)));
    let files: Vec<_> = files.collect();
    let answer = match (files.is_empty(), commit(revision)) {
        (true, _) => return missing(Some("RepoNotFound")),
        (_, None) => return missing(Some("RevisionNotFound")),
        (_, Some(_)) if is_tree => files.into_iter().map(tree_entry).collect(),
        (_, Some(commit)) => {
            let names = files.iter().map(|(name, _)| json!({ "rfilename": name }));
            json!({ "id": repo, "sha": commit, "siblings": names.collect::<Vec<_>>() })
        }
    };
    let headers = vec![("Content-Type", "application/json".to_owned())];
    ("200 OK".to_owned(), headers, answer.to_string().into_bytes())
}

/// A file in a listing with hashes. Of large files git's hash is that of the pointer to them, which only names it.
fn tree_entry((name, content): (&str, &Vec<u8>)) -> serde_json::Value {
    let (hash, size) = (blob_name(name, content), content.len());
    match is_large(name) {
        true => json!({
            "type": "file", "path": name, "size": size, "oid": COMMIT,
            "lfs": { "oid": hash, "size": size, "pointerSize": 130 },
        }),
        false => json!({ "type": "file", "path": name, "size": size, "oid": hash }),
    }
}

/// The key of a file and the commit of its revision, by `REPO/resolve/REVISION/FILE`; or the Hub's error code.
fn resolved(path: &str) -> Result<(String, &'static str), Option<&'static str>> {
    let (repo, rest) = path.split_once("/resolve/").ok_or(None)?;
    let revisions = ["refs/convert/parquet", "main", "v1", COMMIT, OTHER];
    let found = revisions
        .iter()
        .find_map(|revision| Some((revision, rest.strip_prefix(revision)?.strip_prefix('/')?)));
    let (revision, file) = found.ok_or(Some("RevisionNotFound"))?;
    Ok((format!("{repo}/{file}"), commit(revision).unwrap()))
}

/// The content from the requested byte on, with the failures of the state.
fn body(state: &mut State, request: &Request, content: &[u8], large: bool) -> (Answer, bool) {
    let range = request.range.as_ref().filter(|_| !state.no_ranges);
    let from = range.map_or(0, |range| {
        range.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().unwrap()
    });
    let mut body = content[from..].to_vec();
    if state.corrupt > 0 {
        state.corrupt -= 1;
        *body.last_mut().unwrap() ^= 1;
    }
    let mut headers = vec![("Content-Length", body.len().to_string())];
    if large && let Some(after) = state.cuts.pop_front().or(state.cut_each) {
        body.truncate(after);
    }
    let stall = state.stall.filter(|after| large && body.len() > *after);
    body.truncate(stall.unwrap_or(body.len()));
    state.log.last_mut().unwrap().sent = body.len();
    let status = if from > 0 {
        let part = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
        headers.push(("Content-Range", part));
        "206 Partial"
    } else {
        "200 OK"
    };
    ((status.to_owned(), headers, body), stall.is_some())
}

/// Does what an act says.
fn play(mut stream: TcpStream, mut reader: BufReader<TcpStream>, act: Act) {
    match act {
        Act::Send(bytes) => drop(stream.write_all(&bytes)),
        Act::Drip(bytes, pause) => drip(&mut stream, &bytes, pause),
        Act::SlowBody(bytes, pause) => {
            let head = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
            let _ = stream.write_all(&bytes[..head]);
            drip(&mut stream, &bytes[head..], pause);
        }
        Act::Endless(start, again) => {
            let mut sent = stream.write_all(&start);
            while sent.is_ok() {
                sent = stream.write_all(&again);
            }
        }
        Act::Silence => drop(std::io::copy(&mut reader, &mut std::io::sink())),
    }
}

fn drip(stream: &mut TcpStream, bytes: &[u8], pause: Duration) {
    for byte in bytes {
        std::thread::sleep(pause);
        if stream.write_all(&[*byte]).is_err() {
            return;
        }
    }
}

fn commit(revision: &str) -> Option<&'static str> {
    match revision {
        "main" | COMMIT => Some(COMMIT),
        "v1" | "refs/convert/parquet" | OTHER => Some(OTHER),
        _ => None,
    }
}
