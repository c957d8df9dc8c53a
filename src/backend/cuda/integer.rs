/*! The integer product, and which kernels compute it for which codes: `wgmma` on Hopper (`hopper.rs`), INT4 tensor cores on
Ampere and Ada, INT8 ones everywhere else. */

use std::sync::Arc;

use super::Cuda;
use super::gpu::Buffer;
use super::kernels::Float;
use super::kernels::elementwise::Convert;
use super::kernels::gptq::ExpandScales;
use super::kernels::integer::{
    AddFloatOutliers, IntegerProduct, IntegerProgram, PackNibbles, UnpackNibbles,
};
use super::kernels::product::{ProductOutput, is_prefill};
use super::libraries::Version;
use super::slice::In;
use super::tensor::{
    Blocks, DeviceLinear, DeviceRows, DeviceSite, Layout, Outliers, PackedForm, PackedLinear,
    SCALE_MULTIPLE, Slots,
};
use crate::Result;
use crate::quant::codebook::Codebook;
use crate::quant::number::{NumberFormat, RowFormat};

/// The environment variable that says whether codes of 4 bits are multiplied as such: `1` on every device that can, `0`
/// nowhere. Without it Hopper does; the INT4 tensor cores of older devices are only compiled for so far (docs/kernels.md).
pub const VARIABLE: &str = "ATOM_GPU_INT4";

/// What a device multiplies codes of 4 bits by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Narrow {
    /// INT8 tensor cores, as wider ones.
    Bytes,
    /// INT4 tensor cores.
    Nibbles,
    /// FP8 tensor cores, in which they are exact.
    Wgmma,
}

impl Narrow {
    /// What a device of this compute capability has.
    pub(super) fn of(capability: Version) -> Self {
        match (capability.major, capability.minor) {
            (8, _) => Self::Nibbles,
            (9, 0) => Self::Wgmma,
            _ => Self::Bytes,
        }
    }

    /// What is used on such a device, by the variable's value.
    pub(super) fn chosen(capability: Version, setting: Option<&str>) -> Self {
        match (Self::of(capability), setting) {
            (own, Some("1")) => own,
            (_, Some("0")) => Self::Bytes,
            (Self::Wgmma, _) => Self::Wgmma,
            _ => Self::Bytes,
        }
    }
}

/// Whether codes go two a byte to the INT4 tensor cores.
fn takes_nibbles(numbers: &NumberFormat) -> bool {
    numbers.bits <= 4 && numbers.codebook == Codebook::Int && numbers.group_size.is_multiple_of(32)
}

