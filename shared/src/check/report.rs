//! What a comparison found, for people and as JSON.

use super::CheckError;
use super::limits::Limit;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Whether a row is within its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// Within its limit.
    #[serde(rename = "ok")]
    Ok,
    /// Past its limit, misshapen or not finite.
    #[serde(rename = "FAILED")]
    Failed,
    /// Nothing was compared; the note says why.
    #[serde(rename = "not computed")]
    NotComputed,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Failed => "FAILED",
            Self::NotComputed => "not computed",
        })
    }
}

/// One tensor, or a part of it (`name@part`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its name in the reference values.
    pub name: String,
    /// Its shape as computed here; that of the reference where nothing was computed.
    pub shape: Vec<usize>,
    /// Deviation as the limit's source defines it; none where nothing could be compared, null in JSON also when infinite.
    pub deviation: Option<f64>,
    /// Largest deviation that passes.
    pub limit: Option<f64>,
    /// Within the limit or not.
    pub verdict: Verdict,
    /// Whatever the numbers do not say.
    pub note: String,
}

impl Row {
    /// A row that was compared; without a limit it fails, so that no tensor passes by oversight.
    pub fn judged(name: &str, shape: &[usize], deviation: f64, limit: Option<&Limit>, note: String) -> Self {
        let good = limit.is_some_and(|l| deviation <= l.limit);
        let mut notes = vec![note];
        match limit {
            None => notes.push("no limit is set for it in check/limits.rs".into()),
            Some(l) if !good => notes.push(format!("limit: {}", l.source)),
            Some(_) => {}
        }
        notes.retain(|n| !n.is_empty());
        Self {
            name: name.to_owned(),
            shape: shape.to_vec(),
            deviation: Some(deviation),
            limit: limit.map(|l| l.limit),
            verdict: if good { Verdict::Ok } else { Verdict::Failed },
            note: notes.join("; "),
        }
    }

    /// A row without a number.
    pub fn plain(name: &str, shape: &[usize], verdict: Verdict, note: impl Into<String>) -> Self {
        Self { name: name.to_owned(), shape: shape.to_vec(), deviation: None, limit: None, verdict, note: note.into() }
    }

    /// How near to its limit, or how far past it: 1 is the limit.
    fn strain(&self) -> f64 {
        match (self.verdict, self.deviation, self.limit) {
            (Verdict::NotComputed, ..) => -1.0,
            (_, Some(d), Some(l)) if l > 0.0 => d / l,
            (Verdict::Ok, ..) => 0.0,
            (Verdict::Failed, ..) => f64::INFINITY,
        }
    }
}

/// Counts of all rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Rows within their limits.
    pub ok: usize,
    /// Rows past their limits.
    pub failed: usize,
    /// Rows without a comparison.
    pub not_computed: usize,
    /// The row nearest to its limit, or furthest past it.
    pub worst: Option<String>,
}

/// All rows and their summary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// In the order of computation.
    pub rows: Vec<Row>,
    /// Their counts.
    pub summary: Summary,
}

impl Report {
    /// Count rows.
    pub fn new(rows: Vec<Row>) -> Self {
        let count = |v: Verdict| rows.iter().filter(|r| r.verdict == v).count();
        let mut worst: Option<&Row> = None;
        for row in rows.iter().filter(|r| r.verdict != Verdict::NotComputed) {
            if worst.is_none_or(|w| row.strain() > w.strain()) {
                worst = Some(row);
            }
        }
        let summary = Summary {
            ok: count(Verdict::Ok),
            failed: count(Verdict::Failed),
            not_computed: count(Verdict::NotComputed),
            worst: worst.map(|w| w.name.clone()),
        };
        Self { rows, summary }
    }

    /// Names of the rows past their limits.
    pub fn failed(&self) -> Vec<&str> {
        self.rows.iter().filter(|r| r.verdict == Verdict::Failed).map(|r| r.name.as_str()).collect()
    }

