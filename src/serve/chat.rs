/*! Chat templates: messages -> the text that the model was trained on.

A template is Jinja, in `chat_template.jinja` or in `tokenizer_config.json`. It sees what transformers gives it: `messages`,
`add_generation_prompt`, the special tokens by name, `raise_exception`, `strftime_now` and `tojson`; blocks are trimmed, and
methods of Python's texts, lists and dictionaries work. Nobody has checked a downloaded template, so its steps are counted. */

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as JinjaValue};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, context};
use serde::Serialize;
use serde_json::Value;

use crate::network::Model;
use crate::{Error, Result};

const TEMPLATE_FILE: &str = "chat_template.jinja";
const CONFIG_FILE: &str = "tokenizer_config.json";
/// Name of the template in a template's environment.
const NAME: &str = "chat";
/// Steps that a template may take: far more than the longest ones with a thousand messages do.
const FUEL: u64 = 10_000_000;
/// Tokens that templates know by name.
const SPECIAL_TOKENS: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sets the stage.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// The chat template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// What messages call the file that it comes from.
    path: String,
    special_tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// The template of a model.
    ///
    /// # Errors
    /// Input: it has none, or one that is no Jinja.
    pub fn of(model: &Model) -> Result<Self> {
        let config = match model.file(CONFIG_FILE)? {
            Some(content) => serde_json::from_slice(&content).map_err(|error| {
                let path = model.path_of(CONFIG_FILE);
                Error::input(format!("{path} is not readable JSON: {error}"))
                    .hint("download the file again")
            })?,
            None => Value::Null,
        };
        let (source, path) = match model.file(TEMPLATE_FILE)? {
            Some(content) => {
                let path = model.path_of(TEMPLATE_FILE);
                let text = String::from_utf8(content.into_owned()).map_err(|_| {
                    Error::input(format!("{path} is not UTF-8")).hint("download the file again")
                })?;
                (Some(text), path)
            }
            None => (template_of(&config), model.path_of(CONFIG_FILE)),
        };
        let source = source.ok_or_else(|| {
            Error::input(format!("{} has no chat template", model.name())).hint(
                "a base model has none: leave out --chat, or take the model's instruction-tuned variant",
            )
        })?;
        Self::new(source, path, &config)
    }

    /// A template of this source. `config` names the special tokens.
    fn new(source: String, path: String, config: &Value) -> Result<Self> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.expect("the delimiters are Jinja's own");
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        let source = without_generation_tags(&source);
        environment.add_template_owned(NAME, source).map_err(|error| {
            Error::input(shown(&error))
                .context(format!("the chat template of {path} cannot be read"))
                .hint("leave out --chat and write the model's own format into the prompt")
        })?;
        let token = |name: &'static str| {
            let value = config.get(name)?;
            // Older files hold an object.
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((name, text.to_owned()))
        };
        let special_tokens = SPECIAL_TOKENS.into_iter().filter_map(token).collect();
        Ok(Self { environment, path, special_tokens })
    }

    /// The text of a conversation up to where the model speaks next.
    ///
    /// # Errors
    /// Input: what the template refuses, such as a system message that it does not know.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let template = self.environment.get_template(NAME).expect("it was added");
        let tokens = self.special_tokens.iter().map(|(name, text)| (*name, text.as_str()));
        let tokens = JinjaValue::from_pairs(tokens);
        let context = context! {
            messages => Serde(messages),
            add_generation_prompt => true,
            ..tokens
        };
        template.render(context).map_err(|error| {
            Error::input(shown(&error))
                .context(format!("the chat template of {} refuses this conversation", self.path))
                .hint("change the messages (some templates take no --system), or leave out --chat")
        })
    }
}

/// `chat_template` of a configuration: a text, or a list of named ones, of which `default` is meant.
fn template_of(config: &Value) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            default.or(named.first())?.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// The template without `generation` tags, which mark the model's words for training and print nothing.
fn without_generation_tags(source: &str) -> String {
    let mut rest = source;
    let mut text = String::with_capacity(source.len());
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}").map(|end| end + 2) else { break };
        let inner = rest[start + 2..start + length - 2].trim_matches(['-', '+']).trim();
        let end = start + length;
        if matches!(inner, "generation" | "endgeneration") {
            // An `if` that prints as little, with the same trimming around it.
            let tag = &rest[start..end];
            text.push_str(&rest[..start]);
            text.push_str(&match inner {
                "generation" => tag.replace("generation", "if true"),
                _ => tag.replace("endgeneration", "endif"),
            });
        } else {
            text.push_str(&rest[..end]);
        }
        rest = &rest[end..];
    }
    text.push_str(rest);
    text
}

/// An error with its causes, the first of which says the most.
fn shown(error: &minijinja::Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps".to_owned(),
        _ => {
            let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
            let line = error.line().map(|line| format!(" (line {line})"));
            format!("{detail}{}", line.unwrap_or_default())
        }
    }
}

fn raise_exception(message: String) -> std::result::Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// `strftime` of the day that it is (UTC), with the directives that templates use.
fn strftime_now(format: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    strftime(format, now)
}

fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] =
        ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut text = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        match letters.next() {
            Some('Y') => text += &year.to_string(),
            Some('y') => text += &format!("{:02}", year % 100),
            Some('m') => text += &format!("{month:02}"),
            Some('d') => text += &format!("{day:02}"),
            Some('e') => text += &format!("{day:2}"),
            Some('B') => text += month_name,
            Some('b') => text += &month_name[..3],
            Some('A') => text += day_name,
            Some('a') => text += &day_name[..3],
            Some('H') => text += &format!("{:02}", second / 3600),
            Some('M') => text += &format!("{:02}", second / 60 % 60),
            Some('S') => text += &format!("{:02}", second % 60),
            Some('%') => text.push('%'),
            Some(other) => text.extend(['%', other]),
            None => text.push('%'),
        }
    }
    text
}

/// Year, month and day, days after 1970-01-01 (the Gregorian calendar's cycle of 400 years).
fn date(days: u64) -> (u64, u64, u64) {
    // Years begin in March, so that the leap day is their last.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (400 * era + year + u64::from(month <= 2), month, day)
}

/// JSON as Python's `json.dumps(ensure_ascii=False)` writes it: spaces after commas and colons, nothing escaped for HTML.
fn to_json(value: JinjaValue, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let wrong = |error: serde_json::Error| {
        minijinja::Error::new(ErrorKind::BadSerialization, error.to_string())
    };
    let indent: Option<usize> = options.get("indent")?;
    // `ensure_ascii`, `separators` and `sort_keys` change the form only.
    let json = serde_json::to_value(&value).map_err(wrong)?;
    Ok(match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let mut text = Vec::new();
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            let mut writer = serde_json::Serializer::with_formatter(&mut text, formatter);
            json.serialize(&mut writer).map_err(wrong)?;
            String::from_utf8_lossy(&text).into_owned()
        }
        None => python_json(&json),
    })
}

fn python_json(value: &Value) -> String {
    let joined = |parts: Vec<String>| parts.join(", ");
    match value {
        Value::Array(items) => format!("[{}]", joined(items.iter().map(python_json).collect())),
        Value::Object(fields) => {
            let field = |(key, value): (&String, &Value)| {
                format!("{}: {}", Value::from(key.as_str()), python_json(value))
            };
            format!("{{{}}}", joined(fields.iter().map(field).collect()))
        }
        plain => plain.to_string(),
    }
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
