//! Samples of the tasks, and how they are dealt to clients. Pictures are only looked at when somebody holds them.

use super::config::{Simulation, Task};
use crate::app::HELD_OUT_SEED;
use crate::datasets;
use anyhow::{Context, ensure};
use fednano_shared::bundle::sha256_hex;
use fednano_shared::data::dataset::{Dataset, Sample};
use fednano_shared::data::picture::Picture;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::data::split::dirichlet;
use fednano_shared::probe::shard;
use fednano_shared::settings::Strategy;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A picture that may not have been read yet.
#[derive(Debug, Clone)]
pub(super) enum Image {
    File(PathBuf),
    Drawn(Arc<Picture>),
}

impl Image {
    /// Its pixels.
    pub(super) fn open(&self) -> anyhow::Result<Arc<Picture>> {
        match self {
            Self::Drawn(picture) => Ok(picture.clone()),
            Self::File(path) => {
                let unreadable =
                    || format!("the picture {} cannot be used; mend it, or remove its questions", path.display());
                let picture = datasets::read_picture(path).map_err(anyhow::Error::msg).with_context(unreadable)?;
                Ok(Arc::new(picture))
            }
        }
    }
}

/// What a task is learned from and judged with.
pub(super) struct Corpus {
    train: Dataset<Image>,
    test: Dataset<Image>,
    /// Tells it from others: of the samples and the pictures' names.
    pub(super) hash: String,
}

/// Scenes of each theme: pictures, and questions about each at most.
const TRAINING_SCENES: (usize, usize) = (200, 5);
const TEST_SCENES: (usize, usize) = (80, 5);
/// Seeds of theirs that neither demo nor tests use.
const SCENES_SEED: u64 = 5_000;

/// Which half of a corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Part {
    Train,
    Test,
}

impl Corpus {
    /// List a task's samples.
    ///
    /// # Errors
    /// A data set that cannot be used.
    pub(super) fn open(task: Task, data: &Path) -> anyhow::Result<Self> {
        let (train, test) = match task {
            Task::Data => {
                let splits = datasets::list_splits(data)?;
                let file = |listing: Dataset<PathBuf>| Dataset {
                    pictures: listing.pictures.into_iter().map(Image::File).collect(),
                    samples: listing.samples,
                };
                (file(splits.train), file(splits.test))
            }
            Task::Scenes => (scenes(SCENES_SEED, TRAINING_SCENES), scenes(HELD_OUT_SEED + SCENES_SEED, TEST_SCENES)),
        };
        ensure!(!train.samples.is_empty() && !test.samples.is_empty(), "the task {task} has no samples");
        let hash = hash(&[&train, &test]);
        Ok(Self { train, test, hash })
    }

    pub(super) fn part(&self, part: Part) -> &Dataset<Image> {
        match part {
            Part::Train => &self.train,
            Part::Test => &self.test,
        }
    }
}

fn scenes(seed: u64, (pictures, questions): (usize, usize)) -> Dataset<Image> {
    let mut all = Dataset::default();
    for theme in DemoTheme::ALL {
        let Dataset { pictures, samples } = shard(theme, seed, pictures, questions);
        all.append(Dataset { pictures: pictures.into_iter().map(|p| Image::Drawn(Arc::new(p))).collect(), samples });
    }
    all
}

/// Where pictures lie does not matter, nor what is in their files.
fn hash(parts: &[&Dataset<Image>]) -> String {
    let mut text: Vec<u8> = Vec::new();
    for part in parts {
        for image in &part.pictures {
            match image {
                Image::File(path) => text.extend(path.file_name().unwrap_or_default().as_encoded_bytes()),
                Image::Drawn(picture) => text.extend(sha256_hex(&picture.rgb).as_bytes()),
            }
            text.push(0);
        }
        for s in &part.samples {
            text.extend(format!("{:?}\0{}\0{}\0", s.picture, s.question, s.answer).bytes());
        }
        text.push(1);
    }
    sha256_hex(&text)
}

/// A sample of a task; its picture is one of the task's corpus.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Held {
    pub(super) task: Task,
    pub(super) sample: Sample,
}

