//! pflag's command-line behaviour on top of clap, a configuration file under it, and the result made visible.
//!
//! Kubernetes' programs are started with `--flag`, `--flag=false`, `--duration=1h0m0s`. Programs here declare plain
//! clap structs; [`pflag`] gives their boolean flags Go's forms. When the struct has a `--config` flag, the YAML map in
//! that file is laid *under* the environment and the command line: its keys are flag names without the dashes.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use clap::builder::{BoolishValueParser, ValueParser};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};
use serde::Serialize;

/// A configuration file is small; anything larger is not one.
const MAX_CONFIG_BYTES: u64 = 1024 * 1024;

/// Parsed arguments and where each came from.
#[derive(Debug)]
pub struct Parsed<A> {
    /// The program's own struct.
    pub args: A,
    /// Every flag as it is in effect, secrets hidden.
    pub effective: Effective,
}

/// Every flag's value and origin, in declaration order.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Effective(pub Vec<Flag>);

/// One flag as it is in effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Flag {
    /// Long name without dashes.
    pub name: String,
    /// Its value as text; lists joined by commas; empty when unset; `<hidden>` for secrets.
    pub value: String,
    /// Who set it.
    pub source: Source,
}

/// Who set a flag. Earlier ones win.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// The command line.
    Flag,
    /// An environment variable.
    Environment,
    /// The configuration file.
    File,
    /// The program.
    Default,
}

