use super::*;
use crate::session::features::{FeatureStore, Owner};
use fednano_shared::boundary::{Place, Want};
use fednano_shared::settings::Format;
use fednano_shared::wire::{Matrices, SessionToken};
use tokio::time::timeout;

fn block<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

#[test]
fn room_is_given_back() {
    block(async {
        let room = Room::new(3 * PIECE);
        let short = Duration::from_millis(20);
        let first = room.take(2 * PIECE).await;
        assert!(first.is_some());
        assert!(timeout(short, room.take(PIECE + 1)).await.is_err(), "there was more room than there is");
        let second = timeout(short, room.take(1)).await.unwrap();
        drop((first, second));
        assert!(timeout(short, room.take(3 * PIECE)).await.unwrap().is_some());
        assert!(Room::unlimited().take(usize::MAX).await.is_none());
    });
}

fn packed(fill: u8) -> Arc<Packed> {
    Arc::new(Packed { format: Format::F32, deflated: false, bytes: vec![fill; 1000] })
}

/// A request that lacks these pictures.
fn lacking(id: u64, keys: &[PictureKey]) -> Arrived {
    let input = WireInput::Hidden((*packed(0)).clone());
    let request =
        WireRequest { input, lengths: Vec::new(), targets: Vec::new(), want: Want::Gradient, place: Place::ALONE };
    let (asked, pictures) = (Asked::Judgement, BTreeMap::new());
    let (missing, called_for) = (keys.iter().copied().collect(), keys.len() as u32);
    let since = Instant::now();
    Arrived { id, round: 1, asked, request, up: None, pictures, missing, since, begun: since, called_for }
}

#[test]
fn in_lockstep_nobody_goes_ahead() {
    let ids = |all: &[Arrived]| all.iter().map(|arrived| arrived.id).collect::<Vec<u64>>();
    for (in_order, ready, left) in [(false, vec![1, 3], vec![2]), (true, vec![1], vec![2, 3])] {
        let mut waiting = vec![lacking(1, &[]), lacking(2, &[PictureKey(7)]), lacking(3, &[])];
        assert_eq!(ids(&complete(&mut waiting, in_order)), ready);
        assert_eq!(ids(&waiting), left);
        waiting.iter_mut().for_each(|arrived| arrived.fill(PictureKey(7), &packed(1)));
        assert_eq!(ids(&complete(&mut waiting, in_order)), left);
        assert!(waiting.is_empty());
    }
}

#[test]
fn a_request_holds_what_comes_for_it() {
    let (store, owner) = (FeatureStore::new(1000), Owner::Participant(SessionToken("a".into())));
    store.arrive(&owner);
    let keys = [1, 2, 3].map(PictureKey);
    let mut arrived = lacking(1, &keys[..2]);
    for (fill, key) in (1..).zip(keys) {
        let packed = packed(fill);
        arrived.fill(key, &packed);
        store.insert(&owner, key, packed);
    }
    // The store had room for one; the request has both of its own, and none that it did not ask for.
    assert!(store.get(&owner, keys[0]).is_none() && store.get(&owner, keys[2]).is_some());
    assert!(arrived.missing.is_empty());
    assert_eq!(arrived.pictures, BTreeMap::from([(keys[0], packed(1)), (keys[1], packed(2))]));
    // What comes again later is not mixed in.
    arrived.fill(keys[0], &packed(9));
    assert_eq!(arrived.pictures.get(&keys[0]), Some(&packed(1)));
}

#[test]
fn nothing_waits_for_ever() {
    let ids = |all: &[Arrived]| all.iter().map(|arrived| arrived.id).collect::<Vec<u64>>();
    let mut waiting = vec![lacking(1, &[PictureKey(7)]), lacking(2, &[]), lacking(3, &[PictureKey(8)])];
    assert!(overdue(&mut waiting, Duration::from_secs(3600)).is_empty());
    assert_eq!(ids(&waiting), [1, 2, 3]);
    // What lacks nothing is not late: it stands behind another one. Nor is what waits anew.
    let limit = Duration::from_millis(10);
    let later = Instant::now() + Duration::from_secs(3600);
    std::thread::sleep(2 * limit);
    (waiting[0].begun, waiting[2].since, waiting[2].begun) = (later, later, later);
    assert_eq!(ids(&overdue(&mut waiting, limit)), [1]);
    assert_eq!(ids(&waiting), [2, 3]);
    // But not for ever, whatever comes.
    waiting.iter_mut().for_each(|arrived| (arrived.since, arrived.begun) = (later, Instant::now()));
    assert_eq!(waiting[1].most(limit), limit * (WAITS + 1));
    std::thread::sleep(limit * (WAITS + 1));
    assert_eq!(ids(&overdue(&mut waiting, limit)), [3]);
    assert_eq!(ids(&waiting), [2]);
}

#[test]
fn who_only_asks_asks_for_little_at_once() {
    let of = |lengths: &[u32]| WireRequest { lengths: lengths.to_vec(), ..lacking(1, &[]).request };
    let most = POSITIONS as u32;
    for lengths in [&[] as &[u32], &[1], &[most], &[most - 5, 5]] {
        assert_eq!(within_positions(&of(lengths)), Ok(()), "{lengths:?}");
    }
    for lengths in [&[most + 1] as &[u32], &[most, 1], &[u32::MAX, u32::MAX]] {
        let fault = within_positions(&of(lengths)).unwrap_err();
        assert_eq!(fault.code, FaultCode::TooLarge);
        assert!(fault.cause.contains("may send 8192 at once") && !fault.remedy.is_empty(), "{fault}");
    }
}

#[test]
fn what_comes_deflated_takes_room_twice() {
    assert_eq!([unpacked_bytes(10, false), unpacked_bytes(10, true)], [40, 80]);
    assert_eq!(unpacked_bytes(usize::MAX, true), usize::MAX);
}

#[test]
fn adapters_are_no_larger_than_the_federations() {
    let of = |rank: u32| {
        let codes = Pair { image: None, text: None };
        let input = WireInput::Codes { rows: Vec::new(), rank, codes, up: Matrices::Same };
        WireRequest { input, ..lacking(1, &[]).request }
    };
    let plain = FederationSettings { rank: 4, ..Default::default() };
    let personal = FederationSettings { strategy: Strategy::FedDpaF, ..plain.clone() };
    for (settings, trains, most) in [(&plain, true, 4), (&plain, false, 4), (&personal, true, 4), (&personal, false, 8)]
    {
        for rank in [0, 1, most] {
            assert_eq!(within_rank(&of(rank), settings, trains), Ok(()));
        }
        for rank in [most + 1, u32::MAX] {
            let fault = within_rank(&of(rank), settings, trains).unwrap_err();
            assert_eq!(fault.code, FaultCode::Invalid);
            assert!(fault.cause.contains(&format!("rank {rank}, this federation takes {most}")), "{fault}");
            assert!(!fault.remedy.is_empty());
        }
    }
    assert_eq!(within_rank(&lacking(1, &[]).request, &plain, true), Ok(()));
}

#[test]
fn heavy_work_is_done_in_any_runtime() {
    assert_eq!(heavy(usize::MAX, || 7), 7);
    block(async { assert_eq!(heavy(usize::MAX, || 7), 7) });
    let threads = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let spawned = threads.spawn(async { heavy(usize::MAX, || 7) });
    assert_eq!(threads.block_on(spawned).unwrap(), 7);
}
