/*! The CPU backend: f32 products and integer kernels whose results do not depend on the instruction
set or the number of threads. Its integer path is the specification of what a checkpoint means. */

pub mod attention;
mod drift;
pub mod elementwise;
mod factor;
pub mod gemm;
mod gemm_kernels;
pub mod gemm_pack;
mod gptq;
pub mod gram;
mod hessian;
pub mod integer;
pub mod isa;
pub mod quantize;
mod tensor;
mod weights;

use std::sync::Arc;

use rayon::prelude::*;

use super::{
    AttentionSpec, Backend, Damping, Drift, Matrix, Placement, Prediction, Unquantized,
    output_error,
};
use crate::checkpoint;
use crate::quant::linear::QuantizedLinear;
use crate::quant::rows::QuantizedRows;
use crate::quant::site::SiteFormat;
use crate::quant::weights::{dequantize, round_to_nearest};
use crate::{Error, Result};
use attention::{AttentionShape, placed_windows};
use gemm::{gemm, par_gemm};
use gemm_pack::{Panels, Rows};
use gram::gram_add;
pub use hessian::Hessian;
use integer::IntegerLinear;
use isa::Isa;
use tensor::Pool;
pub use tensor::Tensor;
use weights::arranged;

/// Rows that go to a thread at once.
const ROWS: usize = 64;
/// Values that go to a thread at once.
const CHUNK: usize = 1 << 15;

/// Rows that pass the output head together: its columns are read once for all of them.
const HEAD_ROWS: usize = 240;
/// Columns of the output head whose logits are made at once, so that they stay in L2.
const HEAD_COLUMNS: usize = 1024;

/// Rows whose whole logits a thread holds, twice, for their divergence.
const DIVERGENCE_ROWS: usize = 24;

/// `|x - y|^2 / |y|^2`.
fn row_change(x: &[f32], y: &[f32]) -> f64 {
    let (mut change, mut whole) = (0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        change += (f64::from(*x) - f64::from(*y)).powi(2);
        whole += f64::from(*y).powi(2);
    }
    if change == 0.0 { 0.0 } else { change / whole }
}

/// A token's cross entropy while the logits come in parts.
#[derive(Clone, Copy)]
struct Loss {
    /// `ln(sum(exp))` of the logits so far.
    log_sum: f64,
    /// The token's own logit.
    target: f64,
    /// The largest logit so far and the first token that has it.
    most: (f32, usize),
}

impl Default for Loss {
    fn default() -> Self {
        Self { log_sum: f64::NEG_INFINITY, target: f64::NAN, most: (f32::NEG_INFINITY, usize::MAX) }
    }
}

impl Loss {
    /// Takes in the `ln(sum(exp))` of the next part. A NaN stays one.
    fn add(&mut self, log_sum: f64) {
        let (former, next) = (self.log_sum, log_sum);
        self.log_sum = match former.partial_cmp(&next) {
            None => f64::NAN,
            _ if former == f64::NEG_INFINITY => next,
            Some(std::cmp::Ordering::Less) => next + (former - next).exp().ln_1p(),
            Some(_) => former + (next - former).exp().ln_1p(),
        };
    }

    /// Takes in the next logits, those of the tokens from `first` on.
    fn look(&mut self, logits: &[f32], first: usize) {
        // In lanes, so that no comparison waits for the one before.
        let mut lanes = [f32::NEG_INFINITY; 32];
        let (whole, rest) = logits.as_chunks::<32>();
        for logits in whole {
            for (lane, logit) in lanes.iter_mut().zip(logits) {
                *lane = if *logit > *lane { *logit } else { *lane };
            }
        }
        let most = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
        if most > self.most.0 {
            let at = logits.iter().position(|logit| *logit == most);
            self.most = (most, first + at.expect("the largest is one of them"));
        }
    }

    fn nats(&self) -> f64 {
        self.log_sum - self.target
    }
}