/// The training samples of each client, the same for the same seed: a Dirichlet split by answer within each task, then what
/// clients lack is taken from them. With the strategy `centralised` one client has all of them.
///
/// # Errors
/// A client that is left without samples.
pub(super) fn deal(
    corpora: &BTreeMap<Task, Corpus>,
    simulation: &Simulation,
    strategy: Strategy,
    seed: u64,
) -> anyhow::Result<Vec<Vec<Held>>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let tasks = simulation.tasks.len();
    let mut clients = Vec::new();
    for (number, task) in simulation.tasks.iter().enumerate() {
        let corpus = corpora.get(task).with_context(|| format!("the task {task} has not been opened"))?;
        let all = &corpus.train.samples;
        let mut pool: Vec<usize> = (0..all.len()).collect();
        if simulation.samples > 0 {
            pool.shuffle(&mut rng);
            pool.truncate(simulation.samples.div_ceil(tasks));
            pool.sort_unstable();
        }
        let samples: Vec<Sample> = pool.into_iter().filter_map(|row| all.get(row)).cloned().collect();
        let members = share_of(simulation.clients, tasks, number);
        let mut shares = dirichlet(&samples, members, simulation.alpha, &mut rng)?;
        for rows in &mut shares {
            if simulation.limit > 0 {
                rows.shuffle(&mut rng);
                rows.truncate(simulation.limit);
            }
        }
        let held = |row: usize| samples.get(row).map(|sample| Held { task: *task, sample: sample.clone() });
        clients.extend(shares.into_iter().map(|rows| rows.into_iter().filter_map(held).collect::<Vec<_>>()));
    }
    take_away(&mut clients, simulation, &mut rng);
    if let Some(empty) = clients.iter().position(Vec::is_empty) {
        anyhow::bail!(
            "client {} of {} has no samples; raise samples or limit, or lower clients, text_only or picture_only",
            empty + 1,
            clients.len()
        );
    }
    Ok(if strategy == Strategy::Centralised { vec![clients.concat()] } else { clients })
}

/// Of so many things, how many are the part's of this number.
pub(super) fn share_of(all: usize, parts: usize, number: usize) -> usize {
    let parts = parts.max(1);
    all / parts + usize::from(number < all % parts)
}

/// Pictures of some clients, questions of others.
fn take_away(clients: &mut [Vec<Held>], simulation: &Simulation, rng: &mut ChaCha8Rng) {
    let count = |share: f64| (share * clients.len() as f64).round() as usize;
    let (blind, mute) = (count(simulation.text_only), count(simulation.picture_only));
    let mut drawn: Vec<usize> = (0..clients.len()).collect();
    drawn.shuffle(rng);
    for (place, client) in drawn.into_iter().enumerate().take(blind + mute) {
        let Some(samples) = clients.get_mut(client) else { continue };
        for held in samples.iter_mut() {
            if place < blind {
                held.sample.picture = None;
            } else {
                held.sample.question.clear();
            }
        }
        samples.retain(|held| held.sample.picture.is_some() || !held.sample.question.is_empty());
    }
}

/// The samples to judge with, task by task, and which of them are used after each round. The same whatever the seed.
///
/// # Errors
/// A task that has not been opened.
pub(super) fn exam(
    corpora: &BTreeMap<Task, Corpus>,
    simulation: &Simulation,
) -> anyhow::Result<(Vec<Held>, Vec<usize>)> {
    let tasks = simulation.tasks.len();
    let (mut samples, mut each_round) = (Vec::new(), Vec::new());
    for (number, task) in simulation.tasks.iter().enumerate() {
        let corpus = corpora.get(task).with_context(|| format!("the task {task} has not been opened"))?;
        let mut rows: Vec<usize> = (0..corpus.test.samples.len()).collect();
        rows.shuffle(&mut ChaCha8Rng::seed_from_u64(0));
        let first = |limit: usize, of: usize| if limit == 0 { of } else { share_of(limit, tasks, number).min(of) };
        rows.truncate(first(simulation.test_limit, rows.len()));
        each_round.extend(samples.len()..samples.len() + first(simulation.evaluation_limit, rows.len()));
        let held = |row: usize| corpus.test.samples.get(row).map(|s| Held { task: *task, sample: s.clone() });
        samples.extend(rows.into_iter().filter_map(held));
    }
    Ok((samples, each_round))
}

