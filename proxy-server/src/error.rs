//! Why a request could not reach its member, and what each frontend says about it.
//!
//! One enum for all frontends; the mapping to an HTTP status, to the code in the `cellway-error` header and to a
//! sentence of advice is written once, here.

use http::StatusCode;
use tunnel::{DialError, Target};

/// The header that carries [`ProxyError::code`], on responses of every HTTP frontend and on the tunnel's own wire.
pub const ERROR_HEADER: &str = "cellway-error";

/// A request that ends here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// The hub has no such member.
    #[error("cluster '{cluster}' is not known to this hub")]
    UnknownCluster {
        /// As the client wrote it.
        cluster: String,
    },
    /// The member has no tunnel now. `None`: no agent for a request that named no member.
    #[error("{}", no_tunnel(.cluster.as_deref()))]
    NoTunnel {
        /// The member.
        cluster: Option<String>,
    },
    /// The hub does not let this destination be dialled.
    #[error("the hub does not allow the destination {target} in cluster '{cluster}'")]
    NotAllowedAtHub {
        /// The member.
        cluster: String,
        /// `host:port`.
        target: String,
    },
    /// An agent could not, or would not, connect.
    #[error("{}", failed_dial(target, error))]
    Dial {
        /// `host:port`.
        target: String,
        /// The agent's answer.
        error: DialError,
    },
    /// The client may not use this frontend.
    #[error("user '{user}' may not use this frontend")]
    NotAuthorised {
        /// The certificate's common name.
        user: String,
    },
    /// This client dials faster than it may.
    #[error("too many dials from this client")]
    RateLimited,
    /// This client has as much under way as it may.
    #[error("too many requests of this client are under way")]
    TooManyRequests,
    /// A limit on requests at one time is reached.
    #[error("too many connections at this server")]
    TooManyConnections,
    /// The server is on its way out.
    #[error("this server is draining and takes no new connections")]
    Draining,
    /// The server has just started and does not know its members yet.
    #[error("this server is starting and does not know its clusters yet")]
    Starting,
    /// Not a destination.
    #[error("bad target: {0}")]
    BadTarget(String),
    /// Not HTTP as this frontend reads it.
    #[error("bad request: {0}")]
    BadRequest(&'static str),
    /// The head is larger than the limit.
    #[error("the request's head is larger than {limit} bytes")]
    HeadTooLarge {
        /// In bytes.
        limit: usize,
    },
    /// The head did not come in time.
    #[error("the request's head did not arrive in time")]
    HeadTimeout,
    /// The body did not come in time.
    #[error("the request's body did not arrive in time")]
    BodyTimeout,
    /// Another method than CONNECT.
    #[error("this proxy only supports CONNECT passthrough")]
    NotConnect,
}

fn no_tunnel(cluster: Option<&str>) -> String {
    match cluster {
        Some(cluster) => format!("cluster '{cluster}' has no tunnel to this hub now"),
        None => "currently no tunnels available".to_owned(),
    }
}

/// An agent without a gateway refuses the gateway's address; its policy has nothing to do with that.
fn lacks_gateway(target: &str, error: &DialError) -> bool {
    matches!(error, DialError::NotAllowed) && target == Target::api_gateway().to_string()
}

fn failed_dial(target: &str, error: &DialError) -> String {
    if lacks_gateway(target, error) {
        "the member's agent serves no API: it runs without an API gateway".to_owned()
    } else {
        format!("failed to connect to {target}: {error}")
    }
}

// === impl ProxyError ===

