use super::*;
use serde_json::json;

#[test]
fn what_python_writes_is_read() {
    let text = br#"{"a": NaN, "b": [-Infinity, Infinity], "c": "NaN \" Infinity", "d": 1, "d": 2}"#;
    let expected =
        json!({"a": "NaN", "b": ["-Infinity", "Infinity"], "c": "NaN \" Infinity", "d": 2});
    assert_eq!(parse(text, "f").unwrap(), expected);
    assert_eq!(parse(b"\xef\xbb\xbf{\"a\": 1}", "f").unwrap(), json!({"a": 1}));
}

#[test]
fn other_texts_are_refused_with_the_file() {
    for (bytes, part) in [
        (&b"{\"a\": NaNs}"[..], "f is not valid JSON"),
        (b"{\"a\": +Infinity}", "f is not valid JSON"),
        (b"{\"a\\", "f is not valid JSON"),
        (b"", "f is not valid JSON"),
        (b"\xff\xfe{\0}\0", "f is UTF-16"),
        (b"\0{\0}", "f is UTF-16"),
        (b"{\0}\0", "f is UTF-16"),
    ] {
        let error = parse(bytes, "f").unwrap_err();
        assert!(error.message().contains(part), "{error}");
        assert!(error.hint_text().is_some());
    }
}
