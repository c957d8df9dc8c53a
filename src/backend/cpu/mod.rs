/*! The CPU backend. */

pub mod attention;
pub mod elementwise;
pub mod gemm;
mod gemm_kernels;
mod gemm_pack;
pub mod gram;
pub mod isa;
