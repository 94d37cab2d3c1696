//! What a KMS plug-in answers.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_apiserver::fuzzing::kms_answer(input));
