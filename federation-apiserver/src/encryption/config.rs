//! The EncryptionConfiguration file. Source: Kubernetes, "Encrypting Confidential Data at Rest".

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use serde::Deserialize;

/// How long a plug-in may take for one call when the file does not say: Kubernetes' default.
const KMS_TIMEOUT: Duration = Duration::from_secs(3);
/// Resources, providers and keys of one file: every read of a foreign prefix looks at all of them.
const MAX_ENTRIES: usize = 256;

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("failed to read the encryption configuration {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: tls::FileError,
    },
    #[error("failed to parse the encryption configuration: {0}")]
    Parse(#[from] serde_yaml_ng::Error),
    #[error(
        "the encryption configuration is a {kind} of {version:?}: expected EncryptionConfiguration of apiserver.config.k8s.io/v1"
    )]
    Kind { kind: String, version: String },
    #[error("{at}: {why}")]
    Invalid { at: String, why: String },
}

/// A checked file: what is looked for first comes first.
#[derive(Clone, Debug)]
pub(super) struct EncryptionConfig {
    pub(super) entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// `secrets`, `configmaps.`, `*.apps`, `*.`, `*.*`.
    pub(super) resources: Vec<String>,
    /// The first one writes, all read.
    pub(super) providers: Vec<Provider>,
}

#[derive(Clone, Debug)]
pub(super) enum Provider {
    Identity,
    AesGcm(Vec<Key>),
    AesCbc(Vec<Key>),
    SecretBox(Vec<Key>),
    Kms(Kms),
}

