//! Identities, certificates and TLS configurations that reload.
