//! The conversion webhook's certificate: issued anew in time, and by another authority when that is what its files hold.
//!
//! ```text
//!   ca.crt, ca.key are others ─▶ both authorities wanted in the definitions ─▶ registered ─▶ issued by the new one
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use federation_core::api::Conversion;
use tls::{CertificateAuthority, ServedCertificate, ServerTls};
use tokio::time::Instant;

use super::definitions::Registration;

/// How often the files of the authority are looked at.
const RELOAD: Duration = Duration::from_secs(10);

/// How the webhook's certificate is made.
#[derive(Debug)]
pub(super) struct Issuing {
    authority: Arc<CertificateAuthority>,
    /// Where the authority lies.
    pki: PathBuf,
    names: Vec<String>,
    folder: PathBuf,
    ttl: Duration,
    url: String,
    /// What the files held last.
    found: Arc<CertificateAuthority>,
    /// Why they cannot be used, which is told once.
    unusable: Option<String>,
}

// === impl Issuing ===

impl Issuing {
    /// For `names`, in `folder`, by the authority that was taken from `pki`; `url` is where the webhook is dialled.
    pub(super) fn new(
        authority: Arc<CertificateAuthority>,
        pki: &Path,
        names: Vec<String>,
        folder: &Path,
        ttl: Duration,
        url: String,
    ) -> Self {
        let (pki, folder) = (pki.to_owned(), folder.to_owned());
        Self { found: authority.clone(), authority, pki, names, folder, ttl, url, unusable: None }
    }

    /// The certificate, of the authority that is used now.
    pub(super) fn certificate(&self) -> ServedCertificate {
        ServedCertificate::new(self.authority.clone(), self.names.clone(), &self.folder).living(self.ttl)
    }

    /// Issues the certificate anew in time, and follows the authority's files; for ever.
    pub(super) async fn keep(
        mut self,
        tls: &ServerTls,
        registration: &Registration,
    ) -> std::convert::Infallible {
        let interval = self.certificate().interval();
        let mut due = Instant::now() + interval;
        loop {
            tokio::time::sleep_until(due.min(Instant::now() + RELOAD)).await;
            if !self.look(registration) && Instant::now() < due {
                continue;
            }
            due = Instant::now() + interval;
            // Connections that come from now on see it; after a failure the former one stays, which lives for long enough.
            let error = match self.certificate().issue(SystemTime::now()) {
                Ok(()) => tls.reload().err().map(|error| service::error_chain(&error)),
                Err(error) => Some(service::error_chain(&error)),
            };
            match error {
                None => tracing::info!("the webhook's certificate has been issued anew"),
                Some(error) => {
                    tracing::warn!(
                        error,
                        "failed to issue the webhook's certificate; trying again in {interval:?}"
                    );
                }
            }
        }
    }

    /// Looks at the authority's files: another one is to be registered, and used when that is done. Returns whether it is used
    /// from now on.
    fn look(&mut self, registration: &Registration) -> bool {
        match CertificateAuthority::load(&self.pki) {
            Ok(now) if now.certificate_pem() != self.found.certificate_pem() => {
                tracing::info!("the authority is another: its certificate is registered before it is used");
                // Whoever has both trusts either certificate.
                let ca_bundle = format!("{}\n{}", now.certificate_pem(), self.authority.certificate_pem());
                registration.wanted.send_replace(Conversion::Webhook { url: self.url.clone(), ca_bundle });
                self.found = Arc::new(now);
                self.unusable = None;
            }
            Ok(_) => self.unusable = None,
            Err(error) => {
                let error = service::error_chain(&error);
                if self.unusable.as_ref() != Some(&error) {
                    tracing::warn!(error, "the authority's files cannot be used, and the former one stays");
                }
                self.unusable = Some(error);
            }
        }
        let taken = !Arc::ptr_eq(&self.found, &self.authority) && registration.is_done();
        if taken {
            self.authority = self.found.clone();
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_authority_is_registered_before_it_is_used() {
        let folder = tempfile::tempdir().expect("a folder");
        let pki = folder.path().join("pki");
        let authority = Arc::new(CertificateAuthority::load_or_create(&pki, "test").expect("an authority"));
        let former = authority.certificate_pem().to_owned();
        let (url, minute) = ("https://hub/convert".to_owned(), Duration::from_secs(60));
        let first = Conversion::Webhook { url: url.clone(), ca_bundle: former.clone() };
        let registration = Registration::new(first);
        let names = vec!["hub".to_owned()];
        let mut issuing = Issuing::new(authority, &pki, names, &folder.path().join("tls"), minute, url);
        let bundle = || match &*registration.wanted.borrow() {
            Conversion::Webhook { ca_bundle, .. } => ca_bundle.clone(),
            other => panic!("{other:?}"),
        };
        registration.there.send_replace(Some(registration.wanted.borrow().clone()));
        assert!(!issuing.look(&registration) && bundle() == former, "nothing is new");
        // One of the two files alone is of no use.
        let other = folder.path().join("other");
        let new = CertificateAuthority::load_or_create(&other, "test").expect("an authority");
        std::fs::copy(other.join("ca.crt"), pki.join("ca.crt")).expect("copied");
        assert!(!issuing.look(&registration) && bundle() == former);
        assert!(issuing.unusable.is_some());
        std::fs::copy(other.join("ca.key"), pki.join("ca.key")).expect("copied");
        for _ in 0..2 {
            assert!(!issuing.look(&registration), "not before it is registered");
            assert!(bundle().contains(new.certificate_pem()) && bundle().contains(&former));
            assert_eq!(issuing.authority.certificate_pem(), former);
        }
        registration.there.send_replace(Some(registration.wanted.borrow().clone()));
        assert!(issuing.look(&registration), "now");
        assert_eq!(issuing.authority.certificate_pem(), new.certificate_pem());
        assert!(!issuing.look(&registration), "and once");
    }
}
