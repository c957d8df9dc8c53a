use super::*;
use crate::backend::{LinearGradient, SiteGradient};
use crate::model::backward::BlockGradient;
use crate::quant::scale::ScaleGrid;

fn halves(values: &[f32]) -> Vec<f16> {
    values.iter().copied().map(f16::from_f32).collect()
}

/// One block with one site of two linears, the second unquantized.
fn network(scale: ScaleFormat, scales: &[f32]) -> NetworkValues {
    let linear =
        LinearValues { scale, scales: halves(scales), outlier_scales: halves(&[0.5, 0.25]) };
    let site = SiteValues { clip: Some(0.9), linears: vec![Some(linear), None] };
    let norms = [vec![3.0, -4.0], vec![1.0, 1.0]];
    let block = BlockValues { norms, qk_norms: None, sites: vec![site] };
    NetworkValues { blocks: vec![block], final_norm: vec![2.0] }
}

#[test]
fn parameters_of_zero_are_the_checkpoint() {
    let base = network(ScaleFormat::SIGNED_F16, &[0.1, -0.2, 0.0]);
    let parameters = Parameters::new(base.clone(), Dtype::BF16);
    assert_eq!(parameters.count(), 4 + 1 + 3 + 2 + 1);
    assert_eq!(parameters.values(&vec![0.0; parameters.count()]), base);
}

#[test]
fn values_are_rounded_as_they_are_stored_and_gradients_are_of_the_parameters() {
    let base = network(ScaleFormat::SIGNED_F16, &[0.1, -0.2, 0.0]);
    let parameters = Parameters::new(base, Dtype::BF16);
    // Norms, clip, scales, outliers' scales, the last norm.
    let moved = [0.1, 0.0, 0.0, 0.001, 0.05, 0.1, 0.1, 0.1, -0.5, 0.0, 1.0];
    let values = parameters.values(&moved);
    let block = &values.blocks[0];
    let root = 12.5f32.sqrt();
    assert_eq!(block.norms[0], [bf16::from_f32(3.0 + 0.1 * root).to_f32(), -4.0]);
    assert_eq!(block.norms[1], [1.0, 1.0], "0.001 is less than bf16 shows");
    assert_eq!(block.sites[0].clip, Some(0.95));
    let linear = block.sites[0].linears[0].as_ref().unwrap();
    let scale = |scale: f32| f16::from_f32(f16::from_f32(scale).to_f32() * 1.1);
    assert_eq!(linear.scales, [scale(0.1), scale(-0.2), f16::ZERO]);
    assert_eq!(linear.outlier_scales, halves(&[0.25, 0.25]));
    assert_eq!(values.final_norm, [4.0]);

    let linear = LinearGradient { scales: vec![6.0; 3], outlier_scales: vec![8.0, 4.0] };
    let site =
        SiteGradient { clips: vec![1.0, 2.0], linears: vec![linear, LinearGradient::default()] };
    let block = BlockGradient {
        norms: [vec![1.0, 2.0], vec![3.0, 4.0]],
        qk_norms: None,
        sites: vec![site],
    };
    let gradient = NetworkGradient { blocks: vec![block], final_norm: vec![5.0] };
    let found = parameters.gradient(&gradient, 2);
    let scale = |scale: f32| 3.0 * f16::from_f32(scale).to_f32();
    let expected = [root / 2.0, root, 1.5, 2.0, 1.5, scale(0.1), scale(-0.2), 0.0, 2.0, 0.5, 5.0];
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
}

#[test]
fn scales_stay_on_their_grid_and_within_bounds() {
    let powers = ScaleFormat { grid: ScaleGrid::PowerOfTwo, ..ScaleFormat::F16 };
    let parameters = Parameters::new(network(powers, &[0.25, 0.5, 6e-8]), Dtype::F32);
    let mut moved = vec![0.0; parameters.count()];
    (moved[4], moved[5], moved[6], moved[7]) = (-2.0, 9.0, 0.5, -0.9);
    parameters.confine(&mut moved);
    assert_eq!(moved[4..8], [0.5 - 0.9, 3.0, 0.5, -0.75]);
    let values = parameters.values(&moved);
    let site = &values.blocks[0].sites[0];
    assert_eq!(site.clip, Some(0.5));
    let scales = &site.linears[0].as_ref().unwrap().scales;
    // What would vanish stays as it was.
    assert_eq!(scales[..], [f16::ONE, f16::from_f32(0.5), f16::from_f32(6e-8)]);
}
