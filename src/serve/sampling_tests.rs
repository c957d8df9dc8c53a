use super::*;

const ALL: Sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };

/// How often each of the tokens is drawn of 4000, with as many seeds.
fn counts(sampling: Sampling, logits: &[f32]) -> Vec<usize> {
    let mut counts = vec![0; logits.len()];
    for seed in 0..4000 {
        let choice = Sampler::new(sampling, seed).choose(logits).unwrap();
        counts[choice.token as usize] += 1;
    }
    counts
}

/// Logits of these probabilities.
fn of(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() + 3.0).collect()
}

/// Checks draws by these probabilities, within 4 standard deviations.
fn check(sampling: Sampling, logits: &[f32], probabilities: &[f64]) {
    for (count, p) in counts(sampling, logits).into_iter().zip(probabilities) {
        let (mean, deviation) = (4000.0 * p, (4000.0 * p * (1.0 - p)).sqrt());
        assert!(
            (count as f64 - mean).abs() <= 4.0 * deviation,
            "{sampling:?}: {count}, not {mean}"
        );
    }
}

#[test]
fn greedy_takes_the_first_of_the_greatest_and_says_how_probable_it_is() {
    let mut sampler = Sampler::new(Sampling::GREEDY, 7);
    let choice = sampler.choose(&[0.0, 2.0, 1.0, 2.0]).unwrap();
    let e = 1f64.exp();
    assert_eq!(choice.token, 1);
    let expected = -(2.0 + (1.0 + e) / (e * e)).ln();
    assert!((choice.log_probability - expected).abs() < 1e-6);
}

#[test]
fn draws_follow_the_probabilities() {
    let logits = of(&[0.5, 0.2, 0.2, 0.1]);
    check(ALL, &logits, &[0.5, 0.2, 0.2, 0.1]);
    // At temperature 0.5 probabilities are squared.
    let sum = 0.25 + 0.04 + 0.04 + 0.01;
    check(
        Sampling { temperature: 0.5, ..ALL },
        &logits,
        &[0.25 / sum, 0.04 / sum, 0.04 / sum, 0.01 / sum],
    );
}

#[test]
fn filters_leave_out_what_their_definitions_say() {
    let logits = of(&[0.1, 0.2, 0.4, 0.2, 0.1]);
    // Of the two tokens of equal rank the lower id stays.
    check(Sampling { top_k: 2, ..ALL }, &logits, &[0.0, 1.0 / 3.0, 2.0 / 3.0, 0.0, 0.0]);
    check(Sampling { top_k: 9, ..ALL }, &logits, &[0.1, 0.2, 0.4, 0.2, 0.1]);
    check(Sampling { top_p: 0.5, ..ALL }, &logits, &[0.0, 1.0 / 3.0, 2.0 / 3.0, 0.0, 0.0]);
    check(Sampling { top_p: 0.01, ..ALL }, &logits, &[0.0, 0.0, 1.0, 0.0, 0.0]);
    check(Sampling { min_p: 0.4, ..ALL }, &logits, &[0.0, 0.25, 0.5, 0.25, 0.0]);
    // top_p counts what top_k has left: of 0.4 and 0.2, two thirds are the first.
    let both = Sampling { top_k: 2, top_p: 0.6, ..ALL };
    check(both, &logits, &[0.0, 0.0, 1.0, 0.0, 0.0]);
    // min_p is a share of the most probable after the temperature: squares of 0.5 are below 0.3.
    let cold = Sampling { temperature: 0.5, min_p: 0.3, ..ALL };
    check(cold, &logits, &[0.0, 0.0, 1.0, 0.0, 0.0]);
}

#[test]
fn one_seed_gives_one_text_and_the_log_probability_is_that_of_the_network() {
    let logits = of(&[0.3, 0.3, 0.4]);
    let run = |seed| {
        let mut sampler = Sampler::new(Sampling { temperature: 2.0, top_k: 2, ..ALL }, seed);
        (0..50).map(|_| sampler.choose(&logits).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    for Choice { token, log_probability } in run(3) {
        let p = [0.3f64, 0.3, 0.4][token as usize];
        assert!((log_probability - p.ln()).abs() < 1e-6);
    }
}

#[test]
fn logits_that_are_not_finite_are_an_error() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = Sampler::new(ALL, 0).choose(&[0.0, bad, 1.0]).unwrap_err();
        assert!(error.message().contains("token 1"), "{error}");
    }
}
