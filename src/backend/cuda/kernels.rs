/*! The kernels' sources, and the shapes each is compiled for. */

/// Macros and their values.
pub type Defines = Vec<(&'static str, String)>;

/// A file of kernels: one source for every shape, told apart by macros.
pub struct Family {
    /// The file's name without `.cu`.
    pub name: &'static str,
    /// What NVRTC compiles: `common.cuh`, then the file.
    pub source: &'static str,
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

/// Macros of `attention`.
pub fn attention(head_dim: usize, rotated: bool) -> Defines {
    vec![("HEAD_DIM", head_dim.to_string()), ("ROTATED", flag(rotated))]
}

/// Macros of `integer`; `half` gives f16 instead of f32.
pub fn integer(group: usize, half: bool) -> Defines {
    vec![("GROUP", group.to_string()), ("OUT_HALF", flag(half))]
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

/// The source of a family. Line numbers in the compiler's messages are those of its own file.
macro_rules! source {
    ($name:literal) => {
        concat!(
            "#line 1 \"common.cuh\"\n",
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/common.cuh")),
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
        tensor_core: Some("HMMA"),
        variants: || {
            vec![
                attention(128, false),
                attention(128, true),
                attention(64, false),
                attention(96, true),
                attention(20, true),
                attention(256, true),
            ]
        },
    },
    Family {
        name: "elementwise",
        source: source!("elementwise"),
        tensor_core: None,
        variants: || vec![vec![]],
    },
    Family {
        name: "fused",
        source: source!("fused"),
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
        tensor_core: None,
        variants: || vec![vec![], formats(true, false)],
    },
    Family {
        name: "integer",
        source: source!("integer"),
        tensor_core: Some("IMMA"),
        variants: || {
            vec![
                integer(128, true),
                integer(64, true),
                integer(16, false),
                integer(48, false),
                integer(176, true),
                integer(10880, false),
            ]
        },
    },
    Family {
        name: "prepare",
        source: source!("prepare"),
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
        name: "reduce",
        source: source!("reduce"),
        tensor_core: None,
        variants: || vec![vec![]],
    },
];
