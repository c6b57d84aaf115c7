//! The plots, as SVG: the same results give the same bytes.

use super::compare::{accuracy, columns, row, rows};
use super::figures::Bytes;
use super::grid::Group;
use super::statistics::Spread;
use super::study::Filled;
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;

/// Lines of most plots; whose clients end with adapters of their own has no line by rounds.
const SHOWN: [&str; 9] = [
    "centralised",
    "fedavg",
    "fedprox",
    "fedadam",
    "median",
    "fisher",
    super::grid::PRINTED,
    super::grid::NORMALISED,
    "local",
];

/// Of those lines, told apart by people who do not see all colours too (Okabe and Ito 2008, and two more).
const COLOURS: [RGBColor; 9] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(204, 121, 167),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(120, 70, 20),
    RGBColor(150, 150, 150),
];

const SIZE: (u32, u32) = (860, 460);
/// Width of the names' column.
const NAMES: i32 = 190;

/// A line with its spread, by the number of its column.
struct Line {
    name: String,
    colour: RGBColor,
    points: Vec<(f64, Spread)>,
}

struct Axes<'a> {
    title: &'a str,
    x: &'a str,
    y: &'a str,
    /// Names of the columns.
    ticks: Vec<String>,
    /// A band instead of bars.
    band: bool,
}

