//! Conversion of custom resources by a webhook (`strategy: Webhook`): ConversionReview over HTTPS.
//!
//! Objects are stored in one version and converted where they enter and leave: what comes out of the cache or the store's
//! log is converted, many at once, before anything looks at it, and remembered; so reads, lists and watches in any version
//! ask once for each change of an object. Words of failures are those of `apiextensions-apiserver`
//! (`pkg/apiserver/conversion/webhook_converter.go`).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use federation_store::{KeyValue, Revision};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::forms::Forms;
use crate::registry::cache::{Change, Entry, Objects};
use crate::registry::meta;
use crate::registry::resource::{Resource, split_api_version};
use crate::status::ApiError;
use crate::value::{self, at, set, str_at};
use crate::webhook::{self, CallError, Client, Endpoint};

/// Objects in one review, by number and by weight.
const BATCH: usize = 500;
const BATCH_WEIGHT: usize = 4 << 20;
/// Converted objects that are remembered for one definition.
const MAX_REMEMBERED: usize = 16 << 20;
/// Conversions of one definition that are under way at once: those who want the same objects wait for one answer.
const TURNS: usize = 8;
/// API group of reviews.
const GROUP: &str = "apiextensions.k8s.io";

/// Versions of ConversionReview that are spoken.
pub(crate) const REVIEWS: [&str; 2] = ["v1", "v1beta1"];

/// The webhook that converts the objects of one definition.
#[derive(Debug)]
pub(crate) struct Webhook {
    client: Arc<Client>,
    forms: Arc<Forms>,
    endpoint: Endpoint,
    review: &'static str,
    remembered: Mutex<Remembered>,
    turns: [tokio::sync::Mutex<()>; TURNS],
}

/// Key of an object, revision of its last write, version.
type Place = (Bytes, Revision, String);

#[derive(Debug, Default)]
struct Remembered {
    entries: HashMap<Place, Arc<Entry>>,
    /// Oldest first.
    order: VecDeque<Place>,
    weight: usize,
}

// === impl Remembered ===

impl Remembered {
    fn put(&mut self, place: Place, entry: Arc<Entry>) {
        let weight = entry.weight();
        if weight > MAX_REMEMBERED / 4 || self.entries.insert(place.clone(), entry).is_some() {
            return;
        }
        self.weight += weight;
        self.order.push_back(place);
        while self.weight > MAX_REMEMBERED {
            let Some(oldest) = self.order.pop_front() else { break };
            if let Some(gone) = self.entries.remove(&oldest) {
                self.weight -= gone.weight();
            }
        }
    }
}

// === impl Webhook ===

impl Webhook {
    /// The webhook of a CRD; `None` when its versions differ by name only.
    pub(crate) fn of(crd: &Value, forms: &Arc<Forms>, client: &Arc<Client>) -> Option<Arc<Self>> {
        let conversion = at(crd, &["spec", "conversion"])?;
        if str_at(conversion, &["strategy"]) != "Webhook" {
            return None;
        }
        let known = at(conversion, &["webhook", "conversionReviewVersions"]).and_then(Value::as_array);
        let review = known.into_iter().flatten().find_map(|v| REVIEWS.into_iter().find(|known| v == known));
        let config = at(conversion, &["webhook", "clientConfig"]).unwrap_or(&Value::Null);
        Some(Arc::new(Self {
            client: client.clone(),
            forms: forms.clone(),
            endpoint: Endpoint::of(config),
            // Validation asks for a version that is known.
            review: review.unwrap_or("v1"),
            remembered: Mutex::default(),
            turns: Default::default(),
        }))
    }

    /// Entries in the version of `resource`, in their order.
    pub(crate) async fn entries(
        &self,
        objects: &Objects,
        resource: &Resource,
        mut entries: Vec<Arc<Entry>>,
    ) -> Result<Vec<Arc<Entry>>, ApiError> {
        let to = resource.api_version();
        let mut missing = self.recall(&mut entries, &to, None);
        let Some(first) = missing.first() else { return Ok(entries) };
        let turn = &self.turns[turn_of(&entries[*first].kv.key)];
        let _turn = turn.lock().await;
        // Somebody may have asked meanwhile.
        missing = self.recall(&mut entries, &to, Some(missing));
        let mut rest = missing.as_slice();
        while !rest.is_empty() {
            let mut weight = 0;
            let count = rest.iter().take(BATCH).take_while(|i| {
                let fits = weight == 0 || weight + entries[**i].kv.value.len() <= BATCH_WEIGHT;
                weight += entries[**i].kv.value.len();
                fits
            });
            let (batch, after) = rest.split_at(count.count());
            rest = after;
            let stored: Result<Vec<Value>, _> =
                batch.iter().map(|i| serde_json::from_slice(&entries[*i].kv.value)).collect();
            let mut stored = stored.map_err(ApiError::internal)?;
            stored.iter_mut().for_each(|object| self.forms.settle(object));
            let converted = self.convert(objects, stored, &to).await?;
            for (i, object) in batch.iter().zip(converted) {
                let kv = &entries[*i].kv;
                let value = serde_json::to_vec(&object).map_err(ApiError::internal)?;
                let entry = Arc::new(Entry::converted(KeyValue { value: value.into(), ..kv.clone() }));
                let place = (kv.key.clone(), kv.mod_revision, to.clone());
                self.remembered.lock().put(place, entry.clone());
                entries[*i] = entry;
            }
        }
        Ok(entries)
    }

