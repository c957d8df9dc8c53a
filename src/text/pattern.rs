/*! How far a regular expression reads beyond its match.

An alternative that ends in a repetition, like ` ?\p{L}+`, reads one character beyond its match.
One that must match something after a repetition, like `\s*[\r\n]+` or `\s+(?!\S)`, may read the entire
repetition and then match less, or nothing. Everything else in an expression is of bounded length. */

use std::iter::Peekable;
use std::str::Chars;

/// The unbounded repetitions of an expression.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pattern {
    /// The atoms that are repeated, and after which something must match.
    pub(super) far: Vec<String>,
    /// All atoms that are repeated.
    pub(super) unbounded: Vec<String>,
    /// An upper bound of the characters that everything else matches.
    pub(super) characters: usize,
}

/// A node of a sequence, with its quantifier.
#[derive(Debug)]
struct Item {
    node: Node,
    optional: bool,
    /// `None`: any number of times.
    most: Option<usize>,
}

#[derive(Debug)]
enum Node {
    /// An expression that matches one character.
    Atom(String),
    Group(Alternatives),
    /// Matches a place, and may read from there on.
    Look(Alternatives),
}

type Alternatives = Vec<Vec<Item>>;

impl Pattern {
    /// Analyses an expression; `None` if it has parts whose reach is unknown, such as back references.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parser = Parser { rest: text.chars().peekable(), depth: 0, any_case: false };
        let alternatives = parser.alternatives()?;
        if parser.rest.next().is_some() {
            return None;
        }
        let mut pattern = Self::default();
        pattern.analyse(&alternatives, true);
        Some(pattern)
    }

    /// Adds the repetitions of these alternatives; `last` if nothing has to match after them.
    fn analyse(&mut self, alternatives: &Alternatives, last: bool) {
        for items in alternatives {
            for (index, item) in items.iter().enumerate() {
                let last = last && items[index + 1..].iter().all(|item| item.optional);
                match (&item.node, item.most) {
                    (Node::Atom(atom), None) => {
                        self.unbounded.push(atom.clone());
                        self.far.extend((!last).then(|| atom.clone()));
                    }
                    (Node::Atom(_), Some(most)) => self.characters += most,
                    (Node::Group(group), Some(0 | 1)) => self.analyse(group, last),
                    // A repetition of several things may end inside of one of them.
                    (Node::Group(group), _) => self.repeated(group),
                    (Node::Look(look), _) => self.analyse(look, false),
                }
            }
        }
    }

    /// Every atom of a repeated group may be read any number of times.
    fn repeated(&mut self, alternatives: &Alternatives) {
        for item in alternatives.iter().flatten() {
            match &item.node {
                Node::Atom(atom) => {
                    self.unbounded.push(atom.clone());
                    self.far.push(atom.clone());
                }
                Node::Group(group) | Node::Look(group) => self.repeated(group),
            }
        }
    }
}

struct Parser<'p> {
    rest: Peekable<Chars<'p>>,
    depth: usize,
    /// Whether capitals match small letters here.
    any_case: bool,
}

