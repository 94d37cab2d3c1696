//! Bodies of fuzz targets for what clients of the API send, and for what webhooks, key plug-ins and an OpenID Connect issuer
//! answer: each asserts what must hold for any input.
//!
//! A target that needs two documents takes the first line of its input as one and the rest as the other.

use std::sync::LazyLock;

use futures::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue};
use proto::kms::v2::{DecryptResponse, EncryptResponse, StatusResponse};
use serde_json::{Value, json};

use crate::admission::review;
use crate::apply::{self, FieldSet, OneVersion, Writer};
use crate::auth::oidc::{self, OidcConfig};
use crate::auth::tokens::TokenFile;
use crate::auth::{Authenticator, UserInfo, impersonation};
use crate::config::Role;
use crate::crd::conversion;
use crate::encryption::{grpc, kms};
use crate::http::{body, negotiate, path};
use crate::rbac::Index;
use crate::registry::resource::Resource;
use crate::registry::selectors::{FieldSelector, LabelSelector};
use crate::registry::{builtin, cache, meta, read, strategy, to_stored};
use crate::schema::{defaults, validate};
use crate::value::{equal, str_at};
use crate::webhook::{Bound, client};
use crate::{crd, gc, patch, table};

/// The kinds of a member, which are those of a hub and workloads.
static KINDS: LazyLock<Vec<Resource>> = LazyLock::new(|| builtin::resources(Role::Member));

const WRITER: Writer<'static> =
    Writer { manager: "fuzz", api_version: "v1", subresource: "", time: "2026-01-01T00:00:00Z", reset: &[] };

fn two(input: &[u8]) -> (&[u8], &[u8]) {
    let end = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    (&input[..end], input.get(end + 1..).unwrap_or_default())
}

fn json_of(bytes: &[u8]) -> Option<Value> {
    body::decode_json(bytes).ok().map(|decoded| decoded.value)
}

/// The built-in kind that an object names; without one, a config map.
fn kind_of(object: &Value) -> &'static Resource {
    let kind = str_at(object, &["kind"]);
    let named = KINDS.iter().find(|resource| resource.kind == kind);
    // `resources` always serves config maps, so the first is never needed.
    named.or_else(|| KINDS.iter().find(|resource| resource.kind == "ConfigMap")).unwrap_or(&KINDS[0])
}

/// Whatever is stored can be read again: an object that cannot be would take its whole collection with it.
fn stores(resource: &Resource, object: &Value) {
    if let Ok(bytes) = to_stored(resource, object) {
        let read: Result<Value, _> = serde_json::from_slice(&bytes);
        assert!(read.is_ok(), "stored and never read again: {:?}", read.err());
    }
}

/// Reads the first line of `input` as a path and the second as a query: no part of a resource's path can be mistaken
/// for another path.
pub fn url(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (own, query) = text.split_once('\n').unwrap_or((text, ""));
    if let Ok(path::Path::Resource(resource)) = path::parse(own) {
        assert!(!resource.plural.is_empty() && !resource.version.is_empty());
        let parts = [
            &resource.group,
            &resource.version,
            &resource.namespace,
            &resource.plural,
            &resource.name,
            &resource.subresource,
        ];
        for part in parts {
            assert!(!part.contains(['/', '\0']) && part != "." && part != "..", "{part:?}");
        }
    }
    if let Ok(query) = path::Query::parse(query) {
        let _ = (query.flag("watch"), query.number("limit"), query.all("fieldSelector"));
    }
}

