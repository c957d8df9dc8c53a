/*! The CUDA backend: kernels compiled at run time for the device at hand.

The program links to nothing of CUDA and runs where nothing of it is installed: every library is
opened when a CUDA device is asked for, and what is missing then is an error that says so. */

pub mod compile;
pub mod kernels;
pub mod libraries;
mod search;

/// Says that a test did not run, past the harness that would swallow it.
#[cfg(test)]
fn skipped(test: &str, why: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
