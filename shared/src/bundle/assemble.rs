//! From pieces to the client's half of a model. A piece is used in full or, with an error, not at all.

use super::piece::Piece;
use super::table::{Rows, TokenTable};
use super::{BundleError, EdgeDtype, Manifest};
use crate::config::ModelConfig;
use crate::edge::NanoEdge;
use crate::model::checkpoint::{CheckpointError, EdgeParts, PROJECTOR, TOKEN_TABLE, VISION_TOWER, fill, shapes};
use crate::model::files::SmallFiles;
use crate::model::{clip::VisionTower, projector::Projector};
use burn::tensor::Device;
use std::collections::{BTreeMap, BTreeSet};

/// Modules and token table in the making.
pub struct EdgeAssembler {
    vision: VisionTower,
    projector: Projector,
    table: Option<TokenTable>,
    /// Rows and columns that the token table is to have.
    table_shape: [usize; 2],
    expected: BTreeSet<String>,
    filled: BTreeSet<String>,
}

impl EdgeAssembler {
    /// Nothing loaded yet. Allocates by the configuration's sizes: one from another machine passes [`Manifest::check`] first.
    pub fn new(config: &ModelConfig, device: &Device) -> Self {
        let (vision, projector) = (VisionTower::init(config, device), Projector::init(config, device));
        let modules = [shapes(&vision, VISION_TOWER), shapes(&projector, PROJECTOR)];
        Self {
            expected: modules.into_iter().flat_map(BTreeMap::into_keys).collect(),
            filled: BTreeSet::new(),
            table: None,
            table_shape: [config.text.vocab, config.text.hidden],
            vision,
            projector,
        }
    }

    /// Load a piece's tensors; rows of the token table must come from the first to the last.
    ///
    /// # Errors
    /// One list of everything in the piece that is unknown, misshapen or there already.
    pub fn add(&mut self, piece: &[u8]) -> Result<(), CheckpointError> {
        let piece = Piece::parse(piece)?;
        let mut faults = Vec::new();
        for name in piece.names().into_iter().filter(|n| *n != TOKEN_TABLE) {
            if self.filled.contains(name) {
                faults.push(format!("{name}: comes a second time"));
            } else if !self.expected.contains(name) {
                faults.push(format!("{name}: not part of a client's half of this model"));
            }
        }
        // Clones share their tensors with what is kept.
        let mut filled = BTreeSet::new();
        let vision = fill(self.vision.clone(), &piece, VISION_TOWER, &mut filled, &mut faults);
        let projector = fill(self.projector.clone(), &piece, PROJECTOR, &mut filled, &mut faults);
        let [vocab, hidden] = self.table_shape;
        let rows = piece.rows_of_table(vocab, hidden).unwrap_or_else(|fault| {
            faults.push(fault);
            None
        });
        if !faults.is_empty() {
            return Err(CheckpointError::Tensors(faults));
        }
        if let Some((first, rows)) = rows {
            self.add_rows(first, rows).map_err(|fault| CheckpointError::Tensors(vec![fault]))?;
        }
        (self.vision, self.projector) = (vision, projector);
        self.filled.extend(filled);
        Ok(())
    }

    fn add_rows(&mut self, first: usize, rows: Rows) -> Result<(), String> {
        let next = self.table.as_ref().map_or(0, TokenTable::rows);
        if first != next {
            return Err(format!(
                "{TOKEN_TABLE}: rows from {first} where row {next} is next; add pieces once each, in the manifest's order"
            ));
        }
        match &mut self.table {
            Some(table) => table.append(rows),
            None => {
                let dtype = match &rows {
                    Rows::Int8(_) => EdgeDtype::Int8,
                    Rows::Int4(_) => EdgeDtype::Int4,
                    Rows::F16(_) | Rows::F32(_) => EdgeDtype::F16,
                };
                let [vocab, hidden] = self.table_shape;
                let mut table = TokenTable::with_room(dtype, vocab, hidden)?;
                table.append(rows)?;
                self.table = Some(table);
                Ok(())
            }
        }
    }

