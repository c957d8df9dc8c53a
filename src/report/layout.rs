/*! Aligned text: labelled facts, and tables of cells. */

use crate::printable::printable;

/// Facts, one a line, each after its label; a fact of several lines keeps its column.
#[derive(Default)]
pub(crate) struct Facts {
    rows: Vec<(String, String)>,
}

impl Facts {
    /// Adds a fact of one line, which may come from a file.
    pub(crate) fn add(&mut self, label: &str, value: impl AsRef<str>) -> &mut Self {
        let (label, value) = (printable(label), printable(value.as_ref()));
        self.rows.push((label.into_owned(), value.into_owned()));
        self
    }

    /// Adds a fact of several lines, each made by this program.
    pub(crate) fn add_lines(&mut self, label: &str, value: impl AsRef<str>) -> &mut Self {
        let lines: Vec<_> = value.as_ref().lines().map(printable).collect();
        self.rows.push((label.to_owned(), lines.join("\n")));
        self
    }

    /// The facts as lines.
    pub(crate) fn text(&self) -> String {
        let width = self.rows.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for (label, value) in &self.rows {
            for (index, line) in value.lines().enumerate() {
                let label = if index == 0 { label.as_str() } else { "" };
                text.push_str(format!("{label:width$}  {line}").trim_end());
                text.push('\n');
            }
        }
        text
    }
}

/// Which side of its column a cell leans on: words left, numbers right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Left,
    Right,
}

/// A table with a line of headings.
pub(crate) struct Table {
    columns: Vec<(String, Side)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with the given headings and no rows.
    pub(crate) fn new<'a>(columns: impl IntoIterator<Item = (&'a str, Side)>) -> Self {
        let columns = columns.into_iter().map(|(name, side)| (name.to_owned(), side)).collect();
        Self { columns, rows: Vec::new() }
    }

    /// Adds a row, whose cells may come from a file; missing cells at its end stay empty.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|cell| printable(cell).into_owned()).collect());
    }

    /// The headings and rows as lines.
    pub(crate) fn text(&self) -> String {
        let headings: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let lines = || std::iter::once(&headings).chain(&self.rows);
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|column| {
                lines().filter_map(|cells| cells.get(column)).map(|cell| cell.chars().count()).max()
            })
            .map(Option::unwrap_or_default)
            .collect();
        let mut text = String::new();
        for cells in lines() {
            let mut line = String::new();
            for ((cell, width), (_, side)) in cells.iter().zip(&widths).zip(&self.columns) {
                match side {
                    Side::Left => line.push_str(&format!("{cell:width$}  ")),
                    Side::Right => line.push_str(&format!("{cell:>width$}  ")),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_align_after_their_labels() {
        let mut facts = Facts::default();
        facts.add("model", "m").add_lines("recipe", "one\ntwo");
        assert_eq!(facts.text(), "model   m\nrecipe  one\n        two\n");
    }

    #[test]
    fn names_cannot_add_lines_or_move_the_cursor() {
        let mut facts = Facts::default();
        facts.add("model", "m\nblocks  9\u{1b}[2J");
        assert_eq!(facts.text(), "model  m\\u{a}blocks  9\\u{1b}[2J\n");
        let mut table = Table::new([("name", Side::Left), ("n", Side::Right)]);
        table.row(vec!["a\u{9b}2J".into(), "1".into()]);
        assert_eq!(table.text(), "name       n\na\\u{9b}2J  1\n");
    }

    #[test]
    fn words_lean_left_and_numbers_right() {
        let mut table = Table::new([("name", Side::Left), ("n", Side::Right)]);
        table.row(vec!["a".into(), "100".into()]);
        table.row(vec!["longer".into(), "2".into()]);
        table.row(vec!["short row".into()]);
        assert_eq!(table.text(), "name         n\na          100\nlonger       2\nshort row\n");
    }
}
