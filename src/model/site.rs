/*! A site on a backend: its activation, treated as the plan says, and the products of its linears. */

use super::block::{Observer, Seen};
use crate::Result;
use crate::backend::Forward;

/// A linear on a backend.
pub enum Linear<B: Forward> {
    /// Full precision, `[out, in]`; permuted where the site has an order.
    Dense(B::Dense),
    /// Quantized, on the integer path.
    Packed(B::Packed),
}

/// How a site's activation is treated before its linears read it.
pub enum Treatment<B: Forward> {
    /// Unchanged: full precision, in the source's channel order.
    Source,
    /// Permuted, transformed and left in floating point.
    Permuted(B::Site),
    /// Permuted, transformed and quantized.
    Quantized(B::Site),
}

/// What becomes of the output of o or down before it is added to the residual stream.
pub struct Leaving<B: Forward> {
    /// RMSNorm, if there is one.
    pub norm: Option<B::Hidden>,
    /// RMSNorm's epsilon.
    pub epsilon: f32,
    /// Its factor after the norm.
    pub factor: f32,
}

impl<B: Forward> Leaving<B> {
    /// Nothing.
    pub fn unchanged() -> Self {
        Self { norm: None, epsilon: 0.0, factor: 1.0 }
    }

    fn is_unchanged(&self) -> bool {
        self.norm.is_none() && self.factor == 1.0
    }
}

/// A site of a block with the linears it feeds.
pub struct Site<B: Forward> {
    /// Its number in the block.
    pub at: usize,
    /// Its full name, for errors.
    pub name: String,
    /// How the activation is treated.
    pub treatment: Treatment<B>,
    /// q, k, v; or o; or gate, up, of every expert; or down.
    pub linears: Vec<Linear<B>>,
    /// The bias of each linear that has one, `[1, rows]`.
    pub biases: Vec<Option<B::Hidden>>,
    /// What becomes of its output, where that is added to the residual stream.
    pub leaving: Leaving<B>,
}

/// An activation as the linears of its site read it.
pub enum Input<B: Forward> {
    /// In floating point.
    Float(B::Activation),
    /// Quantized.
    Rows(B::Rows),
}

impl<B: Forward> Site<B> {
    /// The outputs of the site's linears.
    pub(super) fn outputs<const N: usize>(
        &self,
        backend: &B,
        input: &Input<B>,
    ) -> Result<[B::Activation; N]> {
        let packed = self.linears.iter().map(|linear| match linear {
            Linear::Packed(weight) => Some(weight),
            Linear::Dense(_) => None,
        });
        let outputs = match (packed.collect::<Option<Vec<_>>>(), input) {
            (Some(weights), Input::Rows(x)) => {
                let mut outputs = backend.integer_products(x, &weights)?;
                for (y, bias) in outputs.iter_mut().zip(&self.biases) {
                    if let Some(bias) = bias {
                        backend.add_bias(y, bias)?;
                    }
                }
                outputs
            }
            _ => {
                let linears = 0..self.linears.len();
                linears.map(|linear| self.output(backend, input, linear)).collect::<Result<_>>()?
            }
        };
        Ok(outputs.try_into().ok().expect("a site is built with the linears of its kind"))
    }

    /// The output of one of its linears.
    pub(super) fn output(
        &self,
        backend: &B,
        input: &Input<B>,
        linear: usize,
    ) -> Result<B::Activation> {
        let mut y = match (&self.linears[linear], input) {
            (Linear::Dense(weight), Input::Float(x)) => backend.product(x, weight),
            (Linear::Packed(weight), Input::Rows(x)) => backend.integer_product(x, weight),
            (Linear::Dense(weight), Input::Rows(x)) => {
                backend.product(&backend.dequantize(x)?, weight)
            }
            (Linear::Packed(_), Input::Float(_)) => {
                unreachable!("packed linears are only built for quantized sites")
            }
        }?;
        if let Some(bias) = &self.biases[linear] {
            backend.add_bias(&mut y, bias)?;
        }
        Ok(y)
    }

