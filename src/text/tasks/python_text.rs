/*! Python's definitions of white space and capital letters, which the harness's prompts use. */

/// `str.isspace` of one character.
pub(crate) fn is_space(character: char) -> bool {
    // Python also counts the four separators of ASCII, which Unicode's White_Space leaves out.
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}

/// `str.capitalize`: the first character as a capital, all others small.
pub(crate) fn capitalize(text: &str) -> String {
    let mut characters = text.chars();
    let Some(first) = characters.next() else { return String::new() };
    let mut capital = first.to_uppercase();
    let mut result: String = capital.next().into_iter().collect();
    // `ß` becomes `Ss`.
    result.extend(capital.flat_map(char::to_lowercase));
    result + &characters.as_str().to_lowercase()
}

/// `re.sub(r"\[.*?\]", "", text)`.
pub(crate) fn without_brackets(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find('[') {
        let (before, bracket) = rest.split_at(open);
        result.push_str(before);
        // The dot of a regular expression does not match a line's end.
        let line = bracket.find('\n').unwrap_or(bracket.len());
        rest = match bracket[..line].find(']') {
            Some(close) => &bracket[close + 1..],
            None => {
                result.push('[');
                &bracket[1..]
            }
        };
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capitals_and_spaces_are_pythons() {
        // python3 -c 'print("hE IS".capitalize(), "ßa".capitalize(), "éCOLE".capitalize())'
        for (text, expected) in
            [("hE IS", "He is"), ("ßa", "Ssa"), ("éCOLE", "École"), ("", ""), ("1A", "1a")]
        {
            assert_eq!(capitalize(text), expected);
        }
        assert!(is_space('\x1f') && is_space('\u{a0}') && !is_space('\u{200b}'));
    }

    #[test]
    fn brackets_go_the_shortest_way_and_end_with_their_line() {
        for (text, expected) in [
            ("a [b] c [d]e", "a  c e"),
            ("[a[b]c]", "c]"),
            ("[a\nb] [c]", "[a\nb] "),
            ("a ] [", "a ] ["),
            ("[]", ""),
        ] {
            assert_eq!(without_brackets(text), expected);
        }
    }
}
