/*! The method, as functions on slices and matrices. */

pub mod hadamard;
pub mod linear;
pub mod rows;
pub mod site;
