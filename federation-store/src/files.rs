//! Looking after a SQLite file from outside of the store that may be using it: backup, restore, check.
//!
//! A backup is a whole database of one moment, taken while stores work on the original. A restore wants the file for
//! itself. Its counter jumps ahead and its history is given up: clients that remember revisions from after the backup are
//! told to list again, instead of being shown other objects under the same revisions.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Connection as _, Row as _};

use crate::backend;
use crate::backend::sql::Dialect as _;
use crate::backend::sqlite::{self, SqliteDialect};
use crate::location::{Location, Looked};
use crate::types::Revision;

/// How far a restore moves the counter: more writes than any hub makes between a backup and its loss.
const RESTORE_JUMP: u64 = 1_000_000_000;

/// Between a file's name and the time at which it was set aside.
const ASIDE: &str = ".replaced-";
/// What belongs to a database beside its file: the write-ahead log, and the index of it.
const SIDE_FILES: [&str; 2] = ["-wal", "-shm"];

/// Bytes of a mark that are read: more than one has.
const MAX_MARK: u64 = 256;

/// Why a file could not be looked after.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is something where the backup should go.
    #[error("{path} exists: name a new file")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file that is to be read is not there, or not readable.
    #[error("failed to {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Stores are using the file.
    #[error("{path} is in use: stop the hub before a restore")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The database could not be read or written.
    #[error("failed to {action} the database {path}")]
    Database {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// It was written by a newer release.
    #[error("{path} has schema version {found}, this release knows up to {known}: use the newer release")]
    SchemaTooNew {
        /// The file.
        path: PathBuf,
        /// The version in the file.
        found: i64,
        /// The newest version of this release.
        known: i64,
    },
    /// What was to be backed up or restored is damaged.
    #[error("{path} is damaged: {}", faults.join("; "))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, for people.
        faults: Vec<String>,
    },
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The newest revision.
    pub revision: Revision,
    /// The oldest that can be read.
    pub compacted: Revision,
    /// Living keys.
    pub keys: u64,
    /// Rows of the log.
    pub rows: u64,
    /// What is wrong, for people; nothing: the file is sound.
    pub faults: Vec<String>,
}

/// Copies the database at `source`, which may be in use, as it is at one moment, to the new file `target`; checks the copy.
pub async fn backup(source: &Path, target: &Path) -> Result<Checked, FileError> {
    if target.exists() {
        return Err(FileError::Exists { path: target.to_owned() });
    }
    let part = with_suffix(target, ".part");
    let _ = fs::remove_file(&part);
    let outcome = async {
        let mut connection = connect(source, false).await?;
        schema(&mut connection, source).await?;
        // SQLite takes an empty file for a new one, and it stays its owner's alone: there are secrets in the store.
        sqlite::open_private(&part).map_err(|_| FileError::Io {
            action: "make",
            path: part.clone(),
            source: io::Error::last_os_error(),
        })?;
        let name = part.to_string_lossy().into_owned();
        sqlx::query("VACUUM INTO ?1")
            .bind(name)
            .execute(&mut connection)
            .await
            .map_err(failed("copy", source))?;
        let _ = connection.close().await;
        let checked = check(&part).await?;
        if !checked.faults.is_empty() {
            return Err(FileError::Damaged { path: source.to_owned(), faults: checked.faults });
        }
        settle(&part, target)?;
        Ok(checked)
    }
    .await;
    if outcome.is_err() {
        let _ = fs::remove_file(&part);
    }
    outcome
}

/// What a restore does not take from the backup: keys by their beginnings, ASCII.
#[derive(Debug, Clone, Copy, Default)]
pub struct Exceptions<'a> {
    /// Taken from the data that is replaced, where that has newer ones: what must not be undone.
    pub carried_over: &'a [&'a str],
    /// Taken from neither.
    pub left_out: &'a [&'a str],
}

/// What a restore has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// Where the store goes on.
    pub revision: Revision,
    /// Where the former data is, if there was any.
    pub replaced: Option<PathBuf>,
    /// How many keys came from it; the error, for people, says why none could.
    pub carried_over: Result<u64, String>,
}

