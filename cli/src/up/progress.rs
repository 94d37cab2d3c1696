//! Showing what goes on: one line for each step, rewritten while it lasts if this is a terminal.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Instant,
};

use crate::output::{Paint, colours, fit, terminal_width, visible};

/// Shows steps on the standard output.
pub(super) struct Progress {
    terminal: bool,
    colours: bool,
}

impl Progress {
    pub(super) fn new() -> Self {
        let terminal = io::stdout().is_terminal();
        Self { terminal, colours: colours(terminal) }
    }

    /// Begins a step.
    pub(super) fn step(&mut self, text: &str) -> Step<'_> {
        let mut step =
            Step { progress: self, text: text.to_owned(), start: Instant::now(), shown: String::new() };
        step.note("");
        step
    }

    /// A line between steps.
    pub(super) fn say(&mut self, text: &str, paint: Paint) {
        self.write(&format!("{}\n", paint.on(text, self.colours)));
    }

    fn write(&self, text: &str) {
        let mut out = io::stdout().lock();
        // A terminal that has gone away is no reason to stop.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

/// A step under way. Dropping it unfinished marks it as failed.
pub(super) struct Step<'a> {
    progress: &'a mut Progress,
    text: String,
    start: Instant,
    shown: String,
}

impl Step<'_> {
    /// Shows how far it is.
    pub(super) fn note(&mut self, note: &str) {
        if !self.progress.terminal || (note == self.shown && !note.is_empty()) {
            return;
        }
        self.shown = note.to_owned();
        let mark = Paint::Warn.on("…", self.progress.colours);
        let note = Paint::Faint.on(note, self.progress.colours);
        // A line that wraps cannot be rewritten.
        let line = fit(&format!("{mark} {} {note}", self.text), terminal_width());
        self.progress.write(&format!("\r\x1b[2K{line}"));
    }

    /// Ends it well.
    pub(super) fn finish(mut self, text: &str) {
        self.end("✓", Paint::Good, text);
    }

    fn end(&mut self, mark: &str, paint: Paint, text: &str) {
        let took = format!("{:.1} s", self.start.elapsed().as_secs_f64());
        let line = format!(
            "{}{} {text} {}\n",
            if self.progress.terminal { "\r\x1b[2K" } else { "" },
            paint.on(mark, self.progress.colours),
            Paint::Faint.on(&took, self.progress.colours)
        );
        self.progress.write(&line);
        self.text.clear();
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        if !self.text.is_empty() {
            let text = std::mem::take(&mut self.text);
            let note =
                if self.shown.is_empty() { String::new() } else { format!(" ({})", visible(&self.shown)) };
            self.end("✗", Paint::Bad, &format!("{text}{note}"));
        }
    }
}
