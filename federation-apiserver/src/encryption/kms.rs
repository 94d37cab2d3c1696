//! A KMS v2 plug-in: encrypts the seeds of data keys, which stay with the objects, encrypted. Source: Kubernetes, "Using a
//! KMS provider for data encryption", version 2.
//!
//! The plug-in is asked once for a seed, not once for an object: each write derives a key of its own from the current seed
//! (HKDF-SHA256 with random info), reads find the seed in a cache. A new seed is made when the plug-in names a new key.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hkdf::{HKDF_SHA256, Prk};
use parking_lot::{Mutex, RwLock};
use prost::Message as _;
use proto::kms::v2::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, StatusRequest, StatusResponse,
};
use proto::storage::v1::EncryptedObject;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::config::Kms;
use super::grpc::{CallError, Client};
use super::local::{self, Broken};

/// How stored values begin, before the provider's name.
pub(super) const PREFIX: &str = "k8s:enc:kms:v2:";
const STATUS: &str = "/v2.KeyManagementService/Status";
const ENCRYPT: &str = "/v2.KeyManagementService/Encrypt";
const DECRYPT: &str = "/v2.KeyManagementService/Decrypt";

const SEED: usize = 32;
const INFO: usize = 32;
/// Seeds that are kept decrypted. One is made per key of the plug-in and per start of a server.
const MAX_SEEDS: usize = 1000;
/// How long writes go on after the plug-in last said that it is well, as in kube-apiserver: a key that was withdrawn
/// encrypts no longer than that.
const FRESH: Duration = Duration::from_secs(180);
/// After a failure to decrypt a seed, nobody asks for so long: the many objects of a list do not wait for a dead
/// plug-in one after the other.
const BREATHER: Duration = Duration::from_secs(2);
/// Largest key id, as in Kubernetes; it is in every object.
const MAX_KEY_ID: usize = 1024;
/// Largest encrypted seed and annotations, together, for the same reason.
const MAX_SEALED: usize = 32 << 10;

/// Why the plug-in's part failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KmsError {
    #[error("the KMS plug-in {name} failed")]
    Call {
        name: String,
        #[source]
        source: CallError,
    },
    #[error("the KMS plug-in {name} is not well: {why}")]
    Unhealthy { name: String, why: String },
    #[error("the KMS plug-in {name} answered what its protocol does not allow: {why}")]
    Protocol { name: String, why: &'static str },
    #[error(
        "the KMS plug-in {name} has not answered for {FRESH:?}: nothing is written under a key that may be withdrawn"
    )]
    Stale { name: String },
    #[error("the KMS plug-in {name} failed just now and is not asked again at once")]
    Failing { name: String },
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("the stored bytes are not those of a KMS provider")]
    Format,
}

/// One plug-in.
pub(super) struct KmsProvider {
    config: Kms,
    client: Client,
    /// What writes use, with when the plug-in was last well.
    current: RwLock<Option<(Arc<Seed>, Instant)>>,
    /// By the hash of the encrypted seed.
    seeds: Mutex<HashMap<[u8; 32], Arc<[u8; SEED]>>>,
    /// When a seed could not be decrypted last.
    failed: Mutex<Option<Instant>>,
    /// One fetch at a time.
    asking: tokio::sync::Mutex<()>,
}

struct Seed {
    bytes: Arc<[u8; SEED]>,
    sealed: EncryptResponse,
}

// === impl KmsProvider ===

impl KmsProvider {
    pub(super) fn new(config: Kms) -> Self {
        let client = Client::new(&config.socket, config.timeout);
        Self {
            config,
            client,
            current: RwLock::new(None),
            seeds: Mutex::default(),
            failed: Mutex::default(),
            asking: tokio::sync::Mutex::new(()),
        }
    }

    pub(super) fn config(&self) -> &Kms {
        &self.config
    }

