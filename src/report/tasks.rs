/*! The report of `atom eval-tasks`. */

use super::Report;
use super::layout::{Facts, Side, Table};
use crate::eval::TasksOutcome;
use crate::units;

impl Report for TasksOutcome {
    fn text(&self) -> String {
        let normed = self.tasks.iter().any(|task| task.acc_norm.is_some());
        let perplexities = self.tasks.iter().any(|task| task.perplexity.is_some());
        let mut columns = vec![("task", Side::Left), ("rows", Side::Right), ("acc", Side::Right)];
        columns.extend(normed.then_some(("acc_norm", Side::Right)));
        columns.extend(perplexities.then_some(("perplexity", Side::Right)));
        let mut table = Table::new(columns);
        for task in &self.tasks {
            let mut cells = vec![
                task.task.clone(),
                units::count(task.rows),
                with_error(Some(task.acc), Some(task.acc_stderr)),
            ];
            if normed {
                cells.push(with_error(task.acc_norm, task.acc_norm_stderr));
            }
            if perplexities {
                cells.push(with_error(task.perplexity, task.perplexity_stderr));
            }
            table.row(cells);
        }
        let mut facts = Facts::default();
        facts.add("model", &self.model);
        facts.add(
            "texts",
            format!(
                "{} of {} tokens, {} computed",
                units::count(self.texts),
                units::count(self.text_tokens),
                units::count(self.tokens)
            ),
        );
        facts.add("speed", format!("{:.1} rows/s", self.rows_per_second));
        facts.add("time", units::seconds(self.seconds));
        facts.add("device", &self.device);
        format!("{}\n{}", table.text(), facts.text())
    }
}

/// `0.5412 ± 0.0102`, or `-` where there is nothing.
fn with_error(value: Option<f64>, error: Option<f64>) -> String {
    match (value, error) {
        (Some(value), Some(error)) if error.is_finite() => format!("{value:.4} ± {error:.4}"),
        (Some(value), _) => format!("{value:.4}"),
        (None, _) => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::TaskOutcome;

    fn outcome() -> TasksOutcome {
        let task = TaskOutcome {
            task: "arc_easy".into(),
            file: "tasks/arc_easy.jsonl".into(),
            rows: 2376,
            acc: 0.5412,
            acc_stderr: 0.01022,
            acc_norm: Some(0.4912),
            acc_norm_stderr: Some(0.01026),
            perplexity: None,
            perplexity_stderr: None,
        };
        let words = TaskOutcome {
            task: "lambada".into(),
            rows: 1,
            acc: 1.0,
            acc_stderr: f64::NAN,
            acc_norm: None,
            acc_norm_stderr: None,
            perplexity: Some(12.5),
            perplexity_stderr: Some(f64::NAN),
            ..task.clone()
        };
        TasksOutcome {
            model: "SmolLM2".into(),
            tasks: vec![task, words],
            texts: 9505,
            text_tokens: 300_000,
            tokens: 130_000,
            seconds: 60.0,
            rows_per_second: 39.6,
            cpu_seconds: 118.0,
            device: "cpu (avx512, 2 threads)".into(),
            samples: Vec::new(),
        }
    }

    #[test]
    fn a_task_is_a_line_with_its_errors() {
        assert_eq!(
            outcome().text(),
            "\
task       rows              acc         acc_norm  perplexity
arc_easy  2 376  0.5412 ± 0.0102  0.4912 ± 0.0103           -
lambada       1           1.0000                -     12.5000

model   SmolLM2
texts   9 505 of 300 000 tokens, 130 000 computed
speed   39.6 rows/s
time    60.0 s
device  cpu (avx512, 2 threads)
"
        );
    }

    #[test]
    fn columns_that_no_task_has_are_left_out() {
        let mut outcome = outcome();
        outcome.tasks.pop();
        outcome.tasks[0].acc_norm = None;
        assert!(outcome.text().starts_with("task       rows              acc\narc_easy  2 376"));
    }

    #[test]
    fn what_there_is_not_is_null() {
        let json = serde_json::to_value(outcome()).unwrap();
        assert!(json["tasks"][1]["acc_stderr"].is_null() && json["tasks"][1]["acc_norm"].is_null());
        assert!(json.get("samples").is_none());
    }
}
