//! Encryption at rest: what of the stored objects is encrypted, with what, and how to move on to another key.
//!
//! ```text
//!  registry ─▶ StoreHandle ─▶ Encryption (file, reloaded) ─▶ identity | aesgcm | aescbc | secretbox | kms v2 ─▶ store
//! ```
//!
//! A value tells by its beginning which provider and key made it. The first provider of a resource writes, all of them
//! read; what no provider reads is an error, never a guess. Keys of the store (names, namespaces) are not encrypted.

mod config;
pub(crate) mod grpc;
pub(crate) mod kms;
mod local;
mod metrics;
mod rewrite;
pub(crate) mod store;
#[cfg(test)]
mod unreadable;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use parking_lot::RwLock;

pub(crate) use config::ConfigError;
use config::{EncryptionConfig, Entry, Key, Provider};
use kms::{KmsError, KmsProvider};
use local::{Broken, Cipher};
use metrics::{KeyLabels, Metrics};
pub(crate) use rewrite::{rewrite, rewrite_all, status};

/// How every encrypted value begins.
pub(crate) const ENCRYPTED: &[u8] = b"k8s:enc:";
/// How often the file and the plug-ins are looked at.
const POLL: Duration = Duration::from_secs(10);
/// A changed file is taken when it is still the same after so long. Somebody may be writing it just now: one that is cut off
/// in a key may be valid with a shorter key, and nobody could read again what is written under that.
const SETTLING: Duration = Duration::from_secs(1);

/// Why a value could not be encrypted or decrypted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EncryptionError {
    #[error("no provider of the encryption configuration reads this value: it begins with {prefix:?}")]
    NoProvider { prefix: String },
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error(transparent)]
    Kms(#[from] KmsError),
}

/// The configuration in force. Without a file nothing is encrypted, and encrypted values are an error.
#[derive(Default)]
pub(crate) struct Encryption {
    path: Option<PathBuf>,
    /// Something could not be decrypted, and it was said.
    unreadable: AtomicBool,
    current: RwLock<Arc<Providers>>,
    /// Whether all plug-ins were well when they were last asked; false before the first time.
    plugins_well: AtomicBool,
    metrics: Metrics,
}

#[derive(Default)]
struct Providers {
    entries: Vec<(Entry, Vec<Transformer>)>,
    /// The file's text, to notice a change.
    text: Vec<u8>,
}

#[derive(Clone)]
enum Transformer {
    Identity,
    Local(Cipher, Arc<[Key]>),
    Kms(Arc<KmsProvider>),
}

/// Which provider and key a stored value is under.
pub(crate) type Label = String;

impl std::fmt::Debug for Encryption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encryption").field("path", &self.path).finish_non_exhaustive()
    }
}

// === impl Encryption ===

impl Encryption {
    /// Reads the file, if there is to be one.
    pub(crate) fn load(path: Option<PathBuf>) -> Result<Self, ConfigError> {
        let encryption = Self { path, ..Self::default() };
        encryption.reload()?;
        Ok(encryption)
    }

    /// Takes a changed file; tells whether it changed. One that cannot be used leaves the former in force.
    pub(crate) fn reload(&self) -> Result<bool, ConfigError> {
        let Some(text) = self.changed()? else { return Ok(false) };
        self.take(text)?;
        Ok(true)
    }

    /// The same once it has settled: `noticed` is what the last look has found, and this one finds.
    fn reload_settled(&self, noticed: &mut Option<Vec<u8>>) -> Result<bool, ConfigError> {
        let before = noticed.take();
        let Some(text) = self.changed()? else { return Ok(false) };
        if before.as_ref() != Some(&text) {
            *noticed = Some(text);
            return Ok(false);
        }
        self.take(text)?;
        Ok(true)
    }

