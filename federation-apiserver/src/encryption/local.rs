//! Ciphers with keys from the file: AES-GCM, AES-CBC and XSalsa20-Poly1305.
//!
//! The bytes are laid out as kube-apiserver lays them out, nonce first. AES-GCM authenticates the object's key in the
//! store too, so that one object's bytes cannot be put in another's place; the other two cannot.

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::cipher::{
    self, DecryptionContext, PaddedBlockDecryptingKey, PaddedBlockEncryptingKey, UnboundCipherKey,
};
use aws_lc_rs::iv::FixedLength;
use crypto_secretbox::aead::Aead as _;
use crypto_secretbox::{KeyInit as _, XSalsa20Poly1305};

const GCM_NONCE: usize = 12;
const CBC_IV: usize = 16;
const BOX_NONCE: usize = 24;

/// The bytes were not made with this key, or were changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored bytes were not encrypted with this key, or were changed since")]
pub(crate) struct Broken;

/// Which cipher a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cipher {
    AesGcm,
    AesCbc,
    SecretBox,
}

impl Cipher {
    /// How stored values of the cipher begin, before the key's name.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::AesGcm => "k8s:enc:aesgcm:v1:",
            Self::AesCbc => "k8s:enc:aescbc:v1:",
            Self::SecretBox => "k8s:enc:secretbox:v1:",
        }
    }

    /// The provider's name in the configuration.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::AesGcm => "aesgcm",
            Self::AesCbc => "aescbc",
            Self::SecretBox => "secretbox",
        }
    }

    pub(super) fn seal(self, key: &[u8], plain: &[u8], place: &[u8]) -> Result<Vec<u8>, Broken> {
        match self {
            Self::AesGcm => {
                let nonce: [u8; GCM_NONCE] = random()?;
                seal_gcm(key, nonce, plain, place)
            }
            Self::AesCbc => {
                let key = UnboundCipherKey::new(cbc(key)?, key).map_err(|_| Broken)?;
                let key = PaddedBlockEncryptingKey::cbc_pkcs7(key).map_err(|_| Broken)?;
                let mut data = plain.to_vec();
                let DecryptionContext::Iv128(iv) = key.encrypt(&mut data).map_err(|_| Broken)? else {
                    return Err(Broken);
                };
                let iv: &[u8; CBC_IV] = iv.as_ref();
                Ok([iv.as_slice(), &data].concat())
            }
            Self::SecretBox => {
                let nonce: [u8; BOX_NONCE] = random()?;
                let sealed = secretbox(key)?.encrypt(&nonce.into(), plain).map_err(|_| Broken)?;
                Ok([nonce.as_slice(), &sealed].concat())
            }
        }
    }

    pub(super) fn open(self, key: &[u8], data: &[u8], place: &[u8]) -> Result<Vec<u8>, Broken> {
        match self {
            Self::AesGcm => open_gcm(key, data, place),
            Self::AesCbc => {
                let (iv, data) = data.split_first_chunk::<CBC_IV>().ok_or(Broken)?;
                let key = UnboundCipherKey::new(cbc(key)?, key).map_err(|_| Broken)?;
                let key = PaddedBlockDecryptingKey::cbc_pkcs7(key).map_err(|_| Broken)?;
                let mut data = data.to_vec();
                let context = DecryptionContext::Iv128(FixedLength::from(*iv));
                let plain = key.decrypt(&mut data, context).map_err(|_| Broken)?;
                Ok(plain.to_vec())
            }
            Self::SecretBox => {
                let (nonce, data) = data.split_first_chunk::<BOX_NONCE>().ok_or(Broken)?;
                secretbox(key)?.decrypt(&(*nonce).into(), data).map_err(|_| Broken)
            }
        }
    }
}

fn secretbox(key: &[u8]) -> Result<XSalsa20Poly1305, Broken> {
    XSalsa20Poly1305::new_from_slice(key).map_err(|_| Broken)
}

fn cbc(key: &[u8]) -> Result<&'static cipher::Algorithm, Broken> {
    match key.len() {
        16 => Ok(&cipher::AES_128),
        24 => Ok(&cipher::AES_192),
        32 => Ok(&cipher::AES_256),
        _ => Err(Broken),
    }
}

fn gcm(key: &[u8]) -> Result<LessSafeKey, Broken> {
    let algorithm = match key.len() {
        16 => &aead::AES_128_GCM,
        24 => &aead::AES_192_GCM,
        32 => &aead::AES_256_GCM,
        _ => return Err(Broken),
    };
    UnboundKey::new(algorithm, key).map(LessSafeKey::new).map_err(|_| Broken)
}

/// Nonce, then what AES-GCM makes of it. A nonce is never used twice with a key.
pub(super) fn seal_gcm(
    key: &[u8],
    nonce: [u8; GCM_NONCE],
    plain: &[u8],
    place: &[u8],
) -> Result<Vec<u8>, Broken> {
    let mut data = plain.to_vec();
    gcm(key)?
        .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(place), &mut data)
        .map_err(|_| Broken)?;
    Ok([nonce.as_slice(), &data].concat())
}

pub(super) fn open_gcm(key: &[u8], data: &[u8], place: &[u8]) -> Result<Vec<u8>, Broken> {
    let (nonce, data) = data.split_first_chunk::<GCM_NONCE>().ok_or(Broken)?;
    let mut data = data.to_vec();
    let nonce = Nonce::assume_unique_for_key(*nonce);
    let length = gcm(key)?.open_in_place(nonce, Aad::from(place), &mut data).map_err(|_| Broken)?.len();
    data.truncate(length);
    Ok(data)
}

/// Bytes that nobody can guess.
pub(super) fn random<const N: usize>() -> Result<[u8; N], Broken> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Broken)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_sealed_opens_and_what_is_changed_does_not(
            plain in prop::collection::vec(any::<u8>(), 0..200),
            length in prop::sample::select(vec![16_usize, 24, 32]),
            at in any::<prop::sample::Index>(),
        ) {
            for cipher in [Cipher::AesGcm, Cipher::AesCbc, Cipher::SecretBox] {
                let key = vec![7; if cipher == Cipher::SecretBox { 32 } else { length }];
                let sealed = cipher.seal(&key, &plain, b"here").expect("sealed");
                prop_assert_eq!(&cipher.open(&key, &sealed, b"here").expect("opened"), &plain);
                let other = vec![8; key.len()];
                prop_assert_ne!(cipher.open(&other, &sealed, b"here").ok(), Some(plain.clone()));
                let mut changed = sealed.clone();
                let at = at.index(changed.len());
                changed[at] ^= 1;
                prop_assert_ne!(cipher.open(&key, &changed, b"here").ok(), Some(plain.clone()));
            }
        }

        #[test]
        fn garbage_never_panics(data in prop::collection::vec(any::<u8>(), 0..80)) {
            for cipher in [Cipher::AesGcm, Cipher::AesCbc, Cipher::SecretBox] {
                let _ = cipher.open(&[7; 32], &data, b"here");
            }
        }
    }

    #[test]
    fn gcm_bytes_belong_to_their_place() {
        let sealed = Cipher::AesGcm.seal(&[7; 32], b"x", b"here").expect("sealed");
        assert_eq!(Cipher::AesGcm.open(&[7; 32], &sealed, b"there"), Err(Broken));
    }
}
