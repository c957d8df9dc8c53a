/*! What a directory holds that is no checkpoint of safetensors, and what to do with it.

Each form of a model gets its own sentence: the files are looked at before anything is said about
what they may be. */

use std::path::PathBuf;

use super::files::Files;
use super::regular;
use crate::{Error, Result};

/// Other forms of a model, by what their files' names begin and end with.
struct Form {
    prefix: &'static str,
    suffix: &'static str,
    what: &'static str,
    hint: &'static str,
}

const CONVERT: &str = "convert it: python -c \"from transformers import AutoModelForCausalLM as M; \
                       M.from_pretrained('DIR', torch_dtype='auto')\
                       .save_pretrained('OUT', safe_serialization=True)\"; \
                       then copy tokenizer.json as well";

/// The first that fits is named.
const FORMS: [Form; 12] = [
    Form {
        prefix: "consolidated.",
        suffix: ".pth",
        what: "Meta's own checkpoint files",
        hint: "convert them with transformers' convert_llama_weights_to_hf.py, or download the \
               repository whose name ends in -hf",
    },
    Form { prefix: "pytorch_model", suffix: ".bin", what: "PyTorch weights", hint: CONVERT },
    Form {
        prefix: "",
        suffix: ".gguf",
        what: "GGUF files of llama.cpp",
        hint: "give the repository that they were converted from, in 16 bits",
    },
    Form {
        prefix: "",
        suffix: ".onnx",
        what: "ONNX files",
        hint: "give the repository that they were exported from",
    },
    Form { prefix: "", suffix: ".bin", what: "PyTorch weights", hint: CONVERT },
    Form { prefix: "", suffix: ".pt", what: "PyTorch weights", hint: CONVERT },
    Form { prefix: "", suffix: ".pth", what: "PyTorch weights", hint: CONVERT },
    Form { prefix: "", suffix: ".ckpt", what: "PyTorch weights", hint: CONVERT },
    Form { prefix: "", suffix: ".h5", what: "TensorFlow weights", hint: CONVERT },
    Form { prefix: "", suffix: ".msgpack", what: "Flax weights", hint: CONVERT },
    Form {
        prefix: "",
        suffix: ".npz",
        what: "NumPy arrays, as MLX writes them",
        hint: "give the repository that they were converted from, in safetensors",
    },
    Form {
        prefix: "",
        suffix: ".engine",
        what: "a TensorRT engine",
        hint: "give the checkpoint that it was built from",
    },
];

/// Refuses a directory that holds an adapter: weights that mean something only on top of a model.
pub(super) fn refuse_adapter(files: &Files) -> Result<()> {
    let names = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"];
    let found = names.into_iter().find(|name| files.contains(name));
    found.map_or(Ok(()), |name| {
        Err(Error::input(format!(
            "{} holds an adapter ({name}) and not a model of its own",
            files.place()
        ))
        .hint(MERGE))
    })
}

/// What to do with an adapter.
pub(crate) const MERGE: &str = "merge it first: python -c \"from peft import AutoPeftModelForCausalLM as M; \
    M.from_pretrained('DIR').merge_and_unload().save_pretrained('OUT')\"; if it is merged \
    already, remove the adapter's files";

/// Why a directory without `config.json` cannot be read.
pub(super) fn without_config(files: &Files) -> Error {
    if let Some(error) = other_form(files) {
        return error;
    }
    if files.contains("params.json") {
        return Error::input(format!(
            "{} is in Meta's or Mistral's own format (params.json) and has no config.json",
            files.place()
        ))
        .hint("give the model in transformers' format, or convert it with transformers' script");
    }
    let missing = Error::input(format!("{} has no config.json", files.place()));
    let inside = files.dir().and_then(|dir| {
        let entries = fs_err::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
        entries.filter(|path| path.join("config.json").is_file()).min()
    });
    missing.hint(match inside {
        Some(inside) => format!("give --model {}, which has one", inside.display()),
        None => "give --model the directory of a Hugging Face checkpoint: config.json, \
                 tokenizer.json and *.safetensors lie side by side in it"
            .to_owned(),
    })
}

/// Why a directory without safetensors cannot be read.
pub(super) fn without_weights(files: &Files) -> Error {
    let unreadable = weight_paths(files).into_iter().find_map(|path| regular::open(&path).err());
    if let Some(error) = unreadable {
        return error;
    }
    other_form(files).unwrap_or_else(|| {
        Error::input(format!("{} has no *.safetensors", files.place()))
            .hint("give --model the directory of a Hugging Face checkpoint with its weights")
    })
}

/// Refuses weights whose link leads to nothing, which are no files to anybody else.
pub(super) fn refuse_dangling(files: &Files) -> Result<()> {
    let mut paths = weight_paths(files).into_iter();
    paths
        .find(|path| path.is_symlink() && !path.exists())
        .map_or(Ok(()), |path| Err(regular::dangling(&path)))
}

/// Everything that is called `*.safetensors`, sorted.
fn weight_paths(files: &Files) -> Vec<PathBuf> {
    let entries = files.dir().and_then(|dir| fs_err::read_dir(dir).ok());
    let paths = entries.into_iter().flatten().flatten().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    paths.sort();
    paths
}

/// Names the other form in which the directory holds a model.
fn other_form(files: &Files) -> Option<Error> {
    let names = files.names().ok()?;
    if names.iter().any(|name| name.ends_with(".safetensors")) {
        return None;
    }
    let fits = |form: &Form, name: &str| {
        name.starts_with(form.prefix)
            && name.ends_with(form.suffix)
            // Settings of a training run, next to the weights of any form.
            && !name.starts_with("training_args")
    };
    let found = FORMS
        .iter()
        .find_map(|form| names.iter().find(|name| fits(form, name)).map(|name| (form, name)));
    let (form, name) = found?;
    let message = format!("{} holds {} ({name}) and no safetensors", files.place(), form.what);
    Some(Error::input(message).hint(form.hint))
}
