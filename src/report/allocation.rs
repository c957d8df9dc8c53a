/*! What sensitivity was measured and how bits were allocated by it: facts and tables for the reports of
calibrations, plans and runs. */

use super::layout::{Facts, Side, Table};
use crate::pipeline::allocated::Allocated;
use crate::pipeline::outcome::Measured;
use crate::units;

/// What a calibration measured, in a few lines.
pub(crate) fn measured(measured: &Measured, facts: &mut Facts) {
    let list = |numbers: Vec<String>| numbers.join(", ");
    let widths = list(measured.widths.iter().map(u8::to_string).collect());
    let counts = list(measured.outlier_counts.iter().map(usize::to_string).collect());
    facts.add("sensitivity", format!("widths {widths}; outliers {counts}"));
    facts.add(
        "measured on",
        format!(
            "{} (effects on {})",
            units::counted(measured.hessian_windows, "window"),
            units::counted(measured.effect_windows, "window")
        ),
    );
    facts.add(
        "expected loss",
        format!(
            "{:.4} nats a token at {} bits everywhere",
            measured.uniform_nats, measured.recipe.bits
        ),
    );
}

/// An allocation in a few lines.
pub(crate) fn facts(allocated: &Allocated, facts: &mut Facts) {
    let Allocated { planned, uniform, .. } = allocated;
    let target = match (allocated.target_bits, allocated.target_bytes) {
        (Some(bits), _) => format!("{bits} bits a weight; planned {:.3}", planned.bits_per_weight),
        (None, bytes) => format!("{} in all", units::bytes(bytes.unwrap_or_default())),
    };
    facts.add("target", target);
    facts.add("checkpoint", format!("at most {}", units::bytes(allocated.checkpoint_bytes)));
    facts.add(
        "expected loss",
        format!(
            "{:.4} nats a token; {:.4} as the recipe has it everywhere, in {:.3} bits a weight",
            planned.nats, uniform.nats, uniform.bits_per_weight
        ),
    );
    let gap = (planned.nats - allocated.least_nats) / planned.nats;
    let proof = if allocated.least_nats >= planned.nats {
        "the best allocation there is".to_owned()
    } else {
        format!("within {:.4} % of the best there can be", 100.0 * gap)
    };
    facts.add("proven", proof);
}

/// Linears by width, sites by outlier count, and who got most; ends with an empty line.
pub(crate) fn tables(allocated: &Allocated) -> String {
    let all: u64 = allocated.widths.iter().map(|share| share.weights).sum();
    let columns = [("width", Side::Right), ("linears", Side::Right), ("weights", Side::Right)];
    let mut widths = Table::new(columns);
    for share in &allocated.widths {
        let part = 100.0 * share.weights as f64 / all as f64;
        widths.row(vec![
            share.bits.to_string(),
            units::count(share.linears),
            format!("{part:.1} %"),
        ]);
    }
    let mut outliers = Table::new([("outliers", Side::Right), ("sites", Side::Right)]);
    for share in &allocated.outliers {
        outliers.row(vec![units::count(share.outliers), units::count(share.sites)]);
    }
    let columns =
        [("most bits", Side::Left), ("bits", Side::Right), ("nats by the recipe", Side::Right)];
    let mut favoured = Table::new(columns);
    for linear in &allocated.favoured {
        favoured.row(vec![
            linear.name.clone(),
            linear.bits.to_string(),
            format!("{:.5}", linear.nats),
        ]);
    }
    format!("{}\n{}\n{}\n", widths.text(), outliers.text(), favoured.text())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::allocated::{Expected, Favoured, OutlierShare, WidthShare};

    #[test]
    fn an_allocation_is_told_in_lines_and_tables() {
        let allocated = Allocated {
            target_bits: Some(4.5),
            target_bytes: None,
            checkpoint_bytes: 101_300_000,
            planned: Expected { bits_per_weight: 4.4996, nats: 0.03125 },
            uniform: Expected { bits_per_weight: 4.75, nats: 0.04 },
            least_nats: 0.03125,
            widths: vec![
                WidthShare { bits: 3, linears: 10, weights: 250 },
                WidthShare { bits: 4, linears: 1200, weights: 750 },
            ],
            outliers: vec![OutlierShare { outliers: 64, sites: 120 }],
            favoured: vec![Favoured { name: "layers.1.down_proj".into(), bits: 8, nats: 0.012 }],
        };
        let mut lines = Facts::default();
        facts(&allocated, &mut lines);
        assert_eq!(
            format!("{}\n{}", lines.text(), tables(&allocated)),
            "\
target         4.5 bits a weight; planned 4.500
checkpoint     at most 101.3 MB
expected loss  0.0312 nats a token; 0.0400 as the recipe has it everywhere, in 4.750 bits a weight
proven         the best allocation there is

width  linears  weights
    3       10   25.0 %
    4    1 200   75.0 %

outliers  sites
      64    120

most bits           bits  nats by the recipe
layers.1.down_proj     8             0.01200

"
        );
        let open = Allocated {
            least_nats: 0.03,
            target_bits: None,
            target_bytes: Some(3_500_000_000),
            ..allocated
        };
        let mut lines = Facts::default();
        facts(&open, &mut lines);
        let text = lines.text();
        assert!(text.contains("target         3.5 GB in all"), "{text}");
        assert!(text.contains("within 4.0000 % of the best"), "{text}");
    }
}
