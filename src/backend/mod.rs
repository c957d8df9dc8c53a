/*! Where tensors live and arithmetic runs: narrow traits, named after the method's steps.

`model/` and `pipeline/` are written once against them. A backend is free in layout, precision of
intermediate floats and parallelism, but quantized arithmetic must follow the specification that the
CPU's integer path computes (docs/format.md), and results must not depend on the thread count. */

mod calibration;
pub mod cpu;
pub mod cuda;
mod decode;
mod exchange;
mod forward;
mod measurement;
mod memory;
mod quantization;
mod train;

pub use calibration::{AccumulatedError, Calibration, ErrorKind};
pub use decode::{Decode, DecodeStep, GreedyToken, SequenceStep};
pub use exchange::Exchange;
pub use forward::{AttentionSpec, Forward, Placement, Qkv};
pub use measurement::{Measurement, Prediction, Producer};
pub use memory::{Matrix, Memory, Tensor};
pub(crate) use quantization::output_error;
pub use quantization::{Damping, Quantization, Unquantized};
pub use train::{LinearGradient, SiteGradient, Train, TrainedLinear};

/// A device that does all of it.
pub trait Backend: Exchange + Measurement {}

impl<B: Exchange + Measurement> Backend for B {}
