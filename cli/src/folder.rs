//! Whose a data folder is: a demo's, which may be thrown away, or a hub's, which may not.
//!
//! A file marks the folder of a demo, and is locked for as long as the demo runs. The mark goes for good when a hub that is
//! not the demo's own is started in the folder, or a backup is restored into it: from then on it is nobody's to remove.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::Path,
};

use proxy_server::hub::LOCK_FILE;

use crate::error::{Error, Result};

/// In the data folder of a demo: it may be emptied and used anew.
const DEMO_MARK: &str = "cellway-demo";

const TEXT: &str = "Written by `cellway up --demo`, which empties this folder when it starts.\n";

/// Makes a folder that other users cannot look into, unless it is there.
pub(crate) fn make(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Makes the folder a demo's, and empties it when it was one before. Others are kept out for as long as the file is held.
pub(crate) fn begin_demo(folder: &Path) -> Result<File> {
    let tried = tried(folder);
    let failed = |error: io::Error| Error::failed(&tried, error);
    let not_a_demos = || {
        Error::usage(&tried, "it holds something that is not a demo's")
            .remedy("name an empty folder with --data-dir")
    };
    let mark = folder.join(DEMO_MARK);
    make(folder).map_err(failed)?;
    let empty = fs::read_dir(folder).map_err(failed)?.next().is_none();
    if !empty && !mark.is_file() {
        return Err(not_a_demos());
    }
    let mut ours = File::options().create(true).append(true).open(&mark).map_err(failed)?;
    if !locked(&ours).map_err(failed)? {
        return Err(demo_runs(&tried));
    }
    // A hub that was started here meanwhile has taken the mark away before it let go of its lock.
    if !mark.is_file() {
        return Err(not_a_demos());
    }
    // The lock of a hub of before the marks were taken away, or of one that a demo left behind.
    let _hub = match File::open(folder.join(LOCK_FILE)) {
        Ok(hub) if locked(&hub).map_err(failed)? => Some(hub),
        Ok(_) => {
            return Err(Error::usage(&tried, "a hub is running in it")
                .remedy("stop that one, or name another folder with --data-dir"));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(error)),
    };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // Both stay, locked, so that nobody takes the folder for free meanwhile.
        if entry.file_name() == DEMO_MARK || entry.file_name() == LOCK_FILE {
            continue;
        }
        let is_folder = entry.file_type().map_err(failed)?.is_dir();
        let remove = if is_folder { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
        remove.map_err(failed)?;
    }
    ours.set_len(0).and_then(|()| ours.write_all(TEXT.as_bytes())).map_err(failed)?;
    Ok(ours)
}

/// Makes the folder a hub's for good. The hub of a demo that runs, its `child`, leaves it the demo's.
pub(crate) fn keep(folder: &Path, child: bool) -> Result<()> {
    let tried = tried(folder);
    let failed = |error: io::Error| Error::failed(&tried, error);
    let mark = folder.join(DEMO_MARK);
    let file = match File::open(&mark) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    match locked(&file).map_err(failed)? {
        // Before the lock goes: a demo that waits for it must find the mark gone.
        true => fs::remove_file(&mark).map_err(failed),
        false if child => Ok(()),
        false => Err(demo_runs(&tried)),
    }
}

fn tried(folder: &Path) -> String {
    format!("use the data folder {}", folder.display())
}

fn demo_runs(tried: &str) -> Error {
    Error::usage(tried, "a demo is running in it")
        .remedy("end that one, or name another folder with --data-dir")
}

/// Whether the file could be locked; not, when somebody else holds it.
fn locked(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_demos_folder_is_emptied_until_a_hub_is_started_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("demo");
        let old = folder.join("old");
        drop(begin_demo(&folder).unwrap());
        fs::create_dir(&old).unwrap();
        let demo = begin_demo(&folder).unwrap();
        assert!(!old.exists());
        // While it runs: its own hub is at home, another one and another demo are not.
        keep(&folder, true).unwrap();
        assert!(keep(&folder, false).unwrap_err().to_string().contains("a demo is running"));
        assert!(begin_demo(&folder).unwrap_err().to_string().contains("a demo is running"));
        drop(demo);

        fs::write(&old, "").unwrap();
        let hub = File::create(folder.join(LOCK_FILE)).unwrap();
        hub.lock().unwrap();
        assert!(begin_demo(&folder).unwrap_err().to_string().contains("a hub is running"));
        drop(hub);
        keep(&folder, false).unwrap();
        keep(&folder, false).unwrap();
        assert!(begin_demo(&folder).unwrap_err().to_string().contains("not a demo's"));
        assert!(old.exists());
    }
}
