//! Units: what exists to place things on, and what a placement comes to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Toleration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector, SelectorExt as _};
use thiserror::Error;

use crate::api::{Cell, Failover, KubeFedCluster, Placement, TopologyType};
use crate::names::TENANT_LABEL;

/// Something to place on: a cell or a whole cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct Unit {
    /// Name of the Cell or KubeFedCluster.
    pub name: String,
    /// The member that it lies in.
    pub cluster: String,
    /// Labels that selectors see.
    pub labels: BTreeMap<String, String>,
    /// What a cell adds to workloads; `None` for a whole cluster.
    pub cell: Option<CellTraits>,
}

/// What a cell adds to the workloads placed in it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CellTraits {
    /// Labels of the cell's nodes.
    pub node_selector: BTreeMap<String, String>,
    /// Tolerations of the cell's taints.
    pub tolerations: Vec<Toleration>,
}

/// Every cell and cluster that the hub knows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Topology {
    cells: BTreeMap<String, Unit>,
    clusters: BTreeMap<String, Unit>,
    /// Names of cells by cluster.
    by_cluster: BTreeMap<String, BTreeSet<String>>,
    /// Names of all clusters, whosever they are.
    registered: BTreeSet<String>,
    /// Cells and clusters that were given up, whosever they are.
    given_up: BTreeMap<(TopologyType, String), Failover>,
    /// Where this is only a part: what it is a part of.
    whole: Option<Arc<Topology>>,
}

/// What a placement comes to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Placed<'a> {
    /// The units, by name.
    pub units: BTreeMap<String, &'a Unit>,
    /// Names in the placement that no unit has.
    pub unknown: BTreeSet<String>,
}

/// A selector that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("cannot read the unit selector: {reason}; an operator is In, NotIn, Exists or DoesNotExist")]
pub struct SelectorError {
    /// What is wrong with it.
    pub reason: String,
}

// === impl Topology ===

