//! Keys that sign and verify service accounts' tokens.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use jsonwebtoken::jwk::{Jwk, PublicKeyUse, ThumbprintHash};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde_json::{Value, json};

/// Public keys in one file.
const MAX_KEYS: usize = 64;
const PEM_LINE: usize = 64;

/// The key that signs, and those that are accepted (the signing one's own among them).
pub struct Keys {
    signing: EncodingKey,
    verifying: Vec<Verifying>,
}

struct Verifying {
    algorithm: Algorithm,
    key: DecodingKey,
    jwk: Jwk,
}

/// A key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("failed to read or write the service account key {path}")]
    File {
        path: PathBuf,
        #[source]
        source: tls::FileError,
    },
    #[error("failed to use the service account key {path}: expected PEM with an RSA or a P-256 key")]
    Format {
        path: PathBuf,
        #[source]
        source: jsonwebtoken::errors::Error,
    },
    #[error("the file {path} holds no key in PEM, or more than {MAX_KEYS}")]
    Count { path: PathBuf },
    #[error("failed to generate a service account key")]
    Generate,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({} to verify with)", self.verifying.len())
    }
}

// === impl Keys ===

impl Keys {
    /// Reads the signing key, or makes one where there is none; `more` are files of keys that are accepted as well.
    pub fn load(signing: &Path, more: &[PathBuf]) -> Result<Self, KeyError> {
        if !signing.exists() {
            generate(signing)?;
        }
        let text = read(signing)?;
        let format = |source| KeyError::Format { path: signing.to_owned(), source };
        let (key, own) = private(&text).map_err(format)?;
        let mut keys = Self { signing: key, verifying: vec![own] };
        for path in more {
            let text = read(path)?;
            let blocks = pem_blocks(&text);
            if blocks.is_empty() || blocks.len() > MAX_KEYS {
                return Err(KeyError::Count { path: path.clone() });
            }
            for block in blocks {
                let format = |source| KeyError::Format { path: path.clone(), source };
                let found = public(&block).or_else(|_| private(&block).map(|(_, v)| v)).map_err(format)?;
                if !keys.verifying.iter().any(|v| v.jwk.common.key_id == found.jwk.common.key_id) {
                    keys.verifying.push(found);
                }
            }
        }
        Ok(keys)
    }

    /// Signs claims.
    pub fn sign(&self, claims: &Value) -> Result<String, jsonwebtoken::errors::Error> {
        // There is always the signing key's own half.
        let own = self.verifying.first().ok_or(jsonwebtoken::errors::ErrorKind::InvalidKeyFormat)?;
        let mut header = Header::new(own.algorithm);
        header.typ = None;
        header.kid.clone_from(&own.jwk.common.key_id);
        jsonwebtoken::encode(&header, claims, &self.signing)
    }

