//! Printing: tables for people, JSON and YAML for programs, colours only where somebody sees them.

use std::io::{self, IsTerminal as _, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::error::{Error, Result};

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns for people.
    #[default]
    Table,
    /// The same with more columns.
    Wide,
    Json,
    Yaml,
}

#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct OutputArgs {
    /// How to print the result.
    #[arg(short, long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) output: Format,
}

/// The few colours there are, by what they mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Paint {
    Plain,
    Good,
    Warn,
    Bad,
    Faint,
    Bold,
}

/// Whether `stream` wants colours: a terminal, and nobody asked for none.
pub(crate) fn colours(is_terminal: bool) -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|value| value == "dumb");
    is_terminal && !refused && !dumb
}

impl Paint {
    /// `text` in this colour if `colours` are wanted.
    pub(crate) fn on(self, text: &str, colours: bool) -> String {
        let code = match self {
            Self::Plain => return text.to_owned(),
            Self::Good => "32",
            Self::Warn => "33",
            Self::Bad => "31",
            Self::Faint => "2",
            Self::Bold => "1",
        };
        if colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// One field of a table.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    text: String,
    paint: Paint,
}

impl Cell {
    pub(crate) fn new(text: impl ToString) -> Self {
        Self { text: text.to_string(), paint: Paint::Plain }
    }

    pub(crate) fn paint(mut self, paint: Paint) -> Self {
        self.paint = paint;
        self
    }

    /// A value that may be missing.
    pub(crate) fn option<T: ToString>(value: Option<T>) -> Self {
        match value {
            Some(value) => Self::new(value),
            None => Self::new("-").paint(Paint::Faint),
        }
    }
}

/// Rows under a head, aligned. Columns marked wide appear only in [`Format::Wide`].
#[derive(Debug, Default)]
pub(crate) struct Table {
    columns: Vec<(String, bool)>,
    rows: Vec<Vec<Cell>>,
    empty: String,
}

impl Table {
    /// A table that says `empty` when it has no rows.
    pub(crate) fn new(empty: &str) -> Self {
        Self { empty: empty.to_owned(), ..Self::default() }
    }

    pub(crate) fn columns(mut self, names: &[&str]) -> Self {
        self.columns.extend(names.iter().map(|name| ((*name).to_owned(), false)));
        self
    }

    pub(crate) fn wide_columns(mut self, names: &[&str]) -> Self {
        self.columns.extend(names.iter().map(|name| ((*name).to_owned(), true)));
        self
    }

    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    pub(crate) fn render(&self, wide: bool, colours: bool) -> String {
        if self.rows.is_empty() {
            return format!("{}\n", self.empty);
        }
        let shown: Vec<usize> =
            (0..self.columns.len()).filter(|index| wide || !self.columns[*index].1).collect();
        let width = |text: &str| text.chars().count();
        let widths: Vec<usize> = shown
            .iter()
            .map(|index| {
                let cells = self.rows.iter().filter_map(|row| row.get(*index)).map(|cell| width(&cell.text));
                cells.chain([width(&self.columns[*index].0)]).max().unwrap_or_default()
            })
            .collect();
        let mut text = String::new();
        let mut line = |cells: Vec<(&str, Paint)>| {
            for (at, (cell, paint)) in cells.iter().enumerate() {
                text.push_str(&paint.on(cell, colours));
                if at + 1 < cells.len() {
                    // Padding after the paint: escape sequences have no width.
                    text.extend(std::iter::repeat_n(' ', widths[at] - width(cell) + 3));
                }
            }
            // An empty last field leaves its padding behind.
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
        };
        line(shown.iter().map(|index| (self.columns[*index].0.as_str(), Paint::Bold)).collect());
        for row in &self.rows {
            line(
                shown
                    .iter()
                    .map(|index| {
                        row.get(*index).map_or(("", Paint::Plain), |cell| (cell.text.as_str(), cell.paint))
                    })
                    .collect(),
            );
        }
        text
    }
}

/// Prints `value` in the format that was asked for; `table` makes its table.
pub(crate) fn print<T: Serialize>(format: Format, value: &T, table: impl FnOnce(&T) -> Table) -> Result<()> {
    let tried = "print the result";
    let text = match format {
        Format::Json => {
            let mut text =
                serde_json::to_string_pretty(value).map_err(|error| Error::failed(tried, error))?;
            text.push('\n');
            text
        }
        Format::Yaml => serde_yaml_ng::to_string(value).map_err(|error| Error::failed(tried, error))?,
        Format::Table | Format::Wide => {
            table(value).render(format == Format::Wide, colours(io::stdout().is_terminal()))
        }
    };
    text_out(&text)
}

/// Writes to the standard output. A reader that has gone away (`| head`) is not an error.
pub(crate) fn text_out(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::failed("print the result", error))
        }
        _ => Ok(()),
    }
}

