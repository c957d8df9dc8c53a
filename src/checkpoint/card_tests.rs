use super::*;

#[test]
fn an_edited_card_is_told_from_one_as_written() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join(CARD);
    let card = signed_card("---\nlicense: mit\n---\n\n# A model\n");
    let is_own = |content: &str| {
        fs_err::write(&path, content).unwrap();
        is_as_written(&path)
    };
    assert!(is_own(&card));
    for edited in [
        card.replace("mit", "isc"),
        format!("{card}More.\n"),
        card.trim_end().to_owned(),
        format!("\n{card}"),
        "# A model\n".to_owned(),
        format!("{MARK}{END}"),
        String::new(),
        signed_card("").replacen(MARK, "", 1),
    ] {
        assert!(!is_own(&edited), "{edited}");
    }
    fs_err::write(home.path().join("other"), &card).unwrap();
    fs_err::remove_file(&path).unwrap();
    assert!(!is_as_written(&path));
    std::os::unix::fs::symlink(home.path().join("other"), &path).unwrap();
    assert!(!is_as_written(&path), "a link is not what a run wrote");
}

#[test]
fn only_a_card_as_written_is_replaced() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("checkpoint");
    fs_err::create_dir(&dir).unwrap();
    let (old, new) = (signed_card("old"), signed_card("new"));
    assert!(!replace_card(&dir, &new).unwrap() && !dir.join(CARD).exists());
    fs_err::write(dir.join(CARD), &old).unwrap();
    assert!(replace_card(&dir, &new).unwrap());
    assert_eq!(fs_err::read_to_string(dir.join(CARD)).unwrap(), new);
    fs_err::write(dir.join(CARD), "mine").unwrap();
    assert!(!replace_card(&dir, &old).unwrap());
    assert_eq!(fs_err::read_to_string(dir.join(CARD)).unwrap(), "mine");
    assert_eq!(fs_err::read_dir(home.path()).unwrap().count(), 1, "nothing else is left");
}
