//! What opens a connection on a QUIC stream, and its answer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tunnel::fuzzing::dial(input));
