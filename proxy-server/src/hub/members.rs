//! How the controller reaches members: through their tunnels, to the agent's gateway in the clear, or to the member's API
//! inside TLS with a credential that the hub holds.

use std::time::Duration;

use federation_controller::{BoxedIo, ConnectError, Connector, Destination, Io, To, Trust, connector};
use federation_core::credentials::Login;
use tls::{ClientTls, ServerName, TlsError, TlsVersions};
use tokio::io::{AsyncRead, AsyncWrite};
use tunnel::{DialError, ServerTunnel, Target};

use crate::error::ProxyError;
use crate::registry::{DialRequest, Frontend, Registry};
use crate::route::{Route, parse_cluster};

/// How the controller reaches members.
pub(super) fn member_connector(registry: Registry<ServerTunnel>, timeout: Duration) -> Connector {
    connector(move |to: Destination| {
        let registry = registry.clone();
        async move {
            let Destination { cluster, to } = to;
            let dial = async {
                let name = parse_cluster(&cluster)?;
                let (target, frontend) = match &to {
                    To::Gateway => (Target::api_gateway(), Frontend::Controller),
                    To::Api(access) => {
                        (Target { host: access.host.clone(), port: access.port }, Frontend::Controller)
                    }
                    To::Endpoint { host, port, .. } => {
                        (Target { host: host.clone(), port: *port }, Frontend::Look)
                    }
                };
                let route = Route { cluster: Some(name), target };
                let request =
                    DialRequest { route: &route, frontend, client: "federation-controller", timeout };
                registry.dial(request).await
            };
            let stream = dial.await.map_err(|error| connect_error(cluster.clone(), &error))?;
            let (trust, identity) = match &to {
                To::Gateway | To::Endpoint { tls: None, .. } => return Ok(Box::new(stream) as BoxedIo),
                To::Endpoint { tls: Some(trust), .. } => (trust.clone(), None),
                To::Api(access) => {
                    let identity = match &access.login {
                        Login::Certificate { chain, key } => Some((chain.as_str(), key.as_str())),
                        Login::Token(_) => None,
                    };
                    (Trust { ca: access.ca.clone(), server_name: access.server_name.clone() }, identity)
                }
            };
            let io: BoxedIo = match secured(&trust, identity, stream).await {
                Ok(stream) => Box::new(stream),
                Err(error) => return Err(error.of(cluster)),
            };
            Ok(io)
        }
    })
}

/// Why there is no TLS to a member's API.
#[derive(Debug, thiserror::Error)]
enum SecureError {
    #[error("the CA or the client certificate cannot be used")]
    Credential(#[source] TlsError),
    #[error("{0:?} cannot be the name of a server")]
    ServerName(String),
    #[error("no TLS with {server}")]
    Handshake {
        server: String,
        #[source]
        source: std::io::Error,
    },
}

impl SecureError {
    /// Only who refuses, or is not, whom they should be says something about the credential: an API that is being started
    /// anew breaks handshakes too.
    fn of(self, cluster: String) -> ConnectError {
        let refused = match &self {
            Self::Credential(_) | Self::ServerName(_) => true,
            Self::Handshake { source, .. } => tls::refuses_identity(source),
        };
        let message = service::error_chain(&self);
        if refused {
            ConnectError::Unauthorized { cluster, message }
        } else {
            ConnectError::NotAnswering { cluster, message }
        }
    }
}

/// TLS end to end through the tunnel, with the certificate that the hub holds, if any.
async fn secured<S>(
    trust: &Trust,
    identity: Option<(&str, &str)>,
    stream: S,
) -> Result<impl Io + use<S>, SecureError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let tls = ClientTls::from_pem(&trust.ca, identity)
        .and_then(|tls| tls.with_versions(TlsVersions::From12))
        .map_err(SecureError::Credential)?;
    let name = ServerName::try_from(trust.server_name.clone())
        .map_err(|_| SecureError::ServerName(trust.server_name.clone()))?;
    let connecting = tls.connector(&[b"http/1.1"]).connect(name, stream);
    let server = || trust.server_name.clone();
    connecting.await.map_err(|source| SecureError::Handshake { server: server(), source })
}

