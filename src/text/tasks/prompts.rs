/*! A row of a data set -> a question, in the words of lm-evaluation-harness's templates. */

use serde_json::Value;

use super::python_text::{capitalize, is_space, without_brackets};
use super::{Choice, Question, Template};
use crate::{Error, Result};

/// The question of a row.
pub(super) fn question(template: Template, row: &Value) -> Result<Question> {
    match template {
        Template::Piqa => piqa(row),
        Template::Arc => arc(row),
        Template::BoolQ => boolq(row),
        Template::HellaSwag => hellaswag(row),
        Template::WinoGrande => winogrande(row),
        Template::Lambada => lambada(row),
    }
}

/// `goal, sol1, sol2, label`, or `query, choices, gold`.
fn piqa(row: &Value) -> Result<Question> {
    if row.get("query").is_some() {
        return ready_made(row);
    }
    let choices = vec![text(row, "sol1")?.to_owned(), text(row, "sol2")?.to_owned()];
    let context = format!("Question: {}\nAnswer:", text(row, "goal")?);
    answers(&context, &choices, number(row, "label")?)
}

/// `question, choices {text, label}, answerKey`, or `query, choices, gold`.
fn arc(row: &Value) -> Result<Question> {
    if row.get("query").is_some() {
        return ready_made(row);
    }
    let choices = row.get("choices").unwrap_or(&Value::Null);
    let (texts, labels) = (texts(choices, "text")?, texts(choices, "label")?);
    let key = text(row, "answerKey")?;
    let gold = labels.iter().position(|label| label == key).ok_or_else(|| {
        Error::input(format!("`answerKey` is `{key}`, which is none of the labels {labels:?}"))
    })?;
    let context = format!("Question: {}\nAnswer:", text(row, "question")?);
    answers(&context, &texts, gold)
}

/// `passage, question, label`.
fn boolq(row: &Value) -> Result<Question> {
    let (passage, asked) = (text(row, "passage")?, text(row, "question")?);
    let gold = match row.get("label") {
        Some(Value::Bool(yes)) => usize::from(*yes),
        _ => number(row, "label")?,
    };
    let context = format!("{passage}\nQuestion: {asked}?\nAnswer:");
    answers(&context, &["no".to_owned(), "yes".to_owned()], gold)
}

/// `activity_label, ctx_a, ctx_b, endings, label`, or `query, choices, gold`.
fn hellaswag(row: &Value) -> Result<Question> {
    if row.get("query").is_some() {
        let choices = texts(row, "choices")?;
        return answers(text(row, "query")?, &choices, number(row, "gold")?);
    }
    let context = format!("{} {}", text(row, "ctx_a")?, capitalize(text(row, "ctx_b")?));
    let context = tidy(&format!("{}: {context}", text(row, "activity_label")?));
    let endings: Vec<String> = texts(row, "endings")?.iter().map(|text| tidy(text)).collect();
    answers(&context, &endings, number(row, "label")?)
}

/// HellaSwag's texts without the markup of WikiHow's pages.
fn tidy(text: &str) -> String {
    let text = text.trim_matches(is_space).replace(" [title]", ". ");
    without_brackets(&text).replace("  ", " ")
}

/// `sentence, option1, option2, answer`. Here the contexts differ: each has an option in the sentence's
/// gap, and the end of the sentence is scored.
fn winogrande(row: &Value) -> Result<Question> {
    let sentence = text(row, "sentence")?;
    let (before, after) = sentence
        .split_once('_')
        .ok_or_else(|| Error::input("`sentence` has no gap `_`".to_owned()))?;
    let choice = |option: &str| {
        let option = text(row, option)?;
        Ok::<_, Error>(Choice {
            context: format!("{before}{option}"),
            continuation: format!(" {}", after.trim_matches(is_space)),
            characters: before.chars().count() + option.chars().count(),
        })
    };
    let gold = match text(row, "answer")? {
        "1" => 0,
        "2" => 1,
        other => return Err(Error::input(format!("`answer` is `{other}`, neither 1 nor 2"))),
    };
    Ok(Question { choices: vec![choice("option1")?, choice("option2")?], gold })
}

/// `text`, whose last word is scored, or `context, continuation`.
fn lambada(row: &Value) -> Result<Question> {
    let (context, word) = if row.get("context").is_some() {
        (text(row, "context")?, text(row, "continuation")?)
    } else {
        let text = text(row, "text")?;
        let halves = text.rsplit_once(' ');
        halves.ok_or_else(|| Error::input("`text` has one word only".to_owned()))?
    };
    answers(context, &[word.to_owned()], 0)
}

/// `query, choices, gold`, where the query begins with `Question: ` and may end with a newline.
fn ready_made(row: &Value) -> Result<Question> {
    let query = text(row, "query")?;
    let query = query.strip_suffix('\n').unwrap_or(query);
    answers(&format!("{query}\nAnswer:"), &texts(row, "choices")?, number(row, "gold")?)
}

/// Choices after one context, with a space between.
fn answers(context: &str, choices: &[String], gold: usize) -> Result<Question> {
    if gold >= choices.len() {
        return Err(Error::input(format!(
            "the right choice is number {gold}, counted from 0, of {}",
            choices.len()
        )));
    }
    let choices = choices.iter().map(|choice| Choice {
        context: context.to_owned(),
        continuation: format!(" {choice}"),
        characters: choice.chars().count(),
    });
    Ok(Question { choices: choices.collect(), gold })
}

