//! OpenAPI documents: v3 per group and version, v2 for all in one. Built from the catalog when first asked for, and
//! kept until the catalog changes.

mod proto;
mod v2;
mod v3;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use http::header::{ACCEPT, ETAG, HeaderValue, IF_NONE_MATCH};
use http::{HeaderMap, Response, StatusCode};
use parking_lot::Mutex;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::http::response;
use crate::registry::resource::Catalog;
use crate::status::ApiError;

/// The documents of the newest catalog that was asked for.
#[derive(Default)]
pub(crate) struct Cache(Mutex<Option<(Arc<Catalog>, Arc<Documents>)>>);

/// All documents of one catalog.
struct Documents {
    /// By path below `/openapi/v3/`: `api/v1`, `apis/apps/v1`.
    v3: BTreeMap<String, (Bytes, String)>,
    root: Bytes,
    v2: (Bytes, String),
    /// The same as protobuf.
    v2_proto: (Bytes, String),
}

// === impl Cache ===

impl Cache {
    fn documents(&self, catalog: &Arc<Catalog>) -> Arc<Documents> {
        if let Some((known, documents)) = self.0.lock().as_ref()
            && Arc::ptr_eq(known, catalog)
        {
            return documents.clone();
        }
        // Two requests may both build them; the result is the same.
        let documents = Arc::new(Documents::build(catalog));
        *self.0.lock() = Some((catalog.clone(), documents.clone()));
        documents
    }

    /// Answers a path below `/openapi/`.
    pub(crate) fn answer(
        &self,
        catalog: &Arc<Catalog>,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Response<Body>, ApiError> {
        let documents = self.documents(catalog);
        let (body, tag) = match path {
            "v3" => (documents.root.clone(), String::new()),
            "v2" if wants_protobuf(headers) => documents.v2_proto.clone(),
            "v2" => documents.v2.clone(),
            _ => {
                let key = path.strip_prefix("v3/").ok_or_else(ApiError::no_such_page)?;
                documents.v3.get(key).cloned().ok_or_else(ApiError::no_such_page)?
            }
        };
        let media = if path == "v2" && wants_protobuf(headers) {
            proto::MEDIA_TYPE
        } else if accepts_json(headers) {
            "application/json"
        } else {
            return Err(ApiError::not_acceptable());
        };
        let quoted = format!("\"{tag}\"");
        let known = headers.get(IF_NONE_MATCH).and_then(|v| v.to_str().ok()) == Some(&quoted);
        let mut answer = if known && !tag.is_empty() {
            response::with_type(StatusCode::NOT_MODIFIED, Body::empty(), media)
        } else {
            response::with_type(StatusCode::OK, body, media)
        };
        if let (false, Ok(value)) = (tag.is_empty(), HeaderValue::try_from(quoted)) {
            answer.headers_mut().insert(ETAG, value);
        }
        Ok(answer)
    }
}

/// Does the first clause that can be served ask for protobuf?
fn wants_protobuf(headers: &HeaderMap) -> bool {
    let served = |clause: &&str| is_protobuf(clause) || is_json(clause);
    clauses(headers).find(served).is_some_and(is_protobuf)
}

fn accepts_json(headers: &HeaderMap) -> bool {
    clauses(headers).next().is_none() || clauses(headers).any(is_json)
}

fn is_protobuf(clause: &str) -> bool {
    clause == proto::MEDIA_TYPE || clause == proto::ASKED_TYPE
}

fn is_json(clause: &str) -> bool {
    matches!(clause, "application/json" | "*/*" | "application/*")
}

/// Media types of the `Accept` header, without their parameters.
fn clauses(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let texts = headers.get_all(ACCEPT).into_iter().map(|v| v.to_str().unwrap_or_default());
    texts.flat_map(|t| t.split(',')).map(|c| c.split(';').next().unwrap_or_default().trim())
}

// === impl Documents ===

impl Documents {
    fn build(catalog: &Catalog) -> Self {
        let mut groups: Vec<(String, String)> =
            catalog.iter().map(|r| (r.group.clone(), r.version.clone())).collect();
        groups.sort();
        groups.dedup();
        let mut all = BTreeMap::new();
        for (group, version) in groups {
            let key =
                if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") };
            let document = v3::document(catalog, &group, &version);
            all.insert(key, document);
        }
        let v2 = v2::document(all.values());
        let v2_proto = tagged(proto::encode(&v2));
        let v2 = packed(&v2);
        let v3: BTreeMap<String, (Bytes, String)> = all.iter().map(|(k, d)| (k.clone(), packed(d))).collect();
        let paths: serde_json::Map<String, Value> = v3
            .iter()
            .map(|(k, (_, hash))| {
                (k.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{k}?hash={hash}")}))
            })
            .collect();
        Self { root: Bytes::from(json!({ "paths": paths }).to_string()), v3, v2, v2_proto }
    }
}

fn packed(document: &Value) -> (Bytes, String) {
    tagged(document.to_string().into_bytes())
}

/// Bytes with the tag that names them.
fn tagged(bytes: Vec<u8>) -> (Bytes, String) {
    let hash = hex::encode_upper(Sha256::digest(&bytes));
    (Bytes::from(bytes), hash)
}
