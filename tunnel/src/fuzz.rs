//! Bodies of fuzz targets for what a peer's texts are read with: each asserts what must hold for any input.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::FutureExt;

use crate::{address::Target, egress::AnswerError, policy::DestinationPolicy};

/// Reads `input` as frames, cut into pieces whose length is its first byte; 0 stands for one piece.
pub fn frames_in_pieces(input: &[u8]) {
    if let Some((cut, frames)) = input.split_first() {
        let cut = if *cut == 0 { frames.len() } else { usize::from(*cut) };
        crate::h2::fuzz::frames(frames, cut);
    }
}

/// Reads `input` as a destination: it prints back to itself, and its host fits into one line of a log or header.
pub fn target(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Ok(target) = text.parse::<Target>() else { return };
    assert!(target.host.bytes().all(|byte| byte.is_ascii_graphic()), "{target:?}");
    assert_ne!(target.port, 0);
    assert_eq!(target.to_string().parse(), Ok(target));
}

/// Reads `input` as destination rules: they print back to the same rules, and judge addresses and names alike.
pub fn policy(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Ok(policy) = text.parse::<DestinationPolicy>() else { return };
    assert_eq!(policy.to_string().parse(), Ok(policy.clone()));
    let addresses = [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
        IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3)),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ];
    for (address, port) in addresses.into_iter().zip([80, 443, 1, 65_535]) {
        for host in ["db.internal", "localhost", text] {
            let allowed = policy.allows_resolved(host, address, port);
            assert!(allowed || !policy.allows_addr(address, port), "a name must not take an address away");
            // What lookups are skipped by must not deny what would be allowed, special addresses by name excepted.
            assert!(!allowed || policy.may_allow(host, port));
        }
    }
}

/// Reads `input` as an answer to CONNECT: only a status line of HTTP/1 gives a status, what is printed of it fits into one
/// line, and what follows the empty line stays where it is.
pub fn egress_answer(input: &[u8]) {
    let mut rest = input;
    // A slice is always ready, so the first poll is the last.
    let outcome = crate::egress::read_answer(&mut rest).now_or_never();
    match outcome {
        Some(Ok(answer)) => {
            assert!(input.starts_with(b"HTTP/1.") && answer.status < 1000);
            assert!(!answer.line.chars().any(char::is_control), "{answer:?}");
            let head = &input[..input.len() - rest.len()];
            assert!(head.ends_with(b"\n\r\n") || head.ends_with(b"\n\n"));
        }
        Some(Err(AnswerError::NotHttp(line))) => assert!(!line.chars().any(char::is_control), "{line:?}"),
        Some(Err(AnswerError::Closed | AnswerError::TooLong)) => {}
        outcome => panic!("a slice neither fails nor waits: {outcome:?}"),
    }
}
