//! Which names of a definition are its own: who came first keeps a name, as kube-apiserver's naming controller has it
//! (`pkg/controller/status/naming_controller.go`).

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::registry::resource::Resource;
use crate::value::{at, str_at};

/// Names in use, by group: of resources (plural, singular and short ones) and of kinds (and their lists).
#[derive(Debug, Default)]
pub(super) struct Used {
    resources: HashMap<(String, String), String>,
    kinds: HashMap<(String, String), String>,
}

/// What a definition may be called, and why not more.
#[derive(Debug, PartialEq)]
pub(super) struct Accepted {
    /// `status.acceptedNames`.
    pub(super) names: Value,
    /// Reason and message of the last conflict.
    pub(super) conflict: Option<(&'static str, String)>,
}

/// Owner of the names that no definition has.
const BUILT_IN: &str = "";

fn texts<'a>(names: &'a Value, field: &str) -> Vec<&'a str> {
    let list = names.get(field).and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).collect()
}

// === impl Used ===

impl Used {
    /// What built-in resources and definitions are called already.
    pub(super) fn new<'a>(builtin: &[Resource], crds: impl Iterator<Item = &'a Value>) -> Self {
        let mut used = Self::default();
        for resource in builtin {
            let names = json!({"plural": resource.plural, "singular": resource.singular, "kind": resource.kind,
                "listKind": resource.list_kind, "shortNames": resource.short_names});
            used.take(&resource.group, BUILT_IN, &names);
        }
        for crd in crds {
            if let Some(names) = at(crd, &["status", "acceptedNames"]) {
                used.take(str_at(crd, &["spec", "group"]), str_at(crd, &["metadata", "name"]), names);
            }
        }
        used
    }

    fn take(&mut self, group: &str, owner: &str, names: &Value) {
        let key = |name: &str| (group.to_owned(), name.to_owned());
        let single = |field: &str| Some(str_at(names, &[field])).filter(|name| !name.is_empty());
        let resources = ["plural", "singular"].into_iter().filter_map(single);
        for name in resources.chain(texts(names, "shortNames")) {
            self.resources.entry(key(name)).or_insert_with(|| owner.to_owned());
        }
        for name in ["kind", "listKind"].into_iter().filter_map(single) {
            self.kinds.entry(key(name)).or_insert_with(|| owner.to_owned());
        }
    }

    /// Accepts of a definition's names what nobody else has.
    pub(super) fn accept(&mut self, crd: &Value) -> Accepted {
        let (group, owner) = (str_at(crd, &["spec", "group"]), str_at(crd, &["metadata", "name"]));
        let wanted = at(crd, &["spec", "names"]).cloned().unwrap_or_default();
        let mut names = at(crd, &["status", "acceptedNames"]).filter(|n| n.is_object()).cloned();
        let names_mut = names.get_or_insert_with(|| json!({}));
        let mut conflict = None;
        let taken = |used: &HashMap<(String, String), String>, name: &str| {
            let found = used.get(&(group.to_owned(), name.to_owned()));
            found.is_some_and(|by| by != owner).then(|| format!("{name:?} is already in use"))
        };
        for (field, used, reason) in
            [("plural", &self.resources, "PluralConflict"), ("singular", &self.resources, "SingularConflict")]
        {
            match taken(used, str_at(&wanted, &[field])) {
                Some(why) => conflict = Some((reason, why)),
                None => names_mut[field] = wanted.get(field).cloned().unwrap_or_default(),
            }
        }
        let clashes: Vec<String> = texts(&wanted, "shortNames")
            .into_iter()
            .filter_map(|name| taken(&self.resources, name))
            .collect();
        match clashes.as_slice() {
            [] => copy(names_mut, &wanted, "shortNames"),
            [one] => conflict = Some(("ShortNamesConflict", one.clone())),
            more => conflict = Some(("ShortNamesConflict", format!("[{}]", more.join(", ")))),
        }
        for (field, reason) in [("kind", "KindConflict"), ("listKind", "ListKindConflict")] {
            match taken(&self.kinds, str_at(&wanted, &[field])) {
                Some(why) => conflict = Some((reason, why)),
                None => names_mut[field] = wanted.get(field).cloned().unwrap_or_default(),
            }
        }
        copy(names_mut, &wanted, "categories");
        let names = names.unwrap_or_default();
        self.take(group, owner, &names);
        Accepted { names, conflict }
    }
}

fn copy(names: &mut Value, wanted: &Value, field: &str) {
    if let Some(map) = names.as_object_mut() {
        match wanted.get(field) {
            Some(list) => map.insert(field.to_owned(), list.clone()),
            None => map.remove(field),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crd(plural: &str, kind: &str, short: &[&str], accepted: bool) -> Value {
        let names = json!({"plural": plural, "singular": kind.to_lowercase(), "kind": kind,
            "listKind": format!("{kind}List"), "shortNames": short});
        let status = if accepted { json!({"acceptedNames": names}) } else { json!({}) };
        json!({"metadata": {"name": format!("{plural}.g.io")}, "spec": {"group": "g.io", "names": names}, "status": status})
    }

    #[test]
    fn who_came_first_keeps_its_names() {
        let first = crd("widgets", "Widget", &["w"], true);
        let second = crd("wheels", "Wheel", &["w", "wh"], false);
        let third = crd("gadgets", "WidgetList", &[], false);
        let mut used = Used::new(&[], [&first, &second, &third].into_iter());
        let accepted = used.accept(&first);
        assert_eq!((accepted.conflict, &accepted.names), (None, &first["spec"]["names"]));
        let accepted = used.accept(&second);
        assert_eq!(accepted.conflict, Some(("ShortNamesConflict", "\"w\" is already in use".into())));
        assert_eq!((&accepted.names["plural"], accepted.names.get("shortNames")), (&json!("wheels"), None));
        let accepted = used.accept(&third);
        assert_eq!(accepted.conflict, Some(("KindConflict", "\"WidgetList\" is already in use".into())));
        // In another group nothing is taken.
        let mut other = crd("widgets", "Widget", &["w"], false);
        other["spec"]["group"] = json!("h.io");
        assert_eq!(used.accept(&other).conflict, None);
    }

    #[test]
    fn a_served_definition_keeps_what_it_has_when_it_asks_for_too_much() {
        let first = crd("widgets", "Widget", &["w"], true);
        let mut second = crd("wheels", "Wheel", &["wh"], true);
        second["spec"]["names"]["shortNames"] = json!(["wh", "w"]);
        let mut used = Used::new(&[], [&first, &second].into_iter());
        let accepted = used.accept(&second);
        assert_eq!(accepted.conflict.map(|(reason, _)| reason), Some("ShortNamesConflict"));
        assert_eq!(accepted.names["shortNames"], json!(["wh"]));
    }
}
