/*! Requests to the Hub.

Redirects are followed here and not by the HTTP client: the token, or the user and password that
`HF_ENDPOINT` names, go to the scheme, host and port of the Hub and to no others. */

use std::time::{Duration, SystemTime};

use serde::Deserialize;
use ureq::Agent;
use ureq::http::HeaderMap;
use ureq::http::request::Request;
use ureq::http::response::Parts;
use ureq::tls::{RootCerts, TlsConfig};

use super::address::Address;
use super::attempts::{Attempts, Waits, rate_limit_reset, retry_after};
use super::content::{is_hash, is_hexadecimal};
use super::exchange::{self, Answer, Incoming};
use super::failure::{Failure, Nature};
use super::refusal::refused;
use super::settings::{Endpoint, Patience, Settings};
use crate::progress::Progress;
use crate::{Error, Result};

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(15);
/// Redirects that are followed one after another.
const REDIRECTS: usize = 10;
/// Bytes of a listing that are read: a hundred thousand files take about ten million.
const LISTING_BYTES: usize = 64 << 20;
/// A listing may take so many times as long as the head of an answer.
const LISTING_PATIENCE: u32 = 10;

/// What a repository holds; the two live at different addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RepoKind {
    Model,
    Dataset,
}

/// A repository at a revision.
#[derive(Clone, Copy, Debug)]
pub(super) struct At<'a> {
    pub(super) kind: RepoKind,
    pub(super) repo: &'a str,
    pub(super) revision: &'a str,
}

/// What a repository holds at a revision.
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// What the Hub says of a file before it sends it.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    pub(super) commit: String,
    /// The content's hash: SHA-256 of a large file, git's SHA-1 of a small one.
    pub(super) etag: String,
    pub(super) bytes: u64,
}

/// A file's bytes in flight.
pub(super) struct Opened<'a> {
    /// The byte of the file that the body begins at.
    pub(super) from: u64,
    pub(super) body: Incoming<'a>,
}

