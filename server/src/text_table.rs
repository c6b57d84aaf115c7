//! The model's token table, by which the server puts text features together from ids: the very values that a client has. A client holds
//! the table as its bundle stores it, so a row is taken through that form and back.

use fednano_shared::bundle::quantise;
use fednano_shared::model::checkpoint::TOKEN_TABLE;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::plain::TensorBlob;
use fednano_shared::wire::agreement::TableForm;
use half::{bf16, f16};

/// The checkpoint's values, in the smallest type that loses nothing.
enum Values {
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
}

/// The token table of a checkpoint, `[V, D]`.
pub struct TextTable {
    rows: usize,
    cols: usize,
    values: Values,
}

impl TextTable {
    /// That of a model.
    ///
    /// # Errors
    /// It is missing or misshapen.
    pub fn read(files: &ModelFiles) -> anyhow::Result<Self> {
        let table = files.weights.read(TOKEN_TABLE).map_err(anyhow::Error::msg)?;
        let expected = [files.config.text.vocab, files.config.text.hidden];
        anyhow::ensure!(
            table.shape == expected,
            "{TOKEN_TABLE}: shape {:?}, expected {expected:?}; restore the published checkpoint",
            table.shape
        );
        Self::new(table).map_err(anyhow::Error::msg)
    }

    /// Of these values.
    ///
    /// # Errors
    /// A sentence: they are no matrix.
    pub fn new(table: TensorBlob) -> Result<Self, String> {
        let TensorBlob { shape, data } = table;
        let [rows, cols] = shape[..] else {
            return Err(format!("a token table of shape {shape:?} is no matrix; the checkpoint is damaged"));
        };
        if cols == 0 || rows.checked_mul(cols) != Some(data.len()) {
            return Err(format!(
                "a token table of shape {shape:?} has {} values; the checkpoint is damaged",
                data.len()
            ));
        }
        Ok(Self { rows, cols, values: narrowed(data) })
    }

    /// Number of ids.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// D.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Write the row of a token as a client has it that holds the table in this form.
    ///
    /// # Errors
    /// A sentence: there is no such token, or its row cannot be stored so.
    pub fn row_into(&self, form: TableForm, id: u32, out: &mut [f32]) -> Result<(), String> {
        let at = usize::try_from(id).ok().filter(|at| *at < self.rows);
        let Some(at) = at.filter(|_| out.len() == self.cols) else {
            return Err(format!("there is no token {id}, the model's table has {} rows of {}", self.rows, self.cols));
        };
        let row = at * self.cols..(at + 1) * self.cols;
        match &self.values {
            Values::F16(all) => out.iter_mut().zip(&all[row]).for_each(|(o, v)| *o = v.to_f32()),
            Values::Bf16(all) => out.iter_mut().zip(&all[row]).for_each(|(o, v)| *o = v.to_f32()),
            Values::F32(all) => out.copy_from_slice(&all[row]),
        }
        match form {
            TableForm::F32 => {}
            TableForm::F16 => {
                let stored = quantise::to_f16(TOKEN_TABLE, out)?;
                out.iter_mut().zip(stored).for_each(|(o, v)| *o = v.to_f32());
            }
            TableForm::Int8 => {
                let stored = quantise::int8(TOKEN_TABLE, out, self.cols)?;
                let scale = stored.scales.first().copied().unwrap_or(f16::ZERO);
                quantise::int8_row(&stored.codes, scale, out);
            }
            TableForm::Int4 => {
                let stored = quantise::int4(TOKEN_TABLE, out, self.cols)?;
                quantise::int4_row(&stored.codes, &stored.scales, out);
            }
        }
        Ok(())
    }
}

