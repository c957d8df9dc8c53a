/*! The errors of a model's linears: by kind, and the worst of all. */

use super::layout::{Side, Table};
use crate::pipeline::outcome::LinearOutcome;

/// How many of the worst linears are named.
const WORST: usize = 5;

/// Linears that share their last name: all `q_proj` of a model.
struct Kind<'a> {
    name: &'a str,
    linears: Vec<&'a LinearOutcome>,
}

/// `model.layers.3.self_attn.q_proj` -> `q_proj`.
fn kind_of(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// `model.layers.3.self_attn.q_proj` -> `3`: the first component that is a number.
fn block_of(name: &str) -> &str {
    name.split('.').find(|part| part.parse::<usize>().is_ok()).unwrap_or("-")
}

/// A table of kinds, in the order they first appear, then the worst linears.
pub(crate) fn summary(linears: &[LinearOutcome]) -> String {
    let mut kinds: Vec<Kind<'_>> = Vec::new();
    for linear in linears {
        let name = kind_of(&linear.name);
        match kinds.iter_mut().find(|kind| kind.name == name) {
            Some(kind) => kind.linears.push(linear),
            None => kinds.push(Kind { name, linears: vec![linear] }),
        }
    }
    let mut table = Table::new([
        ("linear", Side::Left),
        ("bits", Side::Right),
        ("mean error", Side::Right),
        ("worst", Side::Right),
        ("in block", Side::Right),
    ]);
    for kind in &kinds {
        let mean =
            kind.linears.iter().map(|linear| linear.error).sum::<f64>() / kind.linears.len() as f64;
        let worst = by_error(&kind.linears)[0];
        table.row(vec![
            kind.name.to_owned(),
            bits_of(&kind.linears),
            format!("{mean:.4}"),
            format!("{:.4}", worst.error),
            block_of(&worst.name).to_owned(),
        ]);
    }
    let mut worst = Table::new([("worst linears", Side::Left), ("error", Side::Right)]);
    for linear in by_error(&linears.iter().collect::<Vec<_>>()).into_iter().take(WORST) {
        worst.row(vec![linear.name.clone(), format!("{:.4}", linear.error)]);
    }
    format!("{}\n{}", table.text(), worst.text())
}

/// Worst first; an error that is not a number is worse than any.
fn by_error<'a>(linears: &[&'a LinearOutcome]) -> Vec<&'a LinearOutcome> {
    let rank = |linear: &LinearOutcome| {
        if linear.error.is_nan() { f64::INFINITY } else { linear.error }
    };
    let mut sorted = linears.to_vec();
    sorted.sort_by(|a, b| rank(b).total_cmp(&rank(a)));
    sorted
}

/// `4`, or `2-8` where linears of one kind differ.
fn bits_of(linears: &[&LinearOutcome]) -> String {
    let bits = linears.iter().map(|linear| linear.bits);
    match (bits.clone().min(), bits.max()) {
        (Some(least), Some(most)) if least != most => format!("{least}-{most}"),
        (Some(bits), _) => bits.to_string(),
        (None, _) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(name: &str, bits: u8, error: f64) -> LinearOutcome {
        LinearOutcome { name: name.into(), bits, error }
    }

    #[test]
    fn linears_are_summed_up_by_kind_and_the_worst_named() {
        let linears = [
            linear("model.layers.0.self_attn.q_proj", 4, 0.05),
            linear("model.layers.0.mlp.down_proj", 4, 0.11),
            linear("model.layers.1.self_attn.q_proj", 3, 0.07),
            linear("model.layers.1.mlp.down_proj", 4, 0.2512),
        ];
        assert_eq!(
            summary(&linears),
            "\
linear     bits  mean error   worst  in block
q_proj      3-4      0.0600  0.0700         1
down_proj     4      0.1806  0.2512         1

worst linears                     error
model.layers.1.mlp.down_proj     0.2512
model.layers.0.mlp.down_proj     0.1100
model.layers.1.self_attn.q_proj  0.0700
model.layers.0.self_attn.q_proj  0.0500
"
        );
    }

    #[test]
    fn only_the_five_worst_are_named_and_nan_is_the_worst() {
        let mut linears: Vec<_> =
            (0..8).map(|block| linear(&format!("layers.{block}.o"), 4, block as f64)).collect();
        linears[2].error = f64::NAN;
        let text = summary(&linears);
        let worst: Vec<&str> = text.lines().skip_while(|line| !line.starts_with("worst")).collect();
        assert_eq!(worst.len(), 1 + WORST);
        assert!(worst[1].starts_with("layers.2.o"), "{text}");
    }
}