/// Asks the Hub.
pub(super) struct Client {
    pub(super) endpoint: Endpoint,
    pub(super) waits: Waits,
    patience: Patience,
    /// The `authorization` header for the Hub's origin.
    authorization: Option<String>,
    /// Whether that header holds a token, or a user and password.
    pub(super) has_token: bool,
    pub(super) has_password: bool,
    wrong_proxy: Option<&'static str>,
    /// Follows no redirect.
    agent: Agent,
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// A question: the method, and the first byte of a file that is requested.
#[derive(Clone, Copy)]
struct Question {
    method: &'static str,
    from: u64,
    patience: Duration,
    /// Whether redirects are followed away from the Hub, to where the bytes of a file are.
    away: bool,
}

impl Client {
    pub(super) fn new(settings: &Settings) -> Self {
        let patience = settings.patience;
        // The exchange has deadlines of its own; these end a thread that is not waited for.
        let longest = patience.answer.max(patience.download) + Duration::from_secs(1);
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("atom/", env!("CARGO_PKG_VERSION")))
            // The system's certificates: those of a company's proxy are there and nowhere else.
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(longest))
            .timeout_per_read(Some(longest))
            .build()
            .new_agent();
        let basic = settings.endpoint.address().basic_authorization();
        let token = settings.token.as_ref().filter(|_| basic.is_none());
        Self {
            endpoint: settings.endpoint.clone(),
            waits: Waits::new(),
            patience,
            has_token: token.is_some(),
            has_password: basic.is_some(),
            authorization: token.map(|token| format!("Bearer {token}")).or(basic),
            wrong_proxy: settings.wrong_proxy,
            agent,
        }
    }

    /// The commit and the files of a repository's revision.
    pub(super) fn list(&self, at: At<'_>, progress: &dyn Progress) -> Result<Listing, Failure> {
        self.patiently(progress, || self.list_once(at, progress))
    }

    fn list_once(&self, at: At<'_>, progress: &dyn Progress) -> Result<Listing, Failure> {
        let kind = match at.kind {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        };
        let revision = encoded(at.revision, false);
        let address = self.address(&format!("/api/{kind}/{}/revision/{revision}", at.repo))?;
        let question =
            Question { method: "GET", from: 0, patience: self.patience.answer, away: false };
        let (address, answer) = self.ask(address, question, progress)?;
        if answer.head.status.as_u16() != 200 {
            return Err(self.refused(&answer.head, &address, at, None));
        }
        let deadline = self.patience.answer * LISTING_PATIENCE;
        let Some(text) = answer.body.all(LISTING_BYTES, deadline)? else {
            let what = format!(
                "its list of files is longer than {LISTING_BYTES} bytes or takes longer than {} seconds",
                deadline.as_secs()
            );
            return Err(Failure::odd_answer(&address, &what));
        };
        let listed: Revision = serde_json::from_slice(&text).map_err(|error| {
            let what = format!("line {}, column {} of its JSON", error.line(), error.column());
            Failure::odd_answer(&address, &what)
        })?;
        if !is_commit(&listed.sha) {
            return Err(Failure::odd_answer(&address, "its commit is no hash"));
        }
        let files = listed.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok(Listing { commit: listed.sha, files })
    }

    /// What the Hub says of `file`.
    pub(super) fn metadata(
        &self,
        at: At<'_>,
        file: &str,
        progress: &dyn Progress,
    ) -> Result<Metadata, Failure> {
        self.patiently(progress, || self.metadata_once(at, file, progress))
    }

    fn metadata_once(
        &self,
        at: At<'_>,
        file: &str,
        progress: &dyn Progress,
    ) -> Result<Metadata, Failure> {
        let question =
            Question { method: "HEAD", from: 0, patience: self.patience.answer, away: false };
        let address = self.address(&file_path(at, file))?;
        let (address, answer) = self.ask(address, question, progress)?;
        let head = &answer.head;
        if !(head.status.is_success() || is_redirect(head)) {
            return Err(self.refused(head, &address, at, Some(file)));
        }
        let header = |name: &str| header(&head.headers, name);
        let etag = header("x-linked-etag").or_else(|| header("etag"));
        let etag = etag.map(|tag| tag.trim_start_matches("W/").trim_matches('"').to_owned());
        let bytes = header("x-linked-size").or_else(|| header("content-length"));
        let commit = header("x-repo-commit").filter(|commit| is_commit(commit));
        match (commit, etag, bytes.and_then(|bytes| bytes.parse().ok())) {
            (Some(commit), Some(etag), Some(bytes)) if is_hash(&etag) => {
                Ok(Metadata { commit: commit.to_owned(), etag, bytes })
            }
            _ if is_redirect(head) => Err(self.refused(head, &address, at, Some(file))),
            _ => Err(Failure::odd_answer(&address, "it names no commit, content hash or length")),
        }
    }

    /// Begins to fetch `file` from byte `from` on. `Ok(None)` if the Hub has nothing from there on.
    /// One attempt: the caller knows what it has and when to try again.
    pub(super) fn open<'a>(
        &'a self,
        at: At<'_>,
        file: &str,
        from: u64,
        progress: &'a dyn Progress,
    ) -> Result<Option<Opened<'a>>, Failure> {
        let question =
            Question { method: "GET", from, patience: self.patience.download, away: true };
        let address = self.address(&file_path(at, file))?;
        let (address, answer) = self.ask(address, question, progress)?;
        let Answer { head, body } = answer;
        match head.status.as_u16() {
            200 => Ok(Some(Opened { from: 0, body })),
            206 if header(&head.headers, "content-range").and_then(range_start) != Some(from) => {
                Err(Failure::odd_answer(&address, "it sent another part of the file"))
            }
            206 => Ok(Some(Opened { from, body })),
            416 => Ok(None),
            _ => Err(self.refused(&head, &address, at, Some(file))),
        }
    }

    /// Asks until there is an answer, or asking again is no use.
    fn patiently<T>(
        &self,
        progress: &dyn Progress,
        ask: impl Fn() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut attempts = Attempts::at_question(self.patience.answer * 2);
        loop {
            match ask() {
                Ok(found) => return Ok(found),
                Err(failure) => attempts.pause(failure, &self.waits, progress)?,
            }
        }
    }

    /// The address of a path on the Hub.
    fn address(&self, path: &str) -> Result<Address, Failure> {
        self.endpoint.at(path).map(|address| address.without_userinfo()).ok_or_else(|| {
            Failure::odd_answer(&self.endpoint, "HF_ENDPOINT and the name make no address")
        })
    }

    /// Asks one address, and those that it redirects to. Returns the last one and its answer, which may
    /// be a redirect that is not followed: one away from the Hub, or one that describes a file.
    fn ask<'a>(
        &'a self,
        mut address: Address,
        question: Question,
        progress: &'a dyn Progress,
    ) -> Result<(Address, Answer<'a>), Failure> {
        if let Some(variable) = self.wrong_proxy {
            return Err(Error::usage(format!("{variable} is no address of a proxy"))
                .hint("set it to an address such as http://proxy.example:3128, or unset it")
                .into());
        }
        for _ in 0..=REDIRECTS {
            let request = self.request(&address, question)?;
            let patience = question.patience;
            let answer = exchange::send(&self.agent, request, &self.endpoint, patience, progress)?;
            if !is_redirect(&answer.head) {
                return Ok((address, answer));
            }
            let location = header(&answer.head.headers, "location");
            let Some(to) = location.and_then(|location| address.join(location)) else {
                return Err(Failure::odd_answer(&address, "it redirects to no address of HTTP"));
            };
            let stays = self.is_own(&to) && !answer.head.headers.contains_key("x-linked-etag");
            if !(question.away || stays) {
                return Ok((address, answer));
            }
            address = to;
        }
        Err(Failure::odd_answer(&address, "it redirects in a circle"))
    }

    fn request(&self, address: &Address, question: Question) -> Result<Request<()>, Failure> {
        let mut request = Request::builder()
            .method(question.method)
            .uri(address.uri().clone())
            .header("accept-encoding", "identity");
        if let Some(authorization) = self.authorization.as_ref().filter(|_| self.is_own(address)) {
            request = request.header("authorization", authorization);
        }
        if question.from > 0 {
            request = request.header("range", format!("bytes={}-", question.from));
        }
        let error = |error| Failure::of_request(&ureq::Error::Http(error), &self.endpoint);
        request.body(()).map_err(error)
    }

    /// Whether an address is of the Hub's own origin.
    fn is_own(&self, address: &Address) -> bool {
        address.origin() == self.endpoint.address().origin()
    }

    /// What an answer other than success means.
    fn refused(&self, head: &Parts, address: &Address, at: At<'_>, file: Option<&str>) -> Failure {
        let status = head.status.as_u16();
        if is_redirect(head) {
            let to = header(&head.headers, "location").and_then(|to| address.join(to));
            let to = to.map_or_else(String::new, |to| format!(" to {to}"));
            return Failure::odd_answer(address, &format!("it redirects{to} ({status})"));
        }
        let nature = match status {
            408 | 425 | 429 | 500..=599 => {
                let asked = header(&head.headers, "retry-after")
                    .and_then(|value| retry_after(value, SystemTime::now()));
                let window = header(&head.headers, "ratelimit").and_then(rate_limit_reset);
                Nature::Passing { wait: asked.or(window.filter(|_| status == 429)) }
            }
            _ => Nature::Final,
        };
        let code = header(&head.headers, "x-error-code").unwrap_or_default();
        Failure { error: refused(self, status, code, at, file), nature }
    }
}

