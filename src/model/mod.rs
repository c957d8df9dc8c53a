/*! Networks: `config.json` -> architecture, its sites, and the forward pass of a block. */

pub mod architecture;
pub mod attention;
pub mod backward;
pub mod block;
mod bounds;
mod class;
mod config;
pub mod experts;
mod families;
mod parts;
mod planned;
mod quantized;
mod reads;
#[cfg(test)]
mod reference_tests;
pub mod rope;
mod rope_settings;
mod site;
pub mod sites;
mod support;
mod window;

pub use architecture::Architecture;
pub use attention::AttentionSpecs;
pub use planned::{check_plan, read_manifest};