impl Parser<'_> {
    fn alternatives(&mut self) -> Option<Alternatives> {
        self.depth += 1;
        if self.depth > 50 {
            return None;
        }
        let mut alternatives = vec![Vec::new()];
        loop {
            match self.rest.peek() {
                None | Some(')') => break,
                Some('|') => {
                    self.rest.next();
                    alternatives.push(Vec::new());
                }
                Some(_) => {
                    let node = match self.node()? {
                        Node::Atom(atom) if self.any_case => Node::Atom(format!("(?i:{atom})")),
                        node => node,
                    };
                    let item = self.quantified(node)?;
                    alternatives.last_mut()?.push(item);
                }
            }
        }
        self.depth -= 1;
        Some(alternatives)
    }

    fn node(&mut self) -> Option<Node> {
        let place = || Some(Node::Look(Vec::new()));
        match self.rest.next()? {
            '(' => self.group(),
            '[' => self.class().map(Node::Atom),
            '\\' => self.escape(),
            '.' => Some(Node::Atom(".".to_owned())),
            '^' | '$' => place(),
            character => Some(Node::Atom(format!(r"\x{{{:x}}}", u32::from(character)))),
        }
    }

    fn group(&mut self) -> Option<Node> {
        let (mut look, any_case) = (false, self.any_case);
        if self.rest.next_if_eq(&'?').is_some() {
            let mut flags = String::new();
            loop {
                match self.rest.next()? {
                    ':' => break,
                    '=' | '!' => {
                        look = true;
                        break;
                    }
                    '>' => break,
                    // `(?i)` holds for what follows.
                    ')' => {
                        self.any_case |= flags.contains('i');
                        return Some(Node::Look(Vec::new()));
                    }
                    flag @ ('i' | 's' | 'm' | 'u' | 'U' | '-' | '<') => flags.push(flag),
                    // `x` changes what white space means; names and conditions are not analysed.
                    _ => return None,
                }
            }
            self.any_case |= flags.contains('i');
        }
        let alternatives = self.alternatives()?;
        self.rest.next_if_eq(&')')?;
        self.any_case = any_case;
        Some(if look { Node::Look(alternatives) } else { Node::Group(alternatives) })
    }

    /// The text of a class, whose `[` was read.
    fn class(&mut self) -> Option<String> {
        let (mut text, mut depth) = ("[".to_owned(), 1);
        while depth > 0 {
            let character = self.rest.next()?;
            text.push(character);
            match character {
                '\\' => text.push(self.rest.next()?),
                '[' => depth += 1,
                // The first one of a class is itself.
                ']' if depth == 1 && matches!(&text[..], "[]" | "[^]") => {}
                ']' => depth -= 1,
                _ => {}
            }
        }
        Some(text)
    }

    fn escape(&mut self) -> Option<Node> {
        let character = self.rest.next()?;
        let mut text = format!(r"\{character}");
        match character {
            'b' | 'B' | 'A' | 'z' | 'Z' => return Some(Node::Look(Vec::new())),
            'p' | 'P' | 'x' | 'u' | 'U' => {
                let digits = match character {
                    'p' | 'P' => 1,
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                if self.rest.peek() == Some(&'{') {
                    while !text.ends_with('}') {
                        text.push(self.rest.next()?);
                    }
                } else {
                    for _ in 0..digits {
                        text.push(self.rest.next()?);
                    }
                }
            }
            's' | 'S' | 'd' | 'D' | 'w' | 'W' | 'n' | 'r' | 't' | 'f' | 'v' | 'a' | 'e' | 'h'
            | 'H' => {}
            other if other.is_alphanumeric() => return None,
            _ => {}
        }
        Some(Node::Atom(text))
    }

    fn quantified(&mut self, node: Node) -> Option<Item> {
        let (mut optional, mut most) = (false, Some(1));
        match self.rest.peek() {
            Some('?') => optional = true,
            Some('*') => (optional, most) = (true, None),
            Some('+') => most = None,
            Some('{') => match self.counts() {
                Some(counts) => {
                    (optional, most) = counts;
                    self.lazy();
                    return Some(Item { node, optional, most });
                }
                // A brace that counts nothing is itself.
                None => return Some(Item { node, optional, most }),
            },
            _ => return Some(Item { node, optional, most }),
        }
        self.rest.next();
        self.lazy();
        Some(Item { node, optional, most })
    }

    /// What makes a repetition lazy or possessive; another repetition is not distinguished.
    fn lazy(&mut self) {
        self.rest.next_if(|next| matches!(next, '?' | '+'));
    }

    /// `{2}`, `{2,}` or `{1,3}`, which is read if it is one.
    fn counts(&mut self) -> Option<(bool, Option<usize>)> {
        let mut ahead = self.rest.clone();
        ahead.next();
        let text: String = ahead.by_ref().take_while(|next| *next != '}').take(24).collect();
        let (least, most) = match text.split_once(',') {
            Some((least, most)) => (least, most),
            None => (&text[..], &text[..]),
        };
        let least: usize = if least.is_empty() { 0 } else { least.trim().parse().ok()? };
        let most: Option<usize> = match most.trim() {
            "" if text.contains(',') => None,
            most => Some(most.parse().ok()?),
        };
        self.rest = ahead;
        // So many of a kind are as good as any number.
        Some((least == 0, most.filter(|most| *most <= 1000)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn far(text: &str) -> Vec<String> {
        Pattern::parse(text).unwrap_or_else(|| panic!("{text} is not judged")).far
    }

    #[test]
    fn published_expressions_reach_over_white_space_alone() {
        let gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
        assert_eq!(far(gpt2), [r"\s"]);
        let llama_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        assert_eq!(far(llama_3), [r"\s", r"\s"]);
        let qwen = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        assert_eq!(far(qwen), [r"\s", r"\s"]);
        // o200k: upper case before a letter that must be lower case.
        let upper = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}]*[\p{Ll}\p{Lo}]+(?i:'s|'t)?|\s+";
        assert_eq!(far(upper), [r"[\p{Lu}\p{Lo}]"]);
    }

    #[test]
    fn repetitions_before_something_else_reach_far() {
        for (text, expected) in [
            (r"a+", &[][..]),
            (r"a+b?", &[]),
            (r"a+b", &[r"\x{61}"]),
            (r#""[^"]*""#, &[r#"[^"]"#]),
            (r"(?:ab)+", &[r"\x{61}", r"\x{62}"]),
            (r"(a+)?c", &[r"\x{61}"]),
            (r"\d{1,3}(?=(?:\d{3})*\b)", &[r"\d"]),
            (r"[]a]+x", &["[]a]"]),
            (r"a{2,}b|c{3}d", &[r"\x{61}"]),
            (r".*?x", &["."]),
            (r"(?i:[a-c]*x)[d-f]*y", &["(?i:[a-c])", "[d-f]"]),
        ] {
            assert_eq!(far(text), expected, "{text}");
        }
        assert_eq!(Pattern::parse(r"\p{N}{1,3}|ab").unwrap().characters, 5);
        assert_eq!(Pattern::parse(r" {2,}").unwrap().unbounded, [r"\x{20}"]);
    }

    #[test]
    fn an_unknown_construct_is_refused() {
        for text in [r"(a)\1", r"(?x) a", r"(?P<n>a)", "[a", "(a", r"\K", &"(".repeat(10_000)] {
            assert_eq!(Pattern::parse(text), None, "{text}");
        }
    }
}
