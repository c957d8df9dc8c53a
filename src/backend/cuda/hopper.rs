/*! The integer product on Hopper's tensor cores (kernels/hopper.cuh): weights in blocks, activations in tiles.

It takes codes in groups of 32, 64 or 128 with INT8 outliers or none; `integer.cu` takes all others, and serves all other
devices. */

use super::gpu::Buffer;
use super::integer::Narrow;
use super::kernels::{self, Output, Tiling};
use super::launch::{Geometry, arguments};
use super::tensor::{Blocks, Layout, Outliers, Quantized, Rows, SCALE_MULTIPLE, Site};
use super::{Cuda, THREADS};
use crate::Result;
use crate::quant::levels::Levels;
use crate::quant::number::{LinearFormat, NumberFormat, OutlierFormat, RowFormat};

/// Places of a panel.
pub(super) const PANEL: usize = 128;
/// Tokens are padded to a multiple of so many where codes are tiled.
const TOKEN_MULTIPLE: usize = 8;
/// Groups whose scales lie beside each other.
const SCALE_GROUPS: usize = 8;
/// Rows of a block of weights.
const BLOCK_ROWS: usize = 64;
/// Outlier channels of a block of weights, and its bytes.
const OUTLIER_PART: usize = 64;
const OUTLIER_BYTES: usize = 64 * 64 + 64 * 2;

/// Tokens as they are padded in tiles.
pub(super) fn padded_tokens(tokens: usize) -> usize {
    tokens.next_multiple_of(TOKEN_MULTIPLE)
}

/// Bytes of the scales of a tile's groups.
pub(super) fn tiled_scale_bytes(groups: usize, tokens: usize) -> usize {
    2 * groups.next_multiple_of(SCALE_GROUPS) * padded_tokens(tokens)
}

/// Panels of so many places.
fn panels(places: usize) -> usize {
    places.div_ceil(PANEL)
}

impl Cuda {
    /// Whether products of such rows are computed here.
    pub(super) fn takes_tiles(&self, format: &RowFormat) -> bool {
        self.narrow == Narrow::Wgmma
            && format.numbers.bits < 16
            && matches!(format.numbers.group_size, 32 | 64 | 128)
            && matches!(format.outliers(), None | Some(OutlierFormat::Int8))
    }

    /// Weights as the kernels read them; a row for each place of `feeds`, where their outputs are to lie in its order.
    pub(super) fn blocks(&self, weight: &Quantized, feeds: Option<&Site>) -> Result<Blocks> {
        let LinearFormat { row, rows_per_scale } = weight.format;
        let RowFormat { numbers, groups, .. } = row;
        let NumberFormat { bits, levels, group_size, .. } = numbers;
        let (wide, fp4) = (bits == 8, levels == Levels::Fp4);
        let order = feeds.map(|site| &*site.order);
        let rows = feeds.map_or(weight.rows, |site| site.format.width());
        let (panels, row_blocks) = (panels(row.grouped_channels()), rows.div_ceil(BLOCK_ROWS));
        let defines = kernels::blocks(group_size, wide, fp4);
        let launch = |entry: &str, columns: usize, arguments: &[_]| {
            let grid = (columns, row_blocks, 1);
            let geometry = Geometry { grid, threads: 128, shared_bytes: 0 };
            self.kernels.launch("blocks", &defines, entry, geometry, arguments)
        };
        let bytes = row_blocks * panels * kernels::block_bytes(group_size, wide);
        let codes = self.gpu.alloc(bytes)?;
        launch(
            "pack_weights",
            panels,
            arguments![
                weight.codes(),
                weight.scales(),
                order,
                rows,
                groups,
                rows_per_scale,
                &codes
            ],
        )?;
        let parts = row.outlier_channels.div_ceil(OUTLIER_PART);
        let outliers = if parts == 0 {
            None
        } else {
            let outliers = self.gpu.alloc(row_blocks * parts * OUTLIER_BYTES)?;
            let [of_codes, of_scales, _] = weight.outliers();
            let width = weight.shared.outliers.padded();
            launch(
                "pack_outliers",
                parts,
                arguments![of_codes, of_scales, order, rows, width, &outliers],
            )?;
            Some(outliers)
        };
        Ok(Blocks { wide, fp4, codes, outliers })
    }

    /// Rows in tiles.
    pub(super) fn tiled(&self, x: &Rows) -> Result<Rows> {
        let &Rows { tokens, format, scale_stride, .. } = x;
        let groups = format.groups;
        let padded = padded_tokens(tokens);
        let tile = |codes: &Buffer, width: usize, magnitudes: bool| -> Result<Buffer> {
            let panels = panels(width);
            let to = self.gpu.alloc(panels * padded * PANEL)?;
            self.layout(
                "tile_codes",
                panels * padded * PANEL / 16,
                arguments![codes, tokens, width, padded, panels, i32::from(magnitudes), &to],
            )?;
            Ok(to)
        };
        let codes = tile(&x.codes, format.grouped_channels(), x.in_magnitudes())?;
        let scales = self.gpu.alloc(tiled_scale_bytes(groups, tokens))?;
        self.layout(
            "tile_scales",
            groups.div_ceil(SCALE_GROUPS) * padded,
            arguments![&x.scales, groups, scale_stride, tokens, padded, &scales],
        )?;
        let outliers =
            self.outliers_in(x, padded, |codes| tile(codes, x.outliers.padded(), false))?;
        Ok(Rows { layout: Layout::Tiled, codes, scales, scale_stride: padded, outliers, ..*x })
    }

