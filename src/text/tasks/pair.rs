/*! A choice -> ids, cut as lm-evaluation-harness cuts them: white space at the context's end belongs to the
continuation, both are tokenized as one text, and the continuation is what follows as many ids as the context
alone has. */

use super::Choice;
use super::python_text::is_space;
use crate::progress::Progress;
use crate::text::Tokenizer;
use crate::{Error, Result};

/// Ids of context and continuation, of which the last are scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoredText {
    /// All ids.
    pub tokens: Vec<u32>,
    /// The number of the continuation's ids at the end; at least one, and not all.
    pub scored: usize,
}

impl Choice {
    /// The ids for a model of `positions` positions. A longer text loses its first ids. A model reads all but the
    /// last id, so one more than its positions remain.
    ///
    /// # Errors
    /// If context or continuation have no ids, the continuation alone is longer than the model's positions, or the user
    /// asked the run to stop.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        positions: usize,
        progress: &dyn Progress,
    ) -> Result<ScoredText> {
        let context = self.context.trim_end_matches(is_space);
        let before = tokenizer.encode(context, progress)?.len();
        let text = format!("{}{}", self.context, self.continuation);
        let mut tokens = tokenizer.encode(&text, progress)?;
        let scored = tokens.len().saturating_sub(before);
        if before == 0 || scored == 0 {
            let which = if before == 0 { "context" } else { "continuation" };
            return Err(Error::input(format!("a {which} has no tokens: {self:?}")));
        }
        if scored > positions {
            return Err(Error::input(format!(
                "a continuation has {scored} tokens, but the model has {positions} positions"
            )));
        }
        tokens.drain(..tokens.len().saturating_sub(positions + 1));
        Ok(ScoredText { tokens, scored })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    fn tokenizer() -> Tokenizer {
        let file = include_bytes!("../../../models/tiny-llama/tokenizer.json");
        Tokenizer::from_bytes(file, "tiny-llama").unwrap()
    }

    fn choice(context: &str, continuation: &str) -> Choice {
        let (context, continuation) = (context.to_owned(), continuation.to_owned());
        Choice { context, continuation, characters: 1 }
    }

    #[test]
    fn the_contexts_white_space_is_scored_with_the_continuation() {
        let tokenizer = tokenizer();
        let plain = choice("The river", " runs north").encode(&tokenizer, 100, &Silent).unwrap();
        assert_eq!(
            choice("The river ", "runs north").encode(&tokenizer, 100, &Silent).unwrap(),
            plain
        );
        assert_eq!(plain.tokens, tokenizer.encode("The river runs north", &Silent).unwrap());
        let before = tokenizer.encode("The river", &Silent).unwrap().len();
        assert_eq!(plain.scored, plain.tokens.len() - before);
    }

    #[test]
    fn a_long_text_loses_its_beginning() {
        let tokenizer = tokenizer();
        let full = choice("The river runs through the", " valley")
            .encode(&tokenizer, 100, &Silent)
            .unwrap();
        let positions = full.tokens.len() - 3;
        let cut =
            choice("The river runs through the", " valley").encode(&tokenizer, positions, &Silent);
        let cut = cut.unwrap();
        assert_eq!((&cut.tokens[..], cut.scored), (&full.tokens[2..], full.scored));
        let error = choice("The", " river runs through the valley").encode(&tokenizer, 2, &Silent);
        assert!(error.unwrap_err().message().ends_with("but the model has 2 positions"));
    }

    #[test]
    fn nothing_cannot_be_scored() {
        let tokenizer = tokenizer();
        let error = choice("The river", "").encode(&tokenizer, 100, &Silent).unwrap_err();
        assert!(error.message().starts_with("a continuation has no tokens"), "{error}");
    }
}
