/*! Rows of a Parquet file as JSON objects. */

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::file::DataPath;
use super::guarded::{Allowance, Watched};
use super::rows::Take;
use crate::{Error, Result};

/// What the library may use for its next rows. A few bytes of a damaged or malicious file can claim or hold
/// gigabytes.
const ALLOWANCE: Allowance = Allowance { time: Duration::from_secs(120), bytes: 1 << 30 };

/// Rows that the library's thread sends together.
const BATCH: usize = 16;

/// Calls `take` with each row: those of `columns` that exist, or all columns.
pub(super) fn each_parquet_row(
    data: &DataPath,
    columns: Option<&[&str]>,
    take: Take<'_>,
) -> Result<()> {
    let damaged = |cause: String| {
        let hint = if cause.contains("Disabled feature") {
            "write it with snappy, gzip or zstd compression, or as JSONL: others are not read"
        } else if cause.contains("of memory") {
            "a page of it holds more than is read: write it with pages of the usual size, or as JSONL"
        } else {
            "the file may be cut or damaged: fetch it again"
        };
        let place = format!("{} cannot be read as Parquet", data.path().display());
        Error::input(cause).context(place).hint(hint)
    };
    let file = data.file()?;
    let columns = columns.map(|columns| columns.iter().map(|&name| name.to_owned()).collect());
    // Some damaged files make the library panic.
    let batches = Watched::begin(ALLOWANCE, move |send| read(file, columns, send));
    let batches = batches.map_err(damaged)?;
    let mut index = 0;
    while let Some(batch) = batches.next(&|| false).map_err(damaged)? {
        for row in batch {
            index += 1;
            if take(&format!("row {index}"), row.map_err(damaged)?)?.is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Rows, or the library's error for the first one that it cannot read.
type Batch = Vec<std::result::Result<Value, String>>;

/// Passes the rows of a file to `send` until it returns false.
fn read(file: File, columns: Option<Vec<String>>, send: &mut dyn FnMut(Batch) -> bool) {
    let open = || {
        let reader = SerializedFileReader::new(file)?;
        let schema = reader.metadata().file_metadata().schema();
        let chosen = columns.and_then(|columns| chosen(schema, &columns));
        RowIter::from_file_into(Box::new(reader)).project(chosen)
    };
    let mut rows = match open() {
        Ok(rows) => rows,
        Err(error) => {
            send(vec![Err(error.to_string())]);
            return;
        }
    };
    let one = |row: parquet::errors::Result<Row>| match row {
        Ok(row) => Ok(object(&row)),
        Err(error) => Err(error.to_string()),
    };
    loop {
        let batch: Batch = rows.by_ref().take(BATCH).map(one).collect();
        let last = batch.len() < BATCH || batch.iter().any(|row| row.is_err());
        if !send(batch) || last {
            return;
        }
    }
}

/// The schema with these columns only; with none of them, all columns are read and the caller reports what is missing.
fn chosen(schema: &Type, columns: &[String]) -> Option<Type> {
    let named = |field: &&Arc<Type>| columns.iter().any(|name| name == field.name());
    let fields = schema.get_fields().iter().filter(named);
    let fields: Vec<Arc<Type>> = fields.cloned().collect();
    let group = Type::group_type_builder(schema.name()).with_fields(fields.clone()).build();
    group.ok().filter(|_| !fields.is_empty())
}

fn object(row: &Row) -> Value {
    row.get_column_iter()
        .map(|(name, field)| (name.clone(), value(field)))
        .collect::<Map<_, _>>()
        .into()
}

/// A field in JSON. Bytes that are not text and numbers that JSON cannot represent become null.
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
