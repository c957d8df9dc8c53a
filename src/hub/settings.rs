/*! How the Hub is reached and where its files are kept: the variables that the Hub's own tools obey. */

use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::Proxy;

use super::address::{Address, masked};
use crate::{Error, Result};

/// Where the Hub is unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// Seconds that an answer may take unless a variable says otherwise.
const PATIENCE_SECONDS: u32 = 30;
/// Bytes of a token's file that are read; tokens have about 40.
const TOKEN_BYTES: u64 = 4096;
/// Where a proxy is named, in the order in which `ureq` looks.
const PROXIES: [&str; 6] =
    ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"];

/// What the environment and the command line say about the Hub.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) endpoint: Endpoint,
    /// The cache that `hf` and transformers share; `None` where there is not even a home directory.
    pub(super) cache: Option<PathBuf>,
    /// Who asks.
    pub(super) token: Option<String>,
    /// What says that the network is not to be used, if anything does.
    pub(super) offline: Option<&'static str>,
    pub(super) patience: Patience,
    /// The variable that should name a proxy and does not, if there is no other.
    pub(super) wrong_proxy: Option<&'static str>,
}

/// The Hub's address, to which paths are appended.
#[derive(Clone)]
pub(super) struct Endpoint {
    /// Without a final slash.
    base: String,
    address: Address,
}

/// How long answers may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Patience {
    /// For the head of an answer about a repository or a file (`HF_HUB_ETAG_TIMEOUT`).
    pub(super) answer: Duration,
    /// For the head of an answer with a file, and the period over which its rate is measured
    /// (`HF_HUB_DOWNLOAD_TIMEOUT`).
    pub(super) download: Duration,
}

impl Endpoint {
    fn parse(text: &str) -> Result<Self> {
        let base = text.trim_end_matches('/').to_owned();
        match Address::parse(&base) {
            Some(address) => Ok(Self { base, address }),
            None => {
                let shown = masked(&base);
                Err(Error::usage(format!("HF_ENDPOINT is `{shown}`, which is no address"))
                    .hint(format!("set it to an address such as {ENDPOINT}, or unset it")))
            }
        }
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// The address of a path that begins with a slash; `None` if it makes no address.
    pub(super) fn at(&self, path: &str) -> Option<Address> {
        Address::parse(&format!("{}{path}", self.base))
    }
}

impl fmt::Display for Endpoint {
    /// Without secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&masked(&self.base))
    }
}

impl fmt::Debug for Settings {
    /// Without secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("endpoint", &self.endpoint.to_string())
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .field("patience", &self.patience)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// Settings of this process; `offline` says what else than the environment forbids the network.
    pub(super) fn from_env(offline: Option<&'static str>) -> Result<Self> {
        Self::from_variables(offline, |name| std::env::var_os(name))
    }

    fn from_variables(
        offline: Option<&'static str>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| variable(name).map(PathBuf::from);
        let text = |name: &str| match variable(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(text)) => Ok(Some(text)),
            Some(Err(_)) => Err(Error::usage(format!("{name} holds bytes that are no text"))
                .hint("set it again, or unset it")),
        };
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| path("HOME").map(|home| home.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| home.as_ref().map(|home| home.join("hub")));
        let token_file =
            path("HF_TOKEN_PATH").or_else(|| home.as_ref().map(|home| home.join("token")));
        let named = match text("HF_TOKEN")? {
            Some(token) => Some(token),
            None => text("HUGGING_FACE_HUB_TOKEN")?,
        };
        let token = named
            .or_else(|| token_in(&token_file?))
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| !token.chars().all(|c| c.is_ascii_graphic())) {
            return Err(Error::input("the Hub's token holds characters that no token has")
                .hint("set HF_TOKEN to the token alone, or run `hf auth login` again"));
        }
        let endpoint = text("HF_ENDPOINT")?;
        let endpoint = Endpoint::parse(endpoint.as_deref().unwrap_or(ENDPOINT))?;
        let asked = text("HF_HUB_OFFLINE")?.is_some_and(|value| is_true(&value));
        let offline = offline.or(asked.then_some("HF_HUB_OFFLINE"));
        let seconds = |name| text(name).and_then(|value| seconds(name, value.as_deref()));
        let patience = Patience {
            answer: seconds("HF_HUB_ETAG_TIMEOUT")?,
            download: seconds("HF_HUB_DOWNLOAD_TIMEOUT")?,
        };
        let wrong_proxy = wrong_proxy(variable);
        Ok(Self { endpoint, cache, token, offline, patience, wrong_proxy })
    }
}

/// The token that `hf auth login` wrote, if this user may read it.
fn token_in(path: &Path) -> Option<String> {
    // Opening a pipe would wait for its other end.
    let file = path.is_file().then(|| fs_err::File::open(path).ok())??;
    let mut token = String::new();
    file.take(TOKEN_BYTES).read_to_string(&mut token).ok()?;
    Some(token)
}

/// A number of seconds, as the Hub's own tools take them.
fn seconds(name: &str, value: Option<&str>) -> Result<Duration> {
    let parsed = value.map_or(Ok(PATIENCE_SECONDS), |value| value.trim().parse::<u32>());
    match (parsed, value) {
        (Ok(seconds), _) if seconds > 0 => Ok(Duration::from_secs(seconds.into())),
        (_, value) => {
            let value = value.unwrap_or_default();
            Err(Error::usage(format!("{name} is `{value}`, which is no number of seconds"))
                .hint(format!("set it to a whole number such as {PATIENCE_SECONDS}, or unset it")))
        }
    }
}

