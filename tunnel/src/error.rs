//! What can go wrong with a dial and with a tunnel, and how it is said on the wire.

use std::{fmt, io};

use rustls::pki_types::UnixTime;
use thiserror::Error;

/// Why a connection through a tunnel could not be opened. The code travels in the `cellway-error` header.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum DialError {
    #[error("the destination refused the connection")]
    Refused,
    #[error("the destination did not answer in time")]
    TimedOut,
    #[error("the agent's destination policy does not allow this destination")]
    NotAllowed,
    #[error("the member does not know this host name")]
    UnknownHost,
    #[error("the member has no route to the destination")]
    Unreachable,
    #[error("too many connections: the tunnel's connection or memory budget is used up")]
    TooManyConnections,
    #[error("the tunnel closed before the destination answered")]
    TunnelClosed,
    #[error("the agent is draining and takes no new connections")]
    Draining,
    #[error("the agent could not open the connection")]
    Failed,
}

/// Why a tunnel could not be established, or broke.
#[derive(Debug, Error)]
pub enum TunnelError {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("the peer closed the connection during {0}")]
    Closed(&'static str),
    #[error("the TLS handshake failed: {0}")]
    Tls(String),
    #[error("no {0} within the time limit")]
    TimedOut(&'static str),
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
}

/// Whether it makes sense for a peer that was turned away to come again soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// It may be taken in a moment: the server is starting, or has no room.
    Temporary,
    /// It will not be taken until somebody changes something.
    Lasting,
}

/// How a tunnel ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// This side closed it, with the reason given.
    Local(String),
    /// The other side said why it closed.
    Remote(String),
    /// The other side turned this one away for a reason that will not pass by itself, such as a revoked certificate.
    Refused(String),
    /// The connection ended without a word, or broke.
    Lost(String),
    /// Nothing was heard for the keep-alive time.
    KeepAlive,
    /// The peer broke the protocol.
    Protocol(String),
}

// === impl TunnelError ===

impl From<rustls::Error> for TunnelError {
    /// In words that tell a wrong clock from a wrong certificate: both times are said.
    fn from(error: rustls::Error) -> Self {
        use rustls::CertificateError::{ExpiredContext, NotValidYetContext};
        let text = match &error {
            rustls::Error::InvalidCertificate(NotValidYetContext { time, not_before }) => format!(
                "the peer's certificate is valid from {} on, and here it is {}: is this machine's clock slow, or the \
                 other's fast?",
                date(*not_before),
                date(*time)
            ),
            rustls::Error::InvalidCertificate(ExpiredContext { time, not_after }) => format!(
                "the peer's certificate has expired at {}, and here it is {}: renew it, unless this machine's clock is \
                 fast",
                date(*not_after),
                date(*time)
            ),
            _ => error.to_string(),
        };
        Self::Tls(text)
    }
}

fn date(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).ok();
    let date = seconds.and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    // A certificate can bear any date.
    date.map_or_else(|| format!("{} s after 1970", time.as_secs()), |date| date.to_string())
}

// === impl DialError ===

/// Every error with its wire code; the only place where both are written.
const CODES: [(DialError, &str); 9] = [
    (DialError::Refused, "refused"),
    (DialError::TimedOut, "timed-out"),
    (DialError::NotAllowed, "not-allowed"),
    (DialError::UnknownHost, "unknown-host"),
    (DialError::Unreachable, "unreachable"),
    (DialError::TooManyConnections, "too-many-connections"),
    (DialError::TunnelClosed, "tunnel-closed"),
    (DialError::Draining, "draining"),
    (DialError::Failed, "failed"),
];

impl DialError {
    /// The code on the wire and in metrics labels.
    pub fn code(self) -> &'static str {
        CODES.iter().find(|(error, _)| *error == self).map_or("failed", |(_, code)| code)
    }

    /// The error of a code; a code of a newer version reads as [`DialError::Failed`].
    pub fn from_code(code: &str) -> Self {
        CODES.iter().find(|(_, known)| *known == code).map_or(Self::Failed, |(error, _)| *error)
    }

    /// Whether another agent of the same cluster may do better: the fault is this tunnel's, not the destination's.
    pub fn retry_elsewhere(self) -> bool {
        match self {
            Self::TooManyConnections | Self::TunnelClosed | Self::Draining => true,
            Self::Refused
            | Self::TimedOut
            | Self::NotAllowed
            | Self::UnknownHost
            | Self::Unreachable
            | Self::Failed => false,
        }
    }
}

impl From<&io::Error> for DialError {
    /// What a failed `connect(2)` means to the one who asked for it.
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Self::Refused,
            io::ErrorKind::TimedOut => Self::TimedOut,
            io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::AddrNotAvailable => Self::Unreachable,
            _ => Self::Failed,
        }
    }
}

// === impl RefusalKind ===

impl RefusalKind {
    /// How a tunnel ends whose agent is turned away for `reason`.
    pub(crate) fn close(self, reason: &str) -> CloseReason {
        match self {
            Self::Temporary => CloseReason::Local(reason.to_owned()),
            Self::Lasting => CloseReason::Refused(reason.to_owned()),
        }
    }
}

// === impl CloseReason ===

impl CloseReason {
    /// A word for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Local(_) => "closed-here",
            Self::Remote(_) => "closed-by-peer",
            Self::Refused(_) => "refused",
            Self::Lost(_) => "lost",
            Self::KeepAlive => "keep-alive",
            Self::Protocol(_) => "protocol",
        }
    }

    /// What the peer is told.
    pub(crate) fn to_peer(&self) -> String {
        match self {
            Self::Local(reason) | Self::Refused(reason) => reason.clone(),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(reason) => write!(f, "closed here: {reason}"),
            Self::Remote(reason) => write!(f, "closed by the peer: {reason}"),
            Self::Refused(reason) => write!(f, "refused: {reason}"),
            Self::Lost(reason) => write!(f, "lost: {reason}"),
            Self::KeepAlive => f.write_str("lost: nothing heard for the keep-alive time"),
            Self::Protocol(reason) => write!(f, "the peer broke the protocol: {reason}"),
        }
    }
}

impl From<&TunnelError> for CloseReason {
    fn from(error: &TunnelError) -> Self {
        match error {
            TunnelError::Protocol(what) => Self::Protocol(what.clone()),
            TunnelError::Io(source) => Self::Lost(source.to_string()),
            other => Self::Lost(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_go_there_and_back() {
        for (error, code) in CODES {
            assert_eq!(error.code(), code);
            assert_eq!(DialError::from_code(code), error);
        }
        assert_eq!(DialError::from_code("of-a-newer-version"), DialError::Failed);
    }

    #[test]
    fn a_wrong_clock_is_told_with_both_times() {
        let at = |seconds| UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        let early = rustls::CertificateError::NotValidYetContext {
            time: at(1_800_000_000),
            not_before: at(1_800_003_600),
        };
        let text = TunnelError::from(rustls::Error::InvalidCertificate(early)).to_string();
        assert!(text.contains("2027-01-15T08:00:00Z") && text.contains("2027-01-15T09:00:00Z"), "{text}");
        let late =
            rustls::CertificateError::ExpiredContext { time: at(u64::MAX), not_after: at(1_800_000_000) };
        let text = TunnelError::from(rustls::Error::InvalidCertificate(late)).to_string();
        assert!(text.contains("expired at 2027-01-15T08:00:00Z"), "{text}");
    }
}
