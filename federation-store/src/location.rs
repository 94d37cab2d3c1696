//! Where a store is: a SQLite file, a PostgreSQL or a MySQL database, named by a URL as their users write it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sqlx::ConnectOptions as _;
use sqlx::mysql::MySqlConnectOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;

use crate::backend::mysql::{self, MySqlBackend, MySqlDialect};
use crate::backend::postgres::{self, PostgresBackend, PostgresDialect};
use crate::backend::sql::{Connection, Dialect};
use crate::backend::sqlite::{SqliteBackend, SqliteDialect};
use crate::backend::{Backend, check};
use crate::error::OpenError;
use crate::files::Checked;

/// How long a connection for a look may take to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Parameters that a PostgreSQL URL may have. The driver passes over others, and a misspelt `sslmode` must not be passed
/// over.
const POSTGRES_PARAMETERS: &[&str] = &[
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

/// The same for MySQL.
const MYSQL_PARAMETERS: &[&str] = &[
    "sslmode",
    "ssl-mode",
    "sslca",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "charset",
    "collation",
    "socket",
];

/// A database. It shows itself without its password.
///
/// | database | URL |
/// |---|---|
/// | SQLite | `sqlite:///path/to/file`, `sqlite:relative/path`, `sqlite::memory:` |
/// | PostgreSQL | `postgres://user:password@host:5432/database?sslmode=verify-full&sslrootcert=/ca.pem` |
/// | MySQL, MariaDB, OceanBase | `mysql://user:password@host:3306/database?ssl-mode=VERIFY_IDENTITY&ssl-ca=/ca.pem` |
///
/// Client certificates are `sslcert` and `sslkey` (`ssl-cert`, `ssl-key`). What a URL cannot hold is percent-encoded.
#[derive(Clone)]
pub struct Location(Kind);

#[derive(Clone)]
enum Kind {
    Memory,
    Sqlite { path: PathBuf, exclusive: bool },
    Postgres { options: Box<PgConnectOptions>, shown: String },
    MySql { options: Box<MySqlConnectOptions>, shown: String },
}

// === impl Location ===

impl Location {
    /// A SQLite file, or `:memory:`.
    pub fn sqlite(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self(if path.as_os_str() == ":memory:" {
            Kind::Memory
        } else {
            Kind::Sqlite { path, exclusive: false }
        })
    }

    /// A SQLite file for this process alone: nobody has to be asked what others have written.
    pub fn exclusive_sqlite(path: impl Into<PathBuf>) -> Self {
        Self(Kind::Sqlite { path: path.into(), exclusive: true })
    }

    /// Reads a URL.
    pub fn parse(url: &str) -> Result<Self, OpenError> {
        let refused = |reason: String| OpenError::Url { url: without_password(url), reason };
        let Some((scheme, rest)) = url.split_once(':') else {
            return Err(refused("it has no scheme".to_owned()));
        };
        match scheme {
            "sqlite" => {
                let path = rest.strip_prefix("//").unwrap_or(rest);
                if path.is_empty() || path.contains('?') {
                    return Err(refused("a file is wanted, without parameters".to_owned()));
                }
                Ok(Self::sqlite(path))
            }
            "postgres" | "postgresql" => {
                known(url, POSTGRES_PARAMETERS).map_err(refused)?;
                // The driver's message may hold parts of the URL, so it is not shown.
                let options =
                    postgres::options(url).map_err(|_| refused("it cannot be parsed".to_owned()))?;
                Ok(Self(Kind::Postgres { options: Box::new(options), shown: without_password(url) }))
            }
            "mysql" | "mariadb" => {
                known(url, MYSQL_PARAMETERS).map_err(refused)?;
                let options = mysql::options(url).map_err(|_| refused("it cannot be parsed".to_owned()))?;
                if options.get_database().is_none() {
                    return Err(refused("it names no database".to_owned()));
                }
                Ok(Self(Kind::MySql { options: Box::new(options), shown: without_password(url) }))
            }
            other => Err(refused(format!("{other:?} is not a scheme that is known"))),
        }
    }

    /// The file, when it is one.
    pub fn sqlite_path(&self) -> Option<&std::path::Path> {
        match &self.0 {
            Kind::Sqlite { path, .. } => Some(path),
            _ => None,
        }
    }

    /// Checks what is there. Nothing is made or changed.
    pub(crate) async fn look(&self) -> Result<Looked, sqlx::Error> {
        match &self.0 {
            // Nobody else's, and nothing is in it.
            Kind::Memory => look::<SqliteDialect>(SqliteConnectOptions::new().in_memory(true)).await,
            Kind::Sqlite { path, .. } => {
                let options = SqliteConnectOptions::new().filename(path).read_only(true);
                look::<SqliteDialect>(options).await
            }
            Kind::Postgres { options, .. } => look::<PostgresDialect>(PgConnectOptions::clone(options)).await,
            Kind::MySql { options, .. } => {
                // As the store itself does: only what is asked for.
                let options =
                    options.clone().timezone(None).pipes_as_concat(false).no_engine_substitution(false);
                look::<MySqlDialect>(options).await
            }
        }
    }

    pub(crate) async fn open(&self) -> Result<Arc<dyn Backend>, OpenError> {
        Ok(match &self.0 {
            Kind::Memory => Arc::new(SqliteBackend::in_memory().await?),
            Kind::Sqlite { path, exclusive } => Arc::new(SqliteBackend::open(path, *exclusive).await?),
            Kind::Postgres { options, shown } => Arc::new(PostgresBackend::open(options, shown).await?),
            Kind::MySql { options, shown } => Arc::new(MySqlBackend::open(options, shown).await?),
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Memory => f.write_str("sqlite::memory:"),
            Kind::Sqlite { path, .. } => write!(f, "sqlite://{}", path.display()),
            Kind::Postgres { shown, .. } | Kind::MySql { shown, .. } => f.write_str(shown),
        }
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What [`Location::look`] tells.
pub(crate) enum Looked {
    /// Of another schema the questions make no sense.
    Schema {
        found: i64,
        known: i64,
    },
    Checked(Checked),
}

async fn look<D: Dialect>(
    options: <Connection<D> as sqlx::Connection>::Options,
) -> Result<Looked, sqlx::Error> {
    let options = options.disable_statement_logging();
    let connecting = tokio::time::timeout(CONNECT_TIMEOUT, options.connect());
    let mut connection = connecting.await.map_err(|_| {
        let text = format!("no connection within {CONNECT_TIMEOUT:?}");
        sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, text))
    })??;
    D::before_look(&mut connection).await?;
    let (found, known) = (check::schema::<D>(&mut connection).await?, D::SCHEMA);
    let looked = if found == known {
        Looked::Checked(check::check::<D>(&mut connection).await?)
    } else {
        Looked::Schema { found, known }
    };
    // What it had to say it has said.
    let _ = sqlx::Connection::close(connection).await;
    Ok(looked)
}

/// The parameter that nobody would heed, if there is one.
fn known(url: &str, parameters: &[&str]) -> Result<(), String> {
    let Some((_, query)) = url.split_once('?') else { return Ok(()) };
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let name = pair.split('=').next().unwrap_or(pair);
        // PostgreSQL's options[name].
        let name = name.split(['[', '%']).next().unwrap_or(name);
        if !parameters.contains(&name) {
            return Err(format!("{name:?} is not a parameter that is known"));
        }
    }
    Ok(())
}

/// The URL up to its parameters, which may hold a password too, and without the one before the host.
fn without_password(url: &str) -> String {
    let url = url.split_once('?').map_or(url, |(url, _)| url);
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    // The last @ of all: a password that should have been encoded may hold others, and slashes.
    let Some((user, host)) = rest.rsplit_once('@') else { return url.to_owned() };
    let user = user.split(':').next().unwrap_or(user);
    format!("{scheme}://{user}@{host}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for (url, shown) in [
            ("sqlite:///var/lib/hub.db", "sqlite:///var/lib/hub.db"),
            ("sqlite:hub.db", "sqlite://hub.db"),
            ("sqlite::memory:", "sqlite::memory:"),
            ("postgres://u:p%40@db:5432/hub?sslmode=require", "postgres://u@db:5432/hub"),
            ("postgresql://u@db/hub?user=x&password=secret", "postgresql://u@db/hub"),
            ("postgres:///hub?host=/run/postgresql&options[search_path]=s", "postgres:///hub"),
            ("mysql://u:secret@db/hub?ssl-mode=VERIFY_CA&ssl-ca=/ca.pem", "mysql://u@db/hub"),
        ] {
            let location = Location::parse(url).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!(location.to_string(), shown);
            assert_eq!(format!("{location:?}"), shown);
        }
        assert_eq!(Location::parse("sqlite:///a/b").unwrap().sqlite_path(), Some("/a/b".as_ref()));
    }

    #[test]
    fn refused_urls_keep_their_secret() {
        for (url, reason) in [
            ("", "no scheme"),
            ("hub.db", "no scheme"),
            ("oracle://u:secret@db/hub", "not a scheme"),
            ("sqlite://", "a file is wanted"),
            ("sqlite:///hub.db?mode=ro", "a file is wanted"),
            ("mysql://u:secret@db", "no database"),
            ("mysql://u:secret@db/hub?ssl_ca=/ca.pem", "ssl_ca"),
            ("postgres://u:secret@db/hub?sslmod=require", "sslmod"),
            ("postgres://u:secret@db/hub?sslmode=reqire", "cannot be parsed"),
        ] {
            let error = Location::parse(url).expect_err(url).to_string();
            assert!(error.contains(reason), "{url}: {error}");
            assert!(!error.contains("sec"), "{error}");
        }
    }
}
