//! Conversion reviews as a webhook meets them: bytes in, bytes out, one object in memory at a time.
//!
//! A review of kube-apiserver's is a page of a list, up to some MiB. Its objects are read, converted and written one after
//! another, so what is held is the review, its answer and one object, which may not unfold without end.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::json;
use thiserror::Error;

use crate::bounded::{Budget, Tree};
use crate::conversion::{ConversionError, convert_within};

/// Objects of one `ConversionReview`: an API server sends a page of a list at a time.
const MAX_OBJECTS: usize = 10_000;

/// Bytes of a message: it may quote what it complains about.
const MAX_MESSAGE: usize = 1024;

/// What one review may cost.
#[derive(Debug, Clone, Copy)]
pub struct ReviewLimits {
    /// Bytes that one object may take in memory.
    pub object: usize,
    /// Bytes of the answer.
    pub answer: usize,
}

/// Why a review has no answer.
#[derive(Debug, Error)]
#[error("failed to read a ConversionReview")]
pub struct ReviewError(#[from] serde_json::Error);

/// What is needed before the objects, wherever it stands.
#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    request: HeadRequest,
}

#[derive(Deserialize, Default)]
struct HeadRequest {
    #[serde(default)]
    uid: String,
    #[serde(default, rename = "desiredAPIVersion")]
    desired: String,
}

/// Answers a `ConversionReview` (apiextensions.k8s.io/v1), as an API server sends to a conversion webhook. An object that
/// cannot be converted, or is beyond the limits, is a failure that the answer tells of.
///
/// # Errors
/// When it is no review.
pub fn answer(review: &[u8], limits: ReviewLimits) -> Result<Vec<u8>, ReviewError> {
    let Head { request } = serde_json::from_slice(review)?;
    let mut out = Vec::with_capacity(review.len().min(limits.answer));
    // Strings always serialise.
    let uid = serde_json::to_string(&request.uid)?;
    let head = format!(
        r#"{{"apiVersion":"apiextensions.k8s.io/v1","kind":"ConversionReview","response":{{"uid":{uid},"#
    );
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(br#""convertedObjects":["#);
    let mut pass = Pass { to: &request.desired, limits, out, objects: None, failure: None };
    let mut deserializer = serde_json::Deserializer::from_slice(review);
    let read = Level::Review.of(&mut pass).deserialize(&mut deserializer);
    let read = read.and_then(|()| deserializer.end());
    let Pass { mut out, failure, .. } = pass;
    match (failure, read) {
        (Some(message), _) => {
            let end = message.floor_char_boundary(MAX_MESSAGE);
            let result = json!({"status": "Failure", "message": message[..end]});
            out.clear();
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(format!(r#""result":{result}}}}}"#).as_bytes());
            out.shrink_to_fit();
        }
        (None, Err(error)) => return Err(error.into()),
        (None, Ok(())) => out.extend_from_slice(br#"],"result":{"status":"Success"}}}"#),
    }
    Ok(out)
}

/// One pass over a review.
struct Pass<'a> {
    to: &'a str,
    limits: ReviewLimits,
    out: Vec<u8>,
    /// How many there were; `None` before the list of them.
    objects: Option<usize>,
    /// What ended it.
    failure: Option<String>,
}

/// Where in a review the pass is.
#[derive(Clone, Copy)]
enum Level {
    Review,
    Request,
    Objects,
}

struct At<'p, 'a> {
    pass: &'p mut Pass<'a>,
    level: Level,
}

/// One of the objects.
struct Object<'p, 'a>(&'p mut Pass<'a>);

// === impl Level ===

impl Level {
    fn of<'p, 'a>(self, pass: &'p mut Pass<'a>) -> At<'p, 'a> {
        At { pass, level: self }
    }
}

// === impl At ===

impl<'de> DeserializeSeed<'de> for At<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for At<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.level {
            Level::Review => "a ConversionReview",
            Level::Request => "a review's request",
            Level::Objects => "a list of objects",
        })
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let (field, below) = match self.level {
            Level::Review => ("request", Level::Request),
            Level::Request => ("objects", Level::Objects),
            Level::Objects => return Err(A::Error::custom("the objects of a review are a list")),
        };
        while let Some(key) = entries.next_key::<String>()? {
            if key == field {
                entries.next_value_seed(below.of(self.pass))?;
            } else {
                entries.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        if !matches!(self.level, Level::Objects) {
            return Err(A::Error::custom("a review is an object"));
        }
        if self.pass.objects.replace(0).is_some() {
            return Err(A::Error::duplicate_field("objects"));
        }
        while elements.next_element_seed(Object(self.pass))?.is_some() {}
        Ok(())
    }
}

// === impl Object ===

impl<'de> DeserializeSeed<'de> for Object<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let Self(pass) = self;
        let number = pass.objects.unwrap_or_default() + 1;
        pass.objects = Some(number);
        let budget = Budget::new(pass.limits.object);
        let read = Tree(&budget).deserialize(deserializer);
        let mut failed = |message: String| {
            let error = D::Error::custom(&message);
            pass.failure = Some(message);
            error
        };
        if number > MAX_OBJECTS {
            return Err(failed(format!("more than {MAX_OBJECTS} objects in one review")));
        }
        let object = match read {
            Ok(object) => object,
            Err(_) if budget.is_exceeded() => return Err(failed(ConversionError::TooLarge.to_string())),
            Err(error) => return Err(error),
        };
        let object = match convert_within(object, pass.to, &budget) {
            Ok(object) => object,
            Err(error) => return Err(failed(error.to_string())),
        };
        if number > 1 {
            pass.out.push(b',');
        }
        let left = pass.limits.answer.saturating_sub(pass.out.len());
        let mut out = Limited { out: &mut pass.out, left };
        if serde_json::to_writer(&mut out, &object).is_err() {
            // Nothing else can fail there.
            let message = format!("the converted objects have more than {} bytes", pass.limits.answer);
            pass.failure = Some(message);
            return Err(D::Error::custom("too large"));
        }
        Ok(())
    }
}