/// Reads `input` as a key of the store, and its first line as a path: the key of an object says where it belongs, whatever the
/// object and its namespace are called.
pub fn storage_key(input: &[u8]) {
    if let Some((group, plural, _, name)) = gc::split_key(input) {
        let prefix = format!("/registry/{group}/{plural}/");
        assert_eq!(cache::kind_prefix(input), Some(prefix.as_bytes()));
        assert!(!name.contains('/'), "{name:?}");
    }
    let (own, _) = two(input);
    let own = std::str::from_utf8(own).ok().and_then(|own| path::parse(own).ok());
    let Some(path::Path::Resource(own)) =
        own.filter(|own| matches!(own, path::Path::Resource(own) if !own.name.is_empty()))
    else {
        return;
    };
    let resource = Resource {
        group: own.group.clone(),
        plural: own.plural.clone(),
        namespaced: !own.namespace.is_empty(),
        ..kind_of(&Value::Null).clone()
    };
    let key = resource.key(&own.namespace, &own.name);
    assert!(key.starts_with(&resource.prefix(&own.namespace)), "{key}");
    assert_eq!(cache::kind_prefix(key.as_bytes()), Some(resource.prefix("").as_bytes()), "{key}");
    let (group, plural, namespace, name) = gc::split_key(key.as_bytes()).expect("a key of ours");
    assert_eq!((&plural, &namespace, &name), (&own.plural, &own.namespace, &own.name), "{key}");
    assert!(group == own.group || group == "core", "{key}");
}

/// Reads the lines of `input` as header fields: nobody becomes a user without the token, or somebody else without
/// the right to.
pub fn headers(input: &[u8]) {
    static TOKENS: LazyLock<Option<TokenFile>> =
        LazyLock::new(|| TokenFile::parse("a-long-secret-token,alice,1,\"dev,ops\"\n").ok());

    let mut headers = HeaderMap::new();
    for line in input.split(|byte| *byte == b'\n').take(64) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&line[..colon]), value) {
            headers.append(name, value);
        }
    }
    let _ = negotiate::accept(&headers);
    let _ = body::media_type(&headers);
    let tokens = TOKENS.as_ref().expect("the token file above is one");
    let authenticator = Authenticator::new(tokens.clone(), true);
    let Ok((user, _)) = futures::executor::block_on(authenticator.authenticate(None, &headers)) else {
        return;
    };
    let secret = input.windows(19).any(|window| window == b"a-long-secret-token");
    assert!(user.is_anonymous() || secret, "{}", user.name);
    let rules = Index::default();
    if let Ok(seen) = impersonation::impersonate(&user, &headers, &rules) {
        assert_eq!(seen, None, "alice may impersonate nobody");
    }
    if let Ok(Some(seen)) = impersonation::impersonate(&UserInfo::system(), &headers, &rules) {
        assert!(!seen.name.is_empty());
    }
}

/// Reads `input` as a label selector and as a field selector.
pub fn selectors(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(selector) = LabelSelector::parse(text) {
        assert!(selector.matches(Some(&json!({}))) == selector.matches(None), "no labels are no labels");
        let _ = selector.matches(Some(&json!({"app": "web", "tier": "5"})));
    }
    if let Ok(selector) = FieldSelector::parse(text) {
        let object =
            json!({"kind": "Pod", "metadata": {"name": "a", "namespace": "b"}, "spec": {"nodeName": "n"}});
        let _ = selector.matches(&object);
        if let Some(pods) = KINDS.iter().find(|resource| resource.plural == "pods") {
            let _ = selector.check(pods);
        }
    }
}

/// Reads `input` as a continue token.
pub fn continue_token(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok((_, start)) = read::decode_token(text) {
        assert!(!start.is_empty());
    }
}

/// Reads `input` as a JSON body: the same value that any JSON reader finds.
pub fn json(input: &[u8]) {
    if let Ok(decoded) = body::decode_json(input) {
        let plain: Result<Value, _> = serde_json::from_slice(input);
        assert_eq!(plain.ok(), Some(decoded.value));
    }
}

/// Reads `input` as a YAML body: aliases do not make a large value of a small text.
pub fn yaml(input: &[u8]) {
    if let Ok(decoded) = body::decode_yaml(input) {
        let size = serde_json::to_vec(&decoded.value).map_or(0, |bytes| bytes.len());
        // One byte can become six in JSON (\u0001), and punctuation comes to each value.
        assert!(size <= 64 * (input.len() + 64), "{size} bytes out of {}", input.len());
    }
}

