//! How a checkpoint was distilled.

use super::Shown;
use super::chart::curves;
use super::page::{Page, caption, facts};
use crate::checkpoint::DistillationRecord;
use crate::units;

/// The section of a checkpoint that was distilled.
pub(super) fn section(page: &mut Page, shown: Option<&Shown>) {
    if let Some(record) = shown.and_then(|shown| shown.manifest.distillation.as_ref()) {
        page.section("Distillation", content(record));
    }
}

fn content(record: &DistillationRecord) -> String {
    let DistillationRecord { text, before, after, curve, .. } = record;
    let held: Vec<(f64, f64)> =
        curve.iter().map(|point| (point.step as f64, point.held_out)).collect();
    let trained: Vec<(f64, f64)> =
        curve.iter().filter_map(|point| Some((point.step as f64, point.trained?))).collect();
    let picture = curves(&[("held", held), ("trained", trained)], "divergence by step");
    let rows = [
        (
            "divergence",
            format!(
                "{before:.4} to {after:.4} nats a token ({}) on {}",
                units::change(after / before),
                units::counted(record.held_out_windows, "held-out window")
            ),
        ),
        (
            "training",
            format!(
                "{} of {} of {} tokens; the values after step {} were kept",
                units::counted(record.steps, "step"),
                units::counted(record.windows_per_step, "window"),
                text.seq_len,
                record.kept_step
            ),
        ),
        ("text", format!("{}, seed {}", text.dataset, text.seed)),
        ("trained", units::counted(record.parameters, "value")),
    ];
    let below = "Nats a token from the source's predictions, by step: \
                 <span class=\"key held\"></span> held-out windows, <span class=\"key trained\"></span> windows trained on, the mean since the last point";
    format!("{picture}{}{}", caption(below), facts(&rows))
}
