//! A conversation: line after line of stdin, over one cache.

use super::super::lines::Lines;
use super::{Session, interrupted};
use crate::Result;
use crate::backend::{Backend, Decode};
use crate::serve::{Finish, Generator, Message, Role};

impl Session<'_> {
    /// Continues line after line of stdin.
    pub(super) fn converse<B: Backend + Decode>(&self, backend: &B) -> Result<()> {
        let first = self.text()?;
        let prompt = first.as_deref().map(|text| self.opening(text)).transpose()?;
        let longest = self.longest(prompt.map_or(0, |prompt| prompt.len()))?;
        let decoder = self.load(backend, self.model, longest)?;
        let mut generator =
            Generator::new(&decoder, &self.tokenizer, self.settings.clone(), longest)?;
        let lines = Lines::new()?;
        let mut messages = Vec::new();
        let mut next = first;
        loop {
            let line = match next.take() {
                Some(text) => text,
                None => match lines.next(self.ui)? {
                    Some(line) => line,
                    None => return Ok(()),
                },
            };
            let prompt = self.turn(&generator, &mut messages, &line)?;
            if prompt.is_empty() {
                continue;
            }
            let generation = self.generate(&mut generator, prompt)?;
            self.tell(&decoder, &generation);
            interrupted(generation.finish)?;
            if generation.finish == Finish::Unread {
                return Ok(());
            }
            messages.push(Message { role: Role::Assistant, content: generation.text });
        }
    }

    /// The tokens of the conversation with one more line.
    fn turn<B: Backend + Decode>(
        &self,
        generator: &Generator<'_, '_, B>,
        messages: &mut Vec<Message>,
        line: &str,
    ) -> Result<Vec<u32>> {
        if messages.is_empty() {
            *messages = self.messages(line);
        } else {
            messages.push(Message { role: Role::User, content: line.to_owned() });
        }
        if self.template.is_some() {
            return self.messages_tokens(messages);
        }
        if generator.tokens().is_empty() {
            return self.opening(line);
        }
        let more = self.tokenizer.encode_as_it_is(line, self.ui)?;
        Ok([generator.tokens(), &more].concat())
    }
}
