/*! Names the command line makes up: default output paths, and words quoted for a shell. */

use std::path::{Path, PathBuf};

use crate::recipe::Recipe;

/// The last component of a directory, hub id or alias.
pub(crate) fn model_name(model: &str) -> String {
    let path = Path::new(model);
    // The revision of a Hub id is no part of the model's name.
    let path = match model.split_once('@') {
        Some((id, _)) if !path.exists() => Path::new(id),
        _ => path,
    };
    // `.` and `..` have no last component of their own; the directory they mean has one.
    let meant = match path.file_name() {
        Some(name) => Some(name.to_owned()),
        None => fs_err::canonicalize(path)
            .ok()
            .and_then(|absolute| absolute.file_name().map(ToOwned::to_owned)),
    };
    meant.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// `./<name>-atom-<tag>`, where a quantized checkpoint goes unless `--out` says otherwise.
pub(crate) fn checkpoint_out(model: &str, recipe: &Recipe) -> PathBuf {
    PathBuf::from(format!("./{}-atom-{}", model_name(model), recipe.tag()))
}

/// `./<name>-<format>`, where the export of a checkpoint goes unless `--out` says otherwise.
pub(crate) fn export_out(checkpoint: &str, format: &str) -> PathBuf {
    PathBuf::from(format!("./{}-{format}", model_name(checkpoint)))
}

/// `./<name>-distilled`, where a distilled checkpoint goes unless `--out` says otherwise.
pub(crate) fn distilled_out(checkpoint: &str) -> PathBuf {
    PathBuf::from(format!("./{}-distilled", model_name(checkpoint)))
}

/// `./<name>-calibration.safetensors`.
pub(crate) fn calibration_out(model: &str) -> PathBuf {
    PathBuf::from(format!("./{}-calibration.safetensors", model_name(model)))
}

/// `./<stem>-plan.json`; `x-calibration.safetensors` gives `./x-plan.json`.
pub(crate) fn plan_out(calibration: &Path) -> PathBuf {
    let stem = calibration.file_stem().unwrap_or_default().to_string_lossy();
    PathBuf::from(format!("./{}-plan.json", stem.strip_suffix("-calibration").unwrap_or(&stem)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_named_by_its_last_component() {
        for (model, name) in [
            ("tiny-llama", "tiny-llama"),
            ("models/SmolLM2/", "SmolLM2"),
            ("meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf"),
            ("org/name@refs/pr/1", "name"),
            ("/data/a//", "a"),
            ("/", "model"),
        ] {
            assert_eq!(model_name(model), name, "{model}");
        }
        assert_ne!(model_name("."), "model");
    }

    #[test]
    fn default_outputs_follow_model_and_recipe() {
        let out = checkpoint_out("models/SmolLM2/", &Recipe::paper());
        assert_eq!(out, Path::new("./SmolLM2-atom-w4a4-g128"));
        assert_eq!(export_out("a/x-atom/", "dense"), Path::new("./x-atom-dense"));
        assert_eq!(distilled_out("a/x-atom/"), Path::new("./x-atom-distilled"));
        assert_eq!(calibration_out("a/b"), Path::new("./b-calibration.safetensors"));
        assert_eq!(plan_out(Path::new("x/b-calibration.safetensors")), Path::new("./b-plan.json"));
        assert_eq!(plan_out(Path::new("other.safetensors")), Path::new("./other-plan.json"));
    }
}
