/*! Zero-shot tasks: rows of a task's file -> questions with the texts that are scored.

Prompts, choices and metrics are those of lm-evaluation-harness 0.4.13, so that its numbers can be
compared with ours. [`TASKS`] is the only list of tasks; [`prompts`](self) turns a row into a
[`Question`], from the columns of the Hub's data set or from a ready-made question. */

mod pair;
mod prompts;
mod python_text;
mod source;

pub use pair::ScoredText;
pub use source::{TaskFile, TaskRows};

use crate::{Error, Result};

/// What makes an answer right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// The argmax over the choices is the right one.
    Accuracy,
    /// The same, and also with each choice's log likelihood divided by its length in characters.
    AccuracyAndNormalized,
    /// Every token of the continuation is the argmax; and the perplexity of continuations.
    LastWord,
}

/// A task.
#[derive(Debug)]
pub struct Task {
    /// Its name, as lm-evaluation-harness has it.
    pub name: &'static str,
    /// The data set's repository on the Hub.
    pub repo: &'static str,
    /// Its configuration there.
    pub config: &'static str,
    /// Its split.
    pub split: &'static str,
    /// What is measured.
    pub measure: Measure,
    template: Template,
}

/// The template that turns a row into a question.
#[derive(Clone, Copy, Debug)]
enum Template {
    Piqa,
    Arc,
    BoolQ,
    HellaSwag,
    WinoGrande,
    Lambada,
}

/// All tasks.
pub const TASKS: [Task; 7] = [
    Task {
        name: "piqa",
        repo: "ybisk/piqa",
        config: "plain_text",
        split: "validation",
        measure: Measure::AccuracyAndNormalized,
        template: Template::Piqa,
    },
    Task {
        name: "arc_easy",
        repo: "allenai/ai2_arc",
        config: "ARC-Easy",
        split: "test",
        measure: Measure::AccuracyAndNormalized,
        template: Template::Arc,
    },
    Task {
        name: "arc_challenge",
        repo: "allenai/ai2_arc",
        config: "ARC-Challenge",
        split: "test",
        measure: Measure::AccuracyAndNormalized,
        template: Template::Arc,
    },
    Task {
        name: "boolq",
        repo: "aps/super_glue",
        config: "boolq",
        split: "validation",
        measure: Measure::Accuracy,
        template: Template::BoolQ,
    },
    Task {
        name: "hellaswag",
        repo: "Rowan/hellaswag",
        config: "default",
        split: "validation",
        measure: Measure::AccuracyAndNormalized,
        template: Template::HellaSwag,
    },
    Task {
        name: "winogrande",
        repo: "allenai/winogrande",
        config: "winogrande_xl",
        split: "validation",
        measure: Measure::Accuracy,
        template: Template::WinoGrande,
    },
    Task {
        name: "lambada",
        repo: "EleutherAI/lambada_openai",
        config: "default",
        split: "test",
        measure: Measure::LastWord,
        template: Template::Lambada,
    },
];

/// A question: texts, one of which is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// One text for each choice.
    pub choices: Vec<Choice>,
    /// The right choice's number.
    pub gold: usize,
}

impl Question {
    /// Bytes of all its texts.
    fn bytes(&self) -> usize {
        let choices = self.choices.iter();
        choices.map(|choice| choice.context.len() + choice.continuation.len()).sum()
    }
}

/// A text whose end is scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The text before it.
    pub context: String,
    /// The scored text.
    pub continuation: String,
    /// The choice's own length in characters, which its log likelihood is divided by.
    pub characters: usize,
}

impl Task {
    /// The task of this name; `lambada_openai` is `lambada`.
    ///
    /// # Errors
    /// Wrong usage, with the known names.
    pub fn named(name: &str) -> Result<&'static Self> {
        let wanted = if name == "lambada_openai" { "lambada" } else { name };
        TASKS.iter().find(|task| task.name == wanted).ok_or_else(|| {
            let names: Vec<&str> = TASKS.iter().map(|task| task.name).collect();
            Error::usage(format!("there is no task `{name}`"))
                .hint(format!("the tasks are {}", names.join(", ")))
        })
    }

    /// The data set's file on the Hub, as the Hub converts it to Parquet.
    fn hub_file(&self) -> String {
        format!("{}/{}/0000.parquet", self.config, self.split)
    }

    /// The question of a row.
    ///
    /// # Errors
    /// Bad input: a column that is missing or holds something else.
    pub fn question(&self, row: &serde_json::Value) -> Result<Question> {
        prompts::question(self.template, row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_found_by_their_names() {
        for task in &TASKS {
            assert_eq!(Task::named(task.name).unwrap().name, task.name);
        }
        assert_eq!(Task::named("lambada_openai").unwrap().name, "lambada");
        let error = Task::named("arc").unwrap_err();
        assert_eq!(error.kind(), crate::Kind::Usage);
        assert!(error.hint_text().unwrap().contains("arc_easy, arc_challenge"));
    }
}
