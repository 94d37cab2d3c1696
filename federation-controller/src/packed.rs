//! Texts that are kept for long and read now and then, packed: most of what an object says of its units, and of its template in
//! its first revision, it says several times.

/// A packed text.
#[derive(Debug)]
pub(crate) struct Packed(Box<[u8]>);

// === impl Packed ===

impl Packed {
    pub(crate) fn new(text: &[u8]) -> Self {
        // Copied from the room for what cannot be packed: allocators leave what shrinks by less than half in its place.
        Self(lz4_flex::block::compress_prepend_size(text).as_slice().into())
    }

    /// The text again. What was packed here can always be unpacked.
    pub(crate) fn unpacked(&self) -> Option<Vec<u8>> {
        lz4_flex::block::decompress_size_prepended(&self.0).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_back_and_takes_less_room() {
        let units: String = (0..10)
            .map(|unit| {
                format!(
                    r#"{{"cluster":"m-{unit:03}","name":"m-{unit:03}","phase":"Synced","revision":"a-1"}}"#
                )
            })
            .collect();
        let packed = Packed::new(units.as_bytes());
        assert_eq!(packed.unpacked().as_deref(), Some(units.as_bytes()));
        assert!(packed.0.len() < units.len() / 3, "{} of {}", packed.0.len(), units.len());
        for text in ["", "a"] {
            assert_eq!(Packed::new(text.as_bytes()).unpacked().as_deref(), Some(text.as_bytes()));
        }
    }
}
