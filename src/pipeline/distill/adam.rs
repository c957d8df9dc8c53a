//! Adam (Kingma and Ba, 2015), and its learning rate over the steps.

use std::f64::consts::PI;
use std::ops::Range;

use rayon::prelude::*;

/// Decay of the first and of the second moment.
const DECAYS: [f64; 2] = [0.9, 0.95];
/// Keeps a quotient finite where a gradient always was 0.
const EPSILON: f32 = 1e-8;
/// The greatest norm of a gradient; greater ones are shortened to it.
const GREATEST_NORM: f64 = 1.0;
/// Values of a task: sums of tasks do not depend on threads.
const CHUNK: usize = 1 << 14;

/// Running moments of the gradients.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Adam {
    /// Steps so far.
    pub(super) steps: usize,
    /// Of the gradients.
    pub(super) first: Vec<f32>,
    /// Of their squares.
    pub(super) second: Vec<f32>,
}

impl Adam {
    pub(super) fn new(count: usize) -> Self {
        Self { steps: 0, first: vec![0.0; count], second: vec![0.0; count] }
    }

    /// Changes `parameters` by one step against `gradient`, each range with its learning rate.
    pub(super) fn step(
        &mut self,
        parameters: &mut [f32],
        gradient: &[f32],
        rates: impl Iterator<Item = (f32, Range<usize>)>,
    ) {
        self.steps += 1;
        let [corrected_first, corrected_second] =
            DECAYS.map(|decay| (1.0 - decay.powi(self.steps as i32)) as f32);
        let shorten = (GREATEST_NORM / norm(gradient).max(GREATEST_NORM)) as f32;
        let [keep_first, keep_second] = DECAYS.map(|decay| decay as f32);
        for (rate, range) in rates {
            let moments = self.first[range.clone()].par_iter_mut();
            let moments = moments.zip(&mut self.second[range.clone()]);
            let values = parameters[range.clone()].par_iter_mut().zip(&gradient[range]);
            moments.zip(values).with_min_len(CHUNK).for_each(
                |((first, second), (value, gradient))| {
                    let gradient = gradient * shorten;
                    *first = keep_first * *first + (1.0 - keep_first) * gradient;
                    *second = keep_second * *second + (1.0 - keep_second) * (gradient * gradient);
                    let root = (*second / corrected_second).sqrt();
                    *value -= rate * (*first / corrected_first) / (root + EPSILON);
                },
            );
        }
    }
}

/// The Euclidean norm.
fn norm(values: &[f32]) -> f64 {
    let squares = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let sums: Vec<f64> = values.par_chunks(CHUNK).map(squares).collect();
    sums.iter().sum::<f64>().sqrt()
}

/// The factor of the learning rate in step `step` of `steps`: a short rise, then half a cosine down to 0.
pub(super) fn schedule(step: usize, steps: usize) -> f32 {
    let rise = (steps / 10).clamp(1, 10);
    let risen = ((step + 1) as f64 / rise as f64).min(1.0);
    (risen * 0.5 * (1.0 + (PI * step as f64 / steps as f64).cos())) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_steps_are_those_of_the_paper() {
        let mut adam = Adam::new(3);
        let mut values = [1.0, 1.0, 1.0];
        let rates = || [(0.1, 0..2), (0.01, 2..3)].into_iter();
        adam.step(&mut values, &[0.5, -0.01, 0.0], rates());
        // With corrected moments the first step has the size of the rate.
        let near = |found: [f32; 3], expected: [f32; 3]| {
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-5, "{found} {expected}");
            }
        };
        near(values, [0.9, 1.1, 1.0]);
        adam.step(&mut values, &[-0.5, -0.01, 1e-3], rates());
        let first = (0.9f32 * 0.05 - 0.05) / 0.19;
        let second: f32 = (0.95 * 0.0125 + 0.0125) / 0.0975;
        let third = (0.1f32 * 1e-3 / 0.19) / (0.05f32 * 1e-6 / 0.0975).sqrt();
        near(values, [0.9 - 0.1 * first / second.sqrt(), 1.2, 1.0 - 0.01 * third]);
    }

    #[test]
    fn long_gradients_are_shortened_and_threads_do_not_matter() {
        let run = |scale: f32, threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let gradient: Vec<f32> = (0..70_000).map(|i| scale * (i as f32).sin()).collect();
            let (mut adam, mut values) = (Adam::new(70_000), vec![0.0; 70_000]);
            pool.install(|| adam.step(&mut values, &gradient, [(0.1, 0..70_000)].into_iter()));
            (adam, values)
        };
        assert_eq!(run(1.0, 1), run(1.0, 3));
        let length = norm(&run(1.0, 1).0.first);
        assert!((length - 0.1).abs() < 1e-6, "{length}");
    }

    #[test]
    fn the_rate_rises_and_falls_to_nothing() {
        assert_eq!(schedule(0, 100), 0.1);
        assert!(schedule(9, 100) > 0.97 && schedule(50, 100) == 0.5);
        assert!(schedule(99, 100) < 1e-3);
        assert_eq!(schedule(0, 1), 1.0);
    }
}
