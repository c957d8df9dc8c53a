/*! The weights of one block, loaded once and used by every stage. */

use super::tensors::{expect, norm_weight};
use crate::backend::{Backend, Matrix};
use crate::checkpoint::Tensors;
use crate::model::Architecture;
use crate::model::sites::LinearSpec;
use crate::{Error, Result};

/// A block's unquantized weights on a backend.
pub struct BlockWeights<'a, B: Backend> {
    /// The block's number.
    pub index: usize,
    /// RMSNorm's weights before attention and before the MLP, if there are such norms.
    pub(super) norms_before: Option<[Matrix; 2]>,
    /// Those after attention and after the MLP.
    pub(super) norms_after: Option<[Matrix; 2]>,
    /// QK-norm's weights, if the network has them.
    pub(super) qk_norm: Option<[Matrix; 2]>,
    /// The router's weight, if the block has experts.
    pub(super) router: Option<B::Weight<'a>>,
    /// What is added to the router's scores to choose experts.
    pub(super) router_bias: Option<Vec<f32>>,
    /// The weight of the shared expert's gate, if it has one.
    pub(super) shared_gate: Option<B::Weight<'a>>,
    /// The weights of each site's linears; none for a linear that was not loaded.
    pub sites: Vec<Vec<Option<B::Weight<'a>>>>,
    /// The bias of each, if it has one.
    pub(super) biases: Vec<Vec<Option<Matrix>>>,
}

impl<'a, B: Backend> BlockWeights<'a, B> {
    /// Loads all of block `index`.
    pub fn load_all(
        backend: &B,
        tensors: &'a dyn Tensors,
        architecture: &Architecture,
        index: usize,
    ) -> Result<Self> {
        Self::load(backend, tensors, architecture, index, |_, _| true)
    }

    /// Loads block `index` with those linears for which `wanted(site, linear)` is true.
    pub fn load(
        backend: &B,
        tensors: &'a dyn Tensors,
        architecture: &Architecture,
        index: usize,
        wanted: impl Fn(usize, usize) -> bool,
    ) -> Result<Self> {
        let hidden = architecture.hidden;
        let row = |name: &str, columns: usize| {
            let data = expect(tensors, name, &[columns])?.to_f32()?;
            Ok::<_, Error>(Matrix { rows: 1, columns, data })
        };
        let norm = |name: &str, columns: usize| {
            let data = norm_weight(tensors, architecture, name, columns)?;
            Ok::<_, Error>(Matrix { rows: 1, columns, data })
        };
        let pair = |names: Option<[String; 2]>, [of_first, of_second]: [usize; 2]| {
            let pair = |[first, second]: [String; 2]| {
                Ok::<_, Error>([norm(&first, of_first)?, norm(&second, of_second)?])
            };
            names.map(pair).transpose()
        };
        let norms_before = pair(architecture.norms_before(index), [hidden; 2])?;
        let norms_after = pair(architecture.norms_after(index), [hidden; 2])?;
        let qk_norm = pair(architecture.qk_norm_names(index), architecture.qk_norm_lengths())?;
        let router = match (architecture.router_name(index), architecture.experts_of(index)) {
            (Some(name), Some(experts)) => {
                Some(backend.load(expect(tensors, &name, &[experts.count, hidden])?)?)
            }
            _ => None,
        };
        let shared_gate = architecture.shared_gate_name(index);
        let shared_gate =
            shared_gate.map(|name| backend.load(expect(tensors, &name, &[1, hidden])?));
        let shared_gate = shared_gate.transpose()?;
        let router_bias =
            match (architecture.router_bias_name(index), architecture.experts_of(index)) {
                (Some(name), Some(experts)) => Some(row(&name, experts.count)?.data),
                _ => None,
            };
        let (mut sites, mut biases) = (Vec::new(), Vec::new());
        for (at, spec) in architecture.sites(index).iter().enumerate() {
            let weight = |(linear, spec): (usize, &LinearSpec)| {
                let shape = [spec.rows, spec.columns];
                let load = || backend.load(expect(tensors, &spec.weight(), &shape)?);
                wanted(at, linear).then(load).transpose()
            };
            let weights = spec.linears.iter().enumerate().map(weight);
            sites.push(weights.collect::<Result<_>>()?);
            let bias =
                |spec: &LinearSpec| spec.bias().map(|name| row(&name, spec.rows)).transpose();
            biases.push(spec.linears.iter().map(bias).collect::<Result<_>>()?);
        }
        Ok(Self {
            index,
            norms_before,
            norms_after,
            qk_norm,
            router,
            router_bias,
            shared_gate,
            sites,
            biases,
        })
    }

    /// The weights of the norms before attention and before the MLP, and of QK-norm.
    pub(super) fn norm_values(&self) -> ([Vec<f32>; 2], Option<[Vec<f32>; 2]>) {
        let data = |norms: &[Matrix; 2]| norms.each_ref().map(|norm| norm.data.clone());
        let before = self.norms_before.as_ref().map(data);
        let before = before.expect("a network that is trained has norms before both");
        (before, self.qk_norm.as_ref().map(data))
    }

    /// Gives the norms other weights, of the same lengths.
    pub(super) fn set_norms(&mut self, norms: &[Vec<f32>; 2], qk_norms: Option<&[Vec<f32>; 2]>) {
        let set = |to: &mut [Matrix; 2], from: &[Vec<f32>; 2]| {
            for (to, from) in to.iter_mut().zip(from) {
                to.data.copy_from_slice(from);
            }
        };
        if let Some(to) = &mut self.norms_before {
            set(to, norms);
        }
        if let (Some(to), Some(from)) = (&mut self.qk_norm, qk_norms) {
            set(to, from);
        }
    }

    /// The biases of a site's linears on the backend.
    pub(super) fn biases(&self, backend: &B, site: usize) -> Result<Vec<Option<B::Hidden>>> {
        let biases = self.biases[site].iter();
        biases.map(|bias| bias.clone().map(|bias| backend.upload(bias)).transpose()).collect()
    }

    /// The weight of a linear that was loaded.
    pub(super) fn weight(&self, site: usize, linear: usize) -> &B::Weight<'a> {
        self.sites[site][linear].as_ref().expect("a linear that is used was loaded")
    }
}
