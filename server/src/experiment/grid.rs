//! Which runs the study consists of: groups in which one factor varies around a common base.

use super::config::{Simulation, Task};
use super::merges::Rule;
use fednano_shared::settings::{AdapterChoice, BoundaryChoice, FederationSettings, Overlap, Strategy};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

/// A group of runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[value(rename_all = "verbatim")]
pub enum Group {
    /// Strategies and skew.
    A,
    /// Clients.
    B,
    /// Rank.
    C,
    /// Adapters.
    D,
    /// Local epochs.
    E,
    /// Several tasks.
    F,
    /// Missing modalities.
    G,
    /// Merge rules on the same updates.
    H,
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 8] = [Self::A, Self::B, Self::C, Self::D, Self::E, Self::F, Self::G, Self::H];

    /// What varies.
    pub fn title(self) -> &'static str {
        match self {
            Self::A => "Strategies and skew",
            Self::B => "Clients",
            Self::C => "Rank of the adapters",
            Self::D => "Which adapters are trained",
            Self::E => "Local epochs",
            Self::F => "Two tasks in one federation",
            Self::G => "Clients without pictures or questions",
            Self::H => "Merge rules on the same updates",
        }
    }

    /// In a sentence.
    pub fn about(self) -> &'static str {
        match self {
            Self::A => "Columns: alpha of the Dirichlet split by answer; smaller is more uneven.",
            Self::B => "Columns: clients. The samples in all are the same, so more clients hold fewer each.",
            Self::C => "Columns: rank.",
            Self::D => "Columns: the adapter at image positions, the one at all other positions, both.",
            Self::E => "Columns: passes over the own samples in each round.",
            Self::F => {
                "One part of the clients holds easy-VQA, the other generated scenes in the demo's themes (other wordings, colours and \
                 questions). Columns: the test questions of both tasks together, and of each."
            }
            Self::G => {
                "Columns: share of the clients that have no pictures, and share whose questions are lost. The test questions are whole."
            }
            Self::H => {
                "Each round's uploaded updates of one run are merged by every rule, starting from the same adapters, and each \
                 result is judged on the same questions. Figures: accuracy less FedAvg's, in points, mean over the rounds of a run; \
                 mean and 95 % t interval over runs. `path` is the merge with which the run itself went on."
            }
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// How much is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// The study: hours.
    Full,
    /// Every part of it, as small as can be, on generated scenes alone: under a minute. Its figures say nothing.
    Quick,
}

/// One run but for its seed.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Who holds what.
    pub simulation: Simulation,
    /// What is agreed.
    pub settings: FederationSettings,
    /// Rules by which the updates are merged beside.
    pub rules: Vec<Rule>,
}

/// A plan's place in a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    /// Which table.
    pub group: Group,
    /// Its row: mostly the variant's name.
    pub row: String,
    /// Its column.
    pub column: String,
    /// What is run.
    pub plan: Plan,
    /// With one seed only.
    pub once: bool,
}

/// A strategy with a name of its own.
#[derive(Debug, Clone)]
pub struct Variant {
    /// As shown in tables.
    pub name: String,
    /// Its strategy.
    pub strategy: Strategy,
    change: fn(&mut FederationSettings),
}

impl Variant {
    /// These settings with the variant's own.
    pub fn of(&self, base: &FederationSettings) -> FederationSettings {
        let mut settings = FederationSettings { strategy: self.strategy, ..base.clone() };
        (self.change)(&mut settings);
        settings
    }
}

/// FedNano's merge by the formula as printed: nothing limits it.
pub const PRINTED: &str = "fisher as printed";
/// Only the pattern of Fisher values within a client counts.
pub const NORMALISED: &str = "fisher normalised";
/// The root of the Fisher values.
pub const ROOT: &str = "fisher power 0.5";
/// One weight for a hidden unit.
pub const UNIT: &str = "fisher unit";