/// Hands freed memory back to the system.
fn hand_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it gives free pages back and changes nothing else.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Host memory and this machine's instruction set.
pub struct Cpu {
    isa: Isa,
    pool: Arc<Pool>,
}

impl Cpu {
    /// The best instruction set this machine has, or the one `ATOM_ISA` names.
    pub fn new() -> Result<Self> {
        Ok(Self::with_isa(Isa::detect()?))
    }

    /// A given instruction set, which must be available.
    pub fn with_isa(isa: Isa) -> Self {
        Self { isa, pool: Arc::default() }
    }

    /// `W += share (W C_in + C_out) H^-1`, arranged, with the factor of the damped Hessian.
    pub(crate) fn correct(&self, weights: &mut Matrix, drift: &Drift<Matrix>, factor: &[f32]) {
        drift::correct(self.isa, weights, drift, factor);
    }

    fn tensor(&self, rows: usize, columns: usize) -> Tensor {
        Tensor::unwritten(&self.pool, rows, columns)
    }

    /// The losses of `targets`, `(row of x, token)` each; with `MOST` the likeliest token is looked for too. The logits of a
    /// row are made once for all targets of it that follow one another.
    fn losses<const MOST: bool>(
        &self,
        x: &Tensor,
        head: &Panels,
        targets: &[(usize, usize)],
    ) -> Vec<Loss> {
        let (hidden, vocabulary) = (x.columns, head.n());
        let by_row: Vec<&[(usize, usize)]> = targets.chunk_by(|a, b| a.0 == b.0).collect();
        by_row
            .par_chunks(HEAD_ROWS)
            .map_init(
                || (vec![0f32; HEAD_ROWS * hidden], vec![0f32; HEAD_ROWS * HEAD_COLUMNS]),
                |(rows, logits), by_row| {
                    for (to, targets) in rows.chunks_mut(hidden).zip(by_row) {
                        to.copy_from_slice(&x.data[targets[0].0 * hidden..][..hidden]);
                    }
                    let rows = Rows::new(rows, by_row.len(), hidden);
                    let mut losses: Vec<Vec<Loss>> =
                        by_row.iter().map(|targets| vec![Loss::default(); targets.len()]).collect();
                    for first in (0..vocabulary).step_by(HEAD_COLUMNS) {
                        let columns = first..(first + HEAD_COLUMNS).min(vocabulary);
                        let width = columns.len();
                        let part = head.part(columns.clone(), 0..hidden);
                        gemm(self.isa, rows, part, logits, width, false);
                        for ((losses, logits), targets) in
                            losses.iter_mut().zip(logits.chunks(width)).zip(by_row)
                        {
                            losses[0].add(elementwise::log_sum_exp(self.isa, logits));
                            if MOST {
                                losses[0].look(logits, first);
                            }
                            for (loss, (_, token)) in losses.iter_mut().zip(*targets) {
                                if columns.contains(token) {
                                    loss.target = f64::from(logits[token - first]);
                                }
                            }
                        }
                    }
                    let of_row = |losses: Vec<Loss>| {
                        let all = losses[0];
                        losses.into_iter().map(move |loss| Loss { target: loss.target, ..all })
                    };
                    losses.into_iter().flat_map(of_row).collect::<Vec<Loss>>()
                },
            )
            .flatten()
            .collect()
    }
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Rows = QuantizedRows;
    type Weight<'a> = checkpoint::Tensor<'a>;
    type Dense = Panels;
    type Quantized = QuantizedLinear;
    type Packed = IntegerLinear;
    type Site = SiteFormat;
    type Hessian = Hessian;
    type Cross = Matrix;
    type Factor = Vec<f32>;

    const HALF: bool = false;

    fn device(&self) -> String {
        let threads = rayon::current_num_threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu ({}, {threads} thread{plural})", self.isa.name())
    }

    fn batch_bytes(&self) -> usize {
        (64 << 20) + rayon::current_num_threads() * (24 << 20)
    }