/// Reads `input` as a protobuf body.
pub fn protobuf(input: &[u8]) {
    if let Ok(decoded) = body::decode("application/vnd.kubernetes.protobuf", input)
        && decoded.value.is_object()
    {
        stores(kind_of(&decoded.value), &decoded.value);
    }
}

/// Applies the second document as a JSON patch to the first.
pub fn json_patch(input: &[u8]) {
    let (object, changes) = two(input);
    let (Some(object), Some(changes)) = (json_of(object), json_of(changes)) else { return };
    if let Ok(patched) = patch::json_patch(&object, &changes)
        && patched.is_object()
    {
        stores(kind_of(&object), &patched);
    }
}

/// Applies the second document to the first as a merge patch, and as a strategic merge patch: a merge patch leaves no
/// null of its own and changes nothing the second time.
pub fn merge_patch(input: &[u8]) {
    let (object, changes) = two(input);
    let (Some(object), Some(changes)) = (json_of(object), json_of(changes)) else { return };
    if !object.is_object() || !changes.is_object() {
        return;
    }
    let mut merged = object.clone();
    patch::merge_patch(&mut merged, &changes);
    let mut again = merged.clone();
    patch::merge_patch(&mut again, &changes);
    assert_eq!(merged, again);
    let resource = kind_of(&object);
    stores(resource, &merged);
    if let Ok(merged) = patch::strategic::strategic_merge(resource.schema.as_ref(), &object, &changes) {
        stores(resource, &merged);
    }
}

/// Applies the second document to the first, server-side: to apply it again changes nothing.
pub fn apply(input: &[u8]) {
    let (live, config) = two(input);
    let (Some(live), Some(config)) = (json_of(live), body::decode_yaml(config).ok()) else { return };
    if !live.is_object() || !config.value.is_object() {
        return;
    }
    let resource = kind_of(&live);
    let ty = resource.schema.as_ref();
    let apply = |live: &Value, force| {
        let applied = apply::apply(ty, live, &config.value, &WRITER, force, &OneVersion);
        applied.now_or_never().expect("there is nothing to wait for")
    };
    let Ok(applied) = apply(&live, true) else {
        panic!("a forced apply has no conflicts");
    };
    stores(resource, &applied);
    let again = apply(&applied, false);
    assert!(again.is_ok_and(|again| equal(&again, &applied)), "to apply the same again changes nothing");
    let _ = apply(&live, false);
}

/// Runs the second document through what an update of the first does to it.
pub fn object(input: &[u8]) {
    let (old, new) = two(input);
    let (old, Some(new)) = (json_of(old).filter(Value::is_object), json_of(new)) else { return };
    if new.is_object() {
        admit(kind_of(&new), old.as_ref(), new);
    }
}

/// What every write does to an object between decoding and storing.
fn admit(resource: &Resource, old: Option<&Value>, mut new: Value) {
    let ty = resource.schema.as_ref();
    if !resource.is_custom() {
        defaults::strip_typed_nulls(ty, &mut new);
        if !validate::validate(ty, &new, validate::Mode::Types).is_empty() {
            return;
        }
    }
    defaults::prune(ty, &mut new);
    assert!(defaults::prune(ty, &mut new).is_empty(), "what is pruned is gone");
    defaults::apply_defaults(ty, &mut new);
    strategy::default_object(resource, &mut new);
    let mut errors = meta::errors(resource, &new);
    if resource.is_custom() {
        errors.extend(validate::validate(ty, &new, validate::Mode::Full));
    } else {
        errors.extend(strategy::validate(resource, None, &new));
    }
    if !errors.is_empty() {
        return;
    }
    let set = FieldSet::of(ty, &new);
    assert_eq!(FieldSet::from_fields_v1(&set.to_fields_v1()), Some(set), "fieldsV1 says what it was made of");
    let _ = table::of_objects(resource, std::slice::from_ref(&new), "", true, None);
    let kept = apply::on_update(ty, old.unwrap_or(&Value::Null), &mut new, &WRITER, &OneVersion);
    kept.now_or_never().expect("there is nothing to wait for");
    stores(resource, &new);
}

