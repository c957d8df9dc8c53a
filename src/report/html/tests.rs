use serde_json::json;

use super::*;
use crate::checkpoint::plan::{LinearPlan, SitePlan};
use crate::checkpoint::{
    DistillationRates, DistillationRecord, DistilledStep, Provenance, SourceRecord,
};
use crate::quant::codebook::Codebook;
use crate::quant::number::OutlierFormat;
use crate::quant::scale::ScaleGrid;
use crate::quant::site::Transform;
use crate::recipe::{Order, Recipe};

fn linear(name: &str, bits: u8, error: f64) -> LinearPlan {
    LinearPlan {
        name: name.into(),
        rows: 8,
        bits,
        codebook: Codebook::Int,
        rows_per_scale: 1,
        clip: 1.0,
        search_scales: false,
        error: Some(error),
    }
}

fn site(name: &str, outlier_channels: usize, linears: Vec<LinearPlan>) -> SitePlan {
    SitePlan {
        name: name.into(),
        channels: 256,
        group_size: 64,
        outlier_channels,
        outlier_format: OutlierFormat::Int8,
        order: Order::Energy,
        bits: 4,
        codebook: Codebook::Int,
        clip: 1.0,
        signed_scales: false,
        scales: ScaleGrid::F16,
        act_exponent: None,
        weight_exponent: None,
        transform: Transform::None,
        linears,
    }
}

fn shown(name: &str, widths: [u8; 2], outliers: usize) -> Shown {
    let recipe = Recipe::default_recipe();
    let block = |index: usize, bits, error| {
        vec![
            site(
                &format!("layers.{index}.attn_in"),
                32,
                vec![linear(&format!("layers.{index}.q_proj"), 4, 0.05)],
            ),
            site(
                &format!("layers.{index}.mlp_act"),
                if index == 0 { 32 } else { outliers },
                vec![linear(&format!("layers.{index}.down_proj"), bits, error)],
            ),
        ]
    };
    Shown {
        name: name.into(),
        bytes: 4_000_000,
        manifest: Manifest {
            format_version: 1,
            tool_version: "0.1.0".into(),
            source: SourceRecord {
                name: "source".into(),
                fingerprint: "f00d".into(),
                bytes: 8_400_000,
                hub: None,
                ignored_tensors: Vec::new(),
            },
            calibration: Provenance {
                dataset: "sample".into(),
                sha256: "0".into(),
                samples: 8,
                seq_len: 256,
                seed: 0,
                sets: Vec::new(),
            },
            kv: recipe.kv(),
            recipe,
            bits_per_weight: 4.79,
            distillation: None,
            blocks: vec![block(0, widths[0], 0.07), block(1, widths[1], 0.125)],
        },
    }
}

fn html(shown: Option<&Shown>, results: Vec<Value>) -> String {
    page(shown, results.into_iter().map(|one| ("x.json".to_owned(), one)).collect()).unwrap()
}

#[test]
fn a_checkpoint_alone_has_its_maps_and_worst_linears() {
    let page = html(Some(&shown("m-atom", [4, 4], 32)), Vec::new());
    assert!(is_page(page.as_bytes()));
    for part in [
        "<title>m-atom</title>",
        "4.0 MB",
        "2.10 x smaller than 8.4 MB",
        "4.79",
        "<title>block 1, down_proj: 12.50</title>",
        "Every linear has 4 bits.",
        "<td>layers.1.down_proj</td><td class=\"n\">4</td><td class=\"n\">12.50 %</td>",
        "sample: 8 windows of 256 tokens, seed 0",
    ] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    for absent in ["<h3>bits</h3>", "<h3>outlier channels</h3>", "Perplexity", "Stages", "tasks"] {
        assert!(!page.contains(absent), "{absent}");
    }
}

#[test]
fn a_distilled_checkpoint_has_its_curve() {
    let mut shown = shown("m-atom", [4, 4], 32);
    let plain = html(Some(&shown), Vec::new());
    assert!(!plain.contains("Distillation"));
    let point = |step, trained, held_out| DistilledStep { step, trained, held_out };
    shown.manifest.distillation = Some(DistillationRecord {
        text: shown.manifest.calibration.clone(),
        steps: 20,
        windows_per_step: 4,
        held_out_windows: 8,
        rates: DistillationRates { scales: 3e-3, outlier_scales: 5e-4, norms: 2e-3, clips: 2e-3 },
        parameters: 1234,
        kept_step: 20,
        before: 0.2,
        after: 0.1,
        curve: vec![point(0, None, 0.2), point(10, Some(0.18), 0.15), point(20, Some(0.12), 0.1)],
    });
    let page = html(Some(&shown), Vec::new());
    for part in [
        "<h2>Distillation</h2>",
        "0.2000 to 0.1000 nats a token (-50.0 %) on 8 held-out windows",
        "the values after step 20 were kept",
        // From the greatest value in the upper left corner to the least in the lower right one.
        "<path class=\"curve held\" d=\"M52.0 9.0L346.0 90.0L640.0 171.0\"/>",
        "<path class=\"curve trained\" d=\"M346.0 41.4L640.0 138.6\"/>",
    ] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
}

