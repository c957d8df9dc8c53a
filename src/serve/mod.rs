/*! Tokens out of a network that decodes: sequences in a queue, pages of the cache, steps, and the choice of each token.

A [`Scheduler`] joins sequences in steps (continuous batching): newcomers' prompts pass the network together with one token
of each sequence that is being decoded. A [`Sampler`] chooses tokens by logits, with random numbers of its sequence alone,
so that what shares a step changes no token. A [`Generator`] holds one conversation with a person, [`compare()`] asks two
models that continue the same prompt. */

mod chat;
mod compare;
mod generate;
mod own_text;
mod pages;
mod sampling;
mod scheduler;
mod sequence;
mod settings;

pub use chat::{ChatTemplate, Message, Role};
pub use compare::{ComparedModel, Comparison, Difference, compare};
pub use generate::{Finish, GeneratedToken, Generation, GenerationSettings, Generator, decoder};
pub use own_text::OwnText;
pub use pages::Pages;
pub use sampling::{Choice, Sampler, Sampling};
pub use scheduler::{Limits, Scheduler};
pub use sequence::{End, Produced, Request, SequenceId};
pub use settings::stop_tokens;
