//! Buffers that are used again: what a QUIC stream has sent stays in memory until the peer has acknowledged it.
//!
//! At hundreds of MiB a second an allocator keeps giving such buffers back to the kernel and faulting them in again,
//! which cost an eighth of the sender's time.

use bytes::Bytes;
use parking_lot::Mutex;

/// One piece: large enough that system calls do not count, small enough that few bytes wait beside it.
pub(crate) const PIECE: usize = 64 * 1024;

/// Pieces kept for the next use: 4 MiB for the whole process, what one busy tunnel has under way.
const KEPT: usize = 64;

static FREE: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// A buffer of [`PIECE`] bytes, kept for another use on drop.
pub(crate) struct Piece {
    buffer: Box<[u8]>,
    filled: usize,
}

impl Piece {
    /// A piece with whatever its last user left in it.
    pub(crate) fn take() -> Self {
        let free = FREE.lock().pop();
        Self { buffer: free.unwrap_or_else(|| vec![0; PIECE].into()), filled: 0 }
    }

    pub(crate) fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    /// The first `filled` bytes. Short ones are copied, so that a few bytes do not hold a whole piece.
    pub(crate) fn into_bytes(mut self, filled: usize) -> Bytes {
        if filled < PIECE / 2 {
            return Bytes::copy_from_slice(&self.buffer[..filled]);
        }
        self.filled = filled;
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut free = FREE.lock();
        if free.len() < KEPT {
            free.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_shows_its_own_bytes_only_and_short_ones_hold_none() {
        let mut piece = Piece::take();
        piece.buffer().fill(7);
        let bytes = piece.into_bytes(PIECE - 1);
        assert_eq!((bytes.len(), bytes[0]), (PIECE - 1, 7));
        drop(bytes);
        let mut piece = Piece::take();
        piece.buffer()[..3].copy_from_slice(b"abc");
        let short = piece.into_bytes(3);
        assert_eq!(&short[..], b"abc");
        assert!(FREE.lock().len() <= KEPT);
    }
}
