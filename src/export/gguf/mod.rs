/*! GGUF, the file of llama.cpp: weights, tokenizer, chat template and everything else in one.

Linears become `Q4_0`, whose blocks are groups of 32 codes with an f16 scale: what the recipe `q4_0` makes. Norms, biases and
routers are F32, as llama.cpp has them, embedding and head F16 or, where the user asks for it, rounded to `Q8_0`. The names, keys and types are
those of llama.cpp's `convert_hf_to_gguf.py` and its loader (src/llama-model.cpp, src/llama-vocab.cpp). */

mod blocks;
mod container;
mod metadata;
mod obstacles;
mod parts;
mod tensors;
mod tokenizer;

use self::container::{Layout, Metadata, TensorInfo, TensorType, lay_out};
use self::parts::parts;
use self::tensors::Lister;
use self::tokenizer::TokenizerFiles;
use super::format::{Container, Contents, Format, Published};
use super::model::{ExportedModel, Subject};
use super::obstacle::Obstacle;
use crate::checkpoint::{Dtype, SourceRecord};
use crate::model::Architecture;
use crate::{Error, Result};

pub use self::container::MatrixType;

/// GGUF with `Q4_0`.
pub(super) struct Gguf;

impl Format for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
    }

    fn loaded_by(&self) -> &'static str {
        "llama.cpp, Ollama, LM Studio"
    }

    fn recipes(&self) -> &'static [&'static str] {
        &["q4_0"]
    }

    fn obstacles(&self, subject: &Subject<'_>) -> Vec<Obstacle> {
        obstacles::of(subject)
    }

    fn notes(&self, subject: &Subject<'_>) -> Vec<String> {
        let mut notes = vec![
            "llama.cpp itself quantizes activations to 8 bits in groups of 32 where it runs"
                .to_owned(),
        ];
        if subject.sites().any(|site| site.bits < 16) {
            let note = "the checkpoint's own quantization of activations is not part of the file";
            notes.push(note.to_owned());
        }
        if subject.recipe.kv_bits < 16 {
            notes.push("the KV cache is not quantized where the export runs".to_owned());
        }
        if let Some(window) = subject.architecture.sliding_window() {
            notes.push(format!(
                "llama.cpp lets a token of this network attend to all tokens before it, and the model to the last \
                 {window}: the file's context is {}, within which there is no difference",
                metadata::context(subject.architecture)
            ));
        }
        notes
    }

    fn published(&self) -> Published {
        Published {
            library: "gguf",
            tags: &["gguf", "llama.cpp"],
            usage: &[("Serve it with llama.cpp", "llama-server -hf ORG/NAME")],
        }
    }

    fn contents<'a>(&self, model: &'a ExportedModel<'a>) -> Result<Contents<'a>> {
        // Every tensor is there, and of the form that the plan says.
        model.pieces()?;
        let outer = outer_type(model)?;
        let tensors = Lister::list(&model.architecture, &model.manifest.blocks, outer);
        let metadata = file_metadata(model)?;
        let infos: Vec<TensorInfo> = tensors.iter().map(|tensor| tensor.info.clone()).collect();
        let Layout { header, places, bytes } = lay_out(&metadata, &infos);
        let tensor_count = infos.len();
        let mut all = Vec::new();
        let mut offsets = Vec::new();
        for (tensor, place) in tensors.into_iter().zip(places) {
            let mut offset = place.start;
            for part in parts(model, tensor)? {
                offsets.push(offset);
                offset += part.bytes();
                all.push(part);
            }
            assert_eq!(offset, place.end, "the parts of a tensor fill its place");
        }
        let name = file_name(&model.manifest.source);
        let container = Container::File { name, header, offsets, bytes, tensors: tensor_count };
        Ok(Contents { parts: all, container })
    }
}

/// What embedding and head become; says so where that rounds them.
///
/// # Errors
/// A tensor that the checkpoint lacks.
fn outer_type(model: &ExportedModel<'_>) -> Result<TensorType> {
    let stored = model.checkpoint.tensor(model.architecture.outer_tensors()[0].name)?.dtype;
    let (kind, rounding) = match (model.embedding, stored) {
        (MatrixType::Q8_0, _) => (TensorType::Q8_0, Some("are rounded to Q8_0")),
        (MatrixType::F16, Dtype::F16) => (TensorType::F16, None),
        (MatrixType::F16, Dtype::BF16) => (
            TensorType::F16,
            Some("become F16, which has fewer bits for numbers of BF16 below 6.1e-5"),
        ),
        (MatrixType::F16, _) => (TensorType::F16, Some("are rounded to F16")),
    };
    if let Some(rounding) = rounding {
        let all = "embedding and head, which the checkpoint holds unquantized,";
        model.progress.info(&format!("{all} {rounding}"));
    }
    Ok(kind)
}

/// All keys of the file.
fn file_metadata(model: &ExportedModel<'_>) -> Result<Metadata> {
    let ExportedModel { architecture, manifest, progress, .. } = model;
    let name = metadata::architecture_name(architecture).ok_or_else(|| unknown(architecture))?;
    let mut all = metadata::general(name, &manifest.source);
    all.append(metadata::network(name, architecture));
    let mut cautions = Vec::new();
    all.append(tokenizer_metadata(model, &mut cautions)?);
    cautions.iter().for_each(|caution| progress.warn(caution));
    Ok(all)
}

fn unknown(architecture: &Architecture) -> Error {
    Error::input(format!("llama.cpp's name of {} networks is not known", architecture.family))
}

fn tokenizer_metadata(model: &ExportedModel<'_>, cautions: &mut Vec<String>) -> Result<Metadata> {
    let checkpoint = model.checkpoint;
    let settings = checkpoint.json("tokenizer_config.json")?;
    let generation = checkpoint.json("generation_config.json")?;
    let template = checkpoint.file("chat_template.jinja")?;
    let template = template.as_deref().map(String::from_utf8_lossy);
    let files = TokenizerFiles {
        tokenizer: &checkpoint.tokenizer()?,
        path: &checkpoint.tokenizer_path(),
        config: checkpoint.config(),
        settings: settings.as_ref(),
        generation: generation.as_ref(),
        chat_template: template.as_deref(),
    };
    tokenizer::metadata(&files, model.architecture.vocabulary, cautions)
}

/// The file's name, as the Hub has them: `SmolLM2-135M-Q4_0.gguf`.
fn file_name(source: &SourceRecord) -> String {
    let name = metadata::model_name(source);
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = name.chars().map(plain).collect();
    format!("{}-Q4_0.gguf", name.trim_start_matches('.'))
}

/// The type that a stored tensor of this type has in the file without a change.
fn same_type(dtype: Dtype) -> Option<TensorType> {
    match dtype {
        Dtype::F16 => Some(TensorType::F16),
        Dtype::F32 => Some(TensorType::F32),
        _ => None,
    }
}