/// The first variable that is set for a proxy, if none of them names one. `ureq` would go past it.
fn wrong_proxy(variable: impl Fn(&str) -> Option<OsString>) -> Option<&'static str> {
    let understood =
        |value: OsString| value.to_str().is_some_and(|value| Proxy::new(value).is_ok());
    let set = || PROXIES.into_iter().filter_map(|name| Some((name, variable(name)?)));
    let (first, _) = set().next()?;
    (!set().any(|(_, value)| understood(value))).then_some(first)
}

/// The values that the Hub's own tools take for yes.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(offline: Option<&'static str>, variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_variables(offline, |name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
        })
    }

    #[test]
    fn the_cache_is_where_the_hubs_tools_keep_it() {
        for (variables, cache) in [
            (&[("HOME", "/h")][..], "/h/.cache/huggingface/hub"),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")], "/f/hub"),
            (&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")], "/c"),
            (&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "")], "/f/hub"),
        ] {
            let found = settings(None, variables).unwrap();
            assert_eq!(found.cache.unwrap(), PathBuf::from(cache));
            assert_eq!(found.endpoint.to_string(), ENDPOINT);
            assert_eq!((found.token, found.offline), (None, None));
        }
        assert_eq!(settings(None, &[]).unwrap().cache, None);
    }

    #[test]
    fn a_token_comes_from_the_environment_or_its_file() {
        let home = tempfile::tempdir().unwrap();
        let home_text = home.path().to_str().unwrap();
        fs_err::write(home.path().join("token"), "hf_file\n").unwrap();
        fs_err::write(home.path().join("other"), " hf_other ").unwrap();
        let other = home.path().join("other");
        let token = |variables: &[(&str, &str)]| settings(None, variables).unwrap().token;
        assert_eq!(token(&[("HF_HOME", home_text)]).as_deref(), Some("hf_file"));
        let both = [("HF_HOME", home_text), ("HF_TOKEN", "hf_set")];
        assert_eq!(token(&both).as_deref(), Some("hf_set"));
        let other = [("HF_HOME", home_text), ("HF_TOKEN_PATH", other.to_str().unwrap())];
        assert_eq!(token(&other).as_deref(), Some("hf_other"));
        let error = settings(None, &[("HF_TOKEN", "hf_a\nhf_b")]).unwrap_err();
        assert!(error.hint_text().unwrap().contains("hf auth login"), "{error}");
        assert!(!error.to_string().contains("hf_a"), "a token is not for the screen");
    }

    #[test]
    fn offline_is_a_flag_or_a_variable() {
        assert_eq!(settings(Some("--offline"), &[]).unwrap().offline, Some("--offline"));
        for (value, offline) in [("1", true), ("true", true), ("Yes", true), ("0", false)] {
            let found = settings(None, &[("HF_HUB_OFFLINE", value)]).unwrap().offline;
            assert_eq!(found, offline.then_some("HF_HUB_OFFLINE"), "{value}");
        }
    }

    #[test]
    fn an_endpoint_is_an_address() {
        let found = settings(None, &[("HF_ENDPOINT", "http://127.0.0.1:8/")]).unwrap();
        assert_eq!(found.endpoint.to_string(), "http://127.0.0.1:8");
        let address = found.endpoint.at("/api/models/org/name").unwrap();
        assert_eq!(address.to_string(), "http://127.0.0.1:8/api/models/org/name");
        for wrong in ["hub.example", "ftp://hub.example", "https://", "me:secret@hub.example", "-"]
        {
            let error = settings(None, &[("HF_ENDPOINT", wrong)]).unwrap_err();
            assert_eq!(error.kind(), crate::Kind::Usage, "{wrong}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn secrets_are_not_part_of_what_is_printed() {
        let endpoint = ("HF_ENDPOINT", "https://me:secret@hub.example/x?key=secret");
        let found = settings(None, &[endpoint, ("HF_TOKEN", "hf_secret")]).unwrap();
        assert_eq!(found.endpoint.to_string(), "https://hub.example/x?...");
        assert!(!format!("{found:?}").contains("secret"), "{found:?}");
    }

    #[test]
    fn patience_is_a_whole_number_of_seconds() {
        let default = settings(None, &[]).unwrap().patience;
        let seconds = Duration::from_secs;
        assert_eq!((default.answer, default.download), (seconds(30), seconds(30)));
        let set = [("HF_HUB_ETAG_TIMEOUT", "3"), ("HF_HUB_DOWNLOAD_TIMEOUT", " 600 ")];
        let found = settings(None, &set).unwrap().patience;
        assert_eq!((found.answer, found.download), (seconds(3), seconds(600)));
        for wrong in ["0", "-1", "1.5", "soon", "99999999999999999999", "NaN"] {
            let error = settings(None, &[("HF_HUB_ETAG_TIMEOUT", wrong)]).unwrap_err();
            assert_eq!(error.kind(), crate::Kind::Usage, "{wrong}");
            assert!(error.message().contains("HF_HUB_ETAG_TIMEOUT"), "{error}");
        }
    }

    #[test]
    fn a_proxy_that_cannot_be_understood_is_known() {
        let of = |variables: &[_]| settings(None, variables).unwrap().wrong_proxy;
        let wrong = ("HTTPS_PROXY", "htp://me:secret@proxy.example");
        let right = ("http_proxy", "http://me:secret@proxy.example:3128");
        assert_eq!(of(&[wrong]), Some("HTTPS_PROXY"));
        for fine in [&[][..], &[right], &[wrong, right], &[("ALL_PROXY", ""), right]] {
            assert_eq!(of(fine), None, "{fine:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_refused_and_not_left_out() {
        use std::os::unix::ffi::OsStringExt;
        let error = Settings::from_variables(None, |name| {
            (name == "HF_TOKEN").then(|| OsString::from_vec(vec![0xff]))
        });
        assert!(error.unwrap_err().message().starts_with("HF_TOKEN holds bytes"));
    }
}