impl Cuda {
    /// What codes of 4 bits are multiplied by, for a person.
    pub fn multiplies_by(&self) -> &'static str {
        match self.narrow {
            Narrow::Bytes => "INT8 tensor cores",
            Narrow::Nibbles => "INT4 tensor cores",
            Narrow::Wgmma => "FP8 tensor cores, exactly",
        }
    }

    /// Rows as the products of their site read them.
    pub(super) fn laid_out(&self, rows: DeviceRows, format: &RowFormat) -> Result<DeviceRows> {
        match self.narrow {
            Narrow::Wgmma if self.takes_tiles(format) => self.tiled(&rows),
            Narrow::Nibbles if takes_nibbles(&format.numbers) => {
                let codes = self.nibbles((&rows.codes).into(), rows.codes.bytes())?;
                Ok(DeviceRows { layout: Layout::Nibbles, codes, ..rows })
            }
            _ => Ok(rows),
        }
    }

    /// Rows of codes as bytes, from any other layout.
    pub(super) fn row_major(&self, x: &DeviceRows) -> Result<DeviceRows> {
        if x.layout == Layout::Tiled {
            return self.untiled(x);
        }
        let bytes = x.tokens * x.format.grouped_channels();
        let codes = self.gpu.alloc(bytes)?;
        let words = (bytes / 8) as i64;
        self.kernels.launch(&UnpackNibbles {
            from: (&x.codes).into(),
            words,
            codes: (&codes).into(),
        })?;
        let scales = self.gpu.alloc(x.scales.bytes())?;
        scales.copy_from(&x.scales, x.scales.bytes())?;
        Ok(DeviceRows {
            layout: Layout::RowMajor,
            codes,
            scales,
            outliers: self.same(&x.outliers)?,
            ..*x
        })
    }

    /// A copy of outliers.
    fn same(&self, outliers: &Outliers) -> Result<Outliers> {
        let copy = |buffer: &Option<Buffer>| -> Result<Option<Buffer>> {
            let Some(buffer) = buffer else { return Ok(None) };
            let copy = self.gpu.alloc(buffer.bytes())?;
            copy.copy_from(buffer, buffer.bytes())?;
            Ok(Some(copy))
        };
        Ok(Outliers {
            channels: outliers.channels,
            codes: copy(&outliers.codes)?,
            scales: copy(&outliers.scales)?,
            values: copy(&outliers.values)?,
        })
    }

    /// Codes two a byte.
    fn nibbles(&self, codes: In<'_, i8>, bytes: usize) -> Result<Buffer> {
        let to = self.gpu.alloc(bytes / 2)?;
        let words = (bytes / 8) as i64;
        self.kernels.launch(&PackNibbles { codes: codes.cast(), words, to: (&to).into() })?;
        Ok(to)
    }

    /// A weight as the product reads it. Where `feeds` takes outputs in its order, rows are in that.
    pub fn pack(&self, weight: &DeviceLinear, feeds: Option<&DeviceSite>) -> Result<PackedLinear> {
        let DeviceLinear { format, first_row, rows, .. } = *weight;
        let groups = format.row.groups;
        if self.takes_tiles(&format.row) {
            let takes =
                |site: &&DeviceSite| self.takes_tiles(&site.format.row) && site.slots.is_some();
            let feeds = feeds.filter(takes);
            let form = PackedForm::Blocks(self.blocks(weight, feeds)?);
            let slots = feeds.map(|site| Slots { order: Arc::clone(&site.order), channels: rows });
            let rows = feeds.map_or(rows, |site| site.format.width());
            return Ok(PackedLinear { format, rows, form, slots });
        }
        let stride = rows.next_multiple_of(SCALE_MULTIPLE);
        let scales = self.gpu.alloc(4 * stride * groups)?;
        self.kernels.launch(&ExpandScales {
            scales: weight.scales(),
            rows,
            groups,
            rows_per_scale: format.rows_per_scale,
            stride,
            to: (&scales).into(),
        })?;
        let shared = Arc::clone(&weight.shared);
        let weight = DeviceLinear { format, first_row, rows, shared, lost: None };
        let paired = self.narrow == Narrow::Nibbles && takes_nibbles(&format.row.numbers);
        let bytes = rows * format.row.grouped_channels();
        let nibbles = paired.then(|| self.nibbles(weight.codes(), bytes)).transpose()?;
        let form = PackedForm::Rows { weight, scales, nibbles };
        Ok(PackedLinear { format, rows, form, slots: None })
    }

    /// The blocks of weights whose products with `x` one launch computes; none where there is no such launch.
    pub(super) fn tiled_together<'w>(
        &self,
        x: &DeviceRows,
        weights: &[&'w PackedLinear],
    ) -> Option<Vec<&'w Blocks>> {
        if x.layout != Layout::Tiled || is_prefill(x.tokens) || !(2..=3).contains(&weights.len()) {
            return None;
        }
        let blocks = weights.iter().map(|weight| match &weight.form {
            PackedForm::Blocks(blocks) => Some(blocks),
            PackedForm::Rows { .. } => None,
        });
        let blocks = blocks.collect::<Option<Vec<&Blocks>>>()?;
        let kind = |blocks: &&Blocks| (blocks.wide, blocks.fp4);
        blocks.iter().all(|own| kind(own) == kind(&blocks[0])).then_some(blocks)
    }

    /// `x w^T` by the integer path, in f16 or in f32.
    pub(super) fn integer(
        &self,
        x: &DeviceRows,
        weight: &PackedLinear,
        half: bool,
    ) -> Result<Buffer> {
        let count = x.tokens * weight.rows;
        let half_now = half && !x.has_float_outliers();
        let y = self.gpu.alloc(if half_now { 2 } else { 4 } * count)?;
        self.integer_into(x, weight, &y, half_now)?;
        if half_now == half {
            return Ok(y);
        }
        let rounded = self.gpu.alloc(2 * count)?;
        let bad = self.gpu.alloc(8)?;
        self.kernels.launch(&Convert {
            x: (&y).into(),
            count: count as i64,
            to: Some((&rounded).into()),
            bad: (&bad).into(),
            element: Float::Single,
        })?;
        Ok(rounded)
    }

    /// The same into memory that is there. Outliers in f16 and FP8 are added to f32 sums, so that `half` is not for
    /// them. Nothing is allocated if `x` lies as [`quantize`](Self::quantize) returns it and codes of 8 bits are not multiplied
    /// with others.
    pub fn integer_into(
        &self,
        x: &DeviceRows,
        weight: &PackedLinear,
        to: &Buffer,
        half: bool,
    ) -> Result<()> {
        let (tokens, rows) = (x.tokens, weight.rows);
        let RowFormat { numbers, groups, outlier_channels, .. } = x.format;
        let own = &weight.format.row;
        assert_eq!(
            (numbers.group_size, groups, outlier_channels),
            (own.numbers.group_size, own.groups, own.outlier_channels)
        );
        assert!(!(half && x.has_float_outliers()), "sums that are to be added to are f32");
        let output = if half { ProductOutput::Half } else { ProductOutput::Float };
        let (own, scales, codes) = match (&weight.form, x.layout) {
            (PackedForm::Blocks(blocks), Layout::Tiled) => {
                return self.tiled_product(x, blocks, rows, to, output);
            }
            (PackedForm::Blocks(blocks), Layout::RowMajor) => {
                return self.tiled_product(&self.tiled(x)?, blocks, rows, to, output);
            }
            (PackedForm::Rows { weight, scales, nibbles: Some(nibbles) }, Layout::Nibbles) => {
                (weight, scales, nibbles.into())
            }
            (PackedForm::Rows { weight, scales, .. }, Layout::RowMajor) => {
                (weight, scales, weight.codes())
            }
            _ => return self.integer_into(&self.row_major(x)?, weight, to, half),
        };
        let (of_x, of_w) = (x.outliers.from(0), own.outliers());
        let paired = x.layout == Layout::Nibbles;
        let program = IntegerProgram { group: numbers.group_size, half, nibbles: paired };
        self.kernels.launch(&IntegerProduct {
            x: (&x.codes).into(),
            sx: (&x.scales).into(),
            xo: of_x.codes,
            sxo: of_x.scales,
            w: codes,
            sw: scales.into(),
            wo: of_w.codes,
            swo: of_w.scales,
            y: to.into(),
            tokens,
            rows,
            groups,
            op: x.outliers.padded(),
            program,
        })?;
        let Some(values) = of_x.values else { return Ok(()) };
        self.kernels.launch(&AddFloatOutliers {
            xo: values,
            wo: of_w.values,
            y: to.into(),
            tokens,
            rows,
            o: x.outliers.channels,
            program,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hopper_multiplies_narrow_codes_as_such_unless_told_otherwise() {
        let of = |major, minor, setting| Narrow::chosen(Version { major, minor }, setting);
        assert_eq!(of(9, 0, None), Narrow::Wgmma);
        assert_eq!(of(9, 0, Some("0")), Narrow::Bytes);
        assert_eq!((of(8, 6, None), of(8, 6, Some("1"))), (Narrow::Bytes, Narrow::Nibbles));
        assert_eq!((of(10, 0, None), of(10, 0, Some("1"))), (Narrow::Bytes, Narrow::Bytes));
    }
}
