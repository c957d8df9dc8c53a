/*! The sites of a decoder block: which activation feeds which linears, and their names.

Outliers, channel order and activation quantization belong to a site; weights belong to a linear. Every
Llama-like block has the sites attn_in, attn_out, mlp_in and mlp_act, in this order; where it has experts, all experts
read mlp_in, and each has its own mlp_act. */

use super::architecture::{Architecture, ExpertNames, FusedLinears, QkNorm, RouterKind};
use crate::checkpoint::RowRange;

/// An activation that feeds linears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SiteKind {
    /// Normed input of attention: q, k, v.
    AttnIn,
    /// Joined heads: o.
    AttnOut,
    /// Normed input of the MLP: gate, up, of every expert.
    MlpIn,
    /// `silu(gate) * up`: down.
    MlpAct,
}

/// Indices of the sites that every block has once, and of the first mlp_act.
pub const ATTN_IN: usize = 0;
pub const ATTN_OUT: usize = 1;
pub const MLP_IN: usize = 2;
pub const MLP_ACT: usize = 3;

/// A linear's name and shape.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearSpec {
    /// Full name without `.weight`.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// Whether it has a bias `[rows]`, which is unquantized.
    pub bias: bool,
}

impl LinearSpec {
    /// The tensor of its weight.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.name)
    }

    /// The tensor of its bias, if it has one.
    pub fn bias(&self) -> Option<String> {
        self.bias.then(|| format!("{}.bias", self.name))
    }
}

/// A site of one block.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteSpec {
    /// Its kind.
    pub kind: SiteKind,
    /// Full name, e.g. `model.layers.0.self_attn.attn_in`.
    pub name: String,
    /// The expert that an mlp_act belongs to, where there are experts; the shared one comes after the others.
    pub expert: Option<usize>,
    /// Input features of its linears.
    pub channels: usize,
    /// The linears it feeds.
    pub linears: Vec<LinearSpec>,
}