/// What the cluster's conditions tell apart.
fn connect_error(cluster: String, error: &ProxyError) -> ConnectError {
    match error {
        ProxyError::NoTunnel { .. } | ProxyError::Draining | ProxyError::Starting => {
            ConnectError::NoTunnel { cluster }
        }
        ProxyError::UnknownCluster { .. }
        | ProxyError::NotAllowedAtHub { .. }
        | ProxyError::NotAuthorised { .. } => {
            ConnectError::Unauthorized { cluster, message: error.to_string() }
        }
        ProxyError::Dial { error: DialError::TunnelClosed, .. } => ConnectError::NoTunnel { cluster },
        ProxyError::Dial {
            error: DialError::Refused | DialError::TimedOut | DialError::Unreachable, ..
        } => ConnectError::NotAnswering { cluster, message: error.to_string() },
        _ => ConnectError::NotTried { cluster, message: error.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tls::{CertificateAuthority, ClientAuth, ServerTls};
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[test]
    fn the_controller_is_told_what_is_wrong() {
        let kind = |error: ProxyError| match connect_error("east".to_owned(), &error) {
            ConnectError::NoTunnel { .. } => "tunnel",
            ConnectError::Unauthorized { .. } => "credentials",
            ConnectError::NotAnswering { .. } => "api",
            ConnectError::NotTried { .. } => "nothing",
        };
        assert_eq!(kind(ProxyError::NoTunnel { cluster: None }), "tunnel");
        assert_eq!(kind(ProxyError::UnknownCluster { cluster: "east".to_owned() }), "credentials");
        let dial = |error| ProxyError::Dial { target: "x".to_owned(), error };
        assert_eq!(kind(dial(DialError::TunnelClosed)), "tunnel");
        assert_eq!(kind(dial(DialError::Refused)), "api");
        assert_eq!(kind(dial(DialError::TimedOut)), "api");
        assert_eq!(kind(dial(DialError::NotAllowed)), "nothing");
        assert_eq!(kind(dial(DialError::UnknownHost)), "nothing");
    }

    fn trust(ca: &CertificateAuthority) -> Trust {
        Trust { ca: ca.certificate_pem().to_owned(), server_name: "api".into() }
    }

    /// What becomes of TLS with an API that has a certificate for this name.
    async fn with_api(ca: &CertificateAuthority, trust: &Trust, name: &str) -> Result<(), ConnectError> {
        let issued = ca.issue_server(&[name.to_owned()], Duration::from_secs(3600)).unwrap();
        let server =
            ServerTls::from_pem(&issued.certificate_pem, &issued.key_pem, None, ClientAuth::None).unwrap();
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let serving = async {
            // Whether it comes about is the client's to say.
            if let Ok(mut stream) = server.acceptor(&[b"http/1.1"]).accept(theirs).await {
                let _ = stream.read(&mut [0]).await;
            }
        };
        let connecting =
            async { secured(trust, None, ours).await.map(drop).map_err(|error| error.of("east".into())) };
        tokio::join!(serving, connecting).1
    }

    #[tokio::test]
    async fn only_who_refuses_or_is_not_whom_they_should_be_says_something_about_the_credential() {
        let (ca, other) =
            (CertificateAuthority::create("one").unwrap(), CertificateAuthority::create("two").unwrap());
        assert_eq!(with_api(&ca, &trust(&ca), "api").await, Ok(()));
        for (issuer, name) in [(&other, "api"), (&ca, "somebody-else")] {
            let found = with_api(issuer, &trust(&ca), name).await;
            assert!(matches!(found, Err(ConnectError::Unauthorized { .. })), "{found:?}");
        }
        // An API that goes down in the middle, and something that speaks no TLS.
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        drop(theirs);
        let cut = secured(&trust(&ca), None, ours).await.map(drop).map_err(|error| error.of("east".into()));
        assert!(matches!(cut, Err(ConnectError::NotAnswering { .. })), "{cut:?}");
        let (ours, mut theirs) = tokio::io::duplex(64 << 10);
        tokio::io::AsyncWriteExt::write_all(&mut theirs, b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        let plain = secured(&trust(&ca), None, ours).await.map(drop).map_err(|error| error.of("east".into()));
        assert!(matches!(plain, Err(ConnectError::NotAnswering { .. })), "{plain:?}");
    }
}
