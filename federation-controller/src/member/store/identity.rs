//! What tells an object of a member from another, and a state of it from another, as it is kept: as numbers where it is one.
//! There are as many as objects in all members, and each as a text would weigh three times as much.

use std::fmt;

use uuid::Uuid;

/// An object's uid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::member) enum Uid {
    /// As Kubernetes makes them.
    Usual(Uuid),
    /// To a client it is any text.
    Other(Box<str>),
}

/// An object's resource version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::member) enum Version {
    /// Kubernetes compares them as numbers.
    Number(u64),
    /// What is not a number, or not written as one usually is.
    Other(Box<str>),
}

// === impl Uid ===

impl Uid {
    pub(super) fn new(text: &str) -> Self {
        let mut buffer = Uuid::encode_buffer();
        match Uuid::try_parse(text) {
            // A uuid can be written in several ways, and this has to be given back as it came.
            Ok(uuid) if uuid.hyphenated().encode_lower(&mut buffer) == text => Self::Usual(uuid),
            _ => Self::Other(text.into()),
        }
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usual(uuid) => fmt::Display::fmt(&uuid.hyphenated(), f),
            Self::Other(text) => f.write_str(text),
        }
    }
}

// === impl Version ===

impl Version {
    pub(super) fn new(text: &str) -> Self {
        match text.parse::<u64>() {
            Ok(number) if number.to_string() == text => Self::Number(number),
            _ => Self::Other(text.into()),
        }
    }

    /// Whether one version is older than another. What is not a number cannot be compared and counts as newer.
    pub(super) fn is_older(one: Option<&Self>, other: Option<&Self>) -> bool {
        matches!((one, other), (Some(Self::Number(one)), Some(Self::Number(other))) if one < other)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => fmt::Display::fmt(number, f),
            Self::Other(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_given_back_as_it_came() {
        for (uid, usual) in [
            ("660227da-9cd5-4f41-8b8c-9b5a7f756e47", true),
            ("660227DA-9cd5-4f41-8b8c-9b5a7f756e47", false),
            ("660227da9cd54f418b8c9b5a7f756e47", false),
            ("{660227da-9cd5-4f41-8b8c-9b5a7f756e47}", false),
            ("mine", false),
            ("", false),
        ] {
            let kept = Uid::new(uid);
            assert_eq!((kept.to_string().as_str(), matches!(kept, Uid::Usual(_))), (uid, usual));
        }
        for (version, number) in [
            ("7", true),
            ("18446744073709551615", true),
            ("07", false),
            ("+7", false),
            ("a", false),
            ("", false),
        ] {
            let kept = Version::new(version);
            assert_eq!((kept.to_string().as_str(), matches!(kept, Version::Number(_))), (version, number));
        }
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        let older =
            |one: &str, other: &str| Version::is_older(Some(&Version::new(one)), Some(&Version::new(other)));
        assert!(older("9", "10"));
        assert!(!older("10", "9") && !older("9", "9"));
        assert!(!older("a", "10") && !older("9", "a"));
        assert!(!Version::is_older(None, Some(&Version::new("9"))));
    }
}
