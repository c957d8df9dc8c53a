/*! Norms, activations, softmax and rotary embedding: everything in a block that is no product.

Each function has one body, compiled once per instruction set. Sums run in 16 fixed lanes (value i
in lane i mod 16) that are folded in halves, products and additions are never fused, and the
exponential is our own polynomial, so every set computes the same bits. */

use super::isa::Isa;

/// Lanes of a sum: one AVX-512 register of f32.
const LANES: usize = 16;

/// Compiles `$body` for each instruction set and runs the one for `$isa`.
macro_rules! dispatch {
    ($isa:expr, $body:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
        fn avx512($($argument: $type),*) $(-> $result)? {
            $body($($argument),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn avx2($($argument: $type),*) $(-> $result)? {
            $body($($argument),*)
        }
        match $isa {
            // SAFETY: the token is proof that the processor has the set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => unsafe { avx512($($argument),*) },
            // SAFETY: the token is proof that the processor has the set.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => unsafe { avx2($($argument),*) },
            _ => $body($($argument),*),
        }
    }};
}
pub(super) use dispatch;

/// RMS norm of one row: `out = x / sqrt(mean(x^2) + eps) * weight`, all of length `n`.
pub fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len(), "lengths of a norm differ");
    dispatch!(isa, rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = sum_by_lanes(x, |value| value * value) / x.len().max(1) as f32;
    let inverse = 1.0 / (mean + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * inverse * weight;
    }
}

/// `gate = gate * sigmoid(gate) * up`, element by element, in place.
pub fn silu_mul(isa: Isa, gate: &mut [f32], up: &[f32]) {
    assert!(gate.len() == up.len(), "lengths of gate and up differ");
    dispatch!(isa, silu_mul_body(gate: &mut [f32], up: &[f32]));
}

#[inline(always)]
fn silu_mul_body(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// `gate = gelu(gate) * up`, element by element, in place, with GELU as
/// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, which is `x * sigmoid(2 sqrt(2 / pi) * (...))`.
pub fn gelu_mul(isa: Isa, gate: &mut [f32], up: &[f32]) {
    assert!(gate.len() == up.len(), "lengths of gate and up differ");
    dispatch!(isa, gelu_mul_body(gate: &mut [f32], up: &[f32]));
}

#[inline(always)]
fn gelu_mul_body(gate: &mut [f32], up: &[f32]) {
    /// 2 sqrt(2 / pi).
    const FACTOR: f32 = 1.595_769;
    for (gate, up) in gate.iter_mut().zip(up) {
        let x = *gate;
        let inner = FACTOR * (x + 0.044_715 * x * x * x);
        *gate = x / (1.0 + exp(-inner)) * up;
    }
}

/// `exp(scale * (score - max))` in place of each score, and their sum, which is left for the caller to
/// divide the (fewer) products by; `scale` is positive.
pub fn softmax_row(isa: Isa, scores: &mut [f32], scale: f32) -> f32 {
    dispatch!(isa, softmax_row_body(scores: &mut [f32], scale: f32) -> f32)
}

#[inline(always)]
fn softmax_row_body(scores: &mut [f32], scale: f32) -> f32 {
    let max = max_by_lanes(scores);
    scores.iter_mut().for_each(|score| *score = exp_of_negative((*score - max) * scale));
    sum_by_lanes(scores, |value| value)
}

/// `ln(sum(exp(logits)))`. Exponentials in f32, their sum in f64.
pub fn log_sum_exp(isa: Isa, logits: &[f32]) -> f64 {
    dispatch!(isa, log_sum_exp_body(logits: &[f32]) -> f64)
}

#[inline(always)]
fn log_sum_exp_body(logits: &[f32]) -> f64 {
    let max = max_by_lanes(logits);
    let mut lanes = [0.0f64; LANES];
    // Exponentials first, then sums: one loop for both would not become vector code.
    let mut powers = [0.0f32; 16 * LANES];
    for logits in logits.chunks(powers.len()) {
        let powers = &mut powers[..logits.len()];
        for (power, logit) in powers.iter_mut().zip(logits) {
            *power = exp(logit - max);
        }
        let (chunks, tail) = powers.as_chunks::<LANES>();
        for chunk in chunks {
            lanes = std::array::from_fn(|lane| lanes[lane] + f64::from(chunk[lane]));
        }
        for (lane, power) in lanes.iter_mut().zip(tail) {
            *lane += f64::from(*power);
        }
    }
    f64::from(max) + fold(lanes, |a, b| a + b).ln()
}

/// Kullback-Leibler divergence in nats of the distribution with logits `changed` from the one with
/// `logits`: `sum p (logit - changed) - ln sum e^logit + ln sum e^changed`, p the latter's.
pub fn kl_divergence(isa: Isa, changed: &[f32], logits: &[f32]) -> f64 {
    assert!(changed.len() == logits.len(), "lengths of logits differ");
    dispatch!(isa, kl_divergence_body(changed: &[f32], logits: &[f32]) -> f64)
}

#[inline(always)]
fn kl_divergence_body(changed: &[f32], logits: &[f32]) -> f64 {
    let max = max_by_lanes(logits);
    let mut weights = [0.0f64; LANES];
    let mut weighted = [0.0f64; LANES];
    for (changed, logits) in changed.chunks(LANES).zip(logits.chunks(LANES)) {
        for (lane, (changed, logit)) in changed.iter().zip(logits).enumerate() {
            let weight = f64::from(exp(logit - max));
            weights[lane] += weight;
            weighted[lane] += weight * (f64::from(*logit) - f64::from(*changed));
        }
    }
    let weight = fold(weights, |a, b| a + b);
    let log_sum = f64::from(max) + weight.ln();
    fold(weighted, |a, b| a + b) / weight - log_sum + log_sum_exp_body(changed)
}

/// Rotary embedding of one head in place, with the halves of the head as pairs (Hugging Face's
/// `rotate_half`): `x` `[head_dim]`, `cos` and `sin` `[head_dim / 2]`.
pub fn rope(isa: Isa, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    assert!(x.len() == 2 * cos.len() && x.len() == 2 * sin.len(), "lengths of a head differ");
    dispatch!(isa, rope_body(x: &mut [f32], cos: &[f32], sin: &[f32]));
}

#[inline(always)]
pub(super) fn rope_body(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (left, right) = x.split_at_mut(cos.len());
    for (((left, right), cos), sin) in left.iter_mut().zip(right).zip(cos).zip(sin) {
        (*left, *right) = (*left * cos - *right * sin, *right * cos + *left * sin);
    }
}

/// e^x with a relative error below 2e-7; 0 where e^x would be subnormal, infinity where it
/// overflows, NaN for NaN.
///
/// `e^x = 2^n e^r` with `n = rint(x / ln 2)` and `|r| <= ln(2) / 2`, where the Taylor polynomial of
/// degree 7 is off by 5e-9. No branch and no table, so a loop over it becomes vector code. Its products
/// are fused, by `mul_add` and not at the compiler's choice, so the bits stay the same everywhere.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let (power, exponent) = power_and_exponent(x);
    // 2^n as a product of two powers, because 2^128 alone would overflow.
    let half = exponent >> 1;
    let value = power * two_to(half) * two_to(exponent.wrapping_sub(half));
    let value = if x < SMALLEST { 0.0 } else { value };
    if x > 88.722_84 { f32::INFINITY } else { value }
}

