//! The wire benchmark: what each mode and number format of the boundary costs in bytes, accuracy and time (`just bench-wire`).
//!
//! | module | what |
//! | --- | --- |
//! | `accuracy` | whole federations on easy-VQA: accuracy and bytes of every mode and format |
//! | `shapes` | the real protocol at a large model's shape: bytes |
//! | `scaling` | from the measured number of samples to another, by rules; what others would send |
//! | `links` | seconds a step over slow lines |
//! | `link` | such a line: a proxy with a delay and a rate |
//! | `codec` | sizes of real tensors in each format, and what packing them takes |
//! | `setup` | the machine and the model of what depends on them |
//! | `kept` | finished runs on disk |
//! | `checks` | what must hold of all that was measured |
//! | `report` | all of it as one page |

mod accuracy;
mod checks;
mod codec;
mod kept;
pub mod link;
mod links;
mod report;
mod scaling;
mod setup;
mod shapes;

use crate::device::{ComputeDtype, DeviceChoice};
use crate::experiment::grid::Size;
use anyhow::{Context, ensure};
use fednano_shared::ledger::{Kind, Traffic};
use fednano_shared::settings::{BoundaryChoice, FederationSettings, Format, Overlap, Rounding};
use kept::Kept;
use serde::Serialize;
use std::path::{Path, PathBuf};
use tokio::runtime::Runtime;

/// A part of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Accuracy and bytes on a real task, with nano-llava.
    Accuracy,
    /// Bytes at LLaVA-1.5-7B's shape.
    Shapes,
    /// Seconds over slow lines; sizes and times of packing.
    Links,
}

/// What is to be done.
#[derive(Debug, Clone)]
pub struct Bench {
    /// Model directory of nano-llava.
    pub model: PathBuf,
    /// easy-VQA; none: generated scenes.
    pub data: Option<PathBuf>,
    /// All of it, or each part as small as can be.
    pub size: Size,
    /// These parts alone; none: all. The page shows what is kept of the others.
    pub parts: Vec<Part>,
    /// Seeds of the accuracy part.
    pub seeds: Vec<u64>,
    /// Samples of the participant that is measured at the large shape.
    pub samples: u64,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Type of the LLM.
    pub dtype: ComputeDtype,
    /// Folder of the page and of the finished runs.
    pub out: PathBuf,
}

/// The variant that all number formats' defaults make.
const DEFAULT: &str = "low-rank int8";
/// The one of which the matrices are finer.
const MIXED: &str = "low-rank mixed";
/// Features that servers here keep, bytes: more than all that is sent to them.
const PLENTY: usize = 4 << 30;

impl Bench {
    /// Run what is missing (of a quick benchmark all), write the page, and check what was measured. `cache` is a folder for this
    /// process alone.
    ///
    /// # Errors
    /// A model or a data set that cannot be used, a run that fails, a disk that cannot be written; then measurements that contradict
    /// each other.
    pub fn run(&self, cache: &Path) -> anyhow::Result<()> {
        let runs = self.out.join(self.runs_name());
        if self.quick() {
            kept::remove(&runs)?; // what is kept would test nothing
        }
        let mut kept = Kept::open(&runs)?;
        // The federations' tasks block a thread when they write.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build()?;
        let mut work = Work { bench: self, kept: &mut kept, runtime: &runtime, cache };
        if self.wants(Part::Shapes) {
            shapes::measure(&mut work)?;
        }
        if self.wants(Part::Links) {
            codec::measure(&mut work)?;
            links::measure(&mut work)?;
        }
        if self.wants(Part::Accuracy) {
            accuracy::measure(&mut work)?;
        }
        let path = self.out.join(self.page_name());
        std::fs::write(&path, report::page(self, &kept)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("results are in {}", path.display());
        let faults = checks::faults(self, &kept)?;
        ensure!(faults.is_empty(), "what was measured contradicts itself:\n{}", faults.join("\n"));
        Ok(())
    }

    /// Name of the file of finished runs. Quick ones have their own: they are removed each time.
    fn runs_name(&self) -> &'static str {
        if self.quick() { "wire-quick.jsonl" } else { "wire.jsonl" }
    }

    /// Name of the page.
    fn page_name(&self) -> &'static str {
        if self.quick() { "wire-quick.md" } else { "wire.md" }
    }

    fn wants(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    fn quick(&self) -> bool {
        self.size == Size::Quick
    }
}

/// What all parts work with.
struct Work<'a> {
    bench: &'a Bench,
    kept: &'a mut Kept,
    runtime: &'a Runtime,
    cache: &'a Path,
}

