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
use serde_json::json;
use tls::{CertificateAuthority, ClientAuth, ServedCertificate, ServerTls, TlsVersions};

use crate::auth::{IMPERSONATORS, MASTERS};
use crate::config::{Config, Role};
use crate::registry::services;
use crate::server::BindError;

/// The name that is always served with a certificate of the server's own authority. Nobody resolves it.
const OWN_NAME: &str = "api.cellway.internal";
/// Lifetime of the client certificates in kubeconfigs, which people copy elsewhere.
const CLIENT_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// How often files are looked at.
const RELOAD: Duration = Duration::from_secs(10);

/// See the module.
pub(crate) struct Certificates {
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
}

// === impl Certificates ===

impl Certificates {
    /// Loads or makes the authority in `pki`, and issues everything anew.
    pub(crate) fn new(
        config: &Config,
        pki: &Path,
        address: SocketAddr,
        url: String,
    ) -> Result<Self, BindError> {
        let failed = |source| BindError::Certificates { path: pki.to_owned(), source };
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
            url,
            by_name: config.serving.is_some(),
        };
        kubeconfigs.write_all(SystemTime::now())?;
        Ok(Self { authority, tls, served, kubeconfigs })
    }

    pub(crate) fn tls(&self) -> &ServerTls {
        &self.tls
    }

    /// The authority's certificate in PEM.
    pub(crate) fn ca_pem(&self) -> &str {
        self.authority.certificate_pem()
    }

    /// Writes a kubeconfig that is valid for as long as the authority: for a client in this process, which keeps what it
    /// has read once.
    pub(crate) fn write_lasting(&self, path: &Path, user: &str, groups: &[&str]) -> Result<(), BindError> {
        self.kubeconfigs.write(path, user, groups, Duration::MAX, SystemTime::now())
    }

    /// Follows the files, and issues anew what is the server's own; for ever.
    pub(crate) async fn keep(self) -> Infallible {
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
        self.write(&admin, "cellway:admin", &[MASTERS], CLIENT_LIFETIME, now)?;
        if self.role == Role::Member {
            let agent = self.data_dir.join(AGENT_KUBECONFIG);
            self.write(&agent, "cellway:agent", &[IMPERSONATORS], CLIENT_LIFETIME, now)?;
        }
        Ok(())
    }

    fn write(
        &self,
        path: &Path,
        user: &str,
        groups: &[&str],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<(), BindError> {
        let groups: Vec<String> = groups.iter().map(|g| (*g).to_owned()).collect();
        let issued = self
            .authority
            .issue_client_at(user, &groups, lifetime, now)
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
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": name, "preferences": {},
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": user, "user": {"client-certificate-data": encode(&issued.certificate_pem),
                "client-key-data": encode(&issued.key_pem)}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": user, "namespace": "default"}}],
        });
        // JSON is YAML; kubectl reads it, and it needs no quoting rules of its own.
        let text = serde_json::to_string_pretty(&config).unwrap_or_default();
        tls::write_private(path, text.as_bytes())
            .map_err(|source| BindError::Write { path: path.to_owned(), source })
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
        let pki = config.data_dir.join("pki");
        Certificates::new(config, &pki, address, "https://127.0.0.1:6443".to_owned()).unwrap()
    }

    fn client_end(kubeconfig: &Path) -> SystemTime {
        let config: serde_json::Value = serde_json::from_slice(&std::fs::read(kubeconfig).unwrap()).unwrap();
        let data = config["users"][0]["user"]["client-certificate-data"].as_str().unwrap();
        let pem = base64::engine::general_purpose::STANDARD.decode(data).unwrap();
        tls::validity(&tls::certificates_from_pem(&pem).unwrap()[0]).unwrap().1
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

    #[test]
    fn a_client_in_this_process_never_outlives_its_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let certificates = new(&Config::new(dir.path(), Role::Hub));
        let path = dir.path().join("hub.kubeconfig");
        certificates.write_lasting(&path, "hub", &[]).unwrap();
        let ca = &tls::certificates_from_pem(certificates.ca_pem().as_bytes()).unwrap()[0];
        assert_eq!(client_end(&path), tls::validity(ca).unwrap().1);
        assert!(client_end(&dir.path().join(ADMIN_KUBECONFIG)) < client_end(&path));
    }
}
