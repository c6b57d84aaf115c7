//! Numbers as they are sent: exact, in 16 bits, or in 8; deflated where that is smaller. Values come in rows of one width (a position's
//! hidden state, its codes, a row of a matrix), `n` of them in rows of `w`:
//!
//! | format | bytes | what remains of a value |
//! | --- | --- | --- |
//! | `f32` | `4 n` | everything |
//! | `f16` | `1 + 2 n`: an exponent for all, then IEEE halves | 11 bits down to 2^-28 of the largest, fewer below |
//! | `int8` | `2 n / w + n`: a bf16 scale for each row, then codes | steps of 1/127 of its row's largest |
//!
//! The exponent lifts the largest value to 2^14 or more (below 2^15): nothing overflows, and small gradients do not vanish, whatever
//! the loss is scaled by. The exponent reaches down to -100 and scales are normal numbers: what is below 2^-125 (f16), or in a row
//! below 1.5e-36 (int8), becomes 0.
//!
//! To the nearest, packing what was unpacked gives the same bytes, so both ends can work with the very same values. For that an int8
//! scale is itself the nearest bf16: its row's largest value then has the code 127 again, and no value is further from its code than
//! half a step. By lot, the scale is rounded up instead: a value beyond the last code could not be drawn fairly.
//!
//! Deflated bytes (RFC 1951, no header) hold the bytes of f32 and f16 sorted by significance: signs and exponents repeat, the rest is noise.

pub use crate::settings::{Format, Rounding};

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::fmt;

/// f16 and int8 take magnitudes below this, 2^127: what rounding makes of them is finite still.
const LIMIT: f32 = f32::from_bits(254 << 23);
/// Exponents of f16 tensors: every value is a normal f32 then.
const LEAST_EXPONENT: i8 = -100;
const MOST_EXPONENT: i8 = 113;
/// Largest code of int8; -128 is never written.
const STEPS: f32 = 127.0;
/// Deflate makes at most so many bytes of one.
const MOST_INFLATED: usize = 1032;
/// Values converted at once.
const CHUNK: usize = 1024;

/// Why numbers cannot be packed or unpacked.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum NumbersError {
    /// NaN or infinity.
    #[error(
        "'{name}' has the value {value} at index {index}; only finite numbers can be sent, lower learning_rate if training diverged"
    )]
    NotFinite {
        /// Which values.
        name: String,
        /// Index of the first such value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// Beyond what the format reaches.
    #[error(
        "'{name}' has the value {value} at index {index}, {format} takes less than 1.7e38; lower learning_rate if training diverged, or let the operator choose f32"
    )]
    TooLarge {
        /// Which values.
        name: String,
        /// Index of the first such value.
        index: usize,
        /// The value.
        value: f32,
        /// The format asked for.
        format: Format,
    },
    /// No whole rows.
    #[error(
        "'{name}' has {count} values, which are no whole rows of {width}; use a client and a server of one version"
    )]
    Width {
        /// Which values.
        name: String,
        /// Number of values.
        count: usize,
        /// Values of a row.
        width: usize,
    },
    /// Another number of bytes than the values have.
    #[error(
        "'{name}' has {found} bytes, {count} values in {format} have {expected}; use a client and a server of one version"
    )]
    Length {
        /// Which values.
        name: String,
        /// Bytes found.
        found: usize,
        /// Number of values.
        count: usize,
        /// Their format.
        format: Format,
        /// Bytes that they have.
        expected: u64,
    },
    /// Bytes that nobody packs.
    #[error("'{name}' cannot be read: {cause}; use a client and a server of one version, and connect again")]
    Damaged {
        /// Which values.
        name: String,
        /// What is wrong.
        cause: &'static str,
    },
    /// No room.
    #[error("'{name}' has {count} values, for which there is not enough memory; use a smaller batch_size")]
    Memory {
        /// Which values.
        name: String,
        /// Number of values.
        count: usize,
    },
}

impl Format {
    /// Bytes of a row of `width` values, before deflating; `u64::MAX` for what cannot be counted.
    pub fn row_bytes(self, width: u64) -> u64 {
        match self {
            Self::F32 => width.saturating_mul(4),
            Self::F16 => width.saturating_mul(2),
            Self::Int8 => width.saturating_add(2),
        }
    }