/// What answers without looking reach on the exam: the most frequent one, and the most frequent one to the same question.
pub(super) fn baselines(corpora: &BTreeMap<Task, Corpus>, simulation: &Simulation, exam: &[Held]) -> (f64, f64) {
    let bare = |samples: Vec<Sample>| Dataset::<()> { pictures: Vec::new(), samples };
    let known = simulation.tasks.iter().filter_map(|task| corpora.get(task));
    let train = bare(known.flat_map(|corpus| corpus.train.samples.iter().cloned()).collect());
    let test = bare(exam.iter().map(|held| held.sample.clone()).collect());
    (Dataset::constant_baseline(&train, &test), Dataset::question_only_baseline(&train, &test))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpora() -> BTreeMap<Task, Corpus> {
        let samples = |n: usize| Dataset {
            pictures: (0..n).map(|i| Image::File(format!("{i}.png").into())).collect(),
            samples: (0..n)
                .map(|i| Sample { picture: Some(i), question: format!("q{}", i % 5), answer: format!("a{}", i % 3) })
                .collect(),
        };
        let corpus = || Corpus { train: samples(90), test: samples(40), hash: String::new() };
        BTreeMap::from([(Task::Data, corpus()), (Task::Scenes, corpus())])
    }

    fn dealt(simulation: &Simulation, seed: u64) -> Vec<Vec<Held>> {
        deal(&corpora(), simulation, Strategy::FedAvg, seed).unwrap()
    }

    fn pictures(client: &[Held]) -> Vec<Option<usize>> {
        client.iter().map(|held| held.sample.picture).collect()
    }

    #[test]
    fn every_sample_of_the_pool_is_somebody_s() {
        let simulation = Simulation { samples: 30, limit: 0, ..Default::default() };
        let clients = dealt(&simulation, 1);
        assert_eq!((clients.len(), clients.iter().map(Vec::len).sum::<usize>()), (5, 30));
        assert_eq!(dealt(&simulation, 1), clients);
        assert_ne!(dealt(&simulation, 2), clients);
        let mut all = pictures(&clients.concat());
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 30);
        // One client has them all where that is the strategy.
        let one = deal(&corpora(), &simulation, Strategy::Centralised, 1).unwrap();
        assert_eq!((one.len(), &one[0]), (1, &clients.concat()));
        let limited = dealt(&Simulation { limit: 3, ..simulation }, 1);
        assert!(limited.iter().all(|client| (1..=3).contains(&client.len())));
    }

    #[test]
    fn tasks_share_the_clients() {
        let tasks = vec![Task::Data, Task::Scenes];
        let clients = dealt(&Simulation { tasks: tasks.clone(), samples: 40, ..Default::default() }, 1);
        let of: Vec<Task> = clients.iter().map(|client| client[0].task).collect();
        assert_eq!(of, [Task::Data, Task::Data, Task::Data, Task::Scenes, Task::Scenes]);
        assert!(clients.iter().all(|client| client.iter().all(|held| held.task == client[0].task)));
        let of_scenes: usize = clients[3..].iter().map(Vec::len).sum();
        assert_eq!(of_scenes, 20);
        let simulation = Simulation { tasks, test_limit: 21, evaluation_limit: 8, ..Default::default() };
        let (samples, each_round) = exam(&corpora(), &simulation).unwrap();
        let of = |task| samples.iter().filter(|held| held.task == task).count();
        assert_eq!((of(Task::Data), of(Task::Scenes)), (11, 10));
        assert_eq!(each_round, [0, 1, 2, 3, 11, 12, 13, 14]);
    }

    #[test]
    fn some_lack_pictures_and_others_questions() {
        let simulation = Simulation { samples: 60, text_only: 0.4, picture_only: 0.2, ..Default::default() };
        let clients = dealt(&simulation, 1);
        let blind = clients.iter().filter(|c| c.iter().all(|held| held.sample.picture.is_none())).count();
        let mute = clients.iter().filter(|c| c.iter().all(|held| held.sample.question.is_empty())).count();
        assert_eq!((blind, mute), (2, 1));
        // Who is whose does not depend on what is taken.
        let whole = dealt(&Simulation { text_only: 0.0, picture_only: 0.0, ..simulation }, 1);
        let counts = |clients: &[Vec<Held>]| clients.iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(counts(&clients), counts(&whole));
    }

    #[test]
    fn a_client_without_samples_is_an_error() {
        let simulation = Simulation { samples: 3, clients: 5, ..Default::default() };
        let cause = deal(&corpora(), &simulation, Strategy::FedAvg, 1).unwrap_err().to_string();
        assert!(cause.contains("has no samples"), "{cause}");
    }

    #[test]
    fn an_exam_is_drawn_once_and_answers_without_looking_are_worth_something() {
        let simulation = Simulation { test_limit: 10, evaluation_limit: 0, ..Default::default() };
        let (samples, each_round) = exam(&corpora(), &simulation).unwrap();
        assert_eq!((samples.len(), each_round.len()), (10, 10));
        assert_eq!(exam(&corpora(), &simulation).unwrap().0, samples);
        let (constant, question_only) = baselines(&corpora(), &simulation, &samples);
        assert!(constant > 0.0 && question_only > 0.0);
    }
}
