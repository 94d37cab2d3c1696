//! Stateless resets (RFC 9000, section 10.3): a QUIC server that was killed and is there again tells agents so.
//!
//! Nobody closes the tunnels of a process that is killed. Over TCP the kernel of the next one answers with a reset; over
//! QUIC the next process itself must, with a token that only the former one could have made. Both have the same key, and
//! the key's mark is in every connection id, so that only packets of real tunnels are answered.

use std::{fmt, sync::Arc, time::Duration};

use aws_lc_rs::hmac;
use quinn::EndpointConfig;
use quinn_proto::HashedConnectionIdGenerator;

/// The shortest time between two resets. Few packets of a stranger have the key's mark, and a reset is shorter than
/// what it answers; thousands of agents are told of a crash within seconds.
const INTERVAL: Duration = Duration::from_micros(500);

/// What stateless resets are made with. Whoever has it can end QUIC tunnels that he sees; two servers that agents reach
/// at different addresses should have different ones.
#[derive(Clone)]
pub struct ResetKey(hmac::Key);

// === impl ResetKey ===

impl ResetKey {
    /// One that ends with this process: after a crash agents find out by silence.
    pub fn random() -> Self {
        Self::derived(&rand::random::<[u8; 32]>())
    }

    /// The one that belongs to `secret`, which must have at least 256 bits of chance.
    pub fn derived(secret: &[u8]) -> Self {
        let root = hmac::Key::new(hmac::HMAC_SHA256, secret);
        Self(hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&root, b"cellway quic stateless reset").as_ref()))
    }

    pub(crate) fn endpoint_config(&self) -> EndpointConfig {
        let mut ids = [0; 8];
        ids.copy_from_slice(&hmac::sign(&self.0, b"connection ids").as_ref()[..8]);
        let ids = u64::from_be_bytes(ids);
        let mut config = EndpointConfig::new(Arc::new(self.0.clone()));
        config
            .min_reset_interval(INTERVAL)
            .cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
        config
    }
}

impl fmt::Debug for ResetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResetKey (hidden)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_secret_gives_the_same_key() {
        let signed = |secret: &[u8]| hmac::sign(&ResetKey::derived(secret).0, b"id").as_ref().to_vec();
        assert_eq!(signed(b"ours"), signed(b"ours"));
        assert_ne!(signed(b"ours"), signed(b"theirs"));
        assert!(!format!("{:?}", ResetKey::random()).contains("Key("));
    }
}