    /// Bytes of a packed tensor of `rows` rows of `width` values, before deflating; `u64::MAX` for what cannot be counted.
    pub fn bytes(self, rows: u64, width: u64) -> u64 {
        rows.saturating_mul(self.row_bytes(width)).saturating_add(u64::from(self == Self::F16))
    }
}

/// Values as they are sent. The number of values and their width are told elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packed {
    /// How values are written.
    pub format: Format,
    /// `bytes` are deflated.
    pub deflated: bool,
    /// See the module's table.
    #[serde(serialize_with = "to_bytes", deserialize_with = "from_bytes")]
    pub bytes: Vec<u8>,
}

fn to_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

fn from_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    struct Bytes;
    impl<'de> serde::de::Visitor<'de> for Bytes {
        type Value = Vec<u8>;
        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a byte string of packed numbers")
        }
        fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
            Ok(bytes.to_vec())
        }
        fn visit_byte_buf<E: serde::de::Error>(self, bytes: Vec<u8>) -> Result<Self::Value, E> {
            Ok(bytes)
        }
        // JSON has no byte strings: there it is a list of numbers.
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut bytes = Vec::new();
            while let Some(byte) = list.next_element()? {
                bytes.push(byte);
            }
            Ok(bytes)
        }
    }
    deserializer.deserialize_byte_buf(Bytes)
}

/// Name of a picture's features: the first 8 bytes of the SHA-256 of their packed bytes. The same picture twice is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PictureKey(pub u64);

impl PictureKey {
    /// The key of features.
    pub fn of(features: &Packed) -> Self {
        let mut first = [0; 8];
        first.copy_from_slice(&Sha256::digest(&features.bytes)[..8]);
        Self(u64::from_be_bytes(first))
    }
}

impl fmt::Display for PictureKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

// ---------------------------------------------------------------------------------------------- packing

/// How values are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coder {
    /// How they are written.
    pub format: Format,
    /// To which neighbour a value goes.
    pub rounding: Rounding,
    /// Deflate what gets smaller by it.
    pub deflate: bool,
    /// For [`Rounding::Stochastic`]: another one for each message; tensors of one message draw by their names too.
    pub seed: u64,
}

impl Coder {
    /// All bits of every value, not deflated.
    pub const EXACT: Self = Self { format: Format::F32, rounding: Rounding::Nearest, deflate: false, seed: 0 };

    /// Pack values, rows of `width` each; `name` goes into errors.
    ///
    /// # Errors
    /// [`NumbersError`]: NaN or infinity, values too large for the format, no whole rows.
    pub fn pack(&self, name: &str, values: &[f32], width: usize) -> Result<Packed, NumbersError> {
        whole_rows(name, values.len(), width)?;
        self.check(name, values)?;
        let mut rng = match self.rounding {
            Rounding::Nearest => None,
            Rounding::Stochastic => Some(ChaCha8Rng::seed_from_u64(self.seed ^ hash(name))),
        };
        let bytes = match self.format {
            // Every platform this runs on is little-endian (x86-64, aarch64, wasm32).
            Format::F32 => bytemuck::cast_slice::<f32, u8>(values).to_vec(),
            Format::F16 => f16_bytes(values, rng.as_mut()),
            Format::Int8 => int8_bytes(values, width, rng.as_mut()),
        };
        let plain = Packed { format: self.format, deflated: false, bytes };
        let smaller = if self.deflate { plain.smaller() } else { None };
        Ok(smaller.unwrap_or(plain))
    }

    fn check(&self, name: &str, values: &[f32]) -> Result<(), NumbersError> {
        let limit = if self.format == Format::F32 { f32::INFINITY } else { LIMIT };
        let Some(index) = values.iter().position(|v| v.is_nan() || v.abs() >= limit) else { return Ok(()) };
        let (name, value, format) = (name.to_owned(), values[index], self.format);
        Err(match value.is_finite() {
            true => NumbersError::TooLarge { name, index, value, format },
            false => NumbersError::NotFinite { name, index, value },
        })
    }
}

