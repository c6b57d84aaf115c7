//! Attackers against every strategy: of 5 and of 10 participants whose honest updates lie around a common point, one (against
//! median and trimmed mean also two of ten) is hostile. How far the merge may be from the honest mean is stated for each.

use super::guard::length;
use super::tests::{adapters, settings};
use super::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const RANK: usize = 2;
const DIM: usize = 8;
/// What one round moves a value by.
const STEP: f32 = 0.05;

/// Honest participants.
struct Scene {
    global: AdapterState,
    honest: Vec<ClientUpdate>,
    /// Their plain mean.
    mean: AdapterState,
    /// The longest way that one of them went.
    way: f64,
    /// The largest deviation from the mean of each value, as a length: every mix of honest values, each with its own weights, is
    /// nearer to the mean than this.
    spread: f64,
}

impl Scene {
    fn new(count: u32) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(u64::from(count));
        let global = adapters(RANK, DIM, |_| rng.random_range(-0.1f32..0.1));
        let common = adapters(RANK, DIM, |_| if rng.random::<bool>() { STEP } else { -STEP });
        let mut honest = Vec::new();
        for client in 1..=count {
            let mut adapter = global.clone();
            for (blob, way) in adapter.0.values_mut().zip(common.0.values()) {
                for (value, way) in blob.data.iter_mut().zip(&way.data) {
                    *value += *way * rng.random_range(0.9f32..1.1);
                }
            }
            let fisher = adapters(RANK, DIM, |_| 1e-4 * rng.random_range(-1f32..1.0).exp());
            honest.push(ClientUpdate {
                client: ParticipantId(client),
                staleness: 0,
                adapter,
                fisher: Some(fisher),
                samples: 100,
            });
        }
        let settings = FederationSettings { max_delta_norm: 0.0, ..settings(Strategy::FedAvg) };
        let mean = merged(&settings, &global, &honest).adapter;
        let way = honest.iter().map(|u| length(&global, &u.adapter)).fold(0.0, f64::max);
        let mut widest = mean.clone();
        for (name, blob) in &mut widest.0 {
            for (i, value) in blob.data.iter_mut().enumerate() {
                let deviation = honest.iter().map(|u| (u.adapter.0[name].data[i] - *value).abs()).fold(0.0, f32::max);
                *value += deviation;
            }
        }
        let spread = length(&mean, &widest);
        assert!(spread < 0.25 * way, "the honest ones should agree");
        Self { global, honest, mean, way, spread }
    }

    /// The last `hostile` participants do this, the others stay honest; the distance of the merge from the honest mean.
    fn attacked(&self, settings: &FederationSettings, hostile: usize, attack: Attack) -> f64 {
        length(&self.mean, &self.merge(settings, hostile, attack).adapter)
    }

    fn merge(&self, settings: &FederationSettings, hostile: usize, attack: Attack) -> Merged {
        let mut updates = self.honest.clone();
        updates.iter_mut().rev().take(hostile).for_each(|update| attack(&self.global, update));
        merged(settings, &self.global, &updates)
    }
}

fn merged(settings: &FederationSettings, global: &AdapterState, updates: &[ClientUpdate]) -> Merged {
    merge(settings, global, updates.to_vec(), &mut StrategyState::default()).unwrap()
}

type Attack = fn(&AdapterState, &mut ClientUpdate);

/// The honest way, times this.
fn stretch(global: &AdapterState, update: &mut ClientUpdate, times: f32) {
    for (blob, from) in update.adapter.0.values_mut().zip(global.0.values()) {
        blob.data.iter_mut().zip(&from.data).for_each(|(v, from)| *v = from + times * (*v - from));
    }
}

fn far_off(update: &mut ClientUpdate) {
    update.adapter = adapters(RANK, DIM, |_| 100.0);
}

fn claim_fisher(update: &mut ClientUpdate, value: f32) {
    update.fisher = Some(adapters(RANK, DIM, |_| value));
}

