/*! What was made, how, and how long it took. */

use serde_json::Value;

use super::chart::{Bar, bars};
use super::page::{caption, facts, table, text};
use super::results::{Bench, Outcome, Quantized, Verified};
use super::{Figure, Page, Shown};
use crate::report::bench::cell;
use crate::{recipe, units};

pub(super) fn figures(page: &mut Page, shown: Option<&Shown>, quantized: Option<&Quantized>) {
    let sizes = match (shown, quantized) {
        (Some(shown), _) => {
            Some((shown.manifest.source.bytes, shown.bytes, shown.manifest.bits_per_weight))
        }
        (None, Some(run)) => Some((run.source_bytes, run.out_bytes, run.bits_per_weight)),
        (None, None) => None,
    };
    if let Some((before, after, bits)) = sizes {
        page.figures.push(Figure {
            label: "size",
            value: units::bytes(after),
            note: format!(
                "{:.2} x smaller than {}",
                before as f64 / after as f64,
                units::bytes(before)
            ),
        });
        page.figures.push(Figure {
            label: "bits per weight",
            value: format!("{bits:.2}"),
            note: "with scales, outliers, orders".to_owned(),
        });
    }
    if let Some(run) = quantized {
        page.figures.push(Figure {
            label: "time",
            value: units::seconds(run.seconds),
            note: run.device.clone(),
        });
    }
}

pub(super) fn sections(page: &mut Page, shown: Option<&Shown>, outcomes: &[Outcome]) {
    for outcome in outcomes {
        match outcome {
            Outcome::Quantized(run) => page.section("Stages", stages(run)),
            Outcome::Verified(verified) => page.section("Verification", checks(verified)),
            Outcome::Bench(bench) => page.section("Speed", bench_table(bench)),
            Outcome::Perplexity(_) | Outcome::Tasks(_) => {}
        }
    }
    let run = outcomes.iter().find_map(|outcome| match outcome {
        Outcome::Quantized(run) => Some(&**run),
        _ => None,
    });
    page.section("Settings", settings(shown, run));
}

fn stages(run: &Quantized) -> String {
    let bar = |(stage, seconds): (&String, &Value)| {
        let value = seconds.as_f64()?;
        let shown = units::seconds(value);
        Some(Bar { label: stage.clone(), value, shown, error: None, class: "two" })
    };
    let stages: Vec<Bar> = run.stage_seconds.iter().filter_map(bar).collect();
    let memory = match run.peak_gpu_bytes {
        Some(gpu) => {
            format!("{}, {} on the GPU", units::bytes(run.peak_rss_bytes), units::bytes(gpu))
        }
        None => units::bytes(run.peak_rss_bytes),
    };
    let words = format!(
        "{} in all on {}; memory {memory} at the peak.",
        units::seconds(run.seconds),
        run.device
    );
    bars(&stages, None) + &caption(&text(&words))
}

fn checks(verified: &Verified) -> String {
    let rows: Vec<Vec<String>> = verified
        .checks
        .iter()
        .map(|check| {
            let mark = if check.ok { MARKS.0 } else { MARKS.1 };
            vec![mark.to_owned(), text(&check.name), text(&check.detail)]
        })
        .collect();
    let (mark, words) = match verified.ok {
        true => (MARKS.0, "All checks hold"),
        false => (MARKS.1, "Some check does not hold"),
    };
    let verdict = format!("{mark}: {}", text(&format!("{words}, on {}.", verified.device)));
    table(&[("", false), ("check", false), ("found", false)], &rows) + &caption(&verdict)
}

const MARKS: (&str, &str) =
    ("<span class=\"ok\">ok</span>", "<span class=\"failed\">FAILED</span>");

fn bench_table(bench: &Bench) -> String {
    let mut keys: Vec<&str> = Vec::new();
    for key in bench.rows.iter().flat_map(|row| row.keys()) {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    let is_number = |key: &str| {
        bench.rows.iter().filter_map(|row| row.get(key)).all(|value| !value.is_string())
    };
    let headings: Vec<(&str, bool)> = keys.iter().map(|key| (*key, is_number(key))).collect();
    let row = |row: &serde_json::Map<String, Value>| {
        keys.iter()
            .map(|key| row.get(*key).map_or_else(String::new, |value| text(&cell(value))))
            .collect()
    };
    let rows: Vec<Vec<String>> = bench.rows.iter().map(row).collect();
    let known: Vec<(&str, String)> =
        bench.facts.iter().map(|(name, value)| (name.as_str(), cell(value))).collect();
    table(&headings, &rows) + &facts(&known)
}

fn settings(shown: Option<&Shown>, run: Option<&Quantized>) -> String {
    let mut rows: Vec<(&str, String)> = Vec::new();
    match (shown, run) {
        (Some(Shown { manifest, .. }), _) => {
            let calibration = &manifest.calibration;
            rows.push(("recipe", recipe::lines(&manifest.recipe)));
            rows.push((
                "calibration",
                format!(
                    "{}: {} of {} tokens, seed {}",
                    calibration.dataset,
                    units::counted(calibration.samples, "window"),
                    calibration.seq_len,
                    calibration.seed
                ),
            ));
            rows.push(("source", format!("fingerprint {}", manifest.source.fingerprint)));
        }
        (None, Some(run)) => {
            rows.push(("recipe", recipe::lines(&run.recipe)));
            let windows = units::counted(run.samples, "window");
            rows.push(("calibration", format!("{windows} of {} tokens", run.seq_len)));
        }
        (None, None) => {}
    }
    facts(&rows)
}
