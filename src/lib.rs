/*! `atom`: 4-bit LLM checkpoints by the Atom method, and the measurements that prove them.

The rooms follow the road of a weight (docs/architecture.md): `checkpoint` reads named tensors,
`model` runs a decoder block over them, `pipeline` carries calibration windows from block to block
and calls `quant` for the method, `backend` does the arithmetic, `checkpoint` writes the result,
`eval` measures it. `cli` and `report` are what a person sees; `doctor` says what the machine can do. */

pub mod backend;
pub mod bench;
pub mod card;
pub mod checkpoint;
pub mod cli;
mod decimal;
pub mod doctor;
pub mod error;
pub mod eval;
pub mod export;
pub mod hub;
pub mod machine;
pub mod model;
pub mod network;
pub mod pipeline;
pub mod printable;
pub mod progress;
pub mod quant;
pub mod ranks;
pub mod recipe;
pub mod report;
pub mod serve;
pub mod text;
pub mod units;

pub use error::{Error, Kind, Result};
