//! What conversion webhooks answer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_apiserver::fuzzing::conversion_answer(input));
