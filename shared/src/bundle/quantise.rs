//! Weights in 8 and in 4 bits: symmetric, to the nearest step. A scale is rounded up to f16 before values are divided by it, so
//! none is clipped, and each comes back within half its scale, also where f16 is coarse (tiny weights).

use half::f16;

/// Values of a row that share a scale in 4 bits; the last group of a row may be shorter.
pub const GROUP: usize = 32;
/// Bytes of a group's codes; a short group is filled up with zeros.
pub const GROUP_BYTES: usize = GROUP / 2;

/// Largest code in 8 bits; -128 is not used.
const STEPS_8: f32 = 127.0;
/// Largest code in 4 bits; -8 is not used.
const STEPS_4: f32 = 7.0;

/// Codes of a matrix's rows, one after the other, and their scales.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Quantised {
    /// 8 bits: two's complement, a byte each. 4 bits: two's complement nibbles, the low one first.
    pub codes: Vec<u8>,
    /// 8 bits: one for each row. 4 bits: one for each group of [`GROUP`] values.
    pub scales: Vec<f16>,
}

/// Groups of a row.
pub fn groups(cols: usize) -> usize {
    cols.div_ceil(GROUP)
}

/// Bytes of a row's codes in 4 bits.
pub fn int4_bytes(cols: usize) -> usize {
    groups(cols) * GROUP_BYTES
}

/// A matrix of `cols` columns in 8 bits.
///
/// # Errors
/// A sentence naming the tensor: NaN, infinity, or values beyond what an f16 scale reaches.
pub fn int8(name: &str, values: &[f32], cols: usize) -> Result<Quantised, String> {
    check(name, values)?;
    let mut found = Quantised::default();
    for row in values.chunks(cols.max(1)) {
        let scale = scale(name, row, STEPS_8)?;
        found.codes.extend(row.iter().map(|v| code(*v, scale)));
        found.scales.push(scale);
    }
    Ok(found)
}

/// A matrix of `cols` columns in 4 bits.
///
/// # Errors
/// As [`int8`].
pub fn int4(name: &str, values: &[f32], cols: usize) -> Result<Quantised, String> {
    check(name, values)?;
    let mut found = Quantised::default();
    for group in values.chunks(cols.max(1)).flat_map(|row| row.chunks(GROUP)) {
        let scale = scale(name, group, STEPS_4)?;
        let nibble = |i: usize| group.get(i).map_or(0, |v| code(*v, scale) & 0x0f);
        found.codes.extend((0..GROUP_BYTES).map(|i| nibble(2 * i) | (nibble(2 * i + 1) << 4)));
        found.scales.push(scale);
    }
    Ok(found)
}

/// A row of 8-bit codes as numbers.
pub fn int8_row(codes: &[u8], scale: f16, out: &mut [f32]) {
    let scale = scale.to_f32();
    for (value, code) in out.iter_mut().zip(codes) {
        *value = f32::from(*code as i8) * scale;
    }
}

/// A row of 4-bit codes as numbers.
pub fn int4_row(codes: &[u8], scales: &[f16], out: &mut [f32]) {
    for ((group, bytes), scale) in out.chunks_mut(GROUP).zip(codes.chunks(GROUP_BYTES)).zip(scales) {
        let scale = scale.to_f32();
        for (pair, byte) in group.chunks_mut(2).zip(bytes) {
            // Shifting right as i8 keeps the sign.
            let nibbles = [((byte << 4) as i8) >> 4, (*byte as i8) >> 4];
            for (value, nibble) in pair.iter_mut().zip(nibbles) {
                *value = f32::from(nibble) * scale;
            }
        }
    }
}

/// All rows of 8-bit codes as numbers.
pub fn from_int8(stored: &Quantised, cols: usize) -> Vec<f32> {
    let mut values = vec![0.0; stored.scales.len() * cols];
    let rows = values.chunks_mut(cols.max(1)).zip(stored.codes.chunks(cols.max(1)));
    for ((row, codes), scale) in rows.zip(&stored.scales) {
        int8_row(codes, *scale, row);
    }
    values
}

/// All rows of 4-bit codes as numbers.
pub fn from_int4(stored: &Quantised, cols: usize) -> Vec<f32> {
    let (groups, bytes) = (groups(cols).max(1), int4_bytes(cols).max(1));
    let mut values = vec![0.0; stored.scales.len() / groups * cols];
    let rows = values.chunks_mut(cols.max(1)).zip(stored.codes.chunks(bytes));
    for ((row, codes), scales) in rows.zip(stored.scales.chunks(groups)) {
        int4_row(codes, scales, row);
    }
    values
}

/// Values in f16.
///
/// # Errors
/// A sentence naming the tensor: NaN, infinity, or values beyond f16's range.
pub fn to_f16(name: &str, values: &[f32]) -> Result<Vec<f16>, String> {
    check(name, values)?;
    let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
    match halves.iter().position(|v| !v.is_finite()) {
        None => Ok(halves),
        Some(i) => {
            Err(format!("{name}: value {} at index {i} is beyond f16's range; rescale the checkpoint", values[i]))
        }
    }
}

