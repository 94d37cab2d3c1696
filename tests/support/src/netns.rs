//! Network namespaces through the `ip` command, arranged as a star: a hub in the middle, members around it.
//!
//! ```text
//!   member ns "west"                         hub ns                        member ns "east"
//!   lo 192.0.2.10/24  (its API server)      lo 203.0.113.1/32            lo 192.0.2.10/24
//!   up 198.51.100.1/31 ───────────────── m0 198.51.100.0/31
//!                                        m1 198.51.100.2/31 ──────────── up 198.51.100.3/31
//! ```
//!
//! The members' own networks overlap on purpose, and the hub has no route to them: it can answer a member's link
//! address and nothing behind it. A member's only route leads to the hub's one address. All addresses are of the ranges
//! kept for documentation. Everything is deleted on drop.

use std::{
    ffi::OsStr,
    io,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, bail};

use crate::tools::{self, Missing};

/// Where the hub answers; the only address that members have a route to.
pub const HUB: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1));
/// The same address inside every member: the members' networks overlap.
pub const MEMBER_INSIDE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 10));
/// Links are pairs of neighbouring addresses in one /24.
const MAX_MEMBERS: usize = 128;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// One namespace, deleted on drop.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    ip: PathBuf,
}

impl Namespace {
    /// Makes an empty namespace whose loopback is up.
    pub fn new(label: &str) -> Result<Self> {
        let ip = tools::ip()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = Self { name: format!("cw-{}-{number}-{label}", std::process::id()), ip };
        namespace.ip_outside(&["netns", "add", &namespace.name])?;
        namespace.ip(&["link", "set", "dev", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `ip` inside the namespace.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        let inside: Vec<&str> = ["-n", &self.name].into_iter().chain(args.iter().copied()).collect();
        self.ip_outside(&inside)
    }

    fn ip_outside(&self, args: &[&str]) -> Result<()> {
        let output = Command::new(&self.ip).args(args).output().context("cannot start `ip`")?;
        if !output.status.success() {
            bail!("`ip {}` failed: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// A command that will run inside. The process is the program itself, so that a signal reaches it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(&self.ip);
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A namespace that cannot be deleted is a nuisance, not a reason to panic while a test unwinds.
        if let Err(error) = self.ip_outside(&["netns", "del", &self.name]) {
            eprintln!("left behind: {error:#}");
        }
    }
}

/// What `nft` is told so that a namespace loses one TCP or UDP packet in `one_in` at each of `hooks` (`input`,
/// `output`), of one port only if there is one. The loss is the kernel's, so that TCP and QUIC each do what they do about
/// it: a relay of streams could only delay.
pub fn loss_rules(one_in: u32, hooks: &[&str], port: Option<u16>) -> String {
    let mut rules = vec!["add table ip loss".to_owned()];
    for hook in hooks {
        rules.push(format!("add chain ip loss {hook} {{ type filter hook {hook} priority 0; }}"));
        let ends = match port {
            Some(port) => vec![format!("th sport {port}"), format!("th dport {port}")],
            None => vec![String::new()],
        };
        rules.extend(ends.iter().map(|end| {
            format!(
                "add rule ip loss {hook} meta l4proto {{ tcp, udp }} {end} numgen random mod {one_in} == 0 drop"
            )
        }));
    }
    rules.join("; ")
}

/// A hub and its members, linked one by one.
#[derive(Debug)]
pub struct Star {
    hub: Namespace,
    members: Vec<Namespace>,
}

impl Star {
    /// Whether namespaces can be made here; the reason when not.
    pub fn possible() -> Result<(), Missing> {
        tools::root()?;
        tools::ip()?;
        Namespace::new("try")
            .map(drop)
            .map_err(|error| Missing::new(format!("no network namespaces here: {error:#}")))
    }

    /// Makes the namespaces and the links.
    pub fn new(members: &[&str]) -> Result<Self> {
        if members.len() > MAX_MEMBERS {
            bail!("at most {MAX_MEMBERS} members fit into the links' range");
        }
        let hub = Namespace::new("hub")?;
        hub.ip(&["address", "add", &format!("{HUB}/32"), "dev", "lo"])?;
        let mut star = Self { hub, members: Vec::new() };
        for (index, label) in members.iter().enumerate() {
            let member = Namespace::new(label)?;
            let near = format!("m{index}");
            star.hub.ip(&[
                "link",
                "add",
                &near,
                "type",
                "veth",
                "peer",
                "name",
                "up",
                "netns",
                member.name(),
            ])?;
            star.hub.ip(&["address", "add", &format!("{}/31", link(index, 0)), "dev", &near])?;
            star.hub.ip(&["link", "set", "dev", &near, "up"])?;
            member.ip(&["address", "add", &format!("{MEMBER_INSIDE}/24"), "dev", "lo"])?;
            member.ip(&["address", "add", &format!("{}/31", link(index, 1)), "dev", "up"])?;
            member.ip(&["link", "set", "dev", "up", "up"])?;
            member.ip(&["route", "add", &format!("{HUB}/32"), "via", &link(index, 0).to_string()])?;
            star.members.push(member);
        }
        Ok(star)
    }

    /// The namespace in the middle.
    pub fn hub(&self) -> &Namespace {
        &self.hub
    }

    /// A member's namespace, in the order given to `new`.
    pub fn member(&self, index: usize) -> &Namespace {
        &self.members[index]
    }

    /// From now on one packet in `one_in` is lost between the hub and its members, each way.
    pub fn lose(&self, one_in: u32) -> Result<()> {
        let rules = loss_rules(one_in, &["input", "output"], None);
        let nft = tools::nft()?;
        let output = Command::new(&self.hub.ip)
            .args(["netns", "exec", self.hub.name()])
            .arg(nft)
            .arg(rules)
            .output()
            .context("cannot start `nft`")?;
        if !output.status.success() {
            bail!("`nft` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Takes the member's link down: nothing passes and nobody is told.
    pub fn cut(&self, index: usize) -> Result<()> {
        self.hub.ip(&["link", "set", "dev", &format!("m{index}"), "down"])
    }

    /// Brings the link up again.
    pub fn restore(&self, index: usize) -> Result<()> {
        self.hub.ip(&["link", "set", "dev", &format!("m{index}"), "up"])
    }

    /// Whether the hub's namespace has a route to `address`.
    pub fn hub_has_route(&self, address: IpAddr) -> io::Result<bool> {
        let output = Command::new(&self.hub.ip)
            .args(["-n", self.hub.name(), "route", "get", &address.to_string()])
            .output()?;
        Ok(output.status.success())
    }
}

/// The address of one end of a member's link; end 0 is the hub's.
fn link(member: usize, end: u8) -> Ipv4Addr {
    // MAX_MEMBERS keeps this below 256.
    let last = u8::try_from(member * 2).unwrap_or(u8::MAX - 1) + end;
    Ipv4Addr::new(198, 51, 100, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn members_reach_the_hub_and_the_hub_reaches_nothing_behind_them() {
        crate::require!(Star::possible());
        let star = Star::new(&["west", "east"]).unwrap();
        assert!(!star.hub_has_route(MEMBER_INSIDE).unwrap());
        assert!(star.hub_has_route(link(0, 1).into()).unwrap());
        let name = star.member(1).name().to_owned();
        let route = |star: &Star| {
            Command::new(&star.hub.ip).args(["-n", &name, "route", "get", &HUB.to_string()]).output().unwrap()
        };
        assert!(route(&star).status.success());
        star.cut(1).unwrap();
        star.restore(1).unwrap();
        assert!(star.hub_has_route(link(1, 1).into()).unwrap());
        drop(star);
        let left = Command::new(tools::ip().unwrap()).args(["netns", "list"]).output().unwrap();
        assert!(!String::from_utf8_lossy(&left.stdout).contains(&name));
    }
}
