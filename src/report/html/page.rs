/*! The frame of a page: one file, which loads nothing. Colours follow the reader's preference, light or dark; print is light. */

use crate::printable::printable;

/// What begins each page, by which one is recognized later.
pub(super) const START: &str = "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"generator\" content=\"atom";

const STYLE: &str = include_str!("page.css");

/// Text as HTML, in contents and in attributes alike. The only way for text onto a page.
pub(super) fn text(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in printable(text).chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            _ => safe.push(c),
        }
    }
    safe
}

/// A figure at the top of a page.
pub(super) struct Figure {
    pub(super) label: &'static str,
    pub(super) value: String,
    /// What it is compared with; may be empty.
    pub(super) note: String,
}

/// A page, put together of parts that are HTML.
#[derive(Default)]
pub(super) struct Page {
    pub(super) title: String,
    pub(super) subtitle: String,
    pub(super) figures: Vec<Figure>,
    /// Heading and content.
    pub(super) sections: Vec<(String, String)>,
}

impl Page {
    /// Adds a section; one without content is left out.
    pub(super) fn section(&mut self, heading: &str, content: String) {
        if !content.is_empty() {
            self.sections.push((heading.to_owned(), content));
        }
    }

    pub(super) fn html(&self) -> String {
        let title = text(&self.title);
        let figures: String = self.figures.iter().map(figure).collect();
        let sections: String = self.sections.iter().map(section).collect();
        let version = text(env!("ATOM_VERSION"));
        format!(
            "{START} {version}\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n\
             <body>\n<main>\n<header>\n<h1>{title}</h1>\n<p>{}</p>\n</header>\n<div class=\"figures\">\n{figures}</div>\n\
             {sections}<footer>Written by atom {version}.</footer>\n</main>\n</body>\n</html>\n",
            text(&self.subtitle)
        )
    }
}

fn figure(figure: &Figure) -> String {
    let Figure { label, value, note } = figure;
    let (label, value, note) = (text(label), text(value), text(note));
    format!("<div class=\"figure\"><span>{label}</span><b>{value}</b><small>{note}</small></div>\n")
}

fn section((heading, content): &(String, String)) -> String {
    format!("<section>\n<h2>{}</h2>\n{content}</section>\n", text(heading))
}

/// Facts, each after its label.
pub(super) fn facts(rows: &[(&str, String)]) -> String {
    let row = |(label, value): &(&str, String)| {
        let lines: Vec<String> = value.lines().map(text).collect();
        format!("<dt>{}</dt><dd>{}</dd>\n", text(label), lines.join("<br>"))
    };
    match rows.is_empty() {
        true => String::new(),
        false => format!("<dl>\n{}</dl>\n", rows.iter().map(row).collect::<String>()),
    }
}

/// A table; its cells are HTML. Columns named in `numbers` lean right.
pub(super) fn table(headings: &[(&str, bool)], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let class = |is_number: bool| if is_number { " class=\"n\"" } else { "" };
    let head: String = headings
        .iter()
        .map(|(name, is_number)| format!("<th{}>{}</th>", class(*is_number), text(name)))
        .collect();
    let row = |cells: &Vec<String>| {
        let cells = cells.iter().zip(headings);
        let cells: String = cells
            .map(|(cell, (_, is_number))| format!("<td{}>{cell}</td>", class(*is_number)))
            .collect();
        format!("<tr>{cells}</tr>\n")
    };
    let rows: String = rows.iter().map(row).collect();
    format!(
        "<div class=\"wide\"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
    )
}

/// A caption that says how to read what is above it. It is HTML of our own.
pub(super) fn caption(html: &str) -> String {
    format!("<p class=\"caption\">{html}</p>\n")
}
