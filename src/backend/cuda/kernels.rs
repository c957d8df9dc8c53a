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
            let set = |group: usize, transform: usize, element: &str, paired: usize| {
                vec![
                    ("GROUP", group.to_string()),
                    ("TRANSFORM", transform.to_string()),
                    ("IN", element.to_owned()),
                    ("THREADS", "256".to_owned()),
                    ("PAIRED", paired.to_string()),
                ]
            };
            vec![
                set(128, 1, "half", 1),
                set(128, 1, "half", 0),
                set(128, 0, "float", 0),
                set(32, 0, "half", 1),
                set(256, 1, "half", 1),
                set(64, 1, "bf16", 1),
                set(1024, 1, "half", 0),
                set(48, 1, "half", 0),
                set(176, 0, "bf16", 0),
            ]
        },
    },
    Family {
        name: "attention",
        source: source!("attention"),
        tensor_core: Some("HMMA"),
        variants: || {
            let set = |head_dim: usize, bits: usize, rotate: usize, after_rope: usize| {
                vec![
                    ("HEAD_DIM", head_dim.to_string()),
                    ("KV_BITS", bits.to_string()),
                    ("ROTATE", rotate.to_string()),
                    ("AFTER_ROPE", after_rope.to_string()),
                ]
            };
            vec![
                set(128, 16, 0, 1),
                set(128, 4, 1, 1),
                set(64, 4, 0, 0),
                set(96, 4, 1, 0),
                set(20, 8, 1, 1),
                set(256, 4, 1, 1),
            ]
        },
    },
    Family {
        name: "elementwise",
        source: source!("elementwise"),
        tensor_core: None,
        variants: || vec![vec![]],
    },
    Family { name: "gptq", source: source!("gptq"), tensor_core: None, variants: || vec![vec![]] },
    Family {
        name: "integer",
        source: source!("integer"),
        tensor_core: Some("IMMA"),
        variants: || {
            let set = |group: usize, half: usize| {
                vec![("GROUP", group.to_string()), ("OUT_HALF", half.to_string())]
            };
            vec![set(128, 1), set(64, 1), set(16, 0), set(48, 0), set(176, 1), set(10880, 0)]
        },
    },
    Family {
        name: "reduce",
        source: source!("reduce"),
        tensor_core: None,
        variants: || vec![vec![]],
    },
];
