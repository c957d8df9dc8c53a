/*! How the bytes of each tensor of the file are made, when they are asked for. */

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::blocks::{RowOrder, pack, store};
use super::container::{TensorInfo, TensorType};
use super::same_type;
use super::tensors::{Content, FileTensor};
use crate::checkpoint::linear::read_order;
use crate::checkpoint::plan::SitePlan;
use crate::checkpoint::{Dtype, Tensor, TensorBytes, TensorSpec};
use crate::export::format::Part;
use crate::export::model::ExportedModel;
use crate::network::expect;
use crate::{Error, Result};

/// Longer tensors are made and written in several parts.
const PART_BYTES: u64 = 128 << 20;

/// The parts of a tensor, one after another.
///
/// # Errors
/// A tensor that the checkpoint lacks or has in another form.
pub(super) fn parts<'a>(
    model: &'a ExportedModel<'a>,
    tensor: FileTensor<'a>,
) -> Result<Vec<Part<'a>>> {
    let FileTensor { info, contents, order } = tensor;
    let TensorInfo { name, shape, kind } = &info;
    let mut parts = Vec::new();
    let count = contents.len();
    for (index, content) in contents.into_iter().enumerate() {
        let title = if count == 1 { name.clone() } else { format!("{name}[{index}]") };
        match content {
            Content::Made(values) => {
                let make = move || {
                    let bytes = store(&values, TensorType::F32);
                    Ok(vec![TensorBytes::from(bytes.expect("f32 holds every f32"))])
                };
                parts.push(Part { tensors: vec![spec(title, &info)], make: Box::new(make) });
            }
            Content::Linear(site, linear) => {
                let shape = vec![linear.rows, site.channels];
                let spec = spec(title, &TensorInfo { name: String::new(), shape, kind: *kind });
                let kind = *kind;
                let make = move || {
                    check_order(model, site)?;
                    let quantized = model.quantized(site, linear)?;
                    Ok(vec![TensorBytes::from(pack(&quantized, site.channels, kind, order))])
                };
                parts.push(Part { tensors: vec![spec], make: Box::new(make) });
            }
            Content::Stored { name: stored, shape: own } => {
                let tensor = expect(model.checkpoint, &stored, &own)?;
                debug_assert!(shape.ends_with(&own));
                let form = Form { kind: *kind, order };
                parts.extend(stored_parts(model, &title, tensor, form));
            }
        }
    }
    Ok(parts)
}

/// What becomes of a stored tensor.
#[derive(Clone, Copy)]
struct Form {
    kind: TensorType,
    order: RowOrder,
}

fn spec(title: String, info: &TensorInfo) -> TensorSpec {
    TensorSpec::new(title, Dtype::U8, [info.bytes() as usize])
}

/// The parts of a tensor that the checkpoint holds unquantized.
fn stored_parts<'a>(
    model: &'a ExportedModel<'a>,
    title: &str,
    tensor: Tensor<'a>,
    form: Form,
) -> Vec<Part<'a>> {
    let (columns, rows) = match *tensor.shape {
        [rows, columns] => (columns, rows),
        // A vector is one row, but for a bias in another order: its numbers are rows then.
        _ if form.order == RowOrder::Source => (tensor.len(), 1),
        _ => (1, tensor.len()),
    };
    let row_bytes = form.kind.row_bytes(columns) as u64;
    let spec =
        |title: String, rows: usize| TensorSpec::new(title, Dtype::U8, [rows * row_bytes as usize]);
    if same_type(tensor.dtype) == Some(form.kind) && form.order == RowOrder::Source {
        let make = move || Ok(vec![model.checkpoint.verified_bytes(tensor, 0)]);
        return vec![Part { tensors: vec![spec(title.to_owned(), rows)], make: Box::new(make) }];
    }
    let step = usize::try_from(PART_BYTES / row_bytes.max(1)).unwrap_or(usize::MAX).max(1);
    // A permuted linear is short.
    let step = if form.order == RowOrder::Source { step } else { rows };
    let verified = Arc::new(OnceLock::new());
    let starts = (0..rows).step_by(step.max(1));
    let part = |first: usize| {
        let range = first..(first + step).min(rows);
        let title = match range.len() == rows {
            true => title.to_owned(),
            false => format!("{title}[{}..{}]", range.start, range.end),
        };
        let spec = spec(title, range.len());
        let verified = Arc::clone(&verified);
        let make = move || {
            if verified.get().is_none() {
                model.verify(tensor.name)?;
                let _ = verified.set(());
            }
            converted(tensor, range.clone(), columns, form).map(|bytes| vec![bytes.into()])
        };
        Part { tensors: vec![spec], make: Box::new(make) }
    };
    starts.map(part).collect()
}

/// Rows of a stored tensor in the form of the file, its pages given back.
fn converted(
    tensor: Tensor<'_>,
    rows: Range<usize>,
    columns: usize,
    form: Form,
) -> Result<Vec<u8>> {
    /// Values converted at once.
    const VALUES: usize = 1 << 22;
    let row_bytes = form.kind.row_bytes(columns);
    let mut bytes = Vec::with_capacity(rows.len() * row_bytes);
    let mut at = rows.start;
    while at < rows.end {
        let end = rows.end.min(at + (VALUES / columns.max(1)).max(1));
        let values = match form.order {
            RowOrder::Source if tensor.shape.len() == 2 => tensor.rows_f32(at..end)?,
            RowOrder::Source => tensor.to_f32()?,
            RowOrder::Pairs { .. } => {
                let source = tensor.to_f32()?;
                let row = |row: usize| form.order.source_row(row) * columns;
                (at..end).flat_map(|to| source[row(to)..row(to) + columns].to_vec()).collect()
            }
        };
        bytes.extend(store(&values, form.kind).ok_or_else(|| too_large(&tensor))?);
        tensor.release();
        at = end;
    }
    Ok(bytes)
}

fn too_large(tensor: &Tensor<'_>) -> Error {
    Error::input(format!("{} holds a weight beyond the range of f16", tensor.title()))
        .hint("export with `--format dense --dtype bf16`, whose range is that of f32")
}

/// Refuses a site whose channels are in another order than the source's, whatever its plan says.
fn check_order(model: &ExportedModel<'_>, site: &SitePlan) -> Result<()> {
    model.verify(&format!("{}.order", site.name))?;
    let grouped = site.groups() * site.group_size;
    let order = read_order(model.checkpoint, &site.name, site.channels, grouped, 0)?;
    let is_source = order[..site.channels].iter().enumerate().all(|(at, &own)| own == at as i32);
    if is_source {
        return Ok(());
    }
    let message =
        format!("{}.order is not the source's order, and atom.json says it is", site.name);
    Err(Error::input(message).hint("the checkpoint is damaged: copy it again"))
}
