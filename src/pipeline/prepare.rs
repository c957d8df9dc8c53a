/*! What stands before the first product of every stage: the network, the windows, and the checks of text and
memory. */

use super::job::{CalibrationInput, Job};
use super::memory::quantize_bytes;
use crate::backend::Backend;
use crate::checkpoint::{Provenance, Source};
use crate::machine::hand_back;
use crate::model::Architecture;
use crate::model::sites::EMBEDDING;
use crate::network::memory::{self, Windows, Workspace};
use crate::network::{Network, caution};
use crate::progress::Progress;
use crate::text::{CalibrationWindows, Evaluation, TextSet, Tokenizer, WindowDraw, check_tokens};
use crate::{Error, Result};

/// Which windows a model is calibrated on.
pub struct Calibration {
    /// The text they are drawn from.
    pub text: TextSet,
    /// How many; fewer if the text holds fewer.
    pub samples: usize,
    /// Tokens in each.
    pub seq_len: usize,
    /// Seed of the draw.
    pub seed: u64,
}

impl Calibration {
    /// Refuses windows that the model has not written yet.
    pub(super) fn check_written(&self) -> Result<()> {
        match self.text.unwritten(self.samples)? {
            None => Ok(()),
            Some(_) => Err(Error::usage(format!(
                "the model has not written the text `{}` that it is calibrated on",
                self.text.name
            ))
            .hint("sample it first: `serve::OwnText`")),
        }
    }

    /// The windows of a source whose tensors are accounted for.
    pub(super) fn input<'a>(
        &self,
        source: &'a Source,
        network: Network,
        progress: &dyn Progress,
    ) -> Result<CalibrationInput<'a>> {
        let Self { text, samples, seq_len, seed } = self;
        let windows = WindowDraw::once(*samples, *seq_len, *seed);
        Draw { text, windows }.input(source, network, progress)
    }
}

/// Windows that are to be drawn from a text.
pub(super) struct Draw<'t> {
    pub(super) text: &'t TextSet,
    pub(super) windows: WindowDraw,
}

impl Draw<'_> {
    /// The windows of a source whose tensors are accounted for.
    pub(super) fn input<'a>(
        &self,
        source: &'a Source,
        network: Network,
        progress: &dyn Progress,
    ) -> Result<CalibrationInput<'a>> {
        let Network { architecture, ignored, .. } = network;
        let Self { text, windows } = self;
        let WindowDraw { seq_len, seed, .. } = *windows;
        let tokenizer = Tokenizer::from_bytes(&source.tokenizer()?, &source.tokenizer_path())?;
        let drawn = text.calibration_windows(&tokenizer, windows, progress)?;
        let CalibrationWindows { tokens, sha256, sets } = drawn;
        check_embedded(source, &architecture, &tokens, tokenizer.path())?;
        let provenance = Provenance {
            dataset: text.name.clone(),
            sha256,
            samples: tokens.len() / seq_len,
            seq_len,
            seed,
            sets,
        };
        Ok(CalibrationInput { source, architecture, ignored, tokens, provenance })
    }
}

/// The texts that a run reads before its work, as far as they are checked and take memory.
pub(super) struct Texts<'a> {
    pub(super) calibration: Option<&'a Calibration>,
    pub(super) evaluation: Option<&'a Evaluation>,
}

impl Texts<'_> {
    /// What they take at the peak, one after the other, while they are tokenized.
    pub(super) fn bytes(&self, source: &Source) -> Result<u64> {
        let calibration = self.calibration.map(|calibration| calibration.text.tokenizing_bytes());
        let evaluation = self.evaluation.map(|evaluation| evaluation.text.tokenizing_bytes());
        let tokenizer = Tokenizer::memory_bytes(source.tokenizer()?.len());
        Ok(tokenizer + calibration.max(evaluation).unwrap_or(0))
    }

    /// Finds out before the work that the text of the evaluation is too short or is no text of this model,
    /// and that memory will not do; the estimate, in bytes. Warns of what says little.
    pub(super) fn check<B: Backend>(
        &self,
        backend: &B,
        job: &Job<'_>,
        progress: &dyn Progress,
    ) -> Result<u64> {
        let CalibrationInput { source, architecture, provenance, .. } = &job.input;
        let evaluated = self
            .evaluation
            .map(|evaluation| check_evaluation(source, architecture, evaluation, progress))
            .transpose()?;
        let text_bytes = self.bytes(source)?;
        // The memory of the texts is not needed any more while the work needs its own.
        hand_back();
        let needed = quantize_bytes(job, Workspace::of(backend), evaluated, text_bytes);
        memory::check(needed, progress)?;
        let evaluated = evaluated.map_or(0, |windows| windows.seq_len);
        caution(*source, architecture, provenance.seq_len.max(evaluated), progress);
        Ok(needed)
    }
}

/// The windows that will be measured.
fn check_evaluation(
    source: &Source,
    architecture: &Architecture,
    evaluation: &Evaluation,
    progress: &dyn Progress,
) -> Result<Windows> {
    let path = source.tokenizer_path();
    let tokens = evaluation.tokens(&source.tokenizer()?, &path, progress)?;
    check_embedded(source, architecture, &tokens, &path)?;
    Ok(Windows { tokens: tokens.len(), seq_len: evaluation.seq_len })
}

/// Finds out that tokens have no embedding. An embedding of another shape than the configuration's is
/// refused elsewhere, with the shape.
fn check_embedded(
    source: &Source,
    architecture: &Architecture,
    tokens: &[u32],
    tokenizer: &str,
) -> Result<()> {
    let rows = architecture.vocabulary;
    let stored = source.tensor(EMBEDDING).ok().and_then(|tensor| tensor.shape.first().copied());
    if stored == Some(rows) { check_tokens(tokens, rows, tokenizer) } else { Ok(()) }
}
