/*! `atom inspect`: what a checkpoint holds; no weights are loaded. */

use clap::Args;

use super::{Output, Ui};
use crate::hub::Hub;
use crate::{Result, eval};

const EXAMPLES: &str = "\
Examples:
  atom inspect tiny-llama
  atom inspect ./SmolLM2-atom-w4a4-g128 --json";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Directory of a source or an Atom checkpoint, or the name of a model in the Hub's cache
    #[arg(value_name = "DIR")]
    directory: String,
}

pub(crate) fn run(arguments: &Arguments, ui: &Ui, output: &Output) -> Result<()> {
    let hub = Hub::cached("atom inspect", ui)?;
    output.write(&eval::inspect(&hub, &arguments.directory)?)
}
