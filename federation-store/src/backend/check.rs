//! Looking whether a database holds what a store may leave in it: the same questions on every database, at one moment.

use sqlx::Connection as _;

use super::sql::{Connection, Dialect};
use crate::files::Checked;
use crate::types::Revision;

/// Rules that hold for every database, as queries for what breaks them: the place of each fault.
const RULES: &[(&str, &str)] = &[
    (
        "a row is newer than the counter",
        "SELECT l.place AS example FROM store_log l, store_state s WHERE l.place >> 20 > s.revision",
    ),
    (
        "the counter's revision has no row",
        "SELECT s.revision * 1048576 AS example FROM store_state s
          WHERE s.revision > 1 AND s.revision > s.compacted
            AND NOT EXISTS (SELECT 1 FROM store_log l WHERE l.place >= s.revision * 1048576)",
    ),
    (
        "compaction is ahead of the counter",
        "SELECT s.compacted * 1048576 AS example FROM store_state s
          WHERE s.compacted > s.revision OR s.swept > s.compacted",
    ),
    (
        "a key's newest row is not the one that is listed",
        "SELECT h.place AS example FROM store_head h
          WHERE NOT EXISTS (SELECT 1 FROM store_log l WHERE l.place = h.place AND l.name = h.name)
             OR EXISTS (SELECT 1 FROM store_log l WHERE l.name = h.name AND l.place > h.place)",
    ),
    (
        "a key is deleted in one table and not in the other",
        "SELECT h.place AS example FROM store_head h JOIN store_log l ON l.place = h.place
          WHERE h.deleted <> l.deleted",
    ),
    (
        "a row's key is not listed",
        "SELECT l.place AS example FROM store_log l
          WHERE NOT EXISTS (SELECT 1 FROM store_head h WHERE h.name = l.name)",
    ),
    (
        "a row replaces one that is missing",
        "SELECT l.place AS example FROM store_log l, store_state s
          WHERE l.prev > 0 AND l.place >> 20 > s.compacted
            AND NOT EXISTS (SELECT 1 FROM store_log p WHERE p.place = l.prev AND p.name = l.name)
            AND l.prev >> 20 > s.compacted",
    ),
    (
        "a row does not continue the one that it replaces",
        "SELECT l.place AS example FROM store_log l JOIN store_log p ON p.place = l.prev
          WHERE p.place >= l.place OR p.name <> l.name
             OR (NOT l.deleted AND NOT p.deleted
                 AND (l.version <> p.version + 1 OR l.create_revision <> p.create_revision))
             OR (NOT l.deleted AND p.deleted AND l.version <> 1)
             OR (l.deleted AND p.deleted)",
    ),
    (
        "a revision after the compaction has no row",
        "SELECT s.revision * 1048576 AS example FROM store_state s
          WHERE (SELECT COUNT(DISTINCT l.place >> 20) FROM store_log l WHERE l.place >> 20 > s.compacted)
                <> s.revision - CASE WHEN s.compacted > 1 THEN s.compacted ELSE 1 END",
    ),
];

const STATE: &str = "SELECT revision, compacted,
                            (SELECT COUNT(*) FROM store_head WHERE NOT deleted),
                            (SELECT COUNT(*) FROM store_log)
                       FROM store_state WHERE id = 1";

/// The version of the schema; 0 without one.
pub(crate) async fn schema<D: Dialect>(connection: &mut Connection<D>) -> Result<i64, sqlx::Error> {
    let row = D::integers(connection, "SELECT MAX(version) FROM store_schema".to_owned()).await?;
    Ok(row.and_then(|row| *row.first()?).unwrap_or_default())
}

/// What there is, and what is wrong with it.
pub(crate) async fn check<D: Dialect>(connection: &mut Connection<D>) -> Result<Checked, sqlx::Error> {
    let mut snapshot = connection.begin_with(D::SNAPSHOT).await?;
    let mut checked =
        Checked { revision: Revision::ZERO, compacted: Revision::ZERO, keys: 0, rows: 0, faults: Vec::new() };
    let Some(state) = D::integers(&mut snapshot, STATE.to_owned()).await? else {
        checked.faults.push("there is no counter".to_owned());
        return Ok(checked);
    };
    let number = |column: usize| {
        let value = state.get(column).copied().flatten().unwrap_or_default();
        u64::try_from(value).unwrap_or_default()
    };
    checked.revision = Revision(number(0));
    checked.compacted = Revision(number(1));
    checked.keys = number(2);
    checked.rows = number(3);
    for (rule, query) in RULES {
        let query = format!("SELECT COUNT(*), MIN(example) FROM ({query}) found");
        let row = D::integers(&mut snapshot, query).await?.unwrap_or_default();
        let (count, place) = (row.first().copied().flatten(), row.get(1).copied().flatten());
        if let Some(count) = count.filter(|count| *count > 0) {
            let revision = place.unwrap_or_default() >> 20;
            checked.faults.push(format!("{rule}: {count} times, first at revision {revision}"));
        }
    }
    snapshot.commit().await?;
    Ok(checked)
}