fn check(name: &str, values: &[f32]) -> Result<(), String> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(format!(
            "{name}: value {} at index {i}; only finite weights can be used, fetch or make the checkpoint anew",
            values[i]
        )),
    }
}

/// The smallest f16 of which `steps` reach the largest magnitude. The products are exact in f32.
fn scale(name: &str, values: &[f32], steps: f32) -> Result<f16, String> {
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
    let nearest = f16::from_f32(largest / steps);
    let short = nearest.to_f32() * steps < largest;
    let scale = if short { f16::from_bits(nearest.to_bits() + 1) } else { nearest };
    if scale.is_finite() {
        Ok(scale)
    } else {
        Err(format!("{name}: values of up to {largest} are too large to be quantised; use --edge-dtype f16"))
    }
}

/// The nearest step, in two's complement.
fn code(value: f32, scale: f16) -> u8 {
    // A scale is 0 where all values are.
    let steps = if scale.to_bits() == 0 { 0.0 } else { value / scale.to_f32() };
    steps.round() as i8 as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::standard_normal;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn random(rows: usize, cols: usize, size: f32) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        (0..rows * cols).map(|_| size * standard_normal(&mut rng)).collect()
    }

    /// Each value within half of its own scale.
    fn close(values: &[f32], back: &[f32], scale: impl Fn(usize) -> f32) {
        assert_eq!(values.len(), back.len());
        for (i, (v, b)) in values.iter().zip(back).enumerate() {
            let limit = 0.5001 * scale(i);
            assert!((v - b).abs() <= limit, "{v} came back as {b}, limit {limit}");
        }
    }

    #[test]
    fn values_come_back_within_half_a_scale() {
        // Ordinary weights, tiny ones (scales below f16's normal range) and large ones; widths that 32 does not divide.
        for size in [0.05, 1e-6, 1e-9, 3e4] {
            for cols in [1, 5, 31, 32, 33, 96, 100] {
                let values = random(7, cols, size);
                let q = int8("t", &values, cols).unwrap();
                assert_eq!((q.codes.len(), q.scales.len()), (7 * cols, 7));
                close(&values, &from_int8(&q, cols), |i| q.scales[i / cols].to_f32());
                let q = int4("t", &values, cols).unwrap();
                assert_eq!((q.codes.len(), q.scales.len()), (7 * int4_bytes(cols), 7 * groups(cols)));
                let group = |i: usize| i / cols * groups(cols) + i % cols / GROUP;
                close(&values, &from_int4(&q, cols), |i| q.scales[group(i)].to_f32());
            }
        }
    }

    #[test]
    fn scales_are_hardly_larger_than_they_must_be() {
        let values = random(20, 64, 0.05);
        let q = int8("t", &values, 64).unwrap();
        for (row, scale) in values.chunks(64).zip(&q.scales) {
            let exact = row.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
            assert!((1.0..1.0 + 2f32.powi(-9)).contains(&(scale.to_f32() / exact)), "{scale} for {exact}");
        }
    }

    #[test]
    fn codes_are_as_documented() {
        let q = int4("t", &[7.0, -7.0, 3.0], 3).unwrap();
        assert_eq!(q.scales, [f16::from_f32(1.0)]);
        assert_eq!(q.codes[..2], [0x97, 0x03]);
        assert!(q.codes[2..].iter().all(|b| *b == 0) && q.codes.len() == GROUP_BYTES);
        assert_eq!(int8("t", &[127.0, -127.0, 1.0], 3).unwrap().codes, [127, 129, 1]);
        // -8, which is never written, reads as what it says.
        let mut row = [0.0; 2];
        int4_row(&[0x18], &[f16::from_f32(0.5)], &mut row);
        assert_eq!(row, [-4.0, 0.5]);
    }

    #[test]
    fn zeros_stay_zeros() {
        for cols in [3, 40] {
            let zeros = vec![0.0; 2 * cols];
            let q = int8("t", &zeros, cols).unwrap();
            assert!(q.scales.iter().all(|s| s.to_bits() == 0));
            assert_eq!(from_int8(&q, cols), zeros);
            assert_eq!(from_int4(&int4("t", &zeros, cols).unwrap(), cols), zeros);
        }
        assert_eq!(int8("t", &[], 4).unwrap(), Quantised::default());
    }

    #[test]
    fn what_cannot_be_stored_names_the_tensor() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
            let values = [0.1, bad, 0.2];
            for fault in [int8("q_proj", &values, 3).err(), int4("q_proj", &values, 3).err()] {
                assert!(fault.unwrap().starts_with("q_proj: value"));
            }
            assert!(to_f16("q_proj", &values).unwrap_err().starts_with("q_proj: value"));
        }
        assert!(to_f16("q_proj", &[70000.0]).unwrap_err().contains("beyond f16"));
        assert!(int8("q_proj", &[70000.0], 1).is_ok());
    }
}
