//! HTTP/2 frames from either side of a tunnel, in pieces of any size.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tunnel::fuzzing::frames_in_pieces(input));
