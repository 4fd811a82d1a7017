//! One error: a message, a cause, and whether the user's words or the world were at fault.
//!
//! A message is one sentence that names the file or flag, both values and the next thing to do. `context` adds what was being
//! attempted; `main` prints the chain once and exits with [`Error::exit_code`].

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

/// Whose fault it was; the only thing about an error that code may look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file, a shape, a number: exit code 1.
    Failed,
    /// What was typed cannot be meant: exit code 2.
    Usage,
}

#[derive(Debug)]
pub struct Error {
    message: String,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
    kind: Kind,
}

impl Error {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), cause: None, kind: Kind::Failed }
    }

    /// An error in what was typed.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), cause: None, kind: Kind::Usage }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Failed => 1,
            Kind::Usage => 2,
        }
    }

    /// The whole chain on one line, outermost first.
    pub fn chain(&self) -> String {
        let mut line = self.message.clone();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            line.push_str(": ");
            line.push_str(&cause.to_string());
            next = cause.source();
        }
        line
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

/// Adds what was being attempted to an error on its way up.
pub trait Context<T> {
    fn context(self, message: impl Into<String>) -> Result<T>;
    fn with_context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T>;
}

impl<T, E: std::error::Error + Send + Sync + 'static> Context<T> for std::result::Result<T, E> {
    fn context(self, message: impl Into<String>) -> Result<T> {
        self.with_context(|| message)
    }

    fn with_context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T> {
        self.map_err(|cause| {
            let cause: Box<dyn std::error::Error + Send + Sync> = Box::new(cause);
            let kind = cause.downcast_ref::<Error>().map_or(Kind::Failed, Error::kind);
            Error { message: message().into(), cause: Some(cause), kind }
        })
    }
}

/// Returns an error with this message.
#[macro_export]
macro_rules! bail {
    ($($message:tt)*) => { return Err($crate::error::Error::new(format!($($message)*))) };
}

/// Returns an error with this message unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)*) => { if !$condition { $crate::bail!($($message)*) } };
}
