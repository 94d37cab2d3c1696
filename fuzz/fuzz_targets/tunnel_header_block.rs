//! HPACK header blocks of a tunnel's requests and responses.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tunnel::fuzzing::header_block(input));
