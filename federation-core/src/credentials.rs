//! Credentials that the hub holds for a member: what a Secret named by `KubeFedCluster.spec.secretRef` says.
//!
//! Three forms are read: a `kubeconfig`; a `token`, as KubeFed's own secrets have it; and a client certificate in `tls.crt`
//! and `tls.key`. With the latter two the API's address is `spec.apiEndpoint` and its CA `ca.crt` or `spec.caBundle`. What
//! would run programs (`exec`), read files of the hub, or trust whoever answers, is refused. No message and no `Debug`
//! shows anything of what is secret.
//!
//! A Secret names the cluster that it is for, in a label: who may edit clusters and not read Secrets cannot have one sent to
//! an address of their choice.

use std::fmt;

use base64::Engine as _;
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;

use crate::api::KubeFedCluster;
use crate::names::CREDENTIAL_LABEL;

/// Where a member's pods find its API.
const DEFAULT_ENDPOINT: &str = "https://kubernetes.default.svc:443";
/// Longest value in a Secret that is read: kubeconfigs are a few KiB.
const MAX_VALUE: usize = 256 << 10;
/// Longest host name.
const MAX_HOST: usize = 253;

/// A member's API, and a credential for it.
#[derive(Clone, PartialEq, Eq)]
pub struct Access {
    /// Host name or address, as the member resolves it; IPv6 without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
    /// What stands before every path; without a slash at its end.
    pub prefix: String,
    /// The name that the server's certificate is checked for.
    pub server_name: String,
    /// The PEM certificates that the server is checked with.
    pub ca: String,
    /// How the hub proves who it is.
    pub login: Login,
    /// The Secret that says all this, with its version, for people.
    pub secret: String,
}

/// A credential.
#[derive(Clone, PartialEq, Eq)]
pub enum Login {
    /// A bearer token.
    Token(String),
    /// A client certificate with its chain, and its key, both PEM.
    Certificate {
        /// The certificate.
        chain: String,
        /// The key.
        key: String,
    },
}

/// Why there is no credential.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CredentialError {
    /// The Secret is not there.
    #[error(
        "the Secret {name} that spec.secretRef names does not exist in {namespace}: make it, or take secretRef away"
    )]
    Missing {
        /// Its name.
        name: String,
        /// Where it should be.
        namespace: String,
    },
    /// It is not said to be for this cluster.
    #[error(
        "the Secret {name} is not said to be a credential of the cluster {cluster}: whoever may write it labels it {CREDENTIAL_LABEL}={cluster}"
    )]
    NotForCluster {
        /// Its name.
        name: String,
        /// The cluster.
        cluster: String,
    },
    /// It holds nothing that is a credential.
    #[error("the Secret {name} holds no credential: it needs kubeconfig, or token, or tls.crt and tls.key")]
    Empty {
        /// Its name.
        name: String,
    },
    /// A value that cannot be read.
    #[error("the Secret {name} holds a {field} that is not {wanted}")]
    Unreadable {
        /// Its name.
        name: String,
        /// Which value.
        field: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// Nothing to check the server with.
    #[error(
        "there is no CA to check the member's API with: put it in ca.crt of the Secret {name}, or in spec.caBundle"
    )]
    NoCa {
        /// The Secret's name.
        name: String,
    },
    /// Something that the hub does not do.
    #[error("{what} is not supported: use a CA with a token or a client certificate")]
    Unsupported {
        /// What it is.
        what: String,
    },
    /// An address that is none.
    #[error("{endpoint:?} is not an https URL of an API")]
    Endpoint {
        /// The address.
        endpoint: String,
    },
}

