/*! Rows of a data file as JSON objects: Parquet, CSV, and JSON with one object a line, the latter two also in gzip. */

use std::ops::ControlFlow;
use std::path::Path;

use serde_json::Value;

use super::csv_rows::each_csv_row;
use super::file::DataPath;
use super::parquet_rows::each_parquet_row;
use crate::progress::Silent;
use crate::{Error, Result};

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileFormat {
    /// Parquet.
    Parquet,
    /// One JSON object a line.
    Lines,
    /// A header and rows of fields, separated by this byte.
    Separated(u8),
    /// Anything else: plain text.
    Plain,
}

impl FileFormat {
    /// The format by the name without `.gz`. C4's own files are called `.json` and hold one object a line.
    pub(super) fn of(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let name = name.strip_suffix(".gz").unwrap_or(&name);
        match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("parquet") => Self::Parquet,
            Some("jsonl" | "json") => Self::Lines,
            Some("csv") => Self::Separated(b','),
            Some("tsv") => Self::Separated(b'\t'),
            _ => Self::Plain,
        }
    }
}

/// Takes the place of a row (`line 3`, `row 3`) and the row. Breaks when it needs no more.
pub(super) type Take<'t> = &'t mut dyn FnMut(&str, Value) -> Result<ControlFlow<()>>;

/// All rows of a file, as [`each_row`] reads them.
///
/// # Errors
/// If the file cannot be read, its name is not that of a file of rows, or a row is not valid.
pub fn rows(path: &Path) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    each_row(&DataPath::open(path, &Silent)?, None, &mut |_, row| {
        rows.push(row);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(rows)
}

/// Calls `take` with each row of a `.parquet`, `.jsonl`, `.json`, `.csv` or `.tsv` file until it breaks; all but
/// Parquet also as `.gz`. Structs are objects, lists are arrays, absent values are null, and fields of CSV are strings.
/// Of Parquet only `columns` are read, if given.
///
/// # Errors
/// If the file cannot be read, its name is not that of a file of rows, or a row is not valid.
pub(super) fn each_row(data: &DataPath, columns: Option<&[&str]>, take: Take<'_>) -> Result<()> {
    match FileFormat::of(data.path()) {
        FileFormat::Parquet => each_parquet_row(data, columns, take),
        FileFormat::Separated(separator) => each_csv_row(data, separator, take),
        FileFormat::Lines => each_json_row(data, take),
        FileFormat::Plain => Err(Error::input(format!("{} holds no rows", data.path().display()))
            .hint("give a file whose name ends in .parquet, .jsonl, .json, .json.gz or .csv")),
    }
}

fn each_json_row(data: &DataPath, take: Take<'_>) -> Result<()> {
    let mut lines = data.lines()?;
    while let Some((number, line)) = lines.next()? {
        let line = line.trim_end_matches(['\n', '\r']);
        if line.trim().is_empty() {
            continue;
        }
        let place = format!("line {number}");
        let row = parse(line).map_err(|what| {
            Error::input(format!("{}, {place}: {what}", data.path().display()))
                .hint("every line must be a JSON object, like {\"text\": \"...\"}")
        })?;
        if take(&place, row)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// A line as a JSON object, or what is wrong with it.
fn parse(line: &str) -> Result<Value, String> {
    let row: Value = serde_json::from_str(line).map_err(|error| {
        let cause = error.to_string();
        // The parser sees one line only, so its "at line 1" would contradict our line number.
        let cause = cause.rsplit_once(" at line ").map_or(cause.as_str(), |(what, _)| what);
        format!("{cause} (at column {})", error.column())
    })?;
    if row.is_object() { Ok(row) } else { Err("it is no JSON object".to_owned()) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn data(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
    }

    #[test]
    fn a_parquet_file_of_another_program_is_read_with_all_its_nesting() {
        let expected = [
            json!({"id": 1, "text": " = Title = \n", "choices": {"label": ["A", "B"], "text": ["caf\u{e9}", ""]},
                "score": 0.5, "ok": true, "deep": [[1, 2], []]}),
            json!({"id": -2, "text": "", "choices": {"label": [], "text": []},
                "score": null, "ok": false, "deep": []}),
            json!({"id": 3, "text": "third", "choices": null, "score": -1.25, "ok": null, "deep": null}),
        ];
        assert_eq!(rows(&data("rows.parquet")).unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        assert!(!rows(&data("zstd.parquet")).unwrap().is_empty());
        let directory = tempfile::tempdir().unwrap();
        for (name, content, message) in [
            ("cut.parquet", "PAR1", "cut.parquet cannot be read as Parquet"),
            ("a.txt", "text", "a.txt holds no rows"),
            ("a.jsonl", "{}\n[1]\n", "a.jsonl, line 2: it is no JSON object"),
        ] {
            let path = directory.path().join(name);
            fs_err::write(&path, content).unwrap();
            let error = rows(&path).unwrap_err();
            assert!(error.message().ends_with(message), "{error}");
            assert!(error.hint_text().is_some());
        }
    }
}
