/*! What the name of a model means. */

use std::path::{Path, PathBuf};

use super::{Hub, model};
use crate::checkpoint::{HubOrigin, Source};
use crate::{Error, Result};

/// The name of the bundled model.
pub const TINY_LLAMA: &str = "tiny-llama";

/// Our short names for models that are often quantized, and the repository each one means.
pub const ALIASES: [(&str, &str); 23] = [
    ("llama-7b", "huggyllama/llama-7b"),
    ("llama-13b", "huggyllama/llama-13b"),
    ("llama-30b", "huggyllama/llama-30b"),
    ("llama-65b", "huggyllama/llama-65b"),
    ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
    ("llama-2-13b", "meta-llama/Llama-2-13b-hf"),
    ("llama-2-70b", "meta-llama/Llama-2-70b-hf"),
    ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
    ("smollm3-3b", "HuggingFaceTB/SmolLM3-3B"),
    ("seed-oss-36b", "ByteDance-Seed/Seed-OSS-36B-Instruct"),
    ("mimo-7b", "XiaomiMiMo/MiMo-7B-Base"),
    ("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct"),
    ("phi-4-mini", "microsoft/Phi-4-mini-instruct"),
    ("granite-3.3-8b", "ibm-granite/granite-3.3-8b-instruct"),
    ("ernie-4.5-0.3b", "baidu/ERNIE-4.5-0.3B-PT"),
    ("glm-4-9b", "zai-org/GLM-4-9B-0414"),
    ("olmo-2-7b", "allenai/OLMo-2-1124-7B"),
    ("olmo-3-7b", "allenai/Olmo-3-1025-7B"),
    ("exaone-4-32b", "LGAI-EXAONE/EXAONE-4.0-32B"),
    ("gemma-3-1b", "google/gemma-3-1b-pt"),
    ("qwen1.5-moe-a2.7b", "Qwen/Qwen1.5-MoE-A2.7B"),
    ("glm-4.5-air", "zai-org/GLM-4.5-Air"),
    ("dots-llm1", "rednote-hilab/dots.llm1.base"),
];

static TINY_LLAMA_FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../models/tiny-llama/config.json")),
    ("model.safetensors", include_bytes!("../../models/tiny-llama/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../models/tiny-llama/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../models/tiny-llama/tokenizer_config.json")),
];

/// What a model's name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// The model that is part of the program.
    Bundled,
    /// A directory that exists: a source checkpoint, or an Atom one.
    Directory(PathBuf),
    /// A repository whose files are in the Hub's cache by now.
    Repository(PathBuf, HubOrigin),
}

/// What a name means before anything is fetched.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    Bundled,
    Directory(PathBuf),
    Repository { repo: String, revision: Option<String> },
}

/// Finds the model that `--model` names, and fetches it if it is on the Hub and not here. `tiny-llama`
/// is the bundled one even where a directory of that name exists; `./tiny-llama` is the directory.
/// `revision` is what `--revision` asks for; a Hub id may name it as well, as `org/name@revision`.
///
/// # Errors
/// Wrong usage if a revision is asked of what has none; bad input if there is no such directory,
/// repository or revision; a machine error without network, access or room on the disk.
pub fn resolve(hub: &Hub<'_>, model: &str, revision: Option<&str>) -> Result<Resolved> {
    match (named(model)?, revision) {
        (Named::Bundled | Named::Directory(_), Some(revision)) => Err(Error::usage(format!(
            "--revision {revision} asks for a revision of `{model}`, which is not a repository of the Hub"
        ))
        .hint("leave out --revision, or give a Hub id such as org/name")),
        (Named::Bundled, None) => Ok(Resolved::Bundled),
        (Named::Directory(dir), None) => Ok(Resolved::Directory(dir)),
        (Named::Repository { revision: Some(first), .. }, Some(second)) if first != second => {
            Err(Error::usage(format!(
                "`{model}` names revision {first} and --revision names {second}"
            ))
            .hint("name the revision once"))
        }
        (Named::Repository { repo, revision: own }, flag) => {
            let revision = own.as_deref().or(flag).unwrap_or("main").to_owned();
            let model::Snapshot { dir, commit } = model::fetch(hub, &repo, &revision)?;
            Ok(Resolved::Repository(dir, HubOrigin { repo, revision, commit }))
        }
    }
}