/// Why the flags or the configuration file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum FlagError {
    /// The command line is wrong, or asked for help.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// The file cannot be read.
    #[error("failed to read the configuration file {path}")]
    Read {
        /// The file named by `--config`.
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The file is not a YAML map of scalars and lists.
    #[error("the configuration file {path} is not a map of flag names to values: {reason}")]
    Shape {
        /// The file named by `--config`.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The file names a flag that does not exist.
    #[error("the configuration file {path} sets '{key}', which is no flag of this program; see --help")]
    UnknownKey {
        /// The file named by `--config`.
        path: PathBuf,
        /// The key.
        key: String,
    },
}

/// Parses the process's arguments; ends the process on `--help`, `--version` and usage errors, as clap does.
pub fn parse<A: CommandFactory + FromArgMatches>() -> Parsed<A> {
    match try_parse(std::env::args_os()) {
        Ok(parsed) => parsed,
        Err(FlagError::Usage(error)) => error.exit(),
        Err(error) => A::command().error(clap::error::ErrorKind::Io, crate::error_chain(&error)).exit(),
    }
}

/// Parses `argv` (program name first), merging the configuration file that it names.
///
/// # Errors
/// Usage errors (also `--help`), an unreadable or malformed file, an unknown key in it.
pub fn try_parse<A: CommandFactory + FromArgMatches>(
    argv: impl IntoIterator<Item = impl Into<OsString>>,
) -> Result<Parsed<A>, FlagError> {
    let argv: Vec<OsString> = argv.into_iter().map(Into::into).collect();
    let command = pflag(A::command());
    let has_config = command.get_arguments().any(|arg| arg.get_long() == Some("config"));
    if !has_config {
        let matches = command.clone().try_get_matches_from(argv)?;
        let effective = effective(&command, &matches, &[]);
        return Ok(Parsed { args: A::from_arg_matches(&matches)?, effective });
    }
    // Required flags may be in the file, so the first pass only looks for who set what.
    let lenient = command.clone().mut_args(|arg| arg.required(false));
    let first = lenient.try_get_matches_from(argv.clone())?;
    let from_file = match config_path(&command, &first) {
        Some(path) => read_config(&command, &path)?,
        None => Vec::new(),
    };
    let mut merged: Vec<OsString> = argv.first().cloned().into_iter().collect();
    let mut file_ids = Vec::new();
    for (id, name, values) in from_file {
        if matches!(first.value_source(&id), Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            continue;
        }
        for value in values {
            merged.push(format!("--{name}={value}").into());
        }
        file_ids.push(id);
    }
    merged.extend(argv.into_iter().skip(1));
    let matches = command.clone().try_get_matches_from(merged)?;
    let effective = effective(&command, &matches, &file_ids);
    Ok(Parsed { args: A::from_arg_matches(&matches)?, effective })
}

/// Gives every boolean flag of `command` (and of its subcommands) pflag's forms: `--x`, `--x=true`, `--x=0`.
pub fn pflag(command: Command) -> Command {
    let command = command.args_override_self(true).mut_args(|arg| {
        // Positionals and clap's own help and version stay what they are.
        if arg.get_long().is_none() || !is_bool(&arg) {
            return arg;
        }
        let unset = arg.get_default_values().is_empty();
        let arg = arg
            .action(ArgAction::Set)
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_name("BOOL")
            .hide_possible_values(true)
            .value_parser(ValueParser::new(go_bool));
        if unset { arg.default_value("false") } else { arg }
    });
    command.mut_subcommands(pflag)
}

/// Reads a boolean as Go's `strconv.ParseBool` does.
fn go_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

fn is_bool(arg: &Arg) -> bool {
    let bool_id = std::any::TypeId::of::<bool>();
    match arg.get_action() {
        ArgAction::SetTrue | ArgAction::SetFalse => true,
        ArgAction::Set => {
            let parser = arg.get_value_parser();
            parser.type_id() == bool_id
                || parser.type_id() == ValueParser::new(BoolishValueParser::new()).type_id()
        }
        _ => false,
    }
}

fn config_path(command: &Command, matches: &ArgMatches) -> Option<PathBuf> {
    let arg = command.get_arguments().find(|arg| arg.get_long() == Some("config"))?;
    let raw = matches.try_get_raw(arg.get_id().as_str()).ok()??.next()?;
    (!raw.is_empty()).then(|| PathBuf::from(raw))
}

/// The file's entries as (argument id, flag name, values as text).
fn read_config(command: &Command, path: &PathBuf) -> Result<Vec<(String, String, Vec<String>)>, FlagError> {
    let read = |source| FlagError::Read { path: path.clone(), source };
    let shape = |reason: String| FlagError::Shape { path: path.clone(), reason };
    if std::fs::metadata(path).map_err(read)?.len() > MAX_CONFIG_BYTES {
        return Err(shape(format!("it is larger than {MAX_CONFIG_BYTES} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(read)?;
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let map: BTreeMap<String, serde_yaml_ng::Value> =
        serde_yaml_ng::from_str(&text).map_err(|error| shape(error.to_string()))?;
    let mut entries = Vec::with_capacity(map.len());
    for (key, value) in map {
        let arg = command
            .get_arguments()
            .find(|arg| arg.get_long() == Some(key.as_str()) && key != "config")
            .ok_or_else(|| FlagError::UnknownKey { path: path.clone(), key: key.clone() })?;
        let values = match &value {
            serde_yaml_ng::Value::Null => continue,
            serde_yaml_ng::Value::Sequence(list) => list.iter().map(scalar).collect::<Option<Vec<_>>>(),
            other => scalar(other).map(|one| vec![one]),
        };
        let values = values
            .ok_or_else(|| shape(format!("the value of '{key}' is not a scalar or a list of scalars")))?;
        entries.push((arg.get_id().to_string(), key, values));
    }
    Ok(entries)
}

fn scalar(value: &serde_yaml_ng::Value) -> Option<String> {
    match value {
        serde_yaml_ng::Value::String(text) => Some(text.clone()),
        serde_yaml_ng::Value::Bool(value) => Some(value.to_string()),
        serde_yaml_ng::Value::Number(value) => Some(value.to_string()),
        _ => None,
    }
}

fn effective(command: &Command, matches: &ArgMatches, file_ids: &[String]) -> Effective {
    let flags = command.get_arguments().filter_map(|arg| {
        let name = arg.get_long()?;
        if matches!(
            arg.get_action(),
            ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
        ) {
            return None;
        }
        let id = arg.get_id().as_str();
        let source = match matches.value_source(id) {
            Some(ValueSource::CommandLine) if file_ids.iter().any(|f| f == id) => Source::File,
            Some(ValueSource::CommandLine) => Source::Flag,
            Some(ValueSource::EnvVariable) => Source::Environment,
            _ => Source::Default,
        };
        let value = matches
            .try_get_raw(id)
            .ok()
            .flatten()
            .map(|raw| raw.map(|v| v.to_string_lossy().into_owned()).collect::<Vec<_>>().join(","))
            .unwrap_or_default();
        let value = if is_secret(arg, &value) { "<hidden>".to_owned() } else { value };
        Some(Flag { name: name.to_owned(), value, source })
    });
    Effective(flags.collect())
}

/// Whether a flag's value holds a secret: it is declared so by hiding its variable's value, is named so and is not the name
/// of a file or a length of time, or is a URL that may hold a password.
fn is_secret(arg: &Arg, value: &str) -> bool {
    let name = arg.get_long().unwrap_or_default();
    let about_one = ["-file", "-path", "-dir", "-expiration"].iter().any(|end| name.ends_with(end));
    let named_so = !about_one && ["token", "secret", "password"].iter().any(|word| name.contains(word));
    let url = value.contains("://") && value.contains('@');
    !value.is_empty() && (arg.is_hide_env_values_set() || named_so || url)
}

// === impl Effective ===

impl Effective {
    /// The flags of the subcommand that `matches`, made by `command`, name; none where they name none.
    pub fn of_subcommand(command: &Command, matches: &ArgMatches) -> Self {
        let found = matches.subcommand().and_then(|(name, of)| Some((command.find_subcommand(name)?, of)));
        found.map(|(command, matches)| effective(command, matches, &[])).unwrap_or_default()
    }

    /// Shows what a flag has come to mean, such as the whole path of what was named relatively.
    pub fn resolve(&mut self, name: &str, value: impl Into<String>) {
        if let Some(flag) = self.0.iter_mut().find(|flag| flag.name == name) {
            flag.value = value.into();
        }
    }

    /// The flags that somebody set.
    pub fn changed(&self) -> impl Iterator<Item = &Flag> {
        self.0.iter().filter(|flag| flag.source != Source::Default)
    }
}

impl fmt::Display for Effective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for flag in &self.0 {
            writeln!(f, "--{}={:?}", flag.name, flag.value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::duration::GoDuration;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Args {
        #[arg(long)]
        config: Option<PathBuf>,
        #[arg(long, default_value_t = 8091)]
        agent_port: u16,
        #[arg(long)]
        enable_profiling: bool,
        #[arg(long, default_value_t = true, action = ArgAction::Set)]
        delete_existing_uds_file: bool,
        #[arg(long, default_value = "1h")]
        keepalive_time: GoDuration,
        #[arg(long, value_delimiter = ',')]
        server: Vec<String>,
        #[arg(long)]
        enrolment_token: Option<String>,
    }

    fn run(argv: &[&str]) -> Result<Parsed<Args>, FlagError> {
        try_parse(std::iter::once("prog").chain(argv.iter().copied()))
    }

    #[test]
    fn booleans_take_gos_forms() {
        for (argv, profiling, delete) in [
            (&[][..], false, true),
            (&["--enable-profiling"][..], true, true),
            (&["--enable-profiling=false", "--delete-existing-uds-file=0"][..], false, false),
            (&["--enable-profiling=T", "--delete-existing-uds-file"][..], true, true),
            (&["--enable-profiling", "--enable-profiling=false"][..], false, true),
        ] {
            let args = run(argv).unwrap().args;
            assert_eq!(
                (args.enable_profiling, args.delete_existing_uds_file),
                (profiling, delete),
                "{argv:?}"
            );
        }
        assert!(run(&["--enable-profiling=yes"]).is_err());
    }

    #[derive(Debug, Parser)]
    struct WithSubcommand {
        #[command(subcommand)]
        _command: Subcommand,
    }

    #[derive(Debug, clap::Subcommand)]
    enum Subcommand {
        Serve {
            #[arg(long, hide_env_values = true)]
            store: Option<String>,
            #[arg(long)]
            egress_proxy: Option<String>,
            #[arg(long)]
            webhook_url: Option<String>,
            #[arg(long)]
            token_auth_file: Option<PathBuf>,
            #[arg(long, default_value = "1h")]
            max_token_expiration: GoDuration,
            #[arg(long)]
            admin_password: Option<String>,
        },
    }

    #[test]
    fn a_subcommands_flags_are_shown_and_its_secrets_are_not() {
        let command = pflag(WithSubcommand::command());
        let argv = [
            "prog",
            "serve",
            "--store=sqlite:///x",
            "--egress-proxy=http://u:p@proxy",
            "--webhook-url=https://hub/convert",
            "--token-auth-file=t",
        ];
        let matches = command.clone().try_get_matches_from(argv).unwrap();
        let mut effective = Effective::of_subcommand(&command, &matches);
        effective.resolve("token-auth-file", "/home/t");
        let shown: Vec<_> =
            effective.0.iter().map(|flag| (flag.name.as_str(), flag.value.as_str(), flag.source)).collect();
        assert_eq!(
            shown,
            [
                ("store", "<hidden>", Source::Flag),
                ("egress-proxy", "<hidden>", Source::Flag),
                ("webhook-url", "https://hub/convert", Source::Flag),
                ("token-auth-file", "/home/t", Source::Flag),
                ("max-token-expiration", "1h", Source::Default),
                ("admin-password", "", Source::Default),
            ]
        );
    }

    #[test]
    fn file_lies_under_the_command_line() {
        let path = std::env::temp_dir().join(format!("cellway-flags-{}.yaml", std::process::id()));
        std::fs::write(
            &path,
            "agent-port: 9000\nkeepalive-time: 10s\nserver: [a:1, b:2]\nenable-profiling: true\n\
             enrolment-token: abc.def\n",
        )
        .unwrap();
        let config = format!("--config={}", path.display());
        let parsed = run(&[&config, "--agent-port=7", "--server=c:3"]).unwrap();
        assert_eq!(parsed.args.agent_port, 7);
        assert_eq!(parsed.args.server, ["c:3"]);
        assert!(parsed.args.enable_profiling);
        assert_eq!(parsed.args.keepalive_time.to_string(), "10s");
        assert_eq!(parsed.args.enrolment_token.as_deref(), Some("abc.def"));
        let by_name = |name: &str| parsed.effective.0.iter().find(|f| f.name == name).cloned().unwrap();
        assert_eq!(by_name("agent-port").source, Source::Flag);
        assert_eq!(by_name("keepalive-time").source, Source::File);
        assert_eq!(by_name("enrolment-token").value, "<hidden>");
        assert_eq!(by_name("delete-existing-uds-file").source, Source::Default);

        std::fs::write(&path, "agent-prot: 9000\n").unwrap();
        let error = run(&[&config]).unwrap_err();
        assert!(error.to_string().contains("agent-prot"), "{error}");
        std::fs::write(&path, "agent-port: {a: 1}\n").unwrap();
        assert!(matches!(run(&[&config]), Err(FlagError::Shape { .. })));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(run(&[&config]), Err(FlagError::Read { .. })));
    }
}