fn whole_rows(name: &str, count: usize, width: usize) -> Result<(), NumbersError> {
    if width > 0 && count.is_multiple_of(width) {
        return Ok(());
    }
    Err(NumbersError::Width { name: name.to_owned(), count, width })
}

/// FNV-1a.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |m, v| m.max(v.abs()))
}

/// `2^n` for `n` of -126 to 127.
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((127 + n.clamp(-126, 127)) as u32) << 23)
}

/// One of the two whole numbers beside `steps`; their mean over many draws is `steps`.
fn by_lot(steps: f64, rng: &mut ChaCha8Rng) -> f64 {
    let lot = f64::from(rng.next_u32()) / 4_294_967_296.0; // 0 to below 1
    (steps + lot).floor()
}

/// The exponent by which the largest value comes to lie between 2^14 and 2^15. It is that of the value rounded to f16's 11 bits, so
/// that packing again finds the same.
fn exponent(largest: f32) -> i8 {
    let bits = largest.to_bits();
    let rounded = bits + 0xfff + ((bits >> 13) & 1);
    let wanted = (rounded >> 23) as i32 - 127 - 14;
    let exponent = wanted.clamp(LEAST_EXPONENT.into(), MOST_EXPONENT.into());
    let vanishes = f16::from_f32(largest * power_of_two(-exponent)) == f16::ZERO;
    if vanishes { 0 } else { exponent as i8 }
}

fn f16_bytes(values: &[f32], mut rng: Option<&mut ChaCha8Rng>) -> Vec<u8> {
    let exponent = exponent(largest(values));
    let factor = power_of_two(-i32::from(exponent));
    let mut bytes = Vec::with_capacity(1 + 2 * values.len());
    bytes.extend(exponent.to_le_bytes());
    let (mut scaled, mut halves) = ([0f32; CHUNK], [f16::ZERO; CHUNK]);
    for chunk in values.chunks(CHUNK) {
        let (scaled, halves) = (&mut scaled[..chunk.len()], &mut halves[..chunk.len()]);
        match &mut rng {
            None => scaled.iter_mut().zip(chunk).for_each(|(s, v)| *s = v * factor),
            Some(rng) => scaled.iter_mut().zip(chunk).for_each(|(s, v)| *s = f16_by_lot(v * factor, rng)),
        }
        halves.convert_from_f32_slice(scaled);
        bytes.extend_from_slice(bytemuck::cast_slice::<u16, u8>(halves.reinterpret_cast()));
    }
    bytes
}

/// One of the two neighbours that a value has in f16.
fn f16_by_lot(value: f32, rng: &mut ChaCha8Rng) -> f32 {
    // They are 2^(e - 10) apart, with e the value's own exponent, or -14 where f16's normal numbers end.
    let exponent = ((value.to_bits() >> 23) & 0xff) as i32 - 127;
    let step = f64::from(power_of_two(exponent.max(-14) - 10));
    (by_lot(f64::from(value) / step, rng) * step) as f32
}

fn int8_bytes(values: &[f32], width: usize, mut rng: Option<&mut ChaCha8Rng>) -> Vec<u8> {
    let rows = values.len() / width;
    let mut bytes = Vec::with_capacity(2 * rows + values.len());
    let mut codes = Vec::with_capacity(values.len());
    for row in values.chunks_exact(width) {
        let scale = row_scale(largest(row), rng.is_some());
        bytes.extend(scale.to_le_bytes());
        let step = scale.to_f32();
        match &mut rng {
            _ if step == 0.0 => codes.resize(codes.len() + width, 0),
            None => codes.extend(row.iter().map(|v| (v / step).round() as i8 as u8)),
            Some(rng) => {
                codes.extend(row.iter().map(|v| by_lot(f64::from(*v) / f64::from(step), rng) as i8 as u8));
            }
        }
    }
    bytes.append(&mut codes);
    bytes
}

/// Size of a row's steps: the nearest bf16, or one of which the codes reach every value.
fn row_scale(largest: f32, reach_all: bool) -> bf16 {
    let nearest = bf16::from_f32(largest / STEPS);
    // The product is exact: 8 bits times 7.
    let short = reach_all && nearest.to_f32() * STEPS < largest;
    let scale = if short { bf16::from_bits(nearest.to_bits() + 1) } else { nearest };
    if scale.to_f32() < f32::MIN_POSITIVE { bf16::ZERO } else { scale }
}