impl ProxyError {
    /// The status of an HTTP response.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::UnknownCluster { .. } => StatusCode::NOT_FOUND,
            Self::NoTunnel { .. } | Self::Draining | Self::Starting | Self::TooManyConnections => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::NotAllowedAtHub { .. } | Self::NotAuthorised { .. } => StatusCode::FORBIDDEN,
            Self::Dial { error, .. } => match error {
                DialError::NotAllowed => StatusCode::FORBIDDEN,
                DialError::TimedOut => StatusCode::GATEWAY_TIMEOUT,
                DialError::TooManyConnections | DialError::Draining => StatusCode::SERVICE_UNAVAILABLE,
                DialError::Refused
                | DialError::UnknownHost
                | DialError::Unreachable
                | DialError::TunnelClosed
                | DialError::Failed => StatusCode::BAD_GATEWAY,
            },
            Self::RateLimited | Self::TooManyRequests => StatusCode::TOO_MANY_REQUESTS,
            Self::BadTarget(_) | Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::HeadTooLarge { .. } => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::HeadTimeout | Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::NotConnect => StatusCode::METHOD_NOT_ALLOWED,
        }
    }

    /// A stable word for scripts and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownCluster { .. } => "unknown-cluster",
            Self::NoTunnel { .. } => "no-tunnel",
            Self::NotAllowedAtHub { .. } => "not-allowed",
            Self::Dial { error, .. } => error.code(),
            Self::NotAuthorised { .. } => "not-authorised",
            Self::RateLimited => "rate-limited",
            Self::TooManyRequests => "too-many-requests",
            Self::TooManyConnections => "too-many-connections",
            Self::Draining => "server-draining",
            Self::Starting => "starting",
            Self::BadTarget(_) => "bad-target",
            Self::BadRequest(_) => "bad-request",
            Self::HeadTooLarge { .. } => "head-too-large",
            Self::HeadTimeout => "head-timeout",
            Self::BodyTimeout => "body-timeout",
            Self::NotConnect => "not-connect",
        }
    }

    /// What the person who reads the error can do.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::UnknownCluster { .. } => {
                "check the name against `cellway clusters`, or enrol it with `cellway cluster add`"
            }
            Self::NoTunnel { cluster: None } => {
                "to reach an enrolled member, name it: as the header Cellway-Cluster, as the user of \
                 Proxy-Authorization, or in the host, HOST.MEMBER.cellway; otherwise check that an agent runs and can \
                 reach this server's agent port"
            }
            Self::NoTunnel { .. } => "check that the member's agent runs and can reach this hub's agent port",
            Self::NotAllowedAtHub { .. } => {
                "open it with the annotation cellway.io/allowed-destinations on the KubeFedCluster; the agent must \
                 allow it too"
            }
            Self::Dial { target, error } if lacks_gateway(target, error) => {
                "start the agent in a pod of the member, or with --kubeconfig"
            }
            Self::Dial { error, .. } => match error {
                DialError::Refused => "nothing listens there: check the port and that the service runs",
                DialError::TimedOut => "check that the member's network lets its agent reach the destination",
                DialError::NotAllowed => "open it with --allow at the agent; the hub must allow it too",
                DialError::UnknownHost => "the name is resolved inside the member: check it there",
                DialError::Unreachable => "the member has no route to it: check the address",
                DialError::TooManyConnections => "try again later, or run more agents in the member",
                DialError::TunnelClosed => "try again: the tunnel broke and the agent reconnects by itself",
                DialError::Draining => "try again: the agent is being replaced",
                DialError::Failed => "see the agent's log for the cause",
            },
            Self::NotAuthorised { .. } => {
                "use a client certificate of group system:masters or cellway:dialers"
            }
            Self::RateLimited => {
                "dial more slowly; where proxy-server runs by itself, --client-dial-rate raises the limit"
            }
            Self::TooManyRequests => "wait for answers; at the API proxy, end watches that nobody reads",
            Self::TooManyConnections => {
                "close connections, or try again later; where proxy-server runs by itself, --max-client-connections \
                 raises a client's share"
            }
            Self::Draining | Self::Starting => "try again",
            Self::BadTarget(_) => "write CONNECT host:port, with IPv6 addresses in brackets",
            Self::BadRequest(_) => "send an HTTP/1.1 CONNECT request",
            Self::HeadTooLarge { .. } => "send fewer or shorter headers",
            Self::HeadTimeout => "send the whole head at once",
            Self::BodyTimeout => "send the body without pauses of 90 s",
            Self::NotConnect => "send CONNECT host:port",
        }
    }

    /// The body of a plain HTTP response.
    pub fn body(&self) -> String {
        format!("{self}\n{}\n", self.advice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_without_a_gateway_is_told_apart_from_a_policy() {
        let target = Target::api_gateway().to_string();
        let error = ProxyError::Dial { target, error: DialError::NotAllowed };
        assert!(
            error.body().contains("--kubeconfig") && !error.body().contains("policy"),
            "{}",
            error.body()
        );
        assert_eq!((error.status().as_u16(), error.code()), (403, "not-allowed"));
    }

    #[test]
    fn the_five_cases_differ() {
        let dial = |error| ProxyError::Dial { target: "db:1".to_owned(), error };
        let cases = [
            (ProxyError::UnknownCluster { cluster: "x".to_owned() }, 404, "unknown-cluster"),
            (ProxyError::NoTunnel { cluster: Some("x".to_owned()) }, 503, "no-tunnel"),
            (dial(DialError::Refused), 502, "refused"),
            (dial(DialError::TimedOut), 504, "timed-out"),
            (dial(DialError::NotAllowed), 403, "not-allowed"),
            (
                ProxyError::NotAllowedAtHub { cluster: "x".to_owned(), target: "db:1".to_owned() },
                403,
                "not-allowed",
            ),
        ];
        for (error, status, code) in cases {
            assert_eq!((error.status().as_u16(), error.code()), (status, code), "{error}");
            assert!(error.body().lines().count() == 2, "{error}");
        }
    }
}
