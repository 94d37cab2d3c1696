//! What people are told when something does not work, and the exit code that scripts see.

use std::{fmt, process::ExitCode};

use crate::output::{visible, visible_lines};

pub(crate) use service::error_chain as chain;

/// How a command ended, as scripts see it. 0 is success; clap itself ends with 2 on a wrong command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// 1: it was tried and did not work.
    Failed,
    /// 2: the command line does not make sense.
    Usage,
    /// 3: what was named does not exist.
    NotFound,
    /// 4: nobody answered.
    Unreachable,
}

/// An error for people: what was tried, what happened, what to do.
#[derive(Debug)]
pub(crate) struct Error {
    kind: Kind,
    tried: String,
    happened: String,
    remedy: Option<String>,
}

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    fn new(kind: Kind, tried: impl Into<String>, happened: impl fmt::Display) -> Self {
        Self { kind, tried: tried.into(), happened: happened.to_string(), remedy: None }
    }

    pub(crate) fn failed(tried: impl Into<String>, happened: impl fmt::Display) -> Self {
        Self::new(Kind::Failed, tried, happened)
    }

    pub(crate) fn usage(tried: impl Into<String>, happened: impl fmt::Display) -> Self {
        Self::new(Kind::Usage, tried, happened)
    }

    pub(crate) fn not_found(tried: impl Into<String>, happened: impl fmt::Display) -> Self {
        Self::new(Kind::NotFound, tried, happened)
    }

    pub(crate) fn unreachable(tried: impl Into<String>, happened: impl fmt::Display) -> Self {
        Self::new(Kind::Unreachable, tried, happened)
    }

    /// Says what to do about it.
    pub(crate) fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// What an HTTP status of the hub means to the one who asked.
    pub(crate) fn of_status(tried: impl Into<String>, code: u16, message: &str) -> Self {
        let message =
            if message.is_empty() { format!("the hub answered {code}") } else { message.to_owned() };
        match code {
            404 => Self::not_found(tried, message),
            401 => Self::failed(tried, message).remedy(
                "the hub does not know this user: take the kubeconfig that the hub wrote (--kubeconfig)",
            ),
            // Unless the answer itself says what to do, as that to a destination that is not open does.
            403 if !message.contains('\n') => Self::failed(tried, message)
                .remedy("this user may not: ask for rights, or take another kubeconfig"),
            502..=504 => Self::unreachable(tried, message),
            _ => Self::failed(tried, message),
        }
    }

    /// What an error of the Kubernetes client means.
    pub(crate) fn of_kube(tried: impl Into<String>, error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_status(tried, status.code, &status.message),
            kube::Error::Service(_) | kube::Error::HyperError(_) => Self::unreachable(tried, chain(error))
                .remedy("is the hub running? `cellway up` or `cellway hub` starts one; --kubeconfig or --data-dir names another"),
            other => Self::failed(tried, chain(other)),
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.kind {
            Kind::Failed => service::exit::FAILED,
            Kind::Usage => service::exit::USAGE,
            Kind::NotFound => 3,
            Kind::Unreachable => 4,
        })
    }

    #[cfg(test)]
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Further lines of what happened are the other side's advice.
        let happened = visible_lines(self.happened.trim_end()).replace('\n', "\n  ");
        write!(f, "cannot {}: {happened}", visible(&self.tried))?;
        match &self.remedy {
            Some(remedy) => write!(f, "\n  {}", visible_lines(remedy)),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_become_exit_codes() {
        for (code, kind) in [
            (404, Kind::NotFound),
            (403, Kind::Failed),
            (409, Kind::Failed),
            (502, Kind::Unreachable),
            (503, Kind::Unreachable),
            (504, Kind::Unreachable),
        ] {
            assert_eq!(Error::of_status("ask", code, "").kind(), kind, "{code}");
        }
    }

    #[test]
    fn the_hubs_own_advice_is_enough() {
        let shown = |message: &str| Error::of_status("dial", 403, message).to_string();
        assert!(shown("forbidden").contains("this user may not"));
        let closed = shown("the hub does not allow it\nopen it with an annotation");
        assert!(closed.contains("annotation") && !closed.contains("this user"), "{closed}");
    }

    #[test]
    fn says_what_was_tried_what_happened_and_what_to_do() {
        let error = Error::unreachable("list the tunnels", "connection refused").remedy("start the hub");
        assert_eq!(error.to_string(), "cannot list the tunnels: connection refused\n  start the hub");
        let error =
            Error::failed("read one\x1b[2J", "it says \x1b]0;x\x07\nand \u{9b}1A").remedy("look\rat it");
        assert_eq!(
            error.to_string(),
            "cannot read one^[[2J: it says ^[]0;x^G\n  and \\u{9b}1A\n  look\\rat it"
        );
    }
}
