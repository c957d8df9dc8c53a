/*! The kernels' sources, and the shapes each is compiled for. */

/// Macros and their values.
pub type Defines = Vec<(&'static str, String)>;

/// A file of kernels: one source for every shape, told apart by macros.
pub struct Family {
    /// The file's name without `.cu`.
    pub name: &'static str,
    /// What NVRTC compiles: `ptx.cuh`, `common.cuh`, then the file.
    pub source: &'static str,
    /// The one architecture it is for; none for any.
    pub only: Option<&'static str>,
    /// The tensor-core instruction that the machine code must contain, such as `HMMA`; of products for few tokens another.
    pub tensor_core: Option<&'static str>,
    /// Whether its kernels may begin while one of such a family ends, on Hopper and later ones: each calls `pdl_wait`
    /// (ptx.cuh) before it touches what others write, and none writes what another reads before that: weights, orders.
    pub overlaps: bool,
    /// Macro sets that stand for all others: each is compiled for every architecture in the tests.
    pub variants: fn() -> Vec<Defines>,
}

impl Family {
    /// The tensor-core instruction that the machine code must contain with these macros.
    pub fn tensor_core_with(&self, defines: &Defines) -> Option<&'static str> {
        let by_warps = defines.iter().any(|(name, value)| *name == "BY_WARPS" && value == "1");
        if by_warps { Some("IMMA") } else { self.tensor_core }
    }
}

/// Macros of `arrange` for rows of type `element`: half, bf16 or float.
pub fn arrange(
    group: usize,
    hadamard: bool,
    element: &str,
    threads: usize,
    paired: bool,
) -> Defines {
    vec![
        ("GROUP", group.to_string()),
        ("TRANSFORM", flag(hadamard)),
        ("IN", element.to_owned()),
        ("THREADS", threads.to_string()),
        ("PAIRED", flag(paired)),
    ]
}

/// Macros that `arrange` and `gptq` have beside their others where codes are FP4 or outliers FP8.
pub fn formats(fp4: bool, fp8: bool) -> Defines {
    let all = [("FP4", fp4), ("FP8", fp8)];
    all.into_iter().filter(|(_, set)| *set).map(|(name, set)| (name, flag(set))).collect()
}

/// Macros of `prepare`; `kv_bits` is 16 where nothing is quantized.
pub fn prepare(head_dim: usize, kv_bits: u8, rotated: bool, after_rope: bool) -> Defines {
    vec![
        ("HEAD_DIM", head_dim.to_string()),
        ("KV_BITS", kv_bits.to_string()),
        ("ROTATED", flag(rotated)),
        ("AFTER_ROPE", flag(after_rope)),
    ]
}

/// Macros of `attention`; `windowed` where a token does not see all before it.
pub fn attention(head_dim: usize, rotated: bool, windowed: bool) -> Defines {
    vec![
        ("HEAD_DIM", head_dim.to_string()),
        ("ROTATED", flag(rotated)),
        ("WINDOWED", flag(windowed)),
    ]
}

/// Macros of `integer`; `half` gives f16 instead of f32, `nibbles` takes codes two a byte.
pub fn integer(group: usize, half: bool, nibbles: bool) -> Defines {
    let mut defines = vec![("GROUP", group.to_string()), ("OUT_HALF", flag(half))];
    if nibbles {
        defines.push(("NIBBLES", flag(true)));
    }
    defines
}

/// Macros of `fused`: `from` is NORM, HALF or SILU, `tokens` the rows of a block.
pub fn fused(
    from: &str,
    group: usize,
    hadamard: bool,
    ordered: bool,
    tokens: usize,
    tiled: bool,
    magnitudes: bool,
) -> Defines {
    vec![
        ("FROM", from.to_owned()),
        ("GROUP", group.to_string()),
        ("TRANSFORM", flag(hadamard)),
        ("ORDERED", flag(ordered)),
        ("TOKENS", tokens.to_string()),
        ("TILED", flag(tiled)),
        ("MAGNITUDES", flag(magnitudes)),
    ]
}

