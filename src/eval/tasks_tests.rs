use serde_json::json;

use super::*;
use crate::backend::cpu::Cpu;
use crate::backend::{Forward, Matrix, Measurement, Memory, Prediction, Quantization};
use crate::hub;
use crate::model::AttentionSpecs;
use crate::network::{OutputHead, Stream};
use crate::progress::Silent;
use crate::text::tasks::{Choice, Task};

const PROSE: &str =
    "The river runs north through a valley of old farms, and in spring it floods the road";

fn rows(task: &'static str, rows: &[serde_json::Value]) -> TaskRows {
    let task = Task::named(task).unwrap();
    let questions = rows.iter().map(|row| task.question(row).unwrap()).collect();
    TaskRows { task, file: "rows.jsonl".into(), questions }
}

/// The continuation's log likelihood from all logits of the text alone, one text at a time.
fn by_itself(model: &Runnable<'_, Cpu>, text: &ScoredText) -> f64 {
    let Runnable { backend, architecture, tensors, .. } = model;
    let inputs = &text.tokens[..text.tokens.len() - 1];
    let attention = AttentionSpecs::of(architecture, model.kv, inputs.len());
    let mut stream =
        Stream::embed(*backend, *tensors, architecture, inputs, inputs.len(), 0).unwrap();
    for index in 0..architecture.blocks {
        let block = model.block(model.load(index).unwrap()).unwrap();
        stream.advance(*backend, &attention, &block, || Ok(())).unwrap();
    }
    let head = OutputHead::load(*backend, *tensors, architecture).unwrap();
    let normed = head.normed(*backend, &stream.batches[0]).unwrap();
    let targets: Vec<(u32, u32)> = (0..).zip(text.tokens[1..].iter().copied()).collect();
    let predictions = backend.predict(&normed, &head.weight, &targets).unwrap();
    let scored = &predictions[predictions.len() - text.scored..];
    -scored.iter().map(|prediction| prediction.nats).sum::<f64>()
}

fn texts(model: &Model, questions: &[Question]) -> Vec<Vec<ScoredText>> {
    let Model::Source(source) = model else { panic!("a source") };
    let tokenizer = Tokenizer::from_bytes(&source.tokenizer().unwrap(), "tiny-llama").unwrap();
    let encode = |choice: &Choice| choice.encode(&tokenizer, 2048, &Silent).unwrap();
    questions.iter().map(|question| question.choices.iter().map(encode).collect()).collect()
}

/// Rows computed once for texts that begin alike, windows filled up to one length, other texts in the batch: none of
/// it may change a bit of any likelihood.
#[test]
fn sharing_and_padding_change_no_bit() {
    let model = Model::Source(hub::tiny_llama().unwrap());
    let cpu = Cpu::new().unwrap();
    let words: Vec<&str> = PROSE.split(' ').collect();
    let question = |length: usize| {
        let choices =
            [" and", " until the bridge is gone", " the", "."].map(|continuation| Choice {
                context: words[..length].join(" "),
                continuation: continuation.to_owned(),
                characters: 1,
            });
        Question { choices: choices.to_vec(), gold: 0 }
    };
    let questions = [3, 17, 5, 9].map(question);
    let texts = texts(&model, &questions);
    let runnable = Runnable::new(&cpu, &model, &Silent).unwrap();
    let (found, computed) = likelihoods(&runnable, &texts, &Silent).unwrap();
    let all: usize = texts.iter().flatten().map(|text| text.tokens.len() - 1).sum();
    assert!(computed < all / 3, "{computed} of {all}");
    for (text, found) in texts.iter().flatten().zip(&found) {
        assert_eq!(found.log, by_itself(&runnable, text));
    }
}