#[test]
fn bits_and_outliers_have_maps_where_they_differ() {
    let page = html(Some(&shown("m", [4, 8], 128)), Vec::new());
    assert!(page.contains("<h3>bits</h3>") && page.contains("<h3>outlier channels</h3>"));
    assert!(page.contains("block 1, mlp_act: 128 outlier channels"));
    assert!(!page.contains("Every linear has"));
}

#[test]
fn results_of_several_commands_are_shown_together() {
    let ppl = |model: &str, value: f64, error: Option<f64>| {
        json!({ "model": model, "dataset": "wikitext2", "perplexity": value, "standard_error": error, "windows": 4,
            "seq_len": 2048, "tokens": 8192, "seconds": 3.0, "tokens_per_second": 2730.7, "cpu_seconds": 5.0,
            "device": "cpu" })
    };
    let task = |name: &str| {
        json!({ "task": name, "file": "f", "rows": 1000, "acc": 0.5, "acc_stderr": 0.0158,
            "acc_norm": null, "acc_norm_stderr": null, "perplexity": null, "perplexity_stderr": null })
    };
    let tasks = |model: &str| {
        json!({ "model": model, "tasks": [task("piqa")], "texts": 1, "text_tokens": 1, "tokens": 1,
            "seconds": 1.0, "rows_per_second": 1.0, "cpu_seconds": 1.0, "device": "cpu" })
    };
    let verified = json!({ "model": "m", "ok": false, "checks": [
        { "name": "shapes", "ok": true, "detail": "3 tensors" },
        { "name": "checksums", "ok": false, "detail": "tensor `x` <differs>" },
    ], "perplexity": null, "reference_perplexity": null, "increase": null, "kernels_unchecked": null,
        "device": "cpu" });
    let bench = json!({ "rows": [{ "name": "f32", "m": 2048, "gflops": 141.2 }], "facts": { "device": "x" } });
    let page = html(
        Some(&shown("m", [4, 4], 32)),
        vec![
            ppl("source", 20.0, Some(0.2)),
            ppl("m", 22.0, None),
            tasks("source"),
            tasks("m"),
            verified,
            bench,
        ],
    );
    for part in [
        "wikitext2, 4 windows of 2048 tokens",
        "20.000 \u{b1} 0.200",
        "+10.0 %. Less is better.",
        "<b>22.00</b><small>+10.0 % from 20.00</small>",
        "source: acc of 1 000 rows",
        "0.5000 \u{b1} 0.0158",
        "class=\"whisker\"",
        "tensor `x` &lt;differs&gt;",
        "<span class=\"failed\">FAILED</span>: Some check does not hold",
        "<td class=\"n\">141.2</td>",
    ] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
}

#[test]
fn a_run_has_stages_and_distributions() {
    let run = json!({ "out": "./m", "model": "m", "recipe": Recipe::default_recipe(), "samples": 8, "seq_len": 256,
        "seconds": 12.0, "stage_seconds": { "calibrate": 2.0, "gptq": 10.0 }, "peak_rss_bytes": 1_200_000_000_u64,
        "peak_gpu_bytes": null, "bits_per_weight": 4.5, "source_bytes": 8_400_000, "out_bytes": 4_000_000,
        "device": "cpu (avx512)", "resumed_blocks": 0,
        "linears": [{ "name": "layers.0.q_proj", "bits": 4, "error": 0.05 }],
        "perplexity": { "dataset": "sample", "windows": 1, "seq_len": 256, "before": 80.0, "after": 84.0 },
        "upload": "hf upload ORG/m ./m",
        "worst_sites": [{ "linear": "layers.0.q_proj", "site": "layers.0.attn_in", "channels": 256,
            "outliers": 32, "shares": [0.0, 0.5, 1.0], "rms": [0.1, 0.9, 30.0] }] });
    let page = html(None, vec![run]);
    for part in [
        "<span class=\"l\">gptq</span>",
        "12.0 s in all on cpu (avx512); memory 1.2 GB at the peak.",
        "attn_in: 256 channels, 32 outliers",
        "class=\"curve\"",
        "+5.0 % from 80.00",
    ] {
        assert!(page.contains(part), "{part} is not in {page}");
    }
    let reference = page.matches("NaN").count() + page.matches("inf").count();
    assert_eq!(reference, 0, "{page}");
}

#[test]
fn foreign_text_cannot_leave_its_place_and_nothing_is_loaded() {
    let name = "</title><script>alert(1)</script><img src=x onerror=y> & \"q\" '\u{1b}[2J";
    let page = html(Some(&shown(name, [4, 4], 32)), Vec::new());
    assert!(
        !page.contains("<script") && !page.contains("<img") && !page.contains('\u{1b}'),
        "{page}"
    );
    assert!(page.contains("&lt;script&gt;") && page.contains("&amp; &quot;q&quot; &#39;"));
    for loading in ["http:", "https:", "url(", "@import", "src=", "<link", "href="] {
        let inside = page.replace("src=x", "");
        assert!(!inside.contains(loading), "{loading}");
    }
}

#[test]
fn what_no_page_shows_is_refused_by_name() {
    for (object, part) in [
        (json!({}), "not the result of a command"),
        (json!([1]), "not the result of a command"),
        (json!({ "error": { "message": "x" } }), "not the result of a command"),
        (json!({ "tasks": 3, "model": "m" }), "invalid type"),
    ] {
        let error = page(None, vec![("x.json".to_owned(), object)]).unwrap_err();
        assert!(error.to_string().contains("cannot show x.json"), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}
