//! Two models that continue the same prompt, each with its most probable tokens.

use serde::Serialize;

use super::generate::{Generation, Generator};
use crate::Result;
use crate::backend::{Backend, Decode};
use crate::progress::Progress;
use crate::text::Tokenizer;

/// A model and its continuation.
#[derive(Clone, Debug, Serialize)]
pub struct ComparedModel {
    /// Its name.
    pub model: String,
    /// What it continues the prompt with.
    #[serde(flatten)]
    pub generation: Generation,
}

/// Where two continuations part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// New tokens that are the same.
    pub same_tokens: usize,
    /// The token of each model, and its text.
    pub tokens: [(u32, String); 2],
    /// The logarithms of the probabilities of both tokens by the first model, and by the second.
    pub log_probabilities: [[f64; 2]; 2],
}

/// What a prompt becomes with two models.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The two, in the order given.
    pub models: [ComparedModel; 2],
    /// Their first difference; none where one begins with all of the other.
    pub difference: Option<Difference>,
}

/// Compares two continuations of `prompt`, and asks both models about the first tokens that differ.
///
/// # Errors
/// Those of the networks.
pub fn compare<B: Backend + Decode>(
    generators: [&mut Generator<'_, '_, B>; 2],
    models: [ComparedModel; 2],
    prompt: &[u32],
    tokenizer: &Tokenizer,
    progress: &dyn Progress,
) -> Result<Comparison> {
    progress.check_stop()?;
    let [first, second] = &models;
    let mut pairs = first.generation.tokens.iter().zip(&second.generation.tokens);
    let same = pairs.position(|(a, b)| a.token != b.token);
    let Some(same_tokens) = same else { return Ok(Comparison { models, difference: None }) };
    let own = |model: &ComparedModel| model.generation.tokens[same_tokens].token;
    let tokens = [own(first), own(second)];
    let common = &first.generation.tokens[..same_tokens];
    let text: Vec<u32> =
        prompt.iter().copied().chain(common.iter().map(|token| token.token)).collect();
    let mut log_probabilities = [[0.0; 2]; 2];
    for (generator, own) in generators.into_iter().zip(&mut log_probabilities) {
        own.copy_from_slice(&generator.log_probabilities(text.clone(), &tokens)?);
    }
    let named =
        |token: u32| Ok::<_, crate::Error>((token, tokenizer.decode_with_special(&[token])?));
    let tokens = [named(tokens[0])?, named(tokens[1])?];
    let difference = Some(Difference { same_tokens, tokens, log_probabilities });
    Ok(Comparison { models, difference })
}
