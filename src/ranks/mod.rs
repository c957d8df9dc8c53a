/*! Processes and GPUs that share a run: how they start and find each other, messages between them, and who owns what. */

mod chunks;
mod collectives;
mod control;
mod frames;
mod launch;
mod place;
mod rendezvous;
mod tcp;
mod threads;

pub use chunks::{CHUNKS, Chunks, Step};
pub use collectives::{Alone, Collectives};
pub use launch::Launched;
pub use place::{LOCAL_RANK, LOCAL_RANKS, MEET, Place, RANK, RANKS, Variables};
pub use tcp::{TcpRanks, Unnoticed};
pub use threads::{ThreadRank, thread_ranks};
