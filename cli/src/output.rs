//! Printing: tables for people, JSON and YAML for programs, colours only where somebody sees them.
//!
//! What objects, events, members and agents say of themselves is printed so that it can be read and does nothing to the
//! terminal (kubectl's CVE-2021-25743): [`Cell::new`] and [`Paint::on`] see to it, as do errors and [`json`] and [`yaml`]; a
//! text that is put together otherwise goes through [`visible`] or [`visible_lines`]. Only lines of containers' logs are passed
//! on as they are, as kubectl does: whoever reads them wants their colours, too.

use std::borrow::Cow;
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

/// Whether a terminal does something at this character instead of showing it: C0 and C1 controls, DEL, separators of lines,
/// and what turns the direction of the text around it (UAX #9, explicit formatting characters and marks).
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `text` on one line, with everything shown that would act on the terminal: `^[` for an escape, as kubectl shows it, `\n` for
/// the end of a line, `\u{202e}` for what has no shorter name. What is visible stays as it is.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    shown(text, false)
}

/// The same for a text of several lines.
pub(crate) fn visible_lines(text: &str) -> Cow<'_, str> {
    shown(text, true)
}

fn shown(text: &str, lines: bool) -> Cow<'_, str> {
    let acts = |c: char| acts(c) && !(lines && c == '\n');
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            c if !acts(c) => shown.push(c),
            '\n' | '\r' | '\t' => shown.extend(c.escape_default()),
            // Caret notation: the letter that makes it together with the control key.
            '\0'..='\x1f' | '\x7f' => shown.extend(['^', char::from(c as u8 ^ 0x40)]),
            c => shown.extend(c.escape_unicode()),
        }
    }
    Cow::Owned(shown)
}

impl Paint {
    /// `text` in this colour if `colours` are wanted; on one line, as [`visible`] shows it.
    pub(crate) fn on(self, text: &str, colours: bool) -> String {
        let text = visible(text);
        let code = match self {
            Self::Plain => return text.into_owned(),
            Self::Good => "32",
            Self::Warn => "33",
            Self::Bad => "31",
            Self::Faint => "2",
            Self::Bold => "1",
        };
        if colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into_owned() }
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
        Self { text: visible(&text.to_string()).into_owned(), paint: Paint::Plain }
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
    let text = match format {
        Format::Json => json(value)?,
        Format::Yaml => yaml(value)?,
        Format::Table | Format::Wide => {
            table(value).render(format == Format::Wide, colours(io::stdout().is_terminal()))
        }
    };
    text_out(&text)
}

/// `value` as JSON, with what the encoder leaves as it is (DEL, C1, bidi) escaped as well: it is inside strings only, where an
/// escape means the same.
pub(crate) fn json<T: Serialize>(value: &T) -> Result<String> {
    let encoded = serde_json::to_string_pretty(value).map_err(|error| Error::failed(TRIED, error))?;
    let mut text = String::with_capacity(encoded.len() + 1);
    for c in encoded.chars() {
        // Between strings the encoder puts ends of lines; all others are below U+10000, so that one escape says them.
        if acts(c) && c != '\n' { text.push_str(&format!("\\u{:04x}", u32::from(c))) } else { text.push(c) }
    }
    text.push('\n');
    Ok(text)
}

/// `value` as YAML. Where the encoder would leave something as it is that acts on a terminal (it does with bidi controls), it is
/// in its JSON form, which is YAML as well.
pub(crate) fn yaml<T: Serialize>(value: &T) -> Result<String> {
    let text = serde_yaml_ng::to_string(value).map_err(|error| Error::failed(TRIED, error))?;
    if text.contains(|c| acts(c) && c != '\n') { json(value) } else { Ok(text) }
}

/// What printing is called in errors.
const TRIED: &str = "print the result";

/// Writes to the standard output, as it is. A reader that has gone away (`| head`) is not an error.
pub(crate) fn text_out(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::failed(TRIED, error)),
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

    /// What a member may put into an event: a title for the window, an erased line, a C1 sequence, a text turned round.
    const HOSTILE: &str = "\x1b]0;owned\x07 a\rb\n\u{9b}2K\x7f\u{202e}txt\u{2066}é\t.";

    #[test]
    fn nothing_that_others_say_acts_on_the_terminal() {
        let shown = r"^[]0;owned^G a\rb\n\u{9b}2K^?\u{202e}txt\u{2066}é\t.";
        assert_eq!(visible(HOSTILE), shown);
        assert_eq!(visible(shown), shown, "shown once is shown");
        assert_eq!(visible_lines("one\ntwo\x1b"), "one\ntwo^[");
        assert!(matches!(visible("as it is: Größe 3 → 4 \\n"), Cow::Borrowed(_)));

        let mut table = Table::new("nothing").columns(&["A", "B"]);
        table.row(vec![Cell::new(HOSTILE), Cell::option(Some(HOSTILE)).paint(Paint::Bad)]);
        let plain = table.render(true, false);
        assert_eq!(plain, format!("A{}B\n{shown}   {shown}\n", " ".repeat(shown.chars().count() + 2)));
        let coloured = table.render(true, true);
        assert_eq!(coloured.replace("\x1b[31m", "").replace("\x1b[1m", "").replace("\x1b[0m", ""), plain);
        assert_eq!(Paint::Good.on(HOSTILE, true), format!("\x1b[32m{shown}\x1b[0m"));
    }

    #[test]
    fn what_is_printed_for_programs_says_the_same_and_acts_on_nothing() {
        let value = serde_json::json!({"message": HOSTILE, "plain": "a\nb", "last": "\u{202d}only this"});
        let quiet = |text: &str| !text.contains(|c| acts(c) && c != '\n');
        let text = json(&value).unwrap();
        assert!(quiet(&text), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
        for part in ["message", "plain", "last"] {
            let text = yaml(&value[part]).unwrap();
            assert!(quiet(&text), "{text:?}");
            assert_eq!(serde_yaml_ng::from_str::<serde_json::Value>(&text).unwrap(), value[part]);
        }
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
