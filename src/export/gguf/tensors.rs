/*! The tensors of a GGUF file: their names in llama.cpp, their types, and what of the checkpoint each is made of. */

use super::blocks::{BLOCK, RowOrder};
use super::container::{TensorInfo, TensorType};
use super::metadata::architecture_name;
use crate::checkpoint::plan::{BlockPlan, LinearPlan, SitePlan};
use crate::model::Architecture;
use crate::model::sites::{EMBEDDING, FINAL_NORM, LinearSpec, SiteKind};

/// A tensor of the file.
#[derive(Debug)]
pub(super) struct FileTensor<'a> {
    /// What the file says of it.
    pub(super) info: TensorInfo,
    /// What it holds: one content, or the experts' one after another.
    pub(super) contents: Vec<Content<'a>>,
    /// The order of the rows.
    pub(super) order: RowOrder,
}

/// What a tensor, or an expert's part of it, is made of.
#[derive(Debug)]
pub(super) enum Content<'a> {
    /// A quantized linear.
    Linear(&'a SitePlan, &'a LinearPlan),
    /// A tensor that the checkpoint holds unquantized.
    Stored { name: String, shape: Vec<usize> },
    /// Numbers of f32.
    Made(Vec<f32>),
}

/// What a linear becomes: `Q4_0` or `Q8_0` as its codes have 4 or 8 bits, F16 where it is not quantized.
fn linear_type(linear: &LinearPlan) -> TensorType {
    match linear.bits {
        4 => TensorType::Q4_0,
        8 => TensorType::Q8_0,
        _ => TensorType::F16,
    }
}

/// A linear of a block.
#[derive(Clone, Copy)]
struct Member<'s, 'a> {
    /// Its name in the source, and its shape.
    spec: &'s LinearSpec,
    /// Its site.
    site: &'a SitePlan,
    /// What becomes of it.
    plan: &'a LinearPlan,
}

/// Lists the tensors of a network.
pub(super) struct Lister<'a> {
    architecture: &'a Architecture,
    tensors: Vec<FileTensor<'a>>,
}

