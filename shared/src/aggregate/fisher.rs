//! FedNano's merge: `theta = sum_k n_k F_k theta_k / sum_k n_k F_k`, element by element, with n_k the sample count and F_k the
//! diagonal empirical Fisher (arXiv 2506.14824; Matena and Raffel 2022, arXiv 2111.09832).
//!
//! F_k is floored at `fisher_floor` times its tensor's mean, so that a value nobody learned about is averaged plainly instead
//! of divided by nearly 0, and capped at `fisher_cap` times the lower median of the participants' values there (of two, the
//! smaller); [`super::mean::Weighing`] limits shares. Who has no gradient for a whole tensor (`image.*` of somebody without
//! pictures) abstains there, so that it does not hold back those who trained it. The formula as printed is `fisher_floor`,
//! `fisher_cap`, `max_weight` and `max_delta_norm` 0, `max_share` 1.
//!
//! # What F weighs, and what became of `down` while `up` was 0
//!
//! With `h = x + U gelu(D x)`, `a = D x` and `g = dL/dh`, the gradients are `dU = sum_s g gelu(a)^T` and
//! `dD = sum_s (U^T g * gelu'(a)) x^T`. At the start of round 1 `U = 0`, hence `dD = 0` exactly. F is measured **after** local
//! training at the client's own weights, where U is small but not 0: F of row j of D is small by `(u_j . g)^2`, about `|u_j|^2`
//! for the whole row. The merge divides by the sum over clients at the same element: whatever is small for all of them
//! alike cancels. So the start at 0 does not by itself starve `down`; what does not cancel is what differs between clients:
//!
//! 1. **How far `up` got.** Row j of D weighs by `|u_j|^2`. AdamW moves a value by about its rate a step, so after K_k steps
//!    |u_j| grows as K_k (or its root, where steps disagree), and K_k as n_k: in round 1 `down` is weighed by n_k^2 to n_k^3, not n_k.
//!    From round 2 on U starts from the common one and the effect fades. Squared *training* gradients (fisher-ef, fisher-adam)
//!    include the steps at `U = 0` and show it more; a client with one step has F = 0 there, and D at its start.
//! 2. **The level of the loss.** g is proportional to `p - y`, so F scales as `(1 - p)^2`, whichever the parameter: a client at loss 0.1
//!    has about 1/44 of the Fisher of one at loss 1. Who has fitted its data counts least, although it is surest of them:
//!    the empirical Fisher vanishes at a fit (Kunstner et al. 2019, arXiv 1905.12558). Between tensors of one client the
//!    scale cancels as above; between clients it is a weight nobody asked for.
//! 3. **Torn units.** What a hidden unit does is the product of its row of D and its column of U. Element by element weights let
//!    the row come mostly from one client and the column from another. Plain averages of D and U do not average products either
//!    (Sun et al. 2024, arXiv 2403.12313), but mix both halves alike.
//!
//! Hence three options, all off by default, so that the weights are the paper's within the limits above:
//! - `fisher_normalise` divides each client's F by its mean over the tensor: 1. and 2. cancel, only the pattern within a client
//!   counts, and on the average clients weigh by n_k again. It also takes from a liar what it could gain by scale.
//! - `fisher_power` p weighs by F^p: 0 is FedAvg exactly, 1 the paper, between them the ratios shrink (0.5: the root).
//! - `fisher_unit` gives all values of a hidden unit one weight: the mean of F over its row of D plus that over its column of U,
//!   each as a multiple of the participants' lower median of that tensor's mean (else the far larger F of U would drown D's).
//!   The two halves stay together.
//!
//! Order: normalise, unit, floor, power, cap, samples, share.

use super::mean::{Weighing, limit, lower_median, values};
use super::{AggregateError, Aggregator, ClientUpdate, StrategyState};
use crate::plain::{AdapterState, TensorBlob};
use crate::settings::FederationSettings;

/// Mean weighted by sample count and Fisher.
#[derive(Debug, Clone, Copy)]
pub struct FisherMerge {
    weighing: Weighing,
    floor: f64,
    cap: f64,
    power: f64,
    normalise: bool,
    unit: bool,
}

/// Below this a whole tensor counts as without gradient.
const TINY: f64 = 1e-30;