fn flag(set: bool) -> String {
    u8::from(set).to_string()
}

/// Tokens up to which `product_stream`'s warps multiply by themselves, by `mma.sync`, codes in two's complement.
pub const FEW_TOKENS: usize = 16;
/// Blocks of threads of a cluster at most, by what every device takes.
const LARGEST_CLUSTER: usize = 8;
/// And for few tokens, of which two have enough on their way.
const CLUSTER_OF_FEW: usize = 2;

/// What the two products for Hopper are compiled for.
#[derive(Clone, Copy, Debug)]
pub struct Tiling {
    /// Channels that share a scale: 32, 64 or 128.
    pub group: usize,
    /// Tokens of a tile.
    pub tokens: usize,
    /// Blocks of 64 rows in a tile.
    pub blocks: usize,
    /// Times 128 places in a stage.
    pub panels: usize,
    /// Warpgroups that share a block's stages.
    pub split: usize,
    /// Blocks of threads that an SM holds at least.
    pub per_sm: usize,
    /// Stages whose weights `product_stream` asks for before it has waited for the kernel before.
    pub early: usize,
    /// Whether activations' and weights' codes have 8 bits.
    pub wide: [bool; 2],
    /// Whether weights are FP4.
    pub fp4: bool,
    /// What results become.
    pub output: Output,
}

/// What a product's results become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// f32 values.
    Float,
    /// f16 values.
    Half,
    /// Added to f32 values that are there: of many tokens only.
    Added,
}

impl Tiling {
    /// For products of so many tokens with weights of `rows` rows, on so many multiprocessors.
    pub fn of(
        tokens: usize,
        rows: usize,
        group: usize,
        wide: [bool; 2],
        multiprocessors: usize,
    ) -> Self {
        let (tokens, blocks, panels, split, per_sm) = match tokens {
            0..=8 => (8, 1, 2, 2, blocks_a_multiprocessor(rows, multiprocessors).min(4)),
            9..=FEW_TOKENS => (16, 1, 2, 2, blocks_a_multiprocessor(rows, multiprocessors).min(3)),
            17..=32 if narrow_tiles_fill(rows, multiprocessors) => (32, 1, 2, 4, 1),
            17..=32 => (32, 3, 2, 1, 1),
            33..=64 if narrow_tiles_fill(rows, multiprocessors) => (64, 1, 2, 2, 1),
            33..=64 => (64, 3, 1, 1, 1),
            _ => (128, 2, 1, 1, 1),
        };
        // A panel of 8 bits is twice as long.
        let panels = if wide[1] { 1 } else { panels };
        Self {
            group,
            tokens,
            blocks,
            panels,
            split,
            per_sm,
            early: early_stages(tokens, rows, per_sm, multiprocessors),
            wide,
            fp4: false,
            output: Output::Half,
        }
    }

    /// Blocks of threads that share a tile's stages, if the device holds so many.
    pub fn cluster(&self, tiles: usize, stages: usize, multiprocessors: usize) -> usize {
        let most = if self.tokens <= FEW_TOKENS { CLUSTER_OF_FEW } else { LARGEST_CLUSTER };
        (multiprocessors * self.per_sm / tiles).clamp(1, most.min(stages))
    }

    /// The macros of `product_tiles` and `product_stream`.
    pub fn defines(&self) -> Defines {
        let bits = |wide: bool| if wide { "8" } else { "4" }.to_owned();
        vec![
            ("GROUP", self.group.to_string()),
            ("TOKENS", self.tokens.to_string()),
            ("BLOCKS", self.blocks.to_string()),
            ("PANELS", self.panels.to_string()),
            ("SPLIT", self.split.to_string()),
            ("PER_SM", self.per_sm.to_string()),
            ("COPIERS", self.copiers().to_string()),
            ("STAGES", self.stages().to_string()),
            ("BY_WARPS", flag(self.tokens <= FEW_TOKENS)),
            ("X_BITS", bits(self.wide[0])),
            ("W_BITS", bits(self.wide[1])),
            ("W_FP4", flag(self.fp4)),
            ("OUT", (self.output as u8).to_string()),
            ("EARLY", self.early.min(self.stages()).to_string()),
        ]
    }