/// A tensor outside the blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct OuterTensor {
    /// What it is: `embedding`, `norm` or `head`.
    pub part: &'static str,
    /// Its name.
    pub name: &'static str,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Architecture {
    /// The prefix of block `block`'s tensors.
    pub fn block_name(&self, block: usize) -> String {
        format!("model.layers.{block}")
    }

    /// The name of block `block`'s mean keys, `[kv_heads * head_dim]`.
    pub fn key_mean_name(&self, block: usize) -> String {
        format!("{}.self_attn.key_mean", self.block_name(block))
    }

    /// Names of the RMSNorm weights of block `block` before attention and the MLP, if it has such norms.
    pub fn norms_before(&self, block: usize) -> Option<[String; 2]> {
        self.norms.before.map(|norms| self.norm_weights(block, norms))
    }

    /// Names of the RMSNorm weights of block `block` after attention and the MLP, if it has such norms.
    pub fn norms_after(&self, block: usize) -> Option<[String; 2]> {
        self.norms.after.map(|norms| self.norm_weights(block, norms))
    }

    fn norm_weights(&self, block: usize, norms: [&str; 2]) -> [String; 2] {
        norms.map(|norm| format!("{}.{norm}.weight", self.block_name(block)))
    }

    /// Names of all RMSNorm weights of block `block` but QK-norm's.
    pub fn norm_names(&self, block: usize) -> Vec<String> {
        [self.norms_before(block), self.norms_after(block)]
            .into_iter()
            .flatten()
            .flatten()
            .collect()
    }

    /// Names of the QK-norm's weights of block `block`, if it has one.
    pub fn qk_norm_names(&self, block: usize) -> Option<[String; 2]> {
        let names = ["q_norm", "k_norm"];
        let name = |norm| format!("{}.self_attn.{norm}.weight", self.block_name(block));
        (self.qk_norm != QkNorm::None).then(|| names.map(name))
    }

    /// Lengths of the weights of QK-norm: of queries, and of keys.
    pub fn qk_norm_lengths(&self) -> [usize; 2] {
        match self.qk_norm {
            QkNorm::AllHeads => [self.heads, self.kv_heads].map(|heads| heads * self.head_dim),
            QkNorm::None | QkNorm::PerHead => [self.head_dim; 2],
        }
    }

    /// Name of the router's weight `[experts, hidden]` of block `block`, if it has experts.
    pub fn router_name(&self, block: usize) -> Option<String> {
        let experts = self.experts_of(block)?;
        Some(format!("{}.{}.gate.weight", self.block_name(block), experts.names.part))
    }

    /// Name of what is added to the router's scores to choose experts, `[experts]`, if block `block` has it.
    pub fn router_bias_name(&self, block: usize) -> Option<String> {
        let experts = self.experts_of(block)?;
        let name = format!(
            "{}.{}.gate.e_score_correction_bias",
            self.block_name(block),
            experts.names.part
        );
        (experts.router == RouterKind::SigmoidWithBias).then_some(name)
    }

    /// Name of the weight `[1, hidden]` of the shared expert's gate, if block `block` has one.
    pub fn shared_gate_name(&self, block: usize) -> Option<String> {
        let experts = self.experts_of(block)?;
        let ExpertNames { part, shared, .. } = experts.names;
        let name = format!("{}.{part}.{shared}_gate.weight", self.block_name(block));
        experts.shared.is_some_and(|shared| shared.gated).then_some(name)
    }

    /// The tensors outside the blocks, the embedding first; a tied head is no other tensor. None is quantized.
    pub fn outer_tensors(&self) -> Vec<OuterTensor> {
        let table = || vec![self.vocabulary, self.hidden];
        let mut outer = vec![
            OuterTensor { part: "embedding", name: EMBEDDING, shape: table() },
            OuterTensor { part: "norm", name: FINAL_NORM, shape: vec![self.hidden] },
        ];
        if !self.tied {
            outer.push(OuterTensor { part: "head", name: HEAD, shape: table() });
        }
        outer
    }

    /// Name and shape of the tensors of block `block` that are unquantized: norms, biases, the router.
    pub fn unquantized_tensors(&self, block: usize) -> Vec<(String, Vec<usize>)> {
        let norms = self.norm_names(block).into_iter();
        let mut tensors: Vec<_> = norms.map(|name| (name, vec![self.hidden])).collect();
        let qk_norms = self.qk_norm_names(block).into_iter().flatten().zip(self.qk_norm_lengths());
        tensors.extend(qk_norms.map(|(name, length)| (name, vec![length])));
        for linear in self.sites(block).iter().flat_map(|site| &site.linears) {
            tensors.extend(linear.bias().map(|name| (name, vec![linear.rows])));
        }
        if let (Some(name), Some(experts)) = (self.router_name(block), self.experts_of(block)) {
            tensors.push((name, vec![experts.count, self.hidden]));
            tensors.extend(self.router_bias_name(block).map(|name| (name, vec![experts.count])));
            tensors.extend(self.shared_gate_name(block).map(|name| (name, vec![1, self.hidden])));
        }
        tensors
    }

    /// The sites of block `block`, in the order the forward pass reaches them.
    pub fn sites(&self, block: usize) -> Vec<SiteSpec> {
        let prefix = self.block_name(block);
        let [heads, kv_heads] = [self.heads, self.kv_heads].map(|heads| heads * self.head_dim);
        let hidden = self.hidden;
        let site = |kind, part: &str, name: &str, channels, linears: &[(String, usize)], bias| {
            let linear = |(name, rows): &(String, usize)| LinearSpec {
                name: format!("{prefix}.{part}.{name}"),
                rows: *rows,
                columns: channels,
                bias,
            };
            let linears = linears.iter().map(linear).collect();
            let name = format!("{prefix}.{part}.{name}");
            SiteSpec { kind, name, expert: None, channels, linears }
        };
        let named = |names: &[(&str, usize)]| -> Vec<(String, usize)> {
            names.iter().map(|(name, rows)| ((*name).to_owned(), *rows)).collect()
        };
        let biases = self.biases;
        let q_k_v = named(&[("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)]);
        let o = named(&[("o_proj", hidden)]);
        let mut sites = vec![
            site(SiteKind::AttnIn, "self_attn", "attn_in", hidden, &q_k_v, biases.attn_in),
            site(SiteKind::AttnOut, "self_attn", "attn_out", heads, &o, biases.attn_out),
        ];
        let Some(experts) = self.experts_of(block) else {
            let wide = self.intermediate;
            let gate_up = named(&[("gate_proj", wide), ("up_proj", wide)]);
            let down = named(&[("down_proj", hidden)]);
            sites.push(site(SiteKind::MlpIn, "mlp", "mlp_in", hidden, &gate_up, biases.mlp));
            sites.push(site(SiteKind::MlpAct, "mlp", "mlp_act", wide, &down, biases.mlp));
            return sites;
        };
        let ExpertNames { part, linears: [gate, up, down], shared } = experts.names;
        let module = |expert| match expert {
            _ if expert == experts.count => shared.to_owned(),
            _ => format!("experts.{expert}"),
        };
        let all = (0..experts.all()).flat_map(|expert| {
            let (module, wide) = (module(expert), experts.width(expert));
            [gate, up].map(|name| (format!("{module}.{name}"), wide))
        });
        let all: Vec<_> = all.collect();
        sites.push(site(SiteKind::MlpIn, part, "mlp_in", hidden, &all, false));
        sites.extend((0..experts.all()).map(|expert| {
            let part = format!("{part}.{}", module(expert));
            let (down, wide) = (named(&[(down, hidden)]), experts.width(expert));
            let site = site(SiteKind::MlpAct, &part, "mlp_act", wide, &down, false);
            SiteSpec { expert: Some(expert), ..site }
        }));
        sites
    }

    /// The sites of a block with the most weights: in some networks the first blocks have no experts.
    pub fn largest_block(&self) -> Vec<SiteSpec> {
        let weights = |sites: &Vec<SiteSpec>| -> usize {
            let linears = sites.iter().flat_map(|site| &site.linears);
            linears.map(|linear| linear.rows.saturating_mul(linear.columns)).sum()
        };
        let (first, last) = (self.sites(0), self.sites(self.blocks.saturating_sub(1)));
        if weights(&first) < weights(&last) { last } else { first }
    }

    /// Name and shape of every tensor a source must hold.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let outer = self.outer_tensors().into_iter();
        let mut tensors: Vec<_> = outer.map(|outer| (outer.name.to_owned(), outer.shape)).collect();
        for block in 0..self.blocks {
            tensors.extend(self.unquantized_tensors(block));
            for linear in self.sites(block).iter().flat_map(|site| &site.linears) {
                tensors.push((linear.weight(), vec![linear.rows, linear.columns]));
            }
        }
        tensors
    }

    /// The linears that a source stores as rows of a common tensor, and their biases. A source that stores them by
    /// themselves is read as well.
    pub fn row_ranges(&self) -> Vec<RowRange> {
        let mut ranges = Vec::new();
        for fused in self.fused {
            for site in (0..self.blocks).flat_map(|block| self.sites(block)) {
                for (part, linears) in site.fused(fused) {
                    let stored = format!("{part}.{}", fused.stored);
                    push_ranges(&mut ranges, &stored, &linears);
                }
            }
        }
        ranges
    }

    /// Name of the output head's weight.
    pub fn head_name(&self) -> &'static str {
        if self.tied { EMBEDDING } else { HEAD }
    }
}

