/*! `atom bench quantize`: the whole pipeline on a synthetic checkpoint, from files to a file. */

use serde::Serialize;
use serde_json::{Value, json};

use super::{BenchOutcome, SyntheticModel};
use crate::backend::Backend;
use crate::checkpoint::Source;
use crate::pipeline::progress::Progress;
use crate::pipeline::{Calibration, Output, quantize as run};
use crate::recipe::Recipe;
use crate::text::{Split, TextSet};
use crate::{Error, Result};

/// One figure.
#[derive(Serialize)]
struct Figure {
    figure: String,
    value: Value,
}

/// Writes the model, quantizes it by the default recipe and returns seconds by stage, peak memory and
/// sizes.
pub fn quantize<B: Backend>(
    backend: &B,
    model: &SyntheticModel,
    progress: &dyn Progress,
) -> Result<BenchOutcome> {
    let temporary = tempfile::tempdir()?;
    let directory = model.directory.as_deref().unwrap_or(temporary.path());
    let source = directory.join(&model.shape);
    if source.exists() {
        return Err(Error::usage(format!("{} exists already", source.display()))
            .hint("name another directory with --dir"));
    }
    progress.info(&format!("writing random weights to {}", source.display()));
    model.write(&source)?;
    let source = Source::open(&source)?;
    let calibration = Calibration {
        text: TextSet::load("sample", Split::Calibration)?,
        samples: model.samples,
        seq_len: model.seq_len,
        seed: 0,
    };
    let out = directory.join(format!("{}-atom", model.shape));
    let output = Output { out, overwrite: false, resume: false };
    let outcome =
        run(backend, &source, &calibration, &Recipe::default_recipe(), &output, None, progress)?;
    let figure = |figure: &str, value: Value| Figure { figure: figure.to_owned(), value };
    let mut figures =
        vec![figure("device", json!(outcome.device)), figure("seconds", json!(outcome.seconds))];
    for stage in &outcome.stage_seconds {
        figures.push(figure(&format!("{} seconds", stage.stage), json!(stage.seconds)));
    }
    figures.extend([
        figure("peak RSS bytes", json!(outcome.peak_rss_bytes)),
        figure("source bytes", json!(outcome.source_bytes)),
        figure("checkpoint bytes", json!(outcome.out_bytes)),
        figure("bits per weight", json!(outcome.bits_per_weight)),
    ]);
    Ok(BenchOutcome::of(&figures))
}
