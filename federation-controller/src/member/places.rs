//! Reads in which zones and in which region a member's nodes lie, as KubeFed did: it stands in the `KubeFedCluster`'s status.
//!
//! Nodes are listed without what they are made of, as soon as the member is online and then every few minutes. A member whose nodes
//! cannot be listed keeps what was known.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use federation_core::api::KubeFedClusterStatus;
use k8s_openapi::api::core::v1::Node;
use kube::Resource as _;
use kube::api::ListParams;
use serde_json::Value;
use tracing::debug;

use super::{Member, chain};
use crate::Shared;
use crate::reader::Reader;

/// What Kubernetes calls them, and what it called them before 1.17, by which KubeFed went.
const ZONE: [&str; 2] = ["topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"];
const REGION: [&str; 2] = ["topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region"];
/// Zones that are shown; a cluster lies in three, and names of more are of no use to a person.
const MAX_ZONES: usize = 64;
/// The longest value that a label may have.
const MAX_NAME: usize = 63;
/// Nodes in one page, and pages: Kubernetes supports 5,000 nodes.
const PAGE: u32 = 500;
const PAGES: usize = 20;
/// Longest time for one page.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The wait after nodes could not be listed.
const AGAIN: Duration = Duration::from_secs(60);

/// Where a member's nodes lie.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Places {
    zones: BTreeSet<String>,
    region: Option<String>,
}

// === impl Places ===

impl Places {
    fn add(&mut self, node: &Value) {
        let label = |names: [&str; 2]| {
            let value = names.iter().find_map(|name| node["metadata"]["labels"][*name].as_str())?;
            // It came from a member: what cannot be a label's value is none.
            (!value.is_empty() && value.len() <= MAX_NAME).then(|| value.to_owned())
        };
        if let Some(zone) = label(ZONE)
            && (self.zones.len() < MAX_ZONES || self.zones.contains(&zone))
        {
            self.zones.insert(zone);
        }
        if self.region.is_none() {
            self.region = label(REGION);
        }
    }

    /// Puts them into a status.
    pub(super) fn show(&self, status: &mut KubeFedClusterStatus) {
        status.zones = (!self.zones.is_empty()).then(|| self.zones.iter().cloned().collect());
        status.region = self.region.clone();
    }
}

/// Reads for ever.
pub(super) async fn run(member: Arc<Member>, shared: Arc<Shared>) {
    let mut epoch = member.epoch.subscribe();
    loop {
        if epoch.wait_for(|epoch| epoch.online).await.is_err() {
            return;
        }
        let pause = match read(&member.reader).await {
            Ok(places) => {
                if member.health.lock().lies_in(places) {
                    // Who probes writes the status.
                    member.nudge();
                }
                shared.options.places_interval
            }
            Err(why) => {
                debug!(why, "cannot read where the member's nodes lie");
                AGAIN.min(shared.options.places_interval)
            }
        };
        tokio::time::sleep(pause.mul_f64(0.8 + 0.4 * rand::random::<f64>())).await;
    }
}

async fn read(reader: &Reader) -> Result<Places, String> {
    let path = kube::core::Request::new(Node::url_path(&(), None));
    let params = ListParams::default().limit(PAGE);
    let mut places = Places::default();
    let listing = reader.list(
        |params| path.list_metadata(params),
        params,
        (PAGES, TIMEOUT),
        |node| {
            places.add(&node);
            true
        },
    );
    listing.await.map_err(|error| chain(&error))?;
    Ok(places)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown<'a>(nodes: impl IntoIterator<Item = (&'a str, String)>) -> (Vec<String>, Option<String>) {
        let mut places = Places::default();
        for (key, value) in nodes {
            let node = json!({"metadata": {"name": "n", "labels": {(key): value}}});
            places.add(&node);
        }
        let mut status = KubeFedClusterStatus::default();
        places.show(&mut status);
        (status.zones.unwrap_or_default(), status.region)
    }

    #[test]
    fn zones_are_in_order_and_the_first_region_counts() {
        let value = |text: &str| text.to_owned();
        let (zones, region) = shown([
            (ZONE[0], value("b")),
            (REGION[1], value("north")),
            (ZONE[1], value("a")),
            (ZONE[0], value("b")),
            (REGION[0], value("south")),
            ("other", value("c")),
            (ZONE[0], value("")),
        ]);
        assert_eq!((zones, region.as_deref()), (vec![value("a"), value("b")], Some("north")));
        assert_eq!(shown([]), (Vec::new(), None));
    }

    #[test]
    fn what_a_member_makes_up_is_bounded() {
        let many = (0..1000).map(|number| (ZONE[0], format!("z{number}")));
        assert_eq!(shown(many).0.len(), MAX_ZONES);
        assert_eq!(shown([(ZONE[0], "z".repeat(64)), (REGION[0], "r".repeat(64))]), (Vec::new(), None));
    }
}