/// As [`exp`], for `x` that is not above 0: half of the steps at the end fall away.
#[inline(always)]
fn exp_of_negative(x: f32) -> f32 {
    let (power, exponent) = power_and_exponent(x);
    let value = power * two_to(exponent);
    if x < SMALLEST { 0.0 } else { value }
}

/// Below it e^x is subnormal.
const SMALLEST: f32 = -87.336_54;

/// `(e^r, n)` of [`exp`].
#[inline(always)]
fn power_and_exponent(x: f32) -> (f32, i32) {
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the sum's low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has few bits, so that its product with n is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let mut tail: f32 = 1.0 / 5040.0;
    for factorial in [720.0, 120.0, 24.0, 6.0, 2.0] {
        tail = tail.mul_add(r, 1.0 / factorial);
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    ((r * r).mul_add(tail, r) + 1.0, exponent)
}

#[inline(always)]
fn two_to(exponent: i32) -> f32 {
    f32::from_bits((exponent.wrapping_add(127) << 23).cast_unsigned())
}

/// The sum of `term(value)`, in lanes.
#[inline(always)]
fn sum_by_lanes(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        lanes = std::array::from_fn(|lane| lanes[lane] + term(chunk[lane]));
    }
    for (lane, value) in lanes.iter_mut().zip(tail) {
        *lane += term(*value);
    }
    fold(lanes, |a, b| a + b)
}

/// The largest value, in lanes; -infinity for an empty slice. NaNs are passed over here and show
/// in the sums that follow.
#[inline(always)]
fn max_by_lanes(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        lanes = std::array::from_fn(|lane| larger(lanes[lane], chunk[lane]));
    }
    for (lane, value) in lanes.iter_mut().zip(tail) {
        *lane = larger(*lane, *value);
    }
    fold(lanes, larger)
}

