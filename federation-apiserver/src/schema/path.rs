//! Places of values, put into words only when something has to be said about them: walking a large object costs no text.

use std::fmt;

/// A place: its step below another place. Lives on the stack of the walk.
#[derive(Clone, Copy)]
pub(crate) struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Start(&'a str),
    Field(&'a str),
    Key(&'a str),
    Index(usize),
}

impl<'a> Path<'a> {
    /// The place where a walk starts; "" for the root of an object.
    pub(crate) fn start(text: &'a str) -> Self {
        Self { parent: None, step: Step::Start(text) }
    }

    /// `place.name`
    pub(crate) fn field(&'a self, name: &'a str) -> Self {
        Self { parent: Some(self), step: Step::Field(name) }
    }

    /// `place[key]`
    pub(crate) fn key(&'a self, key: &'a str) -> Self {
        Self { parent: Some(self), step: Step::Key(key) }
    }

    /// `place[3]`
    pub(crate) fn index(&'a self, index: usize) -> Self {
        Self { parent: Some(self), step: Step::Index(index) }
    }

    /// Is it the root of an object?
    pub(crate) fn is_root(&self) -> bool {
        matches!(self.step, Step::Start("")) && self.parent.is_none()
    }

    /// The place in an error; the root has a word of its own in Kubernetes.
    pub(crate) fn place(&self) -> String {
        if self.is_root() { "<nil>".into() } else { self.to_string() }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Start(text) => f.write_str(text),
            Step::Field(name) if self.parent.is_none_or(Path::is_root) => f.write_str(name),
            Step::Field(name) => write!(f, ".{name}"),
            Step::Key(key) => write!(f, "[{key}]"),
            Step::Index(index) => write!(f, "[{index}]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_read_as_in_kubernetes() {
        let root = Path::start("");
        let (spec, at) = (root.field("spec"), Path::start("a.default"));
        let (list, map) = (spec.field("list"), spec.field("map"));
        assert_eq!(root.place(), "<nil>");
        assert_eq!(list.index(3).to_string(), "spec.list[3]");
        assert_eq!(map.key("k").to_string(), "spec.map[k]");
        assert_eq!(at.field("x").to_string(), "a.default.x");
    }
}
