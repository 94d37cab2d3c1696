//! `cargo xtask check`: everything that is verified without running a test. The quick parts come first.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    arrows, generate,
    shell::{Cmd, root},
};

pub(crate) fn run(quick: bool) -> Result<()> {
    let mut problems = Vec::new();
    if Cmd::new("cargo").args(["fmt", "--all", "--check"]).run().is_err() {
        problems.push("the format is not rustfmt's: run `cargo fmt --all`".to_owned());
    }
    let metadata =
        Cmd::new("cargo").args(["metadata", "--no-deps", "--format-version", "1", "--locked"]).read()?;
    let metadata = serde_json::from_slice(&metadata).context("cargo metadata did not print JSON")?;
    let picture = root()?.join("ARCHITECTURE.md");
    let picture =
        fs::read_to_string(&picture).with_context(|| format!("cannot read {}", picture.display()))?;
    problems.extend(arrows::violations(&metadata, &picture)?);
    problems.extend(files_without_purpose()?);
    problems.extend(broken_links()?);
    problems.extend(generate::stale_messages()?);
    problems.extend(stale_fuzz_lock());
    if !problems.is_empty() {
        bail!("{} problem(s):\n  {}", problems.len(), problems.join("\n  "));
    }
    if quick {
        return Ok(());
    }
    Cmd::new("cargo")
        .args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])
        .run()?;
    eprintln!("check: all good");
    Ok(())
}

/// The fuzz targets' own lock file does not follow the workspace's by itself. Nothing is downloaded but what it names.
fn stale_fuzz_lock() -> Option<String> {
    let manifest = "fuzz/Cargo.toml";
    let resolved = ["metadata", "--locked", "--format-version", "1", "--manifest-path", manifest];
    let told = "its lock file does not fit the workspace: run `cargo metadata --manifest-path fuzz/Cargo.toml`, which changes it as little as may be";
    Cmd::new("cargo").args(resolved).read().err().map(|_| format!("{manifest}: {told}"))
}

/// The files of the project with this ending: tracked ones, and new ones that are not ignored.
fn files(pattern: &str) -> Result<Vec<PathBuf>> {
    let listed = Cmd::new("git")
        .args(["ls-files", "-co", "--exclude-standard", "--deduplicate", "--", pattern])
        .read()?;
    let root = root()?;
    let listed = String::from_utf8(listed).context("git listed a path that is not UTF-8")?;
    Ok(listed.lines().map(|line| root.join(line)).filter(|path| path.is_file()).collect())
}

/// Every source file opens with a line that says what it is for; generated ones say so in their own way.
fn files_without_purpose() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for path in files("*.rs")? {
        if path.components().any(|part| part.as_os_str() == "generated") {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if !text.starts_with("//! ") {
            found.push(format!("{}: does not open with a `//!` line that says what it is for", shown(&path)));
        }
    }
    Ok(found)
}

/// Relative links in the documentation must lead somewhere, to headings too.
fn broken_links() -> Result<Vec<String>> {
    let mut found = Vec::new();
    let read =
        |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    for path in files("*.md")? {
        let text = read(&path)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        for link in links(&text) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            if file.contains("://") || file.starts_with("mailto:") {
                continue;
            }
            let target = if file.is_empty() { path.clone() } else { folder.join(file) };
            let there = target.exists()
                && (heading.is_empty()
                    || target.extension().is_none_or(|ending| ending != "md")
                    || anchors(&read(&target)?).iter().any(|anchor| anchor == heading));
            if !there {
                found.push(format!("{}: the link to {link} leads nowhere", shown(&path)));
            }
        }
    }
    Ok(found)
}

/// By what name links find each heading: its letters and digits in lower case, `-` for a space, `-1` after the second of one
/// name.
fn anchors(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut in_code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        let heading = line.trim_start_matches('#');
        if in_code || heading.len() == line.len() || !heading.starts_with(' ') {
            continue;
        }
        let name: String = heading
            .trim()
            .chars()
            .filter_map(|c| match c {
                ' ' => Some('-'),
                '-' | '_' => Some(c),
                c if c.is_alphanumeric() => Some(c.to_ascii_lowercase()),
                _ => None,
            })
            .collect();
        let before = found.iter().filter(|other| **other == name).count();
        found.push(if before == 0 { name } else { format!("{name}-{before}") });
    }
    found
}

/// The targets of `[text](target)` outside of code blocks and code spans.
fn links(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut in_code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        // Every second piece between backticks is a code span.
        for piece in line.split('`').step_by(2) {
            let mut rest = piece;
            while let Some(at) = rest.find("](") {
                rest = &rest[at + 2..];
                let Some(end) = rest.find(')') else { break };
                found.push(&rest[..end]);
                rest = &rest[end..];
            }
        }
    }
    found
}

fn shown(path: &Path) -> String {
    root().ok().and_then(|root| path.strip_prefix(root).ok()).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::{anchors, links};

    #[test]
    fn headings_are_found_by_their_names() {
        let text = "# One, two (`--x`)\n#no heading\n```\n# a comment\n```\n## Twice\n### Twice\n";
        assert_eq!(anchors(text), ["one-two---x", "twice", "twice-1"]);
    }

    #[test]
    fn finds_links_outside_code() {
        let text = "see [a](a.md#x) and [b](b.md)\n```\n[c](c.md)\n```\n`[d](d.md)` [e](e.md)";
        assert_eq!(links(text), ["a.md#x", "b.md", "e.md"]);
    }
}