/// A mode of the boundary with its number formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Variant {
    name: &'static str,
    mode: BoundaryChoice,
    features: Format,
    codes: Format,
    gradients: Format,
    matrices: Format,
    rounding: Rounding,
    compress: bool,
    overlap: Overlap,
}

impl Variant {
    /// Mode `activations`, both directions in one format. Features and matrices are not sent, and so are exact.
    const fn activations(name: &'static str, format: Format) -> Self {
        let (mode, exact) = (BoundaryChoice::Activations, Format::F32);
        Self { mode, features: exact, matrices: exact, ..Self::low_rank(name, format) }
    }

    /// Mode `low-rank`, everything in one format.
    const fn low_rank(name: &'static str, format: Format) -> Self {
        Self {
            name,
            mode: BoundaryChoice::LowRank,
            features: format,
            codes: format,
            gradients: format,
            matrices: format,
            rounding: Rounding::Nearest,
            compress: false,
            overlap: Overlap::Off,
        }
    }

    /// Mode `low-rank` in int8, matrices in f16.
    const fn mixed(name: &'static str) -> Self {
        Self { matrices: Format::F16, ..Self::low_rank(name, Format::Int8) }
    }

    /// These settings with the variant's own.
    fn of(&self, base: &FederationSettings) -> FederationSettings {
        FederationSettings {
            boundary: self.mode,
            feature_format: self.features,
            code_format: self.codes,
            gradient_format: self.gradients,
            matrix_format: self.matrices,
            rounding: self.rounding,
            compress: self.compress,
            overlap: self.overlap,
            ..base.clone()
        }
    }
}

/// A direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From the participant.
    Up,
    /// To it.
    Down,
}

impl Way {
    const BOTH: [Self; 2] = [Self::Up, Self::Down];

    fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
        }
    }

    /// Bytes of a kind in this direction.
    fn get(self, traffic: &Traffic, kind: Kind) -> u64 {
        match self {
            Self::Up => traffic.up.get(kind),
            Self::Down => traffic.down.get(kind),
        }
    }

    /// So many more of them.
    fn count(self, traffic: &mut Traffic, kind: Kind, bytes: u64) {
        match self {
            Self::Up => traffic.up.count(kind, bytes),
            Self::Down => traffic.down.count(kind, bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_sound_settings() {
        let base = FederationSettings::default();
        for variant in
            accuracy::cells().iter().map(|cell| cell.variant).chain(links::variants()).chain(shapes::variants())
        {
            variant.of(&base).validate().unwrap();
        }
        let mixed = Variant::mixed(MIXED).of(&base);
        assert_eq!((mixed.code_format, mixed.matrix_format), (Format::Int8, Format::F16));
        let formats = |s: FederationSettings| [s.feature_format, s.code_format, s.gradient_format, s.matrix_format];
        assert_eq!(formats(Variant::low_rank(DEFAULT, Format::Int8).of(&base)), formats(base.clone()));
        let plain = Variant::activations("plain", Format::F16).of(&base);
        assert_eq!((plain.boundary, plain.gradient_format), (BoundaryChoice::Activations, Format::F16));
    }

    /// Or else another default would make all runs again.
    #[test]
    fn variants_leave_nothing_of_theirs_to_the_defaults() {
        let one = FederationSettings::default();
        let other = FederationSettings {
            boundary: BoundaryChoice::LowRank,
            rounding: Rounding::Stochastic,
            compress: true,
            overlap: Overlap::Stale,
            ..FederationSettings::exact()
        };
        for variant in accuracy::cells().iter().map(|cell| cell.variant).chain(links::variants()) {
            assert_eq!(variant.of(&one), variant.of(&other), "{}", variant.name);
        }
    }

    #[test]
    fn a_quick_benchmark_has_files_of_its_own() {
        let quick = report::tests::bench();
        let full = Bench { size: Size::Full, ..quick.clone() };
        assert_ne!((quick.runs_name(), quick.page_name()), (full.runs_name(), full.page_name()));
        assert_eq!((full.runs_name(), full.page_name()), ("wire.jsonl", "wire.md"));
    }

    #[test]
    fn directions_are_kept_apart() {
        let mut traffic = Traffic::default();
        Way::Up.count(&mut traffic, Kind::Codes, 5);
        Way::Down.count(&mut traffic, Kind::Gradients, 3);
        let got = Way::BOTH.map(|way| (way.get(&traffic, Kind::Codes), way.get(&traffic, Kind::Gradients)));
        assert_eq!(got, [(5, 0), (0, 3)]);
    }
}
