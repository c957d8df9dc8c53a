/*! The CPU backend. */

pub mod gemm;
mod gemm_kernels;
mod gemm_pack;
pub mod isa;
