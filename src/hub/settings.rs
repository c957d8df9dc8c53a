/*! How the Hub is reached and where its files are kept: the variables that the Hub's own tools obey. */

use std::ffi::OsString;
use std::path::PathBuf;

use crate::{Error, Result};

/// Where the Hub is unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";

/// What the environment and the command line say about the Hub.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Address without a final slash.
    pub(super) endpoint: String,
    /// The cache that `hf` and transformers share; `None` where there is not even a home directory.
    pub(super) cache: Option<PathBuf>,
    /// Who asks.
    pub(super) token: Option<String>,
    /// What says that the network is not to be used, if anything does.
    pub(super) offline: Option<&'static str>,
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
        let text = |name: &str| variable(name).and_then(|value| value.into_string().ok());
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| path("HOME").map(|home| home.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| home.as_ref().map(|home| home.join("hub")));
        let token_file =
            path("HF_TOKEN_PATH").or_else(|| home.as_ref().map(|home| home.join("token")));
        let token = text("HF_TOKEN")
            .or_else(|| text("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| fs_err::read_to_string(token_file?).ok())
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| !token.chars().all(|c| c.is_ascii_graphic())) {
            return Err(Error::input("the Hub's token holds characters that no token has")
                .hint("set HF_TOKEN to the token alone, or run `hf auth login` again"));
        }
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !(endpoint.starts_with("https://") || endpoint.starts_with("http://")) {
            return Err(Error::usage(format!("HF_ENDPOINT is `{endpoint}`, which is no address"))
                .hint(format!("set it to an address such as {ENDPOINT}, or unset it")));
        }
        let asked = text("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value));
        let offline = offline.or(asked.then_some("HF_HUB_OFFLINE"));
        Ok(Self { endpoint, cache, token, offline })
    }
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
            assert_eq!(found.endpoint, ENDPOINT);
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
        assert_eq!(found.endpoint, "http://127.0.0.1:8");
        let error = settings(None, &[("HF_ENDPOINT", "hub.example")]).unwrap_err();
        assert_eq!(error.kind(), crate::Kind::Usage);
    }
}
