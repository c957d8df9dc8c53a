/*! The sites of a decoder block: which activation feeds which linears, and what they are called.

Outliers, channel order and activation quantization belong to a site; weights belong to a linear.
Every Llama-like block is these four sites. */

use super::architecture::Architecture;

/// An activation that feeds linears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SiteKind {
    /// Normed input of attention: q, k, v.
    AttnIn,
    /// Joined heads: o.
    AttnOut,
    /// Normed input of the MLP: gate, up.
    MlpIn,
    /// `silu(gate) * up`: down.
    MlpAct,
}

/// All sites of a block, in the order the forward pass reaches them.
pub const SITES: [SiteKind; 4] =
    [SiteKind::AttnIn, SiteKind::AttnOut, SiteKind::MlpIn, SiteKind::MlpAct];

/// A linear's name and shape.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearSpec {
    /// Full name without `.weight`.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
}

/// A site of one block.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteSpec {
    /// Which.
    pub kind: SiteKind,
    /// Full name, e.g. `model.layers.0.self_attn.attn_in`.
    pub name: String,
    /// Input features of its linears.
    pub channels: usize,
    /// The linears it feeds.
    pub linears: Vec<LinearSpec>,
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

    /// The sites of block `block`, in the order the forward pass reaches them.
    pub fn sites(&self, block: usize) -> [SiteSpec; 4] {
        let prefix = self.block_name(block);
        let heads = self.heads * self.head_dim;
        let kv_heads = self.kv_heads * self.head_dim;
        SITES.map(|kind| {
            let (part, site, channels, linears): (_, _, _, &[(&str, usize)]) = match kind {
                SiteKind::AttnIn => (
                    "self_attn",
                    "attn_in",
                    self.hidden,
                    &[("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)],
                ),
                SiteKind::AttnOut => ("self_attn", "attn_out", heads, &[("o_proj", self.hidden)]),
                SiteKind::MlpIn => (
                    "mlp",
                    "mlp_in",
                    self.hidden,
                    &[("gate_proj", self.intermediate), ("up_proj", self.intermediate)],
                ),
                SiteKind::MlpAct => {
                    ("mlp", "mlp_act", self.intermediate, &[("down_proj", self.hidden)])
                }
            };
            SiteSpec {
                kind,
                name: format!("{prefix}.{part}.{site}"),
                channels,
                linears: linears
                    .iter()
                    .map(|&(name, rows)| LinearSpec {
                        name: format!("{prefix}.{part}.{name}"),
                        rows,
                        columns: channels,
                    })
                    .collect(),
            }
        })
    }

    /// Name and shape of every tensor a source must hold.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = vec![
            (EMBEDDING.to_owned(), vec![self.vocabulary, self.hidden]),
            (FINAL_NORM.to_owned(), vec![self.hidden]),
        ];
        if !self.tied {
            tensors.push((HEAD.to_owned(), vec![self.vocabulary, self.hidden]));
        }
        for block in 0..self.blocks {
            tensors.extend(self.norm_names(block).map(|name| (name, vec![self.hidden])));
            for site in self.sites(block) {
                tensors.extend(site.linears.into_iter().map(|linear| {
                    (format!("{}.weight", linear.name), vec![linear.rows, linear.columns])
                }));
            }
        }
        tensors
    }

    /// Name of the output head's weight.
    pub fn head_name(&self) -> &'static str {
        if self.tied { EMBEDDING } else { HEAD }
    }
}

/// Name of the embedding `[vocabulary, hidden]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the last RMSNorm's weight.
pub const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";
