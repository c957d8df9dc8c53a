/*! Exports in the programs they are for: transformers with compressed-tensors, and vLLM on the CPU, as docs/exports.md installs
them. Run with ATOM_ENGINES=1, and ATOM_ENGINES_PYTHON the Python that has them; otherwise skipped, loudly. SmolLM2 is run
where ATOM_SMOLLM2 is, on the text in ATOM_DATA. */

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Home, directory_from};
use serde_json::Value;

/// A model, and the text and windows it is measured on.
struct Subject {
    home: Home,
    model: String,
    calibration: &'static str,
    text: PathBuf,
    seq_len: usize,
    windows: usize,
}

/// Says past the test harness what was not run.
fn say(line: &str) {
    std::io::stderr().write_all(format!("\n{line}\n").as_bytes()).unwrap();
}

impl Subject {
    /// tiny-llama on short windows; none where engines are not asked for or there is no text.
    fn tiny(test: &str) -> Option<Self> {
        if std::env::var("ATOM_ENGINES").as_deref() != Ok("1") {
            say(&format!("SKIPPED: {test}: set ATOM_ENGINES=1 (docs/exports.md)"));
            return None;
        }
        let text = directory_from("ATOM_DATA", test)?.join("wikitext2/test.jsonl");
        Some(Self {
            home: Home::new(),
            model: "tiny-llama".to_owned(),
            calibration: "--samples 8 --seq-len 256",
            text,
            seq_len: 256,
            windows: 4,
        })
    }

    /// Another model instead of tiny-llama.
    fn of(self, model: &Path) -> Self {
        Self { model: model.display().to_string(), ..self }
    }

    /// SmolLM2 on the first eight windows of WikiText-2, calibrated on the sample.
    fn smollm2(test: &str) -> Option<Self> {
        let tiny = Self::tiny(test)?;
        let model = directory_from("ATOM_SMOLLM2", test)?;
        let calibration = "--samples 16 --seq-len 512";
        Some(Self { calibration, seq_len: 2048, windows: 8, ..tiny }.of(&model))
    }

    /// Quantizes the model and exports it: `atom` and `atom-<format>`.
    fn export(&self, recipe: &str, formats: &str) {
        let Self { home, model, calibration, .. } = self;
        let line = format!("quantize --model {model} --recipe {recipe} {calibration} --no-eval -q");
        home.run(&format!("{line} --overwrite --out atom --export {formats}")).done();
    }

    fn dataset(&self) -> String {
        format!("{} --seq-len {} --windows {}", self.text.display(), self.seq_len, self.windows)
    }

    /// Perplexity by `atom eval-ppl`.
    fn own(&self, model: &str) -> f64 {
        let line = format!("eval-ppl --model {model} --dataset {} -q", self.dataset());
        self.home.json(&line)["perplexity"].as_f64().unwrap()
    }

    /// What an engine makes of an export.
    fn engine(&self, engine: &str, export: &str, dtype: &str) -> Value {
        let python = std::env::var("ATOM_ENGINES_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/engines.py");
        let output = Command::new(python)
            .arg("-B")
            .arg(script)
            .args([engine, export, "--dtype", dtype, "--text"])
            .args(self.dataset().split(' '))
            .current_dir(self.home.path(""))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{engine}: {export}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Compares transformers with this program: every weight to the bit, perplexity within `allowed`, relatively.
    fn transformers(&self, recipe: &str, allowed: f64) -> Value {
        let found = self.engine("transformers", "atom-compressed-tensors", "float32");
        let own = self.own("atom");
        let perplexity = found["perplexity"].as_f64().unwrap();
        let change = perplexity / own - 1.0;
        say(&format!(
            "{} {recipe}: atom {own:.6}, transformers {perplexity:.6} ({:+.6} %), {} linears",
            self.model,
            100.0 * change,
            found["linears"]
        ));
        assert!(found["linears"].as_u64().unwrap() > 0);
        assert_eq!(found["different_weights"], 0, "{recipe}");
        assert!(change.abs() <= allowed, "{recipe}: {perplexity} and {own}");
        found
    }

    /// Compares vLLM's log-probabilities of an export with others.
    fn vllm(&self, export: &str, expected: &Value) {
        let found = self.engine("vllm", export, "float16");
        let logprobs = |value: &Value| -> Vec<f64> {
            let values = value["logprobs"].as_array().unwrap().iter();
            values.map(|value| value.as_f64().unwrap()).collect()
        };
        let (found_logprobs, expected_logprobs) = (logprobs(&found), logprobs(expected));
        assert_eq!(found_logprobs.len(), expected_logprobs.len());
        let differences = found_logprobs.iter().zip(&expected_logprobs).map(|(a, b)| (a - b).abs());
        let greatest = differences.clone().fold(0.0, f64::max);
        let mean = differences.sum::<f64>() / found_logprobs.len() as f64;
        say(&format!(
            "{} {export}: vLLM {:.6}, log-probabilities of the first window differ by {mean:.5}, at most {greatest:.5}",
            self.model,
            found["perplexity"].as_f64().unwrap()
        ));
        let ratio =
            found["perplexity"].as_f64().unwrap() / expected["perplexity"].as_f64().unwrap();
        assert!((ratio - 1.0).abs() <= 1e-3, "{export}: {ratio}");
        assert!(mean <= 0.01, "{export}: {mean}");
    }
}

#[test]
fn engines_compute_what_this_program_computes_of_tiny_llama() {
    let test = "engines_compute_what_this_program_computes_of_tiny_llama";
    let Some(subject) = Subject::tiny(test) else { return };
    for recipe in ["nvfp4", "mxfp4"] {
        subject.export(recipe, "compressed-tensors");
        subject.transformers(recipe, 1e-3);
    }
    subject.export("w4a16", "compressed-tensors,gptq");
    let expected = subject.transformers("w4a16", 1e-5);
    subject.vllm("atom-compressed-tensors", &expected);
    subject.vllm("atom-gptq", &expected);
}

#[test]
fn engines_compute_what_this_program_computes_of_smollm2() {
    let test = "engines_compute_what_this_program_computes_of_smollm2";
    let Some(subject) = Subject::smollm2(test) else { return };
    // Activations of 4 bits amplify the order of f32 sums over 30 blocks: transformers in f64 is 4 % from itself.
    for (recipe, allowed) in [("nvfp4 --act-bits 16", 1e-4), ("nvfp4", 0.06), ("mxfp4", 0.06)] {
        subject.export(recipe, "compressed-tensors");
        subject.transformers(recipe, allowed);
    }
    subject.export("w4a16", "compressed-tensors,gptq");
    let expected = subject.transformers("w4a16", 1e-5);
    subject.vllm("atom-compressed-tensors", &expected);
    subject.vllm("atom-gptq", &expected);
}

#[test]
fn transformers_loads_the_experts_of_a_mixtral_exactly() {
    let test = "transformers_loads_the_experts_of_a_mixtral_exactly";
    let Some(subject) = Subject::tiny(test) else { return };
    let mixtral = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-mixtral");
    let subject = subject.of(&mixtral);
    subject.export("w4a16", "compressed-tensors");
    let found = subject.transformers("w4a16", 1e-4);
    // Attention and the three linears of each expert.
    assert!(found["linears"].as_u64().unwrap() > 4 * 7, "{}", found["linears"]);
}