#[derive(Deserialize)]
struct Kubeconfig {
    #[serde(rename = "current-context", default)]
    current_context: String,
    #[serde(default)]
    contexts: Vec<Named>,
    #[serde(default)]
    clusters: Vec<Named>,
    #[serde(default)]
    users: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    #[serde(default)]
    name: String,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

/// Reads what the hub holds for a member.
pub fn read(cluster: &KubeFedCluster, secret: &Secret) -> Result<Access, CredentialError> {
    let name = secret.metadata.name.clone().unwrap_or_default();
    let of = cluster.metadata.name.as_deref().unwrap_or_default();
    let label = secret.metadata.labels.as_ref().and_then(|labels| labels.get(CREDENTIAL_LABEL));
    if label.is_none_or(|label| label != of) {
        return Err(CredentialError::NotForCluster { name, cluster: of.to_owned() });
    }
    let text = |field: &str| -> Result<Option<String>, CredentialError> {
        let Some(bytes) = secret.data.as_ref().and_then(|data| data.get(field)) else { return Ok(None) };
        let unreadable = || CredentialError::Unreadable {
            name: name.clone(),
            field: field.to_owned(),
            wanted: "a text of reasonable length",
        };
        if bytes.0.len() > MAX_VALUE {
            return Err(unreadable());
        }
        let text = String::from_utf8(bytes.0.clone()).map_err(|_| unreadable())?;
        Ok((!text.trim().is_empty()).then_some(text))
    };
    let spec = &cluster.spec;
    if !spec.disabled_tls_validations.is_empty() {
        return Err(CredentialError::Unsupported { what: "spec.disabledTLSValidations".into() });
    }
    if spec.proxy_url.is_some() {
        return Err(CredentialError::Unsupported { what: "spec.proxyURL (the tunnel is the way)".into() });
    }
    let version = secret.metadata.resource_version.as_deref().unwrap_or("unknown");
    let from = |access: Access| Access { secret: format!("{name}, version {version}"), ..access };
    if let Some(kubeconfig) = text("kubeconfig")? {
        return of_kubeconfig(&name, &kubeconfig).map(from);
    }
    let login = match (text("token")?, text("tls.crt")?, text("tls.key")?) {
        (Some(token), _, _) => token_login(&name, &token)?,
        (None, Some(chain), Some(key)) => certificate_login(&name, chain, key)?,
        _ => return Err(CredentialError::Empty { name: name.clone() }),
    };
    let ca = match (text("ca.crt")?, &spec.ca_bundle) {
        (Some(ca), _) => ca,
        (None, Some(bundle)) => decode(&name, "spec.caBundle", bundle)?,
        (None, None) => return Err(CredentialError::NoCa { name: name.clone() }),
    };
    let ca = pem(&name, "ca.crt", ca, "CERTIFICATE")?;
    let endpoint = spec.api_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
    access(endpoint.unwrap_or(DEFAULT_ENDPOINT), None, ca, login).map(from)
}

fn of_kubeconfig(name: &str, text: &str) -> Result<Access, CredentialError> {
    let unreadable = |wanted| CredentialError::Unreadable {
        name: name.to_owned(),
        field: "kubeconfig".to_owned(),
        wanted,
    };
    // The parser's own words may hold what is secret.
    let config: Kubeconfig =
        serde_yaml_ng::from_str(text).map_err(|_| unreadable("a kubeconfig in YAML or JSON"))?;
    let find = |all: &[Named], wanted: &str, what: &str| -> Option<Value> {
        all.iter().find(|one| one.name == wanted)?.rest.get(what).cloned()
    };
    let context = find(&config.contexts, &config.current_context, "context")
        .ok_or_else(|| unreadable("a kubeconfig whose current context exists"))?;
    let named = |field: &str| context[field].as_str().unwrap_or_default().to_owned();
    let cluster = find(&config.clusters, &named("cluster"), "cluster")
        .ok_or_else(|| unreadable("a kubeconfig that holds its context's cluster"))?;
    let user = find(&config.users, &named("user"), "user")
        .ok_or_else(|| unreadable("a kubeconfig that holds its context's user"))?;
    let refused = [
        (&cluster, "insecure-skip-tls-verify"),
        (&cluster, "certificate-authority"),
        (&cluster, "proxy-url"),
        (&user, "exec"),
        (&user, "auth-provider"),
        (&user, "tokenFile"),
        (&user, "client-certificate"),
        (&user, "client-key"),
        (&user, "username"),
        (&user, "password"),
    ];
    for (of, field) in refused {
        if of.get(field).is_some_and(|value| !value.is_null() && *value != false && *value != "") {
            return Err(CredentialError::Unsupported { what: format!("{field} in the kubeconfig") });
        }
    }
    let data = |of: &Value, field: &str| -> Result<Option<String>, CredentialError> {
        of[field].as_str().map(|text| decode(name, field, text)).transpose()
    };
    let token = user["token"].as_str();
    let login = match (token, data(&user, "client-certificate-data")?, data(&user, "client-key-data")?) {
        (Some(token), _, _) => token_login(name, token)?,
        (None, Some(chain), Some(key)) => certificate_login(name, chain, key)?,
        _ => return Err(CredentialError::Empty { name: name.to_owned() }),
    };
    let ca = data(&cluster, "certificate-authority-data")?
        .ok_or_else(|| CredentialError::NoCa { name: name.to_owned() })?;
    let ca = pem(name, "certificate-authority-data", ca, "CERTIFICATE")?;
    let server = cluster["server"].as_str().unwrap_or_default();
    access(server, cluster["tls-server-name"].as_str(), ca, login).map_err(|error| match error {
        // A password may stand in it.
        CredentialError::Endpoint { .. } => CredentialError::Unreadable {
            name: name.to_owned(),
            field: "server in the kubeconfig".into(),
            wanted: "an https URL of an API, without a user or a password",
        },
        other => other,
    })
}

fn access(
    endpoint: &str,
    server_name: Option<&str>,
    ca: String,
    login: Login,
) -> Result<Access, CredentialError> {
    let bad = || CredentialError::Endpoint { endpoint: endpoint.chars().take(MAX_HOST).collect() };
    let (host, port, prefix) = endpoint.strip_prefix("https://").and_then(address).ok_or_else(bad)?;
    let server_name = server_name.unwrap_or(&host).to_owned();
    Ok(Access { host, port: port.unwrap_or(443), prefix, server_name, ca, login, secret: String::new() })
}

/// Host (IPv6 without brackets), port and path (without a slash at its end) of what follows the scheme in a URL that has
/// neither a user nor a query.
pub(crate) fn address(rest: &str) -> Option<(String, Option<u16>, String)> {
    let (authority, path) = rest.split_once('/').map_or((rest, ""), |(authority, path)| (authority, path));
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, port.strip_prefix(':'))
        }
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '_');
    let path = path.trim_end_matches('/');
    let good_path = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/' | '~');
    if host.is_empty() || host.len() > MAX_HOST || !host.chars().all(good) || !path.chars().all(good_path) {
        return None;
    }
    let port = port.map(|port| port.parse::<u16>().ok()).map_or(Some(None), |port| port.map(Some))?;
    let path = if path.is_empty() { String::new() } else { format!("/{path}") };
    Some((host.to_owned(), port, path))
}

