//! Bodies of fuzz targets for where a request goes: each asserts what must hold for any input.

use tunnel::Target;

use crate::connect::head;
use crate::route::Route;

/// Reads `input` as the head of a CONNECT request, whole and in pieces, and looks for where it leads.
pub fn connect_head(input: &[u8]) {
    let Ok(Some((parsed, used))) = head::parse(input, &mut 0) else { return };
    assert!(used <= input.len() && used <= head::MAX_HEAD);
    assert!(input[..used].ends_with(b"\r\n\r\n"));
    let mut scanned = 0;
    for end in (0..used).step_by(7) {
        assert_eq!(
            head::parse(&input[..end], &mut scanned),
            Ok(None),
            "a part of a good head is no head yet"
        );
    }
    assert_eq!(head::parse(input, &mut scanned), Ok(Some((parsed.clone(), used))));
    check(Route::resolve(&parsed.target, parsed.cluster.as_deref(), parsed.proxy_user.as_deref()));
}

/// Reads the lines of `input` as authority, cluster header and proxy user.
pub fn route(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut lines = text.split('\n');
    check(Route::resolve(lines.next().unwrap_or_default(), lines.next(), lines.next()));
}

fn check(route: Result<Route, crate::error::ProxyError>) {
    match route {
        Ok(route) => assert_eq!(route.target.to_string().parse::<Target>(), Ok(route.target)),
        Err(error) => assert!(error.to_string().len() < 8 * head::MAX_HEAD),
    }
}
