/*! Rows of a CSV file as JSON objects: its first row names the columns. */

use std::cell::Cell;
use std::io::{BufRead, BufReader, Read};
use std::rc::Rc;

use serde_json::{Map, Value};

use super::file::{DataPath, LINE_BYTES, unreadable};
use super::rows::Take;
use crate::{Error, Result};

/// Calls `take` with each row, its fields as strings.
pub(super) fn each_csv_row(data: &DataPath, separator: u8, take: Take<'_>) -> Result<()> {
    let path = data.path();
    let mut content = BufReader::with_capacity(1 << 16, data.content()?);
    let begin = content.fill_buf().map_err(|error| unreadable(path, &error))?;
    let mark = data.after_mark(begin)?;
    content.consume(mark);
    let left = Rc::new(Cell::new(LINE_BYTES));
    let content = Limited { content, left: Rc::clone(&left) };
    let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(content);
    let wrong = |error: csv::Error| {
        let line = error.position().map_or(1, csv::Position::line);
        let what = match error.kind() {
            csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                format!("it has {len} fields, but the first row names {expected_len} columns")
            }
            csv::ErrorKind::Utf8 { .. } => "it is not UTF-8 text".to_owned(),
            csv::ErrorKind::Io(error) => return unreadable(path, error),
            _ => error.to_string(),
        };
        Error::input(format!("{}, line {line}: {what}", path.display()))
            .hint("put fields with a separator, a quote or a line end in double quotes")
    };
    let names: Vec<String> =
        reader.headers().map_err(wrong)?.iter().map(|name| name.trim().to_owned()).collect();
    let mut record = csv::StringRecord::new();
    loop {
        left.set(LINE_BYTES);
        if !reader.read_record(&mut record).map_err(wrong)? {
            return Ok(());
        }
        let line = record.position().map_or(1, csv::Position::line);
        let fields = names.iter().cloned().zip(record.iter().map(Value::from));
        let row = Value::Object(fields.collect::<Map<_, _>>());
        if take(&format!("line {line}"), row)?.is_break() {
            return Ok(());
        }
    }
}

/// Reads at most `left` bytes: a quote that is never closed would make the rest of the file one field.
struct Limited<R> {
    content: R,
    left: Rc<Cell<usize>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.content.read(buffer)?;
        let left = self.left.get().checked_sub(count).ok_or_else(|| {
            std::io::Error::other(format!(
                "a row is longer than {} MB: is a quote not closed?",
                LINE_BYTES >> 20
            ))
        })?;
        self.left.set(left);
        Ok(count)
    }
}
