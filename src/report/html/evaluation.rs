/*! What a model is worth: perplexity by text, accuracy by task. */

use super::chart::{Bar, bars};
use super::page::{caption, table, text};
use super::results::{Outcome, Task, Tasks};
use super::{Figure, Page, Shown};
use crate::units;

/// Perplexity of one model on one text.
struct Measured {
    text: String,
    model: String,
    /// Whether it is the source of what was quantized.
    is_source: bool,
    value: f64,
    error: Option<f64>,
}

/// All that was measured, by text in the order of the results.
fn measured(shown: Option<&Shown>, outcomes: &[Outcome]) -> Vec<Measured> {
    let source_name = shown.map(|shown| shown.manifest.source.name.as_str());
    let windows = |dataset: &str, windows: usize, seq_len: usize| {
        format!("{dataset}, {} of {seq_len} tokens", units::counted(windows, "window"))
    };
    let mut all = Vec::new();
    let mut add = |text: &str, model: &str, is_source, value, error| {
        let [text, model] = [text, model].map(str::to_owned);
        all.push(Measured { text, model, is_source, value, error });
    };
    for outcome in outcomes {
        match outcome {
            Outcome::Quantized(run) => {
                let Some(change) = &run.perplexity else { continue };
                let text = windows(&change.dataset, change.windows, change.seq_len);
                add(&text, "source", true, change.before, None);
                add(&text, "quantized", false, change.after, None);
            }
            Outcome::Verified(verified) => {
                let text = "the text of the verification";
                if let Some(value) = verified.reference_perplexity {
                    add(text, "reference", true, value, None);
                }
                if let Some(value) = verified.perplexity {
                    add(text, "quantized", false, value, None);
                }
            }
            Outcome::Perplexity(found) => {
                let text = windows(&found.dataset, found.windows, found.seq_len);
                let is_source = Some(found.model.as_str()) == source_name;
                add(&text, &found.model, is_source, found.perplexity, found.standard_error);
            }
            Outcome::Tasks(_) | Outcome::Bench(_) => {}
        }
    }
    all
}

/// The texts of measurements, each once.
fn texts(measured: &[Measured]) -> Vec<&str> {
    let mut texts: Vec<&str> = Vec::new();
    for one in measured {
        if !texts.contains(&one.text.as_str()) {
            texts.push(&one.text);
        }
    }
    texts
}

/// How a text's one result compares with its one source.
fn change(measured: &[Measured], text: &str) -> Option<(f64, f64)> {
    let on_text = || measured.iter().filter(|one| one.text == text);
    let source = on_text().find(|one| one.is_source)?;
    let result = on_text().find(|one| !one.is_source)?;
    Some((source.value, result.value))
}

pub(super) fn figures(page: &mut Page, shown: Option<&Shown>, outcomes: &[Outcome]) {
    let measured = measured(shown, outcomes);
    let texts = texts(&measured);
    let Some(first) = texts.first() else { return };
    let figure = match change(&measured, first) {
        Some((before, after)) => Figure {
            label: "perplexity",
            value: format!("{after:.2}"),
            note: format!("{} from {before:.2}", units::change(after / before)),
        },
        None => Figure {
            label: "perplexity",
            value: format!("{:.2}", measured[0].value),
            note: measured[0].text.clone(),
        },
    };
    page.figures.push(figure);
}

pub(super) fn sections(page: &mut Page, shown: Option<&Shown>, outcomes: &[Outcome]) {
    let measured = measured(shown, outcomes);
    let charts: String = texts(&measured).iter().map(|text| on_text(&measured, text)).collect();
    page.section("Perplexity", charts);
    let tasks: Vec<&Tasks> = outcomes
        .iter()
        .filter_map(|outcome| match outcome {
            Outcome::Tasks(tasks) => Some(tasks),
            _ => None,
        })
        .collect();
    page.section("Zero-shot tasks", accuracies(&tasks));
    page.section("Runs of the measurements", speeds(outcomes));
}

