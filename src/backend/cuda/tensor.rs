/*! What lives in device memory: activations, weights, codes. */

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::fused::NormWeight;
use super::gpu::{Buffer, Mark, Pinned};
use super::kernels::Float;
use super::kernels::product::MMA_TOKENS;
use super::slice::In;
use crate::backend::Tensor;
use crate::checkpoint::Dtype;
use crate::quant::number::{LinearFormat, RowFormat};
use crate::quant::site::SiteFormat;

/// Hidden states `[rows, columns]` in f32, row-major.
pub struct Hidden {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) values: HiddenValues,
    pub(super) home: Home,
}

/// Where hidden states are.
pub(super) enum HiddenValues {
    Resident(Buffer),
    /// In pinned host memory.
    Offloaded(Pinned),
}

/// What an operation inside a block produces, `[rows, columns]` in f16, row-major.
pub struct Activation {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) data: Buffer,
    /// The order of its columns, where it is not the source's: only of gate and up.
    pub(super) slots: Option<Slots>,
}

/// The slots of a site's order, as rows of weights and columns of their outputs.
#[derive(Clone)]
pub(super) struct Slots {
    /// The channel of each, -1 for padding, whose values are zeros.
    pub(super) order: Arc<Buffer>,
    /// Channels of the source.
    pub(super) channels: usize,
}

/// Where hidden states are while they are offloaded.
pub(super) enum Home {
    /// It never was.
    Undecided,
    /// On the device.
    Device { _resident: Resident },
    /// In host memory.
    Host,
}

/// A part of the device memory that offloaded hidden states take together.
pub(super) struct Resident {
    bytes: u64,
    all: Arc<AtomicU64>,
}

impl Resident {
    /// A part, if no more than `limit` bytes are taken with it.
    pub(super) fn take(bytes: u64, all: &Arc<AtomicU64>, limit: u64) -> Option<Self> {
        if all.fetch_add(bytes, Ordering::Relaxed) + bytes > limit {
            all.fetch_sub(bytes, Ordering::Relaxed);
            return None;
        }
        Some(Self { bytes, all: Arc::clone(all) })
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Hidden {
    pub(super) fn new(rows: usize, columns: usize, buffer: Buffer) -> Self {
        Self { rows, columns, values: HiddenValues::Resident(buffer), home: Home::Undecided }
    }

    pub(super) fn count(&self) -> usize {
        self.rows * self.columns
    }

    /// The values.
    ///
    /// # Panics
    /// If they are offloaded.
    pub(super) fn float(&self) -> &Buffer {
        match &self.values {
            HiddenValues::Resident(buffer) => buffer,
            HiddenValues::Offloaded(_) => panic!("hidden states are reloaded before they are used"),
        }
    }
}

impl Tensor for Hidden {
    const DTYPE: Dtype = Dtype::F32;

    fn rows(&self) -> usize {
        self.rows
    }
}

impl Activation {
    pub(super) fn new(rows: usize, columns: usize, data: Buffer) -> Self {
        Self { rows, columns, data, slots: None }
    }

    pub(super) fn count(&self) -> usize {
        self.rows * self.columns
    }

    /// The values, where they are in the source's order.
    pub(super) fn half(&self) -> &Buffer {
        assert!(self.slots.is_none(), "only SiLU takes what lies in a site's order");
        &self.data
    }
}

impl Tensor for Activation {
    const DTYPE: Dtype = Dtype::F16;

    fn rows(&self) -> usize {
        self.rows
    }
}

/// A source's weight `[rows, columns]` in its own type.
pub struct Weight {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) dtype: Dtype,
    pub(super) data: Arc<Buffer>,
}

impl Weight {
    /// The type in the kernels' terms.
    pub(super) fn element(&self) -> Float {
        match self.dtype {
            Dtype::F16 => Float::Half,
            Dtype::BF16 => Float::Bf16,
            _ => Float::Single,
        }
    }
}

/// A full-precision weight `[rows, columns]` in f16.
pub struct Dense {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) data: Arc<Buffer>,
}

/// A site's format, its order on the device.
pub struct DeviceSite {
    pub(super) format: SiteFormat,
    pub(super) order: Arc<Buffer>,
    /// The order in entire panels, where `fused` makes the site's codes.
    pub(super) slots: Option<Buffer>,
    /// The weight of the norm before it, in that order: a site comes after one norm at most.
    pub(super) norm: OnceLock<NormWeight>,
}

/// Outlier channels are stored so many at a time: the depth of an integer matrix instruction.
pub(super) const OUTLIER_MULTIPLE: usize = 32;

/// Scales lie in rows of a multiple of so many, which kernels load together.
pub(super) const SCALE_MULTIPLE: usize = 4;

/// The outlier channels of activations or weights, or none.
pub(super) struct Outliers {
    /// How many.
    pub(super) channels: usize,
    /// INT8 codes `[rows, padded]`, zeros after them; none for the others.
    pub(super) codes: Option<Buffer>,
    /// INT8's and FP8's scales, one a row.
    pub(super) scales: Option<Buffer>,
    /// f16 values, or FP8's numbers times the scale, as f32, `[rows, channels]`; none for INT8.
    pub(super) values: Option<Buffer>,
}

/// What kernels read of outliers.
#[derive(Clone, Copy)]
pub(super) struct OutlierSlices<'a> {
    pub(super) codes: Option<In<'a, i8>>,
    pub(super) scales: Option<In<'a, f32>>,
    pub(super) values: Option<In<'a, f32>>,
}