    /// Whether a block of threads takes tile after tile.
    pub fn is_for_many(&self) -> bool {
        is_for_many(self.tokens)
    }

    /// Threads of a block of `product_stream` whose warps copy.
    fn copiers(&self) -> usize {
        match self.blocks * self.split {
            // Too many registers are needed for what a block of warps has: the fourth gives its own.
            3 => 128,
            4 => 64,
            _ => 32,
        }
    }

    /// Threads of a block of `product_stream`.
    pub fn stream_threads(&self) -> usize {
        128 * self.blocks * self.split + self.copiers()
    }

    /// Bytes of a stage, as hopper.cuh counts them.
    fn stage_bytes(&self) -> usize {
        let block = block_bytes(self.group, self.wide[1]);
        let panel = self.tokens * 128 + self.blocks * block;
        let scales = (self.tokens * 16).next_multiple_of(1024);
        (scales + self.panels * panel).next_multiple_of(1024)
    }

    /// Bytes behind the stages, where the results of many tokens are turned around.
    fn bytes_behind(&self) -> usize {
        if self.is_for_many() { self.blocks * self.tokens * 128 } else { 0 }
    }

    /// As many stages as there is room for, but no more than are of use; a multiple of `split`, so that a place in the ring is
    /// always the same warpgroup's. A warpgroup that skips a place would not see whether the other's stage has come there
    /// yet, when its own of the round before has: copies arrive in any order, and barriers tell odd rounds from even ones only.
    fn stages(&self) -> usize {
        const SM_BYTES: usize = 227 << 10;
        // A block of threads has a kilobyte of its own, and one for alignment.
        let room = SM_BYTES / self.per_sm - 2048 - self.bytes_behind();
        (room / self.stage_bytes()).min(16) / self.split * self.split
    }

    /// Dynamic shared memory of a block of threads.
    pub fn shared_bytes(&self) -> usize {
        self.stages() * self.stage_bytes() + self.bytes_behind() + 1024
    }
}

/// Whether the product of so many tokens goes tile after tile.
pub fn is_for_many(tokens: usize) -> bool {
    tokens > 64
}

/// Blocks of threads that a multiprocessor must hold for all tiles of 64 rows to be under way at once, two for a tile where tiles are
/// not many more than multiprocessors; not less than two. Fewer blocks have more stages each.
fn blocks_a_multiprocessor(rows: usize, multiprocessors: usize) -> usize {
    blocks_of_few(rows, multiprocessors).div_ceil(multiprocessors).max(2)
}

/// Blocks of threads of a product of few tokens.
fn blocks_of_few(rows: usize, multiprocessors: usize) -> usize {
    let tiles = rows.div_ceil(64);
    if 3 * tiles <= 4 * multiprocessors { CLUSTER_OF_FEW * tiles } else { tiles }
}

/// Stages asked for early. What is asked for stands before the tokens' copies, and before those of the kernel that still runs. Where
/// the device holds the blocks of both kernels all begin early, and gain by none; docs/kernels.md has what was measured.
fn early_stages(tokens: usize, rows: usize, per_sm: usize, multiprocessors: usize) -> usize {
    let both_fit = 2 * blocks_of_few(rows, multiprocessors) <= per_sm * multiprocessors;
    match tokens {
        0..=FEW_TOKENS if both_fit => 0,
        0..=8 => 3,
        _ => 2,
    }
}

