/*! Processes and GPUs that share a run: messages between them, and who owns what. */

mod chunks;
mod collectives;
mod threads;

pub use chunks::{CHUNKS, Chunks, Step};
pub use collectives::{Alone, Collectives};
pub use threads::{ThreadRank, thread_ranks};
