/*! The same input gives the same bytes, whatever computes them and in however many steps. */

mod common;

use common::{Dtype, Home, RandomModel, SMALL, assert_same_files, skipped};
use fs_err as fs;

/// Every supported instruction set, the plainest first.
const ISAS: [&str; 4] = ["plain", "portable", "avx2", "avx512"];

/// The sets that this processor has; the program says so itself.
fn available(home: &Home, test: &str) -> Vec<&'static str> {
    let has = |isa: &&str| {
        let line = "eval-ppl --model tiny-llama --seq-len 8 --windows 1 --quiet";
        let run = home.run_on(isa, line);
        match run.code {
            Some(0) => true,
            _ => {
                run.fails(4, &["this processor has no", isa, "ATOM_ISA"]);
                skipped(test, &format!("this processor has no {isa}"));
                false
            }
        }
    };
    ISAS.into_iter().filter(has).collect()
}

#[test]
fn the_checkpoint_does_not_depend_on_the_number_of_threads() {
    let home = Home::with_model();
    for (model, flags) in [
        ("model", SMALL),
        ("model", "--recipe paper --group 32 --outliers 16 --samples 4 --seq-len 64 --windows 2"),
        // Wide enough that every loop that is cut for threads is cut.
        ("tiny-llama", "--samples 2 --seq-len 192"),
    ] {
        for (out, threads) in [("a", 1), ("b", 2), ("c", 3), ("d", 3)] {
            let line = format!("quantize --model {model} {flags} --no-eval --overwrite");
            home.run(&format!("{line} --threads {threads} --out {out}")).done();
            assert_same_files(&home.path("a"), &home.path(out));
        }
    }
}

#[test]
fn the_checkpoint_does_not_depend_on_the_instruction_set() {
    let home = Home::with_model();
    let isas = available(&home, "the_checkpoint_does_not_depend_on_the_instruction_set");
    for flags in [
        SMALL.to_owned(),
        format!("--recipe paper {SMALL} --act-bits 8 --kv-bits 8"),
        format!("{SMALL} --no-gptq --act-bits 16 --outlier-format fp16"),
        format!("{SMALL} --format fp4 --outlier-format fp8"),
        format!("{SMALL} --format fp4-bnb"),
    ] {
        for isa in &isas {
            let line = format!("quantize --model model {flags} --no-eval --overwrite --out {isa}");
            home.run_on(isa, &line).done();
            assert_same_files(&home.path(isas[0]), &home.path(isa));
        }
    }
}

#[test]
fn the_perplexity_is_the_same_to_the_last_bit() {
    let home = Home::with_model();
    let isas = available(&home, "the_perplexity_is_the_same_to_the_last_bit");
    let common = "--seq-len 48 --windows 3";
    for (out, flags) in [
        ("w4a4", ""),
        ("w3a8", "--bits 3 --act-bits 8 --kv-bits 8 --outlier-format fp16"),
        ("w8a16", "--bits 8 --act-bits 16 --kv-bits 16"),
        ("fp4", "--format fp4 --outlier-format fp8"),
        ("fp4a8", "--format fp4 --act-bits 8"),
        ("bnb", "--format fp4-bnb"),
    ] {
        home.run(&format!("quantize --model model {SMALL} {flags} --no-eval --out {out}")).done();
    }
    for model in ["w4a4", "w3a8", "w8a16", "fp4", "fp4a8", "bnb", "model", "tiny-llama"] {
        let line = format!("eval-ppl --model {model} {common} --json");
        let mut found = Vec::new();
        for isa in &isas {
            let outcome = home.run_on(isa, &line).done().json();
            assert!(outcome["device"].as_str().unwrap().contains(isa), "{outcome}");
            found.push((isa.to_string(), outcome["perplexity"].as_f64().unwrap()));
        }
        for threads in [1, 3] {
            let outcome = home.run(&format!("{line} --threads {threads}")).done().json();
            found.push((format!("{threads} threads"), outcome["perplexity"].as_f64().unwrap()));
        }
        assert!(found.iter().all(|(_, ppl)| ppl.to_bits() == found[0].1.to_bits()), "{found:?}");
    }
}

#[test]
fn three_stages_give_the_bytes_of_one() {
    let home = Home::with_model();
    for model in ["model", "tiny-llama"] {
        let windows = "--samples 3 --seq-len 96 --seed 7";
        home.run(&format!("calibrate --model {model} {windows} --out c --overwrite")).done();
        for recipe in [
            "--group 32 --outliers 16",
            "--recipe paper --group 32 --outliers 16",
            "--group 32 --outliers 16 --no-gptq",
            "--group 32 --outliers 16 --act-bits 16 --kv-bits 16",
            "--group row --outliers 0 --bits 3 --no-order",
            "--group 48 --outliers 16 --format fp4 --outlier-format fp8",
        ] {
            let quantize = format!("quantize --model {model} {windows} {recipe}");
            home.run(&format!("{quantize} --no-eval --out single --overwrite")).done();
            home.run(&format!("plan c {recipe} --out p.json --overwrite")).done();
            let pack = format!("pack --model {model} --plan p.json");
            home.run(&format!("{pack} --no-eval --out staged --overwrite")).done();
            assert_same_files(&home.path("single"), &home.path("staged"));
        }
    }
}

#[test]
fn shards_and_element_types_do_not_change_the_codes() {
    let home = Home::new();
    let model = RandomModel::new(2);
    model.write(&home.path("f16"), Dtype::F16, 1);
    model.write(&home.path("sharded"), Dtype::F16, 3);
    model.write(&home.path("bf16"), Dtype::BF16, 1);
    model.write(&home.path("f32"), Dtype::F32, 2);
    for source in ["f16", "sharded", "bf16", "f32"] {
        let line = format!("quantize --model {source} {SMALL} --no-eval --out {source}-atom");
        home.run(&line).done();
    }
    let tensors = |source: &str| home.path(&format!("{source}-atom/model.safetensors"));
    assert!(fs::read(tensors("f16")).unwrap() == fs::read(tensors("sharded")).unwrap());

    // Unquantized tensors have the source's type, so only quantized ones can be compared.
    let quantized = |source: &str| {
        let bytes = fs::read(tensors(source)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let unquantized = |name: &str| name.ends_with(".weight");
        let mut found: Vec<(String, Vec<u8>)> = file
            .iter()
            .filter(|(name, _)| !unquantized(name))
            .map(|(name, view)| (name.to_owned(), view.data().to_vec()))
            .collect();
        found.sort();
        found
    };
    let expected = quantized("f16");
    assert_eq!(
        expected.len(),
        2 * (7 * 4 + 4 + 1),
        "codes, scales, outliers; an order a site; mean keys"
    );
    for source in ["bf16", "f32"] {
        for (expected, found) in expected.iter().zip(quantized(source)) {
            assert!(*expected == found, "{source}: {} differs", found.0);
        }
    }
}