/// The path of a file on the Hub.
fn file_path(At { kind, repo, revision }: At<'_>, file: &str) -> String {
    let prefix = match kind {
        RepoKind::Model => "",
        RepoKind::Dataset => "datasets/",
    };
    format!("/{prefix}{repo}/resolve/{}/{}", encoded(revision, false), encoded(file, true))
}

fn is_redirect(head: &Parts) -> bool {
    matches!(head.status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// The first byte of `bytes 5-9/10`.
fn range_start(range: &str) -> Option<u64> {
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Whether a name is a full commit and so never means anything else.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && is_hexadecimal(revision)
}

/// `text` as part of an address; a path keeps its slashes.
fn encoded(text: &str, path: bool) -> String {
    let mut address = String::with_capacity(text.len());
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
        if plain || (path && byte == b'/') {
            address.push(char::from(byte));
        } else {
            address.push_str(&format!("%{byte:02X}"));
        }
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_hold_no_bare_slash_of_a_revision() {
        assert_eq!(encoded("refs/convert/parquet", false), "refs%2Fconvert%2Fparquet");
        assert_eq!(encoded("en/c4 train.json", true), "en/c4%20train.json");
        assert_eq!(range_start("bytes 5-9/10"), Some(5));
        assert_eq!(range_start("bytes */10"), None);
    }

    #[test]
    fn a_commit_is_told_from_other_revisions() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        assert!(is_commit(commit));
        assert!(!is_commit("main") && !is_commit(&commit.to_uppercase()));
    }
}