fn column<'a>(row: &'a Value, name: &str) -> Result<&'a Value> {
    row.get(name).ok_or_else(|| Error::input(format!("there is no `{name}`")))
}

fn text<'a>(row: &'a Value, name: &str) -> Result<&'a str> {
    column(row, name)?.as_str().ok_or_else(|| Error::input(format!("`{name}` is no text")))
}

fn texts(row: &Value, name: &str) -> Result<Vec<String>> {
    let list = column(row, name)?.as_array();
    let list = list.map(|list| list.iter().map(|text| text.as_str().map(str::to_owned)).collect());
    list.flatten().ok_or_else(|| Error::input(format!("`{name}` is no list of texts")))
}

/// A count, which some data sets store as text.
fn number(row: &Value, name: &str) -> Result<usize> {
    let value = column(row, name)?;
    let number = match value.as_str() {
        Some(text) => text.parse().ok(),
        None => value.as_u64().map(|number| number as usize),
    };
    number.ok_or_else(|| Error::input(format!("`{name}` is no choice's number: {value}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parts(question: &Question) -> Vec<(&str, &str)> {
        let choices = question.choices.iter();
        choices.map(|choice| (choice.context.as_str(), choice.continuation.as_str())).collect()
    }

    #[test]
    fn the_hubs_columns_and_a_ready_made_row_are_the_same_question() {
        let hub = json!({"goal": "How?", "sol1": "So.", "sol2": "Thus.", "label": 1});
        let ready = json!({"query": "Question: How?\n", "choices": ["So.", "Thus."], "gold": 1});
        let question = piqa(&hub).unwrap();
        let context = "Question: How?\nAnswer:";
        assert_eq!(parts(&question), [(context, " So."), (context, " Thus.")]);
        assert_eq!((question.gold, question.choices[1].characters), (1, 5));
        assert_eq!(piqa(&ready).unwrap(), question);

        let choices = json!({"text": ["a", "b", "c"], "label": ["1", "2", "3"]});
        let hub = json!({"question": "Which?", "choices": choices, "answerKey": "3"});
        let ready = json!({"query": "Question: Which?", "choices": ["a", "b", "c"], "gold": 2});
        let question = arc(&hub).unwrap();
        assert_eq!(parts(&question)[2], ("Question: Which?\nAnswer:", " c"));
        assert_eq!(arc(&ready).unwrap(), question);

        let hub = json!({"text": "the end of the  story"});
        let ready = json!({"context": "the end of the ", "continuation": "story"});
        assert_eq!(parts(&lambada(&hub).unwrap()), [("the end of the ", " story")]);
        assert_eq!(lambada(&ready).unwrap(), lambada(&hub).unwrap());
    }

    #[test]
    fn passages_gaps_and_endings_are_joined_as_in_the_harness() {
        let row = json!({"passage": "P.", "question": "is it", "label": 1});
        let question = boolq(&row).unwrap();
        let context = "P.\nQuestion: is it?\nAnswer:";
        assert_eq!(parts(&question), [(context, " no"), (context, " yes")]);
        assert_eq!(question.gold, 1);
        let row = json!({"passage": "P.", "question": "is it", "label": false});
        assert_eq!(boolq(&row).unwrap().gold, 0);

        let row = json!({"sentence": "Ann met Eve because _ was late _ .", "option1": "Ann",
            "option2": "Eve", "answer": "2"});
        let question = winogrande(&row).unwrap();
        let before = "Ann met Eve because ";
        assert_eq!(
            parts(&question),
            [
                (&format!("{before}Ann")[..], " was late _ ."),
                (&format!("{before}Eve")[..], " was late _ .")
            ]
        );
        assert_eq!(question.gold, 1);

        let row = json!({"activity_label": "Baking", "ctx_a": "A man  stands.", "ctx_b": "HE",
            "endings": [" [step] stirs.  ", "cake [title] Bake"], "label": "1"});
        let question = hellaswag(&row).unwrap();
        let context = "Baking: A man stands. He";
        assert_eq!(parts(&question), [(context, "  stirs."), (context, " cake. Bake")]);
        assert_eq!(question.gold, 1);
    }

    #[test]
    fn a_row_that_is_no_question_is_refused_by_its_column() {
        for (template, row, message) in [
            (Template::Piqa, json!({"goal": "a", "sol1": "b"}), "there is no `sol2`"),
            (
                Template::Arc,
                json!({"query": "a", "choices": "b", "gold": 0}),
                "`choices` is no list",
            ),
            (
                Template::Arc,
                json!({"query": "a", "choices": ["b"], "gold": 1}),
                "number 1, counted",
            ),
            (
                Template::BoolQ,
                json!({"passage": "a", "question": 1, "label": 0}),
                "`question` is no",
            ),
            (
                Template::HellaSwag,
                json!({"query": "a", "choices": ["b"], "gold": "x"}),
                "`gold` is no",
            ),
            (Template::WinoGrande, json!({"sentence": "no gap"}), "has no gap"),
            (Template::Lambada, json!({"text": "word"}), "one word only"),
            (
                Template::Arc,
                json!({"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "E"}),
                "none of the labels",
            ),
        ] {
            let error = question(template, &row).unwrap_err();
            assert!(error.message().contains(message), "{error}");
            assert_eq!(error.kind(), crate::Kind::Input);
        }
    }
}
