//! `fednano account`: what a federation costs, from a model's shape.

use crate::account::{Account, Options, Section, account};
use crate::presets;
use anyhow::Context;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::config::ModelConfig;
use std::path::Path;

/// Count parameters and bytes of a federation from the model's shape alone.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory (its config.json is read), or a preset such as llava-1.5-7b (an unknown name lists them).
    #[arg(long)]
    model: String,
    /// Rank of the adapters, and of the LoRA that they are compared with.
    #[arg(long, default_value_t = 64)]
    rank: u64,
    /// How the client's frozen part is stored.
    #[arg(long, default_value_t = EdgeDtype::F16)]
    edge_dtype: EdgeDtype,
    /// Samples of an optimiser step.
    #[arg(long, default_value_t = 16)]
    batch: u64,
    /// Text tokens of the prompt: the question, `<s>` and the template around it.
    #[arg(long, default_value_t = 48)]
    question_tokens: u64,
    /// Tokens of the answer, `</s>` among them.
    #[arg(long, default_value_t = 16)]
    answer_tokens: u64,
    /// Samples of a client.
    #[arg(long, default_value_t = 1000)]
    samples: u64,
    /// Passes over them in a round.
    #[arg(long, default_value_t = 1)]
    local_epochs: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Run it.
///
/// # Errors
/// An unknown model, or an option out of range.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let options = Options {
        rank: args.rank,
        edge_dtype: args.edge_dtype,
        batch: args.batch,
        question_tokens: args.question_tokens,
        answer_tokens: args.answer_tokens,
        samples: args.samples,
        local_epochs: args.local_epochs,
    };
    let account = account(&config(&args.model)?, options)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&account)?);
    } else {
        print!("{}", text(&account));
    }
    Ok(())
}

fn config(model: &str) -> anyhow::Result<ModelConfig> {
    if let Some(config) = presets::find(model) {
        return Ok(config);
    }
    let path = Path::new(model).join("config.json");
    let json = std::fs::read_to_string(&path).with_context(|| {
        let known = presets::NAMES.join(", ");
        format!("cannot read {}; --model takes a model directory or one of {known}", path.display())
    })?;
    Ok(ModelConfig::from_json(&json)?)
}

fn text(account: &Account) -> String {
    let tables: Vec<String> = account.sections.iter().map(table).collect();
    let meet = account.break_even;
    format!(
        "{}\nIn f16 the boundary moves as much as a round of LoRA with connector does (up and down) at {} samples\n\
         in mode activations, at {} in the first and {} in every later round of mode low-rank.\n",
        tables.join("\n"),
        grouped(meet.activations),
        grouped(meet.low_rank_first_round),
        grouped(meet.low_rank_later_rounds)
    )
}

/// Numbers to the right, and last what they count.
fn table(section: &Section) -> String {
    let mut rows = vec![vec![String::from("parameters"), String::new(), String::from("share")]];
    rows[0].extend(section.forms.iter().map(|f| (*f).to_owned()));
    rows[0].push("what is counted".into());
    for line in &section.lines {
        let mut row = vec![
            line.parameters.map(grouped).unwrap_or_default(),
            line.parameters.map(short).unwrap_or_default(),
            line.share.map(percent).unwrap_or_default(),
        ];
        row.extend(section.forms.iter().map(|f| line.bytes.get(f).copied().map(human).unwrap_or_default()));
        row.push(line.counted.clone());
        rows.push(row);
    }
    let last = rows[0].len() - 1;
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    // Traffic has no parameters: a column without a figure is left out.
    let columns: Vec<(usize, usize)> =
        (0..last).filter(|c| rows[1..].iter().any(|r| !r[*c].is_empty())).map(|c| (c, width(c))).collect();
    let mut out = format!("{} (share: of {})\n", section.title, section.share_of);
    for row in &rows {
        for &(column, width) in &columns {
            out += &format!("  {:>width$}", row[column]);
        }
        out += &format!("  {}\n", row[last]);
    }
    out
}

/// Digits in groups of three.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A count in a few characters, as papers print it: `303.5 M`, `7.063 B`.
fn short(n: u64) -> String {
    match n {
        1_000_000_000.. => format!("{:.3} B", n as f64 / 1e9),
        1_000_000.. => format!("{:.1} M", n as f64 / 1e6),
        _ => String::new(),
    }
}

/// A percentage, small ones with more digits.
fn percent(share: f64) -> String {
    let value = share * 100.0;
    match value {
        v if v >= 100.0 => format!("{v:.0} %"),
        v if v >= 1.0 => format!("{v:.2} %"),
        v => format!("{v:.4} %"),
    }
}

/// Bytes in decimal units.
fn human(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        1_000_000_000.. => format!("{:.2} GB", value / 1e9),
        1_000_000.. => format!("{:.2} MB", value / 1e6),
        1_000.. => format!("{:.1} kB", value / 1e3),
        _ => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(model: &str, edge_dtype: EdgeDtype) -> String {
        let options = Options {
            rank: 64,
            edge_dtype,
            batch: 16,
            question_tokens: 48,
            answer_tokens: 16,
            samples: 1000,
            local_epochs: 1,
        };
        text(&account(&config(model).unwrap(), options).unwrap())
    }

    #[test]
    fn the_figures_of_the_design_are_printed() {
        let out = printed("llava-1.5-7b", EdgeDtype::F16);
        for figure in
            ["1,048,576", "0.0148 %", "303.5 M", "21.0 M", "131.1 M", "456.6 M", "6.46 %", "7.063 B", "14.13 GB"]
        {
            assert!(out.contains(figure), "{figure} is missing:\n{out}");
        }
        assert!(out.contains("at 69 samples"), "{out}");
    }

    #[test]
    fn every_preset_and_type_has_an_account() {
        for name in presets::NAMES {
            for dtype in [EdgeDtype::F16, EdgeDtype::Int8, EdgeDtype::Int4] {
                assert!(printed(name, dtype).contains("what is counted"));
            }
        }
        assert!(config("no/such/model").unwrap_err().to_string().contains("llava-1.5-13b"));
    }

    #[test]
    fn columns_are_aligned() {
        let out = printed("tiny", EdgeDtype::Int8);
        let client: Vec<&str> = out.split("\n\n").nth(1).unwrap().lines().skip(1).collect();
        let ends: Vec<usize> =
            client.iter().map(|l| l.find("B  ").or(l.find("int8  ").map(|i| i + 3)).unwrap()).collect();
        assert!(ends.windows(2).all(|w| w[0] == w[1]), "{out}");
    }
}