/// A key that is carried over.
struct Carried {
    name: Vec<u8>,
    value: Vec<u8>,
    place: i64,
}

/// Puts a backup in the place of `target`, which nobody may be using; what was there is kept beside it, with `.replaced-`
/// and the time (`now`) after its name. The new file belongs to whoever owned the former one, or owns the folder.
///
/// Until all of it is done a store does not open the file: a restore that was cut off is to be done again.
pub async fn restore(
    backup: &Path,
    target: &Path,
    now: SystemTime,
    exceptions: Exceptions<'_>,
) -> Result<Restored, FileError> {
    let checked = check(backup).await?;
    if !checked.faults.is_empty() {
        return Err(FileError::Damaged { path: backup.to_owned(), faults: checked.faults });
    }
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| FileError::Io { action, path, source }
    };
    let folder = folder_of(target);
    let owner = fs::metadata(target).or_else(|_| fs::metadata(folder)).map_err(io("look at", folder))?;
    let alone = sqlite::lock_alone(target).map_err(|error| match error {
        Some(source) => FileError::Io { action: "lock", path: target.to_owned(), source },
        None => FileError::InUse { path: target.to_owned() },
    })?;
    let give =
        |file: &File, path: &Path| give_to(file, &owner).map_err(io("give to the owner of the data", path));
    give(&alone, &sqlite::lock_path(target))?;
    let mark = sqlite::restoring(target);
    let unsaid = unsaid(target, &mark);
    let aside = set_aside_before(target, &mark)?;
    // What is replaced may be damaged: that is what backups are for.
    let carried = match aside.as_deref().or_else(|| target.exists().then_some(target)) {
        Some(former) => living(former, exceptions.carried_over).await.map_err(|error| error_text(&error)),
        None => Err("nothing was there before".to_owned()),
    };
    let part = with_suffix(target, ".part");
    // The permissions come first, the content after.
    let _ = fs::remove_file(&part);
    let mut to = File::options();
    std::os::unix::fs::OpenOptionsExt::mode(to.create_new(true).write(true), 0o600);
    let mut to = to.open(&part).map_err(io("make", &part))?;
    let mut from = File::open(backup).map_err(io("read", backup))?;
    io::copy(&mut from, &mut to).map_err(io("copy", backup))?;
    let (revision, count) =
        jump_ahead(&part, carried.as_deref().unwrap_or_default(), exceptions.left_out).await?;
    let carried_over = match unsaid {
        Some(why) => Err(why),
        None => carried.map(|_| count),
    };
    give(&to, &part)?;
    drop(to);
    let suffix = free_suffix(target, now);
    let kept = with_suffix(target, &suffix);
    // Between two of the steps that follow there would be an empty hub, or one with another's write-ahead log. A mark that
    // names where the former data is already stays as it is.
    if aside.is_none() {
        write_mark(&mark, &suffix, give)?;
        sync_folder(target).map_err(io("write", folder))?;
    }
    let mut replaced = aside;
    // The write-ahead log belongs to what is replaced, and goes with it.
    for suffix in std::iter::once("").chain(SIDE_FILES) {
        let old = with_suffix(target, suffix);
        if old.exists() {
            fs::rename(&old, with_suffix(&kept, suffix)).map_err(io("set aside", &old))?;
            replaced.get_or_insert_with(|| kept.clone());
        }
    }
    settle(&part, target)?;
    fs::remove_file(&mark).map_err(io("remove", &mark))?;
    // A mark that is back after a power cut would keep a hub from data that it has written to since.
    sync_folder(target).map_err(io("write", folder))?;
    Ok(Restored { revision, replaced, carried_over })
}

/// Says that a restore is under way, and where the former data goes: whole or not at all, in the place of whatever is there.
fn write_mark(
    mark: &Path,
    suffix: &str,
    give: impl FnOnce(&File, &Path) -> Result<(), FileError>,
) -> Result<(), FileError> {
    let part = with_suffix(mark, ".part");
    let io = |action| move |source| FileError::Io { action, path: mark.to_owned(), source };
    let _ = fs::remove_file(&part);
    let mut file = File::create_new(&part).map_err(io("make"))?;
    give(&file, &part)?;
    file.write_all(suffix.as_bytes()).and_then(|()| file.sync_all()).map_err(io("write"))?;
    fs::rename(&part, mark).map_err(io("put in place"))
}