fn fisher(name: &str, change: fn(&mut FederationSettings)) -> Variant {
    Variant { name: name.to_owned(), strategy: Strategy::Fisher, change }
}

/// Every strategy, and what is varied of Fisher merging.
pub fn variants() -> Vec<Variant> {
    let plain = Strategy::ALL.map(|strategy| Variant { name: strategy.to_string(), strategy, change: |_| {} });
    let mut all: Vec<Variant> = plain.into();
    all.push(fisher(PRINTED, |s| {
        (s.fisher_floor, s.fisher_cap, s.max_weight, s.max_delta_norm, s.max_share) = (0.0, 0.0, 0.0, 0.0, 1.0);
    }));
    all.push(fisher(NORMALISED, |s| s.fisher_normalise = true));
    all.push(fisher(ROOT, |s| s.fisher_power = 0.5));
    all.push(fisher(UNIT, |s| s.fisher_unit = true));
    all
}

fn named(names: &[&str]) -> Vec<Variant> {
    variants().into_iter().filter(|v| names.contains(&v.name.as_str())).collect()
}

/// The common base: who holds what, what is agreed.
pub fn base(size: Size) -> (Simulation, FederationSettings) {
    let full = FederationSettings {
        rank: 16,
        rounds: 5,
        local_epochs: 1,
        batch_size: 4,
        fisher_samples: 40,
        local_test: 0.2,
        round_deadline_s: 86_400,
        // As in the paper, and the plain boundary, whatever the defaults are: runs stay comparable.
        fisher_normalise: false,
        boundary: BoundaryChoice::Activations,
        compress: false,
        overlap: Overlap::Off,
        ..FederationSettings::exact()
    };
    let study = Simulation {
        clients: 5,
        samples: 300,
        limit: 0,
        evaluation_limit: 200,
        test_limit: 1000,
        ..Default::default()
    };
    match size {
        Size::Full => (study, full),
        Size::Quick => (
            Simulation {
                clients: 3,
                samples: 24,
                evaluation_limit: 16,
                test_limit: 32,
                tasks: vec![Task::Scenes],
                ..study
            },
            FederationSettings { rank: 4, rounds: 2, fisher_samples: 4, ..full },
        ),
    }
}

/// What is compared where a factor varies that is not the strategy.
const COMPARED: [&str; 3] = ["fedavg", "fisher", NORMALISED];

/// Alpha, of which one is the base's.
pub fn alphas(size: Size) -> &'static [f64] {
    match size {
        Size::Full => &[0.1, 1.0, 5.0],
        Size::Quick => &[0.1, 1.0],
    }
}

struct Builder {
    simulation: Simulation,
    settings: FederationSettings,
    cells: Vec<Cell>,
}

impl Builder {
    fn add(
        &mut self,
        group: Group,
        variant: &Variant,
        column: impl fmt::Display,
        change: impl FnOnce(&mut Simulation, &mut FederationSettings),
    ) -> &mut Cell {
        let (mut simulation, mut settings) = (self.simulation.clone(), variant.of(&self.settings));
        change(&mut simulation, &mut settings);
        settings.min_participants = if settings.strategy == Strategy::Centralised { 1 } else { simulation.clients };
        let plan = Plan { simulation, settings, rules: Vec::new() };
        let (row, column) = (variant.name.clone(), column.to_string());
        let at = self.cells.len();
        self.cells.push(Cell { group, row, column, plan, once: false });
        &mut self.cells[at]
    }
}

