/*! The YAML between two lines of `---` with which a model card begins: what of it another card takes over, and values written
so that every reader of YAML reads them back.

The parser's events are read and no tree is built: aliases are never expanded, and a text stays a text (`no` is a language). */

use saphyr_parser::{Event, Parser, ScalarStyle};

use crate::checkpoint::CARD;
use crate::printable::printable;
use crate::progress::Progress;

/// The longest front matter that is read.
const LIMIT: usize = 256 << 10;

/// What the card of a derived model repeats of its source's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceCard {
    /// The licence's id, such as `apache-2.0`; `other` is explained by the two fields that follow.
    pub license: Vec<String>,
    /// The name of a licence without an id.
    pub license_name: Option<String>,
    /// Where its text is: an address, or a file of the repository.
    pub license_link: Option<String>,
    /// Codes of languages.
    pub language: Vec<String>,
}

impl SourceCard {
    /// What the card of a model says. It is never needed: one that cannot be read says nothing, and `progress` is told.
    pub fn of(readme: Result<Option<Vec<u8>>, String>, progress: &dyn Progress) -> Self {
        let Some(readme) = readme.transpose() else { return Self::default() };
        let read = readme.and_then(|readme| {
            Self::read(&readme).map_err(|why| format!("the source's {CARD} {why}"))
        });
        read.unwrap_or_else(|why| {
            progress.warn(&format!(
                "{why}; licence and languages are not taken over into the model card"
            ));
            Self::default()
        })
    }

    /// What a README.md says. One without front matter says nothing.
    ///
    /// # Errors
    /// What is wrong with the front matter, to follow the file's name.
    pub fn read(readme: &[u8]) -> Result<Self, String> {
        let Some(front_matter) = front_matter(readme)? else { return Ok(Self::default()) };
        let mut fields = Fields::read(front_matter)?;
        Ok(Self {
            license: fields.take("license"),
            license_name: fields.take("license_name").into_iter().next(),
            license_link: fields.take("license_link").into_iter().next(),
            language: fields.take("language"),
        })
    }
}

/// The text between the first line, `---`, and the next such line.
fn front_matter(readme: &[u8]) -> Result<Option<&str>, String> {
    let readme = readme.strip_prefix(b"\xef\xbb\xbf").unwrap_or(readme);
    let (head, cut) = match readme.get(..LIMIT) {
        Some(head) => (head, true),
        None => (readme, false),
    };
    let text = match str::from_utf8(head) {
        Ok(text) => text,
        // A character may be cut at the limit.
        Err(error) if cut && error.error_len().is_none() => {
            str::from_utf8(&head[..error.valid_up_to()]).unwrap_or_default()
        }
        Err(_) => return Err("is not UTF-8".to_owned()),
    };
    let is_fence = |line: &str| line.trim_end() == "---";
    let mut lines = text.split_inclusive('\n');
    let Some(first) = lines.next().filter(|line| is_fence(line)) else { return Ok(None) };
    let mut end = first.len();
    for line in lines {
        if is_fence(line) {
            return Ok(Some(&text[first.len()..end]));
        }
        end += line.len();
    }
    Err("begins with `---` and no second line of `---` ends its front matter".to_owned())
}

/// The fields of a mapping, each with the texts that it holds: one, or those of a list.
#[derive(Default)]
struct Fields {
    found: Vec<(String, Vec<String>)>,
    /// The key whose value comes next; empty where the key is no text.
    key: Option<String>,
}

impl Fields {
    fn read(yaml: &str) -> Result<Self, String> {
        let mut fields = Self::default();
        // How many nodes are open, whether the second of them is a list, and its texts.
        let (mut depth, mut in_list, mut texts) = (0_usize, false, Vec::new());
        for event in Parser::new_from_str(yaml) {
            let (event, _) =
                event.map_err(|error| format!("has no valid front matter: {error}"))?;
            let is_list = matches!(event, Event::SequenceStart(..));
            match event {
                Event::Scalar(..) | Event::SequenceStart(..) if depth == 0 => {
                    return Err("has front matter that is no mapping of keys to values".to_owned());
                }
                Event::Scalar(text, style, ..) => {
                    let absent = style == ScalarStyle::Plain && ["", "~", "null"].contains(&&*text);
                    let text = (!absent).then(|| text.into_owned());
                    match depth {
                        1 => fields.add(text.into_iter().collect()),
                        2 if in_list => texts.extend(text),
                        _ => {}
                    }
                }
                Event::Alias(_) if depth == 1 => fields.add(Vec::new()),
                Event::MappingStart(..) | Event::SequenceStart(..) => {
                    depth += 1;
                    if depth == 2 {
                        (in_list, texts) = (is_list, Vec::new());
                    }
                }
                Event::MappingEnd | Event::SequenceEnd => {
                    depth -= 1;
                    if depth == 1 {
                        // A list is no key.
                        let texts = std::mem::take(&mut texts);
                        fields.add(if fields.key.is_some() { texts } else { Vec::new() });
                    }
                }
                _ => {}
            }
        }
        Ok(fields)
    }

    /// Adds the next node of the mapping: a key, or the value of the key before it.
    fn add(&mut self, mut texts: Vec<String>) {
        match self.key.take() {
            None => self.key = Some(texts.pop().unwrap_or_default()),
            Some(key) => self.found.push((key, texts)),
        }
    }

    /// The texts of a field; none where it is not there.
    fn take(&mut self, key: &str) -> Vec<String> {
        let at = self.found.iter().position(|(found, _)| found == key);
        at.map(|at| self.found.swap_remove(at).1).unwrap_or_default()
    }
}

/// The lines of a field that holds one text.
pub(super) fn field(key: &str, text: &str) -> String {
    format!("{key}: {}\n", value(text))
}

/// The lines of a field that holds a list; none of an empty one.
pub(super) fn list(key: &str, texts: &[String]) -> String {
    let items: String = texts.iter().map(|text| format!("- {}\n", value(text))).collect();
    if items.is_empty() { items } else { format!("{key}:\n{items}") }
}

/// A text as a value of YAML: bare where no reader takes it for anything else, else in quotes.
fn value(text: &str) -> String {
    const TAKEN_FOR_OTHERS: [&str; 9] =
        ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    let bare = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte))
        && !TAKEN_FOR_OTHERS.contains(&text.to_ascii_lowercase().as_str());
    if bare {
        return text.to_owned();
    }
    // A string of JSON is one of YAML, but for characters that YAML does not allow.
    serde_json::to_string(&printable(text)).expect("a text has a JSON form")
}

#[cfg(test)]
#[path = "front_matter_tests.rs"]
mod tests;
