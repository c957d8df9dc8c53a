/*! The state of a training between two steps, as it is kept in the work directory.

The file: the SHA-256 of what follows, 64 hexadecimal digits; a line of JSON, [`Measured`]; then the parameters, the first
moments, the second moments and the best parameters, f32, little-endian. */

use serde::{Deserialize, Serialize};

use super::adam::Adam;
use crate::checkpoint::{DistilledStep, sha256_hex};

/// Everything that the steps to come depend on.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TrainingState {
    /// The parameters.
    pub(super) parameters: Vec<f32>,
    /// The moments of their gradients.
    pub(super) adam: Adam,
    /// The parameters with the least held-out divergence so far.
    pub(super) best: Vec<f32>,
    /// What was measured.
    pub(super) measured: Measured,
}

/// What was measured so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// Steps that are done.
    pub(super) steps: usize,
    /// Held-out divergence, at the beginning and at every measurement.
    pub(super) curve: Vec<DistilledStep>,
    /// The mean loss of each step since the last measurement.
    pub(super) recent: Vec<f64>,
}

/// Digits of the hash.
const DIGITS: usize = 64;

impl TrainingState {
    /// The state before the first step.
    pub(super) fn new(count: usize) -> Self {
        let zeros = vec![0.0; count];
        let measured = Measured::default();
        Self { parameters: zeros.clone(), adam: Adam::new(count), best: zeros, measured }
    }

    /// The file's content.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut content = serde_json::to_vec(&self.measured).expect("measurements are JSON types");
        content.push(b'\n');
        for values in [&self.parameters, &self.adam.first, &self.adam.second, &self.best] {
            content.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        let mut bytes = sha256_hex(&content).into_bytes();
        bytes.append(&mut content);
        bytes
    }

    /// The state of `count` parameters that a file holds; none if it is damaged.
    pub(super) fn from_bytes(bytes: &[u8], count: usize) -> Option<Self> {
        let (hash, content) = bytes.split_at_checked(DIGITS)?;
        if sha256_hex(content).as_bytes() != hash {
            return None;
        }
        let line = content.iter().position(|byte| *byte == b'\n')?;
        let measured: Measured = serde_json::from_slice(&content[..line]).ok()?;
        let values = content[line + 1..].as_chunks::<4>();
        let values: Vec<f32> = values.0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        if values.len() != 4 * count {
            return None;
        }
        let part = |number: usize| values[number * count..(number + 1) * count].to_vec();
        let adam = Adam { steps: measured.steps, first: part(1), second: part(2) };
        Some(Self { parameters: part(0), adam, best: part(3), measured })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_survives_the_file_and_damage_shows() {
        let mut state = TrainingState::new(3);
        (state.parameters[1], state.best[2], state.adam.steps) = (0.5, -1.0, 7);
        (state.adam.first[0], state.adam.second[2]) = (2.0, 3.0);
        let point = DistilledStep { step: 4, trained: Some(0.1), held_out: 1.0 / 3.0 };
        state.measured = Measured { steps: 7, curve: vec![point], recent: vec![0.1, 0.3] };
        let bytes = state.to_bytes();
        assert_eq!(TrainingState::from_bytes(&bytes, 3), Some(state));
        assert_eq!(TrainingState::from_bytes(&bytes, 4), None);
        assert_eq!(TrainingState::from_bytes(&bytes[..70], 3), None);
        let mut damaged = bytes;
        *damaged.last_mut().unwrap() ^= 1;
        assert_eq!(TrainingState::from_bytes(&damaged, 3), None);
    }
}
