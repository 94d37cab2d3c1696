//! What every cellway program shares at its edges: flags, logging, signals, drain, readiness, metrics, admin server.
//!
//! Nothing here knows what a tunnel or a cluster is. A program's `main` reads, with this crate, as one screen: parse
//! the flags ([`flags`]), install the log ([`log`]), bind, run, and on a signal ([`signals`]) drain ([`drain`]).

pub mod admin;
pub mod background;
mod coalesce;
pub mod credential;
pub mod drain;
pub mod duration;
pub mod exit;
pub mod flags;
pub mod http;
pub mod log;
pub mod metrics;
pub mod process;
pub mod ready;
pub mod runtime;
pub mod signals;
pub mod socket;
mod unread;

/// The whole chain of an error on one line, outermost first, for logs and for the last line of a program.
///
/// Our errors do not repeat their cause in their own text; the programs put the two together here.
pub fn error_chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Foreign errors often do paste their cause, somewhere; saying it twice helps nobody.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the door")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("the key is lost")]
    struct Inner;

    #[derive(Debug, thiserror::Error)]
    #[error("no entry ({0}), try the window")]
    struct Pasted(#[source] Inner);

    #[test]
    fn chain_is_one_line() {
        assert_eq!(error_chain(&Outer(Inner)), "cannot open the door: the key is lost");
        assert_eq!(error_chain(&Pasted(Inner)), "no entry (the key is lost), try the window");
    }
}
