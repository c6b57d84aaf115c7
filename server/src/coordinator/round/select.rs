//! Who is asked in a round: how many, and whom.

use super::Limits;
use fednano_shared::wire::ParticipantId;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Keeps these draws apart from the other uses of the federation's seed.
const DRAW: u64 = 0x6472_6177_2066_6564;

/// Of so many connected: (updates needed, participants asked).
pub(super) fn sizes(limits: &Limits, connected: usize) -> (usize, usize) {
    let needed = round_up(limits.fraction * connected as f64).max(limits.quorum()).min(connected);
    let asked = round_up(needed as f64 * (1.0 + limits.over_selection)).max(needed).min(connected);
    (needed, asked)
}

/// Rounded up, but not for the hair that binary fractions add: 10 x 1.1 is 11, not 12.
fn round_up(x: f64) -> usize {
    (x - 1e-9).ceil().max(0.0) as usize
}

/// These in the order in which the round's draw calls them. Each has a lot of its own, so that the order of two does not depend
/// on who else is there.
pub(super) fn drawn(seed: u64, round: u32, ids: impl Iterator<Item = ParticipantId>) -> Vec<ParticipantId> {
    let mut lots: Vec<(u64, ParticipantId)> = ids.map(|id| (lot(seed, round, id), id)).collect();
    lots.sort_unstable();
    lots.into_iter().map(|(_, id)| id).collect()
}

fn lot(seed: u64, round: u32, id: ParticipantId) -> u64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ DRAW);
    rng.set_stream(u64::from(round) << 32 | u64::from(id.0));
    rng.next_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(fraction: f64, over_selection: f64, min_updates: usize) -> Limits {
        Limits {
            rounds: 1,
            min_participants: 1,
            min_updates,
            fraction,
            over_selection,
            max_staleness: 0,
            deadline: 1,
            grace: 1,
            seed: 1,
        }
    }

    #[test]
    fn shares_are_rounded_up_and_stay_within_what_is_there() {
        assert_eq!(sizes(&limits(1.0, 0.0, 1), 7), (7, 7));
        assert_eq!(sizes(&limits(0.1, 0.0, 1), 10), (1, 1));
        assert_eq!(sizes(&limits(0.07, 0.0, 1), 100), (7, 7)); // in f64 0.07 x 100 is above 7
        assert_eq!(sizes(&limits(1.0, 0.1, 1), 20), (20, 20));
        assert_eq!(sizes(&limits(0.5, 0.1, 1), 20), (10, 11)); // 10 x 1.1 is above 11
        assert_eq!(sizes(&limits(0.25, 0.5, 1), 9), (3, 5));
        assert_eq!(sizes(&limits(0.1, 0.0, 4), 10), (4, 4));
        assert_eq!(sizes(&limits(0.1, 9.0, 4), 5), (4, 5));
        assert_eq!(sizes(&limits(0.5, 0.0, 0), 1), (1, 1));
        assert_eq!(sizes(&limits(f64::NAN, f64::NAN, 1), 3), (1, 1));
    }

    #[test]
    fn everybody_has_the_same_chance_and_rounds_differ() {
        let all = || (1..=10).map(ParticipantId);
        let mut times = [0usize; 10];
        for round in 1..=1000 {
            for id in drawn(7, round, all()).into_iter().take(3) {
                times[id.0 as usize - 1] += 1;
            }
        }
        // 300 expected, standard deviation 14.5.
        assert!(times.iter().all(|t| (230..370).contains(t)), "{times:?}");
        assert_ne!(drawn(7, 1, all()), drawn(7, 2, all()));
        assert_ne!(drawn(7, 1, all()), drawn(8, 1, all()));
    }

    #[test]
    fn the_order_depends_on_nothing_but_seed_and_round() {
        let all = drawn(7, 3, (1..=10).map(ParticipantId));
        assert_eq!(drawn(7, 3, (1..=10).rev().map(ParticipantId)), all);
        let without: Vec<_> = all.iter().copied().filter(|id| id.0 != 4).collect();
        assert_eq!(drawn(7, 3, (1..=10).filter(|i| *i != 4).map(ParticipantId)), without);
    }
}