fn scaled(global: &AdapterState, update: &mut ClientUpdate) {
    stretch(global, update, 1000.0);
}

fn flipped(global: &AdapterState, update: &mut ClientUpdate) {
    stretch(global, update, -10.0);
}

fn huge_fisher(_: &AdapterState, update: &mut ClientUpdate) {
    far_off(update);
    claim_fisher(update, 1e30);
}

fn no_fisher(_: &AdapterState, update: &mut ClientUpdate) {
    far_off(update);
    claim_fisher(update, 0.0);
}

fn tiny_fisher(_: &AdapterState, update: &mut ClientUpdate) {
    far_off(update);
    claim_fisher(update, f32::MIN_POSITIVE);
}

fn many_samples(_: &AdapterState, update: &mut ClientUpdate) {
    far_off(update);
    update.samples = u32::MAX;
}

fn everything(global: &AdapterState, update: &mut ClientUpdate) {
    huge_fisher(global, update);
    update.samples = u32::MAX;
}

const ATTACKS: [(&str, Attack); 7] = [
    ("update times 1000", scaled),
    ("sign flip times 10", flipped),
    ("huge Fisher", huge_fisher),
    ("no Fisher", no_fisher),
    ("tiny Fisher", tiny_fisher),
    ("many samples", many_samples),
    ("huge Fisher and many samples", everything),
];

/// The guard's promise for one hostile participant: it is shortened to 10 honest ways (so at most 11 from the honest mean) and
/// has at most this share.
fn promise(scene: &Scene, share: f64) -> f64 {
    let limit = FederationSettings::default().max_delta_norm;
    share * (limit + 1.0) * scene.way + scene.spread
}

const WEIGHTED: [Strategy; 4] = [Strategy::FedAvg, Strategy::FedProx, Strategy::Fisher, Strategy::FisherAdam];

#[test]
fn one_hostile_participant_has_at_most_half_a_say_and_ten_honest_ways() {
    for scene in [Scene::new(5), Scene::new(10)] {
        for strategy in WEIGHTED {
            for (name, attack) in ATTACKS {
                let (distance, most) = (scene.attacked(&settings(strategy), 1, attack), promise(&scene, 0.5));
                assert!(distance <= most, "{strategy}, {name}, {}: {distance} > {most}", scene.honest.len());
            }
        }
    }
}

#[test]
fn whoever_tells_the_truth_about_its_samples_has_one_say_of_all_in_a_mean() {
    for scene in [Scene::new(5), Scene::new(10)] {
        let most = promise(&scene, 1.0 / scene.honest.len() as f64);
        let truthful: [Attack; 3] = [scaled, flipped, huge_fisher];
        for attack in truthful {
            assert!(scene.attacked(&settings(Strategy::FedAvg), 1, attack) <= most);
        }
    }
}

#[test]
fn plain_formulas_follow_the_attacker() {
    let scene = Scene::new(5);
    let plain = |strategy| FederationSettings {
        max_delta_norm: 0.0,
        max_weight: 0.0,
        max_share: 1.0,
        fisher_cap: 0.0,
        fisher_floor: 0.0,
        ..settings(strategy)
    };
    let guarded = promise(&scene, 0.5);
    let cases: [(Strategy, Attack, &str); 4] = [
        (Strategy::FedAvg, scaled, "update times 1000"),
        (Strategy::FedAvg, many_samples, "many samples"),
        (Strategy::Fisher, scaled, "update times 1000"),
        (Strategy::Fisher, huge_fisher, "huge Fisher"),
    ];
    for (strategy, attack, name) in cases {
        let distance = scene.attacked(&plain(strategy), 1, attack);
        assert!(distance > 10.0 * guarded, "{strategy}, {name}: {distance}, guarded at most {guarded}");
    }
    // Shortening alone is not enough against a huge Fisher: without limits of the share all ten ways are gone.
    let only_shortened = FederationSettings { max_delta_norm: 10.0, ..plain(Strategy::Fisher) };
    assert!(scene.attacked(&only_shortened, 1, huge_fisher) > guarded);
    // With the cap at 100 medians the hostile one would still have nearly everything.
    let capped = FederationSettings { max_share: 1.0, ..settings(Strategy::Fisher) };
    assert!(scene.attacked(&capped, 1, huge_fisher) > guarded);
}

