//! The fuzz targets without a fuzzer: every target's body over its committed corpus and seeded mutations of it, so that
//! an ordinary test run notices what a fuzzer would notice first. `fuzz/README.md` says how to really fuzz.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Mutations of each target's corpus: some seconds for all targets together in a debug build. `CELLWAY_FUZZ_MUTATIONS`
/// sets another number.
const MUTATIONS: u64 = 4_000;

/// The longest input: mutations that splice would grow without end.
const LONGEST: usize = 16 << 10;

/// What means something in one of the formats.
const WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\0",
    b"%",
    b"%2f",
    b"..",
    b"/",
    b":",
    b"=",
    b"==",
    b"!=",
    b",",
    b"(",
    b")",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b"\\",
    b"null",
    b"{}",
    b"[]",
    b"-1",
    b"1e999",
    b"18446744073709551616",
    b"*",
    b"&a ",
    b"*a",
    b"<<: *a",
    b"\xff\xff\xff\xff",
    b"\x80",
    b"\xc3\x28",
    b"$patch",
    b"$retainKeys",
    b"metadata",
    b"spec",
    b"managedFields",
    b"fieldsV1",
    b"k:{\"name\":\"a\"}",
    b"connection: impersonate-user",
    b".cellway",
    b"[::1]:1",
];

/// A target's name, which is that of its file in `fuzz/fuzz_targets`, its body, and how that file names the body.
struct Target {
    name: &'static str,
    body: fn(&[u8]),
    path: &'static str,
}

macro_rules! targets {
    ($(($name:literal, $($part:ident)::+)),+ $(,)?) => {
        &[$(Target { name: $name, body: $($part)::+, path: stringify!($($part)::+) }),+]
    };
}

const TARGETS: &[Target] = targets![
    ("tunnel_frames", tunnel::fuzzing::frames_in_pieces),
    ("tunnel_header_block", tunnel::fuzzing::header_block),
    ("tunnel_dial", tunnel::fuzzing::dial),
    ("tunnel_messages", tunnel::fuzzing::messages),
    ("tunnel_target", tunnel::fuzzing::target),
    ("tunnel_egress_answer", tunnel::fuzzing::egress_answer),
    ("tunnel_policy", tunnel::fuzzing::policy),
    ("tls_identity", tls::fuzzing::identity),
    ("tls_certificate", tls::fuzzing::certificate),
    ("tls_certificate_bundle", tls::fuzzing::certificate_bundle),
    ("tls_certificate_request", tls::fuzzing::certificate_request),
    ("server_connect_head", proxy_server::fuzzing::connect_head),
    ("server_route", proxy_server::fuzzing::route),
    ("server_enrolment", proxy_server::fuzzing::enrolment),
    ("server_api_request", proxy_server::fuzzing::api_request),
    ("server_review_answers", proxy_server::fuzzing::review_answers),
    ("agent_gateway_request", proxy_agent::fuzzing::gateway_request),
    ("agent_enrolment_answer", proxy_agent::fuzzing::enrolment_answer),
    ("apiserver_url", federation_apiserver::fuzzing::url),
    ("apiserver_storage_key", federation_apiserver::fuzzing::storage_key),
    ("apiserver_headers", federation_apiserver::fuzzing::headers),
    ("apiserver_selectors", federation_apiserver::fuzzing::selectors),
    ("apiserver_continue_token", federation_apiserver::fuzzing::continue_token),
    ("apiserver_json", federation_apiserver::fuzzing::json),
    ("apiserver_yaml", federation_apiserver::fuzzing::yaml),
    ("apiserver_protobuf", federation_apiserver::fuzzing::protobuf),
    ("apiserver_json_patch", federation_apiserver::fuzzing::json_patch),
    ("apiserver_merge_patch", federation_apiserver::fuzzing::merge_patch),
    ("apiserver_apply", federation_apiserver::fuzzing::apply),
    ("apiserver_object", federation_apiserver::fuzzing::object),
    ("apiserver_crd", federation_apiserver::fuzzing::crd),
    ("apiserver_jsonpath", federation_apiserver::fuzzing::jsonpath),
    ("apiserver_id_token", federation_apiserver::fuzzing::id_token),
    ("apiserver_admission_answer", federation_apiserver::fuzzing::admission_answer),
    ("apiserver_conversion_answer", federation_apiserver::fuzzing::conversion_answer),
    ("apiserver_kms_answer", federation_apiserver::fuzzing::kms_answer),
    ("store_transaction", federation_store::fuzzing::transaction),
    ("store_read", federation_store::fuzzing::read),
    ("store_watch", federation_store::fuzzing::watch),
    ("store_listen_url", federation_store::fuzzing::listen_url),
    ("core_overrides", federation_core::fuzzing::patches),
    ("core_answers", federation_core::fuzzing::answers),
    ("core_conversion_review", federation_core::fuzzing::conversion_review),
    ("core_credentials", federation_core::fuzzing::credentials),
];