impl Topology {
    /// Builds the topology from hub objects. Objects without a name are left out.
    pub fn new<'a>(
        cells: impl IntoIterator<Item = &'a Cell>,
        clusters: impl IntoIterator<Item = &'a KubeFedCluster>,
    ) -> Self {
        let mut topology = Self::default();
        for cell in cells {
            topology.add_cell(cell);
        }
        for cluster in clusters {
            topology.add_cluster(cluster);
        }
        topology
    }

    /// Adds or replaces a cell.
    pub fn add_cell(&mut self, cell: &Cell) {
        let Some(name) = cell.metadata.name.clone() else { return };
        let unit = Unit {
            name: name.clone(),
            cluster: cell.spec.cluster.clone(),
            labels: cell.metadata.labels.clone().unwrap_or_default(),
            cell: Some(CellTraits {
                node_selector: cell.spec.node_selector.clone(),
                tolerations: cell.spec.tolerations.clone(),
            }),
        };
        self.give_up(TopologyType::Cell, &name, cell.spec.failover.as_ref());
        self.by_cluster.entry(unit.cluster.clone()).or_default().insert(name.clone());
        if let Some(before) = self.cells.insert(name.clone(), unit)
            && before.cluster != cell.spec.cluster
            && let Some(cells) = self.by_cluster.get_mut(&before.cluster)
        {
            cells.remove(&name);
        }
    }

    /// Adds or replaces a cluster.
    pub fn add_cluster(&mut self, cluster: &KubeFedCluster) {
        let Some(name) = cluster.metadata.name.clone() else { return };
        let unit = Unit {
            name: name.clone(),
            cluster: name.clone(),
            labels: cluster.metadata.labels.clone().unwrap_or_default(),
            cell: None,
        };
        self.give_up(TopologyType::Cluster, &name, cluster.spec.failover.as_ref());
        self.registered.insert(name.clone());
        self.clusters.insert(name, unit);
    }

    /// Whether a cluster is registered.
    pub fn has_cluster(&self, name: &str) -> bool {
        self.registered.contains(name)
    }

    /// Whether anything of a cluster is in this part: whoever sees no more than that need not know that there is one.
    pub fn sees_of(&self, cluster: &str) -> bool {
        let has_cells = || self.by_cluster.get(cluster).is_some_and(|cells| !cells.is_empty());
        self.whole.is_none() || self.clusters.contains_key(cluster) || has_cells()
    }

    /// The part of it that belongs to a tenant: nothing else has a name or a label there. That a cluster is registered is
    /// known all the same, as a tenant's cells may lie in one that is nobody's. Nobody's name is empty.
    pub fn of_tenant(self: &Arc<Self>, tenant: &str) -> Self {
        self.part(|owner| owner == Some(tenant) && !tenant.is_empty())
    }

    /// The part of it that belongs to no tenant.
    pub fn of_nobody(self: &Arc<Self>) -> Self {
        self.part(|owner| owner.is_none())
    }

    /// Whether any unit belongs to a tenant.
    pub fn is_owned(&self) -> bool {
        self.cells.values().chain(self.clusters.values()).any(|unit| self.owner(unit).is_some())
    }

    fn part(self: &Arc<Self>, is_in: impl Fn(Option<&str>) -> bool) -> Self {
        let is_in = |unit: &&Unit| is_in(self.owner(unit));
        let mut own = Self {
            registered: self.registered.clone(),
            given_up: self.given_up.clone(),
            whole: Some(Arc::clone(self)),
            ..Self::default()
        };
        for unit in self.cells.values().filter(is_in) {
            own.by_cluster.entry(unit.cluster.clone()).or_default().insert(unit.name.clone());
            own.cells.insert(unit.name.clone(), unit.clone());
        }
        for unit in self.clusters.values().filter(is_in) {
            own.clusters.insert(unit.name.clone(), unit.clone());
        }
        own
    }

    /// Whose a unit is: as its own label says, or, of a cell without one, its cluster's.
    fn owner<'a>(&'a self, unit: &'a Unit) -> Option<&'a str> {
        let cluster = || unit.cell.as_ref().and_then(|_| self.clusters.get(&unit.cluster));
        tenant_label(unit).or_else(|| tenant_label(cluster()?))
    }

    /// Whether a placement (`None`: one that means every unit) means a unit that exists and is not in this part: there
    /// nothing is placed, and what is there stays.
    pub fn is_closed(&self, topology: TopologyType, name: &str, placement: Option<&Placement>) -> bool {
        let Some(unit) = self.whole.as_ref().and_then(|whole| whole.unit(topology, name)) else {
            return false;
        };
        if self.has_unit(topology, name) {
            return false;
        }
        match placement {
            None => true,
            Some(Placement { units: Some(units), .. }) => units.iter().any(|one| one.name == name),
            Some(Placement { unit_selector: Some(selector), .. }) => {
                parse_selector(selector).is_ok_and(|selector| selector.matches(&unit.labels))
            }
            Some(_) => false,
        }
    }

    /// The units that [`Self::is_closed`] says to be.
    pub fn closed<'a>(
        &'a self,
        topology: TopologyType,
        placement: Option<&'a Placement>,
    ) -> impl Iterator<Item = &'a Unit> {
        let all = self.whole.iter().flat_map(move |whole| whole.units(topology).values());
        all.filter(move |unit| self.is_closed(topology, &unit.name, placement))
    }

    fn give_up(&mut self, of: TopologyType, name: &str, failover: Option<&Failover>) {
        let key = (of, name.to_owned());
        match failover {
            Some(failover) => self.given_up.insert(key, failover.clone()),
            None => self.given_up.remove(&key),
        };
    }

    /// The same with one cell or cluster given up.
    pub fn with_given_up(&self, of: TopologyType, name: &str, failover: &Failover) -> Self {
        let mut changed = self.clone();
        changed.give_up(of, name, Some(failover));
        changed
    }

    /// Whether anything is given up.
    pub fn is_given_up(&self) -> bool {
        !self.given_up.is_empty()
    }

    /// What an operator said of a unit, or of its cluster, if it is given up.
    pub fn failover_of(&self, unit: &Unit) -> Option<&Failover> {
        if self.given_up.is_empty() {
            return None;
        }
        let said = |of, name: &str| self.given_up.get(&(of, name.to_owned()));
        let own = unit.cell.as_ref().and_then(|_| said(TopologyType::Cell, &unit.name));
        own.or_else(|| said(TopologyType::Cluster, &unit.cluster))
    }

    /// The units that stand in for those of `placed` that are given up.
    pub fn stand_ins<'a>(
        &'a self,
        of: TopologyType,
        placed: impl Iterator<Item = &'a Unit>,
    ) -> BTreeMap<String, &'a Unit> {
        let mut units = BTreeMap::new();
        for placement in placed.filter_map(|unit| self.failover_of(unit)?.to.as_ref()) {
            // A selector that cannot be read selects nothing.
            let Ok(found) = self.resolve(of, placement) else { continue };
            units.extend(found.units);
            let clusters = found.unknown.iter().filter(|_| of == TopologyType::Cell);
            for name in clusters.flat_map(|cluster| self.cells_in(cluster)) {
                units.extend(self.cells.get(name).map(|unit| (name.to_owned(), unit)));
            }
        }
        units.retain(|_, unit| self.failover_of(unit).is_none());
        units
    }

    /// A unit by name.
    pub fn unit(&self, of: TopologyType, name: &str) -> Option<&Unit> {
        self.units(of).get(name)
    }

    /// Names of the cells of a cluster.
    pub fn cells_in<'a>(&'a self, cluster: &'a str) -> impl Iterator<Item = &'a str> {
        let names = self.by_cluster.get(cluster).into_iter().flatten();
        names.map(String::as_str)
    }

    /// Whether a unit of this topology exists.
    pub fn has_unit(&self, topology: TopologyType, name: &str) -> bool {
        self.units(topology).contains_key(name)
    }

    /// What `placement` comes to.
    pub fn resolve<'a>(
        &'a self,
        topology: TopologyType,
        placement: &Placement,
    ) -> Result<Placed<'a>, SelectorError> {
        let all = self.units(topology);
        let mut placed = Placed::default();
        if let Some(units) = &placement.units {
            for reference in units {
                match all.get(&reference.name) {
                    Some(unit) => {
                        placed.units.insert(reference.name.clone(), unit);
                    }
                    None => {
                        placed.unknown.insert(reference.name.clone());
                    }
                }
            }
        } else if let Some(selector) = &placement.unit_selector {
            let selector = parse_selector(selector)?;
            placed.units = all
                .iter()
                .filter(|(_, unit)| selector.matches(&unit.labels))
                .map(|(name, unit)| (name.clone(), unit))
                .collect();
        }
        Ok(placed)
    }

    /// Every unit of a topology.
    pub fn all(&self, topology: TopologyType) -> impl Iterator<Item = (&String, &Unit)> {
        self.units(topology).iter()
    }

    fn units(&self, topology: TopologyType) -> &BTreeMap<String, Unit> {
        match topology {
            TopologyType::Cell => &self.cells,
            TopologyType::Cluster => &self.clusters,
        }
    }
}