impl<'a> Lister<'a> {
    /// All tensors of a checkpoint, in the order of the file. Embedding and head become `outer`.
    pub(super) fn list(
        architecture: &'a Architecture,
        blocks: &'a [BlockPlan],
        outer: TensorType,
    ) -> Vec<FileTensor<'a>> {
        let mut lister = Self { architecture, tensors: Vec::new() };
        let matrix = [architecture.vocabulary, architecture.hidden];
        lister.stored("token_embd.weight", EMBEDDING, &matrix, outer);
        let rope = architecture.common_rope();
        if let Some(divisors) = rope.and_then(|rope| rope.divisors(architecture.head_dim)) {
            let info = TensorInfo {
                name: "rope_freqs.weight".to_owned(),
                shape: vec![divisors.len()],
                kind: TensorType::F32,
            };
            lister.push(info, vec![Content::Made(divisors)], RowOrder::Source);
        }
        for (index, plan) in blocks.iter().enumerate() {
            lister.block(index, plan);
        }
        lister.stored("output_norm.weight", FINAL_NORM, &[architecture.hidden], TensorType::F32);
        if !architecture.tied {
            lister.stored("output.weight", architecture.head_name(), &matrix, outer);
        }
        lister.tensors
    }

    fn push(&mut self, info: TensorInfo, contents: Vec<Content<'a>>, order: RowOrder) {
        self.tensors.push(FileTensor { info, contents, order });
    }

    fn stored(&mut self, name: &str, stored: &str, shape: &[usize], kind: TensorType) {
        let info = TensorInfo { name: name.to_owned(), shape: shape.to_vec(), kind };
        let content = Content::Stored { name: stored.to_owned(), shape: shape.to_vec() };
        self.push(info, vec![content], RowOrder::Source);
    }

    /// Block `index`.
    fn block(&mut self, index: usize, plan: &'a [SitePlan]) {
        let architecture = self.architecture;
        let own = |name: &str| format!("blk.{index}.{name}.weight");
        let norms = architecture.norm_names(index);
        for (name, stored) in ["attn_norm", "ffn_norm"].into_iter().zip(norms) {
            self.stored(&own(name), &stored, &[architecture.hidden], TensorType::F32);
        }
        for (name, stored) in ["attn_q_norm", "attn_k_norm"]
            .into_iter()
            .zip(architecture.qk_norm_names(index).into_iter().flatten())
        {
            self.stored(&own(name), &stored, &[architecture.head_dim], TensorType::F32);
        }
        let router = architecture.router_name(index).zip(architecture.experts_of(index));
        if let Some((stored, experts)) = router {
            let shape = [experts.count, architecture.hidden];
            self.stored(&own("ffn_gate_inp"), &stored, &shape, TensorType::F32);
        }
        let sites = architecture.sites(index);
        // gate, up and down, of one MLP or of each expert.
        let mut mlp: [Vec<Member<'_, 'a>>; 3] = Default::default();
        for (own, site) in sites.iter().zip(plan) {
            for (at, (spec, plan)) in own.linears.iter().zip(&site.linears).enumerate() {
                let member = Member { spec, site, plan };
                match own.kind {
                    SiteKind::AttnIn => {
                        self.linear(index, ["attn_q", "attn_k", "attn_v"][at], member);
                    }
                    SiteKind::AttnOut => self.linear(index, "attn_output", member),
                    SiteKind::MlpIn => mlp[at % 2].push(member),
                    SiteKind::MlpAct => mlp[2].push(member),
                }
            }
        }
        let experts = architecture.experts_of(index).is_some();
        for (name, members) in ["ffn_gate", "ffn_up", "ffn_down"].into_iter().zip(mlp) {
            match &members[..] {
                [member] if !experts => self.linear(index, name, *member),
                members => self.experts(&own(&format!("{name}_exps")), members),
            }
        }
    }

    /// A linear with its bias, if it has one.
    fn linear(&mut self, block: usize, name: &str, member: Member<'_, 'a>) {
        let rotated = matches!(name, "attn_q" | "attn_k");
        let head_dim = self.architecture.head_dim;
        let order = match architecture_name(self.architecture) {
            Some("llama") if rotated => RowOrder::Pairs { head_dim },
            _ => RowOrder::Source,
        };
        let LinearSpec { rows, columns, .. } = *member.spec;
        let info = TensorInfo {
            name: format!("blk.{block}.{name}.weight"),
            shape: vec![rows, columns],
            kind: linear_type(member.plan),
        };
        self.push(info, vec![member.content()], order);
        if let Some(bias) = member.spec.bias() {
            let name = format!("blk.{block}.{name}.bias");
            let info = TensorInfo { name, shape: vec![rows], kind: TensorType::F32 };
            self.push(info, vec![Content::Stored { name: bias, shape: vec![rows] }], order);
        }
    }

    /// The same linear of every expert, as one tensor.
    fn experts(&mut self, name: &str, experts: &[Member<'_, 'a>]) {
        let Member { spec, plan, .. } = experts[0];
        let info = TensorInfo {
            name: name.to_owned(),
            shape: vec![experts.len(), spec.rows, spec.columns],
            kind: linear_type(plan),
        };
        let contents = experts.iter().map(Member::content).collect();
        self.push(info, contents, RowOrder::Source);
    }
}

impl<'a> Member<'_, 'a> {
    /// What its tensor is made of.
    fn content(&self) -> Content<'a> {
        let LinearSpec { rows, columns, .. } = *self.spec;
        match linear_type(self.plan) {
            TensorType::Q4_0 | TensorType::Q8_0 => Content::Linear(self.site, self.plan),
            _ => Content::Stored { name: self.spec.weight(), shape: vec![rows, columns] },
        }
    }
}

/// Whether rows of `columns` fill blocks.
pub(super) fn fills_blocks(columns: usize) -> bool {
    columns.is_multiple_of(BLOCK)
}
