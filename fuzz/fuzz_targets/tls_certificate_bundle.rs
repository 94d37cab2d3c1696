//! Certificates in PEM.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tls::fuzzing::certificate_bundle(input));
