use super::fits;

#[test]
fn stars_stand_for_any_characters() {
    for (pattern, name, expected) in [
        ("a.b", "a.b", true),
        ("a.b", "a.bc", false),
        ("*", "", true),
        ("*.bias", "x.q.bias", true),
        ("*.bias", "x.bias.y", false),
        ("model.layers.4.*", "model.layers.4.mlp", true),
        ("model.layers.4.*", "model.layers.40.mlp", false),
        ("a*b*c", "a1b2b3c", true),
        ("a*b*c", "acb", false),
        ("ab*ba", "aba", false),
        ("**", "x", true),
        ("", "x", false),
    ] {
        assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
    }
}