impl SiteSpec {
    /// Linears of the site that are stored as one tensor, with the common prefix of their names.
    fn fused(&self, fused: &FusedLinears) -> Vec<(&str, Vec<&LinearSpec>)> {
        let all_of = |part: &str| -> Option<Vec<&LinearSpec>> {
            let named = |own: &&str| {
                let name = format!("{part}.{own}");
                self.linears.iter().find(|linear| linear.name == name)
            };
            fused.linears.iter().map(named).collect()
        };
        let parts = self.linears.iter().filter_map(|linear| {
            let (part, own) = linear.name.rsplit_once('.')?;
            Some(part).filter(|_| own == fused.linears[0])
        });
        parts.filter_map(|part| Some((part, all_of(part)?))).collect()
    }
}

/// Adds the weights, and any biases, of linears that are stored as one tensor.
fn push_ranges(ranges: &mut Vec<RowRange>, stored: &str, linears: &[&LinearSpec]) {
    let all_rows = linears.iter().map(|linear| linear.rows).sum();
    let mut first = 0;
    for linear in linears {
        let rows = first..first + linear.rows;
        let weight = format!("{stored}.weight");
        let shape = vec![all_rows, linear.columns];
        ranges.push(RowRange::new(linear.weight(), weight, shape, rows.clone()));
        if let Some(bias) = linear.bias() {
            ranges.push(RowRange::new(bias, format!("{stored}.bias"), vec![all_rows], rows));
        }
        first += linear.rows;
    }
}

/// Name of the embedding `[vocabulary, hidden]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the last RMSNorm's weight.
pub const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";
