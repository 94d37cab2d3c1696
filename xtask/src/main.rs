//! The one door for everything that people and the build service run alike: `cargo xtask check`, `test`, `generate`
//! and `bench`.
//!
//! It does its own set-up: what the tests need beyond a Rust toolchain and a C compiler is found or installed by
//! [`tools`], and said plainly when it cannot be.

mod arrows;
mod check;
mod generate;
mod shell;
mod test;
mod tools;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::shell::Cmd;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The one door for check, test, generate and bench")]
struct Args {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Format, clippy with warnings denied, the arrows between crates, generated code, links in the documentation.
    Check {
        /// Leave clippy out: everything else takes seconds.
        #[arg(long)]
        quick: bool,
    },
    /// Set up what the tests need, then build and run all of them.
    Test {
        /// Arguments for `cargo test` (a filter, `-p PACKAGE`, `-- --nocapture`); without any: the whole workspace.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Write the generated code: messages from `proto/*.proto`, and the CRDs of the federation.
    Generate {
        /// Only the messages (needs no build of the rest).
        #[arg(long)]
        messages: bool,
    },
    /// Build with the profile `dist` and run the comparisons with peers.
    Bench {
        /// Arguments for the bench program (`-- --help` lists them).
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    match args.command {
        Task::Check { quick } => check::run(quick),
        Task::Test { args } => test::run(&args),
        Task::Generate { messages } => {
            generate::messages(&generate::messages_dir()?)?;
            if !messages {
                generate::crds(&generate::crds_path()?)?;
            }
            Ok(())
        }
        Task::Bench { args } => bench(&args),
    }
}

fn bench(args: &[String]) -> Result<()> {
    tools::prepare_for_bench()?;
    Cmd::new("cargo")
        .args(["build", "--profile", "dist", "-p", "proxy-server", "-p", "proxy-agent"])
        .args(["-p", "federation-apiserver", "-p", "federation-store", "-p", "cli", "-p", "bench"])
        .run()?;
    // Not `cargo run`: for one package alone it would build half of the rest again, with other features.
    Cmd::new(tools::target_dir()?.join("dist/bench")).args(args).run()
}
