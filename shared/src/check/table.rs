//! Rows under construction: each `add` compares one tensor with its reference and judges it by the table of limits.
//!
//! A row is named as its reference tensor; `name@part` is a part of that tensor or another way to it.

use super::limits::limit_of;
use super::reference::{Inputs, Reference};
use super::report::{Report, Row, Verdict};
use crate::plain::TensorBlob;

/// Which values of a tensor count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All.
    All,
    /// Of `[B, S, ..]`, those at unpadded positions.
    Real,
    /// Of `[B, S, ..]`, those at image tokens.
    Image,
}

/// Collects rows.
pub struct Table<'a> {
    /// What is compared with.
    pub reference: &'a Reference,
    /// What every stage starts from.
    pub inputs: &'a Inputs,
    rows: Vec<Row>,
}

/// Largest difference over the largest reference value, of the values that count.
fn deviation(got: &[f32], want: &[f32], counts: impl Fn(usize) -> bool) -> f64 {
    let largest = want.iter().enumerate().filter(|(i, _)| counts(*i)).fold(0f64, |m, (_, w)| m.max(f64::from(w.abs())));
    difference(got, want, counts) / largest.max(f64::MIN_POSITIVE)
}

/// Largest difference of the values that count; infinite when one of them is not finite.
fn difference(got: &[f32], want: &[f32], counts: impl Fn(usize) -> bool) -> f64 {
    let mut worst = 0f64;
    for (_, (g, w)) in got.iter().zip(want).enumerate().filter(|(i, _)| counts(*i)) {
        if !g.is_finite() {
            return f64::INFINITY;
        }
        worst = worst.max((f64::from(*g) - f64::from(*w)).abs());
    }
    worst
}

impl<'a> Table<'a> {
    /// No rows yet.
    pub fn new(reference: &'a Reference, inputs: &'a Inputs) -> Self {
        Self { reference, inputs, rows: Vec::new() }
    }

    /// Compare numbers.
    pub fn add(&mut self, row: &str, got: &TensorBlob, part: Part) {
        let Some(want) = self.expected(row, &got.shape) else {
            return;
        };
        let counts = self.counts(part, &got.shape);
        let found = deviation(&got.data, &want.data, counts);
        self.judge(row, &got.shape, found, String::new());
    }

    /// Compare a gradient: everywhere, and at image positions alone, where it is an order of magnitude smaller.
    pub fn add_gradient(&mut self, row: &str, got: &TensorBlob) {
        self.add(row, got, Part::Real);
        self.add(&format!("{row}@image"), got, Part::Image);
    }

    /// Compare numbers whose noise is that of other, larger ones (`scale` is the largest of these).
    pub fn add_scaled(&mut self, row: &str, got: &TensorBlob, scale: f64) {
        let Some(want) = self.expected(row, &got.shape) else {
            return;
        };
        let found = difference(&got.data, &want.data, |_| true) / scale.max(f64::MIN_POSITIVE);
        self.judge(row, &got.shape, found, format!("over the largest logit, {scale:.1}"));
    }

    /// Compare two results of this program.
    pub fn add_own(&mut self, row: &str, got: &TensorBlob, want: &TensorBlob, note: &str) {
        let found = if got.shape == want.shape { deviation(&got.data, &want.data, |_| true) } else { f64::INFINITY };
        self.judge(row, &got.shape, found, note.to_owned());
    }

    /// Compare whole numbers, which must be equal; the deviation is the number of those that are not.
    pub fn add_whole(&mut self, row: &str, shape: &[usize], got: &[i64], part: Part) {
        let reference = self.reference;
        let Some((want_shape, want)) = reference.whole(base(row)) else {
            return self.absent(row, shape);
        };
        if want_shape != shape || got.len() != want.len() {
            return self.fail(row, shape, format!("the reference has shape {want_shape:?}"));
        }
        let counts = self.counts(part, shape);
        let differ = got.iter().zip(want).enumerate().filter(|(i, (g, w))| counts(*i) && g != w);
        let wrong: Vec<usize> = differ.map(|(i, _)| i).collect();
        let note = wrong.first().map_or(String::new(), |i| format!("the first at {i}: {} for {}", got[*i], want[*i]));
        self.judge(row, shape, wrong.len() as f64, note);
    }