/// Finds a model and opens it as a source checkpoint.
pub fn source(hub: &Hub<'_>, model: &str, revision: Option<&str>) -> Result<Source> {
    match resolve(hub, model, revision)? {
        Resolved::Bundled => tiny_llama(),
        Resolved::Directory(dir) => Source::open(&dir),
        Resolved::Repository(dir, place) => Ok(Source::open(&dir)?.from_hub(place)),
    }
}

/// The bundled model.
pub fn tiny_llama() -> Result<Source> {
    Source::embedded(TINY_LLAMA, &TINY_LLAMA_FILES)
}

fn named(model: &str) -> Result<Named> {
    if model == TINY_LLAMA {
        return Ok(Named::Bundled);
    }
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(Named::Directory(path.to_path_buf()));
    }
    if path.exists() {
        return Err(Error::input(format!("{model} is a file, not a directory"))
            .hint("give --model the directory that it lies in"));
    }
    let (name, revision) = match model.split_once('@') {
        Some((name, revision)) if !revision.is_empty() => (name, Some(revision.to_owned())),
        _ => (model, None),
    };
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name).map(|(_, repo)| *repo);
    if let Some(repo) = alias.or_else(|| is_repository_id(name).then_some(name)) {
        return Ok(Named::Repository { repo: repo.to_owned(), revision });
    }
    Err(if model.contains('/') || model.starts_with(['.', '~']) {
        Error::input(format!("directory {model} does not exist"))
            .hint("give --model a directory that holds config.json and *.safetensors")
    } else {
        let names: Vec<&str> = ALIASES.iter().map(|(alias, _)| *alias).collect();
        Error::input(format!("there is no model or directory named `{model}`")).hint(format!(
            "give a directory, a Hub id such as org/name, {TINY_LLAMA} (bundled), or one of {}",
            names.join(", ")
        ))
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;
    use crate::progress::Silent;

    fn repository(repo: &str, revision: Option<&str>) -> Named {
        Named::Repository { repo: repo.to_owned(), revision: revision.map(str::to_owned) }
    }

    #[test]
    fn the_bundled_model_needs_no_file() {
        let hub = Hub::from_env(true, &Silent).unwrap();
        assert_eq!(resolve(&hub, "tiny-llama", None).unwrap(), Resolved::Bundled);
        let tiny = source(&hub, "tiny-llama", None).unwrap();
        assert_eq!(tiny.name(), "tiny-llama");
        assert_eq!(tiny.dir(), None);
        assert_eq!(tiny.config()["model_type"], "llama");
        assert!(tiny.tokenizer().unwrap().starts_with(b"{"));
    }

    #[test]
    fn a_directory_is_taken_as_it_is() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().to_str().unwrap();
        assert_eq!(named(path).unwrap(), Named::Directory(home.path().to_path_buf()));
        let file = home.path().join("config.json");
        fs_err::write(&file, "{}").unwrap();
        let error = named(file.to_str().unwrap()).unwrap_err();
        assert!(error.message().ends_with("is a file, not a directory"));
    }

    #[test]
    fn aliases_and_ids_are_repositories_with_or_without_a_revision() {
        let llama = "meta-llama/Llama-2-7b-hf";
        assert_eq!(named("llama-2-7b").unwrap(), repository(llama, None));
        assert_eq!(named("llama-2-7b@v1").unwrap(), repository(llama, Some("v1")));
        assert_eq!(named("org/some.model_1").unwrap(), repository("org/some.model_1", None));
        let pull = named("org/name@refs/pr/1").unwrap();
        assert_eq!(pull, repository("org/name", Some("refs/pr/1")));
    }

    #[test]
    fn what_is_neither_a_name_nor_an_id_is_a_path_or_a_typing_error() {
        for path in ["./missing", "/missing/dir", "a/b/c", "../no-such-model"] {
            let error = named(path).unwrap_err();
            assert_eq!(error.message(), format!("directory {path} does not exist"));
        }
        let error = named("lama-7b").unwrap_err();
        assert_eq!(error.message(), "there is no model or directory named `lama-7b`");
        assert!(error.hint_text().unwrap().contains("llama-7b, llama-13b"));
    }

    #[test]
    fn a_revision_is_a_repositorys_and_named_once() {
        let hub = Hub::from_env(true, &Silent).unwrap();
        for (model, revision) in [("tiny-llama", "main"), (".", "main"), ("org/name@a", "b")] {
            let error = resolve(&hub, model, Some(revision)).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{error}");
        }
    }
}
