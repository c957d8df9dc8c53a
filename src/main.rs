/*! The `atom` program: parse, run, say what went wrong, and exit with the code that means it. */

use std::ffi::OsString;
use std::process::ExitCode;

use atom::cli::{self, Cli, Output, Ui, failure};
use clap::Parser;

fn main() -> ExitCode {
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
