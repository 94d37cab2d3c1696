//! What a Kubernetes API answers about a caller's token and rights.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| proxy_server::fuzzing::review_answers(input));