    /// The file's text, if it is another one.
    fn changed(&self) -> Result<Option<Vec<u8>>, ConfigError> {
        let Some(path) = &self.path else { return Ok(None) };
        let text =
            tls::read_bounded(path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        Ok((text != self.current.read().text).then_some(text))
    }

    fn take(&self, text: Vec<u8>) -> Result<(), ConfigError> {
        let former = self.current.read().clone();
        let config = EncryptionConfig::parse(&text)?;
        // A plug-in that stays keeps its connection and its seeds.
        let kept: BTreeMap<String, Arc<KmsProvider>> = former
            .entries
            .iter()
            .flat_map(|(_, transformers)| transformers)
            .filter_map(|t| match t {
                Transformer::Kms(kms) => Some((kms.config().name.clone(), kms.clone())),
                _ => None,
            })
            .collect();
        let entries = config.entries.into_iter().map(|entry| {
            let transformers = entry.providers.iter().map(|provider| match provider {
                Provider::Identity => Transformer::Identity,
                Provider::AesGcm(keys) => Transformer::Local(Cipher::AesGcm, keys.clone().into()),
                Provider::AesCbc(keys) => Transformer::Local(Cipher::AesCbc, keys.clone().into()),
                Provider::SecretBox(keys) => Transformer::Local(Cipher::SecretBox, keys.clone().into()),
                Provider::Kms(kms) => match kept.get(&kms.name).filter(|k| k.config() == kms) {
                    Some(same) => Transformer::Kms(same.clone()),
                    None => Transformer::Kms(Arc::new(KmsProvider::new(kms.clone()))),
                },
            });
            let transformers = transformers.collect();
            (entry, transformers)
        });
        let entries = entries.collect();
        let providers = Arc::new(Providers { entries, text });
        // What was asked of the former plug-ins says nothing from here on: see `poll`.
        let mut current = self.current.write();
        self.metrics.forget_plugins();
        self.metrics.keys(providers.keys());
        self.plugins_well.store(false, Ordering::Relaxed);
        *current = providers;
        Ok(())
    }

    /// Asks every plug-in how it is; the errors of those that are not well.
    pub(crate) async fn poll(&self) -> Vec<String> {
        let asked = self.current.read().clone();
        let (mut answers, mut problems) = (Vec::new(), Vec::new());
        for kms in asked.plugins() {
            let answer = kms.refresh().await;
            answers.push((kms.config().name.clone(), answer.is_ok(), SystemTime::now()));
            if let Err(error) = answer {
                problems.push(service::error_chain(&error));
            }
        }
        // Held so that no other file comes into force in between.
        let current = self.current.read();
        if Arc::ptr_eq(&current, &asked) {
            for (name, well, at) in answers {
                self.metrics.plugin(&name, well, at);
            }
            self.metrics.keys(asked.keys());
            self.plugins_well.store(problems.is_empty(), Ordering::Relaxed);
        }
        problems
    }

    /// Whether all KMS plug-ins were well when they were last asked, as `/readyz/kms-providers` says; `None` without a
    /// configuration.
    pub(crate) fn plugins_well(&self) -> Option<bool> {
        self.path.as_ref()?;
        let none = self.current.read().plugins().next().is_none();
        Some(none || self.plugins_well.load(Ordering::Relaxed))
    }

    /// Registers what is counted here.
    pub(crate) fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        self.metrics.register(registry);
    }

    /// So many objects are under an old key, if that can be told: somebody has looked.
    fn note_stale(&self, objects: Option<u64>) {
        self.metrics.stale(objects);
    }

    /// The stored form of a value.
    pub(crate) async fn seal(&self, key: &[u8], value: Bytes) -> Result<Bytes, EncryptionError> {
        self.try_seal(key, value).await.inspect_err(|_| self.metrics.failed("encrypt"))
    }

    /// The value of a stored form.
    pub(crate) async fn open(&self, key: &[u8], stored: Bytes) -> Result<Bytes, EncryptionError> {
        self.try_open(key, stored).await.inspect_err(|_| self.metrics.failed("decrypt"))
    }

    async fn try_seal(&self, key: &[u8], value: Bytes) -> Result<Bytes, EncryptionError> {
        let current = self.current.read().clone();
        let Some(transformer) = current.of(key).and_then(|list| list.first()) else { return Ok(value) };
        let (mut stored, data) = match transformer {
            Transformer::Identity => return Ok(value),
            Transformer::Local(cipher, keys) => {
                // The file names at least one key.
                let Some(first) = keys.first() else { return Ok(value) };
                let prefix = format!("{}{}:", cipher.prefix(), first.name);
                (prefix.into_bytes(), cipher.seal(&first.secret, &value, key)?)
            }
            Transformer::Kms(kms) => {
                let prefix = format!("{}{}:", kms::PREFIX, kms.config().name);
                (prefix.into_bytes(), kms.seal(&value, key).await?)
            }
        };
        stored.extend_from_slice(&data);
        Ok(stored.into())
    }

