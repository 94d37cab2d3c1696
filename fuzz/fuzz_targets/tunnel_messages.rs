//! Control messages: hellos, drains, lists of servers.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tunnel::fuzzing::messages(input));
