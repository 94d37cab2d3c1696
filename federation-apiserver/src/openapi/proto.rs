//! The OpenAPI v2 document as protobuf, the form that kubectl and client-go ask for.
//!
//! The messages are those of `openapi.v2` as the gnostic project numbers them; written by hand as far as documents of
//! this server need them. Free-form values (defaults, enums, extensions) travel as YAML text, for which JSON will do.

use prost::Message as _;
use serde_json::{Map, Value};

/// Its media type; clients also ask for it with an `@`, which no header of an answer may hold.
pub(super) const MEDIA_TYPE: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
pub(super) const ASKED_TYPE: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";

macro_rules! message {
    ($(#[$doc:meta])* $name:ident { $($fields:tt)* }) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, prost::Message)]
        struct $name { $($fields)* }
    };
}

message!(Document {
    #[prost(string, tag = "1")]
    swagger: String,
    #[prost(message, optional, tag = "2")]
    info: Option<Info>,
    #[prost(message, optional, tag = "8")]
    paths: Option<Paths>,
    #[prost(message, optional, tag = "9")]
    definitions: Option<NamedSchemas>,
});
message!(Info {
    #[prost(string, tag = "1")]
    title: String,
    #[prost(string, tag = "2")]
    version: String,
});
message!(Paths {
    #[prost(message, repeated, tag = "2")]
    path: Vec<NamedPathItem>,
});
message!(NamedPathItem {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<PathItem>,
});
message!(PathItem {
    #[prost(message, optional, tag = "2")]
    get: Option<Operation>,
    #[prost(message, optional, tag = "3")]
    put: Option<Operation>,
    #[prost(message, optional, tag = "4")]
    post: Option<Operation>,
    #[prost(message, optional, tag = "5")]
    delete: Option<Operation>,
    #[prost(message, optional, tag = "8")]
    patch: Option<Operation>,
    #[prost(message, repeated, tag = "9")]
    parameters: Vec<ParametersItem>,
});
message!(Operation {
    #[prost(string, repeated, tag = "6")]
    produces: Vec<String>,
    #[prost(string, repeated, tag = "7")]
    consumes: Vec<String>,
    #[prost(message, repeated, tag = "8")]
    parameters: Vec<ParametersItem>,
    #[prost(message, optional, tag = "9")]
    responses: Option<Responses>,
    #[prost(message, repeated, tag = "13")]
    vendor_extension: Vec<NamedAny>,
});
message!(ParametersItem {
    #[prost(message, optional, tag = "1")]
    parameter: Option<Parameter>,
});
message!(
    /// One of its fields is set.
    Parameter {
        #[prost(message, optional, tag = "1")]
        body: Option<BodyParameter>,
        #[prost(message, optional, tag = "2")]
        other: Option<NonBodyParameter>,
    }
);
message!(BodyParameter {
    #[prost(string, tag = "2")]
    name: String,
    #[prost(string, tag = "3")]
    place: String,
    #[prost(bool, tag = "4")]
    required: bool,
    #[prost(message, optional, tag = "5")]
    schema: Option<Schema>,
});
message!(
    /// One of its fields is set.
    NonBodyParameter {
        #[prost(message, optional, tag = "3")]
        query: Option<QueryParameter>,
        #[prost(message, optional, tag = "4")]
        path: Option<PathParameter>,
    }
);
message!(QueryParameter {
    #[prost(bool, tag = "1")]
    required: bool,
    #[prost(string, tag = "2")]
    place: String,
    #[prost(string, tag = "3")]
    description: String,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(string, tag = "6")]
    kind: String,
    #[prost(bool, tag = "20")]
    unique_items: bool,
});
message!(PathParameter {
    #[prost(bool, tag = "1")]
    required: bool,
    #[prost(string, tag = "2")]
    place: String,
    #[prost(string, tag = "3")]
    description: String,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(string, tag = "5")]
    kind: String,
    #[prost(bool, tag = "19")]
    unique_items: bool,
});
message!(Responses {
    #[prost(message, repeated, tag = "1")]
    response_code: Vec<NamedResponse>,
});
message!(NamedResponse {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<ResponseValue>,
});
message!(ResponseValue {
    #[prost(message, optional, tag = "1")]
    response: Option<Response>,
});
message!(Response {
    #[prost(string, tag = "1")]
    description: String,
    #[prost(message, optional, tag = "2")]
    schema: Option<SchemaItem>,
});
message!(SchemaItem {
    #[prost(message, optional, tag = "1")]
    schema: Option<Schema>,
});
message!(NamedSchemas {
    #[prost(message, repeated, tag = "1")]
    additional_properties: Vec<NamedSchema>,
});
message!(NamedSchema {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Schema>,
});
message!(NamedAny {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Any>,
});
message!(Any {
    #[prost(string, tag = "2")]
    yaml: String,
});
message!(
    /// One of its fields is set.
    AdditionalProperties {
        #[prost(message, optional, boxed, tag = "1")]
        schema: Option<Box<Schema>>,
        #[prost(bool, optional, tag = "2")]
        boolean: Option<bool>,
    }
);
message!(TypeItem {
    #[prost(string, repeated, tag = "1")]
    value: Vec<String>,
});
message!(ItemsItem {
    #[prost(message, repeated, tag = "1")]
    schema: Vec<Schema>,
});
message!(Schema {
    #[prost(string, tag = "1")]
    reference: String,
    #[prost(string, tag = "2")]
    format: String,
    #[prost(string, tag = "3")]
    title: String,
    #[prost(string, tag = "4")]
    description: String,
    #[prost(message, optional, tag = "5")]
    default: Option<Any>,
    #[prost(double, tag = "6")]
    multiple_of: f64,
    #[prost(double, tag = "7")]
    maximum: f64,
    #[prost(bool, tag = "8")]
    exclusive_maximum: bool,
    #[prost(double, tag = "9")]
    minimum: f64,
    #[prost(bool, tag = "10")]
    exclusive_minimum: bool,
    #[prost(int64, tag = "11")]
    max_length: i64,
    #[prost(int64, tag = "12")]
    min_length: i64,
    #[prost(string, tag = "13")]
    pattern: String,
    #[prost(int64, tag = "14")]
    max_items: i64,
    #[prost(int64, tag = "15")]
    min_items: i64,
    #[prost(bool, tag = "16")]
    unique_items: bool,
    #[prost(int64, tag = "17")]
    max_properties: i64,
    #[prost(int64, tag = "18")]
    min_properties: i64,
    #[prost(string, repeated, tag = "19")]
    required: Vec<String>,
    #[prost(message, repeated, tag = "20")]
    enumeration: Vec<Any>,
    #[prost(message, optional, tag = "21")]
    additional_properties: Option<AdditionalProperties>,
    #[prost(message, optional, tag = "22")]
    kind: Option<TypeItem>,
    #[prost(message, optional, tag = "23")]
    items: Option<ItemsItem>,
    #[prost(message, optional, tag = "25")]
    properties: Option<NamedSchemas>,
    #[prost(message, repeated, tag = "31")]
    vendor_extension: Vec<NamedAny>,
});

