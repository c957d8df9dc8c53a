use serde_json::json;

use super::*;
use crate::backend::cuda::tests::device;
use crate::model::Architecture;
use crate::progress::Silent;

fn settings(batch: Batch, directory: &tempfile::TempDir) -> ServeSettings {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 100,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
    });
    let path = directory.path().join("few.json");
    std::fs::write(&path, "[[20, 5], [3, 9], [7, 1], [30, 12], [1, 4]]").unwrap();
    ServeSettings {
        shape: NetworkShape {
            name: "small".to_owned(),
            architecture: Architecture::from_config(&config).unwrap(),
            group_size: 32,
            outliers: 32,
        },
        workload: Workload::named(path.to_str().unwrap()).unwrap(),
        batch,
        memory: 400 << 20,
        equal_batch: Some(3),
        steps: vec![1, 2],
        rows: vec![RowKind::F16, RowKind::W8a8kv8, RowKind::W4a4kv4],
        repeats: 1,
    }
}

fn check(outcome: &ServeOutcome, batch: usize) {
    let chart = outcome.chart();
    // Each row at its own batch and at the common one, and its steps.
    assert_eq!(chart.series.len(), 6);
    assert!(chart.series.iter().all(|series| series.points.len() == 2), "{chart:?}");
    let own = (outcome.own[0].batch as f64, outcome.own[0].run.total_tokens_per_second);
    assert!(chart.series[0].points.contains(&own), "{chart:?}");
    assert!(chart.series.iter().all(|series| series.points[0].0 < series.points[1].0));
    let json = serde_json::to_value(outcome).unwrap();
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3 + 3 + 6);
    assert_eq!((&rows[0]["figure"], &rows[0]["row"]), (&json!("own batch"), &json!("f16")));
    let run = &outcome.own[0].run;
    assert_eq!(rows[0]["ttft_ms_p99"], json!(run.ttft_ms.p99));
    assert_eq!(rows[0]["total_tokens_per_second"], json!(run.total_tokens_per_second));
    assert_eq!((&rows[11]["figure"], &rows[11]["batch"]), (&json!("step"), &json!(2)));
    assert_eq!((outcome.own.len(), outcome.equal.len(), outcome.steps.len()), (3, 3, 3));
    for row in outcome.own.iter().chain(&outcome.equal) {
        assert_eq!((row.run.prompt_tokens, row.run.output_tokens), (61, 31));
        let rate = 92.0 / row.run.seconds;
        assert!((row.run.total_tokens_per_second / rate - 1.0).abs() < 1e-9);
        assert!(row.run.ttft_ms.median > 0.0 && row.run.tpot_ms.p99 >= row.run.tpot_ms.median);
        assert!((0.0..=1.0).contains(&row.run.drain) && (0.0..=1.0).contains(&row.run.ramp));
    }
    assert!(outcome.own.iter().all(|row| row.batch == batch));
    assert!(outcome.equal.iter().all(|row| row.batch == 3));
    assert_eq!((outcome.own[0].speedup, outcome.equal[0].speedup), (1.0, 1.0));
    for (_, steps) in &outcome.steps {
        assert!(steps.iter().all(|step| step.ms > 0.0), "{steps:?}");
        assert_eq!(steps.iter().map(|step| step.batch).collect::<Vec<_>>(), [1, 2]);
    }
}

#[test]
fn every_request_is_served_in_every_row() {
    let directory = tempfile::tempdir().unwrap();
    let settings = settings(Batch::Of(2), &directory);
    let cpu = Cpu::new().unwrap();
    check(&serve(&cpu, &settings, &Silent).unwrap(), 2);
    for batch in [Batch::Auto, Batch::Max] {
        let refused = serve(&cpu, &ServeSettings { batch, ..settings.clone() }, &Silent);
        assert_eq!(refused.err().unwrap().kind(), crate::Kind::Usage);
    }
    let mut shape = settings.shape.clone();
    shape.outliers = 96;
    assert_eq!(shape.check().unwrap_err().kind(), crate::Kind::Usage);
}

#[test]
fn a_gpu_serves_within_its_memory() {
    let Some(cuda) = device("a_gpu_serves_within_its_memory") else { return };
    let directory = tempfile::tempdir().unwrap();
    let settings = |batch| settings(batch, &directory);
    let outcome = serve(&cuda, &settings(Batch::Of(2)), &Silent).unwrap();
    check(&outcome, 2);
    assert!(outcome.own.iter().all(|row| row.peak_bytes.unwrap() <= 400 << 20));
    let too_many = serve(&cuda, &settings(Batch::Of(1 << 17)), &Silent);
    assert!(too_many.err().unwrap().message().contains("has room for"));
}

#[test]
fn a_batch_follows_from_the_memory_of_a_gpu() {
    let Some(cuda) = device("a_batch_follows_from_the_memory_of_a_gpu") else { return };
    let directory = tempfile::tempdir().unwrap();
    let outcome = serve(&cuda, &settings(Batch::Auto, &directory), &Silent).unwrap();
    assert!(outcome.own.iter().all(|row| row.batch.is_power_of_two() && row.batch > 64));
}
