//! Which units a namespace of the hub sees: whose it is, and whose they are.
//!
//! | namespace | sees |
//! |---|---|
//! | of one tenant | the tenant's own units |
//! | of no tenant | units of no tenant |
//! | that two tenants name | nothing |
//! | the platform's: of a tenant with `everywhere`, or one of [`is_the_platforms`] | everything |
//!
//! What a namespace does not see it cannot place in, however it names or selects it. Where a tenant is gone, or a namespace is
//! taken out of one, what was placed stays and is written to no more ([`Topology::is_closed`]): nothing opens by that.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use kube::ResourceExt as _;

use crate::api::{Adoption, Tenant};
use crate::names::{FEDERATION_NAMESPACE, SYSTEM_NAMESPACE};
use crate::topology::Topology;

/// What each namespace sees of a topology.
#[derive(Debug, Clone, Default)]
pub struct Tenancy {
    whole: Arc<Topology>,
    /// Units of no tenant.
    open: Arc<Topology>,
    nothing: Arc<Topology>,
    /// By tenant.
    own: BTreeMap<String, Arc<Topology>>,
    /// By namespace; of those that a tenant names.
    owners: BTreeMap<String, Owner>,
}

/// Whose a namespace is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Owner {
    Tenant {
        name: String,
        adoption: Adoption,
    },
    /// A tenant's that reaches everything.
    Platform,
    /// Two tenants name it.
    Contested,
}

/// Namespaces that are the platform's by their name: no tenant gets anything in them, whatever its object says.
pub fn is_the_platforms(namespace: &str) -> bool {
    namespace == FEDERATION_NAMESPACE || namespace == SYSTEM_NAMESPACE || namespace.starts_with("kube-")
}

// === impl Tenancy ===

impl Tenancy {
    /// Puts tenants and topology together.
    pub fn new<'a>(tenants: impl IntoIterator<Item = &'a Tenant>, topology: Topology) -> Self {
        let whole = Arc::new(topology);
        let open = if whole.is_owned() { Arc::new(whole.of_nobody()) } else { Arc::clone(&whole) };
        let mut made = Self {
            nothing: Arc::new(whole.of_tenant("")),
            whole,
            open,
            own: BTreeMap::new(),
            owners: BTreeMap::new(),
        };
        for tenant in tenants {
            let name = tenant.name_any();
            let mut namespaces: Vec<&String> = tenant.spec.namespaces.iter().collect();
            namespaces.sort_unstable();
            namespaces.dedup();
            for namespace in namespaces {
                let owner = if tenant.spec.everywhere {
                    Owner::Platform
                } else {
                    Owner::Tenant { name: name.clone(), adoption: tenant.spec.adoption }
                };
                match made.owners.entry(namespace.clone()) {
                    Entry::Vacant(free) => {
                        free.insert(owner);
                    }
                    Entry::Occupied(mut taken) => {
                        taken.insert(Owner::Contested);
                    }
                }
            }
            let own = Arc::new(made.whole.of_tenant(&name));
            made.own.insert(name, own);
        }
        made
    }

    /// Everything there is.
    pub fn whole(&self) -> &Arc<Topology> {
        &self.whole
    }

    /// What objects of a namespace see; those without a namespace are the platform's.
    pub fn view(&self, namespace: &str) -> Arc<Topology> {
        if namespace.is_empty() || is_the_platforms(namespace) {
            return Arc::clone(&self.whole);
        }
        let seen = match self.owners.get(namespace) {
            None => &self.open,
            Some(Owner::Platform) => &self.whole,
            Some(Owner::Tenant { name, .. }) => self.own.get(name).unwrap_or(&self.nothing),
            Some(Owner::Contested) => &self.nothing,
        };
        Arc::clone(seen)
    }

    /// Whether objects of a namespace may take over what is in members and not the hub's: a tenant's may not, unless the
    /// `Tenant` says so.
    pub fn adoption(&self, namespace: &str) -> Adoption {
        if namespace.is_empty() || is_the_platforms(namespace) {
            return Adoption::Allowed;
        }
        match self.owners.get(namespace) {
            None | Some(Owner::Platform) => Adoption::Allowed,
            Some(Owner::Tenant { adoption, .. }) => *adoption,
            // One of the two may not say so.
            Some(Owner::Contested) => Adoption::Forbidden,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Cell, CellSpec, TenantSpec, TopologyType};
    use crate::names::TENANT_LABEL;

    #[test]
    fn nothing_is_open_to_whoever_is_nobodys() {
        let cell = |name: &str, tenant: Option<&str>| {
            let mut cell = Cell::new(name, CellSpec { cluster: "x".into(), ..CellSpec::default() });
            cell.metadata.labels = tenant.map(|tenant| [(TENANT_LABEL.to_owned(), tenant.to_owned())].into());
            cell
        };
        let cells = [
            cell("a", Some("red")),
            cell("b", Some("blue")),
            cell("c", None),
            // A label that says nothing opens nothing.
            cell("d", Some("")),
        ];
        let tenant = |name: &str, namespaces: &[&str], everywhere| {
            let namespaces = namespaces.iter().map(|name| (*name).to_owned()).collect();
            Tenant::new(name, TenantSpec { namespaces, everywhere, ..TenantSpec::default() })
        };
        let tenants = [
            tenant("red", &["shop", "shop", "both", "kube-system"], false),
            tenant("blue", &["bank", "both"], false),
            tenant("platform", &["monitoring"], true),
        ];
        let check = |tenants: &[Tenant], namespace: &str, expect: &[&str]| {
            let seen = Tenancy::new(tenants, Topology::new(&cells, [])).view(namespace);
            let names: Vec<_> = seen.all(TopologyType::Cell).map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, expect, "{namespace}");
        };
        check(&tenants, "shop", &["a"]);
        check(&tenants, "bank", &["b"]);
        check(&tenants, "both", &[]);
        check(&tenants, "default", &["c"]);
        for platforms in ["monitoring", "kube-system", "kube-federation-system", "cellway-system", ""] {
            check(&tenants, platforms, &["a", "b", "c", "d"]);
        }
        // The tenant is gone, or taken for gone: what is others' stays others'.
        check(&tenants[1..], "shop", &["c"]);
        check(&[], "shop", &["c"]);
        check(&[], "monitoring", &["c"]);
    }

    #[test]
    fn a_tenant_adopts_when_its_object_says_so() {
        let tenant = |name: &str, namespaces: &[&str], adoption, everywhere| {
            let namespaces = namespaces.iter().map(|name| (*name).to_owned()).collect();
            Tenant::new(name, TenantSpec { namespaces, adoption, everywhere, ..TenantSpec::default() })
        };
        let tenants = [
            tenant("red", &["shop", "both", "kube-system"], Adoption::default(), false),
            tenant("blue", &["bank", "both"], Adoption::Allowed, false),
            tenant("platform", &["monitoring"], Adoption::default(), true),
        ];
        let tenancy = Tenancy::new(&tenants, Topology::default());
        for forbidden in ["shop", "both"] {
            assert_eq!(tenancy.adoption(forbidden), Adoption::Forbidden, "{forbidden}");
        }
        for allowed in ["bank", "monitoring", "default", "kube-system", ""] {
            assert_eq!(tenancy.adoption(allowed), Adoption::Allowed, "{allowed}");
        }
    }
}
