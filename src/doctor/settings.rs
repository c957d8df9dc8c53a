/*! What the environment says: the Hub's settings, and our own variables. */

use std::collections::BTreeMap;

use super::Check;
use crate::backend::cpu::isa;
use crate::backend::cuda::{NARROW_VARIABLE, NCCL_VARIABLE, compile, gpu, libraries};
use crate::hub::masked;
use crate::ranks;

/// Variables that the program reads, the first twelve, and those that its tests do.
const KNOWN: [&str; 18] = [
    isa::VARIABLE,
    "ATOM_DEVICE",
    libraries::VARIABLE,
    compile::CACHE_VARIABLE,
    gpu::TRACE_VARIABLE,
    NARROW_VARIABLE,
    NCCL_VARIABLE,
    ranks::RANK,
    ranks::RANKS,
    ranks::LOCAL_RANK,
    ranks::LOCAL_RANKS,
    ranks::MEET,
    "ATOM_BLESS",
    "ATOM_DATA",
    "ATOM_NVDISASM",
    "ATOM_SMOLLM2",
    "ATOM_TEST_PYTHON",
    "ATOM_TORCH",
];

/// The Hub's settings of which the value says something.
const HUB: [&str; 6] = [
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_ETAG_TIMEOUT",
    "HF_HUB_DOWNLOAD_TIMEOUT",
];
/// Settings that may hold a secret: only whether they are set is told.
const SECRET: [&str; 7] = [
    "HF_TOKEN",
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "ALL_PROXY",
    "all_proxy",
];

type Variables = BTreeMap<String, String>;

/// Variables that are set to something.
fn set() -> Variables {
    let all = std::env::vars_os().map(|(name, value)| {
        (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned())
    });
    all.filter(|(_, value)| !value.is_empty()).collect()
}

/// What the Hub's tools are told.
pub(super) fn hub() -> Check {
    hub_of(&set())
}

fn hub_of(set: &Variables) -> Check {
    let mut parts = Vec::new();
    for name in HUB {
        if let Some(value) = set.get(name) {
            let is_address = name == "HF_ENDPOINT";
            let shown = if is_address { masked(value) } else { value.clone() };
            parts.push(format!("{name}={shown}"));
        }
    }
    for name in SECRET {
        let is_set = set.contains_key(name);
        // A proxy is the exception; the token is what people wonder about.
        if is_set || name == "HF_TOKEN" {
            parts.push(format!("{name} is {}", if is_set { "set" } else { "not set" }));
        }
    }
    Check::ok("hub settings", parts.join(", "))
}

/// Our variables that are set, and those that look like ours and are not.
pub(super) fn variables() -> Vec<Check> {
    variables_of(&set())
}

fn variables_of(set: &Variables) -> Vec<Check> {
    const NAME: &str = "environment";
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for (name, value) in set {
        if KNOWN.contains(&name.as_str()) || name == "CUDA_VISIBLE_DEVICES" {
            known.push(format!("{name}={value}"));
        } else if name.starts_with("ATOM_") {
            unknown.push(name.as_str());
        }
    }
    let mut checks = vec![Check::ok(
        NAME,
        if known.is_empty() { "no variable of ours is set".to_owned() } else { known.join(", ") },
    )];
    if !unknown.is_empty() {
        checks.push(
            Check::note(NAME, format!("nothing reads {}", unknown.join(", ")))
                .hint(format!("the program's variables are {}", KNOWN[..12].join(", "))),
        );
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    fn set(pairs: &[(&str, &str)]) -> Variables {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// Names in constants and flags of a source file.
    fn names_in(path: &std::path::Path, names: &mut Vec<String>) {
        if path.is_dir() {
            fs_err::read_dir(path)
                .unwrap()
                .for_each(|entry| names_in(&entry.unwrap().path(), names));
            return;
        }
        if path.to_string_lossy().ends_with("_tests.rs") {
            return;
        }
        for line in fs_err::read_to_string(path).unwrap().lines() {
            for mark in ["&str = \"ATOM_", "env = \"ATOM_"] {
                let Some((_, rest)) = line.split_once(mark) else { continue };
                names.push(format!("ATOM_{}", rest.split('"').next().unwrap()));
            }
        }
    }

    #[test]
    fn every_variable_that_the_program_reads_is_known() {
        let mut names = Vec::new();
        names_in(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut names);
        assert!(names.iter().any(|name| name == isa::VARIABLE), "{names:?}");
        let unknown: Vec<&String> =
            names.iter().filter(|name| !KNOWN.contains(&name.as_str())).collect();
        assert!(unknown.is_empty(), "add to KNOWN: {unknown:?}");
    }

    #[test]
    fn secrets_are_never_shown() {
        let check = hub_of(&set(&[
            ("HF_TOKEN", "hf_secret"),
            ("HTTPS_PROXY", "http://me:secret@proxy:3128"),
            ("HF_ENDPOINT", "https://me:secret@mirror.example/hub"),
            ("HF_HOME", "/data/hf"),
        ]));
        assert!(!check.detail.contains("secret"), "{check:?}");
        assert_eq!(
            check.detail,
            "HF_HOME=/data/hf, HF_ENDPOINT=https://mirror.example/hub, HF_TOKEN is set, \
             HTTPS_PROXY is set"
        );
        assert_eq!(hub_of(&set(&[])).detail, "HF_TOKEN is not set");
        for wrong in ["me:secret@mirror.example", "https://me:se/cret?secret@mirror.example?secret"]
        {
            let check = hub_of(&set(&[("HF_ENDPOINT", wrong)]));
            assert!(!check.detail.contains("cret"), "{check:?}");
        }
    }

    #[test]
    fn variables_of_ours_are_listed_and_slips_noted() {
        let checks = variables_of(&set(&[
            ("ATOM_ISA", "portable"),
            ("ATOM_IAS", "a slip"),
            ("PATH", "/bin"),
        ]));
        assert_eq!(checks[0], Check::ok("environment", "ATOM_ISA=portable"));
        assert_eq!((checks[1].status, checks.len()), (Status::Note, 2));
        assert_eq!(checks[1].detail, "nothing reads ATOM_IAS");
        assert!(checks[1].hint.as_ref().unwrap().contains("ATOM_ISA, ATOM_DEVICE, ATOM_CUDA_LIB"));
        let none = variables_of(&set(&[("PATH", "/bin")]));
        assert_eq!(none, [Check::ok("environment", "no variable of ours is set")]);
    }
}
