//! A request that is too large to be computed at once: cut into some of its rows, and the replies put together again. The loss is
//! the mean over all targets, so each part counts by its share of them.

use super::Bounds;
use fednano_shared::boundary::{
    BoundaryReply, BoundaryRequest, CodesGradient, CodesInput, Gradient, Input, Pair, Target,
};
use fednano_shared::plain::TensorBlob;
use fednano_shared::wire::{Fault, FaultCode};
use std::ops::Range;
use std::sync::Arc;

/// The rows of a sound request as few ranges, each small enough to be computed at once.
pub(super) fn parts(request: &BoundaryRequest, vocab: usize, bounds: Bounds) -> Result<Vec<Range<usize>>, Fault> {
    let (mut parts, mut first, mut held, mut longest, mut total) = (Vec::new(), 0, 0, 0, 0usize);
    for (row, (length, targets)) in request.positions.lengths.iter().zip(request.target_counts()).enumerate() {
        let (length, targets) = (*length as usize, targets as usize);
        if !bounds.hold(1, length, length, targets, vocab) {
            return Err(Fault {
                code: FaultCode::Invalid,
                cause: format!("row {row} of {length} positions and {targets} targets is too large for this server"),
                remedy: "shorten the question or the answer".into(),
            });
        }
        let fits = bounds.hold(row + 1 - first, length.max(longest), total + length, held + targets, vocab);
        if row > first && !fits {
            parts.push(first..row);
            (first, held, longest, total) = (row, 0, 0, 0);
        }
        held += targets;
        total += length;
        longest = length.max(longest);
    }
    parts.push(first..request.positions.rows());
    Ok(parts)
}

/// Some rows of a sound request as one of their own.
pub(super) fn cut(request: &BoundaryRequest, rows: &Range<usize>) -> BoundaryRequest {
    let positions = &request.positions;
    let lengths: Vec<usize> = positions.lengths.iter().map(|length| *length as usize).collect();
    let slice = |blob: &TensorBlob, counts: &[usize]| -> TensorBlob {
        let width: usize = blob.shape.iter().skip(1).product();
        let before: usize = counts.iter().take(rows.start).sum();
        let own: usize = counts.iter().take(rows.end).skip(rows.start).sum();
        let data = blob.data.get(before * width..(before + own) * width).unwrap_or_default().to_vec();
        TensorBlob { shape: vec![own, width], data }
    };
    let input = match &request.input {
        Input::Hidden(h) => Input::Hidden(slice(h, &lengths)),
        Input::Codes(input) => Input::Codes(CodesInput {
            x: Arc::new(slice(&input.x, &lengths)),
            codes: input.codes.as_ref().map(|part, codes| slice(codes, &positions.counts(part))),
            up: input.up.clone(),
        }),
    };
    let own = request.targets.iter().filter(|t| rows.contains(&(t.row as usize)));
    BoundaryRequest {
        input,
        positions: positions.cut(rows.clone()),
        targets: own.map(|t| Target { row: t.row - rows.start as u32, ..*t }).collect(),
        want: request.want,
    }
}

/// The reply to a request of which the parts are computed one after the other.
pub(super) struct Whole {
    targets: usize,
    loss: f64,
    row_loss: Vec<f32>,
    gradient: Option<Gradient>,
}

impl Whole {
    pub(super) fn new(request: &BoundaryRequest) -> Self {
        let row_loss = Vec::with_capacity(request.positions.rows());
        Self { targets: request.targets.len(), loss: 0.0, row_loss, gradient: None }
    }

    /// The next rows, and what came of them.
    pub(super) fn add(&mut self, part: &BoundaryRequest, reply: BoundaryReply) {
        let share = part.targets.len() as f32 / self.targets.max(1) as f32;
        self.loss += f64::from(reply.loss) * f64::from(share);
        self.row_loss.extend(reply.row_loss);
        match (self.gradient.get_or_insert_with(|| empty(&reply.gradient)), &reply.gradient) {
            (Gradient::Hidden(all), Gradient::Hidden(own)) => append(all, own, share),
            (Gradient::Codes(all), Gradient::Codes(own)) => {
                for (part, own) in own.codes.iter() {
                    if let Some(all) = all.codes.slot(part) {
                        append(all, own, share);
                    }
                }
                all.up.add_scaled(&own.up, share);
                // Of each row's own mean, so it does not matter how many others there are.
                all.up_squares.add_scaled(&own.up_squares, 1.0);
            }
            // All parts have an input of one form, and so have their gradients.
            _ => {}
        }
    }

