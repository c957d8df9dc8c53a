/*! `atom plan` with a target: bits where they matter. */

mod common;

use std::path::Path;

use common::{Home, SMALL, assert_same_files};
use fs_err as fs;
use serde_json::Value;

/// Flags of a calibration with sensitivity that fits a random model.
const MEASURE: &str = "calibrate --model model --sensitivity --group 32 --outliers 16 \
                       --outlier-counts 0,16,32 --samples 4 --seq-len 64";

/// A model and its calibration `c` with sensitivity.
fn measured() -> Home {
    let home = Home::with_model();
    home.run(&format!("{MEASURE} --out c")).done();
    home
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {value}"))
}

/// Bytes of all files of a directory.
fn size_of(dir: &Path) -> u64 {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

/// Every linear of a plan with its site, in order.
fn linears(plan: &Value) -> Vec<(&Value, &Value)> {
    let sites = plan["blocks"].as_array().unwrap().iter().flat_map(|b| b.as_array().unwrap());
    sites.flat_map(|s| s["linears"].as_array().unwrap().iter().map(move |l| (s, l))).collect()
}

#[test]
fn a_measurement_serves_every_target_and_more_bits_cost_less() {
    let home = measured();
    let mut last = f64::INFINITY;
    let mut widths = Vec::new();
    for target in ["3.5", "4", "4.75", "6", "9"] {
        let plan = home.json(&format!("plan c --target-bits {target} --out p --overwrite"));
        let bits = number(&plan, "/bits_per_weight");
        assert!(bits <= target.parse().unwrap(), "{plan}");
        assert_eq!(number(&plan, "/allocation/planned/bits_per_weight"), bits);
        let nats = number(&plan, "/allocation/planned/nats");
        assert!(nats <= last, "{target}: {nats} after {last}");
        assert!(number(&plan, "/allocation/least_nats") <= nats);
        last = nats;
        widths.push(plan["allocation"]["widths"].as_array().unwrap().len());
    }
    assert!(widths.iter().any(|count| *count > 1), "no plan mixes widths");

    // The recipe everywhere is one of the plans that its own size allows.
    let plan = home.json("plan c --target-bits 4.75 --out p --overwrite");
    let uniform = number(&plan, "/allocation/uniform/bits_per_weight");
    let plan = home.json(&format!("plan c --target-bits {uniform} --out p --overwrite"));
    let [planned, everywhere] =
        ["planned", "uniform"].map(|of| number(&plan["allocation"], &format!("/{of}/nats")));
    assert!(planned < everywhere, "{plan}");
    assert!(planned > 0.0 && everywhere.is_finite());
}

/// tiny-llama has sites of 256 and of 768 channels: 16 and 32 outliers in groups of 64 and 128.
#[test]
fn automatic_outliers_are_each_sites_first_count() {
    let home = Home::new();
    let measure = "calibrate --model tiny-llama --sensitivity --outlier-counts 0,16 --samples 2 --seq-len 64 --out c";
    let counts = home.json(measure)["sensitivity"]["outlier_counts"].clone();
    assert_eq!(counts, serde_json::json!([16, 0, 32]));
    let formats = |flags: &str| {
        home.run(&format!("plan c {flags} --out p --overwrite")).done();
        let plan: Value = serde_json::from_slice(&fs::read(home.path("p")).unwrap()).unwrap();
        let site = |(site, _): (&Value, &Value)| {
            ["channels", "group_size", "outlier_channels"].map(|key| site[key].as_u64().unwrap())
        };
        let mut found: Vec<_> = linears(&plan).into_iter().map(site).collect();
        found.sort_unstable();
        found.dedup();
        found
    };
    assert_eq!(formats(""), [[256, 64, 16], [768, 128, 32]]);
    // No site has 32 of 256 or was measured so.
    assert!(formats("--target-bits 9").iter().all(|[channels, _, outliers]| {
        matches!((channels, outliers), (256, 0 | 16) | (768, 0 | 16 | 32))
    }));
}

#[test]
fn widths_and_outlier_counts_keep_to_what_may_be_chosen() {
    let home = measured();
    let text = home.run("plan c --target-bits 6 --widths 4,8 --outlier-counts 0 --out p").done();
    assert!(text.stdout.contains("proven"), "{}", text.stdout);
    let plan: Value = serde_json::from_slice(&fs::read(home.path("p")).unwrap()).unwrap();
    for (site, linear) in linears(&plan) {
        assert!([4, 8].contains(&linear["bits"].as_u64().unwrap()), "{linear}");
        assert_eq!(site["outlier_channels"], 0);
    }
    // With room for everything, nothing is quantized that need not be.
    let plan = home.json("plan c --target-bits 17 --widths 4,8,16 --out q");
    let shares = plan["allocation"]["widths"].as_array().unwrap();
    assert!(shares.iter().any(|share| share["bits"] == 16), "{plan}");
    assert!(number(&plan, "/bits_per_weight") > 15.0);
}

#[test]
fn pack_obeys_a_plan_of_mixed_widths_that_was_edited() {
    let home = measured();
    home.run("plan c --target-bits 5 --out p").done();
    let mut plan: Value = serde_json::from_slice(&fs::read(home.path("p")).unwrap()).unwrap();
    plan["blocks"][1][2]["linears"][1]["bits"] = 16.into();
    plan["blocks"][0][0]["linears"][0]["bits"] = 2.into();
    plan["blocks"][0][0]["linears"][1]["bits"] = 3.into();
    plan["blocks"][0][0]["linears"][2]["bits"] = 8.into();
    plan["blocks"][0][1]["outlier_channels"] = 0.into();
    plan["blocks"][1][1]["outlier_channels"] = 32.into();
    fs::write(home.path("p"), plan.to_string()).unwrap();
    let flags = "--seq-len 64 --windows 2";
    let outcome = home.json(&format!("pack --model model --plan p --out out {flags}"));
    let quantized = linears(&plan).into_iter().filter(|(_, linear)| linear["bits"] != 16);
    let planned: Vec<_> = quantized.map(|(_, linear)| (&linear["name"], &linear["bits"])).collect();
    let found = outcome["linears"].as_array().unwrap();
    let found: Vec<_> = found.iter().map(|linear| (&linear["name"], &linear["bits"])).collect();
    assert_eq!(found, planned);
    let verified = home.json(&format!("verify --model out --reference model {flags}"));
    assert_eq!(verified["ok"], true, "{verified}");
    let stored = fs::read(home.path("out/atom.json")).unwrap();
    let stored: Value = serde_json::from_slice(&stored).unwrap();
    for ((site, linear), (planned_site, planned)) in linears(&stored).iter().zip(linears(&plan)) {
        assert_eq!(site["outlier_channels"], planned_site["outlier_channels"]);
        assert_eq!(linear["bits"], planned["bits"]);
    }
    home.run("inspect out").done();
}

#[test]
fn one_command_gives_the_bytes_of_three_at_any_thread_count() {
    let home = measured();
    home.run("plan c --target-bits 4.5 --out p").done();
    home.run("pack --model model --plan p --no-eval --out three").done();
    let line = format!("{SMALL} --outlier-counts 0,16,32 --no-eval --target-bits 4.5");
    let line = line.replace("--windows 2", "");
    let outcome = home.json(&format!("quantize --model model --out one --threads 3 {line}"));
    assert_same_files(&home.path("one"), &home.path("three"));
    assert!(number(&outcome, "/allocation/planned/nats") > 0.0);
    assert!(number(&outcome, "/stage_seconds/sensitivity") > 0.0);
    home.run(&format!("{MEASURE} --threads 1 --out d")).done();
    assert!(fs::read(home.path("c")).unwrap() == fs::read(home.path("d")).unwrap());
}

#[test]
fn a_target_of_size_holds_for_the_whole_directory() {
    let home = measured();
    let least = home.run("plan c --target-size 1kB --out p");
    let least = least.fails(2, &["--target-size", "the units are"]);
    assert!(!home.path("p").exists(), "{}", least.stderr);
    let refused = home.run("plan c --target-size 100000 --out p").fails(3, &["never quantized"]);
    let asked = refused.stderr.split("--target-size ").nth(1).unwrap();
    let asked = asked.split(' ').next().unwrap();
    home.run(&format!("plan c --target-size {asked} --out p")).done();
    let room: u64 = asked.parse::<u64>().unwrap() + 20_000;
    let plan = home.json(&format!("plan c --target-size {room} --out p --overwrite"));
    assert!(number(&plan, "/allocation/checkpoint_bytes") <= room as f64);
    home.run("pack --model model --plan p --no-eval --out out").done();
    let size = size_of(&home.path("out"));
    assert!(size <= room, "{size} of {room}");
}

#[test]
fn what_cannot_be_planned_is_refused_with_what_to_do() {
    let home = measured();
    home.run("calibrate --model model --samples 2 --seq-len 64 --out plain").done();
    for (line, code, parts) in [
        ("plan plain --target-bits 4", 3, &["no sensitivity", "calibrate --sensitivity"][..]),
        ("plan c --target-bits 4 --group 16 --outliers 16", 3, &["group was 32 and is now 16"]),
        ("plan c --target-bits 1", 3, &["too few", "ask for --target-bits"]),
        ("plan c --target-bits 4 --outlier-counts 8", 2, &["8 outliers were not measured"]),
        ("plan c --target-bits 4 --widths 5", 2, &["the widths are"]),
        ("plan c --target-bits 4 --target-size 1GB", 2, &["cannot be used with"]),
        ("plan c --widths 4", 2, &["--target-bits"]),
        ("calibrate --model model --group 32", 2, &["without --sensitivity"]),
    ] {
        home.run(&format!("{line} --out p")).fails(code, parts);
        assert!(!home.path("p").exists(), "{line}");
    }
    // The least that the error names can be asked for.
    let run = home.run("plan c --target-bits 1 --out p");
    let least = run.stderr.split("--target-bits ").nth(1).unwrap().split(' ').next().unwrap();
    home.run(&format!("plan c --target-bits {least} --out p")).done();
}

/// FP4 has four bits: a linear of any other width becomes integers.
#[test]
fn an_fp4_recipe_is_planned_with_integers_beside_it() {
    let home = Home::with_model();
    home.run(&format!("{MEASURE} --format fp4 --out c")).done();
    home.run("plan c --target-bits 6 --widths 3,4,8 --out p").done();
    let plan: Value = serde_json::from_slice(&fs::read(home.path("p")).unwrap()).unwrap();
    let mut formats = Vec::new();
    for (_, linear) in linears(&plan) {
        let format = linear["format"].as_str().unwrap_or("int").to_owned();
        let bits = linear["bits"].as_u64().unwrap();
        assert_eq!(format == "fp4", bits == 4, "{linear}");
        formats.push(format);
    }
    assert!(formats.contains(&"fp4".to_owned()) && formats.contains(&"int".to_owned()), "{plan}");
    home.run("pack --model model --plan p --no-eval --out out").done();
    home.run("verify --model out --seq-len 64 --windows 1").done();
}