/// Bytes before those that are sorted, and bytes of a value.
fn layout(format: Format) -> (usize, usize) {
    match format {
        Format::F32 => (0, 4),
        Format::F16 => (1, 2),
        Format::Int8 => (0, 1),
    }
}

/// The lowest byte of all values, then the next.
fn sorted(format: Format, bytes: &[u8]) -> Cow<'_, [u8]> {
    let (head, each) = layout(format);
    if each == 1 {
        return Cow::Borrowed(bytes);
    }
    let mut all = Vec::with_capacity(bytes.len());
    all.extend(bytes.iter().take(head));
    for byte in 0..each {
        all.extend(bytes.iter().skip(head + byte).step_by(each));
    }
    Cow::Owned(all)
}

impl Packed {
    /// The same values deflated; none: they are already, or would not get smaller.
    pub fn smaller(&self) -> Option<Self> {
        let plain = (!self.deflated).then(|| sorted(self.format, &self.bytes))?;
        Some(Self { format: self.format, deflated: true, bytes: deflate(&plain)? })
    }
}

/// None: it does not get smaller.
fn deflate(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut smaller = vec![0; bytes.len().checked_sub(1)?];
    let mut stream = Compress::new(Compression::fast(), false);
    match stream.compress(bytes, &mut smaller, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => {}
        _ => return None,
    }
    smaller.truncate(usize::try_from(stream.total_out()).ok()?);
    smaller.shrink_to_fit();
    Some(smaller)
}

// ---------------------------------------------------------------------------------------------- unpacking

impl Packed {
    /// `count` values, rows of `width` each; `name` goes into errors. Nothing is allocated before the length of `bytes` fits `count`,
    /// then no more than the values and, inflated, their bytes.
    ///
    /// # Errors
    /// [`NumbersError`], whatever the bytes are.
    pub fn unpack(&self, name: &str, count: usize, width: usize) -> Result<Vec<f32>, NumbersError> {
        let bytes = self.plain_bytes(name, count, width)?;
        let mut values = Vec::new();
        room(&mut values, name, count, count)?;
        values.resize(count, 0.0);
        self.read(name, &bytes, &mut values, width)?;
        Ok(values)
    }

    /// [`Self::unpack`] into what is there already. After an error, `out` may hold anything.
    ///
    /// # Errors
    /// [`NumbersError`], whatever the bytes are.
    pub fn unpack_into(&self, name: &str, out: &mut [f32], width: usize) -> Result<(), NumbersError> {
        let bytes = self.plain_bytes(name, out.len(), width)?;
        self.read(name, &bytes, out, width)
    }

    /// Inflated, but still sorted; as long as `count` values are.
    fn plain_bytes(&self, name: &str, count: usize, width: usize) -> Result<Cow<'_, [u8]>, NumbersError> {
        whole_rows(name, count, width)?;
        let expected = self.format.bytes((count / width) as u64, width as u64);
        let found = self.bytes.len();
        if !self.deflated {
            if found as u64 == expected {
                return Ok(Cow::Borrowed(&self.bytes));
            }
            return Err(NumbersError::Length { name: name.to_owned(), found, count, format: self.format, expected });
        }
        let memory = || NumbersError::Memory { name: name.to_owned(), count };
        let length = usize::try_from(expected).map_err(|_| memory())?;
        if length / MOST_INFLATED > found {
            return Err(damaged(name, "it is deflated, but too short for its values"));
        }
        // One byte more: so a stream that is too long shows itself.
        let buffer = length.checked_add(1).ok_or_else(memory)?;
        let mut bytes = Vec::new();
        room(&mut bytes, name, count, buffer)?;
        bytes.resize(buffer, 0);
        let mut stream = Decompress::new(false);
        let end = stream.decompress(&self.bytes, &mut bytes, FlushDecompress::Finish);
        if !matches!(end, Ok(Status::StreamEnd)) || stream.total_in() != found as u64 {
            return Err(damaged(name, "it is deflated, but damaged or of another length than its values"));
        }
        if stream.total_out() != expected {
            return Err(damaged(name, "it is deflated, and of another length than its values"));
        }
        bytes.truncate(length);
        Ok(Cow::Owned(bytes))
    }

    /// From bytes of the right length.
    fn read(&self, name: &str, bytes: &[u8], out: &mut [f32], width: usize) -> Result<(), NumbersError> {
        match self.format {
            Format::F32 => read_f32(bytes, self.deflated, out),
            Format::F16 => read_f16(bytes, self.deflated, out),
            Format::Int8 => read_int8(bytes, out, width),
        }
        .map_err(|cause| damaged(name, cause))?;
        match out.iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(index) => Err(NumbersError::NotFinite { name: name.to_owned(), index, value: out[index] }),
        }
    }
}

