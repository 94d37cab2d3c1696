//! CustomResourceDefinitions, and an object of the kind they define.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| federation_apiserver::fuzzing::crd(input));