    /// Tiles as rows.
    pub(super) fn untiled(&self, x: &Rows) -> Result<Rows> {
        let &Rows { tokens, format, scale_stride: padded, .. } = x;
        let groups = format.groups;
        let untile = |from: &Buffer, width: usize, magnitudes: bool| -> Result<Buffer> {
            let to = self.gpu.alloc(tokens * width)?;
            self.layout(
                "untile_codes",
                tokens * width,
                arguments![from, tokens, width, padded, i32::from(magnitudes), &to],
            )?;
            Ok(to)
        };
        let codes = untile(&x.codes, format.grouped_channels(), x.in_magnitudes())?;
        let scale_stride = tokens.next_multiple_of(SCALE_MULTIPLE);
        let scales = self.gpu.alloc(4 * scale_stride * groups)?;
        self.layout(
            "untile_scales",
            scale_stride * groups,
            arguments![&x.scales, groups, scale_stride, tokens, padded, &scales],
        )?;
        let outliers =
            self.outliers_in(x, tokens, |codes| untile(codes, x.outliers.padded(), false))?;
        Ok(Rows { layout: Layout::RowMajor, codes, scales, scale_stride, outliers, ..*x })
    }

    /// The INT8 outliers of rows with their codes in another layout, and room for `count` scales.
    fn outliers_in(
        &self,
        x: &Rows,
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

    /// Launches one of `blocks`' kernels that are the same for all formats, a thread for each of `count`.
    fn layout(
        &self,
        entry: &str,
        count: usize,
        arguments: &[super::launch::Argument],
    ) -> Result<()> {
        let defines = kernels::blocks(PANEL, false, false);
        self.kernels.launch("blocks", &defines, entry, Geometry::over(count, THREADS), arguments)
    }

    /// `x w^T` `[tokens, rows]` into `to`. With as many tokens as a whole tile's the sums are those of
    /// the specification bit by bit; with fewer, a row's groups are added up in several parts.
    pub(super) fn tiled_product(
        &self,
        x: &Rows,
        blocks: &Blocks,
        rows: usize,
        to: &Buffer,
        output: Output,
    ) -> Result<()> {
        assert_eq!(x.layout, Layout::Tiled);
        let Rows { tokens, format, scale_stride, .. } = *x;
        // Magnitudes meet weights of 8 bits in two's complement.
        let widened = (x.in_magnitudes() && blocks.wide).then(|| self.widened(x)).transpose()?;
        let codes = widened.as_ref().unwrap_or(&x.codes);
        let wide = [!x.in_magnitudes() || blocks.wide, blocks.wide];
        let multiprocessors = self.gpu.multiprocessors;
        let tiling = Tiling {
            fp4: blocks.fp4,
            output,
            ..Tiling::of(tokens, rows, format.numbers.group_size, wide, multiprocessors)
        };
        let panels = panels(format.grouped_channels());
        let parts = x.outliers.channels.div_ceil(OUTLIER_PART);
        let arguments = arguments![
            codes,
            &x.scales,
            x.outliers.codes.as_ref(),
            x.outliers.scales.as_ref(),
            &blocks.codes,
            blocks.outliers.as_ref(),
            to,
            tokens,
            scale_stride,
            rows,
            panels,
            parts
        ];
        let tiles = rows.div_ceil(BLOCK_ROWS * tiling.blocks);
        let (defines, shared_bytes) = (tiling.defines(), tiling.shared_bytes());
        if tiling.is_for_many() {
            // A block for each part of a tile, if the device holds so many: the kernel decides which tiles it takes in parts.
            let parts = tiles * tokens.div_ceil(tiling.tokens) * tiling.blocks;
            let grid = (parts.min(multiprocessors), 1, 1);
            let geometry = Geometry { grid, threads: 128 * (tiling.blocks + 1), shared_bytes };
            return self.kernels.launch(
                "product_tiles",
                &defines,
                "integer_tiles",
                geometry,
                arguments,
            );
        }
        let threads = tiling.stream_threads();
        let geometry = |cluster| Geometry { grid: (tiles, cluster, 1), threads, shared_bytes };
        let (family, entry) = ("product_stream", "integer_stream");
        let stages = panels.div_ceil(tiling.panels) + parts;
        let mut cluster = tiling.cluster(tiles, stages, multiprocessors);
        let held = |cluster| {
            let shape = geometry(cluster);
            self.kernels.resident_clusters(family, &defines, entry, shape, cluster)
        };
        while cluster > 1 && held(cluster)? < tiles {
            cluster -= 1;
        }
        self.kernels.launch_clusters(family, &defines, entry, geometry(cluster), cluster, arguments)
    }

    /// The codes in two's complement.
    fn widened(&self, x: &Rows) -> Result<Buffer> {
        let bytes = x.codes.bytes();
        let to = self.gpu.alloc(bytes)?;
        self.layout("widen_codes", bytes / 4, arguments![&x.codes, (bytes / 4) as i64, &to])?;
        Ok(to)
    }
}
