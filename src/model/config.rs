/*! Typed reading of `config.json`.

A field is read with the type that transformers declares for it, or refused with the file, the field, what it holds and
what would be right. No value of a wrong type ever becomes a default. */

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// An object of `config.json` and its place in the file.
#[derive(Clone, Copy)]
pub(super) struct Config<'a> {
    fields: &'a Map<String, Value>,
    /// The file's name in messages.
    file: &'a str,
    /// The field that holds this object; none for the file's own.
    parent: Option<&'a str>,
}

impl<'a> Config<'a> {
    /// The fields of `value`; `file` is its name in messages.
    ///
    /// # Errors
    /// If it is no object.
    pub(super) fn new(value: &'a Value, file: &'a str) -> Result<Self> {
        let fields = value.as_object().ok_or_else(|| {
            Error::input(format!("{file} is not a JSON object")).hint("download the file again")
        })?;
        Ok(Self { fields, file, parent: None })
    }

    /// The file's name in messages.
    pub(super) fn file(&self) -> &'a str {
        self.file
    }

    /// The names of all fields.
    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.fields.keys().map(String::as_str)
    }

    /// Whether there is a field of this name, null or not.
    pub(super) fn has(&self, key: &str) -> bool {
        self.fields.contains_key(key)
    }

    /// What a field holds, if it is there and not null.
    pub(super) fn given(&self, key: &str) -> Option<&'a Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// A whole number in `range`; none where the field is absent.
    ///
    /// # Errors
    /// Another type, null included, or a number out of `range`.
    pub(super) fn count(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.fields.get(key) else { return Ok(None) };
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
        let count = count.filter(|count| range.contains(count));
        count.map(Some).ok_or_else(|| self.wrong(key, &whole_number(&range)))
    }

    /// [`Config::count`] of a field that may be null: `Some(None)`.
    ///
    /// # Errors
    /// As [`Config::count`]'s, null excepted.
    pub(super) fn nullable_count(
        &self,
        key: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<Option<usize>>> {
        match self.fields.get(key) {
            Some(Value::Null) => Ok(Some(None)),
            _ => Ok(self.count(key, range)?.map(Some)),
        }
    }

    /// [`Config::count`] of a field that has no default.
    ///
    /// # Errors
    /// As [`Config::count`]'s, or the field is absent.
    pub(super) fn required_count(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize> {
        self.count(key, range.clone())?.ok_or_else(|| self.wrong(key, &whole_number(&range)))
    }

    /// A number; none where the field is absent.
    ///
    /// # Errors
    /// Another type, null included, or a number that f32 does not hold.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.fields.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|number| (*number as f32).is_finite());
        number.map(Some).ok_or_else(|| self.wrong(key, "a number"))
    }

    /// A number above zero; none where the field is absent.
    ///
    /// # Errors
    /// As [`Config::number`]'s, or a number that is not above zero.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        const RIGHT: &str = "a number above zero";
        let number = self.number(key).map_err(|_| self.wrong(key, RIGHT))?;
        match number {
            // Compared as f32, the type of all arithmetic.
            Some(number) if number as f32 <= 0.0 => Err(self.wrong(key, RIGHT)),
            number => Ok(number),
        }
    }

    /// True or false; false where the field is absent or null, which is every family's default.
    ///
    /// # Errors
    /// Another type.
    pub(super) fn flag(&self, key: &str) -> Result<bool> {
        match self.given(key) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// [`Config::flag`], with another value where the field is absent; null is false.
    ///
    /// # Errors
    /// As [`Config::flag`]'s.
    pub(super) fn flag_or(&self, key: &str, absent: bool) -> Result<bool> {
        if self.has(key) { self.flag(key) } else { Ok(absent) }
    }

    /// A text; none where the field is absent.
    ///
    /// # Errors
    /// Another type, null included.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.fields.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a text"))
    }

    /// A list; none where the field is absent or null.
    ///
    /// # Errors
    /// Another type.
    pub(super) fn list(&self, key: &str, right: &str) -> Result<Option<&'a [Value]>> {
        let Some(value) = self.given(key) else { return Ok(None) };
        value.as_array().map(|list| Some(&list[..])).ok_or_else(|| self.wrong(key, right))
    }

    /// An object; none where the field is absent or null.
    ///
    /// # Errors
    /// Another type.
    pub(super) fn object(&self, key: &'a str) -> Result<Option<Self>> {
        let Some(value) = self.given(key) else { return Ok(None) };
        let fields = value.as_object().ok_or_else(|| self.wrong(key, "an object or null"))?;
        Ok(Some(Self { fields, file: self.file, parent: Some(key) }))
    }

    /// The full name of a field, e.g. `rope_scaling.factor`.
    fn name(&self, key: &str) -> String {
        self.parent.map_or_else(|| key.to_owned(), |parent| format!("{parent}.{key}"))
    }

    /// `FILE: `field` is VALUE`, for messages; long values are cut.
    pub(super) fn shown(&self, key: &str) -> String {
        let (file, name) = (self.file, self.name(key));
        let Some(value) = self.fields.get(key) else {
            return format!("{file}: `{name}` is missing");
        };
        format!("{file}: `{name}` is {}", shortened(&value.to_string()))
    }

    /// An error with the value of a field and what would be right.
    pub(super) fn wrong(&self, key: &str, right: &str) -> Error {
        Error::input(format!("{}, which must be {right}", self.shown(key)))
            .hint("correct the field, or download the file again")
    }

    /// An error for a network that the file describes and that this version cannot run.
    pub(super) fn unsupported(&self, key: &str, known: &str) -> Error {
        Error::input(format!("{}, which this version does not support", self.shown(key)))
            .hint(known)
    }

    /// An error for two fields, or a field and what is computed, that contradict each other.
    pub(super) fn contradiction(&self, key: &str, what: &str) -> Error {
        Error::input(format!("{}, but {what}", self.shown(key)))
            .hint("correct one of them, or download the file again")
    }
}

/// The first characters of a text from the file, safe for a message.
pub(super) fn shortened(text: &str) -> String {
    const LONGEST: usize = 80;
    let mut shown: String = text.chars().take(LONGEST).filter(|c| !c.is_control()).collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push_str("...");
    }
    shown
}

fn whole_number(range: &RangeInclusive<usize>) -> String {
    match *range.end() {
        usize::MAX => format!("a whole number of {} or more", range.start()),
        end => format!("a whole number from {} to {end}", range.start()),
    }
}