fn token_login(name: &str, token: &str) -> Result<Login, CredentialError> {
    let token = token.trim();
    // It is to stand in a header.
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        let field = "token".to_owned();
        return Err(CredentialError::Unreadable { name: name.to_owned(), field, wanted: "a bearer token" });
    }
    Ok(Login::Token(token.to_owned()))
}

fn certificate_login(name: &str, chain: String, key: String) -> Result<Login, CredentialError> {
    let chain = pem(name, "client certificate", chain, "CERTIFICATE")?;
    let key = pem(name, "client key", key, "PRIVATE KEY")?;
    Ok(Login::Certificate { chain, key })
}

fn pem(name: &str, field: &str, text: String, what: &str) -> Result<String, CredentialError> {
    if pem_text(&text, what) {
        return Ok(text);
    }
    Err(CredentialError::Unreadable { name: name.to_owned(), field: field.to_owned(), wanted: "a PEM text" })
}

/// Whether a text looks like PEM of something.
pub(crate) fn pem_text(text: &str, what: &str) -> bool {
    text.contains("-----BEGIN ") && text.contains(what)
}

fn decode(name: &str, field: &str, text: &str) -> Result<String, CredentialError> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(text.trim()).ok();
    bytes.and_then(|bytes| String::from_utf8(bytes).ok()).ok_or_else(|| CredentialError::Unreadable {
        name: name.to_owned(),
        field: field.to_owned(),
        wanted: "base64 of a PEM text",
    })
}

