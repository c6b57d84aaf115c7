//! The main job on a public data set that nobody here made.

use clap::Parser;
use fednano_server::commands::simulate;
use fednano_tests::{block, easy_vqa, nano_llava};
use std::time::Duration;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: simulate::Args,
}

/// A short run: the README's table comes from longer ones.
pub fn easy_vqa_run() -> anyhow::Result<serde_json::Value> {
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("result.json");
    let data = easy_vqa().ok_or_else(|| anyhow::anyhow!("easy-VQA is missing"))?;
    let model = nano_llava();
    let text = |p: &std::path::Path| p.display().to_string();
    let arguments = [
        "simulate",
        "--model",
        &text(&model),
        "--data",
        &text(&data),
        "--clients",
        "3",
        "--alpha",
        "1",
        "--rounds",
        "4",
        "--seed",
        "1",
        "--limit",
        "250",
        "--evaluation-limit",
        "500",
        "--strategy",
        "fisher",
        "--json",
        &text(&json),
    ];
    let args = Cli::try_parse_from(arguments)?.args;
    block(Duration::from_secs(550), async { simulate::main(&args).await })?;
    Ok(serde_json::from_slice(&std::fs::read(json)?)?)
}

pub fn easy_vqa_test() -> anyhow::Result<()> {
    let result = easy_vqa_run()?;
    let number = |v: &serde_json::Value| v.as_f64().unwrap_or(f64::NAN);
    let run = &result["runs"][0];
    let tuned = number(&run["final"]["accuracy"]);
    for (what, baseline) in [
        ("zero-shot", number(&result["zero_shot"]["accuracy"])),
        ("the best constant answer", number(&result["baselines"]["constant"])),
        ("the best question-only answer", number(&result["baselines"]["question_only"])),
    ] {
        println!("{what} {baseline:.3}, tuned {tuned:.3}");
        anyhow::ensure!(
            tuned > baseline + 0.05,
            "tuned accuracy {tuned:.3} does not clearly exceed {what}, {baseline:.3}"
        );
    }
    anyhow::ensure!(run["rounds"].as_array().is_some_and(|r| r.len() == 5), "rounds are missing");
    Ok(())
}
