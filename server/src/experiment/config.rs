//! What is simulated, in one file of two tables: `[simulation]`, read here, and `[federation]`, the settings that participants
//! agree on. `server/simulation.toml` shows every key. Flags go over the file; all mistakes are named at once, with their place.

use crate::device::{ComputeDtype, DeviceChoice};
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::settings::{FederationSettings, Strategy, put_over};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use toml::{Table, Value};

/// A family of questions and pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// The data set that `data` names.
    Data,
    /// Scenes generated in the demo themes: other wordings, other colours, other questions than in pretraining.
    Scenes,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::Scenes => "scenes",
        })
    }
}

/// Who takes part with which samples, and where it is computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Simulation {
    /// Model directory, or a model of the hub.
    pub model: String,
    /// Folder with `train/` and `test/`, or ScienceQA or IconQA as published; needed for the task `data`.
    pub data: PathBuf,
    /// Where everything is computed.
    pub device: DeviceChoice,
    /// Type of the frozen LLM.
    pub dtype: ComputeDtype,
    /// Form of the clients' half of the model.
    pub edge_dtype: EdgeDtype,
    /// Clients.
    pub clients: usize,
    /// Dirichlet concentration of the split by answer; smaller is more uneven.
    pub alpha: f64,
    /// Training samples in all, drawn before the split, the same number of each task (0: all).
    pub samples: usize,
    /// Training samples of a client at most (0: all).
    pub limit: usize,
    /// Test samples used after each round, the same number of each task (0: all of `test_limit`).
    pub evaluation_limit: usize,
    /// Test samples used at all, before the first and after the last round (0: all).
    pub test_limit: usize,
    /// Runs, each with its seed; none: one run with the federation's seed.
    pub seeds: Vec<u64>,
    /// Families of samples; where there are several, each has its share of the clients.
    pub tasks: Vec<Task>,
    /// Share of the clients that have no pictures.
    pub text_only: f64,
    /// Share of the clients whose questions are lost.
    pub picture_only: f64,
    /// Beside each run, one in which a single client holds all clients' samples.
    pub centralised: bool,
}

impl Default for Simulation {
    fn default() -> Self {
        Self {
            model: String::new(),
            data: PathBuf::new(),
            device: DeviceChoice::Cpu,
            dtype: ComputeDtype::Auto,
            edge_dtype: EdgeDtype::F16,
            clients: 5,
            alpha: 1.0,
            samples: 0,
            limit: 500,
            evaluation_limit: 2000,
            test_limit: 0,
            seeds: Vec::new(),
            tasks: vec![Task::Data],
            text_only: 0.0,
            picture_only: 0.0,
            centralised: false,
        }
    }
}

/// More clients are a mistake: each holds a session and a copy of the adapters.
const MOST_CLIENTS: usize = 10_000;

impl Simulation {
    /// All faults, one sentence each, that begins with the key.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut need = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault);
            }
        };
        need(!self.model.is_empty(), "model is missing; name a model directory, or a fetched model of the hub".into());
        let has_data = !self.tasks.contains(&Task::Data) || !self.data.as_os_str().is_empty();
        need(has_data, "data is missing; name a folder with train/ and test/, or choose the task \"scenes\"".into());
        let clients = self.clients;
        let fits = (1..=MOST_CLIENTS).contains(&clients);
        need(fits, format!("clients is {clients}, it must be 1 to {MOST_CLIENTS}"));
        need(
            self.alpha > 0.0 && self.alpha.is_finite(),
            format!("alpha is {}, it must be above 0: 0.1 is strong skew, 100 almost none", self.alpha),
        );
        let tasks = self.tasks.len();
        need(tasks > 0, "tasks is empty; name \"data\" or \"scenes\" or both".into());
        need(!repeats(&self.tasks), "tasks names one twice".into());
        need(tasks <= clients.max(1), format!("tasks are {tasks}, more than the {clients} clients"));
        need(!repeats(&self.seeds), "seeds names one twice; a second run with it would give the same".into());
        let largest = i64::MAX.unsigned_abs();
        let fits = self.seeds.iter().all(|seed| *seed <= largest);
        need(fits, format!("seeds must be at most {largest}"));
        for (name, share) in [("text_only", self.text_only), ("picture_only", self.picture_only)] {
            need((0.0..=1.0).contains(&share), format!("{name} is {share}, it must be 0 to 1"));
        }
        let both = self.text_only + self.picture_only;
        need(
            both.is_nan() || both <= 1.0,
            format!("text_only and picture_only are {both} together, at most 1 is there"),
        );
        faults
    }
}

fn repeats<T: PartialEq>(values: &[T]) -> bool {
    values.iter().enumerate().any(|(i, value)| values.iter().take(i).any(|earlier| earlier == value))
}

/// Both tables.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `[simulation]`
    pub simulation: Simulation,
    /// `[federation]`. The number of participants and the seed of a run come from the simulation.
    pub federation: FederationSettings,
}