    /// The claims of a token that one of the keys signed and whose time is right.
    pub fn verify(&self, token: &str, leeway: u64) -> Result<Value, jsonwebtoken::errors::Error> {
        let header = jsonwebtoken::decode_header(token)?;
        let mut last = jsonwebtoken::errors::ErrorKind::InvalidSignature.into();
        for key in &self.verifying {
            if key.algorithm != header.alg || (header.kid.is_some() && header.kid != key.jwk.common.key_id) {
                continue;
            }
            let mut validation = Validation::new(key.algorithm);
            validation.leeway = leeway;
            validation.validate_nbf = true;
            // Audiences are compared by the caller; tokens of Secrets do not expire.
            validation.validate_aud = false;
            validation.required_spec_claims.clear();
            match jsonwebtoken::decode::<Value>(token, &key.key, &validation) {
                Ok(data) => return Ok(data.claims),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The JSON Web Key Set.
    pub fn jwks(&self) -> Value {
        json!({"keys": self.verifying.iter().map(|v| &v.jwk).collect::<Vec<_>>()})
    }

    /// Names of the algorithms of all keys, each once.
    pub fn algorithms(&self) -> Vec<String> {
        let mut names: Vec<String> = self.verifying.iter().map(|v| format!("{:?}", v.algorithm)).collect();
        names.sort();
        names.dedup();
        names
    }
}

fn read(path: &Path) -> Result<String, KeyError> {
    let bytes = tls::read_bounded(path).map_err(|source| KeyError::File { path: path.to_owned(), source })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Makes a P-256 key in PKCS #8.
fn generate(path: &Path) -> Result<(), KeyError> {
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
    let random = aws_lc_rs::rand::SystemRandom::new();
    let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random)
        .map_err(|_| KeyError::Generate)?;
    let encoded = base64::engine::general_purpose::STANDARD.encode(document.as_ref());
    let mut pem = String::from("-----BEGIN PRIVATE KEY-----\n");
    for line in encoded.as_bytes().chunks(PEM_LINE) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END PRIVATE KEY-----\n");
    tls::write_private(path, pem.as_bytes())
        .map_err(|source| KeyError::File { path: path.to_owned(), source })
}

/// The PEM blocks of a file, each as text.
fn pem_blocks(text: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block = None;
    for line in text.lines() {
        if line.starts_with("-----BEGIN ") {
            block = Some(String::new());
        }
        if let Some(open) = &mut block {
            open.push_str(line);
            open.push('\n');
        }
        if line.starts_with("-----END ") {
            blocks.extend(block.take());
        }
    }
    blocks
}

fn private(pem: &str) -> Result<(EncodingKey, Verifying), jsonwebtoken::errors::Error> {
    let (key, algorithm) = match EncodingKey::from_ec_pem(pem.as_bytes()) {
        Ok(key) => (key, Algorithm::ES256),
        Err(_) => (EncodingKey::from_rsa_pem(pem.as_bytes())?, Algorithm::RS256),
    };
    let jwk = Jwk::from_encoding_key(&key, algorithm)?;
    let own = Verifying { algorithm, key: DecodingKey::from_jwk(&jwk)?, jwk: named(jwk)? };
    Ok((key, own))
}

fn public(pem: &str) -> Result<Verifying, jsonwebtoken::errors::Error> {
    let (key, algorithm) = match DecodingKey::from_ec_pem(pem.as_bytes()) {
        Ok(key) => (key, Algorithm::ES256),
        Err(_) => (DecodingKey::from_rsa_pem(pem.as_bytes())?, Algorithm::RS256),
    };
    let jwk = named(Jwk::from_decoding_key(&key, Some(algorithm))?)?;
    Ok(Verifying { algorithm, key, jwk })
}

/// With an id made of the key itself, so that every replica gives it the same.
fn named(mut jwk: Jwk) -> Result<Jwk, jsonwebtoken::errors::Error> {
    jwk.common.key_id = Some(jwk.thumbprint(ThumbprintHash::SHA256)?);
    jwk.common.public_key_use = Some(PublicKeyUse::Signature);
    Ok(jwk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_key_signs_only_that_key_verifies() {
        let dir = tempfile::tempdir().expect("a directory");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let first = Keys::load(&a, &[]).expect("made");
        let other = Keys::load(&b, &[]).expect("made");
        let token = first.sign(&json!({"iss": "x", "exp": 4_000_000_000_u64})).expect("signed");
        assert_eq!(first.verify(&token, 0).expect("valid")["iss"], "x");
        assert!(other.verify(&token, 0).is_err());
        // The same file again, and as a further key of another.
        assert!(Keys::load(&a, &[]).expect("read").verify(&token, 0).is_ok());
        let both = Keys::load(&b, &[a]).expect("read");
        assert!(both.verify(&token, 0).is_ok());
        assert_eq!(both.jwks()["keys"].as_array().map(Vec::len), Some(2));
        assert_eq!(both.jwks()["keys"][0]["kty"], "EC");
        let old = first.sign(&json!({"exp": 1000})).expect("signed");
        assert!(first.verify(&old, 60).is_err());
        let mut forged = token.clone().into_bytes();
        let middle = forged.len() / 2;
        forged[middle] = if forged[middle] == b'A' { b'B' } else { b'A' };
        assert!(first.verify(&String::from_utf8_lossy(&forged), 0).is_err());
        assert!(!format!("{first:?}").contains("PRIVATE"));
    }

    #[test]
    fn files_that_hold_no_key_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("junk");
        std::fs::write(&path, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
            .expect("written");
        assert!(matches!(Keys::load(&path, &[]), Err(KeyError::Format { .. })));
        std::fs::write(&path, "nothing").expect("written");
        let good = dir.path().join("good");
        assert!(matches!(Keys::load(&good, &[path]), Err(KeyError::Count { .. })));
    }
}
