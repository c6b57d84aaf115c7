//! Pillow's bicubic resampling bit for bit (its src/libImaging/Resample.c for 8 bits): across first, then down, each rounded and
//! clipped. The order shows: at corners in full contrast the other one, which libraries take because it is faster, is up to 26 levels off.

use super::picture::Picture;
use std::borrow::Cow;

/// Bits behind the point of a weight.
const POINT: u32 = 22;
const HALF: i32 = 1 << (POINT - 1);

/// The pixels that one pixel of the result is made of.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// A picture in another size; neither may be empty.
pub(super) fn resized(picture: &Picture, width: usize, height: usize) -> Picture {
    let mut rgb = Cow::Borrowed(picture.rgb.as_slice());
    if width != picture.width {
        rgb = Cow::Owned(across(&rgb, picture.width, width));
    }
    if height != picture.height {
        rgb = Cow::Owned(down(&rgb, width, height));
    }
    Picture { width, height, rgb: rgb.into_owned() }
}

/// Keys' cubic with a = -0.5 (Keys 1981, Cubic convolution interpolation for digital image processing).
fn cubic(x: f64) -> f64 {
    match x.abs() {
        x if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
        x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
        _ => 0.0,
    }
}

/// Widened when shrinking.
fn windows(from: usize, to: usize) -> Vec<Window> {
    let scale = from as f64 / to as f64;
    let wide = scale.max(1.0);
    let window = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let first = (centre - 2.0 * wide + 0.5).max(0.0) as usize;
        let end = ((centre + 2.0 * wide + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..end).map(|x| cubic((x as f64 - centre + 0.5) / wide)).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |w: &f64| (w / sum * f64::from(1 << POINT)).round() as i32;
        Window { first, weights: weights.iter().map(fixed).collect() }
    };
    (0..to).map(window).collect()
}

fn level(sum: i32) -> u8 {
    (sum >> POINT).clamp(0, 255) as u8
}

/// Rows of `width` pixels, made `new` pixels wide.
fn across(rgb: &[u8], width: usize, new: usize) -> Vec<u8> {
    let windows = windows(width, new);
    let mut out = Vec::with_capacity(rgb.len() / width * new);
    for row in rgb.chunks_exact(width * 3) {
        for Window { first, weights } in &windows {
            let mut sums = [HALF; 3];
            for (pixel, weight) in row[first * 3..].chunks_exact(3).zip(weights) {
                sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += i32::from(*value) * weight);
            }
            out.extend(sums.map(level));
        }
    }
    out
}

/// Rows of `width` pixels, made `new` rows.
fn down(rgb: &[u8], width: usize, new: usize) -> Vec<u8> {
    let row = width * 3;
    let mut out = Vec::with_capacity(row * new);
    for Window { first, weights } in windows(rgb.len() / row, new) {
        let mut sums = vec![HALF; row];
        for (source, weight) in rgb[first * row..].chunks_exact(row).zip(weights) {
            sums.iter_mut().zip(source).for_each(|(sum, value)| *sum += i32::from(*value) * weight);
        }
        out.extend(sums.into_iter().map(level));
    }
    out
}
