//! The body of a fuzz target: a request to a member's API.

use super::*;

/// Reads the first line of `input` as a URI and the others as header fields. What goes to the member is the user's
/// own request: one user, no credential of the hub's, no cluster but the one that was named.
pub fn api_request(input: &[u8]) {
    let mut lines = input.split(|byte| *byte == b'\n');
    let line = lines.next().unwrap_or_default();
    if let Ok(uri) = Uri::try_from(line)
        && let Some((name, path)) = split_path(&uri)
    {
        assert!(path.path().starts_with('/'), "{path}");
        if let Ok(cluster) = parse_cluster(&name) {
            let uri = gateway_uri(&cluster, Some(path.clone()));
            assert_eq!(uri.host(), Some(cluster.as_str()));
            assert_eq!(uri.path_and_query(), Some(&path));
        }
    }
    let mut headers = HeaderMap::new();
    for line in lines.take(64) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&line[..colon]), value) {
            headers.append(name, value);
        }
    }
    if impersonation_header(&headers).is_some() {
        return;
    }
    let upgrade = upgrade_protocol(&headers);
    let user = User { name: "alice".to_owned(), groups: vec!["dev".to_owned()], ..User::default() };
    assert!(prepare_headers(&mut headers, upgrade.as_ref(), &user).is_ok());
    let all = |name: &str| headers.get_all(name).iter().map(HeaderValue::as_bytes).collect::<Vec<_>>();
    assert_eq!(all("impersonate-user"), [b"alice"]);
    assert_eq!(all("impersonate-group"), [b"dev"]);
    for name in ["authorization", "cookie", "host", "transfer-encoding", "cellway-cluster", "x-remote-user"] {
        assert!(all(name).is_empty(), "{name}");
    }
    assert_eq!(all("connection").len(), usize::from(upgrade.is_some()));
}
