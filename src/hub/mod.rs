/*! Names of models and data sets -> files on disk.

A model's name is a directory, the bundled `tiny-llama`, or a repository of the Hugging Face Hub by its
id or by one of our aliases ([`names`]). Files come from the Hub's cache, which `hf` and transformers
share ([`cache`]), if their content is what it should be ([`content`]), or over HTTP into it ([`client`]
asks, [`download`] fetches and checks). The Hub is a handful of conventions over HTTP; they are written
out here because no small crate resumes, checks what it fetched and obeys all of the Hub's variables
(`docs/hub.md`). */

mod address;
mod attempts;
mod cache;
mod client;
mod content;
mod dataset;
mod download;
mod exchange;
mod failure;
mod model;
mod names;
mod refusal;
mod settings;

use crate::checkpoint::DataFile;
use crate::progress::Progress;
use crate::{Error, Result};
use cache::Repository;
use client::{At, Client};
use failure::Failure;
use settings::Settings;

pub(crate) use address::masked;
pub use names::{ALIASES, Resolved, TINY_LLAMA, resolve, source, tiny_llama};

/// The cache that the Hub's tools share; none where there is not even a home directory.
///
/// # Errors
/// As [`Hub::from_env`].
pub(crate) fn cache_directory() -> Result<Option<std::path::PathBuf>> {
    Ok(Settings::from_env(None)?.cache)
}

/// The Hub as a run may use it: its address, its cache, who asks, and who watches.
pub struct Hub<'a> {
    settings: Settings,
    client: Client,
    progress: &'a dyn Progress,
}

impl<'a> Hub<'a> {
    /// Who is told what the Hub is asked for, and who may ask it to stop.
    pub(crate) fn progress(&self) -> &'a dyn Progress {
        self.progress
    }

    /// The Hub by this process's environment (`HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`,
    /// `HF_HUB_OFFLINE` and the others of `docs/hub.md`); with `offline`, its cache only.
    ///
    /// # Errors
    /// If one of the variables holds what cannot be meant.
    pub fn from_env(offline: bool, progress: &'a dyn Progress) -> Result<Self> {
        Self::new(offline.then_some("--offline"), progress)
    }

    /// Only what its cache holds, because `who` fetches nothing.
    ///
    /// # Errors
    /// As [`Hub::from_env`].
    pub fn cached(who: &'static str, progress: &'a dyn Progress) -> Result<Self> {
        Self::new(Some(who), progress)
    }

    fn new(offline: Option<&'static str>, progress: &'a dyn Progress) -> Result<Self> {
        let settings = Settings::from_env(offline)?;
        let client = Client::new(&settings);
        Ok(Self { settings, client, progress })
    }

    /// A file of a data set's repository, from the cache or the Hub. `revision` is a branch, a tag, a
    /// commit or a reference such as `refs/convert/parquet`.
    ///
    /// # Errors
    /// Bad input if there is no such repository, revision or file; a machine error without network,
    /// access or room on the disk.
    pub fn dataset_file(&self, repo: &str, revision: &str, file: &str) -> Result<DataFile> {
        dataset::fetch(self, repo, revision, file)
    }
}

impl Hub<'_> {
    /// What lies in the cache, loudly, where the Hub cannot be asked whether it is the newest.
    fn cached_instead<T>(
        &self,
        cached: impl FnOnce() -> Result<Option<T>>,
        failure: Failure,
    ) -> Result<T> {
        if failure.is_the_networks()
            && let Some(cached) = cached()?
        {
            let error = failure.error;
            self.progress.warn(&format!("{error}; going on with what the Hub's cache holds"));
            return Ok(cached);
        }
        Err(failure.error)
    }
}

/// The place of a repository in the cache.
fn cache_of(hub: &Hub<'_>, at: At<'_>) -> Result<Repository> {
    let cache = hub.settings.cache.as_deref().ok_or_else(|| {
        Error::machine("there is no place for what comes from the Hub")
            .hint("set HF_HOME to a directory that you may write")
    })?;
    Ok(Repository::new(cache, at))
}
