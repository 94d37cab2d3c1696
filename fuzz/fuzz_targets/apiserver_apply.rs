//! Server-side apply over an object with managedFields.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_apiserver::fuzzing::apply(input));