    async fn try_open(&self, key: &[u8], stored: Bytes) -> Result<Bytes, EncryptionError> {
        if stored.is_empty() {
            return Ok(stored);
        }
        let current = self.current.read().clone();
        let transformers = current.of(key).unwrap_or(&[Transformer::Identity]);
        for transformer in transformers {
            match transformer {
                Transformer::Identity if !stored.starts_with(ENCRYPTED) => return Ok(stored),
                Transformer::Identity => {}
                Transformer::Local(cipher, keys) => {
                    let Some(rest) = stored.strip_prefix(cipher.prefix().as_bytes()) else { continue };
                    for named in keys.iter() {
                        let data =
                            rest.strip_prefix(named.name.as_bytes()).and_then(|r| r.strip_prefix(b":"));
                        if let Some(data) = data {
                            return Ok(cipher.open(&named.secret, data, key)?.into());
                        }
                    }
                }
                Transformer::Kms(kms) => {
                    let prefix = format!("{}{}:", kms::PREFIX, kms.config().name);
                    if let Some(data) = stored.strip_prefix(prefix.as_bytes()) {
                        return Ok(kms.open(data, key).await?.into());
                    }
                }
            }
        }
        Err(EncryptionError::NoProvider { prefix: label(&stored) })
    }

    /// Would the value be written under another key now? `None` while that key's plug-in has not said which it is.
    pub(crate) fn is_stale(&self, key: &[u8], stored: &[u8]) -> Option<bool> {
        let current = self.current.read().clone();
        match current.of(key).and_then(|list| list.first()) {
            None | Some(Transformer::Identity) => Some(stored.starts_with(ENCRYPTED)),
            Some(Transformer::Local(cipher, keys)) => {
                let name = keys.first().map_or("", |k| k.name.as_str());
                Some(!stored.starts_with(format!("{}{name}:", cipher.prefix()).as_bytes()))
            }
            Some(Transformer::Kms(kms)) => {
                let prefix = format!("{}{}:", kms::PREFIX, kms.config().name);
                stored.strip_prefix(prefix.as_bytes()).map_or(Some(true), |data| kms.is_stale(data))
            }
        }
    }

    /// Notes, and says once, that a value could not be decrypted.
    fn note_unreadable(&self, fault: &store::StoreFault) {
        if !self.unreadable.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                error = service::error_chain(fault),
                "a stored object cannot be decrypted, perhaps not the only one: requests for such objects fail"
            );
        }
    }

    /// Nothing is known any more that cannot be decrypted: the next time it is said anew.
    pub(crate) fn forget_unreadable(&self) {
        self.unreadable.store(false, Ordering::Relaxed);
    }

    /// Is there a file at all?
    pub(crate) fn is_configured(&self) -> bool {
        self.path.is_some()
    }

    /// Does the configuration say anything about the resource of this key?
    pub(crate) fn covers(&self, key: &[u8]) -> bool {
        self.current.read().of(key).is_some()
    }
}

/// Follows the file and the plug-ins until `shutdown`.
pub(crate) async fn run(encryption: Arc<Encryption>, shutdown: tokio_util::sync::CancellationToken) {
    let (mut warned, mut noticed) = (Vec::new(), None);
    loop {
        match encryption.reload_settled(&mut noticed) {
            Ok(true) => tracing::info!("the encryption configuration has changed and is in force"),
            Ok(false) => {}
            Err(error) => tracing::warn!(
                error = service::error_chain(&error),
                "the changed encryption configuration cannot be used, the former stays in force"
            ),
        }
        let problems = tokio::select! {
            () = shutdown.cancelled() => return,
            problems = encryption.poll() => problems,
        };
        if problems != warned {
            for problem in &problems {
                tracing::warn!(problem, "a KMS plug-in is not well");
            }
            warned = problems;
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(if noticed.is_some() { SETTLING } else { POLL }) => {}
        }
    }
}

