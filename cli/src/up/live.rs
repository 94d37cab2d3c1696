//! A short live view: members, tunnels and what runs where, until Ctrl-C.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use super::{children::Children, demo, on_terminal};
use crate::{
    error::{Error, Result},
    hub::Hub,
    lists,
    output::{Paint, colours, fit, terminal_width, text_out},
};

const REFRESH: Duration = Duration::from_secs(1);

/// While it lives, the terminal wraps no line, so that a picture's height is known even when its width is not.
struct NoWrap;

impl NoWrap {
    fn set(on: bool) {
        let mut out = io::stdout().lock();
        // A terminal that has gone away needs nothing restored.
        let _ = out.write_all(if on { b"\x1b[?7l" } else { b"\x1b[?7h" }).and_then(|()| out.flush());
    }
}

impl Drop for NoWrap {
    fn drop(&mut self) {
        Self::set(false);
    }
}

/// Runs until a child ends or the caller stops it.
pub(super) async fn run(hub: &Hub, children: &mut Children, demo: bool) -> Result<()> {
    let terminal = on_terminal();
    if !terminal {
        text_out("running; SIGINT or SIGTERM ends it\n")?;
    }
    let _no_wrap = terminal.then(|| {
        NoWrap::set(true);
        NoWrap
    });
    let mut tick = tokio::time::interval(REFRESH);
    let mut lines = 0;
    loop {
        tick.tick().await;
        children.check()?;
        if !terminal {
            continue;
        }
        let view = match picture(hub, demo).await {
            Ok(view) => view,
            Err(error) => format!("{error}\n"),
        };
        let mut out = io::stdout().lock();
        // Back to the start of the former picture, each line cleared as it is written anew.
        let mut text = if lines > 0 { format!("\x1b[{lines}A") } else { String::new() };
        lines = view.lines().count();
        let width = terminal_width();
        for line in view.lines() {
            text.push_str("\x1b[2K");
            text.push_str(&fit(line, width));
            text.push('\n');
        }
        text.push_str("\x1b[J");
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .map_err(|error| Error::failed("draw the live view", error))?;
    }
}

async fn picture(hub: &Hub, demo: bool) -> Result<String> {
    let colour = colours(on_terminal());
    let head = |text: &str| format!("\n{}\n", Paint::Bold.on(text, colour));
    let mut text = head("Members");
    text.push_str(&lists::clusters_table(&lists::gather(hub).await?).render(false, colour));
    text.push_str(&head("Tunnels"));
    text.push_str(&lists::tunnels_table(&hub.tunnels(None).await?.items).render(false, colour));
    if demo {
        text.push_str(&head("shop/web, by cell"));
        text.push_str(&demo::units_table(&demo::units(hub).await?).render(false, colour));
    }
    text.push_str(&format!("\n{}\n", Paint::Faint.on("Ctrl-C ends everything.", colour)));
    Ok(text)
}
