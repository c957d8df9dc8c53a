/*! Requests to the Hub, and what its refusals mean.

The token goes to the Hub alone: redirects to the hosts that hold the bytes are followed without it. */

use std::time::Duration;

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::settings::Settings;
use crate::{Error, Kind, Result};

/// How long the Hub may take to answer, and a started body to go on.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(15);

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

/// Asks the Hub.
pub(super) struct Client {
    endpoint: String,
    token: Option<String>,
    /// Follows redirects.
    agent: Agent,
    /// Returns redirects, whose headers describe the file.
    asking: Agent,
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

impl Client {
    pub(super) fn new(settings: &Settings) -> Self {
        let config = || {
            Agent::config_builder()
                .http_status_as_error(false)
                .user_agent(concat!("atom/", env!("CARGO_PKG_VERSION")))
                // The system's certificates: those of a company's proxy are there and nowhere else.
                .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .timeout_connect(Some(CONNECT))
                .timeout_recv_response(Some(PATIENCE))
                .timeout_per_read(Some(PATIENCE))
        };
        Self {
            endpoint: settings.endpoint.clone(),
            token: settings.token.clone(),
            agent: config().build().new_agent(),
            asking: config().max_redirects(0).max_redirects_will_error(false).build().new_agent(),
        }
    }

    /// The commit and the files of a model's revision.
    pub(super) fn list(&self, at: At<'_>) -> Result<Listing> {
        let kind = match at.kind {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        };
        let url = format!(
            "{}/api/{kind}/{}/revision/{}",
            self.endpoint,
            at.repo,
            encoded(at.revision, false)
        );
        let mut response = self.follow(&url, |url| self.request(&self.asking, "GET", url))?;
        if response.status().as_u16() != 200 {
            return Err(self.refused(&response, at, None));
        }
        let text = response.body_mut().with_config().limit(64 << 20).read_to_string();
        let text = text.map_err(|error| self.unreachable(&error))?;
        let listed: Revision = serde_json::from_str(&text).map_err(|error| {
            Error::machine(format!("{url} did not answer as the Hub does: {error}"))
                .hint("look at HF_ENDPOINT and at the proxy, if there is one")
        })?;
        if !is_commit(&listed.sha) {
            return Err(odd_answer(&url, "its commit is no hash"));
        }
        let files = listed.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok(Listing { commit: listed.sha, files })
    }

    /// What the Hub says of `file`.
    pub(super) fn metadata(&self, at: At<'_>, file: &str) -> Result<Metadata> {
        let url = self.file_url(at, file);
        let response = self.follow(&url, |url| self.request(&self.asking, "HEAD", url))?;
        let status = response.status();
        if !(status.is_success() || status.is_redirection()) {
            return Err(self.refused(&response, at, Some(file)));
        }
        let header = |name: &str| header(response.headers(), name);
        let etag = header("x-linked-etag").or_else(|| header("etag"));
        let etag = etag.map(|tag| tag.trim_start_matches("W/").trim_matches('"').to_owned());
        let bytes = header("x-linked-size").or_else(|| header("content-length"));
        let commit = header("x-repo-commit").filter(|commit| is_commit(commit));
        match (commit, etag, bytes.and_then(|bytes| bytes.parse().ok())) {
            (Some(commit), Some(etag), Some(bytes)) if is_hash(&etag) => {
                Ok(Metadata { commit: commit.to_owned(), etag, bytes })
            }
            _ => Err(odd_answer(&url, "it names no commit, content hash or length")),
        }
    }

    /// Begins to fetch `file` from byte `from` on. `Ok(None)` if there is nothing from there on.
    pub(super) fn open(&self, at: At<'_>, file: &str, from: u64) -> Result<Option<Opened>> {
        let url = self.file_url(at, file);
        let request = |url: &str| {
            let mut request = ureq::http::Request::builder().method("GET").uri(url);
            request = self.authorized(request).header("accept-encoding", "identity");
            if from > 0 {
                request = request.header("range", format!("bytes={from}-"));
            }
            let request = request.body(()).map_err(ureq::Error::Http)?;
            self.agent.run(request)
        };
        let response = request(&url).map_err(|error| self.unreachable(&error))?;
        match response.status().as_u16() {
            200 => Ok(Some(Opened { from: 0, body: response.into_body() })),
            206 => {
                let start = header(response.headers(), "content-range").and_then(range_start);
                if start != Some(from) {
                    return Err(odd_answer(&url, "it sent another part of the file"));
                }
                Ok(Some(Opened { from, body: response.into_body() }))
            }
            416 => Ok(None),
            _ => Err(self.refused(&response, at, Some(file))),
        }
    }

    fn file_url(&self, At { kind, repo, revision }: At<'_>, file: &str) -> String {
        let prefix = match kind {
            RepoKind::Model => "",
            RepoKind::Dataset => "datasets/",
        };
        let (revision, file) = (encoded(revision, false), encoded(file, true));
        format!("{}/{prefix}{repo}/resolve/{revision}/{file}", self.endpoint)
    }

    fn request(
        &self,
        agent: &Agent,
        method: &str,
        url: &str,
    ) -> Result<Response<Body>, ureq::Error> {
        let request = ureq::http::Request::builder().method(method).uri(url);
        let request = self.authorized(request).header("accept-encoding", "identity");
        agent.run(request.body(()).map_err(ureq::Error::Http)?)
    }