// === impl Providers ===

impl Providers {
    fn plugins(&self) -> impl Iterator<Item = &Arc<KmsProvider>> {
        self.entries.iter().flat_map(|(_, transformers)| transformers).filter_map(|transformer| {
            match transformer {
                Transformer::Kms(kms) => Some(kms),
                Transformer::Identity | Transformer::Local(..) => None,
            }
        })
    }

    /// What writes use, for people.
    fn keys(&self) -> Vec<KeyLabels> {
        let of = |(entry, transformers): &(Entry, Vec<Transformer>)| {
            let (provider, key) = match transformers.first()? {
                Transformer::Identity => ("identity".to_owned(), String::new()),
                Transformer::Local(cipher, keys) => (cipher.name().to_owned(), keys.first()?.name.clone()),
                Transformer::Kms(kms) => (format!("kms/{}", kms.config().name), kms.key_hash()?),
            };
            Some(KeyLabels { resources: entry.resources.join(","), provider, key })
        };
        self.entries.iter().filter_map(of).collect()
    }

    /// What reads and writes values of this key's resource; `None`: nothing is said about it.
    fn of(&self, key: &[u8]) -> Option<&[Transformer]> {
        if self.entries.is_empty() {
            return None;
        }
        let text = std::str::from_utf8(key).ok()?.strip_prefix("/registry/")?;
        let mut parts = text.split('/');
        let (group, plural) = (parts.next()?, parts.next()?);
        let group = if group == "core" { "" } else { group };
        self.entries.iter().find(|(entry, _)| entry.covers(group, plural)).map(|(_, t)| t.as_slice())
    }
}

