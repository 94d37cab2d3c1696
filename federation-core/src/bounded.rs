//! JSON trees that stay within a budget of memory, for what strangers send.
//!
//! A byte of JSON may become thirty in memory: `[0,0,…` is a value of 32 bytes for every two, and an object of one field
//! a whole leaf of a B-tree. Each node is paid for as it is made, so reading ends where the budget does, and what stands
//! in strings costs what a string costs.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// One [`Value`]; vectors have room for up to twice their length.
const ELEMENT: usize = 2 * 32;
/// The least that a vector with something in it has room for.
const SMALLEST: usize = 4 * 32;
/// A leaf of a map's B-tree: eleven keys of 24 bytes and values of 32.
const LEAF: usize = 640;
/// Entries that one leaf has room for.
const IN_A_LEAF: usize = 11;
/// An inner node: a leaf with twelve children.
const INNER: usize = 736;
/// An entry of a larger map: leaves and inner nodes are half full at least.
const ENTRY: usize = 128;

/// What reading may take.
#[derive(Debug)]
pub(crate) struct Budget {
    left: Cell<usize>,
    exceeded: Cell<bool>,
}

/// Why there is no tree.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// It needs more than the budget.
    TooLarge,
    /// It is no JSON.
    Malformed,
}

/// Reads one value within the budget.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tree<'a>(pub(crate) &'a Budget);

/// Reads a text that is one value.
pub(crate) fn read(text: &str, budget: &Budget) -> Result<Value, ReadError> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let read = Tree(budget).deserialize(&mut deserializer);
    match read.and_then(|value| deserializer.end().map(|()| value)) {
        Ok(value) => Ok(value),
        Err(_) if budget.is_exceeded() => Err(ReadError::TooLarge),
        Err(_) => Err(ReadError::Malformed),
    }
}

// === impl Budget ===

impl Budget {
    /// So many bytes of memory.
    pub(crate) fn new(bytes: usize) -> Self {
        Self { left: Cell::new(bytes), exceeded: Cell::new(false) }
    }

    /// For what somebody else has bounded.
    pub(crate) fn unlimited() -> Self {
        Self::new(usize::MAX)
    }

    /// Whether more was needed.
    pub(crate) fn is_exceeded(&self) -> bool {
        self.exceeded.get()
    }

    fn take<E: Error>(&self, bytes: usize) -> Result<(), E> {
        match self.left.get().checked_sub(bytes) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => {
                self.exceeded.set(true);
                Err(E::custom("too large"))
            }
        }
    }

    /// For one more entry of a map that has so many.
    pub(crate) fn take_entry<E: Error>(&self, entries: usize, key: &str) -> Result<(), E> {
        self.take_string(key.len())?;
        self.take(match entries {
            0 => LEAF,
            1..IN_A_LEAF => 0,
            // It becomes two, with one above them.
            IN_A_LEAF => LEAF + INNER,
            _ => ENTRY,
        })
    }

    /// With what an allocator rounds up to and keeps for itself.
    fn take_string<E: Error>(&self, length: usize) -> Result<(), E> {
        self.take(if length == 0 { 0 } else { length.saturating_add(length / 8 + 16) })
    }
}

// === impl Tree ===

impl<'de> DeserializeSeed<'de> for Tree<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        // Depth is the deserialiser's to bound: 128.
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.0.take_string(value.len())?;
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = elements.next_element_seed(Tree(self.0))? {
            self.0.take(if values.is_empty() { SMALLEST } else { ELEMENT })?;
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            self.0.take_entry(map.len(), &key)?;
            map.insert(key, entries.next_value_seed(Tree(self.0))?);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What a text takes, by halving what it is given.
    fn cost(text: &str) -> usize {
        let fits = |bytes: usize| read(text, &Budget::new(bytes)).is_ok();
        let (mut low, mut high) = (0, 1 << 30);
        assert!(fits(high), "{text}");
        while low < high {
            let middle = usize::midpoint(low, high);
            if fits(middle) { high = middle } else { low = middle + 1 }
        }
        low
    }

    #[test]
    fn trees_are_what_serde_json_makes_of_the_text() {
        let all = json!({"a": [null, true, -1, u64::MAX, 1.5, "ä\n\"", [], {}], "b": {"c": {"d": "x"}}});
        for text in [all.to_string(), serde_json::to_string_pretty(&all).unwrap(), "1e400".into(), "7".into()]
        {
            match (serde_json::from_str::<Value>(&text), read(&text, &Budget::unlimited())) {
                (Ok(theirs), Ok(ours)) => assert_eq!(theirs, ours),
                (Err(_), Err(ReadError::Malformed)) => {}
                (theirs, ours) => panic!("{text}: {theirs:?}, {ours:?}"),
            }
        }
        for bad in ["", "{", "[1,]", "{} {}", &"[".repeat(200)] {
            assert!(matches!(read(bad, &Budget::unlimited()), Err(ReadError::Malformed)), "{bad}");
        }
    }

    #[test]
    fn a_tree_costs_what_it_takes() {
        assert!(size_of::<Value>() <= 32 && size_of::<String>() <= 24, "the constants above are of these");
        assert_eq!(cost("[]") + cost("{}") + cost("\"\"") + cost("12345"), 0, "nothing is allocated");
        assert_eq!(cost("[0,0,0,0,0]"), SMALLEST + 4 * ELEMENT);
        assert_eq!(cost(r#"{"a":0}"#), LEAF + 17);
        assert_eq!(cost(r#"{"a":0,"b":0,"c":0}"#), LEAF + 3 * 17, "in the same leaf");
        let text = "[{,\\\"".repeat(1000);
        assert_eq!(cost(&format!("\"{text}\"")), 4000 + 500 + 16, "what is in a string is a string");
        let many: Map<String, Value> = (0..1000).map(|i| (format!("{i:04}"), Value::Null)).collect();
        let keys = 1000 * (4 + 16);
        let nodes = cost(&Value::Object(many).to_string()) - keys;
        // Leaves of six, as ascending keys leave them, and a seventh for what is above them.
        assert!((1000 / 6 * LEAF * 7 / 6..1000 * 140).contains(&nodes), "{nodes}");
        assert!(matches!(read("[[0],[0]]", &Budget::new(3 * SMALLEST - 1)), Err(ReadError::TooLarge)));
    }
}