/// Encodes a v2 document.
pub(super) fn encode(document: &Value) -> Vec<u8> {
    let paths = entries(&document["paths"]).map(|(name, item)| NamedPathItem {
        name: name.clone(),
        value: Some(PathItem {
            get: operation(&item["get"]),
            put: operation(&item["put"]),
            post: operation(&item["post"]),
            delete: operation(&item["delete"]),
            patch: operation(&item["patch"]),
            parameters: parameters(&item["parameters"]),
        }),
    });
    Document {
        swagger: text(&document["swagger"]),
        info: Some(Info {
            title: text(&document["info"]["title"]),
            version: text(&document["info"]["version"]),
        }),
        paths: Some(Paths { path: paths.collect() }),
        definitions: Some(schemas(&document["definitions"])),
    }
    .encode_to_vec()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text).collect()
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

fn any(value: &Value) -> Any {
    Any { yaml: value.to_string() }
}

fn extensions(value: &Value) -> Vec<NamedAny> {
    entries(value)
        .filter(|(key, value)| key.starts_with("x-") && !value.is_null())
        .map(|(key, value)| NamedAny { name: key.clone(), value: Some(any(value)) })
        .collect()
}

fn operation(value: &Value) -> Option<Operation> {
    value.is_object().then(|| Operation {
        produces: texts(&value["produces"]),
        consumes: texts(&value["consumes"]),
        parameters: parameters(&value["parameters"]),
        responses: Some(Responses {
            response_code: entries(&value["responses"])
                .map(|(code, response)| NamedResponse {
                    name: code.clone(),
                    value: Some(ResponseValue {
                        response: Some(Response {
                            description: text(&response["description"]),
                            schema: Some(SchemaItem { schema: Some(schema(&response["schema"])) }),
                        }),
                    }),
                })
                .collect(),
        }),
        vendor_extension: extensions(value),
    })
}

