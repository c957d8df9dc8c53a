/*! The method, as functions on slices and matrices: number formats, channel order, group scales,
rounding, GPTQ and bit allocation. It does not depend on files, devices or families of models. */

pub mod allocation;
pub mod codebook;
pub mod float;
pub mod gptq;
pub mod grid;
pub mod hadamard;
pub mod kv;
pub mod linear;
pub mod number;
pub mod order;
pub mod ranges;
pub mod rows;
pub mod scale;
pub mod site;
pub mod weights;
