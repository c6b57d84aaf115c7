//! Adapters as files: `export`, `eval`, and what `resume` goes on with. No server runs.

use anyhow::Context;
use clap::Parser;
use fednano_server::commands::{eval, export, resume};
use fednano_server::edge_bundle;
use fednano_server::store::{AdapterFile, NewFederation, SavedParticipant, Store, write_adapter};
use fednano_shared::aggregate::StrategyState;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::{AdapterChoice, FederationSettings, Strategy};
use fednano_shared::step::Evaluation;
use fednano_shared::wire::{ClientKind, ParticipantId, RoundResult, SessionToken, Update};
use fednano_tests::{LIMIT, block, fixture};
use std::path::{Path, PathBuf};

#[derive(Parser)]
struct Cli<A: clap::Args> {
    #[command(flatten)]
    args: A,
}

fn parse<A: clap::Args>(words: &[&str]) -> anyhow::Result<A> {
    Ok(Cli::<A>::try_parse_from(words.iter().copied())?.args)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// What must fail: its words.
fn words<T>(result: anyhow::Result<T>) -> anyhow::Result<String> {
    match result {
        Ok(_) => anyhow::bail!("it passed"),
        Err(e) => Ok(format!("{e:#}")),
    }
}

/// A data folder as a server leaves it, whose clients get their half of the model in 8 bits, and questions to measure with.
struct Scene {
    folder: tempfile::TempDir,
    model: String,
    dim: usize,
}

impl Scene {
    fn new() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let files = ModelFiles::open(&fixture())?;
        let data_dir = folder.path().join("data");
        let bundle = edge_bundle::prepare(&fixture(), &files, EdgeDtype::Int8, &data_dir, |_, _| {})?;
        for part in ["questions", "splits/train", "splits/test"] {
            let at = folder.path().join(part);
            std::fs::create_dir_all(&at)?;
            for name in ["image_0.png", "image_1.png"] {
                std::fs::copy(fixture().join("images").join(name), at.join(name))?;
            }
            let csv = "picture,question,answer\nimage_0.png,what is it?,a box\nimage_1.png,which color?,red\n";
            let more =
                if part.ends_with("train") { "image_1.png,what is it?,red\n" } else { "image_0.png,how many?,red\n" };
            std::fs::write(at.join("questions.csv"), format!("{csv}{more}"))?;
        }
        Ok(Self { folder, model: bundle.model_hash, dim: files.config.text.hidden })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Untouched adapters, or some after a round.
    fn adapter(&self, choice: AdapterChoice, round: u32) -> AdapterState {
        let mut state = AdapterState::zeros(choice, 2, self.dim);
        for (name, blob) in &mut state.0 {
            if round > 0 || name.ends_with("down") {
                blob.data.iter_mut().enumerate().for_each(|(i, v)| *v = (i as f32 + 0.5).sin());
            }
        }
        state
    }

    /// A federation with one done round.
    fn federate(&self, name: &str, choice: AdapterChoice) -> anyhow::Result<Store> {
        let store = Store::open(&self.path("data"), name)?;
        let settings =
            FederationSettings { rank: 2, adapters: choice, strategy: Strategy::FedAvg, ..Default::default() };
        store.create(&NewFederation {
            settings,
            model: self.model.clone(),
            model_dir: text(&fixture()),
            adapter: self.adapter(choice, 0),
        })?;
        store.judged(&result(0))?;
        let id = ParticipantId(1);
        store.participant(&SavedParticipant {
            id,
            token: SessionToken("secret".into()),
            name: "a".into(),
            kind: ClientKind::Native,
            device: "test".into(),
            samples: 3,
            left: false,
        })?;
        store.begin_round(1, 1, &[id])?;
        let adapter = self.adapter(choice, 1);
        let update = Update { round: 1, adapter: adapter.clone(), fisher: None, samples: 3, loss: 1.0, local: None };
        store.accept(id, &update)?;
        store.merged(&result(1), &adapter, &StrategyState::default(), &[(id, 1)])?;
        Ok(store)
    }

    fn export(&self, more: &[&str], out: &Path) -> anyhow::Result<AdapterFile> {
        let (data_dir, file) = (text(&self.path("data")), text(out));
        let words = [&["export", "--data-dir", &data_dir, "--out", &file][..], more].concat();
        export::main(&parse(&words)?)?;
        AdapterFile::open(out, self.dim)
    }

    async fn eval(&self, adapter: &Path, data: &str, more: &[&str]) -> anyhow::Result<eval::Report> {
        let (model, adapter, data) = (text(&fixture()), text(adapter), text(&self.path(data)));
        let words = [&["eval", "--model", &model, "--adapter", &adapter, "--data", &data][..], more].concat();
        eval::evaluate(&parse(&words)?).await
    }
}

fn result(round: u32) -> RoundResult {
    RoundResult {
        round,
        held_out: Evaluation { accuracy: 0.25 * f64::from(round), loss: 2.5, samples: 4 },
        participants: if round == 0 { Vec::new() } else { vec![ParticipantId(1)] },
        late: Vec::new(),
        local: None,
        training_loss: None,
        seconds: 1.0,
    }
}

/// What was kept is what is exported and measured, whichever adapters were trained.
pub fn export_and_eval() -> anyhow::Result<()> {
    block(LIMIT, async {
        let scene = Scene::new()?;
        for choice in AdapterChoice::ALL {
            let name = choice.to_string();
            let store = scene.federate(&name, choice)?;
            let out = scene.path(&format!("{name}.safetensors"));
            let file = scene.export(&["--federation", &name], &out)?;
            anyhow::ensure!(file.adapter == store.adapter(1)? && file.rank == 2, "{name}: other adapters than kept");
            let says = |key: &str| file.metadata.get(key).map(String::as_str);
            for (key, value) in [
                (AdapterFile::MODEL, scene.model.as_str()),
                (AdapterFile::EDGE_DTYPE, "int8"),
                (AdapterFile::FEDERATION, name.as_str()),
                (AdapterFile::ROUND, "1"),
                (AdapterFile::RANK, "2"),
                (AdapterFile::ADAPTERS, name.as_str()),
                (AdapterFile::STRATEGY, "fedavg"),
                (AdapterFile::ACCURACY, "0.25"),
                (AdapterFile::LOSS, "2.5"),
                (AdapterFile::SAMPLES, "4"),
            ] {
                anyhow::ensure!(says(key) == Some(value), "{key} is {:?}, not {value}", says(key));
            }
            let settings: FederationSettings =
                serde_json::from_str(says(AdapterFile::SETTINGS).context("no settings")?)?;
            anyhow::ensure!(settings.adapters == choice, "{settings:?}");

            let report = scene.eval(&out, "questions", &[]).await?;
            println!("{report}");
            anyhow::ensure!(report.fits == Some(true) && report.edge_dtype == EdgeDtype::Int8, "{report:?}");
            anyhow::ensure!(report.tuned.samples == 3 && report.zero_shot.samples == 3, "{report:?}");
            anyhow::ensure!(report.tuned.loss.is_finite() && report.tuned.loss != report.zero_shot.loss, "{report:?}");
            anyhow::ensure!(report.to_string().contains(&format!("adapters: {choice}")), "{report}");

            // Untouched adapters change nothing, bit for bit; and what a server has prepared is used.
            let untouched = scene.path("untouched.safetensors");
            scene.export(&["--federation", &name, "--round", "0"], &untouched)?;
            let data_dir = text(&scene.path("data"));
            let again = scene.eval(&untouched, "questions", &["--data-dir", &data_dir]).await?;
            anyhow::ensure!(again.tuned == again.zero_shot && again.zero_shot == report.zero_shot, "{again:?}");
        }
        Ok(())
    })
}

/// Answers without looking come from training samples where there are some.
pub fn baselines() -> anyhow::Result<()> {
    block(LIMIT, async {
        let scene = Scene::new()?;
        scene.federate("only", AdapterChoice::Both)?;
        let out = scene.path("a.safetensors");
        scene.export(&[], &out)?;
        let own = scene.eval(&out, "questions", &[]).await?.baselines;
        anyhow::ensure!(!own.from_training && own.constant == 2.0 / 3.0 && own.question_only == 1.0, "{own:?}");
        let report = scene.eval(&out, "splits", &["--limit", "2"]).await?;
        anyhow::ensure!(report.baselines.from_training && report.tuned.samples == 2, "{report:?}");
        // 'what is it?' was answered 'a box' and 'red': the first in the alphabet; 'how many?' was never asked.
        let all = scene.eval(&out, "splits", &["--json"]).await?.baselines;
        anyhow::ensure!(all.constant == 2.0 / 3.0 && all.question_only == 1.0, "{all:?}");
        Ok(())
    })
}

/// Adapters of another model are not measured unless that is asked for, and the report says so.
pub fn another_model() -> anyhow::Result<()> {
    block(LIMIT, async {
        let scene = Scene::new()?;
        scene.federate("only", AdapterChoice::Both)?;
        let out = scene.path("a.safetensors");
        let file = scene.export(&[], &out)?;
        // Another form of the client's half has other features.
        let fault = words(scene.eval(&out, "questions", &["--edge-dtype", "f16"]).await)?;
        anyhow::ensure!(fault.contains("another model") && fault.contains("--any-model"), "{fault}");
        let report = scene.eval(&out, "questions", &["--edge-dtype", "f16", "--any-model"]).await?;
        anyhow::ensure!(report.fits == Some(false) && report.edge_dtype == EdgeDtype::F16, "{report:?}");
        anyhow::ensure!(report.to_string().contains("not the federation's"), "{report}");

        std::fs::write(&out, write_adapter(&file.adapter, &[])?)?;
        let report = scene.eval(&out, "questions", &[]).await?;
        anyhow::ensure!(report.fits.is_none() && report.to_string().contains("does not say"), "{report}");

        let wide = AdapterState::zeros(AdapterChoice::Both, 2, scene.dim + 1);
        std::fs::write(&out, write_adapter(&wide, &[])?)?;
        let fault = words(scene.eval(&out, "questions", &["--any-model"]).await)?;
        anyhow::ensure!(fault.contains(&format!("width {}", scene.dim + 1)), "{fault}");
        Ok(())
    })
}

/// What cannot be exported is named, and nothing is written.
pub fn export_faults() -> anyhow::Result<()> {
    let scene = Scene::new()?;
    let out = scene.path("a.safetensors");
    let fault = |more: &[&str], out: &Path| words(scene.export(more, out));
    let empty = fault(&[], &out)?;
    anyhow::ensure!(empty.contains("no federation") && empty.contains("--data-dir"), "{empty}");
    anyhow::ensure!(!scene.path("data/fednano.sqlite").exists(), "a database was made");
    scene.federate("a", AdapterChoice::Both)?;
    let fresh = Store::open(&scene.path("data"), "b")?;
    fresh.create(&NewFederation {
        settings: FederationSettings::default(),
        model: scene.model.clone(),
        model_dir: String::new(),
        adapter: scene.adapter(AdapterChoice::Both, 0),
    })?;
    let cases: [(&[&str], &str); 4] = [
        (&[], "--federation: a, b"),
        (&["--federation", "c"], "no federation 'c'; there are: a, b"),
        (&["--federation", "a", "--round", "7"], "--round 0 to 1"),
        (&["--federation", "b"], "no result yet"),
    ];
    for (more, expected) in cases {
        let found = fault(more, &out)?;
        anyhow::ensure!(found.contains(expected), "{found}");
    }
    anyhow::ensure!(!out.exists(), "something was written");
    let nowhere = fault(&["--federation", "a"], &scene.path("no/such/folder/a"))?;
    anyhow::ensure!(nowhere.contains("cannot write") && nowhere.contains("folder"), "{nowhere}");
    Ok(())
}

/// Settings, model and form of a resumed federation are those that it began with.
pub fn resume_options() -> anyhow::Result<()> {
    let scene = Scene::new()?;
    let data_dir = text(&scene.path("data"));
    let options = |more: &[&str]| {
        let words = [&["resume", "--data-dir", &data_dir][..], more].concat();
        resume::options(&parse(&words)?)
    };
    let empty = words(options(&[]))?;
    anyhow::ensure!(empty.contains("no federation") && empty.contains("--data-dir"), "{empty}");
    let (image, both) = (scene.federate("image", AdapterChoice::Image)?, scene.federate("both", AdapterChoice::Both)?);
    let settings = |store: &Store| anyhow::Ok(store.load()?.context("nothing is kept")?.settings);

    let all = options(&["--listen", "127.0.0.1:0", "--evaluation-limit", "7"])?;
    let expected = [("both".to_owned(), settings(&both)?), ("image".to_owned(), settings(&image)?)];
    anyhow::ensure!(all.federations.into_iter().eq(expected), "other federations or settings than kept");
    anyhow::ensure!(all.model == fixture() && all.flags.edge_dtype == EdgeDtype::Int8, "{:?}", all.flags);
    anyhow::ensure!(all.flags.listen == "127.0.0.1:0" && all.flags.evaluation_limit == 7, "{:?}", all.flags);

    let one = options(&["--federation", "image", "--model", &data_dir])?;
    anyhow::ensure!(one.federations.len() == 1 && one.model == scene.path("data"), "{one:?}");
    let unknown = words(options(&["--federation", "c"]))?;
    anyhow::ensure!(unknown.contains("no federation 'c'; there are: both, image"), "{unknown}");

    let other = Store::open(&scene.path("data"), "other")?;
    other.create(&NewFederation {
        settings: FederationSettings::default(),
        model: "0".repeat(64),
        model_dir: text(&scene.path("moved")),
        adapter: scene.adapter(AdapterChoice::Both, 0),
    })?;
    let several = words(options(&[]))?;
    anyhow::ensure!(several.contains("different models") && several.contains("--federation"), "{several}");
    let moved = words(options(&["--federation", "other"]))?;
    anyhow::ensure!(moved.contains("is not at") && moved.contains("--model"), "{moved}");
    Ok(())
}
