//! What is held against which limit.

use super::*;

fn measured(perplexity: f64) -> PerplexityOutcome {
    PerplexityOutcome {
        model: "m".into(),
        dataset: "d".into(),
        perplexity,
        standard_error: 0.0,
        windows: 1,
        seq_len: 2,
        tokens: 2,
        seconds: 1.0,
        tokens_per_second: 2.0,
        cpu_seconds: 1.0,
        device: "cpu".into(),
    }
}

fn outcome(reference: Option<f64>, increase: Option<f64>) -> VerifyOutcome {
    VerifyOutcome {
        model: "m".into(),
        ok: true,
        checks: Vec::new(),
        perplexity: None,
        reference_perplexity: reference,
        increase,
        kernels_unchecked: None,
        device: "cpu".into(),
    }
}

fn found(checks: &[Check]) -> Vec<(&str, bool)> {
    checks.iter().map(|check| (check.name.as_str(), check.ok)).collect()
}

#[test]
fn a_limit_itself_is_kept() {
    let limits = Limits { max_ppl: Some(8.0), max_ppl_increase: Some(0.25) };
    let at = |perplexity: f64, increase| {
        perplexity_checks(&measured(perplexity), &outcome(Some(4.0), Some(increase)), limits)
    };
    let names = ["perplexity", "max-ppl", "max-ppl-increase"];
    let expected = |held: [bool; 3]| names.into_iter().zip(held).collect::<Vec<_>>();
    assert_eq!(found(&at(8.0, 0.25)), expected([true, true, true]));
    assert_eq!(found(&at(8.1, 0.25)), expected([true, false, true]));
    assert_eq!(found(&at(8.0, 0.26)), expected([true, true, false]));
    assert_eq!(found(&at(f64::NAN, f64::NAN)), expected([false, false, false]));
    let alone = perplexity_checks(&measured(8.0), &outcome(None, None), Limits::default());
    assert_eq!(found(&alone), [("perplexity", true)]);
    assert_eq!(alone[0].detail, "8.0000 on 1 window of d");
    let against = perplexity_checks(&measured(5.0), &outcome(Some(4.0), None), limits);
    assert_eq!(against[0].detail, "5.0000 on 1 window of d, reference 4.0000 (+25.00 %)");
}

#[test]
fn one_failed_check_fails_the_outcome() {
    let check = |ok| Check { name: "c".into(), ok, detail: String::new() };
    let mut all = outcome(None, None);
    all.add(vec![check(true)]);
    assert!(all.ok);
    all.add(vec![check(false), check(true)]);
    assert!(!all.ok && all.checks.len() == 3);
}