#[test]
fn a_normalised_fisher_gives_a_liar_no_more_than_its_pattern() {
    for scene in [Scene::new(5), Scene::new(10)] {
        let settings = FederationSettings { fisher_normalise: true, ..settings(Strategy::Fisher) };
        // A third instead of the half that a huge Fisher takes otherwise.
        assert!(scene.attacked(&settings, 1, huge_fisher) <= promise(&scene, 1.0 / 3.0));
    }
}

#[test]
fn median_and_trimmed_mean_stay_among_the_honest_without_any_guard() {
    for (scene, hostile) in [(Scene::new(5), 1), (Scene::new(10), 1), (Scene::new(10), 2)] {
        for strategy in [Strategy::Median, Strategy::TrimmedMean] {
            for (name, attack) in ATTACKS {
                for max_delta_norm in [0.0, 10.0] {
                    let settings = FederationSettings { max_delta_norm, ..settings(strategy) };
                    let distance = scene.attacked(&settings, hostile, attack);
                    // Rounding of single values, on top of the spread of exact ones.
                    assert!(distance <= scene.spread + 1e-5, "{strategy}, {name}, {hostile} hostile: {distance}");
                }
            }
        }
    }
}

#[test]
fn fedadam_moves_no_value_by_more_than_its_rate_in_the_first_round() {
    let scene = Scene::new(5);
    for (name, attack) in ATTACKS {
        for max_delta_norm in [0.0, 10.0] {
            let settings = FederationSettings { max_delta_norm, ..settings(Strategy::FedAdam) };
            let moved = scene.merge(&settings, 1, attack).adapter;
            let pairs = moved.0.values().zip(scene.global.0.values()).flat_map(|(a, b)| a.data.iter().zip(&b.data));
            let most = pairs.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
            assert!(most <= settings.server_rate + 1e-6, "{name}: {most}");
        }
    }
}

#[test]
fn only_the_overlong_are_shortened() {
    let scene = Scene::new(5);
    let last = scene.honest.last().unwrap().client;
    assert!(scene.merge(&settings(Strategy::FedAvg), 0, scaled).shortened.is_empty());
    assert_eq!(scene.merge(&settings(Strategy::FedAvg), 1, scaled).shortened, [last]);
    assert_eq!(scene.merge(&settings(Strategy::Median), 2, huge_fisher).shortened, [ParticipantId(4), last]);
}

#[test]
fn what_cannot_be_computed_with_is_refused_by_name() {
    let scene = Scene::new(5);
    let faults: [(Attack, &str); 6] = [
        (|_, u| u.adapter = adapters(RANK, DIM, |i| if i == 9 { f32::NAN } else { 0.0 }), "NaN"),
        (|_, u| u.adapter = adapters(RANK, DIM, |_| f32::INFINITY), "inf"),
        (|_, u| u.adapter = adapters(RANK, DIM, |_| f32::MAX), "root mean square"),
        (|_, u| claim_fisher(u, f32::NAN), "NaN"),
        (|_, u| claim_fisher(u, f32::INFINITY), "inf"),
        (|_, u| u.samples = 0, "0 samples"),
    ];
    for strategy in [Strategy::FedAvg, Strategy::Fisher, Strategy::Median, Strategy::FedAdam] {
        for (attack, words) in faults {
            let mut updates = scene.honest.clone();
            attack(&scene.global, &mut updates[4]);
            assert!(validate(&settings(strategy), &scene.global, &updates[4]).is_err());
            let refused = merge(&settings(strategy), &scene.global, updates, &mut StrategyState::default());
            let cause = refused.unwrap_err().to_string();
            assert!(cause.contains("participant 5") && cause.contains(words), "{strategy}: {cause}");
        }
    }
}