/// Where the mark of a restore that was cut off says that the former data goes.
fn marked(target: &Path, mark: &Path) -> Result<Option<PathBuf>, FileError> {
    let mut options = File::options();
    // It says so itself, or not at all: whoever has the folder is asked by root.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    std::os::unix::fs::OpenOptionsExt::custom_flags(options.read(true), flags.bits() as i32);
    let mut suffix = String::new();
    let read = options.open(mark).and_then(|file| file.take(MAX_MARK).read_to_string(&mut suffix));
    match read {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // A link, or somebody else's bytes: `write_mark` makes neither.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            return Ok(None);
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
        Err(source) => return Err(FileError::Io { action: "read", path: mark.to_owned(), source }),
    }
    let of_ours = |rest: &str| rest.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    Ok(suffix.strip_prefix(ASIDE).is_some_and(of_ours).then(|| with_suffix(target, &suffix)))
}

/// Why nobody can tell which file is the former data: a restore of an older release, which left its mark empty, was cut off where
/// something is set aside.
fn unsaid(target: &Path, mark: &Path) -> Option<String> {
    let empty = fs::symlink_metadata(mark).is_ok_and(|mark| mark.is_file() && mark.len() == 0);
    let name = with_suffix(Path::new(target.file_name()?), ASIDE);
    let is_aside = |entry: fs::DirEntry| {
        entry.file_name().as_encoded_bytes().starts_with(name.as_os_str().as_encoded_bytes())
    };
    let aside = empty && fs::read_dir(folder_of(target)).is_ok_and(|files| files.flatten().any(is_aside));
    aside.then(|| {
        format!(
            "a restore by an older release was cut off, and its mark {} does not say where it left the former data: it may be \
             one of {}*",
            mark.display(),
            with_suffix(target, ASIDE).display()
        )
    })
}

/// The former data where a restore that was cut off has left it, whole: what of it was still in its place is brought there too.
fn set_aside_before(target: &Path, mark: &Path) -> Result<Option<PathBuf>, FileError> {
    // Not there: nothing was moved yet, or there was nothing. What others have set aside is not meant.
    let Some(kept) = marked(target, mark)?.filter(|kept| kept.exists()) else { return Ok(None) };
    // Else what has come into its place is a backup that nobody has opened: the mark is there.
    if !target.exists() {
        for suffix in SIDE_FILES {
            let (old, new) = (with_suffix(target, suffix), with_suffix(&kept, suffix));
            if old.exists() && !new.exists() {
                fs::rename(&old, &new).map_err(|source| FileError::Io {
                    action: "set aside",
                    path: old,
                    source,
                })?;
            }
        }
    }
    Ok(Some(kept))
}

/// Looks whether a file, which may be in use, is sound: SQLite's own check, and the store's rules.
pub async fn check(path: &Path) -> Result<Checked, FileError> {
    let mut connection = connect(path, true).await?;
    schema(&mut connection, path).await?;
    let failed = |source| FileError::Database { action: "check", path: path.to_owned(), source };
    let mut faults = Vec::new();
    // Ten faults of a damaged file say as much as all of them.
    let lines = sqlx::query("PRAGMA integrity_check(10)").fetch_all(&mut connection).await.map_err(failed)?;
    for line in lines {
        let line: String = line.try_get(0).map_err(failed)?;
        if line != "ok" {
            faults.push(format!("SQLite says: {line}"));
        }
    }
    let mut checked = backend::check::check::<SqliteDialect>(&mut connection).await.map_err(failed)?;
    faults.append(&mut checked.faults);
    Ok(Checked { faults, ..checked })
}

/// The same by the store's rules alone, of any database: the schema is left as it is.
pub async fn check_at(location: &Location) -> Result<Checked, FileError> {
    if let Some(path) = location.sqlite_path() {
        return check(path).await;
    }
    // Shown as it may be, without its password.
    let name = PathBuf::from(location.to_string());
    match location.look().await.map_err(failed("check", &name))? {
        Looked::Checked(checked) => Ok(checked),
        Looked::Schema { found, known } => Err(other_schema(found, known, &name)),
    }
}

