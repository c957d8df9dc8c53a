/*! What a refusal of the Hub means, and what to do about it. */

use super::client::{At, Client, RepoKind};
use crate::Error;

/// The error for a status other than success; `code` is the Hub's own name for it.
pub(super) fn refused(
    client: &Client,
    status: u16,
    code: &str,
    at: At<'_>,
    file: Option<&str>,
) -> Error {
    let At { kind, repo, revision } = at;
    let page = match kind {
        RepoKind::Model => format!("{}/{repo}", client.endpoint),
        RepoKind::Dataset => format!("{}/datasets/{repo}", client.endpoint),
    };
    let tokens = format!("{}/settings/tokens", client.endpoint);
    match (status, code, file) {
        (_, "RevisionNotFound", _) => {
            Error::input(format!("{repo} has no revision `{revision}` on the Hub"))
                .hint(format!("{page} lists its branches, tags and commits"))
        }
        (_, "EntryNotFound", Some(file)) | (404, "", Some(file)) => {
            Error::input(format!("{repo} has no file {file} at revision `{revision}`"))
                .hint(format!("{page} lists its files"))
        }
        (401, _, _) if client.has_password => {
            Error::machine(format!("the Hub refuses the user and password for {repo} (401)"))
                .hint("look at the user and password in HF_ENDPOINT; HF_TOKEN is not sent with them")
        }
        (401, "GatedRepo" | "", _) if client.has_token => {
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
        (401, _, _) if !client.has_token => {
            Error::input(format!("there is no {repo} on the Hub, or it is not public (401)"))
                .hint(format!(
                    "look at the name; for a private repository set HF_TOKEN to a token of {tokens}"
                ))
        }
        (401 | 404, _, _) if client.has_token => {
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