fn folder(below: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz").join(below)
}

/// The names in a folder, and what they are the names of.
fn entries(folder: &Path) -> BTreeMap<String, PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("readable").path());
    paths.map(|path| (path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), path)).collect()
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let files = entries(&folder("corpus").join(target));
    files.values().map(|path| fs::read(path).expect("readable")).collect()
}

/// One step away from one input, or between two.
fn mutated(corpus: &[Vec<u8>], rng: &mut StdRng) -> Vec<u8> {
    let mut input = corpus.choose(rng).cloned().unwrap_or_default();
    for _ in 0..rng.random_range(1..=4) {
        let at = rng.random_range(0..=input.len());
        match rng.random_range(0..6) {
            0 if at < input.len() => input[at] ^= 1 << rng.random_range(0..8),
            1 if at < input.len() => input[at] = rng.random(),
            2 => input.truncate(at),
            3 => {
                let end = rng.random_range(at..=input.len());
                let piece = input[at..end].to_vec();
                if rng.random() {
                    input.drain(at..end);
                } else {
                    input.splice(at..at, piece);
                }
            }
            4 => {
                let other = corpus.choose(rng).map_or(&[][..], Vec::as_slice);
                let from = rng.random_range(0..=other.len());
                input.splice(at.., other[from..].iter().copied());
            }
            _ => {
                let word = WORDS.choose(rng).copied().unwrap_or_default();
                input.splice(at..at, word.iter().copied());
            }
        }
        input.truncate(LONGEST);
    }
    input
}

fn run(name: &str, body: fn(&[u8]), input: &[u8], what: &str) {
    if catch_unwind(AssertUnwindSafe(|| body(input))).is_err() {
        panic!("{name} fails on {what}: {:?}", String::from_utf8_lossy(input));
    }
}

#[test]
fn every_target_is_in_the_list_and_has_a_corpus() {
    let listed: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    let files: BTreeSet<String> = entries(&folder("fuzz_targets")).into_keys().collect();
    let folders: BTreeSet<String> = entries(&folder("corpus")).into_keys().collect();
    assert_eq!(listed, files, "TARGETS and fuzz/fuzz_targets differ");
    assert_eq!(listed, folders, "TARGETS and fuzz/corpus differ");
    let manifest = fs::read_to_string(folder("Cargo.toml")).expect("readable");
    for Target { name, path, .. } in TARGETS {
        let built = format!("[[bin]]\nname = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"\n");
        assert!(manifest.contains(&built), "{name} is not in fuzz/Cargo.toml");
        // `stringify!` may put spaces between the parts.
        let path = path.replace(' ', "");
        let package = path.split("::").next().unwrap_or_default().replace('_', "-");
        assert!(
            manifest.contains(&format!("\n{package} = {{ path = ")),
            "fuzz/Cargo.toml does not depend on {package}"
        );
        assert!(!corpus(name).is_empty(), "{name} has no corpus");
        // No more than the call of a body that is compiled here: nobody compiles these files before a fuzzer does.
        let file = fs::read_to_string(folder(&format!("fuzz_targets/{name}.rs"))).expect("readable");
        let call = format!("#![no_main]\n\nlibfuzzer_sys::fuzz_target!(|input: &[u8]| {path}(input));\n");
        let rest = file.strip_suffix(&call).unwrap_or_else(|| panic!("{name}.rs does not end with {call}"));
        assert!(rest.lines().all(|line| line.starts_with("//! ")), "{name}.rs holds more than that call");
    }
}

#[test]
fn no_target_fails_on_its_corpus_or_near_it() {
    let mutations = std::env::var("CELLWAY_FUZZ_MUTATIONS").ok().and_then(|number| number.parse().ok());
    for Target { name, body, .. } in TARGETS {
        let corpus = corpus(name);
        for input in &corpus {
            run(name, *body, input, "an input of its corpus");
        }
        for seed in 0..mutations.unwrap_or(MUTATIONS) {
            let input = mutated(&corpus, &mut StdRng::seed_from_u64(seed));
            run(name, *body, &input, &format!("mutation {seed}"));
        }
    }
}
