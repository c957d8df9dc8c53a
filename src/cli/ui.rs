/*! stderr: progress, messages, and the signals that stop a run.

On a terminal a stage is one bar that is redrawn; elsewhere each step is one plain line, so that a
log file stays a log. Every message passes through here, because a bar must step aside for it. */

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::failure::{HINT, WARNING};
use crate::printable::{printable, printable_lines, printable_styled};
use crate::progress::Progress;
use crate::units;
use crate::{Kind, machine};

/// What the user sees while a command runs.
pub struct Ui {
    quiet: bool,
    shared: Arc<Shared>,
}

/// What the signal handler's thread shares with the run.
struct Shared {
    stop: AtomicBool,
    /// Whether another process shows what there is to see.
    muted: AtomicBool,
    stage: Mutex<Option<Stage>>,
}

struct Stage {
    name: String,
    steps: usize,
    done: usize,
    began: Instant,
    step_began: Instant,
    /// None where stderr is not a terminal.
    bar: Option<ProgressBar>,
}

impl Ui {
    /// With `quiet`, only warnings and errors are shown.
    pub fn new(quiet: bool) -> Self {
        let shared = Shared {
            stop: AtomicBool::new(false),
            muted: AtomicBool::new(false),
            stage: Mutex::new(None),
        };
        Self { quiet, shared: Arc::new(shared) }
    }

    /// Makes the first Ctrl-C or SIGTERM ask the run to stop, and the second end it immediately.
    pub(crate) fn watch_signals(&self, resumes: bool) {
        let shared = Arc::clone(&self.shared);
        let handler = move || {
            if shared.stop.swap(true, Ordering::Relaxed) {
                std::process::exit(Kind::Interrupted as i32);
            }
            let then = if resumes { "; --resume goes on from there" } else { "" };
            shared.say(&format!(
                "stopping at the next step{then}\n\
                 {HINT}hint:{HINT:#} press Ctrl-C again to stop at once\n"
            ));
        };
        // A run under `nohup` or in the background of a script goes on where it was meant to.
        if let Err(error) = machine::keep_ignored(|| ctrlc::set_handler(handler)) {
            self.warn(&format!("Ctrl-C will not wait for the current step to end: {error}"));
        }
    }

    /// Shows nothing from here on: another process of the run does.
    pub(crate) fn mute(&self) {
        self.shared.muted.store(true, Ordering::Relaxed);
    }

    /// Shows a person who waits what other threads have to say.
    pub(crate) fn notify(&self) -> Arc<dyn Fn(String) + Send + Sync> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move |sentence| shared.say(&format!("{}\n", printable_styled(&sentence))))
    }

    /// Asks for a line of input.
    pub(crate) fn ask(&self, prompt: &str) {
        self.close();
        write_stderr(prompt);
    }

    /// Takes the bar of an unfinished stage off the screen; called before anything else is printed.
    pub fn close(&self) {
        if let Some(bar) = self.shared.stage().take().and_then(|stage| stage.bar) {
            bar.finish_and_clear();
        }
    }
}

impl Shared {
    /// The current stage. A panic elsewhere leaves it as sound as it was.
    fn stage(&self) -> MutexGuard<'_, Option<Stage>> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes complete lines to stderr, above the bar if there is one.
    fn say(&self, lines: &str) {
        if self.muted.load(Ordering::Relaxed) {
            return;
        }
        let stage = self.stage();
        match stage.as_ref().and_then(|stage| stage.bar.as_ref()) {
            Some(bar) => bar.suspend(|| write_stderr(lines)),
            None => write_stderr(lines),
        }
    }
}

impl Progress for Ui {
    fn begin(&self, stage: &str, steps: usize) {
        self.end();
        if self.quiet || self.shared.muted.load(Ordering::Relaxed) {
            return;
        }
        let now = Instant::now();
        let bar = anstream::stderr().is_terminal().then(|| new_bar(&printable(stage), steps));
        *self.shared.stage() = Some(Stage {
            name: printable(stage).into_owned(),
            steps,
            done: 0,
            began: now,
            step_began: now,
            bar,
        });
    }