    /// Encrypts a value for its place in the store.
    pub(super) async fn seal(&self, plain: &[u8], place: &[u8]) -> Result<Vec<u8>, KmsError> {
        let current = self.fresh();
        let seed = match current {
            Some(seed) => seed,
            None => {
                self.refresh().await?;
                self.fresh().ok_or_else(|| KmsError::Stale { name: self.config.name.clone() })?
            }
        };
        let info: [u8; INFO] = local::random()?;
        // The derived key is used once, so its nonce may be fixed.
        let data = local::seal_gcm(&derive(&seed.bytes, &info)?, [0; 12], plain, place)?;
        let object = EncryptedObject {
            encrypted_data: [info.as_slice(), &data].concat().into(),
            key_id: seed.sealed.key_id.clone(),
            encrypted_dek_source: seed.sealed.ciphertext.clone(),
            annotations: seed.sealed.annotations.clone(),
            encrypted_dek_source_type: 1,
        };
        Ok(object.encode_to_vec())
    }

    /// Decrypts a value.
    pub(super) async fn open(&self, data: &[u8], place: &[u8]) -> Result<Vec<u8>, KmsError> {
        let object = EncryptedObject::decode(data).map_err(|_| KmsError::Format)?;
        if object.encrypted_dek_source_type != 1 {
            return Err(KmsError::Format);
        }
        let seed = self.seed_of(&object).await?;
        let (info, data) = object.encrypted_data.split_first_chunk::<INFO>().ok_or(KmsError::Format)?;
        Ok(local::open_gcm(&derive(&seed, info)?, data, place)?)
    }

    /// Was the value written under another key than new ones are? `None` as long as the plug-in has not named its key.
    pub(super) fn is_stale(&self, data: &[u8]) -> Option<bool> {
        let current = self.current.read().as_ref().map(|(seed, _)| seed.sealed.key_id.clone());
        let Ok(object) = EncryptedObject::decode(data) else { return Some(true) };
        current.map(|id| id != object.key_id)
    }

    /// Id of the key that a value was written under.
    pub(super) fn key_of(data: &[u8]) -> Option<String> {
        EncryptedObject::decode(data).ok().map(|object| object.key_id)
    }

