/*! `atom man`: manual pages, made from the one definition of the flags. */

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};
use serde::Serialize;

use super::args::OverwriteFlag;
use super::{Cli, Output};
use crate::checkpoint::{FileKind, Inputs, OutputFile};
use crate::report::Report;
use crate::{Error, Kind, Result};

const EXAMPLES: &str = "\
Examples:
  atom man | man -l -
  atom man bench gemm | man -l -
  atom man --out ~/.local/share/man/man1";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Subcommand whose page is printed, such as `quantize` or `bench gemm`; none for that of atom
    #[arg(value_name = "COMMAND", conflicts_with = "out")]
    command: Vec<String>,
    /// Write every page into this directory, a file a subcommand, instead of printing one
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    out: Option<PathBuf>,
    #[command(flatten)]
    overwrite: OverwriteFlag,
}

/// What `--out` writes.
const PAGE: FileKind = FileKind { name: "a manual page of atom", recognizes: is_page };

fn is_page(path: &Path) -> bool {
    let mut head = Vec::new();
    let read = fs_err::File::open(path).and_then(|file| file.take(256).read_to_end(&mut head));
    read.is_ok() && String::from_utf8_lossy(&head).contains(".TH atom")
}

/// A page, as `man` reads it.
#[derive(Serialize)]
struct Page {
    name: String,
    page: String,
}

impl Report for Page {
    fn text(&self) -> String {
        self.page.clone()
    }
}

/// The pages that were written.
#[derive(Serialize)]
struct Written {
    pages: Vec<PathBuf>,
}

impl Report for Written {
    fn text(&self) -> String {
        self.pages.iter().map(|path| format!("{}\n", path.display())).collect()
    }
}

pub(crate) fn run(arguments: &Arguments, output: &Output) -> Result<()> {
    let mut root = Cli::command();
    root.build();
    if let Some(directory) = &arguments.out {
        let mut pages = Vec::new();
        fs_err::create_dir_all(directory)?;
        let overwrite = arguments.overwrite.overwrite;
        let checked = all(&root)?.into_iter().map(|page| {
            let path = directory.join(&page.name);
            let file = OutputFile::check(&path, &PAGE, overwrite, Inputs::default())?;
            Ok((path, file, page.page))
        });
        for (path, file, page) in checked.collect::<Result<Vec<_>>>()? {
            file.write(page.as_bytes())?;
            pages.push(path);
        }
        return output.write(&Written { pages });
    }
    let mut command = &root;
    for word in &arguments.command {
        command = command.find_subcommand(word).ok_or_else(|| {
            let shown = arguments.command.join(" ");
            Error::usage(format!("there is no subcommand `{shown}`"))
                .hint("`atom --help` lists the subcommands")
        })?;
    }
    output.write(&page(command)?)
}

/// The pages of a command and of all below it.
fn all(command: &clap::Command) -> Result<Vec<Page>> {
    let mut pages = vec![page(command)?];
    for subcommand in command.get_subcommands() {
        pages.extend(all(subcommand)?);
    }
    Ok(pages)
}

/// clap's sections, and what its help ends with as it stands there.
fn page(command: &clap::Command) -> Result<Page> {
    // The usage as --help has it: every flag in one line is what nobody reads.
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim().to_owned();
    let man = Man::new(command.clone().override_usage(usage))
        .source(concat!("atom ", env!("CARGO_PKG_VERSION")));
    let mut bytes = Vec::new();
    man.render_title(&mut bytes)?;
    man.render_name_section(&mut bytes)?;
    man.render_synopsis_section(&mut bytes)?;
    man.render_description_section(&mut bytes)?;
    man.render_options_section(&mut bytes)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut bytes)?;
    }
    if let Some(text) = command.get_after_help() {
        after(&text.to_string()).to_writer(&mut bytes)?;
    }
    let page = String::from_utf8(bytes).map_err(|error| Error::of(Kind::Machine, error))?;
    Ok(Page { name: man.get_filename(), page })
}

/// Examples keep their lines; a paragraph is filled by `man`.
fn after(text: &str) -> Roff {
    let mut roff = Roff::default();
    for paragraph in text.split("\n\n") {
        match paragraph.strip_prefix("Examples:\n") {
            Some(examples) => {
                roff.control("SH", ["EXAMPLES"]);
                roff.control("nf", []);
                examples.lines().for_each(|line| {
                    roff.text([roman(line.trim())]);
                });
                roff.control("fi", []);
            }
            None => {
                roff.control("SH", ["NOTES"]);
                roff.text([roman(paragraph)]);
            }
        }
    }
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_its_flags_and_examples() {
        let mut root = Cli::command();
        root.build();
        let pages = all(&root).unwrap();
        let names: Vec<&str> = pages.iter().map(|page| page.name.as_str()).collect();
        assert_eq!(names[0], "atom.1");
        assert!(names.contains(&"atom-bench-gemm.1"), "{names:?}");
        let mut distinct = names.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
        let quantize = &pages.iter().find(|page| page.name == "atom-quantize.1").unwrap().page;
        for part in [
            ".SH EXAMPLES\n.nf\natom quantize \\-\\-model",
            "\\fB\\-\\-seq\\-len\\fR",
            "ATOM_DEVICE",
            ".TH",
            "\\fBatom quantize\\fR [OPTIONS] \\-\\-model <MODEL>\n",
        ] {
            assert!(quantize.contains(part), "no {part} in\n{quantize}");
        }
    }
}