fn parameters(value: &Value) -> Vec<ParametersItem> {
    let one = |p: &Value| {
        let flag = |key: &str| p[key].as_bool().unwrap_or_default();
        let (name, place) = (text(&p["name"]), text(&p["in"]));
        let parameter = match place.as_str() {
            "body" => Parameter {
                body: Some(BodyParameter {
                    name,
                    place,
                    required: flag("required"),
                    schema: Some(schema(&p["schema"])),
                }),
                other: None,
            },
            "path" => {
                let path = PathParameter {
                    required: flag("required"),
                    place,
                    description: text(&p["description"]),
                    name,
                    kind: text(&p["type"]),
                    unique_items: flag("uniqueItems"),
                };
                Parameter { body: None, other: Some(NonBodyParameter { query: None, path: Some(path) }) }
            }
            _ => {
                let query = QueryParameter {
                    required: flag("required"),
                    place,
                    description: text(&p["description"]),
                    name,
                    kind: text(&p["type"]),
                    unique_items: flag("uniqueItems"),
                };
                Parameter { body: None, other: Some(NonBodyParameter { query: Some(query), path: None }) }
            }
        };
        ParametersItem { parameter: Some(parameter) }
    };
    value.as_array().into_iter().flatten().map(one).collect()
}

fn schemas(value: &Value) -> NamedSchemas {
    let named =
        |(name, value): (&String, &Value)| NamedSchema { name: name.clone(), value: Some(schema(value)) };
    NamedSchemas { additional_properties: entries(value).map(named).collect() }
}

fn schema(value: &Value) -> Schema {
    let flag = |key: &str| value[key].as_bool().unwrap_or_default();
    let number = |key: &str| value[key].as_f64().unwrap_or_default();
    let count = |key: &str| value[key].as_i64().unwrap_or_default();
    let has = |key: &str| value.get(key).filter(|v| !v.is_null());
    Schema {
        reference: text(&value["$ref"]),
        format: text(&value["format"]),
        title: text(&value["title"]),
        description: text(&value["description"]),
        default: has("default").map(any),
        multiple_of: number("multipleOf"),
        maximum: number("maximum"),
        exclusive_maximum: flag("exclusiveMaximum"),
        minimum: number("minimum"),
        exclusive_minimum: flag("exclusiveMinimum"),
        max_length: count("maxLength"),
        min_length: count("minLength"),
        pattern: text(&value["pattern"]),
        max_items: count("maxItems"),
        min_items: count("minItems"),
        unique_items: flag("uniqueItems"),
        max_properties: count("maxProperties"),
        min_properties: count("minProperties"),
        required: texts(&value["required"]),
        enumeration: value["enum"].as_array().into_iter().flatten().map(any).collect(),
        additional_properties: has("additionalProperties").map(|v| match v.as_bool() {
            Some(boolean) => AdditionalProperties { schema: None, boolean: Some(boolean) },
            None => AdditionalProperties { schema: Some(Box::new(schema(v))), boolean: None },
        }),
        kind: has("type").map(|v| TypeItem { value: vec![text(v)] }),
        items: has("items").map(|v| ItemsItem { schema: vec![schema(v)] }),
        properties: has("properties").map(schemas),
        vendor_extension: extensions(value),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_document_survives() {
        let document = json!({"swagger": "2.0", "info": {"title": "K", "version": "v1"},
            "paths": {"/api": {"get": {"produces": ["a/b"], "responses": {"200": {"description": "OK",
                "schema": {"$ref": "#/definitions/T"}}}, "x-kubernetes-action": "get"},
                "parameters": [{"name": "name", "in": "path", "required": true, "type": "string"}]}},
            "definitions": {"T": {"type": "object", "required": ["a"], "properties": {
                "a": {"type": "array", "items": {"type": "string", "enum": ["x"]}},
                "b": {"additionalProperties": {"type": "integer", "minimum": 1}}}}}});
        let decoded = Document::decode(encode(&document).as_slice()).expect("a document");
        let definitions = decoded.definitions.expect("definitions");
        let named = &definitions.additional_properties[0];
        let schema = named.value.as_ref().expect("a schema");
        assert_eq!((named.name.as_str(), schema.required.as_slice()), ("T", &["a".to_owned()][..]));
        let properties = schema.properties.as_ref().expect("properties");
        let list = properties.additional_properties[0].value.as_ref().expect("a");
        assert_eq!(list.items.as_ref().expect("items").schema[0].enumeration[0].yaml, "\"x\"");
        let path = &decoded.paths.expect("paths").path[0];
        let item = path.value.as_ref().expect("an item");
        assert_eq!(
            item.get.as_ref().expect("get").vendor_extension[0].value.as_ref().expect("it").yaml,
            "\"get\""
        );
        assert!(item.parameters[0].parameter.as_ref().expect("one").other.is_some());
    }
}