/// The columns of the terminal that the standard output is, if it is one and says so.
pub(crate) fn terminal_width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}

/// `line` in at most `width` columns; what is cut off leaves a `…`. Colours have no width, and end with the line.
pub(crate) fn fit(line: &str, width: Option<usize>) -> String {
    let Some(width) = width else { return line.to_owned() };
    let (mut text, mut cut, mut used, mut escape) = (String::new(), None, 0, false);
    for c in line.chars() {
        if c == '\x1b' {
            escape = true;
        } else if escape {
            escape = !c.is_ascii_alphabetic();
        } else {
            used += 1;
            if used == width {
                cut = Some(text.len());
            }
        }
        if used <= width {
            text.push(c);
        }
    }
    match cut {
        Some(cut) if used > width => {
            text.truncate(cut);
            text.push('…');
            if text.contains('\x1b') {
                text.push_str("\x1b[0m");
            }
            text
        }
        _ => line.to_owned(),
    }
}

/// This program as somebody can type it: by its name where the PATH leads to it, else by its path.
pub(crate) fn own_command() -> String {
    const NAME: &str = "cellway";
    let Ok(own) = std::env::current_exe() else { return NAME.to_owned() };
    let on_path = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path)
            .any(|folder| folder.join(NAME).canonicalize().is_ok_and(|found| found == own))
    });
    if on_path { NAME.to_owned() } else { own.display().to_string() }
}

/// `1.5 GiB`, for people.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// `0.4 ms`, for people.
pub(crate) fn millis(value: f64) -> String {
    if value < 10.0 { format!("{value:.1} ms") } else { format!("{value:.0} ms") }
}

/// How long ago an RFC 3339 time was, as kubectl shows ages; the text itself when it is not one.
pub(crate) fn age(time: &str, now: jiff::Timestamp) -> String {
    let Ok(then) = time.parse::<jiff::Timestamp>() else { return time.to_owned() };
    let seconds = now.duration_since(then).as_secs().max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligns_and_hides_wide_columns() {
        let mut table = Table::new("nothing").columns(&["NAME", "RTT"]).wide_columns(&["ID"]);
        table.row(vec![Cell::new("east"), Cell::new("0.4 ms"), Cell::new(7)]);
        table.row(vec![Cell::new("west-long"), Cell::option::<u8>(None), Cell::new(8)]);
        assert_eq!(table.render(false, false), "NAME        RTT\neast        0.4 ms\nwest-long   -\n");
        assert_eq!(table.render(true, false).lines().next(), Some("NAME        RTT      ID"));
        assert!(table.render(false, true).contains("\x1b[2m-\x1b[0m"));
        assert_eq!(Table::new("nothing").columns(&["A"]).render(false, true), "nothing\n");
    }

    #[test]
    fn lines_fit_the_terminal() {
        assert_eq!(fit("12345", Some(5)), "12345");
        assert_eq!(fit("123456", Some(5)), "1234…");
        assert_eq!(fit("123456", None), "123456");
        assert_eq!(
            fit("\x1b[32myes\x1b[0m   \x1b[2mno\x1b[0m", Some(8)),
            "\x1b[32myes\x1b[0m   \x1b[2mno\x1b[0m"
        );
        assert_eq!(
            fit("\x1b[32myes\x1b[0m   \x1b[2mno\x1b[0m", Some(7)),
            "\x1b[32myes\x1b[0m   \x1b[2m…\x1b[0m"
        );
        assert_eq!(fit("ééé", Some(2)), "é…");
    }

    #[test]
    fn figures_for_people() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(3 * 1024 * 1024 / 2), "1.5 MiB");
        assert_eq!(millis(0.4), "0.4 ms");
        assert_eq!(millis(12.6), "13 ms");
        let now = "2026-01-01T01:00:00Z".parse().unwrap();
        assert_eq!(age("2026-01-01T00:59:30Z", now), "30s");
        assert_eq!(age("2026-01-01T00:00:00Z", now), "60m");
        assert_eq!(age("2025-12-01T00:00:00Z", now), "31d");
        assert_eq!(age("later", now), "later");
    }
}
