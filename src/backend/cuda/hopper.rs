/*! The integer product on Hopper's tensor cores (kernels/hopper.cuh): weights in blocks, activations in tiles.

It takes codes in groups of 32, 64 or 128 with INT8 outliers or none; `integer.cu` takes all others, and serves all other
devices. */

use super::Cuda;
use super::gpu::Buffer;
use super::integer::Narrow;
use super::kernels::hopper_layout::{
    BLOCK_ROWS, OUTLIER_BYTES, OUTLIER_PART, PANEL, PackOutliers, PackWeights, Packing, TileCodes,
    TileScales, UntileCodes, UntileScales, WidenCodes, padded_tokens, tiled_scale_bytes,
};
use super::kernels::product::{ProductOutput, Stream, Tiles, Tiling};
use super::slice::In;
use super::tensor::{
    Blocks, DeviceLinear, DeviceRows, DeviceSite, Layout, OutlierSlices, Outliers, SCALE_MULTIPLE,
};
use crate::Result;
use crate::quant::codebook::Codebook;
use crate::quant::number::{LinearFormat, NumberFormat, OutlierFormat, RowFormat};

/// One of several products of the same rows.
#[derive(Clone, Copy)]
pub(super) struct TiledProduct<'a> {
    pub(super) blocks: &'a Blocks,
    /// Rows of the weight.
    pub(super) rows: usize,
    /// Where `[tokens, rows]` go.
    pub(super) to: &'a Buffer,
}

fn outliers_of<'a>(product: Option<&TiledProduct<'a>>) -> Option<In<'a, i8>> {
    product.and_then(|own| own.blocks.outliers.as_ref()).map(Into::into)
}

/// Panels of so many slots.
fn panels(slots: usize) -> usize {
    slots.div_ceil(PANEL)
}

impl Cuda {
    /// Whether products of such rows are computed here.
    pub(super) fn takes_tiles(&self, format: &RowFormat) -> bool {
        self.narrow == Narrow::Wgmma
            && format.numbers.bits < 16
            && matches!(format.numbers.group_size, 32 | 64 | 128)
            && matches!(format.outliers(), None | Some(OutlierFormat::Int8))
    }

    /// Weights as the kernels read them; a row for each slot of `feeds`, where their outputs are to lie in its order.
    pub(super) fn blocks(
        &self,
        weight: &DeviceLinear,
        feeds: Option<&DeviceSite>,
    ) -> Result<Blocks> {
        let LinearFormat { row, rows_per_scale } = weight.format;
        let RowFormat { numbers, groups, .. } = row;
        let NumberFormat { bits, codebook, group_size, .. } = numbers;
        let (wide, fp4) = (bits == 8, codebook == Codebook::Fp4);
        let order = feeds.map(|site| In::from(&*site.order));
        let rows = feeds.map_or(weight.rows, |site| site.format.width());
        let (panels, row_blocks) = (panels(row.grouped_channels()), rows.div_ceil(BLOCK_ROWS));
        let packing = Packing { group: group_size, wide, fp4 };
        let codes = self.gpu.alloc(row_blocks * panels * packing.block_bytes())?;
        self.kernels.launch(&PackWeights {
            codes: weight.codes(),
            scales: weight.scales(),
            order,
            rows,
            groups,
            rows_per_scale,
            blocks: (&codes).into(),
            packing,
            panels,
            source_rows: weight.rows,
        })?;
        let parts = row.outlier_channels.div_ceil(OUTLIER_PART);
        let outliers = if parts == 0 {
            None
        } else {
            let outliers = self.gpu.alloc(row_blocks * parts * OUTLIER_BYTES)?;
            let OutlierSlices { codes, scales, .. } = weight.outliers();
            self.kernels.launch(&PackOutliers {
                codes,
                scales,
                order,
                rows,
                width: weight.shared.outliers.padded(),
                blocks: (&outliers).into(),
                packing,
                parts,
                source_rows: weight.rows,
            })?;
            Some(outliers)
        };
        Ok(Blocks { wide, fp4, codes, outliers })
    }

    /// Rows in tiles.
    pub(super) fn tiled(&self, x: &DeviceRows) -> Result<DeviceRows> {
        let &DeviceRows { tokens, format, scale_stride, .. } = x;
        let groups = format.groups;
        let padded = padded_tokens(tokens);
        let tile = |codes: &Buffer, width: usize, magnitudes: bool| -> Result<Buffer> {
            let panels = panels(width);
            let to = self.gpu.alloc(panels * padded * PANEL)?;
            self.kernels.launch(&TileCodes {
                codes: codes.into(),
                tokens,
                width,
                padded,
                panels,
                magnitudes,
                to: (&to).into(),
            })?;
            Ok(to)
        };
        let codes = tile(&x.codes, format.grouped_channels(), x.in_magnitudes())?;
        let scales = self.gpu.alloc(tiled_scale_bytes(groups, tokens))?;
        self.kernels.launch(&TileScales {
            scales: (&x.scales).into(),
            groups,
            stride: scale_stride,
            tokens,
            padded,
            to: (&scales).into(),
        })?;
        let outliers =
            self.outliers_in(x, padded, |codes| tile(codes, x.outliers.padded(), false))?;
        Ok(DeviceRows {
            layout: Layout::Tiled,
            codes,
            scales,
            scale_stride: padded,
            outliers,
            ..*x
        })
    }

