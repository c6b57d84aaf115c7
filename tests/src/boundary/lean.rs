//! Nothing is sent that the other side has, or that is padding.

use super::{Scene, mixed, run, settings, words_only};
use anyhow::ensure;
use burn::tensor::Device;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::ledger::Meter;
use fednano_shared::probe::{self, shard};
use fednano_shared::settings::{BoundaryChoice, FederationSettings, Format, Strategy};
use fednano_shared::step::InProcess;
use fednano_shared::wire::agreement::{BoundaryMode, Offer, TableForm};
use fednano_shared::wire::{ClientMessage, ServerMessage, WireGradient, WireInput};
use fednano_tests::tap::Frames;
use fednano_tests::{LIMIT, MODES, asking, block, fixture, halves};
use std::collections::BTreeSet;

/// Text goes as ids: in mode `low-rank` no frame has a word's features in it, and text costs a few bytes a position.
pub fn text_goes_as_ids() -> anyhow::Result<()> {
    block(LIMIT, async {
        let data = words_only(shard(DemoTheme::Garden, 3, 4, 3));
        for (boundary, mode) in MODES {
            let scene = Scene::open(&data, FederationSettings { local_steps: 4, ..settings(boundary) }).await?;
            let (mut needles, mut longest) = (BTreeSet::new(), 0);
            for row in 0..scene.cache.samples.len() {
                let batch = scene.edge.batch(&scene.cache, &[row])?;
                longest = longest.max(batch.positions.total());
                // 16 bytes that no other numbers have by chance.
                let begins = |x: &[f32]| x[..4].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
                needles.extend(batch.x.data.chunks(scene.edge.config.text.hidden).map(begins));
            }
            let tap = scene.tap();
            let ran = scene.run(tap).await?;
            let found = ran.frames.raw_up().iter().filter(|f| f.windows(16).any(|w| needles.contains(w))).count();
            let traffic = ran.traffic;
            println!("{mode}: {found} frames with words in them, {traffic:?}");
            // At the first step the adapters do nothing yet: what goes up whole is the features themselves.
            ensure!((found > 0) == (mode == BoundaryMode::Activations), "{mode}: {found} frames with words in them");
            ensure!(traffic.up.features == 0, "{mode}: {} bytes of features without a picture", traffic.up.features);
            if mode == BoundaryMode::LowRank {
                let rows = rows_sent(&ran.frames);
                let most = (rows * (2 * longest + 8)) as u64;
                ensure!(traffic.up.activations == 0, "{} bytes of hidden states", traffic.up.activations);
                ensure!((1..=most).contains(&traffic.up.text), "{} bytes of text, at most {most}", traffic.up.text);
            }
        }
        Ok(())
    })
}

/// The server puts text together from ids as the client has it, in whichever form that got the table: not one bit differs. From
/// another form's table it would.
pub fn every_table_form() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&fixture(), &Device::flex())?;
        let mut others = 0;
        for dtype in [EdgeDtype::F16, EdgeDtype::Int8, EdgeDtype::Int4] {
            let low_rank = FederationSettings { rank: probe::RANK, ..settings(BoundaryChoice::LowRank) };
            let scene = Scene::with(&mixed(), low_rank, |server| server.edge_dtype = dtype).await?;
            let offer = Offer::of(&scene.cache, &scene.edge);
            let mut in_process = InProcess::new(&h.llm, BoundaryMode::LowRank);
            let local = probe::run(&scene.edge, &mut in_process, &h.device).await?;
            for table in TableForm::ALL {
                let mut asker = asking(&scene.server.socket, Offer { table, ..offer.clone() }).await?;
                let remote = probe::run(&scene.edge, &mut asker, &h.device).await?;
                let same = remote == local;
                println!("{dtype:?}, offered as {table}: the same: {same}");
                ensure!(same || table != offer.table, "{dtype:?}: over the wire the step is another one");
                others += usize::from(!same);
            }
            scene.server.stop().await?;
        }
        ensure!(others > 0, "the form makes no difference: nothing is tested");
        Ok(())
    })
}

/// Rows of all requests.
fn rows_sent(frames: &Frames) -> usize {
    let rows = |message| match message {
        ClientMessage::Train { request, .. } | ClientMessage::Evaluate { request, .. } => match request.input {
            WireInput::Codes { rows, .. } => rows.len(),
            WireInput::Hidden(_) => request.lengths.len(),
        },
        _ => 0,
    };
    frames.up().into_iter().map(rows).sum()
}

/// A short row beside a long one costs what it costs alone: no byte for padding, in either direction.
pub fn padding_costs_nothing() -> anyhow::Result<()> {
    block(LIMIT, async {
        let mut data = words_only(shard(DemoTheme::Garden, 3, 1, 2));
        data.samples[0].question = "a".into();
        data.samples[1].question =
            "what is it that one may see at the very left of the picture, and which colour has it?".into();
        for (boundary, mode) in MODES {
            for format in [Format::F32, Format::Int8] {
                let settings = FederationSettings {
                    strategy: Strategy::FedAvg,
                    local_steps: 1,
                    batch_size: 2,
                    micro_batch: 0,
                    code_format: format,
                    gradient_format: format,
                    ..settings(boundary)
                };
                let mut traffic = Vec::new();
                for rows in [&[0, 1][..], &[0], &[1]] {
                    let mut data = data.subset(rows);
                    // A step of two samples of one would see it twice.
                    let settings = FederationSettings { batch_size: rows.len(), ..settings.clone() };
                    data.pictures.clear();
                    let ran = run(&data, settings).await?;
                    traffic.push(counted(&ran.frames));
                }
                let [together, short, long] = &traffic[..] else { anyhow::bail!("{} runs", traffic.len()) };
                println!("{mode}, {format}: {together:?}, alone {short:?} and {long:?}");
                let alone = [0, 1, 2].map(|kind| short[kind] + long[kind]);
                ensure!(long[0] > 2 * short[0], "{mode}: the rows are of like length: nothing is tested");
                ensure!(*together == alone, "{mode}, {format}: {together:?} together, alone {alone:?}");
            }
        }
        Ok(())
    })
}

/// Bytes of hidden states or codes, of their gradients without those of matrices, and of token ids, in training requests.
pub(super) fn counted(frames: &Frames) -> [u64; 3] {
    let mut meter = Meter::default();
    for (message, raw) in frames.up().iter().zip(frames.raw_up()) {
        if matches!(message, ClientMessage::Train { .. }) {
            meter.up(message, raw.len());
        }
    }
    let gradients = frames.down().into_iter().map(|message| match message {
        ServerMessage::Trained { reply, .. } => match reply.gradient {
            WireGradient::Hidden(g) => g.bytes.len(),
            WireGradient::Codes { codes, .. } => codes.iter().map(|(_, u)| u.bytes.len()).sum(),
        },
        _ => 0,
    });
    let up = meter.total().up;
    [up.codes + up.activations, gradients.sum::<usize>() as u64, up.text]
}
