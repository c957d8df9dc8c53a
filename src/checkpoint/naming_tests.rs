//! Stored names, found from the embedding's.

use super::*;

#[test]
fn prefixes_are_found_by_the_embedding() {
    let layer = "model.layers.0.mlp.up_proj.weight";
    for (names, stored_layer, stored_head) in [
        (&["model.embed_tokens.weight", "lm_head.weight"][..], layer, HEAD),
        (&["embed_tokens.weight"], "layers.0.mlp.up_proj.weight", HEAD),
        (
            &["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"],
            "language_model.model.layers.0.mlp.up_proj.weight",
            "language_model.lm_head.weight",
        ),
        (
            &["model.language_model.embed_tokens.weight", "lm_head.weight"],
            "model.language_model.layers.0.mlp.up_proj.weight",
            HEAD,
        ),
        (
            &["language_model.embed_tokens.weight", "audio.embed_tokens.weight"],
            "language_model.layers.0.mlp.up_proj.weight",
            HEAD,
        ),
        (
            &["_orig_mod.model.embed_tokens.weight", "_orig_mod.lm_head.weight"],
            "_orig_mod.model.layers.0.mlp.up_proj.weight",
            "_orig_mod.lm_head.weight",
        ),
        (&["a.embed_tokens.weight", "b.embed_tokens.weight"], layer, HEAD),
        (&["not_embed_tokens.weight"], layer, HEAD),
    ] {
        let contains = |name: &str| names.contains(&name);
        let naming = Naming::from_names(contains, names.iter().copied());
        assert_eq!(naming.stored(layer), stored_layer, "{names:?}");
        assert_eq!(naming.stored(HEAD), stored_head, "{names:?}");
    }
}
