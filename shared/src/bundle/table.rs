//! The token table on the host, in the form in which it came: rows are looked up, never multiplied.

use super::EdgeDtype;
use super::quantise::{self, Quantised};
use crate::plain::TensorBlob;
use half::f16;

/// Rows of a matrix as they are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Rows {
    /// As a checkpoint's are read.
    F32(Vec<f32>),
    /// As they are.
    F16(Vec<f16>),
    /// A scale for each row.
    Int8(Quantised),
    /// A scale for each group of a row.
    Int4(Quantised),
}

impl Rows {
    /// No rows.
    fn none(dtype: EdgeDtype) -> Self {
        match dtype {
            EdgeDtype::F16 => Self::F16(Vec::new()),
            EdgeDtype::Int8 => Self::Int8(Quantised::default()),
            EdgeDtype::Int4 => Self::Int4(Quantised::default()),
        }
    }

    /// The form's name.
    fn form(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::F16(_) => "f16",
            Self::Int8(_) => "int8",
            Self::Int4(_) => "int4",
        }
    }

    /// Number of rows of `cols` columns, if they are whole.
    fn count(&self, cols: usize) -> Option<usize> {
        let whole = |values: usize, each: usize| (each > 0 && values.is_multiple_of(each)).then(|| values / each);
        let (rows, scales) = match self {
            Self::F32(values) => return whole(values.len(), cols),
            Self::F16(values) => return whole(values.len(), cols),
            Self::Int8(q) => (whole(q.codes.len(), cols)?, whole(q.scales.len(), 1)?),
            Self::Int4(q) => {
                (whole(q.codes.len(), quantise::int4_bytes(cols))?, whole(q.scales.len(), quantise::groups(cols))?)
            }
        };
        (rows == scales).then_some(rows)
    }

    /// Make room for so many rows more, exactly.
    fn reserve(&mut self, rows: usize, cols: usize) -> Option<()> {
        let values = rows.checked_mul(cols)?;
        match self {
            Self::F32(all) => all.try_reserve_exact(values).ok(),
            Self::F16(all) => all.try_reserve_exact(values).ok(),
            Self::Int8(q) => {
                q.codes.try_reserve_exact(values).ok()?;
                q.scales.try_reserve_exact(rows).ok()
            }
            Self::Int4(q) => {
                q.codes.try_reserve_exact(rows.checked_mul(quantise::int4_bytes(cols))?).ok()?;
                q.scales.try_reserve_exact(rows.checked_mul(quantise::groups(cols))?).ok()
            }
        }
    }

    /// All values as numbers.
    pub fn widen(self, cols: usize) -> Vec<f32> {
        match self {
            Self::F32(values) => values,
            Self::F16(values) => values.into_iter().map(f16::to_f32).collect(),
            Self::Int8(q) => quantise::from_int8(&q, cols),
            Self::Int4(q) => quantise::from_int4(&q, cols),
        }
    }
}

/// The token table, `[V, D]`.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenTable {
    rows: usize,
    cols: usize,
    values: Rows,
}

impl TokenTable {
    /// A table without rows, and room for `rows` of them.
    ///
    /// # Errors
    /// A sentence: there is not so much memory.
    pub fn with_room(dtype: EdgeDtype, rows: usize, cols: usize) -> Result<Self, String> {
        let mut values = Rows::none(dtype);
        match values.reserve(rows, cols) {
            Some(()) => Ok(Self { rows: 0, cols, values }),
            None => Err(format!(
                "a token table of {rows} x {cols} values in {dtype} does not fit into memory; use a smaller --edge-dtype"
            )),
        }
    }

    /// A matrix in f32.
    ///
    /// # Errors
    /// A sentence: it is no matrix.
    pub fn from_blob(blob: TensorBlob) -> Result<Self, String> {
        let values = Rows::F32(blob.data);
        match blob.shape[..] {
            [rows, cols] if values.count(cols) == Some(rows) => Ok(Self { rows, cols, values }),
            _ => Err(format!("a token table of shape {:?} is no matrix; the checkpoint is damaged", blob.shape)),
        }
    }

    /// Put rows below those that are there.
    ///
    /// # Errors
    /// A sentence; the table is as it was then.
    pub fn append(&mut self, more: Rows) -> Result<(), String> {
        let Some(count) = more.count(self.cols) else {
            return Err(format!("rows of the token table in {} have not {} columns", more.form(), self.cols));
        };
        match (&mut self.values, more) {
            (Rows::F32(all), Rows::F32(new)) => all.extend(new),
            (Rows::F16(all), Rows::F16(new)) => all.extend(new),
            (Rows::Int8(all), Rows::Int8(new)) | (Rows::Int4(all), Rows::Int4(new)) => {
                all.codes.extend(new.codes);
                all.scales.extend(new.scales);
            }
            (all, new) => {
                return Err(format!("the token table comes partly in {}, partly in {}", all.form(), new.form()));
            }
        }
        self.rows += count;
        Ok(())
    }