// === impl Access ===

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("host", &self.host).field("port", &self.port).finish_non_exhaustive()
    }
}

// === impl Login ===

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Token(_) => "Token(..)",
            Self::Certificate { .. } => "Certificate(..)",
        })
    }
}

pub(crate) mod fuzz {
    //! The body of a fuzz target: a kubeconfig in a Secret.

    use super::*;

    /// Reads `input` as a kubeconfig: what it gives fits into a request, and no message holds what it says.
    pub fn credentials(input: &[u8]) {
        let Ok(text) = std::str::from_utf8(input) else { return };
        match of_kubeconfig("hub/secret", text) {
            Ok(access) => {
                assert!(!access.host.is_empty() && access.host.len() <= MAX_HOST, "{access:?}");
                let in_path = |c: char| c.is_ascii_graphic() && !matches!(c, '?' | '#');
                assert!(access.prefix.chars().all(in_path) && !access.prefix.ends_with('/'));
                assert!(access.ca.contains("CERTIFICATE"));
                if let Login::Token(token) = &access.login {
                    assert!(!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()));
                }
            }
            Err(error) => assert!(error.to_string().len() < 512, "{error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;
    use crate::api::KubeFedClusterSpec;

    const CA: &str = "-----BEGIN CERTIFICATE-----\nca\n-----END CERTIFICATE-----\n";
    const KEY: &str = "-----BEGIN PRIVATE KEY-----\nhidden\n-----END PRIVATE KEY-----\n";

    fn secret(data: &[(&str, &str)]) -> Secret {
        let data = data
            .iter()
            .map(|(key, value)| ((*key).to_owned(), ByteString(value.as_bytes().to_vec())))
            .collect();
        let mut secret = Secret { data: Some(data), ..Secret::default() };
        secret.metadata.name = Some("east".into());
        secret.metadata.labels = Some([(CREDENTIAL_LABEL.to_owned(), "east".to_owned())].into());
        secret
    }

    fn cluster(endpoint: Option<&str>) -> KubeFedCluster {
        let spec =
            KubeFedClusterSpec { api_endpoint: endpoint.map(str::to_owned), ..KubeFedClusterSpec::default() };
        KubeFedCluster::new("east", spec)
    }

    fn base64(text: &str) -> String {
        base64::engine::general_purpose::STANDARD.encode(text)
    }

    fn kubeconfig(cluster: &str, user: &str) -> String {
        format!(
            "current-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters: [{{name: k, cluster: {{{cluster}}}}}]\nusers: [{{name: u, user: {{{user}}}}}]\n"
        )
    }

    #[test]
    fn a_token_with_its_ca_and_the_clusters_endpoint() {
        let found = read(&cluster(None), &secret(&[("token", " abc\n"), ("ca.crt", CA)])).expect("access");
        assert_eq!((found.host.as_str(), found.port), ("kubernetes.default.svc", 443));
        assert_eq!(found.login, Login::Token("abc".into()));
        let at = |endpoint| read(&cluster(Some(endpoint)), &secret(&[("token", "abc"), ("ca.crt", CA)]));
        let found = at("https://[fd00::1]:6443/k8s/east/").expect("access");
        assert_eq!((found.host.as_str(), found.port, found.prefix.as_str()), ("fd00::1", 6443, "/k8s/east"));
        for bad in ["http://api", "https://", "https://a:99999", "https://a b", "https://x/?q"] {
            assert!(matches!(at(bad), Err(CredentialError::Endpoint { .. })), "{bad}");
        }
    }

    #[test]
    fn a_secret_that_is_not_for_the_cluster_is_not_used() {
        for label in [None, Some("west"), Some("")] {
            let mut secret = secret(&[("token", "abc"), ("ca.crt", CA)]);
            secret.metadata.labels = label.map(|of| [(CREDENTIAL_LABEL.to_owned(), of.to_owned())].into());
            let error = read(&cluster(None), &secret).expect_err("not for it");
            assert!(matches!(error, CredentialError::NotForCluster { .. }), "{label:?}");
            assert!(!error.to_string().contains("abc"), "{error}");
        }
    }

    #[test]
    fn checks_that_are_left_out_and_proxies_are_refused() {
        let secret = secret(&[("token", "abc"), ("ca.crt", CA)]);
        let refused = |spec: KubeFedClusterSpec, field: &str| {
            let error = read(&KubeFedCluster::new("east", spec), &secret).expect_err("refused").to_string();
            assert!(error.contains(field), "{error}");
        };
        let unchecked = vec!["SubjectName".to_owned()];
        refused(
            KubeFedClusterSpec { disabled_tls_validations: unchecked, ..KubeFedClusterSpec::default() },
            "spec.disabledTLSValidations",
        );
        let proxy = Some("http://proxy:3128".to_owned());
        refused(KubeFedClusterSpec { proxy_url: proxy, ..KubeFedClusterSpec::default() }, "spec.proxyURL");
    }

    #[test]
    fn a_client_certificate() {
        let found = read(
            &cluster(Some("https://api:6443")),
            &secret(&[("tls.crt", CA), ("tls.key", KEY), ("ca.crt", CA)]),
        );
        assert!(matches!(found.expect("access").login, Login::Certificate { .. }));
    }

    #[test]
    fn a_kubeconfig() {
        let of = |cluster_part: &str, user: &str| {
            read(&cluster(None), &secret(&[("kubeconfig", &kubeconfig(cluster_part, user))]))
        };
        let good = format!(
            "server: 'https://10.0.0.1:6443', tls-server-name: api.east, certificate-authority-data: {}",
            base64(CA)
        );
        let found = of(&good, "token: abc").expect("access");
        assert_eq!((found.host.as_str(), found.server_name.as_str()), ("10.0.0.1", "api.east"));
        let pair = format!("client-certificate-data: {}, client-key-data: {}", base64(CA), base64(KEY));
        assert!(matches!(of(&good, &pair).expect("access").login, Login::Certificate { .. }));
        for (cluster_part, user) in [
            (format!("{good}, insecure-skip-tls-verify: true"), "token: abc"),
            (good.clone(), "exec: {command: steal}"),
            (good.clone(), "tokenFile: /etc/token"),
            (good.clone(), "username: a, password: b"),
        ] {
            assert!(matches!(of(&cluster_part, user), Err(CredentialError::Unsupported { .. })), "{user}");
        }
        assert!(matches!(of("server: 'https://a'", "token: abc"), Err(CredentialError::NoCa { .. })));
    }

    #[test]
    fn what_is_wrong_is_told_without_the_secret() {
        let error = |data: &[(&str, &str)]| read(&cluster(None), &secret(data)).expect_err("no credential");
        let server = format!(
            "server: 'https://admin:sesame@10.0.0.1:6443', certificate-authority-data: {}",
            base64(CA)
        );
        let with_password = kubeconfig(&server, "token: abc");
        for (data, text) in [
            (&[("other", "x")][..], "holds no credential"),
            (&[("token", "sesame")], "no CA"),
            (&[("token", "se\u{1}same"), ("ca.crt", CA)], "token that is not"),
            (&[("token", "sesame"), ("ca.crt", "sesame")], "ca.crt that is not"),
            (&[("kubeconfig", "token: [sesame")], "kubeconfig in YAML"),
            (&[("kubeconfig", &with_password)], "without a user or a password"),
        ] {
            let error = error(data);
            assert!(error.to_string().contains(text), "{error}");
            assert!(!format!("{error} {error:?}").contains("sesame"), "{error:?}");
        }
        let held = read(&cluster(None), &secret(&[("token", "sesame"), ("ca.crt", CA)])).expect("access");
        assert!(!format!("{held:?} {:?}", held.login).contains("sesame"));
    }
}