impl FisherMerge {
    /// As the federation agreed.
    pub fn of(settings: &FederationSettings) -> Self {
        Self {
            weighing: Weighing::of(settings),
            floor: settings.fisher_floor,
            cap: settings.fisher_cap,
            power: settings.fisher_power,
            normalise: settings.fisher_normalise,
            unit: settings.fisher_unit,
        }
    }
}

impl Aggregator for FisherMerge {
    fn aggregate(
        &self,
        global: &AdapterState,
        updates: &[ClientUpdate],
        _state: &mut StrategyState,
    ) -> Result<AdapterState, AggregateError> {
        let samples = self.weighing.weights(updates);
        let mut merged = global.clone();
        let mut sorted: Vec<f64> = Vec::with_capacity(updates.len());
        for (name, blob) in &mut merged.0 {
            let importance = self.importance(updates, name);
            // Where nobody has any, nobody abstains either; and to the power of 0 all are alike.
            let least = if self.power > 0.0 && importance.iter().any(|own| own.mean > TINY) { TINY } else { -1.0 };
            self.weighing.mean(blob, &values(updates, name), |i, weights| {
                for (weight, own) in weights.iter_mut().zip(&importance) {
                    *weight = if own.mean > least { self.weight(own, i) } else { 0.0 };
                }
                sorted.clear();
                sorted.extend(weights.iter().copied().filter(|w| *w > 0.0));
                let most = limit(self.cap, lower_median(&mut sorted));
                weights.iter_mut().zip(&samples).for_each(|(w, n)| *w = w.min(most) * n);
            });
        }
        Ok(merged)
    }
}

/// One participant's Fisher for one tensor.
struct Importance<'a> {
    of: Of<'a>,
    mean: f64,
    /// What the values are divided by.
    scale: f64,
}

enum Of<'a> {
    /// Each value its own.
    Values(&'a [f32]),
    /// One for each hidden unit.
    Units { units: Vec<f64>, side: Side },
}

impl FisherMerge {
    fn importance<'a>(&self, updates: &'a [ClientUpdate], name: &str) -> Vec<Importance<'a>> {
        if self.unit
            && let Some(halves) = Side::of(name)
        {
            return self.units(updates, name, halves);
        }
        let fisher = updates.iter().map(|u| fisher(u, name).map(|b| b.data.as_slice()).unwrap_or_default());
        fisher
            .map(|values| {
                let mean = mean(values.iter().map(|v| f64::from(*v)));
                Importance { of: Of::Values(values), mean, scale: if self.normalise { mean } else { 1.0 } }
            })
            .collect()
    }

    /// What an element weighs before caps: `(max(F, floor mean) / scale)^power`.
    fn weight(&self, own: &Importance, i: usize) -> f64 {
        let value = match &own.of {
            Of::Values(values) => values.get(i).map_or(0.0, |v| f64::from(*v)),
            Of::Units { units, side } => units.get(side.unit(i)).copied().unwrap_or(0.0),
        };
        // Without any gradient there is no scale either.
        let scale = if own.scale > TINY { own.scale } else { 1.0 };
        let value = (value.max(self.floor * own.mean) / scale).max(TINY);
        if self.power == 1.0 { value } else { value.powf(self.power) }
    }

    /// For each hidden unit of the adapter that the tensor belongs to, the mean of F over its row of `down` plus that over its
    /// column of `up`, in multiples of what is typical of the tensor.
    fn units(&self, updates: &[ClientUpdate], name: &str, halves: [(String, bool); 2]) -> Vec<Importance<'static>> {
        let mut sums: Vec<Vec<f64>> = vec![Vec::new(); updates.len()];
        let mut own_side = Side { down: true, columns: 1 };
        for (half, down) in halves {
            let tensors: Vec<Option<&TensorBlob>> = updates.iter().map(|u| fisher(u, &half)).collect();
            let means: Vec<f64> =
                tensors.iter().map(|t| mean(t.iter().flat_map(|b| &b.data).map(|v| f64::from(*v)))).collect();
            let mut some: Vec<f64> = means.iter().copied().filter(|m| *m > TINY).collect();
            let typical = lower_median(&mut some);
            for ((sum, tensor), mean) in sums.iter_mut().zip(tensors).zip(means) {
                let Some(tensor) = tensor else { continue };
                let side = Side { down, columns: tensor.shape.last().copied().unwrap_or(1).max(1) };
                if half == name {
                    own_side = side;
                }
                let divisor = if self.normalise { mean } else { typical };
                let (count, each) = side.extent(tensor);
                sum.resize(count, 0.0);
                if divisor > TINY {
                    for (i, value) in tensor.data.iter().enumerate() {
                        if let Some(unit) = sum.get_mut(side.unit(i)) {
                            *unit += f64::from(*value) / (divisor * each);
                        }
                    }
                }
            }
        }
        let importance = |units: Vec<f64>| {
            let mean = mean(units.iter().copied());
            Importance { of: Of::Units { units, side: own_side }, mean, scale: 1.0 }
        };
        sums.into_iter().map(importance).collect()
    }
}