impl Default for Config {
    fn default() -> Self {
        // A deadline would make the result depend on the machine.
        let federation = FederationSettings { round_deadline_s: 86_400, ..Default::default() };
        Self { simulation: Simulation::default(), federation }
    }
}

/// Name of the table of [`Simulation`].
pub const SIMULATION: &str = "simulation";
/// Name of the table of [`FederationSettings`].
pub const FEDERATION: &str = "federation";

impl Config {
    /// A file's tables over what is there; what is wrong with the file. Values are checked by [`Self::faults`], once flags are
    /// over them too.
    pub fn put_file(&mut self, name: &str, text: &str, places: &mut Places) -> Vec<String> {
        let tables = match text.parse::<Table>() {
            Ok(tables) => tables,
            Err(e) => return vec![format!("{name} is no valid TOML: {}", e.to_string().trim_end())],
        };
        let mut faults = Vec::new();
        for (section, values) in tables {
            let Value::Table(values) = values else {
                faults.push(format!(
                    "{name}: '{section}' stands outside of [{SIMULATION}] and [{FEDERATION}]; move it into one"
                ));
                continue;
            };
            places.read(name, text, &section, values.keys());
            let found = if section == SIMULATION {
                let (simulation, found) = put_over(&self.simulation, &values);
                self.simulation = simulation;
                found
            } else if section == FEDERATION {
                let (federation, found) = self.federation.with(&values);
                self.federation = federation;
                found
            } else {
                faults.push(format!(
                    "{name}: there is no table [{section}]; there are [{SIMULATION}] and [{FEDERATION}]"
                ));
                continue;
            };
            faults.extend(found.iter().map(|fault| places.say(&section, fault)));
        }
        faults
    }

    /// Everything that is wrong with the values.
    pub fn faults(&self, places: &Places) -> Vec<String> {
        let in_simulation = self.simulation.faults();
        let settings = self.settings(self.federation.seed, self.federation.strategy);
        let mut in_federation = settings.validate().err().unwrap_or_default();
        if self.federation.over_selection != 0.0 {
            in_federation.push(format!(
                "over_selection is {}, a simulation needs 0: who is done first would depend on the machine",
                self.federation.over_selection
            ));
        }
        let said = |section, faults: Vec<String>| faults.into_iter().map(move |fault| places.say(section, &fault));
        said(SIMULATION, in_simulation).chain(said(FEDERATION, in_federation)).collect()
    }

    /// What the participants of one run agree on.
    pub fn settings(&self, seed: u64, strategy: Strategy) -> FederationSettings {
        let federation = FederationSettings { seed, strategy, ..self.federation.clone() };
        match strategy {
            Strategy::Centralised => {
                FederationSettings { min_participants: 1, min_updates: 1, fraction: 1.0, ..federation }
            }
            _ => FederationSettings { min_participants: self.simulation.clients, ..federation },
        }
    }

    /// The runs that are asked for: names and settings.
    pub fn runs(&self) -> Vec<(String, FederationSettings)> {
        let own = [self.federation.seed];
        let seeds = if self.simulation.seeds.is_empty() { &own[..] } else { &self.simulation.seeds };
        let strategy = self.federation.strategy;
        let mut runs = Vec::new();
        for seed in seeds {
            runs.push((format!("seed-{seed}"), self.settings(*seed, strategy)));
            if self.simulation.centralised && strategy != Strategy::Centralised {
                runs.push((format!("seed-{seed}-centralised"), self.settings(*seed, Strategy::Centralised)));
            }
        }
        runs
    }
}

/// Where each value comes from, for people who look for a mistake.
#[derive(Debug, Default)]
pub struct Places {
    file: String,
    of: BTreeMap<String, Place>,
}

#[derive(Debug)]
enum Place {
    Line(usize),
    Flag,
}

impl Places {
    fn read<'a>(&mut self, name: &str, text: &str, section: &str, keys: impl Iterator<Item = &'a String>) {
        self.file = name.to_owned();
        for key in keys {
            if let Some(line) = line_of(text, section, key) {
                self.of.insert(format!("{section}.{key}"), Place::Line(line));
            }
        }
    }

    /// These flags, named as the keys, have gone over the file's values.
    pub fn flags(&mut self, section: &str, flags: &impl Serialize) {
        let given = Table::try_from(flags).unwrap_or_default(); // flags that are not given are absent
        self.of.extend(given.into_iter().map(|(key, _)| (format!("{section}.{key}"), Place::Flag)));
    }

    /// A flag gives this key its value.
    pub fn by_flag(&self, section: &str, key: &str) -> bool {
        matches!(self.of.get(&format!("{section}.{key}")), Some(Place::Flag))
    }

    /// A fault that begins with its key, or says that there is no such, with its place.
    pub fn say(&self, section: &str, fault: &str) -> String {
        let key = match fault.strip_prefix("there is no setting '") {
            Some(rest) => rest.split('\'').next(),
            None => fault.split([':', ' ']).next(),
        };
        let key = key.unwrap_or_default();
        match self.of.get(&format!("{section}.{key}")) {
            Some(Place::Line(line)) => format!("{}, line {line}, [{section}]: {fault}", self.file),
            Some(Place::Flag) => format!("--{}: {fault}", key.replace('_', "-")),
            None => format!("[{section}]: {fault}"),
        }
    }
}

