/*! docs/format.md against the program: its reader, a Python program, must see in a checkpoint what
this crate sees. Set `ATOM_TEST_PYTHON` to a Python with NumPy where `python3` has none. */

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use atom::checkpoint::plan::{BlockPlan, SitePlan};
use atom::checkpoint::{AtomCheckpoint, Destination, Inputs, Options, TensorSpec, Writer};
use atom::hub;
use atom::network::read_sites;
use atom::quant::hadamard;
use atom::quant::linear::QuantizedLinear;
use atom::quant::site::{SiteFormat, Transform};
use atom::quant::weights;
use serde_json::Value;

/// Settings of `atom quantize` that reach every form a linear can have: all widths of codes and kinds
/// of numbers, every kind of outliers and none, padding first and padding last, with and without the transform,
/// scales shared by two rows; and how far the weights may be from the source's, relatively.
const SETTINGS: [(&str, f64); 13] = [
    ("--group 64 --outliers 64", 0.2),
    ("--recipe paper --group 32 --outliers 32 --outlier-format fp16", 0.3),
    ("--bits 3 --group 48 --outliers 20 --no-gptq", 0.3),
    ("--bits 2 --group row --outliers 0 --rows-per-scale 2 --no-gptq", 0.9),
    ("--bits 8 --group 80 --outliers 7 --no-order --no-gptq --clip-weight 1", 0.01),
    ("--bits 8 --group 48 --outliers 1 --transform none --no-gptq --clip-weight 1", 0.01),
    ("--format fp4 --group 16 --outliers 20 --outlier-format fp8", 0.2),
    ("--format fp4 --act-bits 8 --group row --outliers 0 --rows-per-scale 2 --no-gptq", 0.3),
    ("--recipe w4a16", 0.2),
    ("--recipe nvfp4", 0.2),
    ("--recipe mxfp4 --no-gptq", 0.2),
    ("--group 32 --outliers 16 --set scales=\"e4m3\"", 0.2),
    ("--format fp4-bnb --group 48 --outliers 5 --outlier-format fp8 --no-gptq", 0.3),
];

fn python() -> String {
    std::env::var("ATOM_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// tiny-llama, quantized on one short window: the format is looked at and not the accuracy.
fn quantize(settings: &str, out: &Path) {
    let output = Command::new(assert_cmd::cargo::cargo_bin!("atom"))
        .args("quantize --model tiny-llama --samples 1 --seq-len 64 --no-eval --quiet".split(' '))
        .args(settings.split(' '))
        .arg("--out")
        .arg(out)
        .output()
        .unwrap();
    assert!(output.status.success(), "{settings}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Writes a checkpoint again in shards of at most 100 kB.
fn shard(checkpoint: &AtomCheckpoint, out: &Path) {
    let tensors: Vec<_> = checkpoint
        .names()
        .map(|name| (name.to_owned(), checkpoint.tensor(name).unwrap()))
        .collect();
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, tensor)| TensorSpec::new(name.as_str(), tensor.dtype, tensor.shape))
        .collect();
    let options = Options { max_shard_bytes: 100_000, ..Options::default() };
    let inputs = Inputs::default();
    let destination = Destination { out: out.to_owned(), overwrite: false, inputs };
    let mut writer =
        Writer::create(&destination, specs, &Value::Null, options, &|| Ok(())).unwrap();
    let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.bytes.to_vec()));
    writer.write_block("all", tensors.collect(), Value::Null).unwrap();
    writer.finish(checkpoint.config(), &checkpoint.manifest().unwrap(), &[]).unwrap();
}

fn plan(checkpoint: &AtomCheckpoint) -> Vec<BlockPlan> {
    checkpoint.manifest().unwrap().blocks
}

/// A linear as this crate reads it, `[out, channels]` in the source's channel order.
fn dequantize(format: &SiteFormat, linear: &QuantizedLinear) -> Vec<f64> {
    let mut dense = vec![0.0; linear.rows * format.channels];
    let permuted = weights::dequantize(linear);
    for (row, dense) in permuted.chunks(format.width()).zip(dense.chunks_mut(format.channels)) {
        let mut row = row.to_vec();
        if format.transform == Transform::Hadamard {
            // Its own inverse.
            let groups =
                row[..format.row.grouped_channels()].chunks_mut(format.row.numbers.group_size);
            groups.for_each(hadamard::transform);
        }
        for (value, &channel) in row.iter().zip(&format.order) {
            if let Ok(channel) = usize::try_from(channel) {
                dense[channel] = f64::from(*value);
            }
        }
    }
    dense
}