    /// The loaded parts.
    ///
    /// # Errors
    /// One list of everything that no piece had.
    pub fn finish(self) -> Result<EdgeParts, CheckpointError> {
        let mut faults: Vec<String> = self.expected.difference(&self.filled).map(|n| format!("{n}: missing")).collect();
        let (rows, vocab) = (self.table.as_ref().map_or(0, TokenTable::rows), self.table_shape[0]);
        if rows < vocab {
            faults.push(format!("{TOKEN_TABLE}: rows {rows} to {} are missing", vocab - 1));
        }
        match self.table {
            Some(token_table) if faults.is_empty() => {
                Ok(EdgeParts { vision: self.vision, projector: self.projector, token_table })
            }
            _ => Err(CheckpointError::Tensors(faults)),
        }
    }
}

/// Loads a bundle: its manifest and small files first, then each piece. Every byte is checked against the manifest.
pub struct BundleLoader {
    manifest: Manifest,
    small: SmallFiles,
    assembler: EdgeAssembler,
    added: usize,
    device: Device,
}

impl BundleLoader {
    /// Begin, with the contents of the manifest's small files by name.
    ///
    /// # Errors
    /// [`BundleError`] names the file.
    pub fn open(manifest: Manifest, files: &BTreeMap<String, Vec<u8>>, device: &Device) -> Result<Self, BundleError> {
        manifest.validate()?;
        for entry in &manifest.files {
            let Some(bytes) = files.get(&entry.name) else {
                return Err(BundleError::Damaged { what: entry.name.clone(), cause: "it is missing".into() });
            };
            entry.verify(bytes)?;
        }
        let small = SmallFiles::from_bytes(files)?;
        manifest.check(&small.config)?;
        let assembler = EdgeAssembler::new(&small.config, device);
        Ok(Self { manifest, small, assembler, added: 0, device: device.clone() })
    }

    /// Load the next piece, in the manifest's order.
    ///
    /// # Errors
    /// [`BundleError`]; the same piece may be tried again.
    pub fn add(&mut self, piece: &[u8]) -> Result<(), BundleError> {
        let Some(entry) = self.manifest.pieces.get(self.added) else {
            return Err(BundleError::Manifest(format!("more pieces come than the {} that it lists", self.added)));
        };
        entry.verify(piece)?;
        self.assembler.add(piece)?;
        self.added += 1;
        Ok(())
    }

