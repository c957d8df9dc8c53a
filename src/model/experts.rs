/*! Routing: which experts compute a token, and with which weights. */

use crate::Result;
use crate::backend::{Forward, Matrix};

/// Chooses the experts of each token. It is unquantized and reads the normed hidden states in full precision.
pub struct Router<B: Forward> {
    /// `[experts, hidden]`.
    pub weight: B::Dense,
    /// Experts of a token.
    pub per_token: usize,
    /// Whether the routing weights of a token are divided by their sum.
    pub normalized: bool,
}

/// The tokens of one expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutedTokens {
    /// Rows of the hidden states, ascending.
    pub tokens: Vec<u32>,
    /// Routing weight of each: the factor of the expert's output.
    pub weights: Vec<f32>,
}

impl RoutedTokens {
    /// Whether no token is routed to the expert.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

impl<B: Forward> Router<B> {
    /// The tokens of every expert, for normed hidden states `[tokens, hidden]`.
    pub fn route(&self, backend: &B, normed: &B::Activation) -> Result<Vec<RoutedTokens>> {
        let logits = backend.download_activation(&backend.product(normed, &self.weight)?)?;
        Ok(routed(&logits, self.per_token, self.normalized))
    }
}

/// Routes each token to the `per_token` experts of greatest probability (softmax over all of them), of equals the first.
/// The probabilities are the routing weights, with `normalized` divided by their sum (MixtralSparseMoeBlock and
/// Qwen3MoeSparseMoeBlock of transformers).
fn routed(logits: &Matrix, per_token: usize, normalized: bool) -> Vec<RoutedTokens> {
    let experts = logits.columns;
    let mut routed = vec![RoutedTokens::default(); experts];
    let mut chosen: Vec<usize> = Vec::with_capacity(experts);
    for (token, logits) in logits.data.chunks(experts.max(1)).enumerate() {
        chosen.clear();
        chosen.extend(0..experts);
        chosen.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        let greatest = logits[chosen[0]];
        let exponentials = |expert: &usize| (logits[*expert] - greatest).exp();
        let counted = if normalized { &chosen[..per_token] } else { &chosen[..] };
        let sum: f32 = counted.iter().map(exponentials).sum();
        for expert in &chosen[..per_token] {
            routed[*expert].tokens.push(token as u32);
            routed[*expert].weights.push(exponentials(expert) / sum);
        }
    }
    routed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_go_to_the_most_probable_experts() {
        let data = vec![0.0, 2.0, 1.0, -1.0, 3.0, 3.0, 3.0, 0.0];
        let logits = Matrix { rows: 2, columns: 4, data };
        let close = |found: &[f32], expected: &[f64]| {
            let pairs = found.iter().zip(expected);
            found.len() == expected.len()
                && pairs.into_iter().all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6)
        };
        let e = 1f64.exp();
        let found = routed(&logits, 2, true);
        assert_eq!(found[0].tokens, [1]);
        assert_eq!(found[1].tokens, [0, 1]);
        assert_eq!(found[2].tokens, [0]);
        assert!(found[3].is_empty());
        assert!(close(&found[1].weights, &[e / (e + 1.0), 0.5]));
        assert!(close(&found[2].weights, &[1.0 / (e + 1.0)]));
        // Without normalization the weights are probabilities among all experts.
        let all = 1.0 + e * e + e + (-1f64).exp();
        let found = routed(&logits, 2, false);
        assert!(close(&found[2].weights, &[e / all]));
        assert!(close(&found[0].weights, &[1.0 / (3.0 + (-3f64).exp())]));
    }
}