    /// Puts in what is remembered; gives back the places of what has to be converted.
    fn recall(&self, entries: &mut [Arc<Entry>], to: &str, among: Option<Vec<usize>>) -> Vec<usize> {
        let among = among.unwrap_or_else(|| (0..entries.len()).collect());
        let remembered = self.remembered.lock();
        among
            .into_iter()
            .filter(|i| {
                let entry = &mut entries[*i];
                if !entry.is_readable() || entry.api_version().as_deref() == Some(to) {
                    return false;
                }
                let place = (entry.kv.key.clone(), entry.kv.mod_revision, to.to_owned());
                match remembered.entries.get(&place) {
                    Some(known) => {
                        *entry = known.clone();
                        false
                    }
                    None => true,
                }
            })
            .collect()
    }

    /// A change with its objects in the version of `resource`.
    pub(crate) async fn change(
        &self,
        objects: &Objects,
        resource: &Resource,
        change: &Arc<Change>,
    ) -> Result<Arc<Change>, ApiError> {
        let sides: Vec<Arc<Entry>> = change.old.iter().chain(&change.new).cloned().collect();
        let mut converted = self.entries(objects, resource, sides).await?.into_iter();
        let old = change.old.as_ref().and_then(|_| converted.next());
        let new = change.new.as_ref().and_then(|_| converted.next());
        Ok(Arc::new(Change::new(change.revision, old, new)))
    }

    /// Converts objects of one kind to a version; those that are in it already are left alone.
    pub(crate) async fn convert(
        &self,
        cache: &Objects,
        mut objects: Vec<Value>,
        to: &str,
    ) -> Result<Vec<Value>, ApiError> {
        let different: Vec<usize> =
            (0..objects.len()).filter(|i| str_at(&objects[*i], &["apiVersion"]) != to).collect();
        let Some(first) = different.first() else { return Ok(objects) };
        let (group, version) = split_api_version(str_at(&objects[*first], &["apiVersion"]));
        let kind = format!("{group}/{version}, Kind={}", str_at(&objects[*first], &["kind"]));
        let failed = |why: String| ApiError::untold(format!("conversion webhook for {kind} {why}"));
        let uid = uuid::Uuid::new_v4().to_string();
        let sent: Vec<&Value> = different.iter().map(|i| &objects[*i]).collect();
        let review = json!({"kind": "ConversionReview", "apiVersion": format!("{GROUP}/{}", self.review),
            "request": {"uid": uid, "desiredAPIVersion": to, "objects": sent}});
        let timeout = self.client.conversion_timeout;
        let answer =
            webhook::call(&self.client, cache, &self.endpoint, &review, timeout, webhook::Bound::OBJECTS)
                .await;
        let answer = answer.map_err(|why: CallError| failed(format!("failed: {why}")))?;
        adopt(&answer, (self.review, uid.as_str()), &mut objects, &different, to).map_err(failed)?;
        for place in different {
            self.forms.prune(&mut objects[place]);
        }
        Ok(objects)
    }
}

/// Puts what a webhook answered in the places of the objects that it was sent. The error says what the webhook did.
pub(crate) fn adopt(
    answer: &Value,
    (review, uid): (&str, &str),
    objects: &mut [Value],
    places: &[usize],
    to: &str,
) -> Result<(), String> {
    let converted = read(answer, review, uid).map_err(|why| format!("failed: {why}"))?;
    if converted.len() != places.len() {
        return Err(format!("returned {} objects, expected {}", converted.len(), places.len()));
    }
    for (i, (place, new)) in places.iter().zip(converted).enumerate() {
        let original = &objects[*place];
        check(original, &new, to, i).map_err(|why| format!("returned invalid {why}"))?;
        let new = restore(original, new).map_err(|why| format!("returned invalid metadata: {why}"))?;
        objects[*place] = new;
    }
    Ok(())
}

/// The objects in an answer.
fn read(answer: &Value, review: &str, uid: &str) -> Result<Vec<Value>, String> {
    let (api_version, kind) = (str_at(answer, &["apiVersion"]), str_at(answer, &["kind"]));
    let wanted = format!("{GROUP}/{review}");
    let (group, version) = split_api_version(api_version);
    let other = if review == "v1" { "v1beta1" } else { "v1" };
    if kind == "ConversionReview" && api_version == format!("{GROUP}/{other}") {
        return Err(format!(
            "converting ({other}.ConversionReview) to ({review}.ConversionReview): unknown conversion"
        ));
    }
    let response = answer.get("response").filter(|r| r.is_object()).ok_or("no response provided")?;
    if review == "v1" {
        if api_version != wanted || kind != "ConversionReview" {
            return Err(format!(
                "expected webhook response of {wanted}, Kind=ConversionReview, got {group}/{version}, Kind={kind}"
            ));
        }
        let found = str_at(response, &["uid"]);
        if found != uid {
            return Err(format!("expected response.uid={uid:?}, got {found:?}"));
        }
    }
    let status = str_at(response, &["result", "status"]);
    if status != "Success" {
        let message = str_at(response, &["result", "message"]);
        return Err(if message.is_empty() {
            format!("response.result.status was '{status}', not 'Success'")
        } else {
            message.to_owned()
        });
    }
    Ok(response.get("convertedObjects").and_then(Value::as_array).cloned().unwrap_or_default())
}