#[derive(Clone)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) secret: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kms {
    pub(super) name: String,
    pub(super) socket: PathBuf,
    pub(super) timeout: Duration,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({})", self.name)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    resources: Vec<FileEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry {
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    providers: Vec<FileProvider>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileProvider {
    identity: Option<Empty>,
    aesgcm: Option<FileKeys>,
    aescbc: Option<FileKeys>,
    secretbox: Option<FileKeys>,
    kms: Option<FileKms>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Empty {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileKeys {
    #[serde(default)]
    keys: Vec<FileKey>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileKey {
    name: String,
    secret: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FileKms {
    #[serde(default)]
    api_version: String,
    name: String,
    endpoint: String,
    #[serde(default)]
    timeout: Option<String>,
    /// Of version 1; read and refused with the version.
    #[serde(default, rename = "cachesize")]
    _cache_size: Option<i64>,
}

// === impl EncryptionConfig ===

impl EncryptionConfig {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        let file: File = serde_yaml_ng::from_slice(bytes)?;
        if file.kind != "EncryptionConfiguration" || file.api_version != "apiserver.config.k8s.io/v1" {
            return Err(ConfigError::Kind { kind: file.kind, version: file.api_version });
        }
        let invalid = |at: String, why: &str| ConfigError::Invalid { at, why: why.to_owned() };
        if file.resources.is_empty() || file.resources.len() > MAX_ENTRIES {
            return Err(invalid("resources".into(), "there has to be at least one entry, and at most 256"));
        }
        let mut names: Vec<String> = Vec::new();
        let mut entries = Vec::new();
        for (i, entry) in file.resources.into_iter().enumerate() {
            let at = format!("resources[{i}]");
            if entry.resources.is_empty() || entry.resources.len() > MAX_ENTRIES {
                return Err(invalid(at, "resources: name at least one, and at most 256"));
            }
            if entry.providers.is_empty() || entry.providers.len() > MAX_ENTRIES {
                return Err(invalid(at, "providers: name at least one, and at most 256"));
            }
            for resource in &entry.resources {
                if resource.is_empty() || resource == "*" || resource.contains('/') {
                    return Err(ConfigError::Invalid {
                        at,
                        why: format!(
                            "resources: {resource:?} is not RESOURCE, RESOURCE.GROUP, *.GROUP, *. or *.*"
                        ),
                    });
                }
            }
            let providers = entry.providers.into_iter().enumerate().map(|(j, provider)| {
                let at = format!("{at}.providers[{j}]");
                let provider = provider.check(&at)?;
                if let Provider::Kms(kms) = &provider {
                    if names.contains(&kms.name) {
                        return Err(invalid(at, "kms: the name is taken by another provider of the file"));
                    }
                    names.push(kms.name.clone());
                }
                Ok(provider)
            });
            entries
                .push(Entry { resources: entry.resources, providers: providers.collect::<Result<_, _>>()? });
        }
        Ok(Self { entries })
    }
}

// === impl Entry ===

impl Entry {
    /// Is the entry for this resource? `group` is "" for the core group.
    pub(super) fn covers(&self, group: &str, plural: &str) -> bool {
        self.resources.iter().any(|named| {
            let (resource, of) = named.split_once('.').unwrap_or((named, ""));
            match (resource, of) {
                ("*", "*") => true,
                ("*", of) => of == group,
                (resource, of) => resource == plural && of == group,
            }
        })
    }
}

// === impl FileProvider ===

impl FileProvider {
    fn check(self, at: &str) -> Result<Provider, ConfigError> {
        let invalid = |why: &str| ConfigError::Invalid { at: at.to_owned(), why: why.to_owned() };
        let mut found = Vec::new();
        if self.identity.is_some() {
            found.push(Provider::Identity);
        }
        if let Some(keys) = self.aesgcm {
            found.push(Provider::AesGcm(keys.check(at, &[16, 24, 32])?));
        }
        if let Some(keys) = self.aescbc {
            found.push(Provider::AesCbc(keys.check(at, &[16, 24, 32])?));
        }
        if let Some(keys) = self.secretbox {
            found.push(Provider::SecretBox(keys.check(at, &[32])?));
        }
        if let Some(kms) = self.kms {
            found.push(Provider::Kms(kms.check(at)?));
        }
        match found.pop() {
            Some(one) if found.is_empty() => Ok(one),
            Some(_) => Err(invalid("more than one provider in one entry: make it a list")),
            None => Err(invalid("no provider: name one of identity, aesgcm, aescbc, secretbox, kms")),
        }
    }
}

impl FileKeys {
    fn check(self, at: &str, lengths: &[usize]) -> Result<Vec<Key>, ConfigError> {
        let invalid = |why: String| ConfigError::Invalid { at: at.to_owned(), why };
        if self.keys.is_empty() || self.keys.len() > MAX_ENTRIES {
            return Err(invalid("keys: name at least one, and at most 256".into()));
        }
        let mut keys: Vec<Key> = Vec::new();
        for key in self.keys {
            if key.name.is_empty() || key.name.contains(':') || keys.iter().any(|k| k.name == key.name) {
                return Err(invalid(format!("keys: the name {:?} is empty, taken or has a colon", key.name)));
            }
            // The secret itself is in no message.
            let secret = base64::engine::general_purpose::STANDARD.decode(key.secret.trim());
            let secret = secret.map_err(|_| invalid(format!("keys: {:?} is not base64", key.name)))?;
            if !lengths.contains(&secret.len()) {
                return Err(invalid(format!(
                    "keys: {:?} has {} bytes, expected one of {lengths:?}",
                    key.name,
                    secret.len()
                )));
            }
            keys.push(Key { name: key.name, secret });
        }
        Ok(keys)
    }
}

impl FileKms {
    fn check(self, at: &str) -> Result<Kms, ConfigError> {
        let invalid = |why: String| ConfigError::Invalid { at: at.to_owned(), why };
        if self.api_version != "v2" {
            return Err(invalid("kms: only apiVersion v2 is served; version 1 is deprecated".into()));
        }
        if self.name.is_empty() || self.name.contains(':') {
            return Err(invalid("kms: a name without a colon is needed".into()));
        }
        let socket =
            self.endpoint.strip_prefix("unix://").filter(|p| p.starts_with('/') || p.starts_with('@'));
        let socket = socket.ok_or_else(|| invalid("kms: the endpoint has to be unix:///PATH".into()))?;
        let timeout = match &self.timeout {
            None => KMS_TIMEOUT,
            Some(text) => {
                let parsed: Result<service::duration::GoDuration, _> = text.parse();
                parsed.ok().map(|d| d.0).filter(|d| !d.is_zero()).ok_or_else(|| {
                    invalid(format!("kms: timeout {text:?} is not a duration above zero, such as 3s"))
                })?
            }
        };
        Ok(Kms { name: self.name, socket: PathBuf::from(socket), timeout })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<EncryptionConfig, ConfigError> {
        let head = "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\n";
        EncryptionConfig::parse(format!("{head}{text}").as_bytes())
    }

    #[test]
    fn wildcards() {
        let config = parse(
            "resources: [{resources: [secrets, deployments.apps, '*.x.io'], providers: [{identity: {}}]}]",
        );
        let entry = &config.expect("valid").entries[0];
        assert!(
            entry.covers("", "secrets") && entry.covers("apps", "deployments") && entry.covers("x.io", "any")
        );
        assert!(
            !entry.covers("apps", "secrets")
                && !entry.covers("", "configmaps")
                && !entry.covers("y.io", "any")
        );
        let core = parse("resources: [{resources: ['*.'], providers: [{identity: {}}]}]").expect("valid");
        assert!(core.entries[0].covers("", "pods") && !core.entries[0].covers("apps", "deployments"));
        let all = parse("resources: [{resources: ['*.*'], providers: [{identity: {}}]}]").expect("valid");
        assert!(all.entries[0].covers("", "pods") && all.entries[0].covers("apps", "deployments"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let providers = |p: &str| parse(&format!("resources: [{{resources: [secrets], providers: [{p}]}}]"));
        for (text, wanted) in [
            ("{aesgcm: {keys: [{name: a, secret: '?'}]}}", "not base64"),
            ("{aesgcm: {keys: [{name: a, secret: AAAA}]}}", "has 3 bytes"),
            ("{secretbox: {keys: []}}", "at least one"),
            ("{kms: {name: a, endpoint: 'unix:///x'}}", "only apiVersion v2"),
            ("{kms: {apiVersion: v2, name: a, endpoint: 'tcp://x'}}", "unix:///PATH"),
            ("{}", "no provider"),
            (
                "{identity: {}, aesgcm: {keys: [{name: a, secret: AAAAAAAAAAAAAAAAAAAAAA==}]}}",
                "more than one",
            ),
        ] {
            let error = providers(text).expect_err("refused").to_string();
            assert!(error.contains(wanted), "{text}: {error}");
        }
        assert!(parse("resources: [{resources: ['*'], providers: [{identity: {}}]}]").is_err());
        assert!(matches!(EncryptionConfig::parse(b"kind: X"), Err(ConfigError::Kind { .. })));
    }
}
