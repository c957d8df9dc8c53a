/*! A stand-in for the Hub on this machine: the few addresses that the Hub's tools ask, and its misfortunes. */

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit of every repository's `main`.
pub const COMMIT: &str = "1111111111111111111111111111111111111111";
/// The commit of every other revision that is known: `v1` and `refs/convert/parquet`.
pub const OTHER: &str = "2222222222222222222222222222222222222222";

/// A request that arrived.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
    /// Bytes of content that went out.
    pub sent: usize,
}

/// What goes wrong, and what there is.
#[derive(Default)]
pub struct State {
    /// Content by `org/name/file`, of data sets by `datasets/org/name/file`.
    files: BTreeMap<String, Vec<u8>>,
    pub log: Vec<Request>,
    /// Ends the next bodies of large files after so many bytes each.
    pub cuts: VecDeque<usize>,
    /// Leaves bodies of large files open after so many bytes, for ever.
    pub stall: Option<usize>,
    /// Sends the last byte of this many bodies changed.
    pub corrupt: usize,
    /// Knows no ranges.
    pub no_ranges: bool,
    /// Refuses everything without the token, or with it, by status and code.
    pub denied: Option<(u16, &'static str)>,
    /// The token that may see what is denied.
    pub token: Option<&'static str>,
    /// Says that files are this long.
    pub announced: Option<u64>,
    /// The new name of a repository that was renamed.
    pub renamed: Option<(&'static str, &'static str)>,
}

/// The running stand-in; it stops with the test.
pub struct StandIn {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl StandIn {
    pub fn start() -> Self {
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

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn add(&self, path: &str, content: &[u8]) {
        self.state().files.insert(path.to_owned(), content.to_vec());
    }

    /// Adds every file of a directory.
    pub fn add_dir(&self, repo: &str, dir: &std::path::Path) {
        for (name, content) in super::contents(dir) {
            self.add(&format!("{repo}/{name}"), &content);
        }
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().log)
    }