    /// Tiles as rows.
    pub(super) fn untiled(&self, x: &DeviceRows) -> Result<DeviceRows> {
        let &DeviceRows { tokens, format, scale_stride: padded, .. } = x;
        let groups = format.groups;
        let untile = |from: &Buffer, width: usize, magnitudes: bool| -> Result<Buffer> {
            let to = self.gpu.alloc(tokens * width)?;
            self.kernels.launch(&UntileCodes {
                from: from.into(),
                tokens,
                width,
                padded,
                magnitudes,
                codes: (&to).into(),
            })?;
            Ok(to)
        };
        let codes = untile(&x.codes, format.grouped_channels(), x.in_magnitudes())?;
        let scale_stride = tokens.next_multiple_of(SCALE_MULTIPLE);
        let scales = self.gpu.alloc(4 * scale_stride * groups)?;
        self.kernels.launch(&UntileScales {
            from: (&x.scales).into(),
            groups,
            stride: scale_stride,
            tokens,
            padded,
            scales: (&scales).into(),
        })?;
        let outliers =
            self.outliers_in(x, tokens, |codes| untile(codes, x.outliers.padded(), false))?;
        Ok(DeviceRows { layout: Layout::RowMajor, codes, scales, scale_stride, outliers, ..*x })
    }

    /// The INT8 outliers of rows with their codes in another layout, and room for `count` scales.
    fn outliers_in(
        &self,
        x: &DeviceRows,
        count: usize,
        convert: impl Fn(&Buffer) -> Result<Buffer>,
    ) -> Result<Outliers> {
        let Outliers { channels, codes, scales, .. } = &x.outliers;
        let (Some(codes), Some(scales)) = (codes, scales) else {
            return Ok(Outliers { channels: 0, codes: None, scales: None, values: None });
        };
        let own = self.gpu.alloc(4 * count)?;
        own.copy_from(scales, 4 * x.tokens)?;
        let codes = Some(convert(codes)?);
        Ok(Outliers { channels: *channels, codes, scales: Some(own), values: None })
    }

    /// `x w^T` `[tokens, rows]` into `to`. In prefill the sums are those of
    /// the specification bit by bit; in decode a row's groups are summed in several parts (split-K).
    pub(super) fn tiled_product(
        &self,
        x: &DeviceRows,
        blocks: &Blocks,
        rows: usize,
        to: &Buffer,
        output: ProductOutput,
    ) -> Result<()> {
        self.tiled_products(x, &[TiledProduct { blocks, rows, to }], output)
    }

    /// The products of `x` with one to three weights of one kind, in decode by one launch: each alone has too few tiles to
    /// occupy the device.
    pub(super) fn tiled_products(
        &self,
        x: &DeviceRows,
        products: &[TiledProduct<'_>],
        output: ProductOutput,
    ) -> Result<()> {
        assert_eq!(x.layout, Layout::Tiled);
        let DeviceRows { tokens, format, scale_stride, .. } = *x;
        let Blocks { wide, fp4, .. } = *products[0].blocks;
        assert!(products.iter().all(|own| (own.blocks.wide, own.blocks.fp4) == (wide, fp4)));
        // Products with weights of 8 bits take two's complement.
        let widened = (x.in_magnitudes() && wide).then(|| self.widened(x)).transpose()?;
        let codes = widened.as_ref().unwrap_or(&x.codes);
        let multiprocessors = self.gpu.multiprocessors;
        let all_rows = products.iter().map(|own| own.rows).sum();
        let wide = [!x.in_magnitudes() || wide, wide];
        let tiling = Tiling::of(tokens, all_rows, format.numbers.group_size, wide, multiprocessors)
            .with(fp4, output);
        let outliers = x.outliers.from(0);
        let [first, second, third] = [0, 1, 2].map(|at| products.get(at));
        let weight = |own: Option<&TiledProduct<'_>>| own.map_or(0, |own| own.rows);
        let stream = Stream {
            x: codes.into(),
            sx: (&x.scales).into(),
            xo: outliers.codes,
            sxo: outliers.scales,
            w: (&products[0].blocks.codes).into(),
            wo: outliers_of(first),
            y: products[0].to.into(),
            rows: weight(first),
            w1: second.map(|own| (&own.blocks.codes).into()),
            wo1: outliers_of(second),
            y1: second.map(|own| own.to.into()),
            rows1: weight(second),
            w2: third.map(|own| (&own.blocks.codes).into()),
            wo2: outliers_of(third),
            y2: third.map(|own| own.to.into()),
            rows2: weight(third),
            tokens,
            padded: scale_stride,
            panels: panels(format.grouped_channels()),
            halves: x.outliers.channels.div_ceil(OUTLIER_PART),
            tiling,
            cluster: 1,
        };
        if tiling.is_prefill() {
            assert_eq!(products.len(), 1, "prefill has tiles enough");
            let Stream { x, sx, xo, sxo, w, wo, y, rows, padded, panels, halves, .. } = stream;
            return self.kernels.launch(&Tiles {
                x,
                sx,
                xo,
                sxo,
                w,
                wo,
                y,
                tokens,
                padded,
                rows,
                panels,
                halves,
                tiling,
                multiprocessors,
            });
        }
        let (tiles, stages) = (stream.tiles(), stream.tile_stages());
        let mut stream =
            Stream { cluster: tiling.cluster(tiles, stages, multiprocessors), ..stream };
        while stream.cluster > 1 && self.kernels.active_clusters(&stream)? < tiles {
            stream.cluster -= 1;
        }
        self.kernels.launch(&stream)
    }

    /// The codes in two's complement.
    fn widened(&self, x: &DeviceRows) -> Result<Buffer> {
        let bytes = x.codes.bytes();
        let to = self.gpu.alloc(bytes)?;
        self.kernels.launch(&WidenCodes {
            from: (&x.codes).into(),
            words: (bytes / 4) as i64,
            to: (&to).into(),
        })?;
        Ok(to)
    }
}