/// Whether 17 to 64 tokens are multiplied sooner in tiles of 64 rows than in tiles of 192, of which a stage takes 2.85 times as
/// long (H200, 64 tokens), by the rounds that each takes.
fn narrow_tiles_fill(rows: usize, multiprocessors: usize) -> bool {
    let time = |tile_rows: usize, stage: f64| {
        let tiles = rows.div_ceil(tile_rows);
        // Clusters of more than two leave some multiprocessors of each part of the device without work.
        let pairs = multiprocessors / 2 >= tiles;
        let larger = (multiprocessors * 7 / 8 / tiles).min(LARGEST_CLUSTER);
        let cluster = larger.max(if pairs { 2 } else { 1 });
        stage * (tiles * cluster).div_ceil(multiprocessors) as f64 / cluster as f64
    };
    time(64, 1.0) < time(192, 2.85)
}

/// Bytes of 64 rows and 128 places of weights: codes and f16 scales.
pub fn block_bytes(group: usize, wide: bool) -> usize {
    64 * 128 / if wide { 1 } else { 2 } + 128 / group * 64 * 2
}

/// Macros of `blocks`.
pub fn blocks(group: usize, wide: bool, fp4: bool) -> Defines {
    vec![
        ("GROUP", group.to_string()),
        ("W_BITS", if wide { "8" } else { "4" }.to_owned()),
        ("W_FP4", flag(fp4)),
    ]
}

/// Macros of `cache`; `kv_bits` is 16 where nothing is quantized.
pub fn cache(head_dim: usize, kv_bits: u8, rotated: bool) -> Defines {
    vec![
        ("HEAD_DIM", head_dim.to_string()),
        ("KV_BITS", kv_bits.to_string()),
        ("ROTATED", flag(rotated)),
    ]
}

/// Macros of `decode`, for pages of codes or of f16; `single` where a key and value head serves one query head.
pub fn decode(head_dim: usize, quantized: bool, rotated: bool, single: bool) -> Defines {
    let pages = cache(head_dim, if quantized { 4 } else { 16 }, rotated);
    [pages, vec![("SINGLE", flag(single))]].concat()
}

/// The source of a family, behind what it has in common with others. Line numbers in the compiler's messages are those of
/// its own file.
macro_rules! source {
    ($name:literal $(, $common:literal)*) => {
        concat!(
            "#line 1 \"ptx.cuh\"\n",
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/ptx.cuh")),
            "\n#line 1 \"common.cuh\"\n",
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/common.cuh")),
            $(
                "\n#line 1 \"",
                $common,
                ".cuh\"\n",
                include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/", $common, ".cuh")),
            )*
            "\n#line 1 \"",
            $name,
            ".cu\"\n",
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/", $name, ".cu")),
        )
    };
}

