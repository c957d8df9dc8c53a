/*! The CPU backend. */

pub mod integer;
pub mod isa;
pub mod quantize;
