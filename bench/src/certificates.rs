//! The certificates of a run: one authority, one server, one client, as the files that every TLS subject takes.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tls::CertificateAuthority;

/// Longer than any run.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The name that clients verify, beside the address.
pub(crate) const SERVER_NAME: &str = "localhost";

/// Files in PEM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Certificates {
    pub(crate) authority: PathBuf,
    pub(crate) server: PathBuf,
    pub(crate) server_key: PathBuf,
    pub(crate) client: PathBuf,
    pub(crate) client_key: PathBuf,
    /// Certificate and key in one file, as HAProxy takes them.
    pub(crate) server_bundle: PathBuf,
    pub(crate) client_bundle: PathBuf,
}

impl Certificates {
    /// Makes them in `directory`.
    pub(crate) fn create(directory: &Path) -> Result<Self> {
        let authority = CertificateAuthority::create("cellway bench")
            .context("failed to create a certificate authority")?;
        let names = [SERVER_NAME.to_owned(), "127.0.0.1".to_owned()];
        let server =
            authority.issue_server(&names, LIFETIME).context("failed to issue the server's certificate")?;
        let client = authority
            .issue_client("bench", &[], LIFETIME)
            .context("failed to issue the client's certificate")?;
        let write = |name: &str, parts: &[&str]| -> Result<PathBuf> {
            let path = directory.join(name);
            tls::write_private(&path, parts.concat().as_bytes())
                .with_context(|| format!("failed to write {}", path.display()))?;
            Ok(path)
        };
        fs::create_dir_all(directory).with_context(|| format!("failed to create {}", directory.display()))?;
        Ok(Self {
            authority: write("ca.crt", &[authority.certificate_pem()])?,
            server: write("server.crt", &[&server.certificate_pem])?,
            server_key: write("server.key", &[&server.key_pem])?,
            client: write("client.crt", &[&client.certificate_pem])?,
            client_key: write("client.key", &[&client.key_pem])?,
            server_bundle: write("server.pem", &[&server.certificate_pem, &server.key_pem])?,
            client_bundle: write("client.pem", &[&client.certificate_pem, &client.key_pem])?,
        })
    }
}