/// Every file in `kernels/`.
pub const FAMILIES: &[Family] = &[
    Family {
        name: "arrange",
        source: source!("arrange"),
        only: None,
        tensor_core: None,
        overlaps: false,
        variants: || {
            vec![
                arrange(128, true, "half", 256, true),
                arrange(128, true, "half", 256, false),
                arrange(128, false, "float", 256, false),
                arrange(32, false, "half", 256, true),
                arrange(256, true, "half", 256, true),
                arrange(64, true, "bf16", 256, true),
                arrange(1024, true, "half", 256, false),
                arrange(48, true, "half", 256, false),
                arrange(176, false, "bf16", 256, false),
                [arrange(128, true, "half", 256, true), formats(true, true)].concat(),
                [arrange(48, true, "float", 256, false), formats(true, false)].concat(),
            ]
        },
    },
    Family {
        name: "attention",
        source: source!("attention"),
        only: None,
        tensor_core: Some("HMMA"),
        overlaps: true,
        variants: || {
            vec![
                attention(128, false, false),
                attention(128, true, false),
                attention(128, true, true),
                attention(64, false, false),
                attention(64, false, true),
                attention(96, true, false),
                attention(20, true, false),
                attention(256, true, false),
                attention(256, true, true),
            ]
        },
    },
    Family {
        name: "blocks",
        source: source!("blocks"),
        only: None,
        tensor_core: None,
        overlaps: false,
        variants: || {
            vec![blocks(128, false, false), blocks(64, false, true), blocks(32, true, false)]
        },
    },
    Family {
        name: "cache",
        source: source!("cache", "heads", "pages"),
        only: None,
        tensor_core: None,
        overlaps: true,
        variants: || {
            vec![
                cache(128, 4, true),
                cache(128, 16, false),
                cache(96, 3, true),
                cache(96, 4, false),
                cache(64, 2, false),
            ]
        },
    },
    Family {
        name: "decode",
        source: source!("decode", "heads", "pages"),
        only: None,
        tensor_core: Some("HMMA"),
        overlaps: true,
        variants: || {
            vec![
                decode(128, true, true, false),
                decode(128, true, true, true),
                decode(128, false, false, false),
                decode(128, false, false, true),
                decode(96, true, true, false),
                decode(64, true, false, true),
                decode(64, false, false, false),
            ]
        },
    },
    Family {
        name: "elementwise",
        source: source!("elementwise"),
        only: None,
        tensor_core: None,
        overlaps: false,
        variants: || vec![vec![]],
    },
    Family {
        name: "fused",
        source: source!("fused"),
        only: None,
        tensor_core: None,
        overlaps: true,
        variants: || {
            vec![
                fused("NORM", 128, true, true, 4, true, true),
                fused("NORM", 64, true, true, 1, false, false),
                fused("HALF", 128, true, true, 8, true, true),
                fused("HALF", 32, false, true, 2, true, false),
                fused("SILU", 128, true, false, 8, true, true),
                fused("SILU", 128, true, true, 1, true, false),
                [fused("SILU", 64, true, true, 4, false, false), formats(true, false)].concat(),
            ]
        },
    },
    Family {
        name: "gptq",
        source: source!("gptq"),
        only: None,
        tensor_core: None,
        overlaps: false,
        variants: || vec![vec![], formats(true, false)],
    },
    Family {
        name: "integer",
        source: source!("integer"),
        only: None,
        tensor_core: Some("IMMA"),
        overlaps: false,
        variants: || {
            vec![
                integer(128, true, false),
                integer(64, true, false),
                integer(16, false, false),
                integer(48, false, false),
                integer(176, true, false),
                integer(10880, false, false),
                integer(128, true, true),
                integer(32, false, true),
                integer(96, false, true),
                integer(10880, true, true),
            ]
        },
    },
    Family {
        name: "measure",
        source: source!("measure"),
        only: None,
        tensor_core: None,
        overlaps: false,
        variants: || vec![vec![]],
    },
    Family {
        name: "prepare",
        source: source!("prepare", "heads"),
        only: None,
        tensor_core: None,
        overlaps: true,
        variants: || {
            vec![
                prepare(128, 16, false, true),
                prepare(128, 4, true, true),
                prepare(64, 4, false, false),
                prepare(96, 4, true, false),
                prepare(20, 8, true, true),
                prepare(256, 4, true, true),
            ]
        },
    },
    Family {
        name: "product_stream",
        source: source!("product_stream", "hopper"),
        only: Some("sm_90a"),
        tensor_core: Some("IGMMA"),
        overlaps: true,
        variants: || {
            use Output::{Float, Half};
            let tiling = |tokens, group, wide, fp4, output| {
                Tiling { fp4, output, ..Tiling::of(tokens, 12288, group, wide, 132) }.defines()
            };
            let narrow = |tokens, group| {
                let wide = [tokens <= FEW_TOKENS, false];
                Tiling::of(tokens, 4096, group, wide, 132).defines()
            };
            vec![
                tiling(1, 128, [true, false], false, Half),
                narrow(8, 128),
                tiling(8, 64, [true, false], true, Half),
                tiling(8, 32, [true; 2], false, Half),
                tiling(16, 64, [true, false], true, Half),
                tiling(16, 128, [true; 2], false, Float),
                narrow(16, 32),
                tiling(32, 32, [false; 2], false, Float),
                narrow(32, 128),
                tiling(64, 128, [false; 2], false, Half),
                narrow(64, 128),
                narrow(64, 32),
                tiling(64, 64, [true, false], true, Float),
                tiling(64, 128, [true; 2], false, Half),
            ]
        },
    },
    Family {
        name: "product_tiles",
        source: source!("product_tiles", "hopper"),
        only: Some("sm_90a"),
        tensor_core: Some("IGMMA"),
        overlaps: true,
        variants: || {
            use Output::{Added, Float, Half};
            let tiling = |group, wide, fp4, output| {
                Tiling { fp4, output, ..Tiling::of(1024, 12288, group, wide, 132) }.defines()
            };
            vec![
                tiling(128, [false; 2], false, Half),
                tiling(128, [false; 2], true, Half),
                tiling(128, [false; 2], false, Added),
                tiling(64, [false; 2], false, Float),
                tiling(32, [false; 2], false, Half),
                tiling(128, [true, false], false, Half),
                tiling(128, [true; 2], false, Float),
                tiling(64, [true; 2], false, Half),
                tiling(32, [true, false], true, Added),
            ]
        },
    },
    Family {
        name: "reduce",
        source: source!("reduce"),
        only: None,
        tensor_core: None,
        overlaps: false,
        variants: || vec![vec![]],
    },
];