    fn authorized(&self, request: ureq::http::request::Builder) -> ureq::http::request::Builder {
        match &self.token {
            Some(token) => request.header("authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    /// Follows redirects within the Hub, which a renamed repository answers with, and no others:
    /// the one to a file's bytes describes the file.
    fn follow(
        &self,
        url: &str,
        send: impl Fn(&str) -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>> {
        let mut url = url.to_owned();
        for _ in 0..5 {
            let response = send(&url).map_err(|error| self.unreachable(&error))?;
            let within = header(response.headers(), "location")
                .filter(|_| response.status().is_redirection())
                .and_then(|to| match to.strip_prefix(&self.endpoint) {
                    Some(path) if path.starts_with('/') => Some(path),
                    _ => Some(to).filter(|to| to.starts_with('/') && !to.starts_with("//")),
                });
            match within {
                Some(path) if header(response.headers(), "x-linked-etag").is_none() => {
                    url = format!("{}{path}", self.endpoint);
                }
                _ => return Ok(response),
            }
        }
        Err(odd_answer(&url, "it redirects in a circle"))
    }

    fn unreachable(&self, error: &ureq::Error) -> Error {
        let cause = error.to_string();
        let hint = if cause.contains("certificate") {
            "install the system's certificates (`ca-certificates` on Debian), or set SSL_CERT_FILE"
        } else {
            "look at the network, the proxy and HF_ENDPOINT; what the Hub's cache holds works with --offline"
        };
        Error::machine(cause).context(format!("cannot reach {}", self.endpoint)).hint(hint)
    }

    /// What a status other than success means.
    fn refused(&self, response: &Response<Body>, at: At<'_>, file: Option<&str>) -> Error {
        let (repo, revision) = (at.repo, at.revision);
        let status = response.status().as_u16();
        let code = header(response.headers(), "x-error-code").unwrap_or_default();
        let page = match at.kind {
            RepoKind::Model => format!("{}/{repo}", self.endpoint),
            RepoKind::Dataset => format!("{}/datasets/{repo}", self.endpoint),
        };
        let tokens = format!("{}/settings/tokens", self.endpoint);
        match (status, code, file) {
            (_, "RevisionNotFound", _) => {
                Error::input(format!("{repo} has no revision `{revision}` on the Hub"))
                    .hint(format!("{page} lists its branches, tags and commits"))
            }
            (_, "EntryNotFound", Some(file)) | (404, "", Some(file)) => {
                Error::input(format!("{repo} has no file {file} at revision `{revision}`"))
                    .hint(format!("{page} lists its files"))
            }
            (401, "GatedRepo" | "", _) if self.token.is_some() => {
                Error::machine(format!("the Hub refuses the token for {repo} (401)")).hint(format!(
                    "make a new token at {tokens} and set HF_TOKEN to it, or run `hf auth login`"
                ))
            }
            (401, "GatedRepo", _) => {
                Error::machine(format!("{repo} is open only to those who accepted its licence"))
                    .hint(format!(
                        "accept it at {page}, make a token at {tokens}, and set HF_TOKEN to it"
                    ))
            }
            // Who may not see a repository is told that there is none.
            (401, _, _) if self.token.is_none() => {
                Error::input(format!("there is no {repo} on the Hub, or it is not public (401)"))
                    .hint(format!(
                        "look at the name; for a private repository set HF_TOKEN to a token of {tokens}"
                    ))
            }
            (401 | 404, _, _) if self.token.is_some() => {
                Error::input(format!("there is no {repo} on the Hub that this token may see"))
                    .hint(format!("look at the name and at whose token it is: {tokens}"))
            }
            (404, _, _) => Error::input(format!("there is no {repo} on the Hub"))
                .hint("look at the name; for a private repository set HF_TOKEN"),
            (403, _, _) => Error::machine(format!("the Hub denies access to {repo} (403)")).hint(
                format!("accept the licence at {page} as the token's owner; a fine-grained token must allow gated repositories"),
            ),
            (429, _, _) => Error::machine("the Hub asks for fewer requests (429)")
                .hint("wait a few minutes; a token in HF_TOKEN raises the limit"),
            _ => Error::machine(format!("the Hub answered {status} for {repo}"))
                .hint("try again later; what the Hub's cache holds works with --offline"),
        }
    }
}

/// A file's bytes on their way.
pub(super) struct Opened {
    /// The byte of the file that the body begins at.
    pub(super) from: u64,
    pub(super) body: Body,
}

/// Whether an error is the network's or the Hub's, so that trying again may help.
pub(super) fn may_pass(error: &Error) -> bool {
    let answered = error.message().starts_with("the Hub answered 5");
    error.kind() == Kind::Machine && (answered || error.message().starts_with("cannot reach "))
}

fn odd_answer(url: &str, what: &str) -> Error {
    Error::machine(format!("{url} did not answer as the Hub does: {what}"))
        .hint("look at HF_ENDPOINT and at the proxy, if there is one")
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// The first byte of `bytes 5-9/10`.
fn range_start(range: &str) -> Option<u64> {
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Whether a name is a whole commit and so never means anything else.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && is_hexadecimal(revision)
}

/// Whether an etag is a content's hash, as the Hub's are.
fn is_hash(etag: &str) -> bool {
    matches!(etag.len(), 40 | 64) && is_hexadecimal(etag)
}

fn is_hexadecimal(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
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
    fn hashes_are_told_from_other_etags() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        assert!(is_commit(commit) && is_hash(commit) && is_hash(&commit.repeat(2)[..64]));
        assert!(!is_commit("main") && !is_commit(&commit.to_uppercase()));
        assert!(!is_hash(&format!("{commit}-2")));
    }
}
