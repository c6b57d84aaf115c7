//! Settings from a TOML file or from flags, over what is there already; every mistake is named.

use super::FederationSettings;
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::Table;

impl FederationSettings {
    /// Read a settings file; absent keys take the defaults.
    ///
    /// # Errors
    /// What is no TOML, or else all keys and values that cannot be used, one sentence each.
    pub fn from_toml(text: &str) -> Result<Self, Vec<String>> {
        let (settings, mut faults) = Self::default().with_toml(text);
        faults.extend(settings.validate().err().into_iter().flatten());
        if faults.is_empty() { Ok(settings) } else { Err(faults) }
    }

    /// These settings with a file's keys put over them, and what is wrong with the file. Values are not validated here:
    /// others may be put over them in turn, and some belong together.
    pub fn with_toml(&self, text: &str) -> (Self, Vec<String>) {
        match text.parse::<Table>() {
            Ok(table) => self.with(&table),
            Err(e) => (self.clone(), vec![format!("this is no valid TOML: {}", e.to_string().trim_end())]),
        }
    }

    /// The same with the fields of anything that can be serialised (absent options are left as they are), such as flags
    /// or a table of another file.
    pub fn with<T: Serialize>(&self, values: &T) -> (Self, Vec<String>) {
        put_over(self, values)
    }
}

/// Settings of any kind with the fields of something else put over them, and what is wrong with those: names that there are
/// not, values that cannot be used. The settings' absent fields must have defaults, and none of them may be an option.
pub fn put_over<T: Clone + Serialize + DeserializeOwned, V: Serialize>(own: &T, values: &V) -> (T, Vec<String>) {
    let (mut merged, values) = match (Table::try_from(own), Table::try_from(values)) {
        (Ok(own), Ok(values)) => (own, values),
        (Err(e), _) | (_, Err(e)) => return (own.clone(), vec![format!("the settings cannot be read: {e}")]),
    };
    let mut faults = Vec::new();
    for (key, value) in values {
        if !merged.contains_key(&key) {
            faults.push(unknown(&key, &merged));
            continue;
        }
        // Alone, so that its own fault is found whatever the others are.
        let alone: Table = [(key.clone(), value.clone())].into_iter().collect();
        match alone.try_into::<T>() {
            Ok(_) => drop(merged.insert(key, value)),
            Err(e) => faults.push(format!("{key}: {}", e.message())),
        }
    }
    match merged.try_into() {
        Ok(settings) => (settings, faults),
        Err(e) => {
            faults.push(e.message().to_owned());
            (own.clone(), faults)
        }
    }
}

fn unknown(key: &str, known: &Table) -> String {
    let nearest = known.keys().map(|k| (distance(key, k), k)).min();
    match nearest {
        Some((steps, name)) if steps <= 1 + key.chars().count() / 4 => {
            format!("there is no setting '{key}'; is '{name}' meant?")
        }
        _ => format!("there is no setting '{key}'"),
    }
}

/// Letters to insert, delete or replace to get from one word to the other (Levenshtein 1966).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut left = i + 1;
        let mut next = vec![left];
        for ((y, corner), above) in b.iter().zip(&row).zip(row.iter().skip(1)) {
            left = (corner + usize::from(x != *y)).min(above + 1).min(left + 1);
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::{AdapterChoice, Strategy};
    use super::*;

    #[test]
    fn a_file_changes_only_what_it_names() {
        let text = "rank = 4 # small\nadapters = \"image\"\nstrategy = \"trimmed-mean\"\nmomentum = 0\n";
        let read = FederationSettings::from_toml(text).unwrap();
        let expected = FederationSettings {
            rank: 4,
            adapters: AdapterChoice::Image,
            strategy: Strategy::TrimmedMean,
            momentum: 0.0,
            ..Default::default()
        };
        assert_eq!(read, expected);
        assert_eq!(FederationSettings::from_toml(""), Ok(FederationSettings::default()));
    }

    #[test]
    fn all_mistakes_are_named_at_once() {
        let text = "rnak = 4\nrounds = \"many\"\nstrategy = \"fedvag\"\nseed = -1\nlearning_rate = 7\ncolour = 1";
        let faults = FederationSettings::from_toml(text).unwrap_err();
        let has = |words: &[&str]| {
            assert!(faults.iter().any(|f| words.iter().all(|w| f.contains(w))), "{words:?} in {faults:#?}");
        };
        has(&["'rnak'", "'rank'"]);
        has(&["rounds", "many"]);
        has(&["strategy", "fedvag", "trimmed-mean"]);
        has(&["seed", "-1"]);
        has(&["learning_rate is 7"]);
        assert!(faults.contains(&"there is no setting 'colour'".to_owned()), "{faults:#?}");
        assert_eq!(faults.len(), 6, "{faults:#?}");
    }

    #[test]
    fn broken_toml_is_shown_with_its_line() {
        let faults = FederationSettings::from_toml("rank = 4\nrounds = = 3").unwrap_err();
        assert!(faults.len() == 1 && faults[0].contains("line 2"), "{faults:?}");
        let twice = FederationSettings::from_toml("rank = 4\nrank = 5").unwrap_err();
        assert!(twice.len() == 1 && twice[0].contains("duplicate"), "{twice:?}");
    }

    #[test]
    fn later_values_go_over_earlier_ones() {
        #[derive(Serialize)]
        struct Flags {
            rank: Option<usize>,
            rounds: Option<u32>,
        }
        // Too few participants in the file alone; what counts is the end.
        let (read, faults) = FederationSettings::default().with_toml("min_updates = 3\nrank = 2");
        assert!(faults.is_empty() && read.validate().is_err());
        let (read, faults) = read.with(&Flags { rank: Some(16), rounds: None });
        assert!(faults.is_empty(), "{faults:?}");
        assert_eq!((read.rank, read.rounds, read.min_updates), (16, FederationSettings::default().rounds, 3));
    }

    #[test]
    fn distances_by_hand() {
        assert_eq!([distance("rank", "rank"), distance("rnak", "rank"), distance("", "abc")], [0, 2, 3]);
        assert_eq!([distance("batch-size", "batch_size"), distance("kitten", "sitting")], [1, 3]);
    }
}
