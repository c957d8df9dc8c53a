/*! The report of `atom verify`. */

use anstyle::{AnsiColor, Style};

use super::Report;
use super::layout::Facts;
use crate::eval::VerifyOutcome;
use crate::printable::printable;
use crate::units;

const PASSED: Style = AnsiColor::Green.on_default();
const FAILED: Style = AnsiColor::Red.on_default().bold();

impl Report for VerifyOutcome {
    fn text(&self) -> String {
        let width = self.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for check in &self.checks {
            // The mark is padded before it is coloured: escapes have no width.
            let (style, mark) = if check.ok { (PASSED, "ok    ") } else { (FAILED, "FAILED") };
            let (name, detail) = (printable(&check.name), printable(&check.detail));
            let line = format!("{style}{mark}{style:#}  {name:width$}  {detail}");
            text.push_str(line.trim_end());
            text.push('\n');
        }
        let mut facts = Facts::default();
        facts.add("model", &self.model);
        if let Some(perplexity) = self.perplexity {
            facts.add("perplexity", format!("{perplexity:.4}"));
        }
        if let Some(reference) = self.reference_perplexity {
            facts.add("reference", format!("{reference:.4}"));
        }
        if let Some(increase) = self.increase {
            facts.add("increase", units::change(1.0 + increase));
        }
        facts.add("device", &self.device);
        if let Some(why) = &self.kernels_unchecked {
            facts.add("kernels", format!("not checked: {why}"));
        }
        let (style, verdict) = if self.ok { (PASSED, "ok") } else { (FAILED, "FAILED") };
        format!("{text}\n{}\n{style}{verdict}{style:#}\n", facts.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::Check;

    #[test]
    fn checks_are_aligned_and_marked() {
        let check =
            |name: &str, ok, detail: &str| Check { name: name.into(), ok, detail: detail.into() };
        let outcome = VerifyOutcome {
            model: "m-atom-w4a4-g128".into(),
            ok: false,
            checks: vec![
                check("shapes", true, "112 tensors"),
                check("channel orders", false, "model.layers.0.attn_in: channel 7 occurs twice"),
            ],
            perplexity: Some(30.48),
            reference_perplexity: Some(20.97),
            increase: Some(0.4535),
            kernels_unchecked: Some("no GPU: libcuda.so.1 was not found".into()),
            device: "cpu (avx512)".into(),
        };
        let plain = anstream::adapter::strip_str(&outcome.text()).to_string();
        assert_eq!(
            plain,
            "\
ok      shapes          112 tensors
FAILED  channel orders  model.layers.0.attn_in: channel 7 occurs twice

model       m-atom-w4a4-g128
perplexity  30.4800
reference   20.9700
increase    +45.4 %
device      cpu (avx512)
kernels     not checked: no GPU: libcuda.so.1 was not found

FAILED
"
        );
    }
}