/// All plots for which there are results, by file name.
///
/// # Errors
/// The plotter's.
pub(super) fn all(filled: &[Filled<'_>]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut plots = BTreeMap::new();
    let mut add = |name: &str, plot: Option<String>| {
        if let Some(plot) = plot {
            plots.insert(name.to_owned(), plot);
        }
    };
    add("accuracy-by-round.svg", by_round(filled)?);
    let of = |group, title, x| by_column(filled, group, title, x);
    add("accuracy-by-alpha.svg", of(Group::A, "Accuracy at the end, by skew", "alpha of the Dirichlet split")?);
    add("accuracy-by-rank.svg", of(Group::C, "Accuracy at the end, by rank", "rank of the adapters")?);
    add("bytes.svg", bytes(filled)?);
    Ok(plots)
}

fn colour(name: &str) -> RGBColor {
    let at = SHOWN.iter().position(|shown| *shown == name).unwrap_or(0);
    COLOURS.get(at).copied().unwrap_or(BLACK)
}

/// The runs of group A at the base's alpha.
fn by_round(filled: &[Filled<'_>]) -> anyhow::Result<Option<String>> {
    let base = super::grid::base(super::grid::Size::Full).0.alpha.to_string();
    let mut lines = Vec::new();
    let mut last = 0;
    for name in SHOWN.into_iter().filter(|name| *name != "local") {
        let cell = row(filled, Group::A, name).find(|f| f.cell.column == base);
        let mut rounds: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
        for record in cell.iter().flat_map(|f| &f.records) {
            for r in &record.figures.rounds {
                rounds.entry(r.round).or_default().push(r.accuracy * 100.0);
            }
        }
        last = rounds.last_key_value().map_or(0, |(round, _)| *round).max(last);
        let points = rounds.iter().filter_map(|(round, of)| Some((f64::from(*round), Spread::of(of)?)));
        lines.push(Line { name: name.to_owned(), colour: colour(name), points: points.collect() });
    }
    let title = format!("Accuracy after each round, alpha {base}");
    let axes = Axes {
        title: &title,
        x: "round",
        y: "right answers, %",
        ticks: (0..=last).map(|round| round.to_string()).collect(),
        band: true,
    };
    draw_lines(&axes, &lines)
}

fn by_column(filled: &[Filled<'_>], group: Group, title: &str, x: &str) -> anyhow::Result<Option<String>> {
    let columns = columns(filled, group);
    let line = |name: &str| {
        let point = |(at, column): (usize, &&str)| {
            let cell = row(filled, group, name).find(|f| f.cell.column == **column)?;
            let values: Vec<f64> = cell.records.iter().filter_map(|record| accuracy(record)).collect();
            Some((at as f64, Spread::of(&values)?))
        };
        let points = columns.iter().enumerate().filter_map(point).collect();
        Line { name: name.to_owned(), colour: colour(name), points }
    };
    let lines: Vec<Line> = SHOWN.iter().map(|name| line(name)).collect();
    let ticks = columns.iter().map(|column| (*column).to_owned()).collect();
    draw_lines(&Axes { title, x, y: "right answers, %", ticks, band: false }, &lines)
}

/// None where there is nothing to draw.
fn draw_lines(axes: &Axes<'_>, lines: &[Line]) -> anyhow::Result<Option<String>> {
    let lines: Vec<&Line> = lines.iter().filter(|line| !line.points.is_empty()).collect();
    let all = || lines.iter().flat_map(|line| &line.points).map(|(_, s)| s);
    if lines.is_empty() {
        return Ok(None);
    }
    let lowest = all().map(|s| s.mean - s.sd).fold(100.0, f64::min);
    let highest = all().map(|s| s.mean + s.sd).fold(0.0, f64::max);
    let y = (lowest - 2.0).max(0.0).floor()..(highest + 2.0).min(100.0).ceil().max(1.0);
    let count = axes.ticks.len();
    let x = -0.15..(count as f64 - 0.85).max(0.15);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let (left, right) = root.split_horizontally(SIZE.0 as i32 - NAMES);
        let mut chart = ChartBuilder::on(&left)
            .caption(axes.title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(56)
            .build_cartesian_2d(x, y)?;
        let tick = |at: &f64| tick(&axes.ticks, *at);
        let percent = |value: &f64| format!("{value:.0}");
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_labels(count + 1)
            .y_labels(9)
            .x_label_formatter(&tick)
            .y_label_formatter(&percent)
            .x_desc(axes.x)
            .y_desc(axes.y)
            .label_style(("sans-serif", 15))
            .draw()?;
        let area = chart.plotting_area();
        for line in &lines {
            let (style, faint) = (line.colour.stroke_width(2), line.colour.mix(0.1));
            if axes.band {
                let above = line.points.iter().map(|(x, s)| (*x, s.mean + s.sd));
                let below = line.points.iter().rev().map(|(x, s)| (*x, s.mean - s.sd));
                area.draw(&Polygon::new(above.chain(below).collect::<Vec<_>>(), faint.filled()))?;
            }
            for (x, s) in &line.points {
                area.draw(&Circle::new((*x, s.mean), 3, line.colour.filled()))?;
                if !axes.band {
                    let bar = vec![(*x, s.mean - s.sd), (*x, s.mean + s.sd)];
                    area.draw(&PathElement::new(bar, line.colour.mix(0.5).stroke_width(1)))?;
                }
            }
            let means: Vec<(f64, f64)> = line.points.iter().map(|(x, s)| (*x, s.mean)).collect();
            area.draw(&PathElement::new(means, style))?;
        }
        for (at, line) in (0..).zip(&lines) {
            let y = 56 + 24 * at;
            right.draw(&PathElement::new(vec![(4, y), (26, y)], line.colour.stroke_width(3)))?;
            right.draw(&Text::new(line.name.as_str(), (34, y - 8), ("sans-serif", 15).into_font()))?;
        }
        root.present()?;
    }
    Ok(Some(svg))
}

/// The name of a column at its number, nothing between columns.
fn tick(names: &[String], at: f64) -> String {
    let nearest = at.round();
    let is_there = (at - nearest).abs() < 1e-6 && nearest >= 0.0;
    if is_there { names.get(nearest as usize).cloned().unwrap_or_default() } else { String::new() }
}

/// A client's bytes by strategy, up and down, over all columns of group A.
fn bytes(filled: &[Filled<'_>]) -> anyhow::Result<Option<String>> {
    let mut bars: Vec<(&str, f64, f64)> = Vec::new();
    for name in rows(filled, Group::A) {
        let all: Vec<Bytes> =
            row(filled, Group::A, name).flat_map(|f| &f.records).map(|record| record.figures.bytes).collect();
        let mean = |of: fn(&Bytes) -> u64| Spread::of(&all.iter().map(|b| of(b) as f64 / 1e6).collect::<Vec<_>>());
        if let (Some(up), Some(down)) = (mean(Bytes::up), mean(Bytes::down)) {
            bars.push((name, up.mean, down.mean));
        }
    }
    if bars.is_empty() {
        return Ok(None);
    }
    bars.reverse(); // the first on top
    let widest = bars.iter().map(|(_, up, down)| up.max(*down)).fold(0.1, f64::max);
    let names: Vec<String> = bars.iter().map(|(name, ..)| (*name).to_owned()).collect();
    let y: Range<f64> = -0.6..names.len() as f64 - 0.4;
    let (blue, orange) = (colour("fedavg"), colour("fisher"));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption("Bytes of a client in a whole run: up (blue), down (orange)", ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(NAMES)
            .build_cartesian_2d(0.0..widest * 1.05, y)?;
        let name = |at: &f64| tick(&names, *at);
        let amount = |value: &f64| format!("{value:.1}");
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(TRANSPARENT)
            .x_labels(9)
            .y_labels(names.len() + 1)
            .x_label_formatter(&amount)
            .y_label_formatter(&name)
            .x_desc("MB")
            .label_style(("sans-serif", 15))
            .draw()?;
        let area = chart.plotting_area();
        for (at, (_, up, down)) in bars.iter().enumerate() {
            let at = at as f64;
            area.draw(&Rectangle::new([(0.0, at), (*up, at + 0.35)], blue.filled()))?;
            area.draw(&Rectangle::new([(0.0, at - 0.35), (*down, at)], orange.filled()))?;
        }
        root.present()?;
    }
    Ok(Some(svg))
}

#[cfg(test)]
mod tests {
    use super::super::compare::tests::{cell, record};
    use super::*;

    #[test]
    fn plots_are_the_same_each_time_and_absent_without_results() {
        let (one, other) = (cell(Group::A, "fedavg", "0.1"), cell(Group::A, "fedavg", "1"));
        let runs = [record(1, 0.5, vec![]), record(2, 0.52, vec![])];
        let filled = [
            Filled { cell: &one, records: runs.iter().collect() },
            Filled { cell: &other, records: runs.iter().collect() },
        ];
        let plots = all(&filled).unwrap();
        // These runs have no rounds, and there are none of other ranks.
        assert_eq!(plots.keys().collect::<Vec<_>>(), ["accuracy-by-alpha.svg", "bytes.svg"]);
        assert_eq!(all(&filled).unwrap(), plots);
        let svg = &plots["accuracy-by-alpha.svg"];
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        assert!(svg.contains("fedavg") && svg.contains("alpha of the Dirichlet split"), "{svg}");
        assert!(all(&[]).unwrap().is_empty());
    }

    #[test]
    fn ticks_stand_at_whole_numbers() {
        let names = ["a".to_owned(), "b".to_owned()];
        assert_eq!([0.0, 0.5, 1.0, 2.0, -1.0].map(|at| tick(&names, at)), ["a", "", "b", "", ""]);
    }
}