/// Every linear of the checkpoint in `directory` as the document's reader sees it.
fn read_by_document(directory: &Path, sites: &[SitePlan]) -> Vec<Vec<f64>> {
    // One interpreter for all linears: starting it costs more than reading them.
    let program = "import sys; sys.path.insert(0, sys.argv[1]); import read_atom\n\
         for name in sys.argv[3:]:\n \
         sys.stdout.buffer.write(read_atom.dequantize(sys.argv[2], name).astype('<f8').tobytes())";
    let linears = || sites.iter().flat_map(|site| site.linears.iter().map(move |l| (site, l)));
    let output = Command::new(python())
        .args(["-B", "-c", program])
        .args([&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"), directory])
        .args(linears().map(|(_, linear)| &linear.name))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut values =
        output.stdout.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
    let read: Vec<Vec<f64>> = linears()
        .map(|(site, linear)| values.by_ref().take(linear.rows * site.channels).collect())
        .collect();
    assert!(values.next().is_none(), "the reader gives more values than the plan has");
    read
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

fn repository(file: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

#[test]
fn the_reader_in_the_document_is_the_one_that_is_tested() {
    let document = repository("docs/format.md");
    let block = document.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    let reader = repository("tests/read_atom.py");
    assert_eq!(block, reader);
    let lines = reader.lines().filter(|line| !line.trim().is_empty()).count();
    assert!(lines <= 30, "the reader has grown to {lines} lines");
}

#[test]
fn the_documents_reader_sees_what_this_crate_sees() {
    let numpy = Command::new(python())
        .args(["-c", "import numpy"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !numpy {
        // Past the test harness, which keeps what a passing test prints.
        let skipped =
            format!("\nSKIPPED: {} has no NumPy; docs/format.md's reader was not run\n", python());
        std::io::stderr().write_all(skipped.as_bytes()).unwrap();
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let source = hub::tiny_llama().unwrap();
    for (number, (settings, tolerance)) in SETTINGS.iter().enumerate() {
        let mut directory: PathBuf = home.path().join(number.to_string());
        quantize(settings, &directory);
        let mut checkpoint = AtomCheckpoint::open(&directory).unwrap();
        if number == 0 {
            directory = home.path().join("sharded");
            shard(&checkpoint, &directory);
            assert!(directory.join("model.safetensors.index.json").exists());
            checkpoint = AtomCheckpoint::open(&directory).unwrap();
        }
        let blocks = plan(&checkpoint);
        let sites = blocks.concat();
        let mut found = read_by_document(&directory, &sites).into_iter();
        for block in &blocks {
            for (plan, site) in block.iter().zip(read_sites(&checkpoint, block).unwrap()) {
                for (linear, quantized) in plan.linears.iter().zip(&site.linears) {
                    let found = found.next().unwrap();
                    let expected = dequantize(&site.format, quantized.as_ref().unwrap());
                    let difference = norm(found.iter().zip(&expected).map(|(a, b)| a - b));
                    let size = norm(expected.iter().copied());
                    // The reader sums in f64, the transform here in f32.
                    assert!(
                        found.len() == expected.len() && difference <= 1e-6 * size,
                        "{settings}: {} differs by {difference} of {size}",
                        linear.name
                    );
                    // Both could misread the file in the same way: the source has the weights.
                    let name = format!("{}.weight", linear.name);
                    let weight = source.tensor(&name).unwrap().to_f32().unwrap();
                    let lost = norm(found.iter().zip(&weight).map(|(a, b)| a - f64::from(*b)));
                    assert!(
                        lost > 0.0 && lost <= tolerance * size,
                        "{settings}: {} is {lost} of {size} from the source",
                        linear.name
                    );
                }
            }
        }
    }
}
