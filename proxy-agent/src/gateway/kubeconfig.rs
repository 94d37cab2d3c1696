//! The part of a kubeconfig that names one kube-apiserver and one credential for it.
//!
//! Plug-ins (`exec`, `auth-provider`) and `insecure-skip-tls-verify` are refused: the first run programs in the agent's
//! place, the second gives the agent's credential to whoever answers.

use std::path::{Path, PathBuf};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;

use super::upstream::{Pem, Token, UpstreamConfig};

/// Why a kubeconfig cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    /// Not readable.
    #[error(transparent)]
    File(#[from] tls::FileError),
    /// Not a kubeconfig.
    #[error("failed to parse the kubeconfig {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        #[source]
        source: serde_yaml_ng::Error,
    },
    /// A name that leads nowhere.
    #[error("the kubeconfig {} names {what}, which it does not hold", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
    /// Data that is not base64 of a PEM text.
    #[error("the kubeconfig {} holds {field} that is not a base64 of a PEM text", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
    },
    /// A way to authenticate or connect that the gateway does not take part in.
    #[error(
        "the kubeconfig {} uses {field}, which the gateway does not support: use a CA with a token or a client \
         certificate", path.display()
    )]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kubeconfig {
    #[serde(default)]
    current_context: String,
    #[serde(default)]
    clusters: Vec<NamedCluster>,
    #[serde(default)]
    users: Vec<NamedUser>,
    #[serde(default)]
    contexts: Vec<NamedContext>,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Deserialize)]
struct NamedUser {
    name: String,
    user: User,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Deserialize)]
struct Context {
    cluster: String,
    user: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    tls_server_name: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    proxy_url: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct User {
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    username: Option<String>,
    exec: Option<serde_yaml_ng::Value>,
    auth_provider: Option<serde_yaml_ng::Value>,
}

/// Reads the current context of a kubeconfig.
pub(super) fn read(path: &Path) -> Result<UpstreamConfig, KubeconfigError> {
    let text = tls::read_bounded(path)?;
    parse(path, &text)
}

fn parse(path: &Path, text: &[u8]) -> Result<UpstreamConfig, KubeconfigError> {
    let config: Kubeconfig = serde_yaml_ng::from_slice(text)
        .map_err(|source| KubeconfigError::Parse { path: path.to_owned(), source })?;
    let missing = |what: String| KubeconfigError::Missing { path: path.to_owned(), what };
    let unsupported = |field| KubeconfigError::Unsupported { path: path.to_owned(), field };

    let name = &config.current_context;
    let context = config.contexts.iter().find(|context| context.name == *name);
    let context = &context.ok_or_else(|| missing(format!("the current context {name:?}")))?.context;
    let cluster = config.clusters.iter().find(|cluster| cluster.name == context.cluster);
    let cluster = &cluster.ok_or_else(|| missing(format!("the cluster {:?}", context.cluster)))?.cluster;
    let user = config.users.iter().find(|user| user.name == context.user);
    let user = &user.ok_or_else(|| missing(format!("the user {:?}", context.user)))?.user;

    for (used, field) in [
        (cluster.insecure_skip_tls_verify, "insecure-skip-tls-verify"),
        (cluster.proxy_url.is_some(), "proxy-url"),
        (user.exec.is_some(), "exec"),
        (user.auth_provider.is_some(), "auth-provider"),
        (user.username.is_some(), "username"),
    ] {
        if used {
            return Err(unsupported(field));
        }
    }

    // Relative paths are relative to the kubeconfig, as kubectl reads them.
    let base = path.parent().unwrap_or(Path::new("."));
    let pem = |data: &Option<String>, file: &Option<PathBuf>, field| match (data, file) {
        (Some(data), _) => BASE64_STANDARD
            .decode(data.trim())
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .map(|text| Some(Pem::Text(text)))
            .ok_or_else(|| KubeconfigError::Data { path: path.to_owned(), field }),
        (None, Some(file)) => Ok(Some(Pem::File(base.join(file)))),
        (None, None) => Ok(None),
    };
    let ca = pem(
        &cluster.certificate_authority_data,
        &cluster.certificate_authority,
        "certificate-authority-data",
    )?;
    let certificate =
        pem(&user.client_certificate_data, &user.client_certificate, "client-certificate-data")?;
    let key = pem(&user.client_key_data, &user.client_key, "client-key-data")?;
    let token = match (&user.token_file, &user.token) {
        // client-go lets the file win.
        (Some(file), _) => Some(Token::File(base.join(file))),
        (None, Some(token)) => Some(Token::Text(token.clone())),
        (None, None) => None,
    };
    Ok(UpstreamConfig {
        server: cluster.server.clone(),
        ca,
        server_name: cluster.tls_server_name.clone(),
        identity: certificate.zip(key),
        token,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "
apiVersion: v1
kind: Config
current-context: here
contexts: [{name: other, context: {cluster: x, user: x}}, {name: here, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: 'https://192.0.2.1:6443', certificate-authority: pki/ca.crt}}]
";

    fn with_user(user: &str) -> Result<UpstreamConfig, KubeconfigError> {
        parse(
            Path::new("/etc/cellway/kubeconfig"),
            format!("{BASE}users: [{{name: u, user: {user}}}]").as_bytes(),
        )
    }

    #[test]
    fn the_current_context_is_taken() {
        let config = with_user("{tokenFile: /run/token}").unwrap();
        assert_eq!(config.server, "https://192.0.2.1:6443");
        assert!(matches!(config.ca, Some(Pem::File(path)) if path == Path::new("/etc/cellway/pki/ca.crt")));
        assert!(matches!(config.token, Some(Token::File(path)) if path == Path::new("/run/token")));
        assert!(config.identity.is_none());
        let text = BASE64_STANDARD.encode("PEM");
        let config = with_user(&format!("{{client-certificate-data: {text}, client-key: key.pem}}")).unwrap();
        let (certificate, key) = config.identity.unwrap();
        assert!(matches!(certificate, Pem::Text(text) if text == "PEM"));
        assert!(matches!(key, Pem::File(path) if path == Path::new("/etc/cellway/key.pem")));
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        for (user, expected) in [
            ("{exec: {command: aws}}", "uses exec"),
            ("{auth-provider: {name: gcp}}", "uses auth-provider"),
            ("{client-certificate-data: '%%%'}", "client-certificate-data"),
        ] {
            let error = with_user(user).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = parse(Path::new("k"), BASE.as_bytes()).unwrap_err();
        assert!(matches!(error, KubeconfigError::Missing { .. }));
        assert!(matches!(parse(Path::new("k"), b"]").unwrap_err(), KubeconfigError::Parse { .. }));
        let insecure = BASE.replace("certificate-authority: pki/ca.crt", "insecure-skip-tls-verify: true");
        let insecure = format!("{insecure}users: [{{name: u, user: {{token: t}}}}]");
        let error = parse(Path::new("k"), insecure.as_bytes()).unwrap_err();
        assert!(matches!(error, KubeconfigError::Unsupported { field: "insecure-skip-tls-verify", .. }));
    }
}
