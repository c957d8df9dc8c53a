/*! Names of models -> checkpoints on disk.

A name is a directory, the bundled `tiny-llama`, or a repository of the Hugging Face Hub by its id
or by one of our aliases. This version does not download: it finds what `hf download` has put into
the Hub's cache, and otherwise says which command fetches the model. */

use std::path::{Path, PathBuf};

use crate::checkpoint::Source;
use crate::{Error, Result};

/// The name of the bundled model.
pub const TINY_LLAMA: &str = "tiny-llama";

/// Our short names for models that are often quantized, and the repository each one means.
pub const ALIASES: [(&str, &str); 8] = [
    ("llama-7b", "huggyllama/llama-7b"),
    ("llama-13b", "huggyllama/llama-13b"),
    ("llama-30b", "huggyllama/llama-30b"),
    ("llama-65b", "huggyllama/llama-65b"),
    ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
    ("llama-2-13b", "meta-llama/Llama-2-13b-hf"),
    ("llama-2-70b", "meta-llama/Llama-2-70b-hf"),
    ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
];

static TINY_LLAMA_FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../models/tiny-llama/config.json")),
    ("model.safetensors", include_bytes!("../models/tiny-llama/model.safetensors")),
    ("tokenizer.json", include_bytes!("../models/tiny-llama/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../models/tiny-llama/tokenizer_config.json")),
];

/// What a model's name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// The model that is part of the program.
    Bundled,
    /// A directory that exists: a source checkpoint, or an Atom one.
    Directory(PathBuf),
}

/// Finds the model that `--model` names. `tiny-llama` is the bundled one even where a directory of
/// that name exists; `./tiny-llama` is the directory.
///
/// # Errors
/// Bad input: no such directory, a repository that is not on this machine (with the command that
/// downloads it), an unknown name.
pub fn resolve(model: &str) -> Result<Resolved> {
    resolve_with(model, cache_directory().as_deref())
}

/// Finds a model and opens it as a source checkpoint.
pub fn source(model: &str) -> Result<Source> {
    match resolve(model)? {
        Resolved::Bundled => tiny_llama(),
        Resolved::Directory(dir) => Source::open(&dir),
    }
}

/// The bundled model.
pub fn tiny_llama() -> Result<Source> {
    Source::embedded(TINY_LLAMA, &TINY_LLAMA_FILES)
}

fn resolve_with(model: &str, cache: Option<&Path>) -> Result<Resolved> {
    if model == TINY_LLAMA {
        return Ok(Resolved::Bundled);
    }
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(Resolved::Directory(path.to_path_buf()));
    }
    if path.exists() {
        return Err(Error::input(format!("{model} is a file, not a directory"))
            .hint("give --model the directory that it lies in"));
    }
    let alias = ALIASES.iter().find(|(alias, _)| *alias == model).map(|(_, repo)| *repo);
    let Some(repo) = alias.or_else(|| is_repository_id(model).then_some(model)) else {
        return Err(if model.contains('/') || model.starts_with(['.', '~']) {
            Error::input(format!("directory {model} does not exist"))
                .hint("give --model a directory that holds config.json and *.safetensors")
        } else {
            let names: Vec<&str> = ALIASES.iter().map(|(alias, _)| *alias).collect();
            Error::input(format!("there is no model or directory named `{model}`")).hint(format!(
                "give a directory, a Hub id such as org/name, {TINY_LLAMA} (bundled), or one of {}",
                names.join(", ")
            ))
        });
    };
    if let Some(dir) = cache.and_then(|cache| cached(cache, repo)) {
        return Ok(Resolved::Directory(dir));
    }
    let dir = repo.rsplit('/').next().unwrap_or(repo);
    let named = if alias.is_some() { format!("`{model}` ({repo})") } else { format!("`{model}`") };
    Err(Error::input(format!(
        "{named} is neither a directory nor in the Hub's cache, and this version does not download"
    ))
    .hint(format!(
        "run `hf download {repo} --local-dir {dir}` \
         (or `huggingface-cli download {repo} --local-dir {dir}`), then pass --model ./{dir}"
    )))
}