    /// Write a row as numbers. An id beyond the table (of a tokenizer that does not fit the model) reads as zeros.
    pub fn row_into(&self, id: usize, out: &mut [f32]) {
        if id >= self.rows {
            out.fill(0.0);
            return;
        }
        let row = |width: usize| id * width..(id + 1) * width;
        match &self.values {
            Rows::F32(all) => out.iter_mut().zip(&all[row(self.cols)]).for_each(|(o, v)| *o = *v),
            Rows::F16(all) => out.iter_mut().zip(&all[row(self.cols)]).for_each(|(o, v)| *o = v.to_f32()),
            Rows::Int8(q) => quantise::int8_row(&q.codes[row(self.cols)], q.scales[id], out),
            Rows::Int4(q) => {
                let codes = &q.codes[row(quantise::int4_bytes(self.cols))];
                quantise::int4_row(codes, &q.scales[row(quantise::groups(self.cols))], out);
            }
        }
    }

    /// Number of rows: how many ids there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The name of the form in which its rows are held.
    pub fn form(&self) -> &'static str {
        self.values.form()
    }

    /// Width of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes on the host.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Rows::F32(all) => size_of_val(all.as_slice()),
            Rows::F16(all) => size_of_val(all.as_slice()),
            Rows::Int8(q) | Rows::Int4(q) => q.codes.len() + size_of_val(q.scales.as_slice()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLS: usize = 37;

    fn values(rows: usize) -> Vec<f32> {
        (0..rows * COLS).map(|i| ((i * 7919) % 101) as f32 * 0.01 - 0.5).collect()
    }

    fn stored(dtype: EdgeDtype, values: &[f32]) -> Rows {
        match dtype {
            EdgeDtype::F16 => Rows::F16(quantise::to_f16("t", values).unwrap()),
            EdgeDtype::Int8 => Rows::Int8(quantise::int8("t", values, COLS).unwrap()),
            EdgeDtype::Int4 => Rows::Int4(quantise::int4("t", values, COLS).unwrap()),
        }
    }

    #[test]
    fn rows_come_back_in_every_form() {
        let all = values(6);
        for (dtype, limit, bytes) in [
            (EdgeDtype::F16, 3e-4, 6 * COLS * 2),
            (EdgeDtype::Int8, 0.003, 6 * (COLS + 2)),
            (EdgeDtype::Int4, 0.04, 6 * (32 + 4)),
        ] {
            let mut table = TokenTable::with_room(dtype, 6, COLS).unwrap();
            table.append(stored(dtype, &all[..2 * COLS])).unwrap();
            table.append(stored(dtype, &all[2 * COLS..])).unwrap();
            assert_eq!((table.rows(), table.cols(), table.bytes()), (6, COLS, bytes));
            let mut row = [9.0; COLS];
            for id in 0..6 {
                table.row_into(id, &mut row);
                let worst = row.iter().zip(&all[id * COLS..]).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(worst < limit, "{dtype}: {worst}");
            }
            table.row_into(6, &mut row);
            assert_eq!(row, [0.0; COLS]);
            assert_eq!(stored(dtype, &all).widen(COLS).len(), all.len());
        }
        let table = TokenTable::from_blob(TensorBlob { shape: vec![6, COLS], data: all.clone() }).unwrap();
        let mut row = [0.0; COLS];
        table.row_into(3, &mut row);
        assert_eq!(row, all[3 * COLS..4 * COLS]);
        assert_eq!(table.bytes(), 6 * COLS * 4);
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let mut table = TokenTable::with_room(EdgeDtype::Int8, 4, COLS).unwrap();
        table.append(stored(EdgeDtype::Int8, &values(2))).unwrap();
        let before = table.clone();
        assert!(table.append(stored(EdgeDtype::F16, &values(2))).unwrap_err().contains("partly"));
        assert!(table.append(Rows::F16(vec![f16::ZERO; COLS + 1])).unwrap_err().contains("columns"));
        let short = Quantised { codes: vec![0; COLS], scales: Vec::new() };
        assert!(table.append(Rows::Int8(short)).unwrap_err().contains("columns"));
        assert_eq!(table, before);
        assert!(TokenTable::with_room(EdgeDtype::F16, usize::MAX, 2).unwrap_err().contains("memory"));
        assert!(TokenTable::with_room(EdgeDtype::Int4, usize::MAX / 64, 64).unwrap_err().contains("memory"));
        assert!(TokenTable::from_blob(TensorBlob { shape: vec![2, 3], data: vec![0.0; 5] }).is_err());
    }
}
