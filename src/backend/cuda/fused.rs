/*! Codes of a norm, of gate and up, or of attention's output: one kernel each, the CPU's bits. */

use super::Cuda;
use super::gpu::Buffer;
use super::kernels::few::{self, FewQuantize};
use super::kernels::fused::{FusedPlan, FusedQuantize, Kind, Program, Room, Shape};
use super::kernels::hopper_layout::{PANEL, padded_tokens, tiled_scale_bytes};
use super::tensor::{Activation, DeviceRows, DeviceSite, Hidden, Layout, Outliers, SCALE_MULTIPLE};
use crate::Result;
use crate::backend::Producer;
use crate::quant::codebook::Codebook;
use crate::quant::number::{OutlierFormat, RowFormat};
use crate::quant::site::{PADDING, SiteFormat, Transform};

/// Outliers of a site whose codes are made here.
const MOST_OUTLIERS: usize = 256;
/// A norm's weight in the order of a site, as the kernel reads it.
pub(super) struct NormWeight(Buffer);

/// What the columns of gate and up are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Columns {
    /// The source's channels.
    Channels,
    /// Slots of the site's order, padding and outliers included: the weights' rows were permuted.
    Slots,
}

/// Codes to be made: of which site, by its name in errors, and how they lie.
#[derive(Clone, Copy)]
pub(super) struct SiteCodes<'a> {
    pub(super) site: &'a DeviceSite,
    pub(super) layout: Layout,
    pub(super) name: &'a str,
}

/// What a row becomes codes from.
struct FusedSource<'a> {
    kind: Kind,
    rows: usize,
    width: usize,
    values: &'a Buffer,
    /// The norm's weight, or up.
    other: Option<&'a Buffer>,
    epsilon: f32,
    columns: Columns,
}

/// Whether the kernels make codes of such sites; `permute.cu` makes those of all others.
pub(super) fn supports(format: &RowFormat) -> bool {
    format.numbers.bits < 16
        && matches!(format.numbers.codebook, Codebook::Int | Codebook::Fp4)
        && matches!(format.numbers.group_size, 32 | 64 | 128)
        && matches!(format.outliers(), None | Some(OutlierFormat::Int8))
        && format.outlier_channels <= MOST_OUTLIERS
}

/// Panels of the groups and of the outliers.
fn panels(format: &RowFormat) -> [usize; 2] {
    [format.grouped_channels(), format.outlier_channels].map(|slots| slots.div_ceil(PANEL))
}

/// One value a slot: `of` a channel, or `none`.
fn by_slots<T: Copy>(format: &SiteFormat, none: T, of: impl Fn(usize) -> T) -> Vec<T> {
    let [grouped, outliers] = panels(&format.row);
    let mut values = vec![none; (grouped + outliers) * PANEL];
    let (groups, rest) = format.order.split_at(format.row.grouped_channels());
    for (first, order) in [(0, groups), (grouped * PANEL, rest)] {
        for (value, &channel) in values[first..].iter_mut().zip(order) {
            if channel != PADDING {
                *value = of(channel as usize);
            }
        }
    }
    values
}

impl Cuda {
    /// A site's order in entire panels; none where its codes are not made here.
    pub(super) fn slots(&self, format: &SiteFormat) -> Result<Option<Buffer>> {
        if !supports(&format.row) {
            return Ok(None);
        }
        let slots = by_slots(format, PADDING, |channel| channel as i32);
        self.gpu.upload(&slots).map(Some)
    }

    /// A norm's weight `[1, channels]` for the site after it.
    fn norm_weight(&self, weight: &Hidden, site: &DeviceSite) -> Result<NormWeight> {
        let channels = weight.float().download::<f32>(0..4 * weight.count())?;
        let slots = by_slots(&site.format, 0.0, |channel| channels[channel]);
        self.gpu.upload(&slots).map(NormWeight)
    }

    /// The codes of `rms_norm(x)`; none where the kernel has no room for a row, or the site is not
    /// one of its own.
    pub(super) fn norm_rows(
        &self,
        x: &Hidden,
        weight: &Hidden,
        epsilon: f32,
        codes: SiteCodes<'_>,
    ) -> Result<Option<DeviceRows>> {
        let site = codes.site;
        if site.norm.get().is_none() {
            // Another thread may have been faster; both have the same.
            let _ = site.norm.set(self.norm_weight(weight, site)?);
        }
        let (values, other) = (x.float(), site.norm.get().map(|norm| &norm.0));
        let columns = Columns::Channels;
        let (rows, width) = (x.rows, x.columns);
        let source = FusedSource { kind: Kind::Norm, rows, width, values, other, epsilon, columns };
        self.fused_quantize(&source, codes)
    }

    /// The codes of f16 rows; none as above.
    pub(super) fn half_rows(
        &self,
        x: &Activation,
        codes: SiteCodes<'_>,
    ) -> Result<Option<DeviceRows>> {
        let (values, columns) = (x.half(), Columns::Channels);
        let (rows, width) = (x.rows, x.columns);
        let source = FusedSource {
            kind: Kind::Half,
            rows,
            width,
            values,
            other: None,
            epsilon: 0.0,
            columns,
        };
        self.fused_quantize(&source, codes)
    }

