//! Long, checkable byte streams: a seed gives the same bytes at both ends, so that nothing is kept.

use bytes::Bytes;
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};

/// Bytes are made in pieces of this size; large enough that making them is not what is measured.
const PIECE: usize = 64 * 1024;
/// Random pieces that are repeated with a counter in each: as telling as fresh randomness, and much cheaper.
const PIECES: usize = 64;

/// A stream of pseudo-random bytes of a known length.
pub struct Stream {
    pieces: Vec<Bytes>,
    left: u64,
    at: u64,
}

impl Stream {
    /// The stream of `length` bytes that `seed` stands for.
    pub fn new(seed: u64, length: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let pieces = (0..PIECES)
            .map(|_| {
                let mut piece = vec![0; PIECE];
                random.fill_bytes(&mut piece);
                Bytes::from(piece)
            })
            .collect();
        Self { pieces, left: length, at: 0 }
    }

    /// The next bytes, or nothing at the end.
    pub fn next_piece(&mut self) -> Option<Vec<u8>> {
        if self.left == 0 {
            return None;
        }
        let index = usize::try_from(self.at % PIECES as u64).unwrap_or_default();
        let mut piece = self.pieces[index].to_vec();
        // Without the counter a lost run of whole pieces could go unseen.
        piece[..8].copy_from_slice(&self.at.to_be_bytes());
        self.at += 1;
        let take = usize::try_from(self.left).unwrap_or(PIECE).min(PIECE);
        piece.truncate(take);
        self.left -= take as u64;
        Some(piece)
    }
}

/// Compares what arrives with the stream that a seed stands for.
pub struct Checker {
    stream: Stream,
    expected: Vec<u8>,
    used: usize,
    seen: u64,
}

impl Checker {
    /// Expects `Stream::new(seed, length)`.
    pub fn new(seed: u64, length: u64) -> Self {
        Self { stream: Stream::new(seed, length), expected: Vec::new(), used: 0, seen: 0 }
    }

    /// Takes bytes that have arrived. The error names the first place that differs.
    pub fn take(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            if self.used == self.expected.len() {
                self.expected = self
                    .stream
                    .next_piece()
                    .ok_or_else(|| format!("{} bytes more than the {} expected", bytes.len(), self.seen))?;
                self.used = 0;
            }
            let count = bytes.len().min(self.expected.len() - self.used);
            if bytes[..count] != self.expected[self.used..self.used + count] {
                return Err(format!("the bytes differ within the {count} from offset {}", self.seen));
            }
            self.used += count;
            self.seen += count as u64;
            bytes = &bytes[count..];
        }
        Ok(())
    }

    /// How much has arrived, all of it right.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Whether everything has arrived.
    pub fn complete(&self) -> bool {
        self.used == self.expected.len() && self.stream.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_its_own_stream_in_any_cut() {
        let mut all = Vec::new();
        let mut stream = Stream::new(7, 200_001);
        while let Some(piece) = stream.next_piece() {
            all.extend(piece);
        }
        assert_eq!(all.len(), 200_001);
        let mut checker = Checker::new(7, 200_001);
        for cut in all.chunks(777) {
            checker.take(cut).unwrap();
        }
        assert!(checker.complete());
        assert!(checker.take(b"x").is_err());
    }

    #[test]
    fn names_the_first_difference() {
        let mut stream = Stream::new(7, 100);
        let mut piece = stream.next_piece().unwrap();
        piece[60] ^= 1;
        let mut checker = Checker::new(7, 100);
        checker.take(&piece[..50]).unwrap();
        assert_eq!(checker.take(&piece[50..]).unwrap_err(), "the bytes differ within the 50 from offset 50");
    }
}
