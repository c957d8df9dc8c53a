use super::*;
use crate::model::sites::{LinearSpec, SiteKind, SiteSpec};
use crate::pipeline::plan::plan_block;
use crate::recipe::Recipe;

#[test]
fn a_distribution_is_in_units_of_the_sites_own_size() {
    // 99 channels of size 1 and one of size 10: the mean of squares is 1.99.
    let mut energies = vec![4.0; 100];
    energies[17] = 400.0;
    let rms = distribution(&energies);
    assert_eq!(rms.len(), SHARES.len());
    let unit = 1.99_f64.sqrt();
    assert!((rms[0] - 1.0 / unit).abs() < 1e-12 && (rms[16] - 1.0 / unit).abs() < 1e-12, "{rms:?}");
    assert!((rms[18] - 10.0 / unit).abs() < 1e-12, "{rms:?}");
    assert!(rms.is_sorted());
    assert!(distribution(&[0.0; 4]).is_empty(), "an expert that no token reached");
}

#[test]
fn the_sites_of_the_worst_linears_are_shown_each_once() {
    let site = |name: &str, linears: &[&str]| SiteSpec {
        kind: SiteKind::MlpAct,
        name: name.into(),
        expert: None,
        channels: 256,
        linears: linears
            .iter()
            .map(|name| LinearSpec { name: (*name).into(), rows: 8, columns: 256, bias: false })
            .collect(),
    };
    let sites = [site("attn_in", &["q", "k"]), site("mlp_act", &["down"]), site("idle", &["up"])];
    let mut block = plan_block(&Recipe::default_recipe(), &sites).unwrap();
    for (site, errors) in block.iter_mut().zip([&[0.1, 0.3][..], &[0.2], &[0.9]]) {
        for (linear, error) in site.linears.iter_mut().zip(errors) {
            linear.error = Some(*error);
        }
    }
    let known = distribution(&[1.0; 256]);
    let found = worst_sites(&[block], &[vec![known.clone(), known.clone(), Vec::new()]]);
    let names: Vec<_> = found.iter().map(|site| (&*site.linear, &*site.site)).collect();
    assert_eq!(names, [("k", "attn_in"), ("down", "mlp_act")], "an idle site has no distribution");
    assert_eq!((found[0].outliers, &found[0].rms), (16, &known));
}