/// Folds 16 lanes in halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
#[inline(always)]
fn fold<T: Copy>(mut lanes: [T; LANES], join: impl Fn(T, T) -> T) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = join(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|i| ((i * i % 97) as f32 * 0.61).sin() * scale).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn exp_is_within_two_ten_millionths() {
        let mut worst = 0.0f64;
        for i in 0..400_000 {
            let x = -87.3 + 176.0 * i as f32 / 400_000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2e-7, "{worst:e}");
    }

    #[test]
    fn exp_has_the_right_ends() {
        assert_eq!(exp(0.0), 1.0);
        for x in [-88.0, -104.0, -1e4, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp(x).to_bits(), 0, "{x}");
        }
        for x in [88.73, 1e4, f32::MAX, f32::INFINITY] {
            assert_eq!(exp(x), f32::INFINITY, "{x}");
        }
        assert!(exp(88.7).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn divergence_is_that_of_the_definition() {
        for n in [1, 2, 15, 16, 17, 4099] {
            let (x, y) = (wave(n, 3.0), wave(n + 1, 2.0)[1..].to_vec());
            let softmax = |logits: &[f32]| {
                let powers: Vec<f64> = logits.iter().map(|x| f64::from(*x).exp()).collect();
                let sum: f64 = powers.iter().sum();
                powers.into_iter().map(move |power| power / sum)
            };
            let exact: f64 = softmax(&y).zip(softmax(&x)).map(|(p, q)| p * (p / q).ln()).sum();
            let found = kl_divergence(Isa::detect().unwrap(), &x, &y);
            assert!((found - exact).abs() < 1e-6, "{n}: {found} {exact}");
            assert!(kl_divergence(Isa::detect().unwrap(), &y, &y).abs() < 1e-12);
            let mut spoiled = x.clone();
            spoiled[n / 2] = f32::NAN;
            assert!(kl_divergence(Isa::detect().unwrap(), &spoiled, &y).is_nan());
        }
    }

    #[test]
    fn every_set_gives_the_same_bits() {
        for n in [1, 2, 15, 16, 17, 64, 172, 576] {
            let (x, y) = (wave(n, 3.0), wave(n + 1, 2.0)[1..].to_vec());
            let half = n / 2;
            let run = |isa| {
                let (mut norm, mut silu) = (vec![f32::NAN; n], x.clone());
                rms_norm(isa, &x, &y, 1e-5, &mut norm);
                silu_mul(isa, &mut silu, &y);
                let (mut softmax, mut rotated) = (x.clone(), x[..2 * half].to_vec());
                let sum = softmax_row(isa, &mut softmax, 0.7);
                rope(isa, &mut rotated, &y[..half], &y[half..2 * half]);
                softmax.push(sum);
                let floats = [norm, silu, softmax, rotated].map(|values| bits(&values));
                (floats, [log_sum_exp(isa, &x), kl_divergence(isa, &x, &y)].map(f64::to_bits))
            };
            let expected = run(Isa::Plain);
            for isa in Isa::available() {
                assert_eq!(run(isa), expected, "{isa:?} {n}");
            }
        }
    }

    #[test]
    fn they_are_what_they_are_called() {
        let n = 37;
        let (x, y) = (wave(n, 3.0), wave(n + 1, 2.0)[1..].to_vec());
        let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let near = |value: f32, expected: f64| {
            assert!((f64::from(value) - expected).abs() < 1e-6 * expected.abs().max(1.0));
        };
        let mut out = vec![0.0; n];
        rms_norm(Isa::Plain, &x, &y, 0.1, &mut out);
        let root = (wide.iter().map(|x| x * x).sum::<f64>() / n as f64 + 0.1).sqrt();
        (0..n).for_each(|i| near(out[i], wide[i] / root * f64::from(y[i])));

        out.copy_from_slice(&x);
        silu_mul(Isa::Plain, &mut out, &y);
        (0..n).for_each(|i| near(out[i], wide[i] / (1.0 + (-wide[i]).exp()) * f64::from(y[i])));

        let total: f64 = wide.iter().map(|x| (x * 0.5).exp()).sum();
        out.copy_from_slice(&x);
        let sum = softmax_row(Isa::Plain, &mut out, 0.5);
        (0..n).for_each(|i| near(out[i] / sum, (wide[i] * 0.5).exp() / total));

        let log_sum = wide.iter().map(|x| x.exp()).sum::<f64>().ln();
        assert!((log_sum_exp(Isa::Plain, &x) - log_sum).abs() < 1e-6);

        let mut head = [1.0, 2.0, 3.0, 4.0];
        rope(Isa::Plain, &mut head, &[0.5, 0.25], &[2.0, 1.0]);
        assert_eq!(head, [0.5 - 6.0, 0.5 - 4.0, 1.5 + 2.0, 1.0 + 2.0]);
    }

    #[test]
    fn large_scores_neither_overflow_nor_vanish() {
        let mut scores = [1e30, 1e30, -1e30, 0.0];
        assert_eq!(softmax_row(Isa::Plain, &mut scores, 1.0), 2.0);
        assert_eq!(scores, [1.0, 1.0, 0.0, 0.0]);
        let mut gates = [-200.0, 200.0];
        silu_mul(Isa::Plain, &mut gates, &[1.0, 1.0]);
        assert_eq!(gates, [0.0, 200.0]);
    }
}
