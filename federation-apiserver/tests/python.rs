//! The Python client against the hub API: `clients/python_client.py`, one test for each of its cases.
//!
//! `cargo xtask test` fetches the client; where it cannot, these tests say so and were not run.

mod common;

use std::process::Stdio;

use common::Server;
use common::stock::Stock;
use federation_apiserver::Role;
use federation_store::Compaction;
use test_support::{require, tools};
use tokio::process::Command;

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/python_client.py");

async fn run(server: &Server, client: &tools::PythonClient, case: &str) {
    let mut command = Command::new(&client.python);
    command.args([PROGRAM, case]).env("KUBECONFIG", &server.kubeconfig).env("HOME", &server.dir);
    if let Some(packages) = &client.packages {
        command.env("PYTHONPATH", packages);
    }
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(2 * common::LIMIT, command.output()).await;
    let output = output.expect("the case ends in time").expect("Python starts");
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{case}:\n{}", String::from_utf8_lossy(&text));
}

async fn on_a_hub(case: &str) {
    let client = require!(tools::python_client());
    let server = Server::hub().await;
    run(&server, &client, case).await;
    server.stop().await;
}

/// That the cases say what a kube-apiserver does, where there is one. It has no controllers, and keeps all revisions.
#[tokio::test(flavor = "multi_thread")]
async fn a_stock_server_answers_the_same() {
    let client = require!(tools::python_client());
    let assets = require!(tools::kubebuilder_assets());
    let stock = Stock::start(&assets).await;
    for case in ["watch", "initial_events", "pages", "leader_lease", "leader_config_map", "apply"] {
        run(&stock.server, &client, case).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_go_on_where_they_ended() {
    on_a_hub("watch").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_begins_with_what_is_there() {
    on_a_hub("initial_events").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_compacted_is_told_as_expired() {
    let client = require!(tools::python_client());
    let server = Server::start(Role::Hub, |config| config.compaction = Compaction::Retain(5), |_| {}).await;
    run(&server, &client, "expired").await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages() {
    on_a_hub("pages").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_candidate_leads_by_a_lease() {
    on_a_hub("leader_lease").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_candidate_leads_by_a_config_map() {
    on_a_hub("leader_config_map").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn apply_has_owners_and_conflicts() {
    on_a_hub("apply").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_and_an_account_with_a_token() {
    on_a_hub("manifest").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_keep_the_strict_rules() {
    on_a_hub("certificates").await;
}