/// Where a tensor's values belong: `down` is `[units, width]`, `up` is `[width, units]`.
#[derive(Debug, Clone, Copy)]
struct Side {
    down: bool,
    columns: usize,
}

impl Side {
    /// Both tensors of the adapter that a tensor belongs to, and whether each is `down`.
    fn of(name: &str) -> Option<[(String, bool); 2]> {
        let part = name.strip_suffix(".down").or_else(|| name.strip_suffix(".up"))?;
        Some([(format!("{part}.down"), true), (format!("{part}.up"), false)])
    }

    fn unit(self, i: usize) -> usize {
        if self.down { i / self.columns } else { i % self.columns }
    }

    /// Units, and values of each.
    fn extent(self, tensor: &TensorBlob) -> (usize, f64) {
        let units = if self.down { tensor.data.len() / self.columns } else { self.columns };
        (units, tensor.data.len() as f64 / units.max(1) as f64)
    }
}

fn fisher<'a>(update: &'a ClientUpdate, name: &str) -> Option<&'a TensorBlob> {
    update.fisher.as_ref().and_then(|f| f.0.get(name))
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), v| (sum + v, count + 1));
    sum / count.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::super::tests::{adapters, merged, scalars, settings, update};
    use super::*;
    use crate::settings::Strategy;
    use crate::wire::ParticipantId;

    fn fisher_settings() -> FederationSettings {
        FederationSettings { max_delta_norm: 0.0, ..settings(Strategy::Fisher) }
    }

    fn merge(settings: &FederationSettings, updates: &[ClientUpdate]) -> AdapterState {
        let mut global = updates[0].adapter.clone();
        global.0.values_mut().for_each(|b| b.data.fill(0.0));
        merged(settings, &global, updates).unwrap().adapter
    }

    fn near(state: &AdapterState, expected: &[f64]) {
        let values: Vec<f32> = state.0.values().flat_map(|b| b.data.iter().copied()).collect();
        assert_eq!(values.len(), expected.len());
        for (v, e) in values.iter().zip(expected) {
            assert!((f64::from(*v) - e).abs() < 1e-5 * e.abs().max(1.0), "{values:?} {expected:?}");
        }
    }

    /// Rank 2 on width 2: 16 values.
    fn wide(client: u32, value: f32, fisher: impl Fn(usize) -> f32) -> ClientUpdate {
        ClientUpdate {
            client: ParticipantId(client),
            staleness: 0,
            adapter: adapters(2, 2, |_| value),
            fisher: Some(adapters(2, 2, fisher)),
            samples: 1,
        }
    }

    #[test]
    fn by_hand() {
        // Element 0: (1*1*1 + 1*3*5) / (1*1 + 1*3) = 4; element 1: (2*0 + 1*8) / 3; equal Fisher: plain mean.
        let updates = [
            update(1, 1, [1.0, 0.0, 4.0, 8.0], [1.0, 2.0, 5.0, 0.0]),
            update(2, 1, [5.0, 8.0, 0.0, 4.0], [3.0, 1.0, 5.0, 0.0]),
        ];
        near(&merge(&fisher_settings(), &updates), &[4.0, 8.0 / 3.0, 2.0, 6.0]);
    }

    #[test]
    fn sample_counts_weigh_too() {
        let updates = [update(1, 3, [1.0; 4], [1.0; 4]), update(2, 1, [5.0; 4], [3.0; 4])];
        assert_eq!(merge(&fisher_settings(), &updates), scalars([3.0; 4])); // (3*1 + 3*5) / 6
    }

    #[test]
    fn the_floor_keeps_an_unlearned_element_in_the_mean() {
        let first_only = |i: usize| if i.is_multiple_of(2) { 2.0 } else { 0.0 };
        let merged = merge(&fisher_settings(), &[wide(1, 1.0, first_only), wide(2, 3.0, first_only)]);
        assert_eq!(merged, adapters(2, 2, |_| 2.0));
        // Without it, an element that one alone knows nothing of is the other's.
        let others = |i: usize| if i.is_multiple_of(2) { 2.0 } else { 1.0 };
        let free = FederationSettings { fisher_floor: 0.0, fisher_cap: 0.0, ..fisher_settings() };
        let merged = merge(&free, &[wide(1, 1.0, first_only), wide(2, 3.0, others)]);
        assert_eq!(merged, adapters(2, 2, |i| if i.is_multiple_of(2) { 2.0 } else { 3.0 }));
    }

    #[test]
    fn who_has_no_gradient_for_a_tensor_does_not_hold_it_back() {
        // The second has no pictures: its image adapter (the first eight values) is where it was.
        let blind = wide(2, 0.0, |i| if i < 8 { 0.0 } else { 1.0 });
        let expected: Vec<f64> = (0..16).map(|i| if i < 8 { 4.0 } else { 1.0 }).collect();
        let others = [2, 3, 4].map(|client| ClientUpdate { client: ParticipantId(client), ..blind.clone() });
        let mut updates = vec![wide(1, 4.0, |_| 1.0)];
        updates.extend(others);
        for fisher_normalise in [false, true] {
            for fisher_unit in [false, true] {
                let settings = FederationSettings { fisher_normalise, fisher_unit, ..fisher_settings() };
                near(&merge(&settings, &updates), &expected);
            }
        }
        let fedavg = FederationSettings { strategy: Strategy::FedAvg, ..fisher_settings() };
        near(&merge(&fedavg, &updates), &[1.0; 16]);
    }

    #[test]
    fn a_huge_fisher_cannot_own_an_element() {
        // Of two: 1e30 counts as 100 * 1, so (1*1*0 + 1*100*101) / (1 + 100) = 100.
        let updates = [update(1, 1, [0.0; 4], [1.0; 4]), update(2, 1, [101.0; 4], [1e30; 4])];
        near(&merge(&fisher_settings(), &updates), &[100.0; 4]);
        // Of three: no more than the others together.
        let updates =
            [update(1, 1, [0.0; 4], [1.0; 4]), update(2, 1, [0.0; 4], [1.0; 4]), update(3, 1, [100.0; 4], [1e30; 4])];
        near(&merge(&fisher_settings(), &updates), &[50.0; 4]);
        // With the cap alone: weight 100 of 102.
        let capped = FederationSettings { max_share: 1.0, ..fisher_settings() };
        near(&merge(&capped, &updates), &[10000.0 / 102.0; 4]);
        // Of four: the lower median of 1, 1, 1e30, 1e30 is 1, so (2*100*101) / (2*1 + 2*100) = 100.
        let four = [(1, 0.0, 1.0), (2, 0.0, 1.0), (3, 101.0, 1e30), (4, 101.0, 1e30)];
        let updates = four.map(|(client, value, fisher)| update(client, 1, [value; 4], [fisher; 4]));
        near(&merge(&capped, &updates), &[100.0; 4]);
    }

    #[test]
    fn two_honest_participants_are_not_distorted() {
        // Fisher 63 times apart is below the cap: (1*1*0 + 1*63*64) / (1 + 63) = 63, exactly.
        let updates = [update(1, 1, [0.0; 4], [1.0; 4]), update(2, 1, [64.0; 4], [63.0; 4])];
        assert_eq!(merge(&fisher_settings(), &updates), scalars([63.0; 4]));
    }

    #[test]
    fn a_single_update_is_taken_as_it_is() {
        let updates = [update(1, 3, [0.5, -2.0, 4.0, 8.0], [0.0, 2.0, 1e-3, 1e30])];
        assert_eq!(merge(&fisher_settings(), &updates), scalars([0.5, -2.0, 4.0, 8.0]));
    }

    #[test]
    fn the_power_leads_from_fedavg_to_the_paper() {
        let updates = [update(1, 1, [0.0; 4], [1.0; 4]), update(2, 3, [8.0; 4], [9.0, 0.0, 1e30, 1.0])];
        let power = |fisher_power| FederationSettings { fisher_power, ..fisher_settings() };
        let fedavg = FederationSettings { strategy: Strategy::FedAvg, ..fisher_settings() };
        assert_eq!(merge(&power(0.0), &updates), merge(&fedavg, &updates));
        // The root of 9 is 3: (1*1*0 + 3*3*8) / (1 + 9); 1e30 is capped after the power; equal ones weigh by samples.
        let half = merge(&power(0.5), &updates);
        assert!((half.0["image.down"].data[0] - 7.2).abs() < 1e-5);
        assert!((half.0["text.down"].data[0] - 8.0 * 300.0 / 301.0).abs() < 1e-4);
        assert_eq!(half.0["text.up"].data[0], 6.0);
    }

    #[test]
    fn normalised_only_the_pattern_within_a_client_counts() {
        let pattern = |i: usize| if i.is_multiple_of(2) { 3.0 } else { 1.0 };
        let reverse = |i: usize| if i.is_multiple_of(2) { 1.0 } else { 3.0 };
        let normalised = FederationSettings { fisher_normalise: true, ..fisher_settings() };
        // The second has 1/64 of the Fisher, being nearer to its fit.
        let updates = |scale: f32| [wide(1, 0.0, pattern), wide(2, 4.0, move |i| scale * reverse(i))];
        let equal = merge(&normalised, &updates(1.0));
        assert_eq!(merge(&normalised, &updates(1.0 / 64.0)), equal);
        assert_eq!(equal, adapters(2, 2, |i| if i.is_multiple_of(2) { 1.0 } else { 3.0 }));
        // As in the paper it would have next to no say.
        let plain = merge(&fisher_settings(), &updates(1.0 / 64.0));
        assert!(plain.0.values().flat_map(|b| &b.data).all(|v| *v < 0.25), "{plain:?}");
    }

    #[test]
    fn a_unit_s_halves_are_mixed_alike() {
        // Unit 0 is the first one's, unit 1 the second one's; the F of `down` (width 2, rank 2) is a thousandth of `up`'s.
        let unit_of = |i: usize| if i % 8 < 4 { i % 4 / 2 } else { i % 2 };
        let fisher = |mine: usize| {
            move |i: usize| {
                let (half, unit) = (if i % 8 < 4 { 1e-3 } else { 1.0 }, if unit_of(i) == mine { 3.0 } else { 1.0 });
                half * unit
            }
        };
        let settings = FederationSettings { fisher_unit: true, ..fisher_settings() };
        let updates = [wide(1, 0.0, fisher(0)), wide(2, 4.0, fisher(1))];
        let expected: Vec<f64> = (0..16).map(|i| if unit_of(i) == 0 { 1.0 } else { 3.0 }).collect();
        near(&merge(&settings, &updates), &expected);
        // Where only `up` tells the clients apart, `down` follows it.
        let up_only = |mine: usize| {
            move |i: usize| match (i % 8 < 4, i % 2 == mine) {
                (true, _) => 1e-3,
                (false, true) => 3.0,
                (false, false) => 1.0,
            }
        };
        let merged = merge(&settings, &[wide(1, 0.0, up_only(0)), wide(2, 4.0, up_only(1))]);
        // Unit 0: (1 + 1.5) and (1 + 0.5) parts, so 4 * 1.5 / 4.
        let expected: Vec<f64> = (0..16).map(|i| if unit_of(i) == 0 { 1.5 } else { 2.5 }).collect();
        near(&merged, &expected);
    }

    /// The worked-out effects of the header in numbers: FedAvg's share of a client against its share of `down`.
    #[test]
    fn more_steps_in_round_one_weigh_down_by_the_square_unless_normalised() {
        // |u| grows with the steps, that is with the samples: 3 times the samples, 9 times the Fisher of `down`.
        let fisher = |steps: f32| move |i: usize| if i % 8 < 4 { 1e-6 * steps * steps } else { 1e-2 };
        let mut updates = [wide(1, 0.0, fisher(1.0)), wide(2, 1.0, fisher(3.0))];
        updates[1].samples = 3;
        let share = |settings: &FederationSettings| merge(settings, &updates).0["text.down"].data[0];
        assert!((share(&fisher_settings()) - 27.0 / 28.0).abs() < 1e-5);
        let normalised = FederationSettings { fisher_normalise: true, ..fisher_settings() };
        assert!((share(&normalised) - 0.75).abs() < 1e-5);
    }
}