    /// A deviation that was computed elsewhere.
    pub fn judge(&mut self, row: &str, shape: &[usize], deviation: f64, note: String) {
        self.rows.push(Row::judged(row, shape, deviation, limit_of(row), note));
    }

    /// Something that should have been computed and could not be.
    pub fn fail(&mut self, row: &str, shape: &[usize], note: impl Into<String>) {
        self.rows.push(Row::plain(row, shape, Verdict::Failed, note));
    }

    /// A tensor of the reference that is not compared.
    pub fn skip(&mut self, row: &str, note: impl Into<String>) {
        let shape = self.shape_of(base(row));
        self.rows.push(Row::plain(row, &shape, Verdict::NotComputed, note));
    }

    /// All rows; whatever the reference holds beyond them is listed with the note `uncompared`, so that nothing seems compared
    /// that is not.
    pub fn finish(mut self, uncompared: &str) -> Report {
        let names: Vec<String> = self.reference.shapes().map(|(name, _)| name.to_owned()).collect();
        for name in names {
            if self.rows.iter().any(|r| r.name == name) {
                continue;
            }
            let given = ["image.down", "image.up", "text.down", "text.up"];
            let is_given = name.strip_prefix("adapter.").is_some_and(|n| given.contains(&n));
            self.skip(&name, if is_given { "given: the weights of adapter.*" } else { uncompared });
        }
        Report::new(self.rows)
    }

    fn shape_of(&self, name: &str) -> Vec<usize> {
        self.reference.shapes().find(|(n, _)| *n == name).map_or(Vec::new(), |(_, shape)| shape.to_vec())
    }

    fn absent(&mut self, row: &str, shape: &[usize]) {
        let note = "the reference has no such tensor";
        self.rows.push(Row::plain(row, shape, Verdict::NotComputed, note));
    }

    /// The reference of a row, or a row that says why it cannot be compared.
    fn expected(&mut self, row: &str, shape: &[usize]) -> Option<&'a TensorBlob> {
        let reference = self.reference;
        let Some(want) = reference.floats(base(row)) else {
            self.absent(row, shape);
            return None;
        };
        if want.shape != shape {
            self.fail(row, shape, format!("the reference has shape {:?}", want.shape));
            return None;
        }
        Some(want)
    }

    fn counts(&self, part: Part, shape: &[usize]) -> impl Fn(usize) -> bool + use<'a> {
        let inputs = self.inputs;
        let width = shape.iter().skip(2).product::<usize>().max(1);
        move |i| match part {
            Part::All => true,
            Part::Real => inputs.is_real(i / width),
            Part::Image => inputs.image.get(i / width).copied().unwrap_or(false),
        }
    }
}

/// The tensor that a row is about.
fn base(row: &str) -> &str {
    row.split('@').next().unwrap_or(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations() {
        let all = |_: usize| true;
        assert_eq!(deviation(&[1.0, 2.5], &[1.0, 2.0], all), 0.25);
        assert_eq!(deviation(&[1.0, 2.5], &[1.0, 2.0], |i| i == 0), 0.0);
        assert_eq!(deviation(&[f32::NAN, 2.0], &[1.0, 2.0], all), f64::INFINITY);
        assert_eq!(deviation(&[f32::NAN, 2.0], &[1.0, 2.0], |i| i == 1), 0.0);
        assert_eq!(deviation(&[0.0], &[0.0], all), 0.0);
        assert_eq!(difference(&[1.0, 2.5], &[1.0, 2.0], all), 0.5);
    }

    #[test]
    fn a_row_is_about_the_tensor_before_the_at_sign() {
        assert_eq!((base("grad.inputs_embeds@image"), base("loss")), ("grad.inputs_embeds", "loss"));
    }
}