    /// Adds the output of the site's one linear for the activation `x` to the residual stream.
    pub fn apply_onto(
        &self,
        backend: &B,
        x: B::Activation,
        stream: &mut B::Hidden,
        observer: &mut Observer<B>,
    ) -> Result<()> {
        let input = self.input(backend, x, observer)?;
        self.add_onto(backend, &input, stream)
    }

    /// Adds the output of the site's one linear to the residual stream.
    pub fn add_onto(&self, backend: &B, input: &Input<B>, stream: &mut B::Hidden) -> Result<()> {
        let unchanged = self.leaving.is_unchanged();
        match (&self.linears[..], &self.biases[..], input) {
            ([Linear::Dense(weight)], [None], Input::Float(x)) if unchanged => {
                backend.add_product(stream, x, weight)
            }
            ([Linear::Packed(weight)], [None], Input::Rows(x)) if unchanged => {
                backend.add_integer_product(stream, x, weight)
            }
            ([Linear::Dense(weight)], [None], Input::Rows(x)) if unchanged => {
                backend.add_product(stream, &backend.dequantize(x)?, weight)
            }
            _ => {
                let [mut output] = self.outputs(backend, input)?;
                let Leaving { norm, epsilon, factor } = &self.leaving;
                if let Some(norm) = norm {
                    backend.norm_in_place(&mut output, norm, *epsilon)?;
                }
                backend.add(stream, &output, *factor)
            }
        }
    }

    /// The product of the site's one linear, which is dense, without a bias.
    pub fn dense_product(&self, backend: &B, x: &B::Activation) -> Result<B::Activation> {
        match &self.linears[..] {
            [Linear::Dense(weight)] => backend.product(x, weight),
            _ => unreachable!("the site has one linear, which is dense"),
        }
    }

    /// Its order and format on the backend.
    ///
    /// # Panics
    /// If it has none.
    pub fn order(&self) -> &B::Site {
        match &self.treatment {
            Treatment::Source => unreachable!("only sites with a format are quantized"),
            Treatment::Permuted(site) | Treatment::Quantized(site) => site,
        }
    }

    /// The activation `x`, which is kept, as the linears of a site with a format read it: codes, where it is quantized.
    pub(super) fn read(&self, backend: &B, x: &B::Activation) -> Result<Input<B>> {
        match &self.treatment {
            Treatment::Source => unreachable!("only sites with a format are quantized"),
            Treatment::Permuted(site) => Ok(Input::Float(backend.permute(x, site)?)),
            Treatment::Quantized(site) => Ok(Input::Rows(backend.quantize(x, site, &self.name)?)),
        }
    }

    /// Its order, if its activation is quantized, all its linears are packed and nobody observes the activation. A backend
    /// may then fuse the quantization with the operation before it.
    pub(super) fn fusible_order(&self, observer: &Observer<B>) -> Option<&B::Site> {
        let packed = self.linears.iter().all(|linear| matches!(linear, Linear::Packed(_)));
        match &self.treatment {
            Treatment::Quantized(site) if packed && observer.is_none() => Some(site),
            _ => None,
        }
    }

    /// The activation `x` as the linears read it.
    pub(super) fn input(
        &self,
        backend: &B,
        x: B::Activation,
        observer: &mut Observer<B>,
    ) -> Result<Input<B>> {
        observer.see(Seen::Entering(self.at), &x)?;
        let float = match &self.treatment {
            Treatment::Source => x,
            Treatment::Permuted(site) => backend.permute(&x, site)?,
            Treatment::Quantized(site) => {
                let rows = backend.quantize(&x, site, &self.name)?;
                drop(x);
                if self.linears.iter().any(|linear| matches!(linear, Linear::Packed(_))) {
                    return Ok(Input::Rows(rows));
                }
                backend.dequantize(&rows)?
            }
        };
        observer.see(Seen::Site(self.at), &float)?;
        Ok(Input::Float(float))
    }
}
