/*! Where tensors live and arithmetic runs. */

pub mod cpu;
