/*! docs/format.md against the library: the reader printed there reads what we write. */

use std::path::Path;
use std::process::{Command, Stdio};

use atom::checkpoint::linear::{LinearShape, order_spec, order_tensor, specs, to_tensors};
use atom::checkpoint::{Options, Writer};
use atom::quant::linear::{OutlierBlock, QuantizedLinear};
use half::f16;
use serde_json::{Value, json};

const CHANNELS: usize = 135;

/// A linear of each bit width and outlier format, with padding, and whether it is transformed.
fn linears() -> Vec<(QuantizedLinear, bool)> {
    let mut state = 1u32;
    let mut random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let mut linears = Vec::new();
    for (bits, group_size, rows_per_scale, transformed) in
        [(4, 64, 1, true), (4, 128, 2, false), (3, 48, 1, true), (2, 16, 2, true), (8, 32, 1, true)]
    {
        for outlier_format in 0..3 {
            let rows = 7usize;
            let outlier_channels = if outlier_format == 0 { 0 } else { 9 };
            let groups = (CHANNELS - outlier_channels).div_ceil(group_size);
            let mut f16s = |n: usize| -> Vec<f16> {
                (0..n).map(|_| f16::from_f32(f32::from(random()) / 1024.0)).collect()
            };
            let scales = f16s(rows.div_ceil(rows_per_scale) * groups);
            let outliers = match outlier_format {
                0 => OutlierBlock::None,
                1 => {
                    let scales = f16s(rows);
                    let codes = (0..rows * 9).map(|_| (random() as i8).max(-127)).collect();
                    OutlierBlock::Int8 { codes, scales }
                }
                _ => OutlierBlock::F16(f16s(rows * 9)),
            };
            let codes =
                (0..rows * groups * group_size).map(|_| random() as i8 >> (8 - bits)).collect();
            let linear = QuantizedLinear {
                rows,
                bits,
                group_size,
                groups,
                rows_per_scale,
                codes,
                scales,
                outlier_channels,
                outliers,
            };
            linears.push((linear, transformed));
        }
    }
    linears
}

/// Channels in a scrambled order, padding inside the last group, outliers last.
fn order_of(linear: &QuantizedLinear) -> Vec<i32> {
    let mut order: Vec<i32> = (0..CHANNELS).map(|i| (i * 26 % CHANNELS) as i32).collect();
    let outliers = order.split_off(CHANNELS - linear.outlier_channels);
    order.resize(linear.grouped_channels(), -1);
    let last = order.len() - 1;
    order.swap(last, 3);
    order.extend(outliers);
    order
}

/// The linear as a matrix `[out, channels]` in the source's order, straight from docs/format.md.
fn dequantize(linear: &QuantizedLinear, order: &[i32], transformed: bool) -> Vec<f64> {
    let (size, grouped) = (linear.group_size, linear.grouped_channels());
    let block = 1 << size.trailing_zeros();
    let mut dense = vec![0f64; linear.rows * CHANNELS];
    for row in 0..linear.rows {
        let value = |p: usize| {
            f64::from(linear.codes[row * grouped + p]) * f64::from(linear.scale(row, p / size))
        };
        for (place, &channel) in order.iter().enumerate().filter(|(_, channel)| **channel >= 0) {
            let outlier = |p: usize| row * linear.outlier_channels + p - grouped;
            dense[row * CHANNELS + channel as usize] = match &linear.outliers {
                OutlierBlock::Int8 { codes, scales } if place >= grouped => {
                    f64::from(codes[outlier(place)]) * scales[row].to_f64()
                }
                OutlierBlock::F16(values) if place >= grouped => values[outlier(place)].to_f64(),
                _ if !transformed => value(place),
                _ => {
                    let (first, i) = (place / block * block, place % block);
                    let sum: f64 = (0..block)
                        .map(|j| {
                            let sign = if (i & j).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                            sign * value(first + j)
                        })
                        .sum();
                    sum / (block as f64).sqrt()
                }
            };
        }
    }
    dense
}

/// Writes all linears as one checkpoint, each with a site of its own.
fn write_checkpoint(out: &Path, max_shard_bytes: u64, linears: &[(QuantizedLinear, bool)]) {
    let (mut tensors, mut planned) = (Vec::new(), Vec::new());
    let (mut sites, mut entries) = (serde_json::Map::new(), serde_json::Map::new());
    for (i, (linear, transformed)) in linears.iter().enumerate() {
        let (name, site) = (format!("layers.{i}.proj"), format!("layers.{i}.attn_in"));
        let order = order_of(linear);
        planned.extend(specs(&name, &LinearShape::of(linear)));
        planned.push(order_spec(&site, order.len()));
        tensors.extend(to_tensors(&name, linear));
        tensors.push(order_tensor(&site, &order));
        let format = if matches!(linear.outliers, OutlierBlock::F16(_)) { "f16" } else { "int8" };
        let transform = if *transformed { "hadamard" } else { "none" };
        let mut entry = json!({
            "rows": linear.rows, "bits": linear.bits, "group_size": linear.group_size,
            "groups": linear.groups, "rows_per_scale": linear.rows_per_scale,
            "outlier_channels": linear.outlier_channels,
        });
        let mut description = entry.clone();
        description["channels"] = CHANNELS.into();
        description["outlier_format"] = format.into();
        description["transform"] = transform.into();
        entry["site"] = site.as_str().into();
        sites.insert(site, description);
        entries.insert(name, entry);
    }
    let options = Options { max_shard_bytes, ..Options::default() };
    let mut writer = Writer::create(out, planned, &Value::Null, options).unwrap();
    writer.write_block("all", tensors, Value::Null).unwrap();
    let atom = json!({"format_version": 1, "sites": sites, "linears": entries});
    writer.finish(&json!({}), atom, &[]).unwrap();
}

fn repository(file: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

#[test]
fn the_reader_in_the_document_is_the_one_that_is_tested() {
    let document = repository("docs/format.md");
    let block = document.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    assert_eq!(block, repository("tests/read_atom.py"));
}

#[test]
fn the_documents_reader_reads_what_we_write() {
    let python = std::env::var("ATOM_TEST_PYTHON").unwrap_or_else(|_| "python3".to_string());
    let numpy = Command::new(&python)
        .args(["-c", "import numpy"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !numpy {
        eprintln!("SKIPPED: {python} cannot import numpy, the document's reader was not run");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let linears = linears();
    for (folder, limit) in [("single", 5_000_000_000), ("sharded", 2000)] {
        let out = home.path().join(folder);
        write_checkpoint(&out, limit, &linears);
        // One interpreter for all linears: starting it costs more than reading them.
        let program = "import sys; sys.path.insert(0, sys.argv[1]); import read_atom as r\n\
             for i in range(int(sys.argv[3])):\n \
             sys.stdout.buffer.write(r.dequantize(sys.argv[2], f'layers.{i}.proj').tobytes())";
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let output = Command::new(&python)
            .args(["-B", "-c", program])
            .args([&tests, &out])
            .arg(linears.len().to_string())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let read: Vec<f32> =
            output.stdout.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let rows_by_channels = 7 * CHANNELS;
        assert_eq!(read.len(), linears.len() * rows_by_channels);
        for (i, (linear, transformed)) in linears.iter().enumerate() {
            let expected = dequantize(linear, &order_of(linear), *transformed);
            let largest = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
            assert!(largest > 0.0);
            for (k, value) in expected.iter().enumerate() {
                let found = f64::from(read[i * rows_by_channels + k]);
                // f32 sums of up to 64 terms.
                assert!((found - value).abs() <= 1e-5 * largest, "linear {i}, element {k}");
            }
        }
    }
}
