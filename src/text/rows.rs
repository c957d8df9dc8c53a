/*! Rows of a data file as JSON objects: Parquet, and JSON with one object a line, plain or in gzip. */

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value};

use crate::{Error, Result};

/// How a file holds its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Columns.
    Parquet,
    /// One JSON object a line.
    Lines,
    /// Anything else: text as it is.
    Plain,
}

impl Form {
    /// By the name, `.gz` left aside. C4's own files are called `.json` and hold one object a line.
    pub(super) fn of(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let name = name.strip_suffix(".gz").unwrap_or(&name);
        match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("parquet") => Self::Parquet,
            Some("jsonl" | "json") => Self::Lines,
            _ => Self::Plain,
        }
    }
}

/// All rows of a `.parquet`, `.jsonl` or `.json` file, the latter two also as `.gz`. Structs are
/// objects, lists arrays, and what is absent is null.
///
/// # Errors
/// If the file cannot be read, its name does not say that it holds rows, or a row is none.
pub fn rows(path: &Path) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    each_row(path, |_, row| {
        rows.push(row);
        Ok(())
    })?;
    Ok(rows)
}

/// Calls `take` with each row in turn, and before it where it stands: `line 3`, `row 3`.
pub(super) fn each_row(path: &Path, mut take: impl FnMut(&str, Value) -> Result<()>) -> Result<()> {
    match Form::of(path) {
        Form::Parquet => each_parquet_row(path, take),
        Form::Lines => {
            let mut lines = BufReader::with_capacity(1 << 20, open(path)?);
            let mut line = Vec::new();
            let mut number = 0;
            while read_line(&mut lines, &mut line, path)? {
                number += 1;
                let place = format!("line {number}");
                let row = parse(&line).map_err(|what| {
                    Error::input(format!("{}, {place}{what}", path.display())).hint(LINES)
                })?;
                take(&place, row)?;
            }
            Ok(())
        }
        Form::Plain => Err(Error::input(format!("{} holds no rows", path.display()))
            .hint("give a file whose name ends in .parquet, .jsonl, .json or .json.gz")),
    }
}

const LINES: &str = "every line must be a JSON object, like {\"text\": \"...\"}";

/// The next line without its end, or false at the end of the file.
fn read_line(lines: &mut impl BufRead, line: &mut Vec<u8>, path: &Path) -> Result<bool> {
    line.clear();
    let count = lines.read_until(b'\n', line).map_err(|error| unreadable(path, &error))?;
    while line.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        line.pop();
    }
    Ok(count > 0)
}

/// A line as a JSON object, or what is wrong with it.
fn parse(line: &[u8]) -> Result<Value, String> {
    let text = str::from_utf8(line).map_err(|error| {
        format!(" is not UTF-8 text: the byte at offset {} is not valid", error.valid_up_to())
    })?;
    let row: Value = serde_json::from_str(text).map_err(|error| {
        let cause = error.to_string();
        // The parser saw one line only; its "at line 1" would contradict ours.
        let cause = cause.rsplit_once(" at line ").map_or(cause.as_str(), |(what, _)| what);
        format!(": {cause} (at column {})", error.column())
    })?;
    if row.is_object() { Ok(row) } else { Err(": it is no JSON object".to_owned()) }
}

/// The file's content, out of its gzip if it has one.
pub(super) fn open(path: &Path) -> Result<Box<dyn Read>> {
    let file = fs_err::File::open(path)?;
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gz")) {
        Ok(Box::new(MultiGzDecoder::new(BufReader::with_capacity(1 << 20, file))))
    } else {
        Ok(Box::new(file))
    }
}

/// An error while the content of a file is read.
pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::input(error.to_string())
        .context(format!("{} cannot be read", path.display()))
        .hint("the file may be cut or damaged: fetch it again")
}

fn each_parquet_row(path: &Path, mut take: impl FnMut(&str, Value) -> Result<()>) -> Result<()> {
    let damaged = |error: parquet::errors::ParquetError| {
        let cause = error.to_string();
        let hint = if cause.contains("Disabled feature") {
            "write it with snappy compression, or as JSONL: other compressions are not read"
        } else {
            "the file may be cut or damaged: fetch it again"
        };
        let whence = format!("{} cannot be read as Parquet", path.display());
        Error::input(cause).context(whence).hint(hint)
    };
    let file: File = fs_err::File::open(path)?.into_parts().0;
    let reader = SerializedFileReader::new(file).map_err(damaged)?;
    for (index, row) in reader.get_row_iter(None).map_err(damaged)?.enumerate() {
        take(&format!("row {}", index + 1), object(&row.map_err(damaged)?))?;
    }
    Ok(())
}

fn object(row: &Row) -> Value {
    row.get_column_iter()
        .map(|(name, field)| (name.clone(), value(field)))
        .collect::<Map<_, _>>()
        .into()
}

/// A field in JSON. Bytes that are no text become null, and so do numbers that JSON cannot write:
/// no data set that is read here has either.
fn value(field: &Field) -> Value {
    let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(truth) => (*truth).into(),
        Field::Byte(number) => (*number).into(),
        Field::Short(number) => (*number).into(),
        Field::Int(number) | Field::Date(number) | Field::TimeMillis(number) => (*number).into(),
        Field::Long(number)
        | Field::TimeMicros(number)
        | Field::TimestampMillis(number)
        | Field::TimestampMicros(number) => (*number).into(),
        Field::UByte(number) => (*number).into(),
        Field::UShort(number) => (*number).into(),
        Field::UInt(number) => (*number).into(),
        Field::ULong(number) => (*number).into(),
        Field::Float16(number) => float(number.to_f64()),
        Field::Float(number) => float(f64::from(*number)),
        Field::Double(number) => float(*number),
        Field::Decimal(_) => field.to_string().into(),
        Field::Str(text) => text.clone().into(),
        Field::Bytes(bytes) => bytes.as_utf8().map_or(Value::Null, Into::into),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect::<Vec<_>>().into(),
        Field::MapInternal(map) => {
            let key = |field: &Field| match field {
                Field::Str(text) => text.clone(),
                other => other.to_string(),
            };
            let entries = map.entries().iter();
            entries.map(|(name, field)| (key(name), value(field))).collect::<Map<_, _>>().into()
        }
    }
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
        let error = rows(&data("zstd.parquet")).unwrap_err();
        assert!(error.message().ends_with("zstd.parquet cannot be read as Parquet"), "{error}");
        assert!(error.hint_text().unwrap().contains("snappy"), "{error}");
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
