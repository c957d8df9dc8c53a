/*! The stages and their order: calibrate, plan, pack, block by block.

Two streams of hidden states travel with the weights: one through the original blocks, on which
channel energies (and sensitivities, where they are asked for) are measured, and one through the
quantized blocks, on which GPTQ's Hessians are. Memory is one block and the
streams, never the model. */

mod agreement;
pub mod allocate;
pub mod allocated;
mod block_loop;
mod calibrate;
mod calibration;
pub mod channels;
pub mod distill;
mod division;
mod energies;
mod exponents;
mod fallbacks;
#[cfg(test)]
mod fused_tests;
mod job;
mod memory;
pub mod outcome;
mod output;
mod pack;
mod parts;
pub mod plan;
mod planning;
mod prepare;
mod quantize;
mod quantizer;
#[cfg(test)]
mod ranks_tests;
#[cfg(test)]
mod resume_tests;
mod run;
pub mod sensitivity;
mod sensor;
mod strategy;
mod timing;
mod underflow;
mod writing;

pub use calibrate::{Measuring, calibrate};
pub use calibration::{CALIBRATION_FILE, CalibrationData};
pub use energies::{Energies, Statistics};
pub use output::Output;
pub use pack::{Packing, pack};
pub use planning::{Planning, plan};
pub use prepare::Calibration;
pub use quantize::{Quantization, dry_run, quantize, quantize_to_target};