    /// The hash of the id of the key that writes use, as kube-apiserver's metrics show it; `None` before the first answer.
    pub(super) fn key_hash(&self) -> Option<String> {
        let current = self.current.read();
        let (seed, _) = current.as_ref()?;
        Some(
            hash(seed.sealed.key_id.as_bytes())
                .iter()
                .fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}")),
        )
    }

    fn fresh(&self) -> Option<Arc<Seed>> {
        let current = self.current.read();
        current.as_ref().filter(|(_, at)| at.elapsed() < FRESH).map(|(seed, _)| seed.clone())
    }

    /// Asks the plug-in how it is, and makes a new seed when its key is another one.
    pub(super) async fn refresh(&self) -> Result<(), KmsError> {
        let _one = self.asking.lock().await;
        let asked = Instant::now();
        let status: StatusResponse = self.call(STATUS, &StatusRequest {}).await?;
        let unhealthy = |why: String| KmsError::Unhealthy { name: self.config.name.clone(), why };
        if status.version != "v2" && status.version != "v2beta1" {
            return Err(unhealthy(format!("it speaks version {:?}", status.version)));
        }
        if status.healthz != "ok" {
            return Err(unhealthy(status.healthz));
        }
        let protocol = |why| KmsError::Protocol { name: self.config.name.clone(), why };
        check_key_id(&status.key_id).map_err(protocol)?;
        let known = self.current.read().as_ref().map(|(seed, _)| seed.clone());
        if let Some(seed) = known.filter(|seed| seed.sealed.key_id == status.key_id) {
            *self.current.write() = Some((seed, asked));
            return Ok(());
        }
        let bytes: Arc<[u8; SEED]> = Arc::new(local::random()?);
        let request =
            EncryptRequest { plaintext: bytes.to_vec().into(), uid: uuid::Uuid::new_v4().to_string() };
        let sealed: EncryptResponse = self.call(ENCRYPT, &request).await?;
        check_sealed(&sealed, &bytes).map_err(protocol)?;
        tracing::info!(plugin = self.config.name, key = sealed.key_id, "a new data key seed is in use");
        self.keep(hash(&sealed.ciphertext), bytes.clone());
        *self.current.write() = Some((Arc::new(Seed { bytes, sealed }), asked));
        Ok(())
    }

    async fn seed_of(&self, object: &EncryptedObject) -> Result<Arc<[u8; SEED]>, KmsError> {
        let hash = hash(&object.encrypted_dek_source);
        let known = || self.seeds.lock().get(&hash).cloned();
        if let Some(seed) = known() {
            return Ok(seed);
        }
        // Many readers of one seed ask once.
        let _one = self.asking.lock().await;
        if let Some(seed) = known() {
            return Ok(seed);
        }
        if self.failed.lock().is_some_and(|at| at.elapsed() < BREATHER) {
            return Err(KmsError::Failing { name: self.config.name.clone() });
        }
        let request = DecryptRequest {
            ciphertext: object.encrypted_dek_source.clone(),
            uid: uuid::Uuid::new_v4().to_string(),
            key_id: object.key_id.clone(),
            annotations: object.annotations.clone(),
        };
        let answer = self.call::<_, DecryptResponse>(DECRYPT, &request).await;
        *self.failed.lock() = answer.is_err().then(Instant::now);
        let answer = answer?;
        let protocol = |why| KmsError::Protocol { name: self.config.name.clone(), why };
        let seed = Arc::new(opened(&answer).map_err(protocol)?);
        self.keep(hash, seed.clone());
        Ok(seed)
    }

    fn keep(&self, hash: [u8; 32], seed: Arc<[u8; SEED]>) {
        let mut seeds = self.seeds.lock();
        if seeds.len() >= MAX_SEEDS {
            // Any one: it is fetched again when it is needed.
            if let Some(one) = seeds.keys().next().copied() {
                seeds.remove(&one);
            }
        }
        seeds.insert(hash, seed);
    }

    async fn call<A: prost::Message, B: prost::Message + Default>(
        &self,
        method: &'static str,
        message: &A,
    ) -> Result<B, KmsError> {
        let failed = |source| KmsError::Call { name: self.config.name.clone(), source };
        self.client.call(method, message).await.map_err(failed)
    }
}

/// Checks a key's id: it is in every object.
pub(crate) fn check_key_id(id: &str) -> Result<(), &'static str> {
    if id.is_empty() || id.len() > MAX_KEY_ID {
        return Err("the key id is empty or above 1 KiB");
    }
    Ok(())
}

/// Checks what the plug-in made of a seed.
pub(crate) fn check_sealed(sealed: &EncryptResponse, seed: &[u8; SEED]) -> Result<(), &'static str> {
    check_key_id(&sealed.key_id)?;
    let annotations: usize = sealed.annotations.iter().map(|(k, v)| k.len() + v.len()).sum();
    if sealed.ciphertext.is_empty() || sealed.ciphertext.len() + annotations > MAX_SEALED {
        return Err("the encrypted seed is empty or, with its annotations, above 32 KiB");
    }
    if sealed.ciphertext.as_ref() == seed.as_slice() {
        return Err("the encrypted seed is the seed itself");
    }
    Ok(())
}

/// The seed that the plug-in decrypted.
pub(crate) fn opened(answer: &DecryptResponse) -> Result<[u8; SEED], &'static str> {
    answer.plaintext.as_ref().try_into().map_err(|_| "a decrypted seed has not 32 bytes")
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// The key of one object.
fn derive(seed: &[u8; SEED], info: &[u8; INFO]) -> Result<[u8; 32], Broken> {
    let mut key = [0; 32];
    Prk::new_less_safe(HKDF_SHA256, seed)
        .expand(&[info], HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut key))
        .map_err(|_| Broken)?;
    Ok(key)
}
