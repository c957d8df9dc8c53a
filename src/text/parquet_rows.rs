/*! Rows of a Parquet file as JSON objects. */

use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::file::DataPath;
use super::guarded::caught;
use super::rows::Take;
use crate::{Error, Result};

/// Calls `take` with each row: of the columns named those that there are, or all of them.
pub(super) fn each_parquet_row(
    data: &DataPath,
    columns: Option<&[&str]>,
    take: Take<'_>,
) -> Result<()> {
    let damaged = |cause: String| {
        let hint = if cause.contains("Disabled feature") {
            "write it with snappy, gzip or zstd compression, or as JSONL: others are not read"
        } else {
            "the file may be cut or damaged: fetch it again"
        };
        let whence = format!("{} cannot be read as Parquet", data.path().display());
        Error::input(cause).context(whence).hint(hint)
    };
    let file = data.file()?;
    let open = || {
        let reader = SerializedFileReader::new(file).map_err(|error| error.to_string())?;
        let schema = reader.metadata().file_metadata().schema();
        let chosen = columns.and_then(|columns| chosen(schema, columns));
        let rows = RowIter::from_file_into(Box::new(reader));
        rows.project(chosen).map_err(|error| error.to_string())
    };
    // Some damaged files make the library panic.
    let mut rows = caught(open).and_then(|rows| rows).map_err(damaged)?;
    for index in 1.. {
        let next = || rows.next().map(|row| row.map(|row| object(&row))).transpose();
        let row = caught(next).and_then(|row| row.map_err(|error| error.to_string()));
        let Some(row) = row.map_err(damaged)? else { break };
        if take(&format!("row {index}"), row)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// The schema with these columns alone; without any of them the rows will say what they lack.
fn chosen(schema: &Type, columns: &[&str]) -> Option<Type> {
    let fields = schema.get_fields().iter().filter(|field| columns.contains(&field.name()));
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
