//! Numbers beyond what a format reaches, and short requests that make no sense: each is refused with its cause and a remedy, and the
//! connection goes on.

use super::{Scene, mixed, settings};
use anyhow::{Context, ensure};
use fednano_shared::boundary::{Pair, Place};
use fednano_shared::settings::{BoundaryChoice, FederationSettings, Format, Rounding};
use fednano_shared::wire::numbers::{Coder, Packed, PictureKey};
use fednano_shared::wire::{ClientMessage, Fault, FaultCode, Matrices, ServerMessage, WireInput, WireRequest, WireRow};
use fednano_tests::hand::{Hand, exact, numbers, request};
use fednano_tests::{LIMIT, block, offer};

/// Width of the reference checkpoint.
const DIM: usize = 96;

fn named(what: &str, fault: &Fault, words: &[&str]) -> anyhow::Result<()> {
    println!("{what}: {fault}");
    ensure!(matches!(fault.code, FaultCode::Invalid | FaultCode::OutOfOrder), "{what}: {fault:?}");
    ensure!(words.iter().all(|w| fault.to_string().contains(w)), "{what}: {words:?} are not in: {fault}");
    ensure!(!fault.cause.is_empty() && !fault.remedy.is_empty(), "{what}: {fault:?}");
    Ok(())
}

/// Neither end lets a number through that is none, or that its format cannot hold: not when it is sent, not when it comes.
pub fn out_of_range() -> anyhow::Result<()> {
    block(LIMIT, async {
        for format in [Format::F16, Format::Int8] {
            for rounding in Rounding::ALL {
                let coder = Coder { format, rounding, deflate: false, seed: 1 };
                for (value, word) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf"), (-3e38, "-3")] {
                    let mut values = numbers(2 * DIM);
                    values[5] = value;
                    let refused = coder.pack("activations", &values, DIM).err().context("it was packed")?.to_string();
                    let all = ["'activations'", word, "index 5", "learning_rate"];
                    ensure!(all.iter().all(|w| refused.contains(w)), "{format}: {refused}");
                }
                // What is nearly too large comes back finite, and near.
                let large = [1.6e38f32, -1.6e38, 1.0, 0.0];
                let back = coder.pack("activations", &large, 4)?.unpack("activations", 4, 4)?;
                let near = |got: &f32, want: f32| (got - want).abs() <= 0.01 * 1.6e38;
                ensure!(back.iter().zip(large).all(|(g, w)| g.is_finite() && near(g, w)), "{format}: {back:?}");
            }
        }
        for format in Format::ALL {
            let choice = FederationSettings { code_format: format, ..settings(BoundaryChoice::Activations) };
            let scene = Scene::open(&mixed(), choice).await?;
            let mut hand = Hand::open(&scene.server.socket, offer(3)).await?;
            let sound = Coder { format, ..Coder::EXACT }.pack("activations", &numbers(5 * DIM), DIM)?;
            let of = |packed: &Packed| request(1, WireInput::Hidden(packed.clone()));
            let changed = |at: usize, bytes: &[u8]| {
                let mut packed = sound.clone();
                packed.bytes[at..at + bytes.len()].copy_from_slice(bytes);
                packed
            };
            let mut bad = vec![
                ("a byte too few", Packed { bytes: sound.bytes[1..].to_vec(), ..sound.clone() }),
                ("nothing", Packed { bytes: Vec::new(), ..sound.clone() }),
                ("deflated without agreement", Packed { deflated: true, ..sound.clone() }),
            ];
            match format {
                Format::F32 => {
                    bad.push(("not a number", changed(8, &f32::NAN.to_le_bytes())));
                    bad.push(("infinity", changed(8, &f32::INFINITY.to_le_bytes())));
                    bad.push(("another format", Packed { format: Format::F16, ..sound.clone() }));
                }
                Format::F16 => {
                    bad.push(("an exponent beyond all", changed(0, &[127])));
                    bad.push(("the infinite half", changed(1, &0x7c00u16.to_le_bytes())));
                    bad.push(("the half that is no number", changed(3, &0x7e01u16.to_le_bytes())));
                }
                Format::Int8 => {
                    bad.push(("an infinite scale", changed(0, &0x7f80u16.to_le_bytes())));
                    bad.push(("a scale that is no number", changed(2, &0x7fc1u16.to_le_bytes())));
                    bad.push(("a negative scale", changed(0, &0xbf80u16.to_le_bytes())));
                }
            }
            for (what, packed) in bad {
                let fault = hand.train(of(&packed)).await?.err().with_context(|| format!("{what} was computed"))?;
                named(&format!("{format}, {what}"), &fault, &["activations"])?;
            }
            let reply = hand.train(of(&sound)).await?.map_err(anyhow::Error::msg)?;
            ensure!(reply.loss.is_finite(), "loss {}", reply.loss);
            scene.server.stop().await?;
        }
        short_requests().await
    })
}

/// A row of five ids, three codes a position, matrices of zeros.
fn short() -> WireRequest {
    let row = WireRow { ids: vec![5, 6, 7, 8, 9], picture: None };
    let zeros = || Some(exact(&[0.0; DIM * 3]));
    let codes = Pair { image: Some(exact(&[])), text: Some(exact(&numbers(5 * 3))) };
    let up = Matrices::Sent(Pair { image: zeros(), text: zeros() });
    request(1, WireInput::Codes { rows: vec![row], rank: 3, codes, up })
}

/// Change the rows of a short request.
fn rows(mut request: WireRequest, change: impl FnOnce(&mut Vec<WireRow>)) -> WireRequest {
    if let WireInput::Codes { rows, .. } = &mut request.input {
        change(rows);
    }
    request
}

