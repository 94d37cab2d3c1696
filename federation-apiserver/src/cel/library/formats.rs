//! Named formats: `format.dns1123Label().validate(self.name)`.

use base64::Engine as _;

use super::super::value::Value;
use super::{Fault, Implementation, time, urls};
use crate::schema::names;

/// A format.
#[derive(Debug)]
pub(crate) struct Format {
    pub(crate) name: &'static str,
    check: fn(&str) -> Vec<String>,
}

fn masked_prefix(check: fn(&str) -> Vec<String>, text: &str) -> Vec<String> {
    // The generated part follows, so a prefix may end in a dash.
    let fixed = text.strip_suffix('-').filter(|t| !t.is_empty()).map(|t| format!("{t}a"));
    check(fixed.as_deref().unwrap_or(text))
}

fn unless(valid: bool, why: &str) -> Vec<String> {
    if valid { Vec::new() } else { vec![why.to_owned()] }
}

fn is_uuid(text: &str) -> bool {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let dashes: Vec<usize> = text.match_indices('-').map(|(i, _)| i).collect();
    digits.len() == 32
        && digits.bytes().all(|b| b.is_ascii_hexdigit())
        && dashes.iter().all(|at| [8, 13, 18, 23].contains(at) || dashes.len() < 4)
}

/// All formats by the name of their function.
static FORMATS: &[(&str, Format)] = &[
    ("dns1123Label", Format { name: "DNS1123Label", check: names::dns1123_label }),
    ("dns1123Subdomain", Format { name: "DNS1123Subdomain", check: names::dns1123_subdomain }),
    ("dns1035Label", Format { name: "DNS1035Label", check: names::dns1035_label }),
    ("qualifiedName", Format { name: "QualifiedName", check: names::qualified_name }),
    (
        "dns1123LabelPrefix",
        Format { name: "DNS1123LabelPrefix", check: |s| masked_prefix(names::dns1123_label, s) },
    ),
    (
        "dns1123SubdomainPrefix",
        Format { name: "DNS1123SubdomainPrefix", check: |s| masked_prefix(names::dns1123_subdomain, s) },
    ),
    (
        "dns1035LabelPrefix",
        Format { name: "DNS1035LabelPrefix", check: |s| masked_prefix(names::dns1035_label, s) },
    ),
    ("labelValue", Format { name: "LabelValue", check: names::label_value }),
    ("uri", Format { name: "URI", check: |s| urls::parse(s).err().into_iter().collect() }),
    ("uuid", Format { name: "uuid", check: |s| unless(is_uuid(s), "does not match the UUID format") }),
    (
        "byte",
        Format {
            name: "byte",
            check: |s| {
                let valid = base64::engine::general_purpose::STANDARD.decode(s).is_ok();
                unless(valid, "invalid base64")
            },
        },
    ),
    (
        "date",
        Format {
            name: "date",
            check: |s| unless(s.len() == 10 && time::parse_date_or_time(s).is_some(), "invalid date"),
        },
    ),
    (
        "datetime",
        Format {
            name: "datetime",
            check: |s| unless(s.len() > 10 && time::parse_date_or_time(s).is_some(), "invalid datetime"),
        },
    ),
];

fn named(name: &str) -> Option<&'static Format> {
    FORMATS.iter().find(|(n, _)| *n == name).map(|(_, f)| f)
}

macro_rules! constant {
    ($name:literal) => {
        |_| named($name).map(Value::Format).ok_or(Fault::NoOverload)
    };
}

pub(super) fn implementation(name: &str) -> Option<Implementation> {
    Some(match name {
        "format.named" => |a| match a {
            [Value::Str(s)] => Ok(named(s).map_or(Value::Optional(None), |f| Value::some(Value::Format(f)))),
            _ => Err(Fault::NoOverload),
        },
        "validate" => |a| match a {
            [Value::Format(format), Value::Str(s)] => {
                let errors = (format.check)(s);
                Ok(if errors.is_empty() {
                    Value::Optional(None)
                } else {
                    Value::some(Value::list(errors.into_iter().map(Value::string).collect()))
                })
            }
            _ => Err(Fault::NoOverload),
        },
        "format.dns1123Label" => constant!("dns1123Label"),
        "format.dns1123Subdomain" => constant!("dns1123Subdomain"),
        "format.dns1035Label" => constant!("dns1035Label"),
        "format.qualifiedName" => constant!("qualifiedName"),
        "format.dns1123LabelPrefix" => constant!("dns1123LabelPrefix"),
        "format.dns1123SubdomainPrefix" => constant!("dns1123SubdomainPrefix"),
        "format.dns1035LabelPrefix" => constant!("dns1035LabelPrefix"),
        "format.labelValue" => constant!("labelValue"),
        "format.uri" => constant!("uri"),
        "format.uuid" => constant!("uuid"),
        "format.byte" => constant!("byte"),
        "format.date" => constant!("date"),
        "format.datetime" => constant!("datetime"),
        _ => return None,
    })
}
