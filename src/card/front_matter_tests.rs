use super::*;

fn read(yaml: &str) -> SourceCard {
    SourceCard::read(format!("---\n{yaml}---\n\n# A model\n").as_bytes()).unwrap()
}

#[test]
fn what_a_derived_card_repeats_is_read() {
    let card = read(
        "library_name: transformers\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n\
         widget:\n- messages:\n  - {role: user, license: wrong}\n  language: [xx]\n\
         language:\n- en\n- no\n- \"zh\"\nmodel-index: {a: {b: [c]}}\n",
    );
    assert_eq!(card.license, ["other"]);
    assert_eq!(card.license_name.as_deref(), Some("llama3"));
    assert_eq!(card.license_link.as_deref(), Some("LICENSE"));
    assert_eq!(card.language, ["en", "no", "zh"]);
    assert_eq!(read("license: [mit, apache-2.0]\nlanguage: en\n").license, ["mit", "apache-2.0"]);
}

#[test]
fn what_is_absent_or_no_text_is_left_out() {
    let none = SourceCard::default();
    for yaml in ["", "license:\nlanguage: ~\n", "license: {a: b}\n", "? [license]\n: mit\n"] {
        assert_eq!(read(yaml), none, "{yaml}");
    }
    assert_eq!(read("a: &x [mit]\nlicense: *x\n"), none, "aliases are not followed");
    for readme in ["", "# A model", "license: mit\n", " ---\nlicense: mit\n---\n", "---"] {
        let found = SourceCard::read(readme.as_bytes());
        assert!(found == Ok(none.clone()) || readme == "---" && found.is_err(), "{readme}");
    }
}

#[test]
fn files_of_other_systems_are_read() {
    let card = SourceCard::read(b"\xef\xbb\xbf---\r\nlicense: mit\r\nlanguage:\r\n- en\r\n---\r\n");
    assert_eq!(card.unwrap().license, ["mit"]);
}

#[test]
fn damaged_front_matter_is_an_error_and_never_more() {
    for (readme, part) in [
        (&b"---\nlicense: [mit\n---\n"[..], "no valid front matter"),
        (b"---\nlicense: \"mit\n---\n", "no valid front matter"),
        (b"---\n- mit\n---\n", "no mapping"),
        (b"---\nmit\n---\n", "no mapping"),
        (b"---\nlicense: mit\n", "no second line"),
        (b"---\nlicense: \xff\n---\n", "not UTF-8"),
    ] {
        let why = SourceCard::read(readme).unwrap_err();
        assert!(why.contains(part), "{why}");
    }
    // Deep nesting and aliases of aliases, which a tree would not survive.
    let deep = format!("---\nlicense: mit\na: {}\n---\n", "[".repeat(100_000));
    assert!(SourceCard::read(deep.as_bytes()).is_err());
    let mut bomb = "---\nlicense: mit\nx0: &x0 [a, a, a, a, a, a, a, a, a]\n".to_owned();
    for level in 1..60 {
        let aliases = vec![format!("*x{}", level - 1); 9].join(", ");
        bomb += &format!("x{level}: &x{level} [{aliases}]\n");
    }
    assert_eq!(SourceCard::read(format!("{bomb}---\n").as_bytes()).unwrap().license, ["mit"]);
}

#[test]
fn written_values_read_back() {
    for text in ["mit", "no", "3.0", "a: b", "- x", "\"q\"", "Llama 3 ', Ü", "", "on", "#", "a\\b"]
    {
        let yaml = field("license_name", text) + &list("language", &[text.to_owned(), "en".into()]);
        let card = read(&yaml);
        assert_eq!(card.license_name.as_deref(), Some(text), "{yaml}");
        assert_eq!(card.language, [text, "en"]);
    }
    assert_eq!(field("license", "apache-2.0"), "license: apache-2.0\n");
    assert_eq!(list("language", &["no".into()]), "language:\n- \"no\"\n");
    assert_eq!(list("language", &[]), "");
    assert_eq!(read(&field("license_name", "a\u{7f}\nb")).license_name.unwrap(), "a\\u{7f}\\u{a}b");
}