fn on_text(measured: &[Measured], name: &str) -> String {
    let on_text = measured.iter().filter(|one| one.text == name);
    let chart: Vec<Bar> = on_text
        .map(|one| Bar {
            label: one.model.clone(),
            value: one.value,
            shown: with_error(one.value, one.error, 3),
            error: one.error,
            class: if one.is_source { "one" } else { "two" },
        })
        .collect();
    let words = match change(measured, name) {
        Some((before, after)) => format!("{}. Less is better.", units::change(after / before)),
        None => "Less is better.".to_owned(),
    };
    format!("<h3>{}</h3>\n{}{}", text(name), bars(&chart, None), caption(&text(&words)))
}

fn with_error(value: f64, error: Option<f64>, digits: usize) -> String {
    match error.filter(|error| error.is_finite()) {
        Some(error) => format!("{value:.digits$} \u{b1} {error:.digits$}"),
        None => format!("{value:.digits$}"),
    }
}

/// Accuracies of each task, of one or several models.
fn accuracies(results: &[&Tasks]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for task in results.iter().flat_map(|result| &result.tasks) {
        if !names.contains(&task.task.as_str()) {
            names.push(&task.task);
        }
    }
    let mut html = String::new();
    for name in &names {
        let chart: Vec<Bar> =
            [ACC, ACC_NORM].iter().flat_map(|measure| task_bars(results, name, measure)).collect();
        html += &format!("<h3>{}</h3>\n{}", text(name), bars(&chart, Some(1.0)));
    }
    if html.is_empty() {
        return html;
    }
    html + &perplexities(results)
        + &caption("Whiskers are one standard error to each side; bars end at 1.")
}

/// What a task measures: its name, and where its value and standard error are.
type Measure = (&'static str, fn(&Task) -> Option<f64>, fn(&Task) -> Option<f64>);

const ACC: Measure = ("acc", |task| Some(task.acc), |task| task.acc_stderr);
const ACC_NORM: Measure = ("acc_norm", |task| task.acc_norm, |task| task.acc_norm_stderr);

/// One measure of a task, a bar for each model that was asked.
fn task_bars(results: &[&Tasks], name: &str, (measure, value, error): &Measure) -> Vec<Bar> {
    let several = results.len() > 1;
    let bar = |(index, result): (usize, &&Tasks)| {
        let task = result.tasks.iter().find(|task| task.task == name)?;
        let (value, error) = (value(task)?, error(task));
        let prefix = if several { format!("{}: ", result.model) } else { String::new() };
        Some(Bar {
            label: format!("{prefix}{measure} of {} rows", units::count(task.rows)),
            value,
            shown: with_error(value, error, 4),
            error,
            class: if several && index == 0 { "one" } else { "two" },
        })
    };
    results.iter().enumerate().filter_map(bar).collect()
}

/// Tasks that measure a perplexity as well.
fn perplexities(results: &[&Tasks]) -> String {
    let rows: Vec<Vec<String>> = results
        .iter()
        .flat_map(|result| result.tasks.iter().map(|task| (&result.model, task)))
        .filter_map(|(model, task)| {
            let value = with_error(task.perplexity?, task.perplexity_stderr, 3);
            Some(vec![text(&task.task), text(model), text(&value)])
        })
        .collect();
    table(&[("task", false), ("model", false), ("perplexity", true)], &rows)
}

/// Where measurements ran, and how fast.
fn speeds(outcomes: &[Outcome]) -> String {
    let row = |what: String, model: &str, seconds: f64, speed: String, device: &str| {
        vec![text(&what), text(model), text(&units::seconds(seconds)), text(&speed), text(device)]
    };
    let rows: Vec<Vec<String>> = outcomes
        .iter()
        .filter_map(|outcome| match outcome {
            Outcome::Perplexity(found) => Some(row(
                format!("perplexity on {}", found.dataset),
                &found.model,
                found.seconds,
                format!("{:.1} tokens/s", found.tokens_per_second),
                &found.device,
            )),
            Outcome::Tasks(found) => {
                let names: Vec<&str> = found.tasks.iter().map(|task| task.task.as_str()).collect();
                Some(row(
                    names.join(", "),
                    &found.model,
                    found.seconds,
                    String::new(),
                    &found.device,
                ))
            }
            _ => None,
        })
        .collect();
    let headings =
        [("measured", false), ("model", false), ("time", true), ("speed", true), ("device", false)];
    table(&headings, &rows)
}