/// All cells of the study.
pub fn cells(size: Size) -> Vec<Cell> {
    let (simulation, settings) = base(size);
    let mut b = Builder { simulation, settings, cells: Vec::new() };
    let quick = size == Size::Quick;
    let compared = if quick { named(&["fedavg", "fisher"]) } else { named(&COMPARED) };
    let strategies = if quick { named(&["local", "centralised", "fedavg", "feddpa-f", "fisher"]) } else { variants() };

    for variant in &strategies {
        for &alpha in alphas(size) {
            b.add(Group::A, variant, alpha, |s, _| s.alpha = alpha);
        }
    }
    // What centralises does not depend on how many there are.
    let plain = strategies.iter().filter(|v| v.name == v.strategy.name() && v.strategy != Strategy::Centralised);
    for variant in plain.filter(|v| !quick || compared.iter().any(|c| c.name == v.name)) {
        let (few, more) = if quick { (3, 6) } else { (5, 10) };
        for clients in [few, more] {
            b.add(Group::B, variant, clients, |s, _| s.clients = clients);
        }
        if !quick && ["fedavg", "fisher"].contains(&variant.name.as_str()) {
            b.add(Group::B, variant, 100, |s, _| s.clients = 100).once = true;
        }
    }
    for variant in &compared {
        for &rank in if quick { &[2, 4][..] } else { &[4, 16, 64] } {
            b.add(Group::C, variant, rank, |_, f| f.rank = rank);
        }
        for adapters in if quick { &[AdapterChoice::Image, AdapterChoice::Both][..] } else { &AdapterChoice::ALL } {
            b.add(Group::D, variant, adapters, |_, f| f.adapters = *adapters);
        }
        for epochs in if quick { [1, 2] } else { [1, 3] } {
            b.add(Group::E, variant, epochs, |_, f| f.local_epochs = epochs);
        }
        for &(text_only, picture_only) in if quick { &[(0.34, 0.0)][..] } else { &[(0.0, 0.0), (0.4, 0.0), (0.2, 0.2)] }
        {
            let column = format!("{text_only} and {picture_only}");
            b.add(Group::G, variant, column, |s, _| (s.text_only, s.picture_only) = (text_only, picture_only));
        }
    }
    if !quick {
        for variant in named(&["local", "centralised", "fedavg", "feddpa-f", "fisher", NORMALISED]) {
            let two = |s: &mut Simulation, _: &mut FederationSettings| {
                (s.tasks, s.clients) = (vec![Task::Data, Task::Scenes], 6);
            };
            b.add(Group::F, &variant, "together", two);
        }
    }
    same_updates(&mut b, size);
    b.cells
}

/// Group H. The run goes on with FedAvg's merge, which is Fisher's to the power of 0, or with Fisher's own; the clients measure
/// Fisher either way.
fn same_updates(b: &mut Builder, size: Size) {
    let quick = size == Size::Quick;
    let mut paths = Vec::new();
    for &alpha in alphas(size) {
        if !quick || alpha == b.simulation.alpha {
            paths.push((Strategy::Fisher, "fedavg", alpha));
        }
    }
    if !quick {
        let alpha = b.simulation.alpha;
        paths.extend([
            (Strategy::Fisher, "fisher", alpha),
            (Strategy::FisherEf, "fedavg", alpha),
            (Strategy::FisherAdam, "fedavg", alpha),
        ]);
    }
    let names: BTreeSet<&str> = [PRINTED, NORMALISED, ROOT, UNIT].into();
    for (measured, path, alpha) in paths {
        let row = Variant { name: format!("{measured}, path {path}"), strategy: measured, change: |_| {} };
        // Where training's gradients measure Fisher, only what weighs by it is of interest.
        let rules: Vec<Variant> = variants()
            .into_iter()
            .filter(|v| match measured {
                Strategy::Fisher => {
                    let plain = [Strategy::FedAvg, Strategy::FedAdam, Strategy::Median, Strategy::TrimmedMean];
                    plain.contains(&v.strategy) || v.strategy == Strategy::Fisher
                }
                _ => {
                    v.strategy == Strategy::FedAvg
                        || (v.strategy == Strategy::Fisher && v.name != UNIT && v.name != ROOT)
                }
            })
            .filter(|v| !quick || !names.contains(v.name.as_str()) || v.name == NORMALISED)
            .collect();
        let cell = b.add(Group::H, &row, alpha, |s, f| {
            s.alpha = alpha;
            if path == "fedavg" {
                f.fisher_power = 0.0;
            }
            if !quick {
                s.evaluation_limit = 300;
            }
        });
        let settings = FederationSettings { fisher_power: 1.0, ..cell.plan.settings.clone() };
        cell.plan.rules = rules.iter().map(|v| Rule { name: v.name.clone(), settings: v.of(&settings) }).collect();
    }
}

