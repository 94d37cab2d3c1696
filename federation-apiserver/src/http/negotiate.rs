//! The `Accept` header: which form an answer takes.

use http::HeaderMap;
use http::header::ACCEPT;

use crate::status::ApiError;

/// Clauses of one header that are looked at.
const MAX_CLAUSES: usize = 32;

/// The encoding of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Encoding {
    #[default]
    Json,
    Yaml,
}

/// What is encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Objects and lists as they are.
    #[default]
    Plain,
    /// `as=Table;g=meta.k8s.io;v=v1`.
    Table,
    /// `as=PartialObjectMetadata(List)`.
    Metadata,
    /// `as=APIGroupDiscoveryList;g=apidiscovery.k8s.io` with this version.
    AggregatedV2,
    AggregatedV2Beta1,
}

/// Encoding and shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Accept {
    pub encoding: Encoding,
    pub shape: Shape,
}

/// The first clause that can be served, in the client's order; quality values are ignored as in kube-apiserver.
pub(crate) fn accept(headers: &HeaderMap) -> Result<Accept, ApiError> {
    let mut any = false;
    for value in headers.get_all(ACCEPT) {
        let Ok(text) = value.to_str() else { continue };
        for clause in text.split(',').take(MAX_CLAUSES) {
            any = true;
            if let Some(accept) = parse_clause(clause) {
                return Ok(accept);
            }
        }
    }
    if any { Err(ApiError::not_acceptable()) } else { Ok(Accept::default()) }
}

/// Parses one clause, `None` when it is not served.
pub(crate) fn parse_clause(clause: &str) -> Option<Accept> {
    let mut parts = clause.split(';').map(str::trim);
    let encoding = match parts.next()?.to_ascii_lowercase().as_str() {
        "application/json" | "*/*" | "application/*" | "text/json" => Encoding::Json,
        "application/yaml" | "application/x-yaml" | "text/yaml" => Encoding::Yaml,
        _ => return None,
    };
    let (mut kind, mut group, mut version) = ("", "", "");
    for part in parts {
        match part.split_once('=') {
            Some(("as", v)) => kind = v,
            Some(("g", v)) => group = v,
            Some(("v", v)) => version = v,
            _ => {}
        }
    }
    let shape = match (kind, group, version) {
        ("", ..) => Shape::Plain,
        ("Table", "meta.k8s.io", "v1") => Shape::Table,
        ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", "v1") => Shape::Metadata,
        ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2") => Shape::AggregatedV2,
        ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2beta1") => Shape::AggregatedV2Beta1,
        _ => return None,
    };
    Some(Accept { encoding, shape })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Accept, ApiError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, text.parse().expect("header"));
        accept(&headers)
    }

    #[test]
    fn what_kubectl_sends() {
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(parse(table).expect("served").shape, Shape::Table);
        let proto = "application/vnd.kubernetes.protobuf,application/json";
        assert_eq!(parse(proto).expect("served"), Accept::default());
        assert_eq!(parse("application/vnd.kubernetes.protobuf").expect_err("not served").code(), 406);
        assert_eq!(parse("application/yaml").expect("served").encoding, Encoding::Yaml);
        let discovery =
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        assert_eq!(parse(discovery).expect("served").shape, Shape::AggregatedV2);
        assert_eq!(accept(&HeaderMap::new()).expect("default"), Accept::default());
    }
}
