/*! The report of `atom distill`. */

use super::Report;
use super::layout::Facts;
use crate::pipeline::distill::{DistillDryRun, DistillOutcome};
use crate::printable::printable;
use crate::units;

impl Report for DistillOutcome {
    fn text(&self) -> String {
        let mut facts = Facts::default();
        facts.add("model", &self.model);
        facts.add("device", &self.device);
        facts.add("trained", units::counted(self.parameters, "value"));
        let steps = units::counted(self.steps, "step");
        let (per_step, seq_len) = (units::counted(self.windows_per_step, "window"), self.seq_len);
        facts.add("steps", format!("{steps} of {per_step} of {seq_len} tokens"));
        let held = units::counted(self.held_out_windows, "window");
        facts.add("windows", format!("{} trained on, {held} held back", self.windows));
        facts.add(
            "divergence",
            format!(
                "{:.4} -> {:.4} nats a token ({}) on held-out windows",
                self.before,
                self.after,
                units::change(self.after / self.before)
            ),
        );
        facts.add("kept", self.kept_line());
        facts.add("time", units::seconds(self.seconds));
        let device_memory = self
            .peak_gpu_bytes
            .map(|bytes| format!(", {} on the GPU", units::bytes(bytes)))
            .unwrap_or_default();
        facts.add("peak memory", units::bytes(self.peak_rss_bytes) + &device_memory);
        if self.resumed_steps > 0 {
            facts.add("resumed", format!("after step {}", self.resumed_steps));
        }
        let mut curve = String::from("   step   trained  held out\n");
        for point in &self.curve {
            let trained = point.trained.map_or_else(|| "-".to_owned(), |nats| format!("{nats:.4}"));
            curve += &format!("{:7}  {trained:>8}  {:8.4}\n", point.step, point.held_out);
        }
        let end = match &self.out {
            None => {
                "nothing was gained, and nothing written: the checkpoint is as it was\n".to_owned()
            }
            Some(out) => {
                let out = out.display().to_string();
                let out = printable(&out);
                format!("wrote {out}\nnext: atom verify --model {out}\n")
            }
        };
        format!("{}\n{curve}\n{end}", facts.text())
    }
}

impl DistillOutcome {
    /// What was gained, in a line of another report.
    pub(super) fn line(&self) -> String {
        if self.kept_step == 0 {
            return "no gain on held-out windows: the checkpoint is as it was".to_owned();
        }
        format!(
            "{:.4} -> {:.4} nats a token ({}) on held-out windows, {}",
            self.before,
            self.after,
            units::change(self.after / self.before),
            units::counted(self.steps, "step")
        )
    }

    fn kept_line(&self) -> String {
        match self.kept_step {
            0 => "the values before training: no step improved the held-out windows".to_owned(),
            step => format!("the values after step {step}"),
        }
    }
}

impl Report for DistillDryRun {
    fn text(&self) -> String {
        let mut facts = Facts::default();
        facts.add("model", &self.model);
        let steps = units::counted(self.steps, "step");
        let (per_step, seq_len) = (units::counted(self.windows_per_step, "window"), self.seq_len);
        facts.add("would train", format!("{steps} of {per_step} of {seq_len} tokens"));
        let held = units::counted(self.held_out_windows, "window");
        facts.add("windows", format!("{} trained on, {held} held back", self.windows));
        facts.add("memory", format!("about {}", units::bytes(self.memory_bytes)));
        facts.add("disk", units::bytes(self.needed_disk_bytes));
        if self.resumes {
            facts.add("resumes", "an unfinished run of the same job");
        }
        let out = self.out.display().to_string();
        format!("{}\nwould write {}\n", facts.text(), printable(&out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::DistilledStep;

    #[test]
    fn a_gain_and_its_absence_are_said() {
        let point = |step, trained, held_out| DistilledStep { step, trained, held_out };
        let mut outcome = DistillOutcome {
            out: Some("m-distilled".into()),
            model: "m".into(),
            parameters: 1234,
            steps: 10,
            windows_per_step: 4,
            seq_len: 2048,
            windows: 30,
            held_out_windows: 4,
            before: 0.2,
            after: 0.1,
            kept_step: 10,
            curve: vec![point(0, None, 0.2), point(10, Some(0.15), 0.1)],
            resumed_steps: 0,
            seconds: 3.21,
            step_seconds: Some(0.25),
            peak_rss_bytes: 1 << 20,
            peak_gpu_bytes: None,
            device: "cpu".into(),
        };
        let text = outcome.text();
        assert!(
            text.contains("0.2000 -> 0.1000 nats a token (-50.0 %) on held-out windows"),
            "{text}"
        );
        assert!(
            text.contains("      0         -    0.2000\n     10    0.1500    0.1000\n"),
            "{text}"
        );
        assert!(
            text.ends_with("wrote m-distilled\nnext: atom verify --model m-distilled\n"),
            "{text}"
        );
        (outcome.out, outcome.kept_step) = (None, 0);
        assert!(
            outcome.text().ends_with(
                "nothing was gained, and nothing written: the checkpoint is as it was\n"
            )
        );
    }
}