/// Tasks that plans need.
pub fn tasks<'a>(cells: impl Iterator<Item = &'a Cell>) -> BTreeSet<Task> {
    cells.flat_map(|cell| cell.plan.simulation.tasks.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(size: Size, group: Group) -> Vec<Cell> {
        cells(size).into_iter().filter(|cell| cell.group == group).collect()
    }

    #[test]
    fn every_strategy_at_every_alpha() {
        let cells = of(Size::Full, Group::A);
        for strategy in Strategy::ALL {
            assert_eq!(cells.iter().filter(|c| c.row == strategy.name()).count(), 3, "{strategy}");
        }
        assert_eq!(cells.len(), variants().len() * 3);
        let printed = &cells.iter().find(|c| c.row == PRINTED).unwrap().plan.settings;
        assert_eq!((printed.fisher_floor, printed.fisher_cap, printed.max_share), (0.0, 0.0, 1.0));
    }

    #[test]
    fn all_settings_are_sound_and_all_groups_there() {
        for size in [Size::Full, Size::Quick] {
            let cells = cells(size);
            for cell in &cells {
                let plan = &cell.plan;
                plan.settings.validate().unwrap();
                let simulation = Simulation { model: "m".into(), data: "d".into(), ..plan.simulation.clone() };
                assert_eq!(simulation.faults(), [""; 0], "{cell:?}");
                plan.rules.iter().for_each(|rule| rule.settings.validate().unwrap());
            }
            let missing = Group::ALL.into_iter().filter(|group| cells.iter().all(|cell| cell.group != *group));
            let missing: Vec<Group> = missing.collect();
            // Quick runs need no data, and so have one task only.
            assert_eq!(missing, if size == Size::Quick { vec![Group::F] } else { vec![] });
        }
        assert_eq!(tasks(cells(Size::Quick).iter()), [Task::Scenes].into());
        assert_eq!(tasks(cells(Size::Full).iter()), [Task::Data, Task::Scenes].into());
    }

    #[test]
    fn groups_meet_in_the_base() {
        let (simulation, settings) = base(Size::Full);
        let fedavg = |group, column: &str| {
            let cell = of(Size::Full, group).into_iter().find(|c| c.row == "fedavg" && c.column == column);
            cell.unwrap_or_else(|| panic!("{group} {column}")).plan
        };
        let settings = FederationSettings { strategy: Strategy::FedAvg, min_participants: 5, ..settings };
        let expected = Plan { simulation, settings, rules: Vec::new() };
        for (group, column) in [
            (Group::A, "1"),
            (Group::B, "5"),
            (Group::C, "16"),
            (Group::D, "both"),
            (Group::E, "1"),
            (Group::G, "0 and 0"),
        ] {
            assert_eq!(fedavg(group, column), expected, "{group}");
        }
    }

    #[test]
    fn updates_are_merged_by_fedavg_and_by_fisher_whatever_the_path() {
        let cells = of(Size::Full, Group::H);
        assert_eq!(cells.len(), 6);
        for cell in cells {
            let names: Vec<&str> = cell.plan.rules.iter().map(|rule| rule.name.as_str()).collect();
            assert!(names.contains(&"fedavg") && names.contains(&"fisher") && names.contains(&PRINTED), "{names:?}");
            assert!(cell.plan.rules.iter().all(|rule| rule.name == ROOT || rule.settings.fisher_power == 1.0));
        }
    }
}
