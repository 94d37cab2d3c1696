//! The server's own certificates: what it serves with, whom it takes, and the kubeconfigs that it writes.
//!
//! The authority in the data folder signs everything that the server makes itself; that is issued anew every day, so that
//! nothing ends while a process runs. Files that somebody else made (`--tls-cert-file`, `--client-ca-file`) are followed.
//! With such a certificate the server still answers to a name of its own, [`OWN_NAME`], with a certificate of its own:
//! the kubeconfigs that it writes ask for that name, and so need to know nothing of who signed the other one.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use serde_json::{Value, json};
use tls::{CertificateAuthority, ClientAuth, ServedCertificate, ServerTls, TlsVersions};

use crate::auth::{IMPERSONATORS, MASTERS};
use crate::config::{Config, Role};
use crate::registry::services;
use crate::server::{self, BindError};

/// The name that is always served with a certificate of the server's own authority. Nobody resolves it.
const OWN_NAME: &str = "api.cellway.internal";
/// Lifetime of the client certificates in kubeconfigs, which people copy elsewhere.
const CLIENT_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// How often files are looked at.
const RELOAD: Duration = Duration::from_secs(10);

/// The certificates of a port that serves the API, or what goes with an API that somebody else serves: see the module's
/// source.
pub struct Certificates {
    authority: Arc<CertificateAuthority>,
    tls: ServerTls,
    /// The serving certificate of the server's own.
    served: ServedCertificate,
    kubeconfigs: Kubeconfigs,
}

/// Writes kubeconfigs for this server.
#[derive(Clone)]
struct Kubeconfigs {
    authority: Arc<CertificateAuthority>,
    role: Role,
    data_dir: PathBuf,
    /// `https://…`
    url: String,
    /// Whether the server presents a certificate that is not of its own authority to those who do not ask for it by name.
    by_name: bool,
    objects: Option<ObjectsAt>,
}

/// The API that holds the objects when the server itself holds none. Kubeconfigs lead there first, and to the server in a
/// second context, named after the first ([`SERVER_CONTEXT`]).
#[derive(Clone)]
pub struct ObjectsAt {
    /// The entry `cluster` of a kubeconfig.
    pub cluster: Value,
    /// The entry `user` of a kubeconfig: a secret.
    pub user: Value,
}

/// In a kubeconfig whose current context leads to an API that somebody else serves, the context of this name and the
/// current one's, as `cellway:hub`, leads to the hub itself.
pub const SERVER_CONTEXT: &str = "cellway:";
/// The context that leads to the objects in kubeconfigs that the server writes.
const OBJECTS_CONTEXT: &str = "hub";

// === impl Certificates ===

impl Certificates {
    /// Loads or makes the authority, and issues everything anew, for a server that listens at `address`. Of the
    /// configuration only what concerns names, certificates and folders counts.
    ///
    /// # Errors
    /// When a certificate cannot be made, read or written.
    pub fn new(config: &Config, address: SocketAddr, objects: Option<ObjectsAt>) -> Result<Self, BindError> {
        let pki = &config.pki();
        let failed = |source| BindError::Certificates { path: pki.clone(), source };
        let authority =
            Arc::new(CertificateAuthority::load_or_create(pki, "cellway-api-ca").map_err(failed)?);
        // Not beside the authority, which replicas share: they have other names.
        let folder = config.data_dir.join("api-tls");
        let served = ServedCertificate::new(authority.clone(), names(config, address), &folder);
        served.issue(SystemTime::now()).map_err(failed)?;
        let (certificate, key) = ServedCertificate::files(&folder);
        let ca = Some(pki.join("ca.crt"));
        let tls = match &config.serving {
            None => ServerTls::from_files(certificate, key, ca, ClientAuth::Optional)?,
            Some(given) => ServerTls::from_files(&given.certificate, &given.key, ca, ClientAuth::Optional)?
                .with_named(OWN_NAME, certificate, key)?,
        };
        let tls = match &config.client_ca_file {
            None => tls,
            Some(file) => tls.with_client_ca(file)?,
        };
        let tls = tls.with_versions(TlsVersions::From12)?;
        let kubeconfigs = Kubeconfigs {
            authority: authority.clone(),
            role: config.role,
            data_dir: config.data_dir.clone(),
            url: server::url(config, address),
            by_name: config.serving.is_some(),
            objects,
        };
        kubeconfigs.write_all(SystemTime::now())?;
        Ok(Self { authority, tls, served, kubeconfigs })
    }

