use super::*;
use crate::checkpoint::plan::bits_per_weight;
use crate::quant::codebook::Codebook;
use crate::recipe::{Group, Outliers};

fn site(channels: usize) -> SiteSpec {
    SiteSpec {
        kind: crate::model::sites::SiteKind::MlpAct,
        name: "site".into(),
        expert: None,
        channels,
        linears: vec![LinearSpec { name: "down".into(), rows: 8, columns: channels, bias: false }],
    }
}

fn recipe(group: Group, outliers: usize) -> Recipe {
    let outliers = Outliers::Count(outliers);
    Recipe { group, outliers, rows_per_scale: 1, ..Recipe::paper() }
}

#[test]
fn ragged_widths_are_padded_to_whole_groups() {
    let plan = &plan_block(&recipe(Group::Size(64), 64), &[site(172)]).unwrap()[0];
    assert_eq!((plan.groups(), plan.width()), (2, 192));
    let order = plan.order(&vec![1.0; 172]);
    assert_eq!(order.iter().filter(|&&channel| channel == -1).count(), 20);
    let row = &plan_block(&recipe(Group::Row, 0), &[site(172)]).unwrap()[0];
    assert_eq!((row.group_size, row.groups()), (176, 1));
}

#[test]
fn automatic_groups_and_outliers_fit_each_site() {
    let sites = [256, 688, 11008].map(site);
    let plan = plan_block(&Recipe::default_recipe(), &sites).unwrap();
    let formats: Vec<_> =
        plan.iter().map(|site| (site.group_size, site.outlier_channels)).collect();
    assert_eq!(formats, [(64, 16), (64, 32), (128, 128)]);
}

#[test]
fn impossible_groups_and_outliers_are_refused() {
    for (group, outliers, part) in [
        (Group::Size(256), 0, "group of 256"),
        (Group::Size(64), 172, "172 outlier"),
        (Group::Row, 500, "500 outlier"),
    ] {
        let error = plan_block(&recipe(group, outliers), &[site(172)]).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn every_format_fits_every_group() {
    for (format, act_bits) in [
        (Codebook::Int, 4),
        (Codebook::Fp4, 4),
        (Codebook::Fp4, 8),
        (Codebook::Fp4, 16),
        (Codebook::Fp4Bnb, 4),
        (Codebook::Fp4Bnb, 8),
    ] {
        for (group, width) in [(Group::Size(16), 181), (Group::Size(48), 197), (Group::Row, 181)] {
            let recipe = Recipe { format, act_bits, ..recipe(group, 5) };
            let site = &plan_block(&recipe, &[site(172)]).unwrap()[0];
            assert_eq!((site.width(), site.linears[0].codebook), (width, format));
            assert_eq!(site.codebook, if act_bits == 4 { format } else { Codebook::Int });
            site.format(site.order(&[1.0; 172])).check().unwrap();
            let linear = &site.linears[0];
            let specs = crate::checkpoint::linear::specs("p", linear.rows, &site.weights(linear));
            let bytes: u64 = specs.iter().map(crate::checkpoint::TensorSpec::bytes).sum();
            assert_eq!(site.bits_and_weights().0, 8 * bytes + 32 * width as u64);
        }
    }
}

#[test]
fn formats_that_do_not_go_together_are_refused() {
    let sound = |site: &SitePlan| site.check().map_err(|error| error.to_string());
    let recipe = Recipe { format: Codebook::Fp4Bnb, ..recipe(Group::Size(64), 0) };
    let plan = plan_block(&recipe, &[site(172)]).unwrap().remove(0);
    assert_eq!(sound(&plan), Ok(()));
    let mut eight = plan.clone();
    eight.linears[0].bits = 8;
    assert!(sound(&eight).unwrap_err().contains("no fp4-bnb codes of 8 bits"));
    let mut mixed = plan.clone();
    mixed.linears[0].codebook = Codebook::Int;
    assert!(sound(&mixed).unwrap_err().contains("feed weights of another format"));
    // A linear that is left alone takes any activations.
    mixed.linears[0].bits = 16;
    assert_eq!(sound(&mixed), Ok(()));
}

#[test]
fn a_plan_without_formats_is_one_of_integers() {
    let plan = plan_block(&recipe(Group::Size(64), 0), &[site(172)]).unwrap();
    let mut json = serde_json::to_value(&plan).unwrap();
    for object in [0, 1] {
        let site = &mut json[0];
        let object = if object == 0 { site } else { &mut site["linears"][0] };
        assert_eq!(object.as_object_mut().unwrap().remove("format").unwrap(), "int");
    }
    assert_eq!(serde_json::from_value::<BlockPlan>(json).unwrap(), plan);
}

#[test]
fn bits_count_scales_outliers_and_order() {
    let plan = plan_block(&recipe(Group::Size(64), 64), &[site(192)]).unwrap();
    // A row: 128 codes of 4 bits, 2 scales, 64 INT8 outliers with a scale; the order once.
    let bits = 8 * (128 * 4 + 2 * 16 + 64 * 8 + 16) + 192 * 32;
    assert_eq!(bits_per_weight(&[plan]), f64::from(bits) / f64::from(8 * 192));
}
