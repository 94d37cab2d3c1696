//! Leases in SQL: the same few statements everywhere, so they are written once for every driver's connection.
//!
//! ```text
//! store_lease      each lease with its end
//! store_log.lease  the lease of the row's key; indexed where it is not 0. A key is attached by its newest row
//! ```

/// Expands to the functions for one driver, given its connection and how it writes its first three parameters.
macro_rules! lease_functions {
    ($connection:ty, $first:literal, $second:literal, $third:literal) => {
        /// Adds to a basis the leases that a batch names, and the keys that its revocations will delete.
        async fn read_leases(
            connection: &mut $connection,
            transactions: &[Transaction],
            basis: &mut Basis,
        ) -> Result<(), sqlx::Error> {
            let named: std::collections::BTreeSet<i64> =
                transactions.iter().flat_map(Transaction::leases).collect();
            for id in named {
                if let Some(lease) = read_lease(connection, id).await? {
                    basis.leases.insert(id, lease);
                }
            }
            for id in transactions.iter().filter_map(Transaction::revoked) {
                for row in &attached!($connection, $first, "l.*").bind(id).fetch_all(&mut *connection).await?
                {
                    let record = record_of(row)?;
                    basis.heads.insert(record.key.clone(), record);
                }
            }
            Ok(())
        }

        /// Writes what a batch makes of leases.
        async fn write_leases(
            connection: &mut $connection,
            leases: &std::collections::BTreeMap<i64, Option<crate::types::Lease>>,
        ) -> Result<(), sqlx::Error> {
            for (id, lease) in leases {
                sqlx::query(concat!("DELETE FROM store_lease WHERE id = ", $first))
                    .bind(id)
                    .execute(&mut *connection)
                    .await?;
                if let Some(lease) = lease {
                    sqlx::query(concat!(
                        "INSERT INTO store_lease (id, ttl, expires_at) VALUES (",
                        $first,
                        ", ",
                        $second,
                        ", ",
                        $third,
                        ")"
                    ))
                    .bind(lease.id)
                    .bind(lease.ttl)
                    .bind(lease.expires_at)
                    .execute(&mut *connection)
                    .await?;
                }
            }
            Ok(())
        }

        async fn read_lease(
            connection: &mut $connection,
            id: i64,
        ) -> Result<Option<crate::types::Lease>, sqlx::Error> {
            let row = sqlx::query(concat!("SELECT id, ttl, expires_at FROM store_lease WHERE id = ", $first))
                .bind(id)
                .fetch_optional(connection)
                .await?;
            row.map(|row| crate::backend::rows::lease_of(&row)).transpose()
        }

        async fn all_leases(connection: &mut $connection) -> Result<Vec<crate::types::Lease>, sqlx::Error> {
            let rows =
                sqlx::query("SELECT id, ttl, expires_at FROM store_lease").fetch_all(connection).await?;
            rows.iter().map(crate::backend::rows::lease_of).collect()
        }

        async fn leased_keys(
            connection: &mut $connection,
            id: i64,
        ) -> Result<Vec<bytes::Bytes>, sqlx::Error> {
            let rows = attached!($connection, $first, "l.name").bind(id).fetch_all(connection).await?;
            let mut keys = rows
                .iter()
                .map(|row| Ok(row.try_get::<Vec<u8>, _>("name")?.into()))
                .collect::<Result<Vec<bytes::Bytes>, sqlx::Error>>()?;
            keys.sort_unstable();
            Ok(keys)
        }
    };
}

/// The newest rows of the keys that are attached to a lease. The index is one of rows with a lease.
macro_rules! attached {
    ($connection:ty, $first:literal, $columns:literal) => {
        sqlx::query(concat!(
            "SELECT ",
            $columns,
            " FROM store_log l JOIN store_head h ON h.name = l.name AND h.place = l.place
               WHERE l.lease <> 0 AND l.lease = ",
            $first,
            " AND NOT l.deleted"
        ))
    };
}

pub(super) use {attached, lease_functions};