#[cfg(test)]
mod tests {
    use super::Tiling;

    fn tiling(tokens: usize, rows: usize) -> Tiling {
        Tiling::of(tokens, rows, 128, [false; 2], 132)
    }

    /// What was faster on an H200, of shapes of Llama-2-7B and 70B.
    #[test]
    fn tiles_fill_the_device() {
        for (rows, blocks) in [(4096, 1), (8192, 1), (10240, 3), (12288, 3), (22016, 3), (57344, 1)]
        {
            assert_eq!(tiling(64, rows).blocks, blocks, "{rows} rows");
        }
        for (rows, per_sm) in [(4096, 2), (8192, 2), (10240, 3), (12288, 2), (22016, 3), (57344, 4)]
        {
            assert_eq!(tiling(8, rows).per_sm, per_sm, "{rows} rows");
            assert_eq!(tiling(16, rows).per_sm, per_sm.min(3), "{rows} rows");
        }
        for (rows, early) in [(4096, 0), (5120, 3), (8192, 3), (12288, 3), (57344, 3)] {
            assert_eq!(tiling(8, rows).early, early, "{rows} rows");
            assert_eq!(tiling(16, rows).early, early.min(2), "{rows} rows");
            assert_eq!(tiling(64, rows).early, 2, "{rows} rows");
        }
    }

    #[test]
    fn a_place_in_the_ring_is_one_warpgroups() {
        for tokens in [8, 16, 32, 64] {
            for (rows, group) in [(4096, 128), (12288, 128), (4096, 64), (4096, 32)] {
                for wide in [[false; 2], [true, false], [true; 2]] {
                    let tiling = Tiling::of(tokens, rows, group, wide, 132);
                    let stages = tiling.stages();
                    assert!(
                        stages >= 4 && stages.is_multiple_of(tiling.split),
                        "{stages}: {tiling:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn clusters_fill_the_device_once() {
        let cluster = |tokens, rows, stages| {
            let tiling = tiling(tokens, rows);
            tiling.cluster(rows.div_ceil(64 * tiling.blocks), stages, 132)
        };
        assert_eq!(cluster(8, 4096, 45), 2);
        assert_eq!(cluster(8, 8192, 114), 2);
        assert_eq!(cluster(8, 10240, 34), 2);
        assert_eq!(cluster(8, 12288, 18), 1);
        assert_eq!(cluster(8, 22016, 18), 1);
        assert_eq!(cluster(8, 57344, 18), 1);
        assert_eq!(cluster(32, 4096, 45), 2);
        assert_eq!(cluster(32, 12288, 18), 2);
        assert_eq!(cluster(64, 64, 87), 8);
    }
}
