//! The body of a fuzz target: the headers of a request to the API gateway.

use super::*;

/// Reads the lines of `input` as header fields. A request that the rules let through reaches the kube-apiserver in the
/// name of exactly one user who is no master, and without a credential of the sender's.
pub fn gateway_request(input: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in input.split(|byte| *byte == b'\n').take(64) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&line[..colon]), value) {
            headers.append(name, value);
        }
    }
    if check_request(&Method::GET, &headers, false).is_err() {
        return;
    }
    demote(&mut headers);
    let asked = upgrade_of(&headers);
    strip(&mut headers);
    if let Some(protocol) = &asked {
        set_upgrade(&mut headers, protocol.clone());
    }
    let users: Vec<_> = headers.get_all(IMPERSONATE_USER).iter().collect();
    assert!(users.len() == 1 && !users[0].is_empty(), "{users:?}");
    assert!(!headers.get_all(IMPERSONATE_GROUP).iter().any(|group| group == MASTERS));
    assert!(!headers.contains_key(header::AUTHORIZATION));
    assert!(!headers.keys().any(|name| name.as_str().starts_with(FRONT_PROXY_PREFIX)));
    assert_eq!(headers.contains_key(header::CONNECTION), asked.is_some());
}