/// What a file holds under keys that begin so.
async fn living(path: &Path, beginnings: &[&str]) -> Result<Vec<Carried>, FileError> {
    let mut connection = connect(path, true).await?;
    schema(&mut connection, path).await?;
    let failed = |source| FileError::Database { action: "read", path: path.to_owned(), source };
    let mut found = Vec::new();
    for beginning in beginnings {
        let rows = sqlx::query(
            "SELECT h.name, l.value, h.place FROM store_head h JOIN store_log l ON l.place = h.place
              WHERE h.deleted = 0 AND h.name >= ?1 AND h.name < ?2",
        )
        .bind(beginning.as_bytes())
        .bind(after(beginning))
        .fetch_all(&mut connection)
        .await
        .map_err(failed)?;
        for row in rows {
            let read =
                || Ok(Carried { name: row.try_get(0)?, value: row.try_get(1)?, place: row.try_get(2)? });
            found.push(read().map_err(failed)?);
        }
    }
    connection.close().await.map_err(failed)?;
    Ok(found)
}

/// The first key after all that begin so.
fn after(beginning: &str) -> Vec<u8> {
    let mut key = beginning.as_bytes().to_vec();
    if let Some(last) = key.last_mut() {
        // ASCII ends at 127.
        *last += 1;
    }
    key
}

/// An error with its causes.
fn error_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Puts `carried` into a restored file where it has nothing newer, and takes out what is `left_out`; moves its counter beyond
/// every revision that was given out, and gives its history up. How many keys were put in is told too.
async fn jump_ahead(
    path: &Path,
    carried: &[Carried],
    left_out: &[&str],
) -> Result<(Revision, u64), FileError> {
    let mut connection = connect(path, false).await?;
    let failed = |source| FileError::Database { action: "restore", path: path.to_owned(), source };
    let mut transaction = connection.begin().await.map_err(failed)?;
    // What the sweep would do, at once: it would walk a thousand million revisions that are not there.
    for statement in [
        "DELETE FROM store_log WHERE place NOT IN (SELECT place FROM store_head WHERE deleted = 0)",
        "DELETE FROM store_head WHERE deleted = 1",
        "DELETE FROM store_replica",
    ] {
        sqlx::query(statement).execute(&mut *transaction).await.map_err(failed)?;
    }
    for beginning in left_out {
        for statement in [
            "DELETE FROM store_log WHERE name >= ?1 AND name < ?2",
            "DELETE FROM store_head WHERE name >= ?1 AND name < ?2",
        ] {
            let query = sqlx::query(statement).bind(beginning.as_bytes()).bind(after(beginning));
            query.execute(&mut *transaction).await.map_err(failed)?;
        }
    }
    let mut count = 0_i64;
    for key in carried {
        // As a new key of the revision after the backup's, which nobody has seen: the counter jumps over it.
        let put = sqlx::query(
            "INSERT INTO store_log (place, name, prev, create_revision, version, lease, deleted, value)
             SELECT (s.revision + 1) * 1048576 + ?1, ?2, 0, s.revision + 1, 1, 0, 0, ?3 FROM store_state s
              WHERE NOT EXISTS (SELECT 1 FROM store_head h WHERE h.name = ?2 AND h.place >= ?4)",
        );
        // Of the backup's, if it has one, nothing may stay; a row is left alone unless a newer one is there.
        let clear = "DELETE FROM store_log WHERE name = ?1 AND place < ?2";
        let clear = sqlx::query(clear).bind(key.name.as_slice()).bind(key.place);
        clear.execute(&mut *transaction).await.map_err(failed)?;
        let put = put.bind(count).bind(key.name.as_slice()).bind(key.value.as_slice()).bind(key.place);
        if put.execute(&mut *transaction).await.map_err(failed)?.rows_affected() == 0 {
            continue;
        }
        let head = sqlx::query(
            "INSERT OR REPLACE INTO store_head (name, place, deleted)
             SELECT ?1, (s.revision + 1) * 1048576 + ?2, 0 FROM store_state s",
        );
        head.bind(key.name.as_slice()).bind(count).execute(&mut *transaction).await.map_err(failed)?;
        count += 1;
    }
    let row = sqlx::query(
        "UPDATE store_state SET revision = revision + ?1, compacted = revision + ?1, swept = revision + ?1
          WHERE id = 1 RETURNING revision",
    )
    .bind(RESTORE_JUMP as i64)
    .fetch_one(&mut *transaction)
    .await
    .map_err(failed)?;
    let revision: i64 = row.try_get(0).map_err(failed)?;
    transaction.commit().await.map_err(failed)?;
    connection.close().await.map_err(failed)?;
    Ok((Revision(u64::try_from(revision).unwrap_or_default()), u64::try_from(count).unwrap_or_default()))
}