    fn advance(&self, detail: &str) {
        let mut guard = self.shared.stage();
        let Some(stage) = guard.as_mut() else { return };
        stage.done += 1;
        let detail = &printable(detail);
        match &stage.bar {
            Some(bar) => {
                bar.set_message(detail.clone().into_owned());
                bar.inc(1);
            }
            None => write_stderr(&step_line(stage, detail, stage.step_began.elapsed())),
        }
        stage.step_began = Instant::now();
    }

    fn end(&self) {
        let Some(stage) = self.shared.stage().take() else { return };
        if let Some(bar) = &stage.bar {
            bar.finish_and_clear();
            // What remains on the terminal of a stage is one line, in the form of a plain step.
            write_stderr(&step_line(&stage, "", stage.began.elapsed()));
        }
    }

    fn info(&self, message: &str) {
        if !self.quiet {
            self.shared.say(&format!("{}\n", printable_styled(message)));
        }
    }

    fn warn(&self, message: &str) {
        let message = printable_lines(message);
        self.shared.say(&format!("{WARNING}warning:{WARNING:#} {message}\n"));
    }

    fn stop_requested(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }
}

/// `calibrate 3/30  <detail>  1.2 s`
fn step_line(stage: &Stage, detail: &str, took: Duration) -> String {
    let Stage { name, steps, done, .. } = stage;
    let detail = if detail.is_empty() { String::new() } else { format!("  {detail}") };
    format!("{name} {done}/{steps}{detail}  {}\n", units::seconds(took.as_secs_f64()))
}

fn new_bar(stage: &str, steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix:<10} [{bar:24}] {pos}/{len}  {elapsed}, {eta} left  {memory}  {wide_msg}",
    )
    .expect("the template is a constant")
    .progress_chars("=> ")
    .with_key("memory", |_: &ProgressState, text: &mut dyn std::fmt::Write| {
        if let Some(bytes) = resident_bytes() {
            // Writing to indicatif's string cannot fail.
            let _ = text.write_str(&units::bytes(bytes));
        }
    });
    let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr())
        .with_style(style)
        .with_prefix(stage.to_owned());
    // It panics where no thread can be started; the bar is drawn at every step then.
    if std::thread::Builder::new().spawn(|| ()).is_ok_and(|thread| thread.join().is_ok()) {
        bar.enable_steady_tick(Duration::from_millis(500));
    }
    bar
}

/// Resident memory of this process, where the system reports it (Linux).
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

fn write_stderr(lines: &str) {
    // stderr may be closed; progress is no reason to fail.
    let _ = anstream::stderr().lock().write_all(lines.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_one_plain_line() {
        let now = Instant::now();
        let stage = Stage {
            name: "calibrate".into(),
            steps: 30,
            done: 3,
            began: now,
            step_began: now,
            bar: None,
        };
        let took = Duration::from_millis(1230);
        assert_eq!(
            step_line(&stage, "mean error 0.05", took),
            "calibrate 3/30  mean error 0.05  1.2 s\n"
        );
        assert_eq!(step_line(&stage, "", took), "calibrate 3/30  1.2 s\n");
    }

    #[test]
    fn a_stage_counts_its_steps_and_ends_when_the_next_begins() {
        let ui = Ui::new(true);
        ui.begin("a", 2);
        assert!(ui.shared.stage().is_none(), "quiet runs have no stage to show");
        let ui = Ui::new(false);
        *ui.shared.stage() = Some(Stage {
            name: "a".into(),
            steps: 2,
            done: 1,
            began: Instant::now(),
            step_began: Instant::now(),
            bar: None,
        });
        ui.begin("b", 5);
        let (name, done) =
            ui.shared.stage().as_ref().map(|stage| (stage.name.clone(), stage.done)).unwrap();
        assert_eq!((name.as_str(), done), ("b", 0));
        ui.close();
        assert!(ui.shared.stage().is_none());
    }

    #[test]
    fn a_stop_reaches_the_pipeline_as_an_interruption() {
        let ui = Ui::new(true);
        assert!(ui.check_stop().is_ok());
        ui.shared.stop.store(true, Ordering::Relaxed);
        assert_eq!(ui.check_stop().unwrap_err().kind(), Kind::Interrupted);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn resident_memory_is_known() {
        assert!(resident_bytes().unwrap() > 1 << 20);
    }
}
