/*! The method, as functions on slices and matrices. */

pub mod hadamard;
pub mod kv;
pub mod linear;
pub mod rows;