#[test]
fn accuracy_counts_right_answers_by_likelihood_and_by_length() {
    let task =
        rows("arc_easy", &[json!({"query": "Question: a", "choices": ["bb", "c"], "gold": 0})]);
    let found = [(-3.0, false), (-2.0, true)].map(|(log, greedy)| Likelihood { log, greedy });
    let sample = sample(&task, 0, &task.questions[0], &found);
    // -3 / 2 is above -2 / 1.
    assert_eq!((sample.answer, sample.right, sample.right_norm), (1, false, Some(true)));

    let lambada = rows("lambada", &[json!({"text": "a b"}), json!({"text": "c d"})]);
    let samples: Vec<Sample> = [(-1.0, true), (-3.0, false)]
        .iter()
        .enumerate()
        .map(|(row, (log, greedy))| {
            let found = [Likelihood { log: *log, greedy: *greedy }];
            super::sample(&lambada, row, &lambada.questions[row], &found)
        })
        .collect();
    let outcome = outcome(&lambada, &samples);
    assert_eq!((outcome.acc, outcome.acc_norm), (0.5, None));
    // The deviation of 0 and 1, and of 1 and 3, by n - 1, over the root of 2.
    assert!((outcome.acc_stderr - 0.5).abs() < 1e-12);
    let perplexity = 2f64.exp();
    assert!((outcome.perplexity.unwrap() - perplexity).abs() < 1e-12);
    assert!((outcome.perplexity_stderr.unwrap() - perplexity).abs() < 1e-12);
}

#[test]
fn of_equal_choices_the_first_is_the_answer() {
    assert_eq!(greatest([-2.0, -1.0, -1.0].into_iter()), 1);
}

#[test]
fn a_limit_names_the_tasks_that_miss_it() {
    let model = Model::Source(hub::tiny_llama().unwrap());
    let task = rows("lambada", &[json!({"text": "The river runs qqqq"})]);
    let outcome = tasks(&Cpu::new().unwrap(), &model, &[task], &Silent).unwrap();
    assert_eq!(outcome.tasks[0].acc, 0.0);
    assert!(outcome.tasks[0].perplexity.unwrap() > 1.0);
    assert!(check_accuracies(&outcome, |_| Some(0.0)).is_ok());
    assert!(check_accuracies(&outcome, |_| None).is_ok());
    let error = check_accuracies(&outcome, |_| Some(0.1)).unwrap_err();
    assert_eq!(error.message(), "acc 0.0000 of lambada is below --min-acc 0.1");
    assert_eq!(error.kind(), crate::Kind::Check);
}

#[test]
fn the_argmax_is_the_first_of_the_greatest() {
    let cpu = Cpu::new().unwrap();
    // Logits of row r are the head's column r: 3000 tokens, so that they come in parts.
    let mut head = vec![0f32; 3000 * 2];
    for (token, column, logit) in [(1500, 0, 2.0), (2500, 0, 2.0), (7, 1, -1.0)] {
        head[token * 2 + column] = logit;
    }
    let bytes: Vec<u8> = head.iter().flat_map(|value| value.to_le_bytes()).collect();
    let shape = [3000, 2];
    let head =
        crate::checkpoint::Tensor::in_memory("head", crate::checkpoint::Dtype::F32, &shape, &bytes);
    let head = cpu.dense(&cpu.load(head).unwrap(), None).unwrap();
    let data = vec![1.0, 0.0, 0.0, 1.0];
    let x = cpu.upload(Matrix { rows: 2, columns: 2, data }).unwrap();
    let x = cpu.select_rows(&x, &[0, 0, 1, 1]).unwrap();
    let each = cpu.predict(&x, &head, &[(2, 0), (0, 1500), (3, 7), (0, 2500)]).unwrap();
    let in_order = [(0, 1500), (1, 2500), (2, 0), (3, 7)];
    let found = cpu.predict(&x, &head, &in_order).unwrap();
    assert_eq!(each, [2, 0, 3, 1].map(|row| found[row]));
    let argmax: Vec<bool> = found.iter().map(|Prediction { argmax, .. }| *argmax).collect();
    assert_eq!(argmax, [true, false, true, false]);
    let sum = 2998.0 + 2.0 * 2f64.exp();
    assert!((found[0].nats - (sum.ln() - 2.0)).abs() < 1e-6);
    assert!((found[3].nats - ((2999.0 + (-1f64).exp()).ln() + 1.0)).abs() < 1e-6);
}
