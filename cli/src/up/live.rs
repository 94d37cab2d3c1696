//! A short live view: members, tunnels and what runs where, until Ctrl-C.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use proxy_server::rows::TunnelRow;

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

/// What there is to show.
struct Seen {
    clusters: Vec<lists::Cluster>,
    tunnels: Vec<TunnelRow>,
    /// Of the demo's application, where it runs.
    units: Option<Vec<demo::Unit>>,
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
        let view = match look(hub, demo).await {
            Ok(seen) => picture(&seen, colours(terminal)),
            Err(error) => format!("{error}\n"),
        };
        let mut out = io::stdout().lock();
        let text = over(lines, &view, terminal_width());
        lines = view.lines().count();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .map_err(|error| Error::failed("draw the live view", error))?;
    }
}

async fn look(hub: &Hub, demo: bool) -> Result<Seen> {
    Ok(Seen {
        clusters: lists::gather(hub).await?,
        tunnels: hub.tunnels(None).await?.items,
        units: if demo { Some(demo::units(hub).await?) } else { None },
    })
}

fn picture(seen: &Seen, colour: bool) -> String {
    let head = |text: &str| format!("\n{}\n", Paint::Bold.on(text, colour));
    let mut text = head("Members");
    text.push_str(&lists::clusters_table(&seen.clusters).render(false, colour));
    text.push_str(&head("Tunnels"));
    text.push_str(&lists::tunnels_table(&seen.tunnels).render(false, colour));
    if let Some(units) = &seen.units {
        text.push_str(&head("shop/web, by cell"));
        text.push_str(&demo::units_table(units).render(false, colour));
    }
    text.push_str(&format!("\n{}\n", Paint::Faint.on("Ctrl-C ends everything.", colour)));
    text
}

/// What draws `view` over a former picture of so many `lines`: back to its start, and each line cleared as it is written anew.
fn over(lines: usize, view: &str, width: Option<usize>) -> String {
    let mut text = if lines > 0 { format!("\x1b[{lines}A") } else { String::new() };
    for line in view.lines() {
        text.push_str("\x1b[2K");
        text.push_str(&fit(line, width));
        text.push('\n');
    }
    text.push_str("\x1b[J");
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn seen() -> Seen {
        let clusters = json!([
            {"name": "east", "ready": true, "conditions": [], "tunnels": 1, "carriers": ["quic"],
             "connections": 3, "rttMillis": 0.5, "kubernetesVersion": "v1.37.0"},
            {"name": "west", "ready": false, "conditions": [], "tunnels": 0, "carriers": [], "connections": 0},
        ]);
        let tunnels = json!([{"id": 7, "cluster": "east", "agentId": "east-agent", "carrier": "quic",
            "remoteAddr": "198.51.100.3:4711", "connections": 3, "connectedAt": "2026-01-01T00:00:00Z"}]);
        let units = json!([
            {"name": "east-a", "cluster": "east", "phase": "Synced", "revision": "web-2",
             "observed": {"replicas": 3, "readyReplicas": 2}},
        ]);
        Seen {
            clusters: serde_json::from_value(clusters).unwrap(),
            tunnels: serde_json::from_value(tunnels).unwrap(),
            units: Some(serde_json::from_value(units).unwrap()),
        }
    }

    /// The line below `head` that begins with `name`, without its padding.
    fn row(picture: &str, head: &str, name: &str) -> String {
        let below = picture.lines().skip_while(|line| *line != head).skip(1);
        let mut part = below.take_while(|line| !line.is_empty());
        let found = part.find(|line| line.split_whitespace().next() == Some(name));
        let found = found.unwrap_or_else(|| panic!("no {name} below {head} in\n{picture}"));
        found.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_picture_shows_who_is_there_and_what_runs_where() {
        let picture = picture(&seen(), false);
        assert!(row(&picture, "Members", "east").starts_with("east yes 1 quic"), "{picture}");
        assert!(row(&picture, "Members", "west").starts_with("west no 0 -"), "{picture}");
        let tunnel = row(&picture, "Tunnels", "east");
        assert!(tunnel.starts_with("east east-agent quic 198.51.100.3:4711"), "{picture}");
        assert_eq!(row(&picture, "shop/web, by cell", "east-a"), "east-a east Synced web-2 2/3", "{picture}");
        assert!(picture.ends_with("\nCtrl-C ends everything.\n"), "{picture}");
        assert!(!picture.contains('\x1b'), "nobody asked for colours: {picture:?}");
    }

    #[test]
    fn without_the_demo_and_without_members_it_says_so() {
        let nothing = Seen { clusters: Vec::new(), tunnels: Vec::new(), units: None };
        let picture = picture(&nothing, false);
        for what in ["no clusters yet: `cellway cluster add NAME`", "no tunnels: no agent is connected"] {
            assert!(picture.contains(what), "{picture}");
        }
        assert!(!picture.contains("by cell"), "{picture}");
    }

    #[test]
    fn a_picture_takes_the_place_of_the_former_one() {
        assert_eq!(over(0, "a\nb\n", None), "\x1b[2Ka\n\x1b[2Kb\n\x1b[J");
        assert_eq!(over(2, "c\n", None), "\x1b[2A\x1b[2Kc\n\x1b[J", "and nothing of it is left below");
    }
}
