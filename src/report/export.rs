/*! The reports of `atom export`. */

use serde::Serialize;

use super::Report;
use super::layout::Facts;
use crate::export::{ExportDryRun, ExportOutcome};
use crate::pipeline::outcome::QuantizeOutcome;
use crate::printable::printable;
use crate::units;

/// A run that wrote a checkpoint, and the exports it ended with.
#[derive(Serialize)]
pub struct Exported<'a> {
    /// The run.
    #[serde(flatten)]
    pub outcome: &'a QuantizeOutcome,
    /// Its exports.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub exports: &'a [ExportOutcome],
}

impl Report for Exported<'_> {
    fn text(&self) -> String {
        let mut text = self.outcome.text();
        for export in self.exports {
            text.push('\n');
            text.push_str(&export.text());
        }
        text
    }
}

/// The facts that a finished and a planned export have in common.
struct Common<'a> {
    checkpoint: &'a str,
    format: &'a str,
    loaded_by: &'a str,
    tensors: usize,
    checkpoint_bytes: u64,
    out_bytes: u64,
}

impl Common<'_> {
    fn facts(&self) -> Facts {
        let mut facts = Facts::default();
        facts.add("checkpoint", self.checkpoint);
        facts.add("format", format!("{}, for {}", self.format, self.loaded_by));
        let [before, after] = [self.checkpoint_bytes, self.out_bytes].map(units::bytes);
        let tensors = units::counted(self.tensors, "tensor");
        facts.add("size", format!("{before} -> {after}, {tensors}"));
        facts
    }
}

fn add_notes(facts: &mut Facts, notes: &[String]) {
    if !notes.is_empty() {
        facts.add_lines("note", notes.join("\n"));
    }
}

impl Report for ExportOutcome {
    fn text(&self) -> String {
        let Self { checkpoint, format, loaded_by, tensors, .. } = self;
        let (checkpoint_bytes, out_bytes, tensors) =
            (self.checkpoint_bytes, self.out_bytes, *tensors);
        let common = Common { checkpoint, format, loaded_by, tensors, checkpoint_bytes, out_bytes };
        let mut facts = common.facts();
        facts.add("time", units::seconds(self.seconds));
        facts.add("memory", format!("{} at the peak", units::bytes(self.peak_rss_bytes)));
        add_notes(&mut facts, &self.notes);
        let out = self.out.display().to_string();
        let [out, upload] = [out, self.upload.clone()].map(|text| printable(&text).into_owned());
        format!("{}\nwrote {out}\npublish: {upload}\n", facts.text())
    }
}

impl Report for ExportDryRun {
    fn text(&self) -> String {
        let Self { checkpoint, format, loaded_by, tensors, .. } = self;
        let (checkpoint_bytes, out_bytes, tensors) =
            (self.checkpoint_bytes, self.out_bytes, *tensors);
        let common = Common { checkpoint, format, loaded_by, tensors, checkpoint_bytes, out_bytes };
        let mut facts = common.facts();
        let [needed, free] = [self.needed_disk_bytes, self.free_disk_bytes].map(units::bytes);
        facts.add("disk", format!("{needed} needed, {free} free"));
        if self.finished_tensors > 0 {
            let done = format!("an unfinished export, after {} tensors", self.finished_tensors);
            facts.add("continues", done);
        }
        add_notes(&mut facts, &self.notes);
        let out = self.out.display().to_string();
        format!("{}\nwould write {}\n", facts.text(), printable(&out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_says_what_loads_it_and_what_it_leaves_out() {
        let outcome = ExportOutcome {
            out: "./x-dense".into(),
            checkpoint: "x".into(),
            format: "dense",
            loaded_by: "every program that loads the source",
            tensors: 38,
            checkpoint_bytes: 4_000_000,
            out_bytes: 10_000_000,
            seconds: 1.26,
            peak_rss_bytes: 52_000_000,
            resumed_tensors: 0,
            notes: vec!["activations are not quantized".into(), "nor is the KV cache".into()],
            upload: "hf upload ORG/x-dense ./x-dense".into(),
        };
        assert_eq!(
            outcome.text(),
            "\
checkpoint  x
format      dense, for every program that loads the source
size        4.0 MB -> 10.0 MB, 38 tensors
time        1.3 s
memory      52.0 MB at the peak
note        activations are not quantized
            nor is the KV cache

wrote ./x-dense
publish: hf upload ORG/x-dense ./x-dense
"
        );
        let planned = ExportDryRun {
            out: "./x-dense".into(),
            checkpoint: "x".into(),
            format: "dense",
            loaded_by: "every program that loads the source",
            tensors: 38,
            checkpoint_bytes: 4_000_000,
            out_bytes: 10_000_000,
            needed_disk_bytes: 12_000_000,
            free_disk_bytes: 52_000_000_000,
            finished_tensors: 7,
            notes: Vec::new(),
        };
        assert_eq!(
            planned.text(),
            "\
checkpoint  x
format      dense, for every program that loads the source
size        4.0 MB -> 10.0 MB, 38 tensors
disk        12.0 MB needed, 52.0 GB free
continues   an unfinished export, after 7 tensors

would write ./x-dense
"
        );
    }
}
