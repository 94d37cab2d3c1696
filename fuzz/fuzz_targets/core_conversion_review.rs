//! Reviews as kube-apiservers send them to the conversion webhook, which anybody who reaches its port may do.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_core::fuzzing::conversion_review(input));
