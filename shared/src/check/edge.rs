//! The client's half: pictures, texts, vision tower, projector, embeddings.

use super::table::{Part, Table};
use super::{CheckError, META, Originals, tensor};
use crate::config::ModelConfig;
use crate::data::picture::{Picture, Preprocess};
use crate::data::text::{Encoded, LLAVA_PROMPT, TextCodec};
use crate::edge::NanoEdge;
use crate::model::adapter::read;
use crate::model::checkpoint::{EdgeParts, Weights, load_edge};
use crate::model::files::SmallFiles;
use crate::plain::TensorBlob;
use burn::tensor::Device;
use serde::Deserialize;

/// A label that is not learned from.
const IGNORED: i64 = -100;

/// Compare the client's half of a checkpoint; what was loaded onto `device` for it is given back.
///
/// # Errors
/// Tensors that do not fit, a lost device.
pub async fn compare(
    table: &mut Table<'_>,
    small: SmallFiles,
    weights: &Weights,
    originals: &Originals,
    device: &Device,
) -> Result<NanoEdge, CheckError> {
    if let Err(cause) = pictures(table, &small.preprocess, originals) {
        for name in ["image_u8", "pixel_values"] {
            table.skip(name, cause.clone());
        }
    }
    normalisation(table, &small.preprocess);
    if let Err(cause) = texts(table, &small.text, originals) {
        for name in ["input_ids", "prompt_lengths", "labels", "attention_mask"] {
            table.skip(name, cause.clone());
        }
    }
    let SmallFiles { config, text, preprocess } = small;
    let parts = load_edge(&config, weights, device)?;
    let features = vision(table, &config, &parts, device).await?;
    let edge = NanoEdge::from_parts(config, text, preprocess, parts, device);
    embeddings(table, &edge, &features);
    Ok(edge)
}

/// From decoded pictures to pixel values, in levels of 255.
fn pictures(table: &mut Table<'_>, preprocess: &Preprocess, originals: &Originals) -> Result<(), String> {
    let (rows, size) = (table.inputs.rows, preprocess.crop);
    let pictures = originals.pictures.as_ref().map_err(String::clone)?;
    if pictures.len() != rows {
        return Err(format!("there are {} pictures, the reference values have {rows}", pictures.len()));
    }
    let (mut levels, mut pixels) = (Vec::new(), Vec::new());
    for (row, picture) in pictures.iter().enumerate() {
        let resized = preprocess.resize(picture).map_err(|e| format!("picture {row}: {e}"))?;
        levels.extend(resized.rgb.iter().map(|v| i64::from(*v)));
        pixels.extend(preprocess.pixels(picture).map_err(|e| format!("picture {row}: {e}"))?);
    }
    let shape = [rows, size, size, 3];
    let reference = table.reference;
    match reference.whole("image_u8") {
        Some((want_shape, want)) if want_shape == shape => {
            let apart = levels.iter().zip(want).map(|(g, w)| g.abs_diff(*w));
            let equal = apart.clone().filter(|d| *d == 0).count();
            let note = format!("levels of 255; {equal} of {} equal", levels.len());
            table.judge("image_u8", &shape, apart.max().unwrap_or(0) as f64, note);
        }
        Some((want_shape, _)) => table.fail("image_u8", &shape, format!("the reference has shape {want_shape:?}")),
        None => table.skip("image_u8", "the reference has no such tensor"),
    }
    let inputs = table.inputs;
    let mut worst = 0f64;
    for (i, (got, want)) in pixels.iter().zip(&inputs.pixels.data).enumerate() {
        let std = preprocess.std[i / (size * size) % 3];
        worst = worst.max(f64::from((got - want).abs()) * f64::from(std) * 255.0);
    }
    table.judge("pixel_values", &[rows, 3, size, size], worst, "levels of 255".into());
    Ok(())
}

/// From the reference's own resized pictures to pixel values: no resampler is between them.
fn normalisation(table: &mut Table<'_>, preprocess: &Preprocess) {
    let (rows, size) = (table.inputs.rows, preprocess.crop);
    let reference = table.reference;
    let Some((shape, levels)) = reference.whole("image_u8") else {
        return;
    };
    // Only then does the preprocessing leave a picture's size as it is.
    if shape != [rows, size, size, 3] || preprocess.shortest_edge != size {
        return;
    }
    let row = "pixel_values@image_u8";
    let shape = vec![rows, 3, size, size];
    let mut data = Vec::new();
    for one in levels.chunks_exact(size * size * 3) {
        let picture = Picture { width: size, height: size, rgb: one.iter().map(|v| *v as u8).collect() };
        match preprocess.pixels(&picture) {
            Ok(pixels) => data.extend(pixels),
            Err(e) => return table.fail(row, &shape, e.to_string()),
        }
    }
    table.add(row, &TensorBlob { shape, data }, Part::All);
}

/// [`META`], as far as it is needed.
#[derive(Deserialize)]
struct Meta {
    samples: Vec<Sample>,
}

#[derive(Deserialize)]
struct Sample {
    prompt: String,
    answer_text_as_tokenised: String,
}