impl Outliers {
    /// Those of the rows from `first` on.
    pub(super) fn from(&self, first: usize) -> OutlierSlices<'_> {
        let Self { channels, codes, scales, values } = self;
        OutlierSlices {
            codes: codes.as_ref().map(|codes| In::from(codes).skip(first * self.padded())),
            scales: scales.as_ref().map(|scales| In::from(scales).skip(first)),
            values: values.as_ref().map(|values| In::from(values).skip(first * channels)),
        }
    }

    /// Columns of the codes.
    pub(super) fn padded(&self) -> usize {
        if self.codes.is_some() { self.channels.next_multiple_of(OUTLIER_MULTIPLE) } else { 0 }
    }
}

/// How codes of activations lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Codes `[tokens, groups * group_size]`, scales `[groups, scale_stride]`.
    RowMajor,
    /// As rows, codes two a byte, the first in the lower half.
    Nibbles,
    /// As kernels/hopper.cuh reads them: panels of 128 slots, `[panels, scale_stride, 128]`, outliers' codes likewise;
    /// f16 scales `[ceil(groups / 8), scale_stride, 8]`.
    Tiled,
}

/// Quantized activations.
pub struct DeviceRows {
    pub(super) layout: Layout,
    pub(super) format: RowFormat,
    pub(super) tokens: usize,
    pub(super) codes: Buffer,
    pub(super) scales: Buffer,
    pub(super) scale_stride: usize,
    pub(super) outliers: Outliers,
}

impl DeviceRows {
    /// Whether codes in tiles are signs and magnitudes, as the FP8 instruction takes them, and not in two's complement.
    pub(super) fn in_magnitudes(&self) -> bool {
        self.format.numbers.bits < 8 && self.tokens > MMA_TOKENS
    }

    /// Whether outliers are held as floating-point values.
    pub(super) fn has_float_outliers(&self) -> bool {
        self.outliers.values.is_some()
    }
}

/// The codes of one or more linears, row under row.
pub(super) struct Codes {
    /// `[rows, grouped channels]`.
    pub(super) codes: Buffer,
    /// `[ceil(rows / rows_per_scale), groups]`, f16 values as f32.
    pub(super) scales: Buffer,
    pub(super) outliers: Outliers,
    /// When they are there.
    pub(super) ready: Mark,
}

/// A quantized linear: its part of some codes. The first row begins a scale of its own.
pub struct DeviceLinear {
    pub(super) format: LinearFormat,
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) shared: Arc<Codes>,
    /// `tr(E H E^T)`, where a sweep has found it.
    pub(super) lost: Option<f64>,
}

impl DeviceLinear {
    /// The same codes again.
    pub(super) fn same(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), ..*self }
    }

    /// Its first row of scales.
    pub(super) fn first_scale(&self) -> usize {
        self.first_row / self.format.rows_per_scale
    }

    /// How many rows of scales it has.
    pub(super) fn scale_rows(&self) -> usize {
        self.format.scale_rows(self.rows)
    }

    /// Its codes.
    pub(super) fn codes(&self) -> In<'_, i8> {
        In::from(&self.shared.codes).skip(self.first_row * self.format.row.grouped_channels())
    }

    /// Its scales.
    pub(super) fn scales(&self) -> In<'_, f32> {
        In::from(&self.shared.scales).skip(self.first_scale() * self.format.row.groups)
    }

    /// Its outliers.
    pub(super) fn outliers(&self) -> OutlierSlices<'_> {
        self.shared.outliers.from(self.first_row)
    }
}

/// A quantized linear as an integer product reads it.
pub struct PackedLinear {
    pub(super) format: LinearFormat,
    pub(super) rows: usize,
    pub(super) form: PackedForm,
    /// What its rows are, where they are not the source's.
    pub(super) slots: Option<Slots>,
}

/// How a [`PackedLinear`] linear lies in memory.
pub(super) enum PackedForm {
    /// Rows of codes, scales `[groups, scale_stride]`; where the device multiplies nibbles, the groups' codes as such.
    Rows { weight: DeviceLinear, scales: Buffer, nibbles: Option<Buffer> },
    /// Blocks of 64 rows.
    Blocks(Blocks),
}

/// Weights in the blocks of kernels/hopper.cuh.
pub(super) struct Blocks {
    /// Whether codes have 8 bits and not 4.
    pub(super) wide: bool,
    pub(super) fp4: bool,
    /// `[ceil(rows / 64), panels]` blocks, codes and scales.
    pub(super) codes: Buffer,
    /// `[ceil(rows / 64), ceil(outliers / 64)]` blocks, if there are outliers.
    pub(super) outliers: Option<Buffer>,
}

/// A running sum of `x^T x`, `[n, n]`. While tokens are added, the upper triangle is kept up to date;
/// the factorization mirrors it.
pub struct Hessian {
    pub(super) n: usize,
    pub(super) data: Buffer,
}

/// A running sum of `y^T x`, `[rows, columns]`.
pub struct CrossCovariance {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) data: Buffer,
}

/// `R` of `H = R D R^T` above the diagonal of `[n, n]`, and below and on it `L` of the reversed Hessian,
/// `J H J = L L^T`.
pub struct Factor {
    pub(super) n: usize,
    pub(super) data: Buffer,
    /// The square roots of D.
    pub(super) pivots: Buffer,
    /// What was added to the Hessian's diagonal.
    pub(super) damp: f32,
}
