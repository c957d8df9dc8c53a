//! The rooms import downwards only. The order of layers is that of the design: a room imports rooms of lower layers and
//! none of its own, so that no two import each other. Code of tests, which joins rooms to try them, is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Rooms by layer, the lowest first.
const LAYERS: [&[&str]; 13] = [
    &["error"],
    &["decimal", "printable", "progress", "units"],
    &["machine", "quant", "ranks"],
    &["recipe"],
    &["checkpoint"],
    &["card", "hub"],
    &["backend", "text"],
    &["model"],
    &["network"],
    &["eval", "export", "pipeline", "serve"],
    &["bench", "doctor"],
    &["report"],
    &["cli"],
];

/// Names that `crate::` reaches without a room.
const ROOT: [&str; 3] = ["Error", "Kind", "Result"];

type Imports = BTreeMap<(String, String), PathBuf>;

fn layer(room: &str) -> Option<usize> {
    LAYERS.iter().position(|rooms| rooms.contains(&room))
}

/// The code of a file without comments and without the modules of its tests, which stand last.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let mut code = lines.collect::<Vec<_>>().join("\n");
    while let Some(start) = code.find("/*") {
        let end = code[start..].find("*/").map_or(code.len(), |end| start + end + 2);
        code.replace_range(start..end, "");
    }
    code
}

/// The first names of all paths that begin with `crate::`, groups in braces included.
fn rooms_used(code: &str) -> BTreeSet<String> {
    let mut rooms = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = code[at + "crate::".len()..].trim_start();
        let names = match rest.strip_prefix('{') {
            Some(group) => top_level(group),
            None => vec![rest],
        };
        for name in names {
            let name = name.trim_start();
            let end = name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len());
            if !name[..end].is_empty() && !ROOT.contains(&&name[..end]) {
                rooms.insert(name[..end].to_owned());
            }
        }
    }
    rooms
}

/// The parts of a group of imports, which ends at its closing brace.
fn top_level(group: &str) -> Vec<&str> {
    let (mut depth, mut first, mut parts) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                parts.push(&group[first..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&group[first..at]);
                first = at + 1;
            }
            _ => {}
        }
    }
    parts
}

/// Files of code below `directory`, without those of tests.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs_err::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "tests" {
            all.extend(files(&path));
        } else if name.ends_with(".rs") && name != "tests.rs" && !name.ends_with("_tests.rs") {
            all.push(path);
        }
    }
    all
}

fn imports() -> Imports {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut imports = Imports::new();
    for path in files(&src) {
        let inside = path.strip_prefix(&src).unwrap();
        let first = inside.iter().next().unwrap().to_string_lossy();
        let room = first.trim_end_matches(".rs");
        if ["lib", "main"].contains(&room) {
            continue;
        }
        for other in rooms_used(&code(&fs_err::read_to_string(&path).unwrap())) {
            if other != room {
                imports.entry((room.to_owned(), other)).or_insert_with(|| inside.to_owned());
            }
        }
    }
    imports
}

/// What is wrong with some imports, a sentence each.
fn faults(imports: &Imports) -> Vec<String> {
    let mut faults = Vec::new();
    for ((room, other), file) in imports {
        let file = file.display();
        match (layer(room), layer(other)) {
            (None, _) => faults.push(format!("{room} has no layer ({file})")),
            (_, None) => faults.push(format!("{other} has no layer ({file})")),
            (Some(own), Some(its)) if own <= its => {
                faults.push(format!("{room} imports {other}, which is not below it ({file})"));
            }
            _ => {}
        }
    }
    faults
}

#[test]
fn rooms_import_downwards() {
    let imports = imports();
    assert!(imports.len() > 60, "{imports:?}");
    assert_eq!(faults(&imports), Vec::<String>::new());
}

#[test]
fn a_wrong_import_is_found() {
    let file = |text: &str, room: &str| -> Imports {
        let used = rooms_used(&code(text)).into_iter();
        used.map(|other| ((room.to_owned(), other), PathBuf::from("x.rs"))).collect()
    };
    let upwards = file("use crate::{Error,\n    quant::{a, b}, report};\n", "quant");
    let found = faults(&upwards.into_iter().filter(|((a, b), _)| a != b).collect());
    assert_eq!(found, ["quant imports report, which is not below it (x.rs)"]);
    let path = file("fn f() { crate::cli::run() }", "text");
    assert_eq!(faults(&path), ["text imports cli, which is not below it (x.rs)"]);
    let mut both = file("use crate::machine::a;", "quant");
    both.extend(file("use crate::quant::b;", "machine"));
    assert_eq!(faults(&both).len(), 2, "{:?}", faults(&both));
    let same_layer = file("use crate::pipeline::plan;", "eval");
    assert_eq!(faults(&same_layer), ["eval imports pipeline, which is not below it (x.rs)"]);
    assert_eq!(faults(&file("use crate::cellar;", "text")), ["cellar has no layer (x.rs)"]);
    // Comments and tests are no imports, and neither are the errors at the root.
    let none = "// crate::cli\n/* crate::cli */\nuse crate::Result;\n#[cfg(test)]\nmod tests {\n    use crate::cli;\n}\n";
    assert!(file(none, "text").is_empty());
    assert!(faults(&file("use crate::network::b;", "eval")).is_empty());
}