fn turn_of(key: &[u8]) -> usize {
    // Any spread will do.
    key.iter().fold(0_usize, |sum, b| sum.wrapping_mul(31).wrapping_add(usize::from(*b))) % TURNS
}

/// Is it the same object, in the version that was asked for?
fn check(original: &Value, new: &Value, to: &str, index: usize) -> Result<(), String> {
    let version = str_at(new, &["apiVersion"]);
    if version != to {
        return Err(format!(
            "object at index {index}: invalid groupVersion (expected {to}, received {version})"
        ));
    }
    let (wanted, kind) = (str_at(original, &["kind"]), str_at(new, &["kind"]));
    if wanted != kind {
        return Err(format!("object at index {index}: invalid kind (expected {wanted}, received {kind})"));
    }
    for (path, what) in [
        (&["metadata", "name"][..], "name"),
        (&["metadata", "namespace"], "namespace"),
        (&["metadata", "uid"], "UID"),
    ] {
        let (expected, found) = (str_at(original, path), str_at(new, path));
        if expected != found {
            return Err(format!("object: must have the same {what}: {expected} != {found}"));
        }
    }
    Ok(())
}

/// Puts the original metadata in its place: only labels and annotations may change.
fn restore(original: &Value, mut new: Value) -> Result<Value, String> {
    let Some(converted) = new.get("metadata") else {
        return Err("missing metadata in converted object".into());
    };
    let mut metadata = original.get("metadata").cloned().unwrap_or_else(|| json!({}));
    for field in ["labels", "annotations"] {
        match converted.get(field).filter(|v| !v.is_null()) {
            None => {
                value::remove(&mut metadata, &[field]);
            }
            Some(Value::Object(map)) => {
                if let Some((key, odd)) = map.iter().find(|(_, v)| !v.is_string()) {
                    let kind = go_type(odd);
                    return Err(format!(
                        "metadata.{field}[{key}] must be a string, but is {kind} in converted object"
                    ));
                }
                set(&mut metadata, &[field], Value::Object(map.clone()));
            }
            Some(odd) => {
                return Err(format!("invalid metadata.{field} of type {} in converted object", go_type(odd)));
            }
        }
    }
    let wrong = meta::label_errors(metadata.get("labels"), "metadata.labels");
    if let Some(first) = wrong.first() {
        return Err(first.to_string());
    }
    set(&mut new, &["metadata"], metadata);
    Ok(new)
}

/// How Go calls the type of a JSON value.
fn go_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "<nil>",
        Value::Bool(_) => "bool",
        Value::Number(n) if n.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(version: &str) -> Value {
        json!({"apiVersion": version, "kind": "X", "metadata": {"name": "n", "uid": "u", "generation": 3}})
    }

    #[test]
    fn what_a_webhook_may_change() {
        let original = object("g.io/v1");
        let mut new = object("g.io/v2");
        new["spec"] = json!({"a": 1});
        new["metadata"]["generation"] = json!(99);
        new["metadata"]["labels"] = json!({"k": "v"});
        assert_eq!(check(&original, &new, "g.io/v2", 0), Ok(()));
        let restored = restore(&original, new.clone()).expect("acceptable");
        assert_eq!(restored["metadata"]["generation"], 3);
        assert_eq!(restored["metadata"]["labels"]["k"], "v");
        for (path, value) in [
            (&["metadata", "name"][..], json!("other")),
            (&["metadata", "uid"], json!("other")),
            (&["kind"], json!("Y")),
            (&["apiVersion"], json!("g.io/v3")),
        ] {
            let mut bad = new.clone();
            set(&mut bad, path, value);
            assert!(check(&original, &bad, "g.io/v2", 0).is_err(), "{path:?}");
        }
        set(&mut new, &["metadata", "labels"], json!({"k": 1}));
        let wanted = "metadata.labels[k] must be a string, but is int64 in converted object";
        assert_eq!(restore(&original, new).err().as_deref(), Some(wanted));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut remembered = Remembered::default();
        for i in 0..100_u64 {
            let key = Bytes::from(format!("/registry/g.io/xs/{i}"));
            let value = Bytes::from(vec![b' '; 1 << 20]);
            let kv = KeyValue {
                key: key.clone(),
                value,
                create_revision: Revision(i),
                mod_revision: Revision(i),
                version: 1,
                lease: 0,
            };
            remembered.put((key, Revision(i), "g.io/v1".into()), Arc::new(Entry::new(kv)));
        }
        assert!(remembered.weight <= MAX_REMEMBERED, "{}", remembered.weight);
        assert_eq!(remembered.entries.len(), remembered.order.len());
    }
}
