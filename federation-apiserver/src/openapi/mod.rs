//! OpenAPI documents: v3 per group and version, v2 for all in one. Built from the catalog when first asked for, and
//! kept until the catalog changes.

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
            "v2" => documents.v2.clone(),
            _ => {
                let key = path.strip_prefix("v3/").ok_or_else(ApiError::no_such_path)?;
                documents.v3.get(key).cloned().ok_or_else(ApiError::no_such_path)?
            }
        };
        if !accepts_json(headers) {
            return Err(ApiError::not_acceptable());
        }
        let quoted = format!("\"{tag}\"");
        let known = headers.get(IF_NONE_MATCH).and_then(|v| v.to_str().ok()) == Some(&quoted);
        let mut answer = if known && !tag.is_empty() {
            response::with_type(StatusCode::NOT_MODIFIED, Body::empty(), "application/json")
        } else {
            response::with_type(StatusCode::OK, body, "application/json")
        };
        if let (false, Ok(value)) = (tag.is_empty(), HeaderValue::try_from(quoted)) {
            answer.headers_mut().insert(ETAG, value);
        }
        Ok(answer)
    }
}

/// Protobuf documents are not served; whoever takes nothing else is told so.
fn accepts_json(headers: &HeaderMap) -> bool {
    let mut any = false;
    for value in headers.get_all(ACCEPT) {
        for clause in value.to_str().unwrap_or_default().split(',') {
            any = true;
            let media = clause.split(';').next().unwrap_or_default().trim();
            if matches!(media, "application/json" | "*/*" | "application/*") {
                return true;
            }
        }
    }
    !any
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
        let v2 = packed(&v2::document(all.values()));
        let v3: BTreeMap<String, (Bytes, String)> = all.iter().map(|(k, d)| (k.clone(), packed(d))).collect();
        let paths: serde_json::Map<String, Value> = v3
            .iter()
            .map(|(k, (_, hash))| {
                (k.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{k}?hash={hash}")}))
            })
            .collect();
        Self { root: Bytes::from(json!({ "paths": paths }).to_string()), v3, v2 }
    }
}

fn packed(document: &Value) -> (Bytes, String) {
    let text = document.to_string();
    let hash = hex::encode_upper(Sha256::digest(text.as_bytes()));
    (Bytes::from(text), hash)
}