    /// A row by its name.
    pub fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|r| r.name == name)
    }

    /// An error if a row is past its limit, or if nothing was compared at all.
    ///
    /// # Errors
    /// [`CheckError::Nothing`]; or [`CheckError::PastLimits`]: how many failed, and the worst of them.
    pub fn result(&self) -> Result<(), CheckError> {
        let s = &self.summary;
        let compared = s.ok + s.failed;
        if compared == 0 {
            return Err(CheckError::Nothing);
        }
        if s.failed == 0 {
            return Ok(());
        }
        let worst = s.worst.as_deref().and_then(|name| self.row(name));
        let worst = worst.map_or(String::new(), |w| {
            format!("{} (deviation {}, limit {})", w.name, number(w.deviation), number(w.limit))
        });
        Err(CheckError::PastLimits { failed: s.failed, compared, worst })
    }
}

/// Short, and exact where it is a count.
fn number(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(v) if v.is_finite() && v >= 0.0 && v.fract() == 0.0 => format!("{v:.0}"),
        Some(v) if v.is_finite() => format!("{v:.1e}"),
        Some(_) => "inf".into(),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape = |r: &Row| format!("{:?}", r.shape).replace(' ', "");
        let heads = ["tensor", "shape"];
        let name_width = self.rows.iter().map(|r| r.name.len()).max().unwrap_or(0).max(heads[0].len());
        let shape_width = self.rows.iter().map(|r| shape(r).len()).max().unwrap_or(0).max(heads[1].len());
        let line = |cells: [&str; 6]| {
            let [name, shape, deviation, limit, verdict, note] = cells;
            let text =
                format!("{name:name_width$}  {shape:shape_width$}  {deviation:>9}  {limit:>7}  {verdict:12}  {note}");
            text.trim_end().to_owned()
        };
        writeln!(f, "{}", line([heads[0], heads[1], "deviation", "limit", "verdict", ""]))?;
        for r in &self.rows {
            let (deviation, limit) = (number(r.deviation), number(r.limit));
            writeln!(f, "{}", line([&r.name, &shape(r), &deviation, &limit, &r.verdict.to_string(), &r.note]))?;
        }
        let s = &self.summary;
        let worst = s.worst.as_deref().and_then(|name| self.row(name)).filter(|w| w.deviation.is_some());
        let worst = worst
            .map_or(String::new(), |w| format!("; worst {}: {} of {}", w.name, number(w.deviation), number(w.limit)));
        writeln!(f, "{} ok, {} FAILED, {} not computed{worst}", s.ok, s.failed, s.not_computed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::limits::limit_of;

    fn judged(name: &str, deviation: f64) -> Row {
        Row::judged(name, &[2, 3], deviation, limit_of(name), String::new())
    }

    #[test]
    fn the_worst_is_measured_by_its_own_limit() {
        let rows = vec![judged("logits", 5e-5), judged("loss", 4e-6), judged("input_ids", 0.0)];
        let report = Report::new(rows);
        assert_eq!(report.summary.worst.as_deref(), Some("loss"));
        report.result().unwrap();
    }

    #[test]
    fn one_row_past_its_limit_fails_everything() {
        let skipped = Row::plain("vision.hidden_states.9", &[1], Verdict::NotComputed, "later");
        let report = Report::new(vec![judged("logits", 5e-3), judged("input_ids", 2.0), skipped]);
        assert_eq!(report.failed(), ["logits", "input_ids"]);
        let words = report.result().unwrap_err().to_string();
        assert!(words.contains("2 of 2") && words.contains("input_ids (deviation 2, limit 0)"), "{words}");
        let text = report.to_string();
        assert!(text.contains("0 ok, 2 FAILED, 1 not computed"), "{text}");
        assert!(text.lines().nth(1).unwrap().contains("logits") && text.contains("5.0e-3"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["rows"][0]["verdict"], "FAILED");
        assert_eq!(json["rows"][2]["verdict"], "not computed");
        assert_eq!(json["summary"]["failed"], 2);
    }

    #[test]
    fn nothing_compared_and_nothing_finite_are_failures() {
        let words = Report::new(Vec::new()).result().unwrap_err().to_string();
        assert!(words.contains("make_fixture.py"), "{words}");
        assert_eq!(judged("logits", f64::INFINITY).verdict, Verdict::Failed);
        assert_eq!(judged("logits", f64::NAN).verdict, Verdict::Failed);
        assert_eq!(judged("a tensor without a limit", 0.0).verdict, Verdict::Failed);
    }
}
