//! Token and body of a certificate request.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| proxy_server::fuzzing::enrolment(input));