    /// The names of the files whose content was asked for since the last call, sorted.
    pub fn fetched(&self) -> Vec<String> {
        let gets = self.requests().into_iter().filter(|request| request.method == "GET");
        let resolved = gets.filter_map(|request| {
            request.path.split_once("/resolve/")?.1.split_once('/').map(|(_, file)| file.to_owned())
        });
        let mut files: Vec<String> = resolved.collect();
        files.sort();
        files
    }
}

/// The name by which the cache keeps a content.
pub fn blob_name(file: &str, content: &[u8]) -> String {
    let hexadecimal = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    if is_large(file) {
        hexadecimal(&Sha256::digest(content))
    } else {
        let mut hash = Sha1::new();
        hash.update(format!("blob {}\0", content.len()));
        hash.update(content);
        hexadecimal(&hash.finalize())
    }
}

/// Whether the Hub keeps such files elsewhere and redirects to them.
fn is_large(file: &str) -> bool {
    [".safetensors", ".parquet", ".gz"].iter().any(|end| file.ends_with(end))
}

/// Answers one request and closes the connection.
fn serve(mut stream: TcpStream, port: u16, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let mut words = line.split_whitespace();
    let (method, path) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
    let (mut range, mut token) = (None, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        let Some((name, value)) = header.trim().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_owned()),
            "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    let mut state = state.lock().unwrap();
    let request = Request {
        method: method.clone(),
        path: path.clone(),
        range: range.clone(),
        token,
        sent: 0,
    };
    let permitted = state.token.is_some() && state.token == request.token.as_deref();
    state.log.push(request);
    let index = state.log.len() - 1;
    let mut reply = |status: &str, headers: &[(&str, &str)], body: &[u8]| {
        let mut head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !headers.iter().any(|(name, _)| *name == "Content-Length") {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        let body = if method == "HEAD" { b"" } else { body };
        let _ = stream.write_all(format!("{head}\r\n").as_bytes());
        let _ = stream.write_all(body);
    };
    let path = path.replace("%2F", "/");
    let path = path.strip_prefix('/').unwrap();

    // Content of large files, on what counts as another host: `localhost`.
    let file = path.strip_prefix("cdn/");
    if file.is_none() {
        if let Some((status, code)) = state.denied.filter(|_| !permitted) {
            return reply(&format!("{status} No"), &[("X-Error-Code", code)], b"denied");
        }
        if let Some((old, new)) = state.renamed
            && path.contains(old)
        {
            let to = format!("/{}", path.replace(old, new));
            return reply("307 Moved", &[("Location", &to)], b"");
        }
    }
    if let Some(rest) = path.strip_prefix("api/models/") {
        let (repo, revision) = rest.split_once("/revision/").unwrap();
        let prefix = format!("{repo}/");
        let names = state.files.keys().filter_map(|file| file.strip_prefix(&prefix));
        let siblings: Vec<_> = names.map(|name| json!({ "rfilename": name })).collect();
        return match (siblings.is_empty(), commit(revision)) {
            (true, _) => reply("404 No", &[("X-Error-Code", "RepoNotFound")], b""),
            (_, None) => reply("404 No", &[("X-Error-Code", "RevisionNotFound")], b""),
            (_, Some(commit)) => {
                let answer = json!({ "sha": commit, "siblings": siblings }).to_string();
                reply("200 OK", &[("Content-Type", "application/json")], answer.as_bytes())
            }
        };
    }
    let (key, commit) = match file {
        Some(key) => (key.to_owned(), COMMIT),
        None => {
            let Some((repo, rest)) = path.split_once("/resolve/") else {
                return reply("404 No", &[], b"");
            };
            let revisions = ["refs/convert/parquet", "main", "v1", COMMIT, OTHER];
            let found = revisions.iter().find_map(|revision| {
                Some((revision, rest.strip_prefix(revision)?.strip_prefix('/')?))
            });
            let Some((revision, file)) = found else {
                return reply("404 No", &[("X-Error-Code", "RevisionNotFound")], b"");
            };
            (format!("{repo}/{file}"), commit(revision).unwrap())
        }
    };
    let Some(content) = state.files.get(&key).cloned() else {
        return reply("404 No", &[("X-Error-Code", "EntryNotFound")], b"");
    };
    let etag = format!("\"{}\"", blob_name(&key, &content));
    let length = state.announced.unwrap_or(content.len() as u64).to_string();
    if file.is_none() && is_large(&key) {
        let to = format!("http://localhost:{port}/cdn/{key}");
        let headers = [
            ("Location", &*to),
            ("X-Repo-Commit", commit),
            ("X-Linked-Etag", &etag),
            ("X-Linked-Size", &length),
        ];
        return reply("302 Found", &headers, b"");
    }
    if method == "HEAD" {
        let headers = [("ETag", &*etag), ("X-Repo-Commit", commit), ("Content-Length", &length)];
        return reply("200 OK", &headers, b"");
    }

    let from = range.filter(|_| !state.no_ranges).map_or(0, |range| {
        range.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().unwrap()
    });
    let mut body = content[from..].to_vec();
    if state.corrupt > 0 {
        state.corrupt -= 1;
        *body.last_mut().unwrap() ^= 1;
    }
    let whole = body.len().to_string();
    let large = file.is_some();
    if large && let Some(after) = state.cuts.pop_front() {
        body.truncate(after);
    }
    let stall = state.stall.filter(|after| large && body.len() > *after);
    body.truncate(stall.unwrap_or(body.len()));
    state.log[index].sent = body.len();
    let part = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
    if from > 0 {
        let headers = [("Content-Length", &*whole), ("Content-Range", &part)];
        reply("206 Partial", &headers, &body);
    } else {
        reply("200 OK", &[("Content-Length", &whole)], &body);
    }
    drop(state);
    if stall.is_some() {
        // Until the other side goes away.
        let _ = std::io::copy(&mut reader, &mut std::io::sink());
    }
}

fn commit(revision: &str) -> Option<&'static str> {
    match revision {
        "main" | COMMIT => Some(COMMIT),
        "v1" | "refs/convert/parquet" | OTHER => Some(OTHER),
        _ => None,
    }
}