    /// The client's half of the model.
    ///
    /// # Errors
    /// [`BundleError`] lists what no piece had.
    pub fn finish(self) -> Result<NanoEdge, BundleError> {
        let SmallFiles { config, text, preprocess } = self.small;
        Ok(NanoEdge::from_parts(config, text, preprocess, self.assembler.finish()?, &self.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::piece::pieces;
    use crate::bundle::tests::{made_up, tensors, weights};
    use crate::bundle::{FORMAT, FileEntry, PieceEntry, parameters, sha256_hex};
    use crate::model::checkpoint::load_edge;
    use burn::tensor::{Tensor, TensorData};
    use safetensors::tensor::{Dtype, TensorView};
    use std::collections::HashMap;

    fn all(dtype: EdgeDtype, target: usize) -> Vec<Vec<u8>> {
        let config = made_up();
        pieces(&config, &weights(&tensors(&config)), dtype, target).collect::<Result<_, _>>().unwrap()
    }

    fn assemble<'a>(pieces: impl IntoIterator<Item = &'a Vec<u8>>) -> Result<EdgeParts, CheckpointError> {
        let mut assembler = EdgeAssembler::new(&made_up(), &Device::flex());
        pieces.into_iter().try_for_each(|piece| assembler.add(piece))?;
        assembler.finish()
    }

    /// Features of a made-up picture, and a row of the table.
    fn results(parts: &EdgeParts) -> (Vec<f32>, Vec<f32>) {
        let pixels: Vec<f32> = (0..3 * 8 * 8).map(|i| ((i * 37) % 23) as f32 * 0.1 - 1.0).collect();
        let pixels = Tensor::<4>::from_data(TensorData::new(pixels, [1, 3, 8, 8]), &Device::flex());
        let features = parts.projector.forward(parts.vision.forward(pixels));
        let features = features.into_data().convert::<f32>().try_into_vec().unwrap();
        let mut row = vec![0.0; 36];
        parts.token_table.row_into(49, &mut row);
        (features, row)
    }

    fn deviation(got: &[f32], want: &[f32]) -> f32 {
        assert_eq!(got.len(), want.len());
        let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        got.iter().zip(want).fold(0f32, |m, (g, w)| m.max((g - w).abs())) / largest
    }

    #[test]
    fn pieces_come_together_as_the_checkpoint() {
        let config = made_up();
        let whole = load_edge(&config, &weights(&tensors(&config)), &Device::flex()).unwrap();
        let (features, row) = results(&whole);
        // Generous, to be tightened after measurement: rounding, 1 / 254 and 1 / 14 of the largest value of a row or group.
        for (dtype, feature_limit, row_limit) in
            [(EdgeDtype::F16, 5e-3, 1e-3), (EdgeDtype::Int8, 0.1, 0.01), (EdgeDtype::Int4, 1.0, 0.1)]
        {
            for target in [1, 2000, 4 << 20] {
                let (f, r) = results(&assemble(&all(dtype, target)).unwrap());
                let (f, r) = (deviation(&f, &features), deviation(&r, &row));
                println!("{dtype}: features {f:.1e}, row {r:.1e}");
                assert!(f < feature_limit && r < row_limit, "{dtype}: features {f}, row {r}");
            }
        }
    }

    #[test]
    fn what_no_piece_had_is_listed() {
        let pieces = all(EdgeDtype::Int8, 1);
        let words = |result: Result<EdgeParts, CheckpointError>| result.err().unwrap().to_string();
        let empty = words(assemble(&pieces[..0]));
        assert!(empty.contains("rows 0 to 49 are missing") && empty.contains("class_embedding: missing"), "{empty}");
        let late = words(assemble(&pieces[1..]));
        assert!(late.matches("missing").count() == 1 && late.contains("linear_1.bias: missing"), "{late}");
        let early = words(assemble(&pieces[..pieces.len() - 1]));
        assert!(early.contains("rows 49 to 49 are missing"), "{early}");
    }

    #[test]
    fn a_piece_counts_once_and_rows_come_in_order() {
        let found = all(EdgeDtype::F16, 1);
        let last = found.len() - 1;
        let mut assembler = EdgeAssembler::new(&made_up(), &Device::flex());
        assembler.add(&found[0]).unwrap();
        assert!(assembler.add(&found[0]).unwrap_err().to_string().contains("second time"));
        assert!(assembler.add(&found[last]).unwrap_err().to_string().contains("rows from 49 where row 0 is next"));
        // What was refused has left no trace.
        found[1..].iter().for_each(|piece| assembler.add(piece).unwrap());
        assert!(assembler.add(&found[last]).unwrap_err().to_string().contains("where row 50 is next"));
        assembler.finish().unwrap();
        let (eight, mut mixed) = (all(EdgeDtype::Int8, 1), found);
        mixed[last].clone_from(&eight[last]);
        assert!(assemble(&mixed).err().unwrap().to_string().contains("partly in f16, partly in int8"));
    }

    /// A piece by hand: name, form, shape, bytes.
    fn forged(tensors: &[(&str, Dtype, &[usize], Vec<u8>)], notes: &str) -> Vec<u8> {
        let views = tensors.iter().map(|(n, d, s, b)| (*n, TensorView::new(*d, s.to_vec(), b).unwrap()));
        let notes = HashMap::from([("fednano".to_owned(), notes.to_owned())]);
        safetensors::serialize(views, Some(notes)).unwrap()
    }

    #[test]
    fn forged_pieces_are_refused() {
        let refused = |piece: &[u8], word: &str| {
            let words = EdgeAssembler::new(&made_up(), &Device::flex()).add(piece).unwrap_err().to_string();
            assert!(words.contains(word), "'{word}' is not in: {words}");
        };
        const BIAS: &str = "multi_modal_projector.linear_1.bias";
        const WEIGHT: &str = "multi_modal_projector.linear_1.weight";
        const SCALE: &str = "multi_modal_projector.linear_1.weight.scale";
        const POSITIONS: &str = "vision_tower.embeddings.position_embedding.weight";
        const MATRIX: &[usize] = &[36, 24];
        const ROW: &[usize] = &[36];
        let zeros = |n: usize| vec![0u8; n];
        let half = |bits: u16, n: usize| bits.to_le_bytes().repeat(n);
        // Wrong shape, wrong form, unknown, not finite.
        refused(&forged(&[(BIAS, Dtype::F16, &[35], zeros(70))], "{}"), "shape [35], expected [36]");
        refused(&forged(&[(BIAS, Dtype::F32, ROW, zeros(144))], "{}"), "stored as F32");
        refused(&forged(&[(BIAS, Dtype::I8, ROW, zeros(36))], "{}"), "stored as I8");
        refused(&forged(&[(POSITIONS, Dtype::I8, &[5, 24], zeros(120))], "{}"), "stored as I8");
        refused(&forged(&[("lm_head.weight", Dtype::F16, &[1], zeros(2))], "{}"), "not part");
        refused(&forged(&[("vision_tower.scale", Dtype::F16, &[1], zeros(2))], "{}"), "not part");
        refused(&forged(&[(BIAS, Dtype::F16, ROW, half(0x7c00, 36))], "{}"), "value inf at index 0");
        // Scales.
        let codes = || (WEIGHT, Dtype::I8, MATRIX, zeros(36 * 24));
        refused(&forged(&[codes()], "{}"), "linear_1.weight.scale: missing");
        refused(&forged(&[codes(), (SCALE, Dtype::F16, ROW, half(0x7e00, 36))], "{}"), "value NaN");
        refused(&forged(&[codes(), (SCALE, Dtype::F16, &[24], zeros(48))], "{}"), "[24], expected [36]");
        refused(&forged(&[codes(), (SCALE, Dtype::U8, ROW, zeros(36))], "{}"), "expected F16");
        // 4 bits that belong to another width.
        let nibbles = |note: &str| {
            forged(&[(WEIGHT, Dtype::U8, &[36, 16], zeros(576)), (SCALE, Dtype::F16, &[36, 1], zeros(72))], note)
        };
        refused(&nibbles("{}"), "expected 24");
        refused(&nibbles(&format!("{{\"cols.{WEIGHT}\":\"25\"}}")), "25");
        // Rows of other tables.
        let table = |rows: &str| {
            let note = format!("{{\"rows.{TOKEN_TABLE}\":\"{rows}\"}}");
            forged(&[(TOKEN_TABLE, Dtype::F16, &[10, 36], zeros(720))], &note)
        };
        for rows in ["", "0-9", "9-0/50", "0-9/51", "45-54/50", "-1-8/50", "0-18446744073709551615/50", "a-b/c"] {
            refused(&table(rows), "expected FIRST-LAST/50");
        }
        refused(&table("0-10/50"), "[10, 36], expected [11, 36]");
        refused(&forged(&[(BIAS, Dtype::F16, ROW, zeros(72))], "[1]"), "damaged");
    }

    #[test]
    fn damaged_pieces_are_refused() {
        let refused = |piece: &[u8]| {
            let error = EdgeAssembler::new(&made_up(), &Device::flex()).add(piece).unwrap_err();
            assert!(matches!(error, CheckpointError::Damaged { .. }), "{error}");
        };
        let piece = all(EdgeDtype::Int4, 4 << 20).remove(0);
        for length in [0, 7, 8, 100, piece.len() / 2, piece.len() - 1] {
            refused(&piece[..length]);
        }
        refused(&[255; 64]);
        let header = r#"{"a":{"dtype":"U8","shape":[1152921504606846976],"data_offsets":[0,1152921504606846976]}}"#;
        let mut absurd = (header.len() as u64).to_le_bytes().to_vec();
        absurd.extend(header.as_bytes());
        refused(&absurd);
    }

    #[test]
    fn a_bundle_is_checked_from_the_manifest_on() {
        let found = all(EdgeDtype::F16, 3000);
        let entry = |p: &Vec<u8>| PieceEntry { sha256: sha256_hex(p), bytes: p.len() as u64 };
        let manifest = Manifest {
            format: FORMAT,
            model: "made up".into(),
            edge_dtype: EdgeDtype::F16,
            parameters: parameters(&made_up()),
            resident_bytes: 1,
            files: vec![FileEntry { name: "config.json".into(), sha256: sha256_hex(b"{}"), bytes: 2 }],
            pieces: found.iter().map(entry).collect(),
        };
        let open = |files: &[(&str, &[u8])]| {
            let files = files.iter().map(|(n, b)| ((*n).to_owned(), b.to_vec())).collect();
            BundleLoader::open(manifest.clone(), &files, &Device::flex()).err().unwrap().to_string()
        };
        assert!(open(&[]).contains("config.json is damaged: it is missing"));
        assert!(open(&[("config.json", &b"{1"[..])]).contains("its SHA-256 is"));
        assert!(open(&[("config.json", &b"{}"[..])]).contains("type 'none'"));
    }
}