fn damaged(name: &str, cause: &'static str) -> NumbersError {
    NumbersError::Damaged { name: name.to_owned(), cause }
}

fn room<T>(list: &mut Vec<T>, name: &str, count: usize, entries: usize) -> Result<(), NumbersError> {
    list.try_reserve_exact(entries).map_err(|_| NumbersError::Memory { name: name.to_owned(), count })
}

/// The `i`-th byte of each of `count` values, of sorted bytes.
fn plane(bytes: &[u8], count: usize, i: usize) -> &[u8] {
    bytes.get(i * count..(i + 1) * count).unwrap_or_default()
}

fn read_f32(bytes: &[u8], sorted: bool, out: &mut [f32]) -> Result<(), &'static str> {
    if !sorted {
        for (value, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
            *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
        return Ok(());
    }
    let of = |i| plane(bytes, out.len(), i);
    let (low, high) = (of(0).iter().zip(of(1)), of(2).iter().zip(of(3)));
    for (value, ((a, b), (c, d))) in out.iter_mut().zip(low.zip(high)) {
        *value = f32::from_le_bytes([*a, *b, *c, *d]);
    }
    Ok(())
}

fn read_f16(bytes: &[u8], sorted: bool, out: &mut [f32]) -> Result<(), &'static str> {
    let Some((exponent, bytes)) = bytes.split_first() else { return Err("it has no exponent") };
    let exponent = i8::from_le_bytes([*exponent]);
    if !(LEAST_EXPONENT..=MOST_EXPONENT).contains(&exponent) {
        return Err("its exponent is out of range");
    }
    let factor = power_of_two(exponent.into());
    let (low, high) = (plane(bytes, out.len(), 0), plane(bytes, out.len(), 1));
    let mut halves = [f16::ZERO; CHUNK];
    for (n, chunk) in out.chunks_mut(CHUNK).enumerate() {
        let halves = &mut halves[..chunk.len()];
        let start = n * CHUNK;
        if sorted {
            let pairs = low.iter().skip(start).zip(high.iter().skip(start));
            halves.iter_mut().zip(pairs).for_each(|(half, (l, h))| *half = f16::from_le_bytes([*l, *h]));
        } else {
            let pairs = bytes.get(2 * start..).unwrap_or_default().chunks_exact(2);
            halves.iter_mut().zip(pairs).for_each(|(half, b)| *half = f16::from_le_bytes([b[0], b[1]]));
        }
        halves.convert_to_f32_slice(chunk);
        chunk.iter_mut().for_each(|value| *value *= factor);
    }
    Ok(())
}

fn read_int8(bytes: &[u8], out: &mut [f32], width: usize) -> Result<(), &'static str> {
    let (scales, codes) = bytes.split_at_checked(2 * (out.len() / width.max(1))).ok_or("it has too few scales")?;
    let rows = out.chunks_mut(width.max(1)).zip(codes.chunks(width.max(1)));
    for ((row, codes), scale) in rows.zip(scales.chunks_exact(2)) {
        let step = bf16::from_le_bytes([scale[0], scale[1]]).to_f32();
        // 128 times: -128 is never written, but can be read.
        if step.is_sign_negative() || !(step * 128.0).is_finite() {
            return Err("a scale is negative or not finite");
        }
        for (value, code) in row.iter_mut().zip(codes) {
            *value = f32::from(i8::from_le_bytes([*code])) * step;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