fn with(change: impl FnOnce(&mut u32, &mut Pair<Packed>, &mut Matrices)) -> WireRequest {
    let mut request = short();
    if let WireInput::Codes { rank, codes, up, .. } = &mut request.input {
        change(rank, codes, up);
    }
    request
}

/// Sound numbers of rank 5.
fn five() -> (u32, Pair<Packed>, Matrices) {
    let zeros = || Some(exact(&[0.0; DIM * 5]));
    let codes = Pair { image: Some(exact(&[])), text: Some(exact(&numbers(5 * 5))) };
    (5, codes, Matrices::Sent(Pair { image: zeros(), text: zeros() }))
}

/// Two thousand rows of five ids, and nothing else.
fn long() -> WireRequest {
    let none = || Pair { image: None, text: None };
    let rows = vec![WireRow { ids: vec![5, 6, 7, 8, 9], picture: None }; 2000];
    request(2000, WireInput::Codes { rows, rank: 0, codes: none(), up: Matrices::Sent(none()) })
}

async fn short_requests() -> anyhow::Result<()> {
    let scene = Scene::open(&mixed(), settings(BoundaryChoice::LowRank)).await?;
    let mut hand = Hand::open(&scene.server.socket, offer(3)).await?;
    // Before anything was sent there is nothing to be the same.
    let same = with(|_, _, up| *up = Matrices::Same);
    let fault = hand.train(same.clone()).await?.err().context("matrices out of nowhere")?;
    named("matrices that were never sent", &fault, &["matri"])?;

    // A picture whose features are here.
    let features = exact(&numbers(scene.edge.config.image_tokens() * DIM));
    hand.say(&ClientMessage::Features { round: 0, pictures: vec![(PictureKey(1), features.clone())] }).await?;
    let whole = request(1, WireInput::Hidden(exact(&numbers(5 * DIM))));
    let mut place = short();
    place.place = Place { index: 3, of: 2, share: 0.5 };
    let mut share = short();
    share.place = Place { index: 0, of: 2, share: f32::NAN };
    let bad = [
        ("a request of the other mode", whole, "mode"),
        ("an id too many", rows(short(), |rows| rows[0].ids.push(3)), "6 token ids"),
        ("an id that there is not", rows(short(), |rows| rows[0].ids[2] = 4_000_000), "4000000"),
        ("a row too many", rows(short(), |rows| rows.push(rows[0].clone())), "2 rows"),
        ("a picture beyond the row", rows(short(), |rows| rows[0].picture = Some((PictureKey(1), 4))), "picture"),
        ("rank 0", with(|rank, _, _| *rank = 0), ""),
        ("a vast rank", with(|rank, _, _| *rank = u32::MAX), "rank 4294967295"),
        ("a rank above the federation's", with(|rank, codes, up| (*rank, *codes, *up) = five()), "takes 4 at most"),
        ("codes of another number", with(|_, codes, _| codes.text = Some(exact(&numbers(14)))), "codes"),
        (
            "a matrix of another shape",
            with(|_, _, up| {
                *up = Matrices::Sent(Pair { image: Some(exact(&[0.0; DIM * 3])), text: Some(exact(&[0.0; DIM * 2])) })
            }),
            "text.up",
        ),
        ("a place outside its group", place, ""),
        ("a share that is no number", share, ""),
    ];
    for (what, request, word) in bad {
        let fault = hand.train(request).await?.err().with_context(|| format!("{what} was computed"))?;
        named(what, &fault, &[word])?;
    }
    // Ids are short, and anybody may ask: of more positions than are computed at once nothing is.
    let fault = hand.train(long()).await?.err().context("10,000 positions were computed")?;
    println!("too many positions: {fault}");
    ensure!(fault.code == FaultCode::TooLarge && !fault.remedy.is_empty(), "{fault:?}");
    ensure!(fault.cause.contains("10000 positions, a connection that only asks may send 8192"), "{fault}");
    // What is sound is computed, with matrices and then with the same.
    for request in [short(), same] {
        let reply = hand.train(request).await?.map_err(anyhow::Error::msg)?;
        ensure!(reply.loss.is_finite(), "loss {}", reply.loss);
    }
    // Features that nobody announced are asked for; a request that waits for them holds nobody up.
    let lacking = {
        let positions = scene.edge.config.image_tokens();
        let mut request = rows(short(), |rows| rows[0].picture = Some((PictureKey(7), 1)));
        request.lengths[0] += positions as u32;
        if let WireInput::Codes { codes, .. } = &mut request.input {
            codes.image = Some(exact(&numbers(positions * 3)));
        }
        ClientMessage::Train { id: 1000, round: 0, request }
    };
    hand.say(&lacking).await?;
    match hand.hear().await? {
        ServerMessage::Missing { id: 1000, pictures } => ensure!(pictures == [PictureKey(7)], "{pictures:?}"),
        other => anyhow::bail!("{other:?} instead of a call for features"),
    }
    let reply = hand.train(short()).await?.map_err(anyhow::Error::msg)?;
    ensure!(reply.loss.is_finite(), "loss {}", reply.loss);
    hand.say(&ClientMessage::Features { round: 0, pictures: vec![(PictureKey(7), features)] }).await?;
    match hand.hear().await? {
        ServerMessage::Trained { id: 1000, reply } => ensure!(reply.loss.is_finite(), "loss {}", reply.loss),
        other => anyhow::bail!("{other:?} instead of the answer to what was waiting"),
    }
    scene.server.stop().await
}