/// `aesgcm/key1`, `kms/name/key-id`, or `identity`.
pub(crate) fn label(stored: &[u8]) -> Label {
    let Some(rest) = stored.strip_prefix(ENCRYPTED) else { return "identity".into() };
    // At most what a provider's name and a key's may take.
    let head = String::from_utf8_lossy(&rest[..rest.len().min(300)]).into_owned();
    let mut parts = head.splitn(4, ':');
    let provider = parts.next().unwrap_or_default().to_owned();
    let name = parts.nth(1).unwrap_or_default().to_owned();
    if provider == "kms" {
        let data = rest.strip_prefix(format!("kms:v2:{name}:").as_bytes()).unwrap_or_default();
        return format!("kms/{name}/{}", KmsProvider::key_of(data).unwrap_or_default());
    }
    format!("{provider}/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8] = b"/registry/core/secrets/default/a";

    fn file(dir: &tempfile::TempDir, providers: &str) -> PathBuf {
        let path = dir.path().join("encryption.yaml");
        let text = format!(
            "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [secrets]\n  providers: [{providers}]\n"
        );
        std::fs::write(&path, text).expect("written");
        path
    }

    fn gcm(name: &str, byte: char) -> String {
        format!("{{name: {name}, secret: {}=}}", byte.to_string().repeat(43))
    }

    #[test]
    fn what_somebody_is_still_writing_is_not_taken() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = file(&dir, "{identity: {}}");
        let encryption = Encryption::load(Some(path.clone())).expect("valid");
        let head = "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [secrets]\n  providers:\n  - aesgcm:\n      keys:\n      - name: one\n        secret: ";
        let whole = format!("{head}{}=\n", "A".repeat(43));
        let cut = &whole[..head.len() + 32];
        EncryptionConfig::parse(cut.as_bytes()).expect("a valid file with a shorter key");
        let mut noticed = None;
        let mut look = || encryption.reload_settled(&mut noticed);
        std::fs::write(&path, cut).expect("written");
        assert!(!look().expect("valid"));
        std::fs::write(&path, &whole).expect("written");
        assert!(!look().expect("valid"));
        assert!(look().expect("valid") && !look().expect("the same"));
        let length = |encryption: &Encryption| match encryption.current.read().entries[0].1.as_slice() {
            [Transformer::Local(_, keys)] => keys[0].secret.len(),
            _ => 0,
        };
        assert_eq!(length(&encryption), 32);
        // What cannot be used leaves it in force, however long it stays.
        std::fs::write(&path, &whole[..head.len()]).expect("written");
        assert!(!look().expect("it may change"));
        look().expect_err("it stays");
        assert_eq!(length(&encryption), 32);
    }

    #[tokio::test]
    async fn answers_of_former_plugins_say_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let kms = |name: &str| {
            let socket = dir.path().join(name);
            format!(
                "{{kms: {{apiVersion: v2, name: {name}, endpoint: 'unix://{}', timeout: 5s}}}}",
                socket.display()
            )
        };
        let encryption = Encryption::load(Some(file(&dir, &kms("former")))).expect("valid");
        // It hangs up as soon as it is asked, and that after the next file is in force.
        let listener = tokio::net::UnixListener::bind(dir.path().join("former")).expect("a socket");
        let hangs_up = async {
            let (connection, _) = listener.accept().await.expect("a connection");
            file(&dir, &kms("present"));
            assert!(encryption.reload().expect("valid"));
            encryption.plugins_well.store(true, Ordering::Relaxed);
            drop(connection);
        };
        let (problems, ()) = tokio::join!(encryption.poll(), hangs_up);
        assert_eq!(problems.len(), 1);
        assert_eq!(encryption.plugins_well(), Some(true), "said of the present one");
    }

    #[tokio::test]
    async fn keys_rotate() {
        let dir = tempfile::tempdir().expect("a directory");
        let plain = Bytes::from_static(b"{\"data\":\"hush\"}");
        let encryption = Encryption::load(Some(file(&dir, "{identity: {}}"))).expect("valid");
        assert_eq!(encryption.seal(KEY, plain.clone()).await.expect("sealed"), plain);
        file(&dir, &format!("{{aesgcm: {{keys: [{}]}}}}, {{identity: {{}}}}", gcm("one", 'A')));
        assert!(encryption.reload().expect("valid") && !encryption.reload().expect("the same"));
        assert_eq!(encryption.open(KEY, plain.clone()).await.expect("still readable"), plain);
        assert_eq!(encryption.is_stale(KEY, &plain), Some(true));
        let first = encryption.seal(KEY, plain.clone()).await.expect("sealed");
        assert_eq!(label(&first), "aesgcm/one");
        assert_eq!(encryption.is_stale(KEY, &first), Some(false));
        assert!(!first.windows(4).any(|w| w == b"hush"));
        // The new key first, the old one still there.
        file(&dir, &format!("{{aesgcm: {{keys: [{}, {}]}}}}", gcm("two", 'E'), gcm("one", 'A')));
        encryption.reload().expect("valid");
        assert_eq!(encryption.open(KEY, first.clone()).await.expect("readable"), plain);
        assert_eq!(encryption.is_stale(KEY, &first), Some(true));
        assert!(encryption.open(KEY, plain.clone()).await.is_err(), "identity is not listed any more");
        let second = encryption.seal(KEY, plain.clone()).await.expect("sealed");
        assert_eq!(label(&second), "aesgcm/two");
        // The old key is gone.
        file(
            &dir,
            &format!(
                "{{secretbox: {{keys: [{}]}}}}, {{aesgcm: {{keys: [{}]}}}}",
                gcm("box", 'I'),
                gcm("two", 'E')
            ),
        );
        encryption.reload().expect("valid");
        assert!(matches!(encryption.open(KEY, first).await, Err(EncryptionError::NoProvider { .. })));
        assert_eq!(encryption.open(KEY, second).await.expect("readable"), plain);
        // A broken file changes nothing.
        std::fs::write(dir.path().join("encryption.yaml"), "kind: X").expect("written");
        assert!(encryption.reload().is_err());
        let third = encryption.seal(KEY, plain.clone()).await.expect("sealed");
        assert_eq!(label(&third), "secretbox/box");
        // Elsewhere nothing is encrypted.
        let other = b"/registry/core/configmaps/default/a";
        assert_eq!(encryption.seal(other, plain.clone()).await.expect("as it is"), plain);
    }
}
