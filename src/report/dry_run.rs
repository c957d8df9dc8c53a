/*! The report of `atom quantize --dry-run`. */

use super::Report;
use super::layout::Facts;
use crate::pipeline::outcome::DryRun;
use crate::printable::printable;
use crate::recipe;
use crate::units;

impl Report for DryRun {
    fn text(&self) -> String {
        let mut facts = Facts::default();
        facts.add("model", &self.model).add_lines("recipe", recipe::lines(&self.recipe));
        facts.add(
            "work",
            format!(
                "{}, {}",
                units::counted(self.blocks, "block"),
                units::counted(self.linears, "linear")
            ),
        );
        facts.add(
            "calibration",
            format!("{} of {} tokens", units::counted(self.samples, "window"), self.seq_len),
        );
        facts.add(
            "size",
            format!(
                "{} -> {} ({:.2} x smaller)",
                units::bytes(self.source_bytes),
                units::bytes(self.out_bytes),
                self.source_bytes as f64 / self.out_bytes as f64
            ),
        );
        facts.add("bits per weight", format!("{:.2}", self.bits_per_weight));
        facts.add("memory", format!("{} at the peak, estimated", units::bytes(self.memory_bytes)));
        facts.add(
            "disk",
            format!(
                "{} needed, {} free",
                units::bytes(self.needed_disk_bytes),
                units::bytes(self.free_disk_bytes)
            ),
        );
        if self.finished_blocks > 0 {
            facts.add(
                "continues",
                format!("an unfinished run, after {} blocks", self.finished_blocks),
            );
        }
        let out = self.out.display().to_string();
        format!("{}\nwould write {}\n", facts.text(), printable(&out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    #[test]
    fn a_dry_run_says_what_would_be_done() {
        let found = DryRun {
            out: "./x".into(),
            model: "tiny-llama".into(),
            recipe: Recipe::default_recipe(),
            blocks: 4,
            linears: 28,
            samples: 128,
            seq_len: 2048,
            source_bytes: 10_000_000,
            out_bytes: 4_000_000,
            bits_per_weight: 4.5,
            memory_bytes: 310_000_000,
            needed_disk_bytes: 12_000_000,
            free_disk_bytes: 52_000_000_000,
            finished_blocks: 3,
        };
        assert_eq!(
            found.text(),
            "\
model            tiny-llama
recipe           weights int4, groups of 128 (narrow sites 64 or 32), clip 0.95, signed scales, GPTQ (damping 0.01, sites in turn, correction 0.5)
                 channels ordered by energy, a 32nd of them (at most 128) as outliers in int8
                 activations int4, clip 0.95, signed scales, Hadamard in each group
                 KV cache int4, after RoPE, heads rotated, keys centred, clip 1
work             4 blocks, 28 linears
calibration      128 windows of 2048 tokens
size             10.0 MB -> 4.0 MB (2.50 x smaller)
bits per weight  4.50
memory           310.0 MB at the peak, estimated
disk             12.0 MB needed, 52.0 GB free
continues        an unfinished run, after 3 blocks

would write ./x
"
        );
    }
}