    pub(super) fn reply(self) -> BoundaryReply {
        let gradient = self.gradient.unwrap_or_else(|| Gradient::Codes(CodesGradient::default()));
        BoundaryReply { loss: self.loss as f32, row_loss: self.row_loss, gradient }
    }
}

/// A gradient of no rows.
fn empty(like: &Gradient) -> Gradient {
    let no_rows =
        |blob: &TensorBlob| TensorBlob { shape: vec![0, blob.shape.iter().skip(1).product()], data: Vec::new() };
    match like {
        Gradient::Hidden(g) => Gradient::Hidden(no_rows(g)),
        Gradient::Codes(g) => Gradient::Codes(CodesGradient {
            codes: g.codes.as_ref().map(|_, codes| no_rows(codes)),
            up: Pair::default(),
            up_squares: Pair::default(),
        }),
    }
}

/// Rows below those that are there.
fn append(all: &mut TensorBlob, own: &TensorBlob, factor: f32) {
    if let (Some(rows), Some(more)) = (all.shape.first_mut(), own.shape.first()) {
        *rows += more;
    }
    all.data.extend(own.data.iter().map(|g| g * factor));
}

#[cfg(test)]
mod tests {
    use super::*;
    use fednano_shared::boundary::{Positions, Want};

    /// Rows of 3 positions, 2 wide, with so many targets each.
    fn request(targets: &[u32]) -> BoundaryRequest {
        let rows = targets.len();
        let of = |row: usize| (0..targets[row]).map(move |position| Target { row: row as u32, position, token: 5 });
        BoundaryRequest {
            input: Input::Hidden(counted(&[rows * 3, 2])),
            positions: Positions::plain(vec![3; rows]),
            targets: (0..rows).flat_map(of).collect(),
            want: Want::Both,
        }
    }

    fn counted(shape: &[usize]) -> TensorBlob {
        TensorBlob { shape: shape.to_vec(), data: (0..shape.iter().product()).map(|i: usize| i as f32).collect() }
    }

    /// Rows of 2, 3 and 1 positions, of which 0, 2 and 1 are a picture's; rank 1.
    fn codes() -> BoundaryRequest {
        let target = |row, position| Target { row, position, token: 5 };
        BoundaryRequest {
            input: Input::Codes(CodesInput {
                x: Arc::new(counted(&[6, 2])),
                codes: Pair { image: Some(counted(&[3, 1])), text: Some(counted(&[3, 1])) },
                up: Arc::new(Pair { image: Some(counted(&[2, 1])), text: Some(counted(&[2, 1])) }),
            }),
            positions: Positions { lengths: vec![2, 3, 1], images: vec![0..0, 1..3, 0..1] },
            targets: vec![target(0, 0), target(0, 1), target(1, 0), target(2, 0)],
            want: Want::Both,
        }
    }

    fn bounds(rows: usize, targets: usize) -> Bounds {
        Bounds { attention: rows * 9, logits: targets * 10 }
    }

    #[test]
    fn parts_are_as_large_as_the_bounds_allow() {
        let ranges = |targets: &[u32], b: Bounds| parts(&request(targets), 10, b).unwrap();
        let whole = ranges(&[1, 2, 3], Bounds::default());
        assert!(whole.len() == 1 && whole[0] == (0..3), "{whole:?}");
        assert_eq!(ranges(&[1, 1, 1, 1, 1], bounds(2, 9)), [0..2, 2..4, 4..5]);
        assert_eq!(ranges(&[2, 0, 1, 3, 1, 2], bounds(9, 3)), [0..3, 3..4, 4..6]);
        assert_eq!(ranges(&[2, 0, 1, 3, 1, 2], bounds(2, 3)), [0..2, 2..3, 3..4, 4..6]);
        // Attention sees all rows of a part as long as its longest: 2 * 3 * 3 are too many for 17.
        let few = Bounds { attention: 17, ..Bounds::default() };
        assert_eq!(parts(&codes(), 10, few).unwrap(), [0..1, 1..2, 2..3]);
        assert_eq!(parts(&codes(), 10, Bounds { attention: 18, ..few }).unwrap(), [0..2, 2..3]);
        // Short rows have few scores, and yet many positions.
        assert_eq!(ranges(&[0; 6000], Bounds::default()), [0..2730, 2730..5460, 5460..6000]);
    }

