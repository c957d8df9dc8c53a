/*! The report of `atom inspect`. */

use super::Report;
use super::layout::{Facts, Side, Table};
use crate::eval::InspectOutcome;
use crate::{recipe, units};

impl Report for InspectOutcome {
    fn text(&self) -> String {
        let mut facts = Facts::default();
        facts.add("kind", self.kind.description());
        facts.add("name", &self.name).add("architecture", &self.architecture);
        facts.add("blocks", units::count(self.blocks));
        facts.add(
            "tensors",
            format!("{}, {}", units::count(self.tensors), units::bytes(self.bytes)),
        );
        if let Some(bits) = self.bits_per_weight {
            facts.add("bits per weight", format!("{bits:.2}"));
        }
        if let Some(recipe) = &self.recipe {
            facts.add_lines("recipe", recipe::lines(recipe));
        }
        for (label, value) in [
            ("source", &self.source),
            ("calibration", &self.calibration),
            ("distillation", &self.distillation),
            ("written by", &self.tool_version),
        ] {
            if let Some(value) = value {
                facts.add(label, value);
            }
        }
        if self.linears.is_empty() {
            return facts.text();
        }
        let mut table = Table::new([
            ("linear", Side::Left),
            ("rows", Side::Right),
            ("columns", Side::Right),
            ("bits", Side::Right),
            ("group", Side::Right),
            ("outliers", Side::Right),
            ("size", Side::Right),
            ("error", Side::Right),
        ]);
        for linear in &self.linears {
            table.row(vec![
                linear.name.clone(),
                linear.rows.to_string(),
                linear.columns.to_string(),
                linear.bits.to_string(),
                linear.group_size.to_string(),
                linear.outliers.to_string(),
                units::bytes(linear.bytes),
                linear.error.map_or_else(|| "-".to_owned(), |error| format!("{error:.4}")),
            ]);
        }
        format!("{}\n{}", facts.text(), table.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{CheckpointKind, InspectedLinear};
    use crate::quant::codebook::Codebook;
    use crate::recipe::Recipe;

    fn source() -> InspectOutcome {
        InspectOutcome {
            kind: CheckpointKind::Source,
            name: "tiny-llama".into(),
            architecture: "LlamaForCausalLM".into(),
            blocks: 4,
            tensors: 38,
            bytes: 8_912_384,
            bits_per_weight: None,
            recipe: None,
            kv: None,
            source: None,
            calibration: None,
            distillation: None,
            tool_version: None,
            linears: Vec::new(),
        }
    }

    #[test]
    fn a_source_says_what_is_in_it() {
        assert_eq!(
            source().text(),
            "\
kind          source checkpoint
name          tiny-llama
architecture  LlamaForCausalLM
blocks        4
tensors       38, 8.9 MB
"
        );
    }

    #[test]
    fn an_atom_checkpoint_says_how_it_was_made() {
        let linear = |name: &str, error| InspectedLinear {
            name: name.into(),
            rows: 256,
            columns: 768,
            bits: 4,
            format: Codebook::Int,
            group_size: 128,
            outliers: 128,
            bytes: 118_784,
            error,
        };
        let outcome = InspectOutcome {
            kind: CheckpointKind::Atom,
            bits_per_weight: Some(4.75),
            recipe: Some(Recipe::paper()),
            kv: Some("int4 per token and head".into()),
            source: Some("tiny-llama".into()),
            calibration: Some("sample, 128 windows of 2048 tokens, seed 0".into()),
            distillation: None,
            tool_version: Some("atom 0.1.0".into()),
            linears: vec![
                linear("model.layers.0.mlp.down_proj", Some(0.0612)),
                linear("model.layers.1.mlp.down_proj", None),
            ],
            ..source()
        };
        assert_eq!(
            outcome.text(),
            "\
kind             Atom checkpoint
name             tiny-llama
architecture     LlamaForCausalLM
blocks           4
tensors          38, 8.9 MB
bits per weight  4.75
recipe           weights int4, groups of 128, clip 0.85, rows share scales by two, GPTQ (damping 0.01)
                 channels ordered by energy, 128 outliers in int8
                 activations int4, clip 0.9
                 KV cache int4, before RoPE, clip 1
source           tiny-llama
calibration      sample, 128 windows of 2048 tokens, seed 0
written by       atom 0.1.0

linear                        rows  columns  bits  group  outliers      size   error
model.layers.0.mlp.down_proj   256      768     4    128       128  118.8 kB  0.0612
model.layers.1.mlp.down_proj   256      768     4    128       128  118.8 kB       -
"
        );
        let object = serde_json::to_value(&outcome).unwrap();
        assert_eq!(object["kind"], "atom");
    }
}
