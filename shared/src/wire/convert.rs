//! Requests and replies of the boundary in their form on the wire, and back: tensors become [`Packed`] in the formats agreed, features
//! become token ids and keys of pictures.
//!
//! Nothing that is unpacked is believed: formats, lengths and sizes are checked here, what the numbers mean by
//! [`BoundaryRequest::check`]. Letters: T positions, D width, R rank, P positions of a picture.

use super::agreement::{Agreement, BoundaryMode};
use super::numbers::{NumbersError, Packed, PictureKey};
use super::{Fault, FaultCode, Matrices, WireGradient, WireInput, WireReply, WireRequest, WireRow};
use crate::boundary::{
    BoundaryReply, BoundaryRequest, CodesGradient, CodesInput, Gradient, Input, Pair, Part, Place, Positions,
};
use crate::edge::BatchRow;
use crate::plain::TensorBlob;
use crate::settings::Format;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Values that features or codes of one request may have: 512 MiB in f32. A few bytes on the wire can stand for as many, so this is
/// what bounds them.
pub const MAX_VALUES: usize = 1 << 27;
/// Values that one `up` matrix may have: 64 MiB in f32.
pub const MAX_MATRIX: usize = 1 << 24;
/// Matrices `[D, R]` that a request takes: `up` of two adapters, their gradients, squares of these.
const MATRICES: usize = 6;
/// Deflate makes at most so many bytes of one: fewer bytes than that are no features.
const MOST_INFLATED: u64 = 1032;

/// Sizes of the model, as far as requests depend on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shapes {
    /// D.
    pub dim: usize,
    /// P.
    pub image_positions: usize,
}

/// Writes the token table's row of an id, D values; a sentence where there is no such token.
pub type Embed<'a> = dyn Fn(u32, &mut [f32]) -> Result<(), String> + 'a;

/// What the server has for a request beside the request's own bytes.
pub struct Sources<'a> {
    /// The `up` matrices last sent over the connection ([`WireRequest::matrices`]).
    pub up: Option<Arc<Pair<TensorBlob>>>,
    /// Features of (at least) the pictures that it names.
    pub pictures: &'a BTreeMap<PictureKey, Arc<Packed>>,
    /// Writes the table's row of a token, D values; a sentence where there is no such token.
    pub token: &'a Embed<'a>,
}

/// What a client has asked for: the shape that the answer must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentShape {
    /// Rows of the batch.
    pub rows: usize,
    /// T.
    pub total: usize,
    /// D.
    pub dim: usize,
    /// R; 0 where there are no codes.
    pub rank: usize,
    /// Positions of each part, where codes were sent; none: activations were.
    pub codes: Option<Pair<usize>>,
}

