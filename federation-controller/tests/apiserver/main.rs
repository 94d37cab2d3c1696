//! The controller against real API servers: a hub and two members with simulated nodes and pods, over TLS, with a gateway
//! that passes the controller's requests on as the agent's would. No tunnel: that is the e2e tests' matter.
//!
//! Every story runs on our own servers, in this process; and, when `KUBEBUILDER_ASSETS` names a folder with them, on stock
//! kube-apiservers, hub and members alike.

mod edges;
mod failover;
mod gate;
mod kubefed;
mod large;
mod ours;
mod placement;
mod policies;
mod samples;
mod simulated;
mod steps;
mod stock;
mod tenants;
mod troubles;
mod watches;
mod world;

use tokio::sync::Semaphore;

use crate::world::World;

/// Three stock servers are as much as a small machine bears.
static STOCK: Semaphore = Semaphore::const_new(1);

macro_rules! stories {
    ($($module:ident::$story:ident $(with $flag:literal)?),* $(,)?) => {
        mod on_our_servers {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $story() {
                    super::logs();
                    super::$module::$story(super::World::start(super::ours::start().await).await).await;
                }
            )*
        }

        mod on_stock_servers {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $story() {
                    let assets = test_support::require!(test_support::tools::kubebuilder_assets());
                    super::logs();
                    let _turn = super::STOCK.acquire().await.expect("never closed");
                    let servers = super::stock::start(&assets, &[$($flag)?]).await;
                    super::$module::$story(super::World::start(servers).await).await;
                }
            )*
        }
    };
}

stories! {
    edges::a_member_that_serves_another_version,
    edges::members_that_come_back_and_cells_that_change_hands,
    edges::what_members_hold_already_is_not_taken_from_whose_it_is,
    failover::a_cell_is_evacuated_to_where_there_is_room,
    kubefed::a_manifest_moves_to_the_other_version,
    kubefed::kubefed_manifests_unmodified,
    large::an_object_of_more_than_a_mebibyte,
    placement::an_application_by_cell_from_birth_to_death,
    placement::config_maps_by_selector_and_nothing_written_in_vain,
    policies::jobs_ingresses_and_replica_sets_go_too,
    policies::plain_objects_go_where_a_policy_says,
    samples::every_type_is_placed_masked_changed_and_removed,
    steps::a_cell_moves_and_nothing_is_missing_meanwhile,
    steps::a_definition_of_the_members_is_enabled_while_running,
    steps::a_release_by_mask_with_second_thoughts,
    tenants::a_tenant_sees_and_reaches_its_own_and_nothing_else,
    troubles::what_fails_in_members_is_told_at_the_hub,
    // A watch cache has a history of its own, which no compaction of etcd's takes from it.
    watches::what_was_compacted_meanwhile_is_neither_lost_nor_done_twice with "--watch-cache=false",
}

fn logs() {
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_test_writer()
        .try_init();
}
