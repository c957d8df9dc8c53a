//! The version that `atom --version` prints: the package's, with the commit that was checked out and its date.
//! Outside a checkout of this repository, as in a source archive, it is the package's alone.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let package = env::var("CARGO_PKG_VERSION").expect("cargo sets it");
    let version = match commit() {
        // No date of the build: the same commit gives the same program.
        Some(commit) => format!("{package} ({commit})"),
        None => package,
    };
    println!("cargo::rustc-env=ATOM_VERSION={version}");
}

/// The commit's short hash and date, `32b4e57 2026-11-30`.
fn commit() -> Option<String> {
    let root = env::var("CARGO_MANIFEST_DIR").ok()?;
    // A checkout of another repository, in which this package lies, says nothing of it.
    let top = git(&["rev-parse", "--show-toplevel"])?;
    if Path::new(&top).canonicalize().ok()? != Path::new(&root).canonicalize().ok()? {
        return None;
    }
    // Both change with the commit that is checked out, and at no other time. A path that does not exist would make cargo
    // run this again on every build.
    for file in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", file])?;
        if Path::new(&root).join(&path).is_file() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    git(&["log", "-1", "--no-show-signature", "--abbrev=9", "--date=short", "--format=%h %cd"])
}

/// The first line that git prints; none without git, or where it fails.
fn git(words: &[&str]) -> Option<String> {
    let output = Command::new("git").args(words).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.to_owned();
    (output.status.success() && !line.is_empty()).then_some(line)
}
