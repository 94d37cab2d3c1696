//! Rows of the tables as values: the same columns in every database, so the same code for every driver's row type.

use bytes::Bytes;
use futures::{Stream, TryStreamExt as _};
use sqlx::{ColumnIndex, Decode, Row, Type};

use super::{EVENT_BYTES_PER_READ, EVENTS_PER_READ, State};
use crate::batch::{Place, Record};
use crate::types::{Event, EventKind, KeyRange, KeyValue, Lease, MAX_KEY_BYTES, Revision};

/// The longest key and one byte: greater than any key.
const AFTER_ALL: &[u8] = &[u8::MAX; MAX_KEY_BYTES + 1];

/// The three types of our columns, in any driver's row.
pub(super) trait StoreRow {
    fn int(&self, column: &str) -> Result<Option<i64>, sqlx::Error>;
    fn bytes(&self, column: &str) -> Result<Option<Vec<u8>>, sqlx::Error>;
    fn flag(&self, column: &str) -> Result<bool, sqlx::Error>;
}

impl<R> StoreRow for R
where
    R: Row,
    for<'c> &'c str: ColumnIndex<R>,
    for<'r> i64: Decode<'r, R::Database> + Type<R::Database>,
    for<'r> Vec<u8>: Decode<'r, R::Database> + Type<R::Database>,
    for<'r> bool: Decode<'r, R::Database> + Type<R::Database>,
{
    fn int(&self, column: &str) -> Result<Option<i64>, sqlx::Error> {
        self.try_get(column)
    }

    fn bytes(&self, column: &str) -> Result<Option<Vec<u8>>, sqlx::Error> {
        self.try_get(column)
    }

    fn flag(&self, column: &str) -> Result<bool, sqlx::Error> {
        self.try_get(column)
    }
}

/// What rows say, each of them read as it comes: all of them in the driver's form would take as much memory again as what they
/// say, for a moment, and an allocator may keep it for longer.
pub(super) async fn read<R, T>(
    rows: impl Stream<Item = Result<R, sqlx::Error>>,
    say: impl Fn(&R) -> Result<T, sqlx::Error>,
) -> Result<Vec<T>, sqlx::Error> {
    let mut rows = std::pin::pin!(rows);
    let mut said = Vec::new();
    while let Some(row) = rows.try_next().await? {
        said.push(say(&row)?);
    }
    Ok(said)
}

/// A number that is never NULL and never negative.
pub(super) fn unsigned(row: &impl StoreRow, column: &str) -> Result<u64, sqlx::Error> {
    let number = row.int(column)?.ok_or_else(|| missing(column))?;
    u64::try_from(number).map_err(|error| sqlx::Error::Decode(error.into()))
}

/// The counter row, read with `s_` before its columns.
pub(super) fn state_of(row: &impl StoreRow) -> Result<State, sqlx::Error> {
    Ok(State {
        revision: Revision(unsigned(row, "s_revision")?),
        compacted: Revision(unsigned(row, "s_compacted")?),
        swept: Revision(unsigned(row, "s_swept")?),
    })
}

/// A row of the log.
pub(super) fn record_of(row: &impl StoreRow) -> Result<Record, sqlx::Error> {
    Ok(Record {
        place: place_of(row, "place")?,
        key: key_of(row)?,
        prev: place_of(row, "prev")?,
        create_revision: Revision(unsigned(row, "create_revision")?),
        version: unsigned(row, "version")?,
        lease: row.int("lease")?.unwrap_or_default(),
        value: row.bytes("value")?.ok_or_else(|| missing("value"))?.into(),
        deleted: row.flag("deleted")?,
    })
}

/// The key of a row.
pub(super) fn key_of(row: &impl StoreRow) -> Result<Bytes, sqlx::Error> {
    Ok(row.bytes("name")?.ok_or_else(|| missing("name"))?.into())
}

/// A row of the leases.
pub(super) fn lease_of(row: &impl StoreRow) -> Result<Lease, sqlx::Error> {
    let number = |column| row.int(column)?.ok_or_else(|| missing(column));
    Ok(Lease { id: number("id")?, ttl: number("ttl")?, expires_at: number("expires_at")? })
}

pub(super) fn place_of(row: &impl StoreRow, column: &str) -> Result<Place, sqlx::Error> {
    unsigned(row, column).map(Place::from_sql)
}

/// A row of the log with, under `p_`, the living row that it replaced.
pub(super) fn event_of(row: &impl StoreRow) -> Result<Event, sqlx::Error> {
    let record = record_of(row)?;
    let prev_kv = match row.bytes("p_value")? {
        None => None,
        Some(value) => Some(KeyValue {
            key: record.key.clone(),
            value: value.into(),
            create_revision: Revision(unsigned(row, "p_create_revision")?),
            mod_revision: record.prev.revision(),
            version: unsigned(row, "p_version")?,
            lease: row.int("p_lease")?.unwrap_or_default(),
        }),
    };
    Ok(Event {
        kind: if record.deleted { EventKind::Delete } else { EventKind::Put },
        revision: record.place.revision(),
        kv: record.event_key_value(),
        prev_kv,
    })
}

/// The columns beside `l.*` of a query for events.
pub(super) const PREVIOUS: &str = "p.create_revision AS p_create_revision, p.version AS p_version,
                                   p.lease AS p_lease, p.value AS p_value";

/// Up to which revision to read, given the first rows to read as places and sizes: whole revisions, not much more than
/// a page of them.
pub(super) fn upto(rows: &[(Place, u64)], newest: Revision) -> Revision {
    let Some(first) = rows.first().map(|(place, _)| place.revision()) else { return newest };
    let mut bytes = 0;
    for (index, (place, size)) in rows.iter().enumerate() {
        bytes += size;
        if bytes > EVENT_BYTES_PER_READ || index + 1 >= EVENTS_PER_READ {
            // The rest of this revision is not among the rows, or too much.
            let last = place.revision();
            return if last == first { last } else { last.previous() };
        }
    }
    newest
}

/// The end of a range. There always is one: a condition that may be absent would keep a planner from seeking to it, and
/// every list would walk to the end of the table.
pub(super) fn end_of(range: &KeyRange) -> &[u8] {
    range.end().map_or(AFTER_ALL, AsRef::as_ref)
}

/// The place after everything that is visible at a revision; without one, after everything.
pub(super) fn visible(at: Option<Revision>) -> i64 {
    at.map_or(i64::MAX, |at| Place::after(at).sql())
}

/// A number as SQL has it.
pub(super) fn sql(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn missing(column: &str) -> sqlx::Error {
    sqlx::Error::Decode(format!("{column} is NULL").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(revision: u64, size: u64) -> (Place, u64) {
        (Place::after(Revision(revision - 1)), size)
    }

    #[test]
    fn pages_end_with_a_revision() {
        let newest = Revision(99);
        assert_eq!(upto(&[], newest), newest);
        assert_eq!(upto(&[row(5, 1), row(6, 1)], newest), newest);
        let half = EVENT_BYTES_PER_READ / 2 + 1;
        assert_eq!(upto(&[row(5, half), row(6, half)], newest), Revision(5));
        assert_eq!(upto(&[row(5, half), row(5, half), row(6, 1)], newest), Revision(5));
        let many: Vec<_> = (0..EVENTS_PER_READ as u64).map(|n| row(5 + n / 2, 1)).collect();
        assert_eq!(upto(&many, newest), Revision(5 + EVENTS_PER_READ as u64 / 2 - 2));
    }
}
