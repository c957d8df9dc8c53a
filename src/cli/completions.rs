/*! `atom completions`: a shell's completions, made from the one definition of the flags. */

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use serde::Serialize;

use super::{Cli, Output};
use crate::Result;
use crate::report::Report;

const EXAMPLES: &str = "\
Examples:
  atom completions bash > ~/.local/share/bash-completion/completions/atom
  atom completions zsh > ~/.zfunc/_atom
  atom completions fish > ~/.config/fish/completions/atom.fish

The directory must be there. zsh looks into ~/.zfunc if ~/.zshrc says `fpath+=~/.zfunc` before \
`compinit`.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Shell to complete in
    shell: Shell,
}

/// A script that a shell reads.
#[derive(Serialize)]
struct Script {
    shell: String,
    script: String,
}

impl Report for Script {
    fn text(&self) -> String {
        self.script.clone()
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Result<()> {
    output.write(&script(arguments.shell))
}

fn script(shell: Shell) -> Script {
    let mut bytes = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "atom", &mut bytes);
    let script = String::from_utf8(bytes).expect("clap writes UTF-8");
    Script { shell: shell.to_string(), script }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_shell_completes_every_subcommand_and_flag() {
        for shell in Shell::value_variants() {
            let script = script(*shell).script;
            for subcommand in Cli::command().get_subcommands() {
                assert!(script.contains(subcommand.get_name()), "{shell}: {subcommand}");
                for flag in subcommand.get_arguments().filter_map(clap::Arg::get_long) {
                    assert!(script.contains(flag), "{shell}: {subcommand} {flag}");
                }
            }
        }
    }
}
