/*! The kernels' sources, and the shapes each is compiled for. */

/// Macros and their values.
pub type Defines = Vec<(&'static str, String)>;

/// A file of kernels: one source for every shape, told apart by macros.
pub struct Family {
    /// The file's name without `.cu`.
    pub name: &'static str,
    /// What NVRTC compiles: `common.cuh`, then the file.
    pub source: &'static str,
    /// The one architecture it is for; none for any.
    pub only: Option<&'static str>,
    /// The tensor-core instruction that the machine code must contain, such as `HMMA`.
    pub tensor_core: Option<&'static str>,
    /// Macro sets that stand for all others: each is compiled for every architecture in the tests.
    pub variants: fn() -> Vec<Defines>,
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
    wide: bool,
) -> Defines {
    vec![
        ("FROM", from.to_owned()),
        ("GROUP", group.to_string()),
        ("TRANSFORM", flag(hadamard)),
        ("ORDERED", flag(ordered)),
        ("TOKENS", tokens.to_string()),
        ("TILED", flag(tiled)),
        ("WIDE", flag(wide)),
    ]
}

fn flag(set: bool) -> String {
    u8::from(set).to_string()
}

/// What the two products for Hopper are compiled for.
#[derive(Clone, Copy, Debug)]
pub struct Tiling {
    /// Channels that share a scale: 32, 64 or 128.
    pub group: usize,
    /// Tokens of a tile.
    pub tokens: usize,
    /// Blocks of 64 rows in a tile.
    pub blocks: usize,
    /// Warpgroups that share a block's stages.
    pub split: usize,
    /// Blocks of threads that an SM holds at least.
    pub per_sm: usize,
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
    /// For products of so many tokens.
    pub fn of(tokens: usize, group: usize) -> Self {
        let (tokens, blocks, split, per_sm) = match tokens {
            0..=8 => (8, 1, 2, 3),
            9..=16 => (16, 1, 2, 3),
            // Four groups a stage take registers that two blocks of threads do not have.
            17..=32 if group == 32 => (32, 2, 1, 1),
            17..=32 => (32, 2, 1, 2),
            33..=64 => (64, 2, 1, 1),
            _ => (128, 2, 1, 1),
        };
        Self {
            group,
            tokens,
            blocks,
            split,
            per_sm,
            wide: [false; 2],
            fp4: false,
            output: Output::Half,
        }
    }

    /// The macros of `product_tiles` and `product_stream`.
    pub fn defines(&self) -> Defines {
        let bits = |wide: bool| if wide { "8" } else { "4" }.to_owned();
        vec![
            ("GROUP", self.group.to_string()),
            ("TOKENS", self.tokens.to_string()),
            ("BLOCKS", self.blocks.to_string()),
            ("SPLIT", self.split.to_string()),
            ("PER_SM", self.per_sm.to_string()),
            ("STAGES", self.stages().to_string()),
            ("X_BITS", bits(self.wide[0])),
            ("W_BITS", bits(self.wide[1])),
            ("W_FP4", flag(self.fp4)),
            ("OUT", (self.output as u8).to_string()),
        ]
    }

    /// Whether a block of threads takes tile after tile.
    pub fn is_for_many(&self) -> bool {
        self.tokens > 64
    }

    /// Bytes of a stage, as hopper.cuh counts them.
    fn stage_bytes(&self) -> usize {
        let block = block_bytes(self.group, self.wide[1]);
        (self.tokens * (128 + 16) + self.blocks * block).next_multiple_of(1024)
    }

    /// Bytes behind the stages: where the results of many tokens are turned around, and what the product of scales reaches
    /// by compute-sanitizer's count, 128 bytes a token, though it uses 16.
    fn bytes_behind(&self) -> usize {
        self.tokens * 128 * if self.is_for_many() { self.blocks } else { 1 }
    }

    /// As many stages as there is room for, but no more than are of use.
    fn stages(&self) -> usize {
        const SM_BYTES: usize = 227 << 10;
        // A block of threads has a kilobyte of its own, and one for alignment.
        let room = SM_BYTES / self.per_sm - 2048 - self.bytes_behind();
        (room / self.stage_bytes()).min(16)
    }

    /// Dynamic shared memory of a block of threads.
    pub fn shared_bytes(&self) -> usize {
        self.stages() * self.stage_bytes() + self.bytes_behind() + 1024
    }
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
            "#line 1 \"common.cuh\"\n",
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
        variants: || {
            vec![blocks(128, false, false), blocks(64, false, true), blocks(32, true, false)]
        },
    },
    Family {
        name: "cache",
        source: source!("cache", "heads", "pages"),
        only: None,
        tensor_core: None,
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
        variants: || vec![vec![]],
    },
    Family {
        name: "fused",
        source: source!("fused"),
        only: None,
        tensor_core: None,
        variants: || {
            vec![
                fused("NORM", 128, true, true, 4, true, false),
                fused("NORM", 64, true, true, 1, false, false),
                fused("HALF", 128, true, true, 8, true, false),
                fused("HALF", 32, false, true, 2, true, true),
                fused("SILU", 128, true, false, 8, true, false),
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
        variants: || vec![vec![], formats(true, false)],
    },
    Family {
        name: "integer",
        source: source!("integer"),
        only: None,
        tensor_core: Some("IMMA"),
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
        variants: || vec![vec![]],
    },
    Family {
        name: "prepare",
        source: source!("prepare", "heads"),
        only: None,
        tensor_core: None,
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
        variants: || {
            use Output::{Float, Half};
            let tiling = |tokens, group, wide, fp4, output| {
                Tiling { wide, fp4, output, ..Tiling::of(tokens, group) }.defines()
            };
            vec![
                tiling(1, 128, [false; 2], false, Half),
                tiling(16, 64, [false; 2], true, Half),
                tiling(32, 32, [false; 2], false, Float),
                tiling(64, 128, [false; 2], false, Half),
                tiling(8, 128, [true, false], false, Half),
                tiling(64, 128, [true; 2], false, Half),
            ]
        },
    },
    Family {
        name: "product_tiles",
        source: source!("product_tiles", "hopper"),
        only: Some("sm_90a"),
        tensor_core: Some("IGMMA"),
        variants: || {
            use Output::{Added, Float, Half};
            let tiling = |group, wide, fp4, output| {
                Tiling { wide, fp4, output, ..Tiling::of(1024, group) }.defines()
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
        variants: || vec![vec![]],
    },
];