    fn stream_bytes(&self) -> usize {
        1 << 30
    }

    fn rows(&self, tensor: &Tensor) -> usize {
        tensor.rows
    }

    fn upload(&self, matrix: Matrix) -> Result<Tensor> {
        Ok(Tensor::from_matrix(matrix))
    }

    fn upload_activation(&self, matrix: Matrix) -> Result<Tensor> {
        self.upload(matrix)
    }

    fn download(&self, tensor: &Tensor) -> Result<Matrix> {
        let Tensor { rows, columns, .. } = *tensor;
        Ok(Matrix { rows, columns, data: tensor.values().to_vec() })
    }

    fn select_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        let n = x.columns;
        let mut y = self.tensor(rows.len(), n);
        y.data.par_chunks_mut(n * ROWS).zip(rows.par_chunks(ROWS)).for_each(|(y, rows)| {
            for (y, &row) in y.chunks_mut(n).zip(rows) {
                y.copy_from_slice(&x.data[row as usize * n..][..n]);
            }
        });
        Ok(y)
    }

    fn duplicate(&self, tensor: &Tensor) -> Result<Tensor> {
        let mut copy = self.tensor(tensor.rows, tensor.columns);
        copy.data.copy_from_slice(&tensor.data);
        Ok(copy)
    }

    fn load<'a>(&self, tensor: checkpoint::Tensor<'a>) -> Result<checkpoint::Tensor<'a>> {
        Ok(tensor)
    }

    fn embed(&self, table: &checkpoint::Tensor<'_>, tokens: &[u32]) -> Result<Tensor> {
        let columns = table.shape[1];
        let mut data = vec![0.0; tokens.len() * columns];
        data.par_chunks_mut(columns).zip(tokens).try_for_each(|(row, &token)| {
            let token = token as usize;
            row.copy_from_slice(&table.rows_f32(token..token + 1)?);
            Ok::<(), Error>(())
        })?;
        table.release();
        Ok(Tensor::from_matrix(Matrix { rows: tokens.len(), columns, data }))
    }

    fn dense(&self, weight: &checkpoint::Tensor<'_>, site: Option<&SiteFormat>) -> Result<Panels> {
        weights::panels(weight, site)
    }

    fn dense_of(&self, weight: &QuantizedLinear) -> Result<Panels> {
        Ok(Panels::from_rows(&dequantize(weight), weight.rows, weight.format.row.width()))
    }

    fn packed(
        &self,
        weight: &QuantizedLinear,
        _feeds: Option<&SiteFormat>,
    ) -> Result<IntegerLinear> {
        Ok(IntegerLinear::new(weight))
    }

    fn site(&self, format: &SiteFormat) -> Result<SiteFormat> {
        Ok(format.clone())
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, epsilon: f32) -> Result<Tensor> {
        let mut y = self.tensor(x.rows, x.columns);
        let n = x.columns;
        y.data.par_chunks_mut(n * ROWS).zip(x.data.par_chunks(n * ROWS)).for_each(|(y, x)| {
            for (y, x) in y.chunks_mut(n).zip(x.chunks(n)) {
                elementwise::rms_norm(self.isa, x, &weight.data, epsilon, y);
            }
        });
        Ok(y)
    }

    fn arrange(&self, x: &Tensor, site: &SiteFormat) -> Result<Tensor> {
        let mut y = self.tensor(x.rows, site.width());
        quantize::arrange_rows(self.isa, &x.data, x.rows, site, &mut y.data);
        Ok(y)
    }

    fn quantize(&self, x: &Tensor, site: &SiteFormat, name: &str) -> Result<QuantizedRows> {
        quantize::quantize_rows(self.isa, &x.data, x.rows, site)
            .map_err(|error| error.context(format!("activations of {name}")))
    }

    fn fetch_rows(&self, x: &QuantizedRows) -> Result<QuantizedRows> {
        Ok(x.clone())
    }

    fn restore_rows(&self, x: &QuantizedRows) -> Result<QuantizedRows> {
        Ok(x.clone())
    }

    fn dequantize(&self, x: &QuantizedRows) -> Result<Tensor> {
        let mut y = self.tensor(x.tokens, x.format.width());
        quantize::dequantize_rows(self.isa, x, &mut y.data);
        Ok(y)
    }

    fn product(&self, x: &Tensor, weight: &Panels) -> Result<Tensor> {
        let mut y = self.tensor(x.rows, weight.n());
        let rows = Rows::new(&x.data, x.rows, x.columns);
        par_gemm(self.isa, rows, weight, &mut y.data, weight.n(), false);
        Ok(y)
    }

    fn integer_product(&self, x: &QuantizedRows, weight: &IntegerLinear) -> Result<Tensor> {
        let mut y = self.tensor(x.tokens, weight.rows());
        integer::linear(self.isa, x, weight, &mut y.data);
        Ok(y)
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        x.data.par_chunks_mut(CHUNK).zip(y.data.par_chunks(CHUNK)).for_each(|(x, y)| {
            for (x, y) in x.iter_mut().zip(y) {
                *x += y;
            }
        });
        Ok(())
    }

    fn add_bias(&self, y: &mut Tensor, bias: &Tensor) -> Result<()> {
        y.data.par_chunks_mut(bias.columns).for_each(|row| {
            for (y, bias) in row.iter_mut().zip(bias.data.iter()) {
                *y += bias;
            }
        });
        Ok(())
    }

    fn head_norm(&self, x: &mut Tensor, weight: &Tensor, epsilon: f32) -> Result<()> {
        x.data.par_chunks_mut(x.columns).for_each(|row| {
            let mut normed = vec![0.0; weight.columns];
            for head in row.chunks_mut(weight.columns) {
                elementwise::rms_norm(self.isa, head, &weight.data, epsilon, &mut normed);
                head.copy_from_slice(&normed);
            }
        });
        Ok(())
    }

    fn scale_rows(&self, x: &mut Tensor, weights: &[f32]) -> Result<()> {
        x.data.par_chunks_mut(x.columns).zip(weights).for_each(|(row, weight)| {
            row.iter_mut().for_each(|value| *value *= weight);
        });
        Ok(())
    }

    fn add_rows(&self, x: &mut Tensor, y: &Tensor, rows: &[u32], weights: &[f32]) -> Result<()> {
        let n = x.columns;
        for ((row, weight), y) in rows.iter().zip(weights).zip(y.data.chunks(n)) {
            for (x, y) in x.data[*row as usize * n..][..n].iter_mut().zip(y) {
                *x += weight * y;
            }
        }
        Ok(())
    }

    fn silu_mul(&self, mut gate: Tensor, up: &Tensor) -> Result<Tensor> {
        gate.data
            .par_chunks_mut(CHUNK)
            .zip(up.data.par_chunks(CHUNK))
            .for_each(|(gate, up)| elementwise::silu_mul(self.isa, gate, up));
        Ok(gate)
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        key_mean: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut out = self.tensor(q.rows, q.columns);
        attention::attention(
            self.isa,
            AttentionShape::of(spec),
            &spec.kv,
            &spec.cos,
            &spec.sin,
            &q.data,
            &k.data,
            &v.data,
            key_mean.map(|mean| &mean.data[..]),
            &mut out.data,
        );
        Ok(out)
    }

    fn placed_attention(
        &self,
        spec: &AttentionSpec,
        placement: &Placement,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mean: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut out = self.tensor(q.rows, q.columns);
        attention::attention_of(
            self.isa,
            AttentionShape::of(spec),
            &placed_windows(placement, spec.seq_len),
            &spec.kv,
            &spec.cos,
            &spec.sin,
            &q.data,
            &k.data,
            &v.data,
            key_mean.map(|mean| &mean.data[..]),
            &mut out.data,
        );
        Ok(out)
    }

    fn add_keys(&self, spec: &AttentionSpec, k: &Tensor, sums: &mut [f64]) -> Result<()> {
        attention::add_keys(self.isa, spec, &k.data, sums);
        Ok(())
    }

    fn cross_entropy(
        &self,
        x: &Tensor,
        head: &Panels,
        tokens: &[u32],
        seq_len: usize,
    ) -> Result<Vec<f64>> {
        // The row that predicts token t of a window is t - 1; a window's last row predicts nothing.
        let targets: Vec<(usize, usize)> = (0..tokens.len())
            .filter(|token| token % seq_len != 0)
            .map(|token| (token - 1, tokens[token] as usize))
            .collect();
        Ok(self.losses::<false>(x, head, &targets).iter().map(Loss::nats).collect())
    }

    fn predict(&self, x: &Tensor, head: &Panels, tokens: &[u32]) -> Result<Vec<Prediction>> {
        let targets: Vec<(u32, u32)> = (0..).zip(tokens.iter().copied()).collect();
        self.predict_each(x, head, &targets)
    }

    fn predict_each(
        &self,
        x: &Tensor,
        head: &Panels,
        targets: &[(u32, u32)],
    ) -> Result<Vec<Prediction>> {
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|target| targets[*target].0);
        let sorted = order.iter().map(|target| targets[*target]);
        let sorted: Vec<_> = sorted.map(|(row, token)| (row as usize, token as usize)).collect();
        let mut predictions = vec![Prediction { nats: f64::NAN, greedy: false }; targets.len()];
        let losses = self.losses::<true>(x, head, &sorted);
        for ((target, (_, token)), loss) in order.into_iter().zip(sorted).zip(losses) {
            predictions[target] = Prediction { nats: loss.nats(), greedy: loss.most.1 == token };
        }
        Ok(predictions)
    }

    fn row_changes(&self, x: &Tensor, original: &Tensor) -> Result<Vec<f64>> {
        let rows = x.data.par_chunks(x.columns).zip(original.data.par_chunks(x.columns));
        Ok(rows.map(|(x, y)| row_change(x, y)).collect())
    }

    fn divergence(&self, x: &Tensor, original: &Tensor, head: &Panels) -> Result<Vec<f64>> {
        let (hidden, vocabulary) = (x.columns, head.n());
        let part = DIVERGENCE_ROWS * hidden;
        let parts = x.data.par_chunks(part).zip(original.data.par_chunks(part));
        let divergences = parts
            .map_init(
                || {
                    [
                        vec![0f32; DIVERGENCE_ROWS * vocabulary],
                        vec![0f32; DIVERGENCE_ROWS * vocabulary],
                    ]
                },
                |[changed, logits], (x, original)| {
                    let rows = x.len() / hidden;
                    for (x, logits) in [(x, &mut *changed), (original, &mut *logits)] {
                        let rows = Rows::new(x, rows, hidden);
                        let all = head.part(0..vocabulary, 0..hidden);
                        gemm(self.isa, rows, all, logits, vocabulary, false);
                    }
                    let rows = changed.chunks(vocabulary).zip(logits.chunks(vocabulary)).take(rows);
                    rows.map(|(x, y)| elementwise::divergence(self.isa, x, y)).collect::<Vec<f64>>()
                },
            )
            .flatten()
            .collect();
        Ok(divergences)
    }

    fn add_energy(&self, x: &Tensor, energy: &mut [f64]) -> Result<()> {
        // Columns in parallel and tokens in order, so that no sum depends on threads or batches.
        energy.par_chunks_mut(ROWS).enumerate().for_each(|(chunk, energy)| {
            for row in x.data.chunks(x.columns) {
                for (energy, &x) in energy.iter_mut().zip(&row[chunk * ROWS..]) {
                    *energy += f64::from(x) * f64::from(x);
                }
            }
        });
        Ok(())
    }

    fn hessian(&self, channels: usize) -> Result<Hessian> {
        Ok(Hessian { n: channels, lower: vec![0.0; channels * channels] })
    }

    fn add_to_hessian(&self, hessian: &mut Hessian, x: &Tensor) -> Result<()> {
        gram_add(self.isa, &x.data, x.rows, x.columns, &mut hessian.lower);
        Ok(())
    }

    fn factor(&self, hessian: &mut Hessian, damping: f32) -> Result<Option<(Vec<f32>, Damping)>> {
        // What the site before left must not take memory next to a second matrix of this size.
        hand_back();
        Ok(factor::factor(&mut hessian.lower, hessian.n, damping))
    }

    fn difference(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let mut difference = self.duplicate(x)?;
        difference.data.par_chunks_mut(CHUNK).zip(y.data.par_chunks(CHUNK)).for_each(|(x, y)| {
            for (x, y) in x.iter_mut().zip(y) {
                *x -= y;
            }
        });
        Ok(difference)
    }

    fn cross(&self, rows: usize, columns: usize) -> Result<Matrix> {
        Ok(Matrix { rows, columns, data: vec![0.0; rows * columns] })
    }

    fn add_to_cross(&self, cross: &mut Matrix, y: &Tensor, x: &Tensor) -> Result<()> {
        drift::add(self.isa, cross, &y.data, &x.data, x.rows);
        Ok(())
    }

    fn gptq(
        &self,
        linears: &[Unquantized<checkpoint::Tensor<'_>>],
        site: &SiteFormat,
        hessian: &Hessian,
        factor: &Vec<f32>,
        drift: Option<&Drift<Matrix>>,
    ) -> Result<Vec<(QuantizedLinear, f64)>> {
        let sweep = |linear: &Unquantized<checkpoint::Tensor<'_>>| {
            let mut weights = arranged(linear.weight, site)?;
            let total = hessian.energy(self.isa, &weights.data);
            if let Some(drift) = drift {
                self.correct(&mut weights, drift, factor);
            }
            let quantized =
                gptq::sweep(self.isa, weights.clone(), &linear.format, linear.clip, factor)
                    .map_err(|error| error.context(format!("weights of {}", linear.name)))?;
            let error = weights::difference(&quantized, &weights);
            let lost = hessian.energy(self.isa, &error);
            Ok((quantized, output_error(lost, total)?))
        };
        linears.iter().map(sweep).collect()
    }

    fn round(
        &self,
        linear: &Unquantized<checkpoint::Tensor<'_>>,
        site: &SiteFormat,
    ) -> Result<QuantizedLinear> {
        let weights = arranged(linear.weight, site)?;
        round_to_nearest(&weights.data, weights.rows, &linear.format, linear.clip)
            .map_err(|error| error.context(format!("weights of {}", linear.name)))
    }

    fn output_error(
        &self,
        hessian: &Hessian,
        site: &SiteFormat,
        weight: &checkpoint::Tensor<'_>,
        quantized: &QuantizedLinear,
    ) -> Result<f64> {
        let original = arranged(weight, site)?;
        let error = weights::difference(quantized, &original);
        let [lost, total] =
            [&error, &original.data].map(|weights| hessian.energy(self.isa, weights));
        output_error(lost, total)
    }

    fn energy_error(
        &self,
        energy: &[f64],
        site: &SiteFormat,
        weight: &checkpoint::Tensor<'_>,
        quantized: &QuantizedLinear,
    ) -> Result<f64> {
        Ok(weights::energy_error(&arranged(weight, site)?, quantized, site, energy))
    }

    fn fetch(&self, weight: QuantizedLinear) -> Result<QuantizedLinear> {
        Ok(weight)
    }

    fn restore(&self, weight: QuantizedLinear) -> Result<QuantizedLinear> {
        Ok(weight)
    }

    fn trim(&self) {
        self.pool.clear();
        // The allocator would keep up to 256 MB of it next to Hessians, which have maps of their own.
        hand_back();
    }
}