/// A writer that ends somewhere.
struct Limited<'a> {
    out: &'a mut Vec<u8>,
    left: usize,
}

impl std::io::Write for Limited<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.left = self.left.checked_sub(bytes.len()).ok_or(std::io::ErrorKind::StorageFull)?;
        self.out.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub(crate) mod fuzz {
    use serde_json::Value;

    use super::*;

    /// Whatever is sent: what is answered is a review, within its limit, and what was converted converts back.
    pub fn conversion_review(input: &[u8]) {
        let limits = ReviewLimits { object: 1 << 20, answer: 4 * input.len() + 4096 };
        let Ok(answered) = answer(input, limits) else { return };
        assert!(
            answered.len() <= limits.answer + 8 * MAX_MESSAGE + 2 * input.len(),
            "{} bytes",
            answered.len()
        );
        serde_json::from_slice::<IgnoredAny>(&answered).expect("an answer is JSON");
        // It may be deeper than what this reads: a level more than the review, and what was in an annotation.
        let Ok(answered) = serde_json::from_slice::<Value>(&answered) else { return };
        let response = &answered["response"];
        assert!(response["uid"].is_string());
        if response["result"]["status"] != "Success" {
            assert!(response["result"]["message"].is_string() && response.get("convertedObjects").is_none());
            return;
        }
        let Head { request } = serde_json::from_slice(input).expect("it was read before");
        for object in response["convertedObjects"].as_array().expect("a list") {
            assert_eq!(object["apiVersion"], request.desired.as_str());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const OLD: &str = "types.kubefed.io/v1beta1";
    const NEW: &str = "types.kubefed.io/v1beta2";
    const LIMITS: ReviewLimits = ReviewLimits { object: 1 << 20, answer: 1 << 20 };

    fn object() -> Value {
        json!({"apiVersion": OLD, "kind": "FederatedConfigMap", "metadata": {"name": "a"}, "spec": {}})
    }

    fn ask(objects: &Value, to: &str) -> Value {
        let review = json!({"request": {"uid": "u", "desiredAPIVersion": to, "objects": objects}});
        let answered = answer(review.to_string().as_bytes(), LIMITS).expect("a review");
        serde_json::from_slice(&answered).expect("JSON")
    }

    #[test]
    fn reviews_are_answered_as_a_whole() {
        let done = ask(&json!([object(), object()]), NEW);
        assert_eq!(done["response"]["uid"], "u");
        let converted = done["response"]["convertedObjects"].as_array().unwrap();
        assert_eq!((converted.len(), &converted[1]["apiVersion"]), (2, &json!(NEW)));
        assert_eq!(done["response"]["result"], json!({"status": "Success"}));
        let failed = ask(&json!([object(), {}]), NEW);
        assert_eq!(failed["response"]["result"]["status"], "Failure");
        assert!(failed["response"].get("convertedObjects").is_none());
        assert_eq!(ask(&json!([object()]), "types.kubefed.io/v9")["response"]["result"]["status"], "Failure");
        for nothing in [json!([]), json!(null)] {
            assert_eq!(ask(&nothing, NEW)["response"]["convertedObjects"], json!([]));
        }
    }

    #[test]
    fn the_order_of_fields_does_not_matter_and_what_is_no_review_is_refused() {
        let text = format!(
            r#"{{"kind":[1,{{}}],"request":{{"objects":[{}],"extra":{{}},"desiredAPIVersion":"{NEW}","uid":"\"u"}}}}"#,
            object()
        );
        let answered: Value = serde_json::from_slice(&answer(text.as_bytes(), LIMITS).unwrap()).unwrap();
        assert_eq!(answered["response"]["uid"], "\"u");
        assert_eq!(answered["response"]["convertedObjects"][0]["apiVersion"], NEW);
        for bad in [
            "",
            "[]",
            "7",
            "{} {}",
            r#"{"request":[]}"#,
            r#"{"request":{"objects":{}}}"#,
            r#"{"request":{"objects":[],"objects":[]}}"#,
            r#"{"request":{},"request":{}}"#,
            r#"{"request":{"objects":[{]}}"#,
        ] {
            assert!(answer(bad.as_bytes(), LIMITS).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_unfolds_without_end_is_refused() {
        let failure = |object: &Value| {
            let answered = ask(&json!([object]), NEW);
            answered["response"]["result"]["message"].as_str().expect("a failure").to_owned()
        };
        let with = |field: &str, value: Value| {
            let mut object = object();
            object["spec"][field] = value;
            object
        };
        let too_large = ConversionError::TooLarge.to_string();
        for value in [json!(vec![0; 50_000]), json!(vec![json!({"a": 0}); 3_000]), json!("x".repeat(1 << 20))]
        {
            assert_eq!(failure(&with("template", value)), too_large);
        }
        // The annotation is JSON in a string, which is read as well.
        let mut hidden = object();
        hidden["metadata"]["annotations"] =
            json!({"cellway.io/conversion": json!({"a": vec![0; 50_000]}).to_string()});
        assert_eq!(failure(&hidden), too_large);
        // What means something to serde_json's own values.
        let hidden =
            with("template", json!({"$serde_json::private::RawValue": json!(vec![0; 50_000]).to_string()}));
        assert_eq!(ask(&json!([hidden]), NEW)["response"]["result"]["status"], "Success", "it is a string");
        let many = Value::Array(vec![object(); MAX_OBJECTS + 1]);
        let limits = ReviewLimits { answer: 1 << 30, ..LIMITS };
        let review = json!({"request": {"desiredAPIVersion": OLD, "objects": many}}).to_string();
        let said = String::from_utf8(answer(review.as_bytes(), limits).unwrap()).unwrap();
        assert!(said.contains("more than 10000 objects"), "{said:.200}");
        let limits = ReviewLimits { answer: 300, ..LIMITS };
        let review = json!({"request": {"desiredAPIVersion": NEW, "objects": vec![object(); 9]}}).to_string();
        let said = String::from_utf8(answer(review.as_bytes(), limits).unwrap()).unwrap();
        assert!(said.contains("more than 300 bytes"), "{said}");
    }
}
