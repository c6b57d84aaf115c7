//! Layering is a failing test, not a paragraph.

use anyhow::Context;
use fednano_tests::repository;
use std::path::{Path, PathBuf};

/// The protocol's messages, but not the words and number formats that are part of it.
const MESSAGES: &[&str] = &["crate::wire::{", "crate::wire;", "crate::wire::convert", "wire::ClientMessage"];

/// (files below, may not mention, except in)
const FORBIDDEN: &[(&str, &[&str], &[&str])] = &[
    ("shared/src", &["axum", "tokio", "web_sys", "js_sys", "wasm_bindgen", "fednano_server", "fednano_web"], &[]),
    (
        "shared/src/plain.rs",
        &["burn::", "crate::model", "crate::step", "crate::wire", "crate::client", "crate::aggregate", "crate::edge"],
        &[],
    ),
    (
        "shared/src/boundary.rs",
        &["burn::", "crate::model", "crate::step", "crate::wire", "crate::client", "crate::aggregate", "crate::edge"],
        &[],
    ),
    (
        "shared/src/ledger.rs",
        &["burn::", "crate::model", "crate::step", "crate::client", "crate::aggregate", "crate::edge"],
        &[],
    ),
    ("shared/src/config.rs", &["burn::", "crate::"], &[]),
    ("shared/src/settings", &["burn::", "crate::"], &[]),
    ("shared/src/aggregate", &["burn::", "crate::model", "crate::step", "crate::client"], &[]),
    ("shared/src/model", &["crate::client", "crate::wire", "crate::aggregate", "crate::step"], &[]),
    ("shared/src/data", &["crate::client", "crate::wire", "crate::aggregate", "crate::step", "burn::"], &[]),
    // Numbers and modes have names that everybody uses; messages are the client's and the session's.
    ("shared/src/edge.rs", &["crate::client", "crate::step"], &[]),
    ("shared/src/edge.rs", MESSAGES, &[]),
    ("shared/src/step", &["crate::client", "crate::aggregate"], &[]),
    ("shared/src/step", MESSAGES, &[]),
    ("shared/src/optimizer.rs", &["crate::client", "crate::wire", "crate::aggregate", "crate::step"], &[]),
    ("shared/src/wire.rs", &["burn::", "crate::client", "crate::edge", "crate::aggregate", "crate::model"], &[]),
    ("shared/src/wire", &["burn::", "crate::client", "crate::aggregate", "crate::model"], &[]),
    ("shared/src/wire/numbers.rs", &["crate::edge", "crate::step", "crate::boundary"], &[]),
    ("shared/src/client", &["crate::aggregate", "crate::ask"], &[]),
    ("shared/src/generate.rs", &["crate::client", "crate::wire", "crate::aggregate", "crate::ask"], &[]),
    (
        "shared/src/bundle",
        &["crate::client", "crate::wire", "crate::aggregate", "crate::step", "crate::ask", "crate::generate"],
        &[],
    ),
    (
        "shared/src/check",
        &[
            "crate::client",
            "crate::aggregate",
            "crate::ask",
            "crate::generate",
            "crate::bundle",
            "std::fs",
            "std::path",
            "anyhow",
        ],
        &[],
    ),
    ("shared/src/check", MESSAGES, &[]),
    ("shared/src/bundle/quantise.rs", &["burn::", "crate::"], &[]),
    ("shared/src/bundle/table.rs", &["burn::", "crate::model", "crate::edge"], &[]),
    ("server/src/edge_bundle.rs", &["crate::"], &[]),
    (
        "server/src/edge_download.rs",
        &["crate::commands", "crate::app", "crate::http", "crate::coordinator", "crate::store"],
        &[],
    ),
    (
        "server/src/check",
        &["crate::commands", "crate::app", "crate::http", "crate::session", "crate::coordinator"],
        &[],
    ),
    ("server/src/fetch.rs", &["crate::", "burn::", "tokio"], &[]),
    ("server/src/account.rs", &["crate::commands", "crate::app", "burn::", "std::fs", "tokio"], &[]),
    ("server/src", &["axum"], &["http.rs"]),
    ("server/src", &["fednano_web::", "wasm_bindgen"], &[]),
    ("server/src/http.rs", &["crate::commands", "crate::app", "crate::coordinator", "crate::store", "burn::"], &[]),
    ("server/src/http", &["crate::commands", "crate::app", "crate::coordinator", "crate::store", "burn::"], &[]),
    ("server/src/session", &["crate::commands", "crate::app", "crate::http", "crate::store", "burn::"], &[]),
    ("server/src/text_table.rs", &["crate::"], &[]),
    ("server/src/tracing_setup.rs", &["crate::"], &[]),
    ("server/src/wire_bench", &["crate::commands", "crate::http"], &[]),
    ("server/src/wire_bench/link.rs", &["crate::", "burn::", "fednano_shared"], &[]),
    ("server/src/coordinator", &["crate::commands", "crate::app", "crate::http", "crate::session"], &[]),
    ("server/src/coordinator/round", &["crate::", "burn::", "tokio", "std::time", "Instant"], &[]),
    ("server/src/llm_host.rs", &["crate::"], &[]),
    ("server/src/llm_host", &["crate::"], &[]),
    ("server/src/store", &["crate::"], &[]),
    ("server/src/experiment", &["crate::commands", "crate::http"], &[]),
    ("web-client/src", &["fednano_server", "tokio", "axum"], &[]),
    ("web-client/src", &["#[wasm_bindgen"], &["lib.rs"]),
];

/// Code of a file: comments left out, and what follows the unit tests.
fn code(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    Ok(text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n"))
}

fn rust_files(at: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if at.is_file() {
        return Ok(vec![at.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(at).with_context(|| at.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

pub fn imports() -> anyhow::Result<()> {
    let mut faults = Vec::new();
    for (below, words, except) in FORBIDDEN {
        let files = rust_files(&repository().join(below))?;
        anyhow::ensure!(!files.is_empty(), "{below} is empty: the rule is out of date");
        for file in files.iter().filter(|f| !except.iter().any(|e| f.ends_with(e))) {
            let code = code(file)?;
            faults
                .extend(words.iter().filter(|w| code.contains(*w)).map(|w| format!("{} mentions {w}", file.display())));
        }
    }
    anyhow::ensure!(faults.is_empty(), "imports against the layering:\n{}", faults.join("\n"));
    Ok(())
}

/// Short enough to read at a sitting.
const LINES: usize = 600;

pub fn file_lengths() -> anyhow::Result<()> {
    let mut long = Vec::new();
    for crate_dir in ["shared/src", "server/src", "web-client/src", "tests/src"] {
        for file in rust_files(&repository().join(crate_dir))? {
            let lines = std::fs::read_to_string(&file)?.lines().count();
            if lines > LINES {
                long.push(format!("{}: {lines} lines", file.display()));
            }
        }
    }
    anyhow::ensure!(long.is_empty(), "files of more than {LINES} lines:\n{}", long.join("\n"));
    Ok(())
}