/// Reads the first document as a CustomResourceDefinition and the second as an object of its kind.
pub fn crd(input: &[u8]) {
    let (definition, object) = two(input);
    let Some(mut definition) = json_of(definition).filter(Value::is_object) else { return };
    crd::default_crd(&mut definition);
    crd::note_storage_version(&mut definition);
    if !crd::validate_crd(&definition, None, false).is_empty() {
        return;
    }
    let object = json_of(object).filter(Value::is_object);
    for resource in crd::resources(&definition, &std::sync::Arc::default()) {
        if let Some(object) = &object {
            let mut object = object.clone();
            defaults::apply_defaults(resource.schema.as_ref(), &mut object);
            admit(&resource, None, object);
        }
    }
}

/// Reads the first line of `input` as the path of a printer column and the rest as the object it is of.
pub fn jsonpath(input: &[u8]) {
    let (path, object) = two(input);
    let (Ok(path), Some(object)) = (std::str::from_utf8(path), json_of(object)) else { return };
    let column = |kind: &str| json!({"name": kind, "type": kind, "jsonPath": path});
    let kinds = ["string", "integer", "number", "boolean", "date"];
    let definition = json!({"spec": {"versions": [{"name": "v1", "served": true, "storage": true,
        "additionalPrinterColumns": kinds.map(column)}]}});
    for resource in crd::resources(&definition, &std::sync::Arc::default()) {
        let table = table::of_objects(&resource, std::slice::from_ref(&object), "", true, None);
        let cells = table["rows"][0]["cells"].as_array().map(Vec::len);
        assert_eq!(cells, table["columnDefinitions"].as_array().map(Vec::len));
    }
}

/// Reads the first line of `input` as a token, the second as the issuer's discovery document and the rest as its keys:
/// whoever the token is of has the issuer's mark, and without keys it is nobody's.
pub fn id_token(input: &[u8]) {
    const ISSUER: &str = "https://issuer.test";
    static RULES: LazyLock<Option<oidc::Rules>> = LazyLock::new(|| {
        oidc::Rules::new(OidcConfig {
            issuer_url: ISSUER.into(),
            client_id: "hub".into(),
            groups_claim: "groups".into(),
            groups_prefix: "oidc:".into(),
            signing_algs: vec!["RS256".into(), "ES256".into()],
            ..OidcConfig::default()
        })
        .ok()
    });

    let rules = RULES.as_ref().expect("the flags above can be used");
    let (token, answers) = two(input);
    let (document, keys) = two(answers);
    let _ = oidc::keys_url(ISSUER, document);
    let Ok(token) = std::str::from_utf8(token) else { return };
    let keys = oidc::keys(keys).unwrap_or_default();
    let header = rules.header(token);
    // Nobody asks about tokens of others.
    if !rules.claims(token) {
        return;
    }
    let Ok(header) = header else { return };
    let Some(key) = oidc::find_key(&header, &keys) else { return };
    assert!(!keys.keys.is_empty());
    if let Ok(user) = rules.verify(token, &header, &key) {
        assert!(
            user.name.len() > ISSUER.len() + 1 && user.name.starts_with("https://issuer.test#"),
            "{user:?}"
        );
        assert!(user.groups.iter().all(|group| group.starts_with("oidc:")), "{user:?}");
    }
}

