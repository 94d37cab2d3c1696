//! Files with certificates and keys: read with a bound, written at once or not at all.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// The largest file read: a system CA bundle is about 250 KiB.
const MAX_FILE: u64 = 4 << 20;

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Reading failed.
    #[error("failed to read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Writing failed; the former content, if any, is still there.
    #[error("failed to write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Reads a file of at most 4 MiB.
///
/// # Errors
/// When it cannot be read or is longer.
pub fn read_bounded(path: &Path) -> Result<Vec<u8>, FileError> {
    let read = || {
        let mut content = Vec::new();
        File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut content)?;
        if content.len() as u64 > MAX_FILE {
            return Err(io::Error::other(format!("longer than {MAX_FILE} bytes")));
        }
        Ok(content)
    };
    read().map_err(|source| FileError::Read { path: path.to_owned(), source })
}

/// Replaces a file that only its owner may read (0600). A reader sees the old content or the new, never a part, and
/// so does whoever starts after a power cut.
///
/// # Errors
/// When any step fails; the former content is then still there.
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), FileError> {
    write(path, content, 0o600)
}

/// As [`write_private`], readable by all (0644).
///
/// # Errors
/// When any step fails; the former content is then still there.
pub fn write_public(path: &Path, content: &[u8]) -> Result<(), FileError> {
    write(path, content, 0o644)
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    // Random, so that two writers never share a temporary file; the last rename wins.
    name.push(format!(".{:016x}.tmp", rand::random::<u64>()));
    let temporary = directory.join(name);
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(|source| {
        // Best effort: after a failed rename the temporary file is litter, and the error already says what happened.
        let _ = fs::remove_file(&temporary);
        FileError::Write { path: path.to_owned(), source }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_private_file_is_replaced_and_stays_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(read_bounded(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn errors_name_the_file() {
        let error = read_bounded(Path::new("/nonexistent/file")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/file"));
        assert!(write_private(Path::new("/nonexistent/file"), b"").is_err());
    }
}
