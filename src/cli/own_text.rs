//! `--calib self`: the windows that the model writes itself, before anything is calibrated on them.

use super::Ui;
use super::args::Opened;
use crate::backend::{Backend, Decode, Exchange};
use crate::checkpoint::Source;
use crate::pipeline::Calibration;
use crate::serve::OwnText;
use crate::{Error, Result};

/// Refuses text that the model writes where several ranks would each write it.
///
/// # Errors
/// Usage.
pub(crate) fn check_ranks(calibration: &Calibration, opened: &Opened) -> Result<()> {
    let ranks = match opened {
        Opened::Cpu(cpu, _) => cpu.ranks().ranks(),
        Opened::Cuda(cuda) => cuda.ranks().ranks(),
    };
    if ranks == 1 || calibration.text.unwritten(calibration.samples)?.is_none() {
        return Ok(());
    }
    Err(Error::usage(
        "a model writes the text that it is calibrated on, --calib self, on one rank alone",
    )
    .hint("run without --gpus and --ranks, or calibrate on a text"))
}

/// Has the model write what the calibration lacks of its own text; a calibration on other texts stays as it is.
pub(crate) fn write_own_text<B: Backend + Decode>(
    backend: &B,
    source: &Source,
    calibration: Calibration,
    ui: &Ui,
) -> Result<Calibration> {
    let Calibration { text, samples, seq_len, seed } = calibration;
    let Some((windows, file)) = text.unwritten(samples)? else {
        return Ok(Calibration { text, samples, seq_len, seed });
    };
    let beginnings = match file {
        None => Vec::new(),
        Some(file) => {
            let content = fs_err::read_to_string(file)?;
            let lines = content.lines().filter(|line| !line.trim().is_empty());
            let lines: Vec<String> = lines.map(str::to_owned).collect();
            if lines.is_empty() {
                let what = format!("{} has no line to begin with", file.display());
                return Err(Error::input(what).hint("give text: each line begins a window"));
            }
            lines
        }
    };
    let tokens = OwnText { windows, seq_len, seed, beginnings }.sample(backend, source, ui)?;
    // What was freed is worth more to the calibration.
    backend.trim();
    Ok(Calibration { text: text.with_own(tokens), samples, seq_len, seed })
}
