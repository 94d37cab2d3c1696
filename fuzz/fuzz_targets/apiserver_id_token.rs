//! ID tokens, and what their issuer answers: its discovery document and its keys.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_apiserver::fuzzing::id_token(input));
