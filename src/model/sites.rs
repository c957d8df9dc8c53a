/*! The sites of a decoder block: which activation feeds which linears, and their names.

Outliers, channel order and activation quantization belong to a site; weights belong to a linear. Every
Llama-like block has the sites attn_in, attn_out, mlp_in and mlp_act, in this order; where it has experts, all experts
read mlp_in, and each has its own mlp_act. */

use super::architecture::{Architecture, FusedLinears, QkNorm};
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
    /// The expert that an mlp_act belongs to, where there are experts.
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

    /// Names of the two RMSNorm weights of block `block`: before attention, before the MLP.
    pub fn norm_names(&self, block: usize) -> [String; 2] {
        ["input_layernorm", "post_attention_layernorm"]
            .map(|norm| format!("{}.{norm}.weight", self.block_name(block)))
    }

    /// Names of the QK-norm's weights of block `block`, if it has one.
    pub fn qk_norm_names(&self, block: usize) -> Option<[String; 2]> {
        let names = ["q_norm", "k_norm"];
        let name = |norm| format!("{}.self_attn.{norm}.weight", self.block_name(block));
        (self.qk_norm != QkNorm::None).then(|| names.map(name))
    }

    /// Name of the router's weight `[experts, hidden]` of block `block`, if it has experts.
    pub fn router_name(&self, block: usize) -> Option<String> {
        let experts = self.experts_of(block)?;
        Some(format!("{}.{}.gate.weight", self.block_name(block), experts.names.part))
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
        let mut tensors: Vec<_> =
            self.norm_names(block).map(|name| (name, vec![self.hidden])).into();
        let qk_norms = self.qk_norm_names(block).into_iter().flatten();
        tensors.extend(qk_norms.map(|name| (name, vec![self.head_dim])));
        for linear in self.sites(block).iter().flat_map(|site| &site.linears) {
            tensors.extend(linear.bias().map(|name| (name, vec![linear.rows])));
        }
        if let (Some(name), Some(experts)) = (self.router_name(block), self.experts_of(block)) {
            tensors.push((name, vec![experts.count, self.hidden]));
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
        let (part, [gate, up, down]) = (experts.names.part, experts.names.linears);
        let wide = experts.intermediate;
        let all = (0..experts.count)
            .flat_map(|expert| [gate, up].map(|name| (format!("experts.{expert}.{name}"), wide)));
        let all: Vec<_> = all.collect();
        sites.push(site(SiteKind::MlpIn, part, "mlp_in", hidden, &all, false));
        sites.extend((0..experts.count).map(|expert| {
            let part = format!("{part}.experts.{expert}");
            let down = named(&[(down, hidden)]);
            let site = site(SiteKind::MlpAct, &part, "mlp_act", wide, &down, false);
            SiteSpec { expert: Some(expert), ..site }
        }));
        sites
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
