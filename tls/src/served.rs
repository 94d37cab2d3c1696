//! A listener's certificate that its own authority issues, and issues anew for as long as the process runs.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::{
    authority::{AuthorityError, CertificateAuthority},
    files,
};

/// How long such a certificate lives unless told otherwise. It is issued anew at each start and every [`REISSUE_INTERVAL`].
const LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);

/// A day: a process that runs for years never comes near the end of a certificate.
pub const REISSUE_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// The certificate and the key in a folder of their own, which [`crate::ServerTls::from_files`] reads and follows.
#[derive(Debug)]
pub struct ServedCertificate {
    authority: Arc<CertificateAuthority>,
    names: Vec<String>,
    directory: PathBuf,
    lifetime: Duration,
}

// === impl ServedCertificate ===

impl ServedCertificate {
    /// For DNS names and addresses, in `directory`, which is made when it is missing. Nothing is issued yet.
    pub fn new(
        authority: Arc<CertificateAuthority>,
        names: Vec<String>,
        directory: impl Into<PathBuf>,
    ) -> Self {
        Self { authority, names, directory: directory.into(), lifetime: LIFETIME }
    }

    /// The same with certificates that live so long.
    #[must_use]
    pub fn living(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// How often to issue it anew: once a day, or sooner if it has lived a third of its life by then.
    pub fn interval(&self) -> Duration {
        REISSUE_INTERVAL.min(self.lifetime / 3)
    }

    /// Where certificate and key lie below a folder.
    pub fn files(directory: &Path) -> (PathBuf, PathBuf) {
        (directory.join("tls.crt"), directory.join("tls.key"))
    }

    /// Issues the certificate anew. Listeners take it up by themselves; a pair that does not fit yet is looked at again.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub fn issue(&self, now: SystemTime) -> Result<(), AuthorityError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(|source| AuthorityError::Directory { path: self.directory.clone(), source })?;
        let issued = self.authority.issue_server_at(&self.names, self.lifetime, now)?;
        let (certificate, key) = Self::files(&self.directory);
        files::write_private(&key, issued.key_pem.as_bytes())?;
        files::write_public(&certificate, issued.certificate_pem.as_bytes())?;
        Ok(())
    }
}

/// Does `issue` every [`REISSUE_INTERVAL`], for ever; a failure is warned of and tried again the next time. `what` is for
/// the log.
pub async fn reissue<E: std::error::Error>(
    what: &'static str,
    issue: impl FnMut(SystemTime) -> Result<(), E>,
) -> std::convert::Infallible {
    reissue_every(REISSUE_INTERVAL, what, issue).await
}

/// [`reissue`] at another pace.
pub async fn reissue_every<E: std::error::Error>(
    interval: Duration,
    what: &'static str,
    mut issue: impl FnMut(SystemTime) -> Result<(), E>,
) -> std::convert::Infallible {
    loop {
        tokio::time::sleep(interval).await;
        match issue(SystemTime::now()) {
            Ok(()) => tracing::info!("{what} have been issued anew"),
            Err(error) => tracing::warn!(
                error = %crate::config::chain(&error),
                "failed to issue {what} anew; trying again in {interval:?}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ClientAuth, ServerTls, certificate::validity};

    #[tokio::test(start_paused = true)]
    async fn a_listener_never_comes_near_the_end_of_its_certificate() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("served");
        let authority = Arc::new(CertificateAuthority::create("ca").unwrap());
        let served = ServedCertificate::new(authority, vec!["localhost".to_owned()], &directory);
        // Issued long ago, by a process that has been running since.
        let long_ago = SystemTime::now() - LIFETIME + Duration::from_secs(3600);
        served.issue(long_ago).unwrap();
        let (certificate, key) = ServedCertificate::files(&directory);
        let tls = ServerTls::from_files(certificate, key, None, ClientAuth::None).unwrap();
        let end = |tls: &ServerTls| validity(&tls.certificate().unwrap()).unwrap().1;
        assert!(end(&tls) < SystemTime::now() + Duration::from_secs(7200));
        let keep = reissue("certificates", |now| served.issue(now));
        // The clock is tokio's own, so a day passes at once.
        let _ = tokio::time::timeout(REISSUE_INTERVAL + Duration::from_secs(1), keep).await;
        assert!(tls.reload().unwrap());
        assert!(end(&tls) > SystemTime::now() + LIFETIME - Duration::from_secs(7200));
    }
}