/// Reads the first line of `input` as the code of an admission webhook's answer and the rest as its body: it is an answer to
/// what was asked, a refusal is one to the client too, and a patch leaves an object that can be stored.
pub fn admission_answer(input: &[u8]) {
    const UID: &str = "705ab4f5-6393-11e8-b7cc-42010a800002";

    let (code, body) = two(input);
    let code = std::str::from_utf8(code).ok().and_then(|code| code.parse().ok()).unwrap_or(200);
    let answer = match client::answer(code, body, Bound::VERDICT) {
        Ok(answer) => answer,
        Err(error) => {
            assert!(error.to_string().len() <= 32 * (body.len() + 64), "an error tells the start only");
            return;
        }
    };
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "b"},
        "data": {"k": "v"}});
    for (version, mutating) in [("v1", true), ("v1", false), ("v1beta1", true), ("v1beta1", false)] {
        if review::check_version(&answer, version).is_err() {
            continue;
        }
        let Ok(found) = review::verify(&answer, version, UID, mutating) else { continue };
        if version == "v1" {
            assert_eq!(str_at(&answer, &["response", "uid"]), UID, "an answer to another question");
            assert!(mutating || found.patch.is_empty(), "who validates may not change");
        }
        if !found.allowed {
            let denial = review::denial("hook.example.com", &found.status);
            assert!(denial.code() >= 400 && denial.message().contains("hook.example.com"), "{denial:?}");
        }
        if let Some(changes) = json_of(&found.patch)
            && let Ok(patched) = patch::json_patch(&object, &changes)
            && patched.is_object()
        {
            stores(kind_of(&object), &patched);
        }
    }
}

/// Reads `input` as what a conversion webhook answers for two objects: they are the same objects afterwards, in the version
/// that was asked for.
pub fn conversion_answer(input: &[u8]) {
    const UID: &str = "705ab4f5-6393-11e8-b7cc-42010a800002";

    let Ok(answer) = client::answer(200, input, Bound::OBJECTS) else { return };
    let object = |version: &str, name: &str| {
        json!({"apiVersion": format!("example.com/{version}"), "kind": "Shop", "spec": {"size": 1},
            "metadata": {"name": name, "namespace": "b", "uid": "u", "generation": 3, "labels": {"k": "v"}}})
    };
    let sent = [object("v1", "one"), object("v2", "two"), object("v1", "three")];
    for review in conversion::REVIEWS {
        let mut objects = sent.clone();
        let adopted = conversion::adopt(&answer, (review, UID), &mut objects, &[0, 2], "example.com/v2");
        assert_eq!(objects[1], sent[1], "nobody asked about this one");
        if adopted.is_err() {
            continue;
        }
        for (mut new, mut old) in objects.into_iter().zip(sent.clone()) {
            assert_eq!((&new["apiVersion"], &new["kind"]), (&json!("example.com/v2"), &json!("Shop")));
            assert!(serde_json::to_vec(&new).is_ok());
            for metadata in [&mut new["metadata"], &mut old["metadata"]] {
                let fields = metadata.as_object_mut().expect("metadata is an object");
                fields.remove("labels");
                fields.remove("annotations");
            }
            assert_eq!(new["metadata"], old["metadata"], "labels and annotations may change");
        }
    }
}

/// Reads `input` as each answer of a KMS plug-in: what is stored beside every object stays small, and is not the seed.
pub fn kms_answer(input: &[u8]) {
    const SEED: [u8; 32] = [7; 32];

    if let Ok(answer) = grpc::message_of::<StatusResponse>(input)
        && kms::check_key_id(&answer.key_id).is_ok()
    {
        assert!((1..=1024).contains(&answer.key_id.len()));
    }
    if let Ok(answer) = grpc::message_of::<EncryptResponse>(input)
        && kms::check_sealed(&answer, &SEED).is_ok()
    {
        assert!((1..=1024).contains(&answer.key_id.len()));
        assert!((1..=32 << 10).contains(&answer.ciphertext.len()) && answer.ciphertext != SEED[..]);
    }
    if let Ok(answer) = grpc::message_of::<DecryptResponse>(input)
        && let Ok(seed) = kms::opened(&answer)
    {
        assert_eq!(answer.plaintext, seed[..]);
    }
}