/// Whose a unit is, as its own label says.
fn tenant_label(unit: &Unit) -> Option<&str> {
    unit.labels.get(TENANT_LABEL).map(String::as_str)
}

/// Reads a label selector.
pub fn parse_selector(selector: &LabelSelector) -> Result<Selector, SelectorError> {
    Selector::try_from(selector.clone()).map_err(|error| SelectorError { reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement;

    use super::*;
    use crate::api::{CellSpec, UnitReference};

    fn cell(name: &str, cluster: &str, zone: &str) -> Cell {
        let mut cell = Cell::new(name, CellSpec { cluster: cluster.into(), ..CellSpec::default() });
        cell.metadata.labels = Some([("zone".to_owned(), zone.to_owned())].into());
        cell
    }

    fn names(placement: &Placement) -> (Vec<String>, Vec<String>) {
        let cells = [cell("a", "x", "1"), cell("b", "x", "2"), cell("c", "y", "2")];
        let topology = Topology::new(&cells, []);
        let placed = topology.resolve(TopologyType::Cell, placement).expect("selector");
        (placed.units.keys().cloned().collect(), placed.unknown.into_iter().collect())
    }

    fn by_names(names: &[&str]) -> Placement {
        Placement {
            units: Some(names.iter().map(|name| UnitReference { name: (*name).into() }).collect()),
            unit_selector: Some(LabelSelector::default()),
        }
    }

    #[test]
    fn names_win_over_the_selector() {
        assert_eq!(names(&by_names(&["b", "zz", "b"])), (vec!["b".into()], vec!["zz".into()]));
        assert_eq!(names(&by_names(&[])), (vec![], vec![]));
    }

    #[test]
    fn selector_selects() {
        let all = Placement { units: None, unit_selector: Some(LabelSelector::default()) };
        assert_eq!(names(&all).0, ["a", "b", "c"]);
        let zone = Placement {
            units: None,
            unit_selector: Some(LabelSelector {
                match_labels: Some([("zone".to_owned(), "2".to_owned())].into()),
                match_expressions: None,
            }),
        };
        assert_eq!(names(&zone).0, ["b", "c"]);
        assert_eq!(names(&Placement::default()), (vec![], vec![]));
    }

    #[test]
    fn a_tenant_sees_only_its_own_units() {
        use crate::api::KubeFedClusterSpec;

        let owned = |tenant: &str| Some([(TENANT_LABEL.to_owned(), tenant.to_owned())].into());
        let mut cells = [cell("a", "x", "1"), cell("b", "x", "2"), cell("c", "y", "2"), cell("d", "z", "2")];
        cells[0].metadata.labels = owned("red");
        cells[1].metadata.labels = owned("blue");
        let mut clusters =
            ["x", "y", "z"].map(|name| KubeFedCluster::new(name, KubeFedClusterSpec::default()));
        clusters[1].metadata.labels = owned("red");
        let red = Arc::new(Topology::new(&cells, &clusters)).of_tenant("red");
        let names = |topology, placement: &Placement| {
            let placed = red.resolve(topology, placement).expect("selector");
            (placed.units.into_keys().collect::<Vec<_>>(), placed.unknown.into_iter().collect::<Vec<_>>())
        };
        let all = Placement { units: None, unit_selector: Some(LabelSelector::default()) };
        assert_eq!(names(TopologyType::Cell, &all).0, ["a", "c"], "c is in red's cluster");
        assert_eq!(names(TopologyType::Cluster, &all).0, ["y"]);
        assert_eq!(names(TopologyType::Cell, &by_names(&["b", "a"])), (vec!["a".into()], vec!["b".into()]));
        assert!(!red.has_unit(TopologyType::Cell, "b") && red.has_cluster("x"));
        // What is there and not red's.
        let closed = |name, placement| red.is_closed(TopologyType::Cell, name, placement);
        let (a, b) = (by_names(&["a"]), by_names(&["b"]));
        assert!(closed("b", Some(&all)) && closed("b", Some(&b)) && closed("b", None));
        assert!(!closed("b", Some(&a)) && !closed("a", None) && !closed("zz", None));
    }

    #[test]
    fn bad_selector_is_an_error() {
        let placement = Placement {
            units: None,
            unit_selector: Some(LabelSelector {
                match_labels: None,
                match_expressions: Some(vec![LabelSelectorRequirement {
                    key: "zone".into(),
                    operator: "Near".into(),
                    values: None,
                }]),
            }),
        };
        assert!(Topology::default().resolve(TopologyType::Cell, &placement).is_err());
    }
}