    /// What the listener serves with.
    pub fn tls(&self) -> &ServerTls {
        &self.tls
    }

    /// The authority's certificate in PEM.
    pub fn ca_pem(&self) -> &str {
        self.authority.certificate_pem()
    }

    /// Who signs what is the server's own.
    pub fn authority(&self) -> &Arc<CertificateAuthority> {
        &self.authority
    }

    /// The administrator's kubeconfig.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.kubeconfigs.data_dir.join(ADMIN_KUBECONFIG)
    }

    /// Follows the files, and issues anew what is the server's own; for ever.
    pub async fn keep(self) -> Infallible {
        let Self { tls, served, kubeconfigs, authority: _ } = self;
        let issue = |now| {
            let failed = |source| BindError::Certificates { path: kubeconfigs.data_dir.clone(), source };
            served.issue(now).map_err(failed)?;
            kubeconfigs.write_all(now)
        };
        let follow = async {
            tls.watch_files(RELOAD).await;
            // Only the end of the runtime ends it.
            std::future::pending::<Infallible>().await
        };
        tokio::select! {
            never = follow => never,
            never = tls::reissue("the API's certificates and kubeconfigs", issue) => never,
        }
    }
}

// === impl Kubeconfigs ===

impl Kubeconfigs {
    /// The administrator's, and for a member its agent's.
    fn write_all(&self, now: SystemTime) -> Result<(), BindError> {
        let admin = self.data_dir.join(ADMIN_KUBECONFIG);
        self.write(&admin, "cellway:admin", &[MASTERS], now)?;
        if self.role == Role::Member {
            let agent = self.data_dir.join(AGENT_KUBECONFIG);
            self.write(&agent, "cellway:agent", &[IMPERSONATORS], now)?;
        }
        Ok(())
    }

    fn write(&self, path: &Path, user: &str, groups: &[&str], now: SystemTime) -> Result<(), BindError> {
        let groups: Vec<String> = groups.iter().map(|g| (*g).to_owned()).collect();
        let issued = self
            .authority
            .issue_client_at(user, &groups, CLIENT_LIFETIME, now)
            .map_err(|source| BindError::Certificates { path: path.to_owned(), source })?;
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let name = match self.role {
            Role::Hub => "cellway-hub",
            Role::Member => "cellway-member",
        };
        let mut cluster = json!({"server": self.url,
            "certificate-authority-data": encode(self.authority.certificate_pem())});
        if self.by_name {
            cluster["tls-server-name"] = json!(OWN_NAME);
        }
        let mut config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": name, "preferences": {},
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": user, "user": {"client-certificate-data": encode(&issued.certificate_pem),
                "client-key-data": encode(&issued.key_pem)}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": user, "namespace": "default"}}],
        });
        if let Some(objects) = &self.objects {
            objects.put_first(&mut config);
        }
        // JSON is YAML; kubectl reads it, and it needs no quoting rules of its own.
        let text = serde_json::to_string_pretty(&config).unwrap_or_default();
        tls::write_private(path, text.as_bytes())
            .map_err(|source| BindError::Write { path: path.to_owned(), source })
    }
}

// === impl ObjectsAt ===