/// The line, from 1, that gives a key of a table its value.
fn line_of(text: &str, section: &str, key: &str) -> Option<usize> {
    let mut current = "";
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[') {
            current = header.split(']').next().unwrap_or_default().trim();
        } else if let Some((name, _)) = line.split_once('=')
            && current == section
            && name.trim().trim_matches(['"', '\'']) == key
        {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../simulation.toml");
    const SCIENCEQA: &str = include_str!("../../../docs/scienceqa.toml");
    const ICONQA: &str = include_str!("../../../docs/iconqa.toml");

    fn read(text: &str) -> (Config, Vec<String>) {
        let (mut config, mut places) = (Config::default(), Places::default());
        let mut faults = config.put_file("mine.toml", text, &mut places);
        faults.extend(config.faults(&places));
        (config, faults)
    }

    #[test]
    fn the_example_names_every_key_with_its_default() {
        let (config, faults) = read(EXAMPLE);
        assert!(faults.is_empty(), "{faults:#?}");
        let named =
            Simulation { model: "server/models/nano-llava".into(), data: "data/easy-vqa".into(), ..Default::default() };
        assert_eq!(config, Config { simulation: named, ..Default::default() });
        let keys = serde_json::to_value(Simulation::default()).unwrap();
        for key in keys.as_object().unwrap().keys() {
            assert!(line_of(EXAMPLE, SIMULATION, key).is_some(), "server/simulation.toml does not name '{key}'");
        }
    }

    #[test]
    fn the_documented_settings_can_be_read() {
        for text in [SCIENCEQA, ICONQA] {
            let (config, faults) = read(text);
            assert!(faults.is_empty(), "{faults:#?}");
            assert_eq!((config.federation.rank, config.simulation.seeds), (64, vec![1, 2, 3]));
        }
    }

    #[test]
    fn all_mistakes_are_named_at_once_with_their_lines() {
        let text = "stray = 1\n[simulation]\nclinets = 3\nalpha = 0\ntasks = [\"dat\"]\n\n[federation]\nrank = \"four\"\n\
                    learning_rate = 7\nover_selection = 0.5\n[other]\n";
        let (_, faults) = read(text);
        let has = |words: &[&str]| {
            assert!(faults.iter().any(|f| words.iter().all(|w| f.contains(w))), "{words:?} in {faults:#?}");
        };
        has(&["'stray'"]);
        has(&["mine.toml, line 3, [simulation]", "'clinets'", "'clients'"]);
        has(&["mine.toml, line 4, [simulation]", "alpha is 0"]);
        has(&["mine.toml, line 5, [simulation]", "tasks", "dat"]);
        has(&["mine.toml, line 8, [federation]", "rank", "four"]);
        has(&["mine.toml, line 9, [federation]", "learning_rate is 7"]);
        has(&["line 10", "over_selection"]);
        has(&["[other]"]);
        has(&["[simulation]: model is missing"]);
        has(&["[simulation]: data is missing"]);
        assert_eq!(faults.len(), 10, "{faults:#?}");
        assert!(read("[simulation]\nalpha = = 1").1[0].contains("line 2"));
    }

    #[test]
    fn a_flag_s_mistake_is_the_flag_s() {
        #[derive(Serialize)]
        struct Flags {
            alpha: Option<f64>,
            limit: Option<usize>,
        }
        let (mut config, mut places) = (Config::default(), Places::default());
        assert!(
            config
                .put_file("mine.toml", "[simulation]\nmodel = \"m\"\ndata = \"d\"\nalpha = 2", &mut places)
                .is_empty()
        );
        let flags = Flags { alpha: Some(-1.0), limit: None };
        let (simulation, faults) = put_over(&config.simulation, &flags);
        places.flags(SIMULATION, &flags);
        assert!(faults.is_empty());
        config.simulation = simulation;
        assert_eq!(
            config.faults(&places),
            ["--alpha: alpha is -1, it must be above 0: 0.1 is strong skew, 100 almost none"]
        );
    }

    #[test]
    fn runs_are_of_all_seeds_and_with_one_client_where_asked_for() {
        let mut config = Config::default();
        config.federation.seed = 9;
        assert_eq!(config.runs().iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["seed-9"]);
        config.simulation = Simulation { seeds: vec![1, 2], centralised: true, ..Default::default() };
        let runs = config.runs();
        assert_eq!(runs.len(), 4);
        let participants: Vec<_> = runs.iter().map(|(_, s)| (s.seed, s.min_participants)).collect();
        assert_eq!(participants, [(1, 5), (1, 1), (2, 5), (2, 1)]);
    }
}
