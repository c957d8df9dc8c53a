/*! The `atom` program: parse, run, say what went wrong, and exit with the code that means it. */

use std::ffi::OsString;
use std::process::ExitCode;

use atom::cli::{self, Cli, Output, Ui, failure};
use atom::machine;
use clap::Parser;

/// Says so where memory runs out.
#[global_allocator]
static ALLOCATOR: machine::Allocator = machine::Allocator;

/// Runs before the standard library, which opens `/dev/null` for a stdout that is closed.
#[used]
#[unsafe(link_section = ".init_array")]
static NOTE_STDOUT: extern "C" fn() = machine::note_closed_stdout;

fn main() -> ExitCode {
    machine::keep_freed_memory();
    machine::guard();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return failure::show_usage(&error, &arguments),
    };
    let output = Output::new(cli.running.json);
    let ui = Ui::new(cli.running.quiet);
    match cli::run(&cli, &arguments, &ui, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui.close();
            failure::show(&error, &output)
        }
    }
}