    #[test]
    fn a_row_that_is_too_large_is_named() {
        let fault = |targets: &[u32], b: Bounds| parts(&request(targets), 10, b).unwrap_err().to_string();
        assert!(fault(&[1, 3], bounds(1, 2)).contains("row 1 of 3 positions and 3 targets"));
        assert!(fault(&[1], Bounds { attention: 8, ..bounds(1, 1) }).contains("shorten"));
    }

    #[test]
    fn a_part_is_a_sound_request() {
        let part = cut(&request(&[1, 2, 3]), &(1..3));
        part.check(2, 10, 3).unwrap();
        assert!(matches!(&part.input, Input::Hidden(h) if h.shape == [6, 2] && h.data[0] == 6.0), "{part:?}");
        assert_eq!(part.target_counts(), [2, 3]);
        // Shapes that nobody has checked yet, as the merging of requests sees them.
        assert!(!Bounds::default().hold(usize::MAX, usize::MAX, usize::MAX, usize::MAX, usize::MAX));
    }

    #[test]
    fn a_part_of_codes_is_a_sound_request() {
        let whole = codes();
        whole.check(2, 10, 3).unwrap();
        assert_eq!(cut(&whole, &(0..3)), whole);
        let values = |rows: Range<usize>| {
            let part = cut(&whole, &rows);
            part.check(2, 10, 3).unwrap();
            match part.input {
                Input::Codes(input) => {
                    let codes = input.codes.map(|_, codes| codes.data);
                    (input.x.data.clone(), codes.image.unwrap(), codes.text.unwrap())
                }
                Input::Hidden(_) => panic!("whole"),
            }
        };
        assert_eq!(values(0..1), (vec![0.0, 1.0, 2.0, 3.0], vec![], vec![0.0, 1.0]));
        assert_eq!(values(1..3), ((4..12).map(|v| v as f32).collect(), vec![0.0, 1.0, 2.0], vec![2.0]));
        assert_eq!(cut(&whole, &(1..3)).target_counts(), [1, 1]);
    }

    /// What a part's reply would be if all its gradients were 1.
    fn reply(part: &BoundaryRequest) -> BoundaryReply {
        let ones = |shape: &[usize]| TensorBlob { shape: shape.to_vec(), data: vec![1.0; shape.iter().product()] };
        let gradient = match &part.input {
            Input::Hidden(h) => Gradient::Hidden(ones(&h.shape)),
            Input::Codes(input) => Gradient::Codes(CodesGradient {
                codes: input.codes.as_ref().map(|_, codes| ones(&codes.shape)),
                up: (*input.up).as_ref().map(|_, up| ones(&up.shape)),
                up_squares: (*input.up).as_ref().map(|_, up| ones(&up.shape)),
            }),
        };
        BoundaryReply { loss: 2.0, row_loss: vec![2.0; part.positions.rows()], gradient }
    }

    #[test]
    fn parts_count_by_their_share() {
        let whole = |request: &BoundaryRequest| {
            let mut whole = Whole::new(request);
            for rows in [0..1, 1..3] {
                let part = cut(request, &rows);
                whole.add(&part, reply(&part));
            }
            whole.reply()
        };
        let hidden = whole(&request(&[1, 2, 1]));
        assert_eq!((hidden.loss, hidden.row_loss), (2.0, vec![2.0; 3]));
        let shares: Vec<f32> = [0.25; 6].into_iter().chain([0.75; 12]).collect();
        assert_eq!(hidden.gradient, Gradient::Hidden(TensorBlob { shape: vec![9, 2], data: shares }));
        let Gradient::Codes(short) = whole(&codes()).gradient else { panic!("whole") };
        let blob = |shape: &[usize], data: &[f32]| Some(TensorBlob { shape: shape.to_vec(), data: data.to_vec() });
        assert_eq!(short.codes, Pair { image: blob(&[3, 1], &[0.5; 3]), text: blob(&[3, 1], &[0.5; 3]) });
        assert_eq!(short.up.image, blob(&[2, 1], &[1.0; 2]));
        assert_eq!(short.up_squares.text, blob(&[2, 1], &[2.0; 2]));
    }
}
