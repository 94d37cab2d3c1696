//! A path that loses packets: a network namespace in which one port's packets are dropped at random.
//!
//! A scenario on such a path runs in a process of this program inside the namespace, with everything it starts.

use anyhow::{Context, Result, bail};
use test_support::{
    netns::{Namespace, loss_rules},
    tools,
};
use tokio::process::Command;

/// One packet in so many is lost: 1 %.
const ONE_IN: u32 = 100;

/// A network of its own, or why there is none.
pub(crate) fn namespace() -> Result<Namespace> {
    tools::root()?;
    tools::nft()?;
    Namespace::new("lossy")
}

/// From now on this network loses packets of `port`, in both directions, TCP and UDP alike. Everything happens on one
/// loopback, where each packet passes `output` once.
pub(crate) async fn lose(port: u16) -> Result<()> {
    let output = Command::new(tools::nft()?)
        .arg(loss_rules(ONE_IN, &["output"], Some(port)))
        .output()
        .await
        .context("failed to start nft")?;
    if !output.status.success() {
        bail!("nft refused the rules: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
