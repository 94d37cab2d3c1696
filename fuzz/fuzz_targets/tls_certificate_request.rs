//! A certificate request, in PEM or DER.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tls::fuzzing::certificate_request(input));