/// From the texts to ids and labels.
fn texts(table: &mut Table<'_>, codec: &TextCodec, originals: &Originals) -> Result<(), String> {
    let fault = |cause: String| format!("{META}: {cause}");
    let json = originals.meta.as_ref().map_err(String::clone)?;
    let meta: Meta = serde_json::from_slice(json).map_err(|e| fault(e.to_string()))?;
    let encoded = meta.samples.iter().map(|s| encode(codec, s)).collect::<Result<Vec<_>, _>>().map_err(fault)?;
    let (rows, seq) = (table.inputs.rows, table.inputs.seq);
    if encoded.len() != rows {
        return Err(fault(format!("{} samples, the reference values have {rows}", encoded.len())));
    }
    if let Some(long) = encoded.iter().find(|e| e.ids.len() > seq) {
        let note = format!("a sample has {} ids, the reference {seq} at most", long.ids.len());
        for name in ["input_ids", "prompt_lengths", "labels", "attention_mask"] {
            table.fail(name, &[rows, seq], note.clone());
        }
        return Ok(());
    }
    let mut ids = vec![0; rows * seq];
    let mut labels = vec![IGNORED; rows * seq];
    let mut mask = vec![0; rows * seq];
    for (row, e) in encoded.iter().enumerate() {
        for (t, id) in e.ids.iter().enumerate() {
            let at = row * seq + t;
            (ids[at], mask[at]) = (i64::from(*id), 1);
            if t >= e.prompt_length {
                labels[at] = i64::from(*id);
            }
        }
    }
    let prompts: Vec<i64> = encoded.iter().map(|e| e.prompt_length as i64).collect();
    table.add_whole("input_ids", &[rows, seq], &ids, Part::Real);
    table.add_whole("prompt_lengths", &[rows], &prompts, Part::All);
    table.add_whole("labels", &[rows, seq], &labels, Part::All);
    table.add_whole("attention_mask", &[rows, seq], &mask, Part::All);
    Ok(())
}

/// A sample as the codec encodes it. The codec trims answers; the reference gives byte-level tokenizers a leading space, which is
/// then put in behind the codec's prompt.
fn encode(codec: &TextCodec, sample: &Sample) -> Result<Encoded, String> {
    let answer = sample.answer_text_as_tokenised.as_str();
    let question = LLAVA_PROMPT
        .split_once("{question}")
        .and_then(|(before, after)| sample.prompt.strip_prefix(before)?.strip_suffix(after))
        .ok_or_else(|| format!("the prompt '{}' is not LLaVA-1.5's", sample.prompt))?;
    if answer.trim() == answer {
        return codec.encode(question, Some(answer)).map_err(|e| e.to_string());
    }
    let mut encoded = codec.encode(question, None).map_err(|e| e.to_string())?;
    encoded.ids.extend(codec.ids(answer, false).map_err(|e| e.to_string())?);
    encoded.ids.push(codec.eos());
    Ok(encoded)
}

/// From the reference's pixel values to image features `[B, P, D]`.
async fn vision(
    table: &mut Table<'_>,
    config: &ModelConfig,
    parts: &EdgeParts,
    device: &Device,
) -> Result<TensorBlob, CheckError> {
    let pixels = tensor::<4>(&table.inputs.pixels, device);
    let (run, all) = (config.feature_layer, config.vision.layers);
    for (i, state) in parts.vision.hidden_states(pixels.clone()).into_iter().enumerate() {
        let state = read(state).await?;
        table.add(&format!("vision.hidden_states.{i}"), &state, Part::All);
        if i == all {
            table.add("vision.last_hidden_state", &state, Part::All);
        }
    }
    if run < all {
        let later = (run + 1..=all).map(|i| format!("vision.hidden_states.{i}"));
        for name in later.chain(["vision.last_hidden_state".to_owned()]) {
            table.skip(&name, format!("the tower ends at its feature layer, state {run}"));
        }
    }
    let selected = parts.vision.forward(pixels);
    table.add("vision.selected", &read(selected.clone()).await?, Part::All);
    let features = read(parts.projector.forward(selected)).await?;
    table.add("image_features", &features, Part::All);
    Ok(features)
}

/// From ids and features to the decoder's input, as batches are assembled.
fn embeddings(table: &mut Table<'_>, edge: &NanoEdge, features: &TensorBlob) {
    let inputs = table.inputs;
    let (rows, seq, dim) = (inputs.rows, inputs.seq, inputs.dim);
    let mut text = TensorBlob::zeros(&[rows, seq, dim]);
    for (id, out) in inputs.ids.iter().zip(text.data.chunks_exact_mut(dim)) {
        out.copy_from_slice(&edge.assemble_token(*id).x.data);
    }
    table.add("text_embeds", &text, Part::Real);

    let count = edge.config.image_tokens();
    let encoded: Option<Vec<Encoded>> = (0..rows).map(|row| inputs.encoded(row, count)).collect();
    let Some(encoded) = encoded.filter(|_| features.shape == [rows, count, dim]) else {
        let note =
            format!("the reference's rows do not hold one run of {count} image tokens each, as config.json asks");
        for name in ["inputs_embeds", "image_mask", "labels@batch"] {
            table.fail(name, &[rows, seq], note.clone());
        }
        return;
    };
    let parts: Vec<(&Encoded, &[f32])> = encoded.iter().zip(features.data.chunks_exact(count * dim)).collect();
    let batch = match edge.assemble(&parts) {
        Ok(batch) => batch,
        Err(cause) => return table.fail("inputs_embeds", &[rows, seq, dim], cause.to_string()),
    };
    table.add("inputs_embeds", &inputs.padded(&batch.x), Part::Real);
    let mut mask = vec![0; rows * seq];
    for (row, image) in batch.positions.images.iter().enumerate() {
        let first = row * seq;
        mask[first + image.start as usize..first + image.end as usize].fill(1);
    }
    table.add_whole("image_mask", &[rows, seq], &mask, Part::All);
    let mut labels = vec![IGNORED; rows * seq];
    for t in &batch.targets {
        if let Some(label) = labels.get_mut(t.row as usize * seq + t.position as usize + 1) {
            *label = i64::from(t.token);
        }
    }
    table.add_whole("labels@batch", &[rows, seq], &labels, Part::All);
}
