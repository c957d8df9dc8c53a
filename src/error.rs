/*! One error type for the entire crate: a sentence, its causes, a hint, and whose fault it was.

The kind decides the exit code (design: 1 a check failed, 2 usage, 3 input, 4 machine, 130
interrupted), so a library call and the command line can never disagree about it. */

use std::fmt;
use std::io::{self, ErrorKind};

/// Whose fault an error is; its discriminant is the process's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A measured value broke a limit the user set, or a checkpoint failed verification.
    Check = 1,
    /// The command line asks for something that cannot be.
    Usage = 2,
    /// A file the user named is missing, damaged or of an unknown kind.
    Input = 3,
    /// The machine lacks something: disk, memory, a library, the network.
    Machine = 4,
    /// The user stopped the run.
    Interrupted = 130,
}

/// What went wrong, what it was caused by, and what to do about it.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    /// The sentence and its causes.
    chain: anyhow::Error,
    hint: Option<String>,
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of the given kind whose message is one sentence without a final period.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, chain: anyhow::Error::msg(message.into()), hint: None }
    }

    /// An error of the given kind whose sentence is that of `error`, which stays in the chain of sources with
    /// its own type.
    pub fn of(kind: Kind, error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self { kind, chain: anyhow::Error::new(error), hint: None }
    }

    /// Bad input: exit code 3.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Kind::Input, message)
    }

    /// Wrong usage: exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// The machine lacks something: exit code 4.
    pub fn machine(message: impl Into<String>) -> Self {
        Self::new(Kind::Machine, message)
    }

    /// A check failed: exit code 1.
    pub fn check(message: impl Into<String>) -> Self {
        Self::new(Kind::Check, message)
    }

    /// The user pressed Ctrl-C (or sent SIGTERM).
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted")
    }

    /// Adds what the user can do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Puts a sentence in front; the former message becomes its cause.
    pub fn context(self, message: impl Into<String>) -> Self {
        Self { chain: self.chain.context(message.into()), ..self }
    }

    /// The kind, which is also the exit code.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The sentence that says what is wrong.
    pub fn message(&self) -> String {
        self.chain.to_string()
    }

    /// What it was caused by, nearest first.
    pub fn causes(&self) -> Vec<String> {
        self.chain.chain().skip(1).map(ToString::to_string).collect()
    }

    /// What to do about it.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.chain)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.chain.source()
    }
}

/// I/O errors keep the sentence that fs-err makes (it names the path). A full disk is the
/// machine's fault; every other one is the input's.
impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        let machine_hint = match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                "free some disk space, or choose another place with --out"
            }
            ErrorKind::FileTooLarge => {
                "raise the limit on file sizes (`ulimit -f`), or choose a place with --out whose file \
                 system holds large files"
            }
            ErrorKind::OutOfMemory => "raise the limit on memory (`ulimit -v`, the container's)",
            _ => return Self::of(Kind::Input, error),
        };
        Self::of(Kind::Machine, error).hint(machine_hint)
    }
}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