impl ObjectsAt {
    fn put_first(&self, config: &mut Value) {
        let first = OBJECTS_CONTEXT;
        config["contexts"][0]["name"] = json!(format!("{SERVER_CONTEXT}{first}"));
        config["current-context"] = json!(first);
        let context = json!({"cluster": first, "user": first, "namespace": "default"});
        for (list, key, entry) in [
            ("clusters", "cluster", &self.cluster),
            ("users", "user", &self.user),
            ("contexts", "context", &context),
        ] {
            if let Some(list) = config[list].as_array_mut() {
                list.insert(0, json!({"name": first, key: entry}));
            }
        }
    }
}

impl std::fmt::Debug for ObjectsAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ObjectsAt").field("cluster", &self.cluster["server"]).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").field("tls", &self.tls).finish_non_exhaustive()
    }
}

/// The files of kubeconfigs in the data folder.
pub(crate) const ADMIN_KUBECONFIG: &str = "admin.kubeconfig";
pub(crate) const AGENT_KUBECONFIG: &str = "agent.kubeconfig";

/// Names and addresses of the server's own certificate.
fn names(config: &Config, address: SocketAddr) -> Vec<String> {
    let mut names: Vec<String> = [
        "localhost",
        "127.0.0.1",
        "::1",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        services::API_SERVICE_IP,
        OWN_NAME,
    ]
    .map(str::to_owned)
    .to_vec();
    if !address.ip().is_unspecified() {
        names.push(address.ip().to_string());
    }
    names.extend(config.advertise.clone());
    names.extend(config.extra_names.iter().cloned());
    let mut seen = std::collections::BTreeSet::new();
    names.retain(|n| seen.insert(n.clone()));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(config: &Config) -> Certificates {
        let address = SocketAddr::from(([127, 0, 0, 1], 6443));
        Certificates::new(config, address, None).unwrap()
    }

    #[test]
    fn kubeconfigs_lead_to_the_objects_first() {
        let dir = tempfile::tempdir().unwrap();
        let objects = ObjectsAt {
            cluster: json!({"server": "https://stock:1"}),
            user: json!({"token": "kept-secret"}),
        };
        assert!(!format!("{objects:?}").contains("kept-secret"));
        let config = Config::new(dir.path(), Role::Hub);
        let address = SocketAddr::from(([127, 0, 0, 1], 6443));
        let certificates = Certificates::new(&config, address, Some(objects)).unwrap();
        let text = std::fs::read(certificates.admin_kubeconfig()).unwrap();
        let config: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(config["current-context"], "hub");
        let named = |list: &str, name: &str, key: &str| {
            let list = config[list].as_array().unwrap();
            list.iter().find(|entry| entry["name"] == name).map(|entry| entry[key].clone()).unwrap()
        };
        let lead = |context: &str| {
            let context = named("contexts", context, "context");
            let (cluster, user) = (context["cluster"].as_str().unwrap(), context["user"].as_str().unwrap());
            (named("clusters", cluster, "cluster"), named("users", user, "user"))
        };
        let (cluster, user) = lead("hub");
        assert_eq!((&cluster["server"], &user["token"]), (&json!("https://stock:1"), &json!("kept-secret")));
        let (cluster, user) = lead("cellway:hub");
        assert_eq!(cluster["server"], "https://127.0.0.1:6443");
        assert!(user["client-key-data"].is_string() && user["token"].is_null());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_the_servers_own_is_issued_anew_every_day() {
        let dir = tempfile::tempdir().unwrap();
        let certificates = new(&Config::new(dir.path(), Role::Member));
        let files = || {
            [ADMIN_KUBECONFIG, AGENT_KUBECONFIG, "api-tls/tls.crt"]
                .map(|name| std::fs::read(dir.path().join(name)).unwrap())
        };
        let (before, tls) = (files(), certificates.tls().clone());
        let served = tls.certificate();
        // The clock is tokio's own, so a day passes at once.
        let _ = tokio::time::timeout(tls::REISSUE_INTERVAL + 2 * RELOAD, certificates.keep()).await;
        for (before, after) in before.iter().zip(files()) {
            assert_ne!(*before, after);
        }
        assert_ne!(tls.certificate(), served, "the listener has not taken the new one up");
    }
}
