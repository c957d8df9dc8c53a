//! The report of `atom bench serve`.

use super::Report;
use super::layout::{Facts, Side, Table};
use crate::bench::{ServeOutcome, ServeRow, StepTime};
use crate::units;

impl Report for ServeOutcome {
    fn text(&self) -> String {
        let mut text = String::new();
        for (title, rows) in [("each at its own batch", &self.own), ("at one batch", &self.equal)] {
            if !rows.is_empty() {
                text.push_str(&format!("{} {title}\n{}\n", self.workload, throughput(rows)));
            }
        }
        text.push_str(&format!("one step of decoding\n{}\n", self.step_table()));
        let mut facts = Facts::default();
        facts.add("shape", &self.shape).add("device", &self.device);
        if let Some(bytes) = self.memory_bytes {
            facts.add("memory", units::bytes(bytes));
        }
        if let Some(rate) = self.read_rate {
            facts.add("plain read", format!("{:.2} TB/s", rate / 1e12));
        }
        text + &facts.text()
    }
}

impl ServeOutcome {
    fn step_table(&self) -> String {
        let headings = ["row", "batch", "cached", "ms", "of the floor", "x"];
        let mut table = Table::new(headings.map(|name| (name, side(name))));
        for (row, steps) in &self.steps {
            for StepTime { batch, context, ms, share_of_floor, speedup, .. } in steps {
                let share = share_of_floor
                    .map_or("-".to_owned(), |share| format!("{:.0} %", 100.0 * share));
                table.row(vec![
                    row.name().to_owned(),
                    batch.to_string(),
                    context.to_string(),
                    format!("{ms:.3}"),
                    share,
                    speedup.map_or("-".to_owned(), |speedup| format!("{speedup:.2}")),
                ]);
            }
        }
        table.text()
    }
}

fn side(name: &str) -> Side {
    if name == "row" { Side::Left } else { Side::Right }
}

fn throughput(rows: &[ServeRow]) -> String {
    let headings = [
        "row", "batch", "tokens/s", "x", "new/s", "ms/token", "TPOT ms", "TTFT ms", "memory",
        "ramp", "drain",
    ];
    let mut table = Table::new(headings.map(|name| (name, side(name))));
    for ServeRow { row, batch, run, speedup, peak_bytes, .. } in rows {
        table.row(vec![
            row.name().to_owned(),
            batch.to_string(),
            format!("{:.0}", run.total_tokens_per_second),
            format!("{speedup:.2}"),
            format!("{:.0}", run.output_tokens_per_second),
            format!("{:.2}", run.latency_ms),
            format!("{:.2}", run.tpot_ms.median),
            format!("{:.1}", run.ttft_ms.median),
            peak_bytes.map_or("-".to_owned(), units::bytes),
            format!("{:.0} %", 100.0 * run.ramp),
            format!("{:.0} %", 100.0 * run.drain),
        ]);
    }
    table.text()
}
