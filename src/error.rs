/*! One error type for the whole crate: a sentence, a hint, and whose fault it was.

The kind decides the exit code (design: 1 a check failed, 2 usage, 3 input, 4 machine, 130
interrupted), so a library call and the command line can never disagree about it. */

use std::fmt;

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
    message: String,
    causes: Vec<String>,
    hint: Option<String>,
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of the given kind whose message is one sentence without a final period.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), causes: Vec::new(), hint: None }
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
    pub fn context(mut self, message: impl Into<String>) -> Self {
        let cause = std::mem::replace(&mut self.message, message.into());
        self.causes.insert(0, cause);
        self
    }

    /// The kind, which is also the exit code.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The sentence that says what is wrong.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What it was caused by, nearest first.
    pub fn causes(&self) -> &[String] {
        &self.causes
    }

    /// What to do about it.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.causes.iter().try_for_each(|cause| write!(f, ": {cause}"))
    }
}

impl std::error::Error for Error {}

/// I/O errors keep the sentence that fs-err makes (it names the path). A full disk is the
/// machine's fault; every other one is the input's.
impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind;
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::machine(error.to_string())
                .hint("free some disk space, or choose another place with --out"),
            ErrorKind::FileTooLarge => Self::machine(error.to_string()).hint(
                "raise the limit on file sizes (`ulimit -f`), or choose a place with --out whose file \
                 system holds large files",
            ),
            ErrorKind::OutOfMemory => Self::machine(error.to_string())
                .hint("raise the limit on memory (`ulimit -v`, the container's)"),
            _ => Self::input(error.to_string()),
        }
    }
}