impl SentShape {
    /// Of a request.
    pub fn of(request: &BoundaryRequest) -> Self {
        let axis = |blob: &TensorBlob, n: usize| blob.shape.get(n).copied().unwrap_or(0);
        let (rows, total) = (request.positions.rows(), request.positions.total());
        match &request.input {
            Input::Hidden(hidden) => Self { rows, total, dim: axis(hidden, 1), rank: 0, codes: None },
            Input::Codes(input) => {
                let codes = input.codes.as_ref().map(|_, codes| axis(codes, 0));
                Self { rows, total, dim: axis(&input.x, 1), rank: input.rank().unwrap_or(0), codes: Some(codes) }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------- packing

/// Packs the tensors of one message; where rounding is by lot, each draws by its name too.
struct Packer<'a> {
    agreement: &'a Agreement,
    seed: u64,
}

impl<'a> Packer<'a> {
    fn new(agreement: &'a Agreement, seed: u64) -> Self {
        Self { agreement, seed }
    }

    /// A matrix, row by row.
    fn pack(&self, name: &str, blob: &TensorBlob, format: Format) -> Result<Packed, NumbersError> {
        if blob.data.is_empty() {
            // A part without positions.
            return Ok(Packed { format, deflated: false, bytes: Vec::new() });
        }
        let width = blob.shape.last().copied().unwrap_or(1);
        self.agreement.coder(format, self.seed).pack(name, &blob.data, width)
    }

    /// A matrix of each adapter.
    fn pair(
        &self,
        pair: &Pair<TensorBlob>,
        format: Format,
        name: impl Fn(Part) -> String,
    ) -> Result<Pair<Packed>, NumbersError> {
        pair.as_ref().try_map(|part, blob| self.pack(&name(part), blob, format))
    }
}

fn codes_name(part: Part) -> String {
    format!("{} codes", part.name())
}

fn up_name(part: Part) -> String {
    part.up_name().to_owned()
}

fn up_gradient_name(part: Part) -> String {
    format!("gradient of {}", part.up_name())
}

fn squares_name(part: Part) -> String {
    format!("squares of {}", part.up_name())
}

impl WireRequest {
    /// A request in the form agreed. `rows` are the batch's own; `up_same`: the `up` matrices are those last sent over this
    /// connection. Where rounding is by lot, `seed` decides.
    ///
    /// # Errors
    /// [`NumbersError`]: values that are not finite, or beyond the format; pictures that cannot be named.
    pub fn pack(
        request: &BoundaryRequest,
        rows: &[BatchRow],
        place: Place,
        up_same: bool,
        agreement: &Agreement,
        seed: u64,
    ) -> Result<Self, NumbersError> {
        let packer = Packer::new(agreement, seed);
        let input = match &request.input {
            Input::Hidden(hidden) => WireInput::Hidden(packer.pack("activations", hidden, agreement.codes)?),
            Input::Codes(input) => {
                let codes = packer.pair(&input.codes, agreement.codes, codes_name)?;
                let up = match up_same {
                    true => Matrices::Same,
                    false => Matrices::Sent(packer.pair(&input.up, agreement.matrices, up_name)?),
                };
                let rank = u32::try_from(input.rank().unwrap_or(0)).unwrap_or(u32::MAX);
                WireInput::Codes { rows: wire_rows(rows, &request.positions)?, rank, codes, up }
            }
        };
        let (lengths, targets) = (request.positions.lengths.clone(), request.targets.clone());
        Ok(Self { input, lengths, targets, want: request.want, place })
    }
}

/// What the features of each row consist of. A picture's placeholders say nothing that its place does not.
fn wire_rows(rows: &[BatchRow], positions: &Positions) -> Result<Vec<WireRow>, NumbersError> {
    let short = |(row, image): (&BatchRow, &Range<u32>)| match &row.picture {
        None if image.is_empty() => Ok(WireRow { ids: row.ids.clone(), picture: None }),
        // As text, its placeholders would be something else.
        None => {
            let cause = "the batch was made for decoding, its pictures have no key";
            Err(NumbersError::Damaged { name: "features".into(), cause })
        }
        Some(picture) => {
            let within = image.start as usize..image.end as usize;
            let text = row.ids.iter().enumerate().filter(|(at, _)| !within.contains(at));
            Ok(WireRow { ids: text.map(|(_, id)| *id).collect(), picture: Some((picture.key, image.start)) })
        }
    };
    rows.iter().zip(&positions.images).map(short).collect()
}

impl WireReply {
    /// A reply in the form agreed. Where rounding is by lot, `seed` decides.
    ///
    /// # Errors
    /// [`NumbersError`]: values that are not finite, or beyond the format.
    pub fn pack(reply: &BoundaryReply, agreement: &Agreement, seed: u64) -> Result<Self, NumbersError> {
        let packer = Packer::new(agreement, seed);
        let gradient = match &reply.gradient {
            Gradient::Hidden(g) => WireGradient::Hidden(packer.pack("gradient", g, agreement.gradients)?),
            Gradient::Codes(g) => WireGradient::Codes {
                codes: packer.pair(&g.codes, agreement.gradients, codes_name)?,
                up: packer.pair(&g.up, agreement.matrices, up_gradient_name)?,
                up_squares: packer.pair(&g.up_squares, agreement.squares(), squares_name)?,
            },
        };
        Ok(Self { loss: reply.loss, row_loss: reply.row_loss.clone(), gradient })
    }

    /// Bytes of its tensors.
    pub fn bytes(&self) -> usize {
        let of = |pair: &Pair<Packed>| pair.iter().map(|(_, packed)| packed.bytes.len()).sum::<usize>();
        match &self.gradient {
            WireGradient::Hidden(g) => g.bytes.len(),
            WireGradient::Codes { codes, up, up_squares } => of(codes) + of(up) + of(up_squares),
        }
    }
}

/// Embeddings of a text to be gone on with, in the form agreed ([`Agreement::embeddings`]).
///
/// # Errors
/// [`NumbersError`].
pub fn pack_hidden(hidden: &TensorBlob, agreement: &Agreement, seed: u64) -> Result<Packed, NumbersError> {
    Packer::new(agreement, seed).pack("embeddings", hidden, agreement.embeddings())
}

// ---------------------------------------------------------------------------------------------- unpacking

/// A matrix of `[rows, width]`; a sentence where it is not as agreed.
fn unpack(
    packed: &Packed,
    name: &str,
    [rows, width]: [usize; 2],
    format: Format,
    agreement: &Agreement,
) -> Result<TensorBlob, String> {
    as_agreed(packed, name, format, agreement)?;
    let shape = vec![rows, width];
    let count = rows.checked_mul(width).filter(|count| *count <= MAX_VALUES);
    let Some(count) = count else {
        return Err(format!("'{name}' of {rows} x {width} values is too large; use a smaller batch_size"));
    };
    if count == 0 {
        let bytes = packed.bytes.len();
        return match bytes {
            0 => Ok(TensorBlob { shape, data: Vec::new() }),
            _ => Err(format!("'{name}' has {bytes} bytes for no values; reload the page or update the older program")),
        };
    }
    let data = packed.unpack(name, count, width).map_err(|e| e.to_string())?;
    Ok(TensorBlob { shape, data })
}

fn as_agreed(packed: &Packed, name: &str, format: Format, agreement: &Agreement) -> Result<(), String> {
    if packed.format != format {
        return Err(format!("'{name}' comes in {}, agreed was {format}", packed.format));
    }
    if packed.deflated && !agreement.deflate {
        return Err(format!("'{name}' comes deflated, which was not agreed"));
    }
    Ok(())
}

fn unusable(cause: String) -> Fault {
    Fault {
        code: FaultCode::Invalid,
        cause,
        remedy: "send what was agreed at the handshake; reload the page or update the older program".into(),
    }
}

fn too_large(cause: String) -> Fault {
    Fault { code: FaultCode::Invalid, cause, remedy: "use a smaller batch_size, or set micro_batch".into() }
}

/// Check that features of a picture can be kept: their format, and that they have the bytes of so many values; the values themselves
/// are looked at when they are needed.
///
/// # Errors
/// A [`Fault`] for the client.
pub fn check_features(packed: &Packed, agreement: &Agreement, shapes: Shapes) -> Result<(), Fault> {
    as_agreed(packed, "features", agreement.features, agreement).map_err(unusable)?;
    let (rows, width, found) = (shapes.image_positions as u64, shapes.dim as u64, packed.bytes.len() as u64);
    let plain = packed.format.bytes(rows, width);
    // Deflated is only what gets smaller by it.
    let fits = if packed.deflated { found < plain && found >= plain / MOST_INFLATED } else { found == plain };
    if fits {
        return Ok(());
    }
    let (deflated, format) = (if packed.deflated { ", deflated" } else { "" }, packed.format);
    Err(unusable(format!(
        "the features of a picture have {found} bytes{deflated}; {rows} x {width} values in {format} have {plain}"
    )))
}

/// Values of embeddings of a text to be gone on with, within what a server takes at once.
///
/// # Errors
/// A [`Fault`] for the client: they are too many.
pub fn measure_hidden(positions: u32, dim: usize) -> Result<usize, Fault> {
    let values = usize::try_from(positions).ok().and_then(|positions| positions.checked_mul(dim));
    values.filter(|values| *values <= MAX_VALUES).ok_or_else(|| Fault {
        code: FaultCode::Invalid,
        cause: format!("a text of {positions} new positions, {dim} wide, has more than {MAX_VALUES} values"),
        remedy: "shorten the question".into(),
    })
}

/// Embeddings `[1, positions, D]` of a text to be gone on with.
///
/// # Errors
/// A [`Fault`] for the client.
pub fn unpack_hidden(packed: &Packed, positions: u32, agreement: &Agreement, dim: usize) -> Result<TensorBlob, Fault> {
    let positions = usize::try_from(positions).unwrap_or(usize::MAX);
    let shape = [positions, dim];
    let hidden = unpack(packed, "embeddings", shape, agreement.embeddings(), agreement).map_err(unusable)?;
    Ok(TensorBlob { shape: vec![1, positions, dim], data: hidden.data })
}

impl WireRequest {
    /// The pictures whose features it needs.
    pub fn pictures(&self) -> BTreeSet<PictureKey> {
        match &self.input {
            WireInput::Hidden(_) => BTreeSet::new(),
            WireInput::Codes { rows, .. } => rows.iter().filter_map(|row| Some(row.picture?.0)).collect(),
        }
    }

    /// Check that it is of the mode agreed.
    ///
    /// # Errors
    /// A [`Fault`] for the client.
    pub fn fits(&self, agreement: &Agreement) -> Result<(), Fault> {
        let found = match &self.input {
            WireInput::Hidden(_) => BoundaryMode::Activations,
            WireInput::Codes { .. } => BoundaryMode::LowRank,
        };
        if found == agreement.mode {
            return Ok(());
        }
        Err(unusable(format!("a request in the mode '{found}', agreed was '{}'", agreement.mode)))
    }

    /// Values that it has when it is unpacked, with its matrices and what comes of them, within what a server takes at once; pictures
    /// lie within their rows, and its lists are no longer than its positions.
    ///
    /// # Errors
    /// A [`Fault`] for the client: it is too large, or its rows contradict each other.
    pub fn measure(&self, shapes: Shapes) -> Result<usize, Fault> {
        // At most 2^32 rows of 2^32 positions would not overflow; a frame holds far fewer.
        let total: u64 = self.lengths.iter().map(|length| u64::from(*length)).sum();
        let total = usize::try_from(total).unwrap_or(usize::MAX);
        let rank = match &self.input {
            WireInput::Hidden(_) => 0,
            WireInput::Codes { rank, .. } => usize::try_from(*rank).unwrap_or(usize::MAX),
        };
        let (dim, most) = (shapes.dim, MAX_VALUES);
        let (features, codes, matrix) =
            (total.saturating_mul(dim), total.saturating_mul(rank), dim.saturating_mul(rank));
        if features > most || codes > most {
            return Err(too_large(format!(
                "a batch of {total} positions, {dim} wide and with codes of {rank}, has more than {most} values"
            )));
        }
        if matrix > MAX_MATRIX {
            return Err(Fault {
                code: FaultCode::Invalid,
                cause: format!("a matrix of {dim} x {rank} has more than {MAX_MATRIX} values"),
                remedy: "use a smaller rank".into(),
            });
        }
        // A row without positions counts for nothing above, and yet takes memory.
        if let Some(row) = self.lengths.iter().position(|length| *length == 0) {
            return Err(unusable(format!("row {row} is empty")));
        }
        if self.targets.len() > total {
            return Err(unusable(format!("{} targets in {total} positions", self.targets.len())));
        }
        if let WireInput::Codes { rows, .. } = &self.input {
            images(rows, &self.lengths, shapes).map_err(unusable)?;
        }
        Ok(features.saturating_add(codes).saturating_add(matrix.saturating_mul(MATRICES)))
    }

    /// The `up` matrices that it brings; none: those last sent, or none at all.
    ///
    /// # Errors
    /// A [`Fault`] for the client.
    pub fn matrices(&self, agreement: &Agreement, shapes: Shapes) -> Result<Option<Pair<TensorBlob>>, Fault> {
        let WireInput::Codes { rank, up: Matrices::Sent(up), .. } = &self.input else {
            return Ok(None);
        };
        self.measure(shapes)?;
        let shape = [shapes.dim, usize::try_from(*rank).unwrap_or(usize::MAX)];
        let read = |part: Part, packed: &Packed| unpack(packed, part.up_name(), shape, agreement.matrices, agreement);
        up.as_ref().try_map(read).map(Some).map_err(unusable)
    }

    /// The request as the LLM's host takes it. It has still to pass [`BoundaryRequest::check`].
    ///
    /// # Errors
    /// A [`Fault`] for the client.
    pub fn unpack(
        self,
        agreement: &Agreement,
        shapes: Shapes,
        sources: &Sources<'_>,
    ) -> Result<BoundaryRequest, Fault> {
        self.fits(agreement)?;
        self.measure(shapes)?;
        let Self { input, lengths, targets, want, .. } = self;
        let (input, positions) = match input {
            WireInput::Hidden(hidden) => {
                let positions = Positions::plain(lengths);
                let shape = [positions.total(), shapes.dim];
                let hidden = unpack(&hidden, "activations", shape, agreement.codes, agreement).map_err(unusable)?;
                (Input::Hidden(hidden), positions)
            }
            WireInput::Codes { rows, rank, codes, .. } => {
                let images = images(&rows, &lengths, shapes).map_err(unusable)?;
                let positions = Positions { lengths, images };
                let x = features(&rows, &positions, agreement, shapes, sources).map_err(unusable)?;
                let rank = usize::try_from(rank).unwrap_or(usize::MAX);
                let codes = codes.try_map(|part, packed| {
                    let shape = [positions.counts(part).iter().sum(), rank];
                    unpack(&packed, &codes_name(part), shape, agreement.codes, agreement)
                });
                let codes = codes.map_err(unusable)?;
                let up = matrices_of(&codes, sources.up.clone())?;
                (Input::Codes(CodesInput { x: Arc::new(x), codes, up }), positions)
            }
        };
        Ok(BoundaryRequest { input, positions, targets, want })
    }
}

/// The matrices of the adapters that there are codes of; that of one without codes has nothing to do.
fn matrices_of(codes: &Pair<TensorBlob>, last: Option<Arc<Pair<TensorBlob>>>) -> Result<Arc<Pair<TensorBlob>>, Fault> {
    match last {
        _ if codes.is_empty() => Ok(Arc::default()),
        None => Err(Fault {
            code: FaultCode::OutOfOrder,
            cause: "a request goes on with matrices that were never sent over this connection".into(),
            remedy: "send them with the first request of a connection; reload the page or update the older program"
                .into(),
        }),
        Some(last) if last.parts() == codes.parts() => Ok(last),
        Some(last) => {
            let image = last.image.clone().filter(|_| codes.image.is_some());
            Ok(Arc::new(Pair { image, text: last.text.clone().filter(|_| codes.text.is_some()) }))
        }
    }
}

/// Where pictures lie: a row has as many positions as it has ids and its picture has features.
fn images(rows: &[WireRow], lengths: &[u32], shapes: Shapes) -> Result<Vec<Range<u32>>, String> {
    if rows.len() != lengths.len() {
        return Err(format!("{} rows with {} lengths", rows.len(), lengths.len()));
    }
    let image = |(number, (row, length)): (usize, (&WireRow, &u32))| {
        let image = match row.picture {
            None => Some(0..0),
            Some((_, start)) => {
                let size = u32::try_from(shapes.image_positions).ok();
                size.and_then(|size| start.checked_add(size)).filter(|end| end <= length).map(|end| start..end)
            }
        };
        let Some(image) = image else {
            return Err(format!("the picture of row {number} does not fit into {length} positions"));
        };
        let text = (*length - (image.end - image.start)) as usize;
        if row.ids.len() != text {
            return Err(format!("row {number} has {} token ids for {text} positions", row.ids.len()));
        }
        Ok(image)
    };
    rows.iter().zip(lengths).enumerate().map(image).collect()
}

/// `x`, `[T, D]`, put together from table and pictures. The rows have been checked by [`images`].
fn features(
    rows: &[WireRow],
    positions: &Positions,
    agreement: &Agreement,
    shapes: Shapes,
    sources: &Sources<'_>,
) -> Result<TensorBlob, String> {
    let dim = shapes.dim.max(1);
    let mut x = TensorBlob::zeros(&[positions.total(), dim]);
    let mut left = x.data.as_mut_slice();
    for (row, (length, image)) in rows.iter().zip(positions.lengths.iter().zip(&positions.images)) {
        let (own, rest) = std::mem::take(&mut left).split_at_mut(*length as usize * dim);
        left = rest;
        let (start, end) = (image.start as usize, image.end as usize);
        let (before, after) = row.ids.split_at(start.min(row.ids.len()));
        let (head, tail) = own.split_at_mut(start * dim);
        let (picture, tail) = tail.split_at_mut((end - start) * dim);
        let places = head.chunks_exact_mut(dim).chain(tail.chunks_exact_mut(dim));
        for (id, out) in before.iter().chain(after).zip(places) {
            (sources.token)(*id, out)?;
        }
        if let Some((key, _)) = row.picture {
            let Some(packed) = sources.pictures.get(&key) else {
                return Err("features of a picture are not here".into());
            };
            as_agreed(packed, "features", agreement.features, agreement)?;
            packed.unpack_into("features", picture, dim).map_err(|e| e.to_string())?;
        }
    }
    Ok(x)
}

impl WireReply {
    /// The reply to a request of the shape `sent`.
    ///
    /// # Errors
    /// A sentence: it does not fit the request, or is not in the form agreed.
    pub fn unpack(self, sent: &SentShape, agreement: &Agreement) -> Result<BoundaryReply, String> {
        if self.row_loss.len() != sent.rows {
            return Err(format!("losses of {} rows instead of {}", self.row_loss.len(), sent.rows));
        }
        let gradient = match (self.gradient, &sent.codes) {
            (WireGradient::Hidden(g), None) => {
                Gradient::Hidden(unpack(&g, "gradient", [sent.total, sent.dim], agreement.gradients, agreement)?)
            }
            (WireGradient::Codes { codes, up, up_squares }, Some(counts)) => {
                if codes.parts() != counts.parts() {
                    return Err("gradients of other codes than those that were sent".into());
                }
                let codes = codes.try_map(|part, packed| {
                    let shape = [counts.get(part).copied().unwrap_or(0), sent.rank];
                    unpack(&packed, &codes_name(part), shape, agreement.gradients, agreement)
                })?;
                let matrix = |part: Part, packed: Packed, name: String, format: Format| match counts.get(part) {
                    Some(_) => unpack(&packed, &name, [sent.dim, sent.rank], format, agreement),
                    None => Err(format!("the {name}, of which there is no adapter")),
                };
                let squares = agreement.squares();
                let up = up.try_map(|part, p| matrix(part, p, up_gradient_name(part), agreement.matrices))?;
                let up_squares = up_squares.try_map(|part, p| matrix(part, p, squares_name(part), squares))?;
                Gradient::Codes(CodesGradient { codes, up, up_squares })
            }
            _ => return Err("a gradient of another mode than the request".into()),
        };
        Ok(BoundaryReply { loss: self.loss, row_loss: self.row_loss, gradient })
    }
}

#[cfg(test)]
mod tests;
