use super::*;
use crate::bench::GEMM_MODELS;

fn settings() -> GemmSettings {
    GemmSettings {
        models: vec![GEMM_MODELS[0]],
        tokens: vec![1, 64],
        group_size: 128,
        outliers: 128,
        codebook: Codebook::Int,
        bits: 4,
        act_bits: 4,
    }
}

#[test]
fn the_least_bytes_are_codes_scales_outliers_and_results() {
    let (site, weights) = settings().formats(4096).unwrap();
    let bytes = least_bytes(&site, &weights, Product { m: 3, n: 100, k: 4096 });
    // 31 groups of 64 bytes and a scale, 128 outliers and theirs.
    let row = 31 * (64 + 2) + 128 + 2;
    assert_eq!(bytes, 103 * row + 2 * 300);
    let wide = GemmSettings { bits: 8, outliers: 0, ..settings() };
    let (site, weights) = wide.formats(4096).unwrap();
    assert_eq!(least_bytes(&site, &weights, Product { m: 0, n: 1, k: 4096 }), 4096 + 64);
}

#[test]
fn formats_that_there_are_not_are_wrong_usage() {
    for (wrong, part) in [
        (GemmSettings { bits: 5, ..settings() }, "5 bits"),
        (GemmSettings { bits: 3, act_bits: 16, ..settings() }, "16 bits"),
        (GemmSettings { group_size: 17, ..settings() }, "17"),
        (GemmSettings { outliers: 4096, ..settings() }, "leave nothing"),
    ] {
        let error = wrong.formats(4096).unwrap_err();
        assert_eq!(error.kind(), crate::Kind::Usage);
        assert!(error.message().contains(part), "{error}");
    }
    let fp4 = GemmSettings { codebook: Codebook::Fp4, act_bits: 8, ..settings() };
    let (site, weights) = fp4.formats(4096).unwrap();
    assert_eq!(
        (site.row.numbers.codebook, weights.row.numbers.codebook),
        (Codebook::Int, Codebook::Fp4)
    );
}

#[test]
fn ratios_are_of_times_and_a_chart_has_a_line_a_linear() {
    let times = |m, ours| Times {
        product: Product { m, n: 1000, k: 500 },
        ours,
        library: [Some(4e-6), None, Some(1e-6)],
        read: Some(1e-6),
    };
    let rows: Vec<GemmRow> = [("a", 1, 2e-6), ("a", 2, 1e-6), ("b", 1, 4e-6)]
        .map(|(name, m, ours)| times(m, ours).row(name))
        .into();
    assert_eq!((rows[0].us, rows[0].vs_fp16, rows[0].vs_int8), (2.0, Some(2.0), None));
    assert_eq!((rows[0].vs_fp8, rows[0].read_share), (Some(0.5), Some(0.5)));
    assert!((rows[0].tflops - 0.5).abs() < 1e-9);
    let facts = [("format".to_owned(), json!("w4a4"))].into_iter().collect();
    let outcome = GemmOutcome { rows, facts };
    assert_eq!(outcome.outcome().rows.len(), 3);
    assert_eq!(outcome.chart().svg().matches("<polyline").count(), 2);
}

#[test]
fn products_are_measured_against_their_baselines() {
    let test = "products_are_measured_against_their_baselines";
    let Some(cuda) = crate::backend::cuda::device_of_tests(test) else { return };
    let linears: &[(&str, usize, usize)] = &[("small", 512, 320)];
    let models = vec![GemmModel { name: "test", linears }];
    for (codebook, act_bits, outliers) in [(Codebook::Int, 4, 64), (Codebook::Fp4, 8, 0)] {
        let settings = GemmSettings {
            models: models.clone(),
            group_size: 64,
            codebook,
            act_bits,
            outliers,
            ..settings()
        };
        let outcome = gemm(&cuda, &settings, &crate::progress::Silent).unwrap();
        assert_eq!(outcome.rows.len(), 2);
        for row in &outcome.rows {
            assert!(row.us > 0.0 && row.vs_fp16.is_some() && row.read_share.is_some(), "{row:?}");
        }
    }
}
