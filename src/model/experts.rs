/*! Which experts a token goes to. */

use crate::Result;
use crate::backend::{Forward, Matrix};

/// Chooses the experts of each token. It stays in full precision and sees the normed hidden states as they are.
pub struct Router<B: Forward> {
    /// `[experts, hidden]`.
    pub weight: B::Dense,
    /// Experts of a token.
    pub per_token: usize,
    /// Whether their shares are made to add up to one.
    pub normalized: bool,
}

/// The tokens of an expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Share {
    /// Rows of the hidden states, ascending.
    pub tokens: Vec<u32>,
    /// What the expert's output counts for each of them.
    pub weights: Vec<f32>,
}

impl Share {
    /// Whether no token goes there.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

impl<B: Forward> Router<B> {
    /// The tokens of every expert, for normed hidden states `[tokens, hidden]`.
    pub fn shares(&self, backend: &B, normed: &B::Activation) -> Result<Vec<Share>> {
        let logits = backend.download_activation(&backend.product(normed, &self.weight)?)?;
        Ok(shares(&logits, self.per_token, self.normalized))
    }
}

/// The `per_token` experts of greatest probability (softmax over all of them), of equals the first, with these as their
/// weights; with `normalized` divided by their sum (MixtralSparseMoeBlock and Qwen3MoeSparseMoeBlock of transformers).
fn shares(logits: &Matrix, per_token: usize, normalized: bool) -> Vec<Share> {
    let experts = logits.columns;
    let mut shares = vec![Share::default(); experts];
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
            shares[*expert].tokens.push(token as u32);
            shares[*expert].weights.push(exponentials(expert) / sum);
        }
    }
    shares
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
        let found = shares(&logits, 2, true);
        assert_eq!(found[0].tokens, [1]);
        assert_eq!(found[1].tokens, [0, 1]);
        assert_eq!(found[2].tokens, [0]);
        assert!(found[3].is_empty());
        assert!(close(&found[1].weights, &[e / (e + 1.0), 0.5]));
        assert!(close(&found[2].weights, &[1.0 / (e + 1.0)]));
        // Not made to add up to one, the shares are of all experts.
        let all = 1.0 + e * e + e + (-1f64).exp();
        let found = shares(&logits, 2, false);
        assert!(close(&found[2].weights, &[e / all]));
        assert!(close(&found[0].weights, &[1.0 / (3.0 + (-3f64).exp())]));
    }
}
