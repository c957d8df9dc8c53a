/*! The report of `atom calibrate` and `atom plan`. */

use super::layout::Facts;
use super::{Report, allocation};
use crate::pipeline::outcome::FileOutcome;
use crate::printable::printable;
use crate::units;

impl Report for FileOutcome {
    fn text(&self) -> String {
        let mut facts = Facts::default();
        facts.add("model", &self.model);
        let sites = units::counted(self.sites, "site");
        facts.add("holds", format!("{sites}, {}", units::counted(self.linears, "linear")));
        if let Some(bits) = self.bits_per_weight {
            facts.add("bits per weight", format!("{bits:.2}"));
        }
        if let Some(measured) = &self.sensitivity {
            allocation::measured(measured, &mut facts);
        }
        if let Some(allocated) = &self.allocation {
            allocation::facts(allocated, &mut facts);
        }
        facts.add("time", units::seconds(self.seconds));
        let tables = self.allocation.as_ref().map(allocation::tables).unwrap_or_default();
        let out = self.out.display().to_string();
        let out = printable(&out);
        // Only a plan knows its bits; the other file is a calibration, which is planned next.
        let next = match self.bits_per_weight {
            Some(_) => format!("atom pack --model MODEL --plan {out}"),
            None if self.sensitivity.is_some() => format!("atom plan {out} --target-bits 4.5"),
            None => format!("atom plan {out}"),
        };
        format!("{}\n{tables}wrote {out}\nnext: {next}\n", facts.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_names_the_stage_that_reads_it() {
        let calibration = FileOutcome {
            out: "m-calibration.safetensors".into(),
            model: "m".into(),
            seconds: 3.21,
            sites: 16,
            linears: 28,
            bits_per_weight: None,
            sensitivity: None,
            allocation: None,
        };
        assert_eq!(
            calibration.text(),
            "\
model  m
holds  16 sites, 28 linears
time   3.2 s

wrote m-calibration.safetensors
next: atom plan m-calibration.safetensors
"
        );
        let plan =
            FileOutcome { out: "m-plan.json".into(), bits_per_weight: Some(4.5), ..calibration };
        assert_eq!(
            plan.text(),
            "\
model            m
holds            16 sites, 28 linears
bits per weight  4.50
time             3.2 s

wrote m-plan.json
next: atom pack --model MODEL --plan m-plan.json
"
        );
    }
}