    /// The codes of `silu(gate) * up`; none as above.
    pub(super) fn silu_rows(
        &self,
        gate: &Activation,
        up: &Activation,
        columns: Columns,
        codes: SiteCodes<'_>,
    ) -> Result<Option<DeviceRows>> {
        assert_eq!((gate.rows, gate.columns), (up.rows, up.columns));
        assert_eq!(gate.slots.is_some(), up.slots.is_some());
        let (values, other) = (&gate.data, Some(&up.data));
        let (rows, width) = (gate.rows, gate.columns);
        let source =
            FusedSource { kind: Kind::Silu, rows, width, values, other, epsilon: 0.0, columns };
        self.fused_quantize(&source, codes)
    }

    fn fused_quantize(
        &self,
        source: &FusedSource<'_>,
        SiteCodes { site, layout, name }: SiteCodes<'_>,
    ) -> Result<Option<DeviceRows>> {
        let format = &site.format;
        let &FusedSource { kind, rows: count, width, values, other, epsilon, columns } = source;
        let plan = self.fused_plan(format, kind, columns, count);
        let (Some(slots), Some(plan)) = (&site.slots, plan) else { return Ok(None) };
        let ordered = columns == Columns::Channels;
        assert_eq!(width, if ordered { format.channels } else { format.width() });
        let tiled = layout == Layout::Tiled;
        let rows = self.rows_of(count, &format.row, layout)?;
        let numbers = format.row.numbers;
        let (least, greatest) = numbers.limits();
        let Outliers { codes, scales, .. } = &rows.outliers;
        let launch = FusedQuantize {
            x: values.into(),
            other: other.map(Into::into),
            slots: ordered.then(|| slots.into()),
            tokens: count,
            columns: width,
            groups: format.row.groups,
            outliers: format.row.outlier_channels,
            slice_panels: plan.slice_panels,
            stages: plan.stages,
            epsilon,
            clip: format.clip,
            top: numbers.top(),
            inverse_top: 1.0 / numbers.top(),
            signed_scales: numbers.has_signs(),
            scale_unit: numbers.scale.unit(),
            least,
            greatest,
            codes: (&rows.codes).into(),
            scales: (&rows.scales).into(),
            scale_stride: rows.scale_stride,
            outlier_codes: codes.as_ref().map(Into::into),
            outlier_scales: scales.as_ref().map(Into::into),
            padded_outliers: rows.outliers.padded(),
            bad: self.gpu.error_flag(name)?,
            program: Program {
                kind,
                group: numbers.group_size,
                hadamard: format.transform == Transform::Hadamard,
                ordered,
                tokens: plan.tokens,
                tiled,
                magnitudes: tiled && rows.in_magnitudes(),
                fp4: numbers.codebook == Codebook::Fp4,
                grid: numbers.scale.grid,
            },
            geometry: plan.geometry,
        };
        match plan.few {
            true => self.kernels.launch(&FewQuantize(launch))?,
            false => self.kernels.launch(&launch)?,
        }
        Ok(Some(rows))
    }

    fn fused_plan(
        &self,
        format: &SiteFormat,
        kind: Kind,
        columns: Columns,
        rows: usize,
    ) -> Option<FusedPlan> {
        let room = Room {
            multiprocessors: self.gpu.multiprocessors,
            shared_bytes: self.gpu.block_shared_bytes,
        };
        let shape = Shape { kind, rows, channels: format.channels, panels: panels(&format.row) };
        let few = few::plan(shape, columns == Columns::Slots, room.shared_bytes);
        few.or_else(|| match columns {
            Columns::Channels => FusedPlan::gathering(shape, room),
            Columns::Slots => Some(FusedPlan::permuted(shape, room)),
        })
    }

    /// Whether `rows` rows become a site's codes in one step with the norm or SiLU before it.
    pub(super) fn fuses(&self, producer: Producer, site: &DeviceSite, rows: usize) -> bool {
        let kind = match producer {
            Producer::Norm => Kind::Norm,
            Producer::Silu => Kind::Silu,
        };
        self.takes_tiles(&site.format.row)
            && site.slots.is_some()
            && self.fused_plan(&site.format, kind, Columns::Channels, rows).is_some()
    }

    /// Room for codes and scales.
    fn rows_of(&self, tokens: usize, format: &RowFormat, layout: Layout) -> Result<DeviceRows> {
        let RowFormat { numbers, groups, .. } = *format;
        let [panels, outlier_panels] = panels(format);
        let (scale_stride, codes, scales, outliers);
        if layout == Layout::Tiled {
            scale_stride = padded_tokens(tokens);
            codes = panels * scale_stride * PANEL;
            scales =
                self.gpu.alloc(tiled_scale_bytes(panels * (PANEL / numbers.group_size), tokens))?;
            let there = format.outlier_channels > 0;
            let alloc = |bytes: usize| there.then(|| self.gpu.alloc(bytes)).transpose();
            outliers = Outliers {
                channels: format.outlier_channels,
                codes: alloc(outlier_panels * scale_stride * PANEL)?,
                scales: alloc(4 * scale_stride)?,
                values: None,
            };
        } else {
            scale_stride = tokens.next_multiple_of(SCALE_MULTIPLE);
            codes = tokens * format.grouped_channels();
            scales = self.gpu.alloc(4 * scale_stride * groups)?;
            outliers = self.outliers(format, tokens)?;
        }
        Ok(DeviceRows {
            layout,
            format: *format,
            tokens,
            codes: self.gpu.alloc(codes)?,
            scales,
            scale_stride,
            outliers,
        })
    }
}
