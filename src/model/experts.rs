/*! Routing: which experts compute a token, and with which weights. */

use crate::Result;
use crate::backend::{Forward, Matrix};

/// Chooses the experts of each token. It is unquantized and reads the normed hidden states in full precision.
pub struct Router<B: Forward> {
    /// `[experts, hidden]`.
    pub weight: B::Dense,
    /// How experts are chosen.
    pub choice: Choice,
    /// The expert that computes every token, if there is one.
    pub shared: Option<Shared<B>>,
}

/// How experts are chosen by a router's logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Experts of a token, without a shared one.
    pub per_token: usize,
    /// Whether the routing weights of a token are divided by their sum.
    pub normalized: bool,
    /// Factor of the routing weights.
    pub scale: f32,
    /// With sigmoids, what is added to each expert's score for the choice alone, `[experts]`; none for a softmax.
    pub sigmoid_bias: Option<Vec<f32>>,
}

/// The weight of an expert that computes every token.
pub enum Shared<B: Forward> {
    /// One.
    Always,
    /// The sigmoid of the product with `[1, hidden]`.
    Gated(B::Dense),
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
        let mut routed = match &self.choice.sigmoid_bias {
            None => self.choice.by_softmax(&logits),
            Some(bias) => self.choice.by_sigmoids(&logits, bias),
        };
        let weights = match &self.shared {
            None => return Ok(routed),
            Some(Shared::Always) => vec![1.0; logits.rows],
            Some(Shared::Gated(gate)) => {
                let gates = backend.download_activation(&backend.product(normed, gate)?)?;
                gates.data.into_iter().map(sigmoid).collect()
            }
        };
        routed.push(RoutedTokens { tokens: (0..logits.rows as u32).collect(), weights });
        Ok(routed)
    }

    /// Experts that compute a token, a shared one included.
    pub fn of_a_token(&self) -> usize {
        self.choice.per_token + usize::from(self.shared.is_some())
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

impl Choice {
    /// Routes each token to the `per_token` experts of greatest probability (softmax over all of them), of equals the first.
    /// The probabilities are the routing weights, with `normalized` divided by their sum (MixtralSparseMoeBlock and
    /// Qwen3MoeSparseMoeBlock of transformers).
    fn by_softmax(&self, logits: &Matrix) -> Vec<RoutedTokens> {
        let Self { per_token, normalized, scale, .. } = *self;
        routed(logits, |logits, chosen| {
            sort_by_greatest(chosen, logits);
            let greatest = logits[chosen[0]];
            let exponentials = |expert: &usize| (logits[*expert] - greatest).exp();
            let counted = if normalized { &chosen[..per_token] } else { &chosen[..] };
            let sum: f32 = counted.iter().map(exponentials).sum();
            chosen[..per_token].iter().map(|expert| scale * (exponentials(expert) / sum)).collect()
        })
    }

    /// Routes each token to the `per_token` experts of greatest sigmoid plus `bias`, of equals the first. The sigmoids are the
    /// routing weights, with `normalized` divided by their sum (Glm4MoeTopkRouter of transformers).
    fn by_sigmoids(&self, logits: &Matrix, bias: &[f32]) -> Vec<RoutedTokens> {
        let Self { per_token, normalized, scale, .. } = *self;
        routed(logits, |logits, chosen| {
            let scores: Vec<f32> = logits.iter().map(|logit| sigmoid(*logit)).collect();
            let biased: Vec<f32> =
                scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
            sort_by_greatest(chosen, &biased);
            let chosen = &chosen[..per_token];
            let sum: f32 = chosen.iter().map(|expert| scores[*expert]).sum();
            let divisor = if normalized { sum + 1e-20 } else { 1.0 };
            chosen.iter().map(|expert| scale * (scores[*expert] / divisor)).collect()
        })
    }
}

/// The experts of each token, by `choose`: from a token's logits it brings the experts, given in ascending order, into that of
/// the choice, and returns the weights of the first of them.
fn routed(logits: &Matrix, choose: impl Fn(&[f32], &mut [usize]) -> Vec<f32>) -> Vec<RoutedTokens> {
    let experts = logits.columns;
    let mut routed = vec![RoutedTokens::default(); experts];
    let mut chosen: Vec<usize> = Vec::with_capacity(experts);
    for (token, logits) in logits.data.chunks(experts.max(1)).enumerate() {
        chosen.clear();
        chosen.extend(0..experts);
        let weights = choose(logits, &mut chosen);
        for (expert, weight) in chosen.iter().zip(weights) {
            routed[*expert].tokens.push(token as u32);
            routed[*expert].weights.push(weight);
        }
    }
    routed
}

fn sort_by_greatest(experts: &mut [usize], values: &[f32]) {
    experts.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
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
        let choice =
            |normalized| Choice { per_token: 2, normalized, scale: 1.0, sigmoid_bias: None };
        let found = choice(true).by_softmax(&logits);
        assert_eq!(found[0].tokens, [1]);
        assert_eq!(found[1].tokens, [0, 1]);
        assert_eq!(found[2].tokens, [0]);
        assert!(found[3].is_empty());
        assert!(close(&found[1].weights, &[e / (e + 1.0), 0.5]));
        assert!(close(&found[2].weights, &[1.0 / (e + 1.0)]));
        // Without normalization the weights are probabilities among all experts.
        let all = 1.0 + e * e + e + (-1f64).exp();
        let found = choice(false).by_softmax(&logits);
        assert!(close(&found[2].weights, &[e / all]));
        assert!(close(&found[0].weights, &[1.0 / (3.0 + (-3f64).exp())]));
    }

    #[test]
    fn a_bias_chooses_experts_and_does_not_weigh_them() {
        let logits = Matrix { rows: 1, columns: 3, data: vec![0.0, 2.0, 1.0] };
        let bias = [0.9, 0.0, 0.0];
        let of = |x: f64| 1.0 / (1.0 + (-x).exp());
        for (normalized, scale) in [(true, 2.5), (false, 1.0)] {
            let choice = Choice { per_token: 2, normalized, scale, sigmoid_bias: None };
            let found = choice.by_sigmoids(&logits, &bias);
            let divisor = if normalized { of(0.0) + of(2.0) } else { 1.0 };
            for (expert, expected) in [(0, Some(of(0.0))), (1, Some(of(2.0))), (2, None)] {
                let expected = expected.map(|score| f64::from(scale) * score / divisor);
                let own = found[expert].weights.first().map(|weight| f64::from(*weight));
                assert!(match (own, expected) {
                    (Some(own), Some(expected)) => (own - expected).abs() < 1e-6,
                    (own, expected) => own == expected,
                });
            }
        }
    }
}
