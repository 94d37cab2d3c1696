//! The generated files, all committed: messages from `proto/*.proto` and the CRDs of the federation.
//!
//! The compiler is pure Rust, so that nobody needs `protoc`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use prost_build::{Service, ServiceGenerator};

use crate::shell::{Cmd, root};

/// Where the messages' code lives.
pub(crate) fn messages_dir() -> Result<PathBuf> {
    Ok(root()?.join("proto/src/generated"))
}

/// Where the CRDs live, for whoever installs them in a stock kube-apiserver.
pub(crate) fn crds_path() -> Result<PathBuf> {
    Ok(root()?.join("docs/crds.yaml"))
}

fn proto_files() -> Result<Vec<PathBuf>> {
    let folder = root()?.join("proto");
    let mut files = Vec::new();
    let mut folders = vec![folder];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() && !path.ends_with("src") {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "proto") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Compiles every `.proto` file into `out`.
pub(crate) fn messages(out: &Path) -> Result<()> {
    let files = proto_files()?;
    if files.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let descriptors =
        protox::compile(&files, [root()?.join("proto")]).context("cannot compile the .proto files")?;
    let mut config = prost_build::Config::new();
    // `Bytes` share the buffer that was read instead of copying out of it.
    config.bytes(["."]).btree_map(["."]).out_dir(out);
    let services = tonic_prost_build::configure().build_transport(false).service_generator();
    config.service_generator(Box::new(EtcdServices(services)));
    config.compile_fds(descriptors).context("cannot write the messages' code")?;
    for entry in fs::read_dir(out)? {
        let path = entry?.path();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if !text.starts_with(HEAD) {
            fs::write(&path, format!("{HEAD}{text}"))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        // The target folder may be elsewhere, where there is no `rustfmt.toml`.
        let style = root()?.join("rustfmt.toml");
        Cmd::new("rustfmt")
            .args(["--edition", "2024", "--quiet", "--config-path"])
            .arg(style)
            .arg(&path)
            .read()?;
    }
    Ok(())
}

/// Generates the services of etcd's API and its health check. The others have a call or two, over connections of their own
/// making; they need no gRPC library.
struct EtcdServices(Box<dyn ServiceGenerator>);

impl ServiceGenerator for EtcdServices {
    fn generate(&mut self, service: Service, code: &mut String) {
        if ["etcdserverpb", "grpc.health.v1"].contains(&service.package.as_str()) {
            self.0.generate(service, code);
        }
    }

    fn finalize(&mut self, code: &mut String) {
        self.0.finalize(code);
    }
}

const HEAD: &str = "// Written by `cargo xtask generate` from proto/*.proto: change those, not this.\n";

/// What `generate` would change in the messages' code.
pub(crate) fn stale_messages() -> Result<Vec<String>> {
    let fresh = root()?.join("target/xtask-generated");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).with_context(|| format!("cannot remove {}", fresh.display()))?;
    }
    messages(&fresh)?;
    let mut found = Vec::new();
    if !fresh.exists() {
        return Ok(found);
    }
    let committed = messages_dir()?;
    for entry in fs::read_dir(&fresh)? {
        let entry = entry?;
        let there = committed.join(entry.file_name());
        if fs::read(&there).ok() != Some(fs::read(entry.path())?) {
            found.push(format!(
                "proto/src/generated/{} is not what its .proto file says: run `cargo xtask generate`",
                entry.file_name().to_string_lossy()
            ));
        }
    }
    Ok(found)
}

/// Writes the CRDs as the programs themselves install them.
pub(crate) fn crds(path: &Path) -> Result<()> {
    let yaml = Cmd::new("cargo").args(["run", "--quiet", "--package", "cli", "--", "crds"]).read()?;
    let text = [b"# Written by `cargo xtask generate` from federation-core.\n".as_slice(), &yaml].concat();
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
