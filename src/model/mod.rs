/*! Networks: `config.json` -> architecture, its sites, and the forward pass of a block. */

pub mod architecture;
pub mod block;
pub mod experts;
pub mod sites;

pub use architecture::Architecture;