async fn connect(path: &Path, read_only: bool) -> Result<SqliteConnection, FileError> {
    // SQLite would make the file, or call an unreadable one "unable to open".
    File::open(path).map_err(|source| FileError::Io { action: "read", path: path.to_owned(), source })?;
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(false)
        .busy_timeout(std::time::Duration::from_secs(10))
        .disable_statement_logging();
    let options = if read_only {
        options.read_only(true)
    } else {
        options.journal_mode(SqliteJournalMode::Wal).synchronous(SqliteSynchronous::Full)
    };
    options.connect().await.map_err(failed("open", path))
}

/// Refuses what this release does not know.
async fn schema(connection: &mut SqliteConnection, path: &Path) -> Result<(), FileError> {
    let found = backend::check::schema::<SqliteDialect>(connection)
        .await
        .map_err(failed("read the schema of", path))?;
    let known = SqliteDialect::SCHEMA;
    if found == known { Ok(()) } else { Err(other_schema(found, known, path)) }
}

fn other_schema(found: i64, known: i64, path: &Path) -> FileError {
    if found > known {
        return FileError::SchemaTooNew { path: path.to_owned(), found, known };
    }
    let fault =
        format!("its schema is of version {found}: start the hub on it once, this release has {known}");
    FileError::Damaged { path: path.to_owned(), faults: vec![fault] }
}

/// Brings a finished file to the disk and into its place.
fn settle(part: &Path, target: &Path) -> Result<(), FileError> {
    let io = |action| {
        let path = target.to_owned();
        move |source| FileError::Io { action, path, source }
    };
    File::open(part).and_then(|file| file.sync_all()).map_err(io("write"))?;
    fs::rename(part, target).map_err(io("put in place"))?;
    sync_folder(target).map_err(io("put in place"))
}

/// What was renamed in the folder of `path` stays so after a power cut.
fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(folder_of(path))?.sync_all()
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes an open file its owner's, when somebody else, such as root, made it. By its handle: the owner of the folder, who
/// need not be root, may exchange what has the name.
fn give_to(file: &File, owner: &fs::Metadata) -> io::Result<()> {
    let made = file.metadata()?;
    if (made.uid(), made.gid()) == (owner.uid(), owner.gid()) {
        return Ok(());
    }
    if made.nlink() > 1 {
        return Err(io::Error::other("it has another name too, perhaps of a file that is somebody else's"));
    }
    match std::os::unix::fs::fchown(file, Some(owner.uid()), Some(owner.gid())) {
        // Who may not give is not root, and made the file for itself: the folder may be a group's.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        // The group alone is not worth an error: the file is for its owner only.
        Err(error) if made.uid() != owner.uid() => Err(error),
        _ => Ok(()),
    }
}

/// What comes after the name of what is set aside, such that nothing has that name yet.
fn free_suffix(target: &Path, now: SystemTime) -> String {
    let time = jiff::Timestamp::try_from(now).unwrap_or_default().strftime("%Y%m%dT%H%M%SZ").to_string();
    let first = format!("{ASIDE}{time}");
    let others = (2_u32..).map(|n| format!("{ASIDE}{time}-{n}"));
    let free = |suffix: &String| {
        let name = with_suffix(target, suffix);
        std::iter::once("").chain(SIDE_FILES).all(|side| !with_suffix(&name, side).exists())
    };
    std::iter::once(first.clone()).chain(others).find(free).unwrap_or(first)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(sqlx::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Database { action, path, source }
}