/// In a type of half the size, where no value changes: most checkpoints are stored so.
fn narrowed(values: Vec<f32>) -> Values {
    let halves = |v: &f32| Some(f16::from_f32(*v)).filter(|half| half.to_f32().to_bits() == v.to_bits());
    if let Some(all) = values.iter().map(halves).collect() {
        return Values::F16(all);
    }
    let halves = |v: &f32| Some(bf16::from_f32(*v)).filter(|half| half.to_f32().to_bits() == v.to_bits());
    match values.iter().map(halves).collect() {
        Some(all) => Values::Bf16(all),
        None => Values::F32(values),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use fednano_shared::bundle::EdgeDtype;
    use fednano_shared::bundle::assemble::EdgeAssembler;
    use fednano_shared::bundle::piece::pieces;
    use fednano_shared::bundle::table::{Rows, TokenTable};
    use fednano_shared::model::checkpoint::load_edge;
    use std::path::Path;

    const FORMS: [(EdgeDtype, TableForm); 3] =
        [(EdgeDtype::F16, TableForm::F16), (EdgeDtype::Int8, TableForm::Int8), (EdgeDtype::Int4, TableForm::Int4)];

    /// Every row, bit for bit.
    fn same(ours: &TextTable, form: TableForm, theirs: &TokenTable) {
        assert_eq!((ours.rows(), ours.cols()), (theirs.rows(), theirs.cols()));
        let (mut got, mut want) = (vec![7.0; ours.cols()], vec![9.0; ours.cols()]);
        for id in 0..ours.rows() {
            ours.row_into(form, id as u32, &mut got).unwrap();
            theirs.row_into(id, &mut want);
            assert!(got.iter().zip(&want).all(|(g, w)| g.to_bits() == w.to_bits()), "{form}: row {id}");
        }
    }

    #[test]
    fn rows_are_those_that_clients_get() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano-llava");
        let files = ModelFiles::open(&model).unwrap();
        let table = TextTable::read(&files).unwrap();
        let device = Device::flex();
        // Whoever has the checkpoint itself.
        same(&table, TableForm::F32, &load_edge(&files.config, &files.weights, &device).unwrap().token_table);
        // Whoever has a bundle; its pieces cut the table where they like.
        for (dtype, form) in FORMS {
            let mut assembler = EdgeAssembler::new(&files.config, &device);
            for piece in pieces(&files.config, &files.weights, dtype, 100_000) {
                assembler.add(&piece.unwrap()).unwrap();
            }
            same(&table, form, &assembler.finish().unwrap().token_table);
        }
    }

    /// 5 rows of a width that no group divides; tiny, large and no values among them.
    fn values(step: f32) -> TensorBlob {
        let data = (0..5 * 37).map(|i| match i / 37 {
            0 => 0.0,
            1 => 1e-7 * (i % 11) as f32,
            row => (((i * 7919) % 101) as f32 - 50.0) * step * 10f32.powi(row - 3),
        });
        TensorBlob { shape: vec![5, 37], data: data.collect() }
    }

    #[test]
    fn widths_and_types_do_not_matter() {
        // Of no short type, of halves, of brain floats.
        let kinds: [fn(f32) -> f32; 3] = [|v| v, |v| f16::from_f32(v).to_f32(), |v| bf16::from_f32(v).to_f32()];
        for round in kinds {
            let mut blob = values(0.013);
            blob.data.iter_mut().for_each(|v| *v = round(*v));
            let table = TextTable::new(blob.clone()).unwrap();
            same(&table, TableForm::F32, &TokenTable::from_blob(blob.clone()).unwrap());
            for (dtype, form) in FORMS {
                let mut theirs = TokenTable::with_room(dtype, 5, 37).unwrap();
                let rows = match dtype {
                    EdgeDtype::F16 => Rows::F16(quantise::to_f16("t", &blob.data).unwrap()),
                    EdgeDtype::Int8 => Rows::Int8(quantise::int8("t", &blob.data, 37).unwrap()),
                    EdgeDtype::Int4 => Rows::Int4(quantise::int4("t", &blob.data, 37).unwrap()),
                };
                theirs.append(rows).unwrap();
                same(&table, form, &theirs);
            }
        }
        assert!(matches!(narrowed(vec![0.5, -0.0, 1.0]), Values::F16(_)));
        assert!(matches!(narrowed(vec![1e-20, 1.0]), Values::F32(_) | Values::Bf16(_)));
        assert!(matches!(narrowed(vec![f32::from_bits(0x2000_0000), 1.0]), Values::Bf16(_)));
        assert!(matches!(narrowed(vec![0.1]), Values::F32(_)));
    }

    #[test]
    fn what_there_is_not_is_named() {
        let table = TextTable::new(values(0.013)).unwrap();
        let mut out = [0.0; 37];
        for id in [5, u32::MAX] {
            let words = table.row_into(TableForm::F32, id, &mut out).unwrap_err();
            assert!(words.contains(&format!("no token {id}")) && words.contains("5 rows of 37"), "{words}");
        }
        assert!(table.row_into(TableForm::F32, 0, &mut out[1..]).is_err());
        let large = TextTable::new(TensorBlob { shape: vec![1, 1], data: vec![1e6] }).unwrap();
        large.row_into(TableForm::F32, 0, &mut out[..1]).unwrap();
        assert!(large.row_into(TableForm::F16, 0, &mut out[..1]).unwrap_err().contains("beyond f16"));
        for shape in [vec![5], vec![5, 3], vec![0, 0], vec![usize::MAX, 2]] {
            assert!(TextTable::new(TensorBlob { shape, data: vec![0.0; 10] }).is_err());
        }
    }
}