/// Whether `model` has the form of a Hub id: `org/name` in the Hub's alphabet.
fn is_repository_id(model: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    matches!(model.split('/').collect::<Vec<_>>()[..], [org, name] if part(org) && part(name))
}

/// Where the Hub's tools keep what they download, by their own rules.
pub(crate) fn cache_directory() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

/// The snapshot of `repo` that the cache's `refs/main` points to.
fn cached(cache: &Path, repo: &str) -> Option<PathBuf> {
    let home = cache.join(format!("models--{}", repo.replace('/', "--")));
    let commit = fs_err::read_to_string(home.join("refs/main")).ok()?;
    let snapshot = home.join("snapshots").join(commit.trim());
    snapshot.join("config.json").is_file().then_some(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn the_bundled_model_needs_no_file() {
        assert_eq!(resolve("tiny-llama").unwrap(), Resolved::Bundled);
        let tiny = source("tiny-llama").unwrap();
        assert_eq!(tiny.name(), "tiny-llama");
        assert_eq!(tiny.dir(), None);
        assert_eq!(tiny.config()["model_type"], "llama");
        assert!(tiny.tokenizer().unwrap().starts_with(b"{"));
    }

    #[test]
    fn a_directory_is_taken_as_it_is() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().to_str().unwrap();
        let found = resolve_with(path, None).unwrap();
        assert_eq!(found, Resolved::Directory(home.path().to_path_buf()));
        let file = home.path().join("config.json");
        fs_err::write(&file, "{}").unwrap();
        let error = resolve_with(file.to_str().unwrap(), None).unwrap_err();
        assert!(error.message().ends_with("is a file, not a directory"));
    }

    #[test]
    fn a_repository_not_on_this_machine_comes_with_the_command_that_fetches_it() {
        let error = resolve_with("llama-2-7b", None).unwrap_err();
        assert_eq!(error.kind(), Kind::Input);
        assert!(error.message().starts_with("`llama-2-7b` (meta-llama/Llama-2-7b-hf) is neither"));
        let hint = error.hint_text().unwrap();
        assert!(hint.contains("hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf"));
        assert!(hint.ends_with("pass --model ./Llama-2-7b-hf"));
        let error = resolve_with("some-org/some.model_1", None).unwrap_err();
        assert!(error.message().contains("does not download"));
    }

    #[test]
    fn what_is_neither_a_name_nor_an_id_is_a_path_or_a_typing_error() {
        for path in ["./missing", "/missing/dir", "a/b/c", "../x"] {
            let error = resolve_with(path, None).unwrap_err();
            assert_eq!(error.message(), format!("directory {path} does not exist"));
        }
        let error = resolve_with("lama-7b", None).unwrap_err();
        assert_eq!(error.message(), "there is no model or directory named `lama-7b`");
        assert!(error.hint_text().unwrap().contains("llama-7b, llama-13b"));
    }

    #[test]
    fn the_hubs_cache_is_looked_into() {
        let cache = tempfile::tempdir().unwrap();
        let home = cache.path().join("models--huggyllama--llama-7b");
        let snapshot = home.join("snapshots/abc123");
        fs_err::create_dir_all(&snapshot).unwrap();
        fs_err::create_dir_all(home.join("refs")).unwrap();
        fs_err::write(home.join("refs/main"), "abc123\n").unwrap();
        // Without config.json it is an unfinished download.
        assert!(resolve_with("llama-7b", Some(cache.path())).is_err());
        fs_err::write(snapshot.join("config.json"), "{}").unwrap();
        for name in ["llama-7b", "huggyllama/llama-7b"] {
            let found = resolve_with(name, Some(cache.path())).unwrap();
            assert_eq!(found, Resolved::Directory(snapshot.clone()));
        }
    }
}
