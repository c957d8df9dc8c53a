//! What a network's hidden states say, and what verification looks at.

use super::Forward;
use crate::Result;
use crate::quant::rows::QuantizedRows;

/// What a row of hidden states predicts of one token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// The token's negative log likelihood, in nats.
    pub nats: f64,
    /// Whether the token is the argmax; of equal ones the first counts.
    pub argmax: bool,
}

/// What a site's codes are made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Producer {
    /// A norm.
    Norm,
    /// SiLU of gate, times up.
    Silu,
}

/// Measurements of a network.
pub trait Measurement: Forward {
    /// Negative log likelihoods: for each window of `seq_len` rows, of tokens 1.. given the rows
    /// before them, in nats, `[windows * (seq_len - 1)]`.
    fn cross_entropy(
        &self,
        x: &Self::Activation,
        head: &Self::Dense,
        tokens: &[u32],
        seq_len: usize,
    ) -> Result<Vec<f64>>;
    /// What rows of `x`, normed hidden states, predict of tokens: of each of `targets`, `(row of x, token)`.
    fn predict(
        &self,
        x: &Self::Activation,
        head: &Self::Dense,
        targets: &[(u32, u32)],
    ) -> Result<Vec<Prediction>>;
    /// `|x - y|^2 / |y|^2` of each row, with `y` the row of `original`; 0 for a row of zeros that still is one.
    fn relative_squared_error(&self, x: &Self::Hidden, original: &Self::Hidden)
    -> Result<Vec<f64>>;
    /// Kullback-Leibler divergence in nats of each row's distribution over the vocabulary, `x head^T`,
    /// from that of `original`: what a token costs on average if it is drawn by `original`'s. Both are
    /// normed hidden states.
    fn kl_divergence(
        &self,
        x: &Self::Activation,
        original: &Self::Activation,
        head: &Self::Dense,
    ) -> Result<Vec<f64>>;

    /// Whether the codes of `tokens` rows are made in one step with what produces them, without rounding in between. They
    /// are the CPU's then.
    fn fuses(&self, _producer: Producer, _site: &Self::Site, _tokens: usize) -> bool {
        false
    }
    /// Quantized activations on the host, in neutral form.
    fn fetch_rows(&self, x: &Self::Rows) -> Result<QuantizedRows>;
    /// Undoes [`fetch_rows`](Self::fetch_rows).
    fn restore_rows(&self, x: &QuantizedRows) -> Result<Self::Rows>;
}
