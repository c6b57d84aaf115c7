//! Features of pictures that clients have sent, kept for those who sent them: encoded as they came, for all sessions together within
//! one bound. Where room is needed, it is taken first from owners that are away, then from those that have more than their fair share
//! (the bound over the owners that are here), the least recently used picture first: nobody pushes out what others that are here have
//! within theirs. Whoever needs a picture holds it by its `Arc`, so nothing that is under way misses what is dropped; what is missed
//! later is asked for again.

use fednano_shared::wire::SessionToken;
use fednano_shared::wire::numbers::{Packed, PictureKey};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a picture counts for at least, bytes: its entry takes memory too.
const LEAST: usize = 256;
/// Connections that only ask have at most this part of the room, all together: anybody may open any number of them, and whoever trains
/// comes back to its pictures in every round.
const ASKERS: usize = 16;
/// That room is short is said at once, then when so many pictures were lost, and each time that these are twice as many.
const SAID_AGAIN: u64 = 1 << 10;

/// Whose pictures they are. Keys are short hashes, and features are private: nobody is given another's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A participant, over all its connections.
    Participant(SessionToken),
    /// A connection that only asks, by a number of its own.
    Connection(u64),
}

/// The features of all sessions.
pub struct FeatureStore {
    capacity: usize,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    participants: Rack,
    /// Connections that only ask.
    askers: Rack,
}

/// The pictures of owners that share some room.
#[derive(Default)]
struct Rack {
    shelves: HashMap<Owner, Shelf>,
    /// Open connections of each owner that has some. Whoever has none may never come back.
    here: HashMap<Owner, usize>,
    bytes: usize,
    clock: u64,
    /// Pictures of owners that are here which were dropped, or not kept, for want of room.
    lost: u64,
}

/// The pictures of one owner; it has some.
#[derive(Default)]
struct Shelf {
    pictures: BTreeMap<PictureKey, Entry>,
    /// By last use.
    order: BTreeMap<u64, PictureKey>,
    bytes: usize,
}

struct Entry {
    packed: Arc<Packed>,
    used: u64,
}

fn size(packed: &Packed) -> usize {
    packed.bytes.len().max(LEAST)
}

impl Held {
    fn rack(&mut self, owner: &Owner) -> &mut Rack {
        match owner {
            Owner::Participant(_) => &mut self.participants,
            Owner::Connection(_) => &mut self.askers,
        }
    }

    /// Keep a picture, if there is room for it in `all` or can be made.
    fn insert(&mut self, owner: &Owner, key: PictureKey, packed: Arc<Packed>, all: usize) {
        self.rack(owner).remove(owner, key);
        let (bytes, Self { participants, askers }) = (size(&packed), self);
        let (rack, capacity) = match owner {
            Owner::Participant(_) => (&mut *participants, all.saturating_sub(askers.bytes)),
            Owner::Connection(_) => (&mut *askers, all / ASKERS),
        };
        // What is larger than all of the room is not kept, and no other picture is dropped for it.
        if bytes > capacity || !rack.make_room(Some(owner), bytes, capacity) {
            rack.lost += 1;
            return;
        }
        rack.put(owner, key, packed);
        // What askers have, participants have not. Somebody is above the share where all together are above the bound.
        participants.make_room(None, 0, all.saturating_sub(askers.bytes));
    }
}

impl Rack {
    fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn remove(&mut self, owner: &Owner, key: PictureKey) {
        let Some(shelf) = self.shelves.get_mut(owner) else { return };
        let Some(entry) = shelf.pictures.remove(&key) else { return };
        let bytes = size(&entry.packed);
        shelf.order.remove(&entry.used);
        shelf.bytes -= bytes;
        self.bytes -= bytes;
        if shelf.pictures.is_empty() {
            self.shelves.remove(owner);
        }
    }

    /// Put in a picture that is not here.
    fn put(&mut self, owner: &Owner, key: PictureKey, packed: Arc<Packed>) {
        let (used, bytes) = (self.now(), size(&packed));
        let shelf = self.shelves.entry(owner.clone()).or_default();
        shelf.order.insert(used, key);
        shelf.pictures.insert(key, Entry { packed, used });
        shelf.bytes += bytes;
        self.bytes += bytes;
    }

    /// Drop pictures until `bytes` more fit into `capacity`, as one of this owner (none: nobody's). False: they would fit only at the
    /// cost of what others have within their share.
    fn make_room(&mut self, owner: Option<&Owner>, bytes: usize, capacity: usize) -> bool {
        while bytes > capacity || self.bytes > capacity - bytes {
            let Some((victim, key)) = self.victim(owner, bytes, capacity) else { return false };
            self.remove(&victim, key);
            self.lost += u64::from(self.here.contains_key(&victim));
        }
        true
    }

    /// The picture to go first: of the owners that are away, then of those that have more than their share, counting what is to come;
    /// of these the least recently used.
    fn victim(&self, wants: Option<&Owner>, bytes: usize, capacity: usize) -> Option<(Owner, PictureKey)> {
        let here = |owner: &Owner| self.here.contains_key(owner);
        let newcomer = wants.is_some_and(|owner| !self.shelves.contains_key(owner));
        let sharing = self.shelves.keys().filter(|owner| here(owner)).count() + usize::from(newcomer);
        let share = capacity / sharing.max(1);
        let exceeds = |owner: &Owner, shelf: &Shelf| {
            let coming = if wants == Some(owner) { bytes } else { 0 };
            shelf.bytes.saturating_add(coming) > share
        };
        let may_go = self.shelves.iter().filter(|(owner, shelf)| !here(owner) || exceeds(owner, shelf));
        let oldest = may_go.filter_map(|(owner, shelf)| Some((owner, shelf.order.first_key_value()?)));
        let (owner, (_, key)) = oldest.min_by_key(|(owner, (used, _))| (here(owner), **used))?;
        Some((owner.clone(), *key))
    }

    /// That the room is too small, for whoever can give more.
    fn shortage(&self) -> String {
        let pictures: usize = self.shelves.values().map(|shelf| shelf.pictures.len()).sum();
        format!(
            "participants' features of {} pictures found no room or were dropped, {pictures} with {} MiB are kept; what is missed is \
             sent again whenever it is needed: give --feature-cache more MiB, or the federation a coarser feature_format",
            self.lost,
            self.bytes >> 20
        )
    }
}

/// Is it to be said that so many pictures were lost?
fn worth_saying(lost: u64) -> bool {
    lost == 1 || (lost >= SAID_AGAIN && lost.is_power_of_two())
}

impl FeatureStore {
    /// Room for so many bytes of encoded features; 0: nothing is kept, and all is asked for again.
    pub fn new(bytes: usize) -> Self {
        Self { capacity: bytes, held: Mutex::default() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // No panic can leave it half changed.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A picture of this owner's, if it is still here; it counts as used.
    pub fn get(&self, owner: &Owner, key: PictureKey) -> Option<Arc<Packed>> {
        let mut held = self.held();
        let rack = held.rack(owner);
        let now = rack.now();
        let shelf = rack.shelves.get_mut(owner)?;
        let entry = shelf.pictures.get_mut(&key)?;
        let (before, packed) = (std::mem::replace(&mut entry.used, now), entry.packed.clone());
        shelf.order.remove(&before);
        shelf.order.insert(now, key);
        Some(packed)
    }

    /// A connection of this owner has begun.
    pub fn arrive(&self, owner: &Owner) {
        *self.held().rack(owner).here.entry(owner.clone()).or_default() += 1;
    }

    /// One has ended. What an owner has that is away stays only as long as nobody else needs the room.
    pub fn depart(&self, owner: &Owner) {
        let mut held = self.held();
        let here = &mut held.rack(owner).here;
        if let Some(open) = here.get_mut(owner) {
            *open -= 1;
            if *open == 0 {
                here.remove(owner);
            }
        }
    }

    /// Keep a picture, if there is room for it or can be made; where there is not enough for participants, the operator is told.
    pub fn insert(&self, owner: &Owner, key: PictureKey, packed: Arc<Packed>) {
        let mut held = self.held();
        let before = held.participants.lost;
        held.insert(owner, key, packed, self.capacity);
        let participants = &held.participants;
        let words = (before + 1..=participants.lost).any(worth_saying).then(|| participants.shortage());
        drop(held); // a log may be slow
        if let Some(words) = words {
            tracing::warn!("{words}");
        }
    }

    /// This owner needs its pictures no more.
    pub fn forget(&self, owner: &Owner) {
        let mut held = self.held();
        let rack = held.rack(owner);
        if let Some(shelf) = rack.shelves.remove(owner) {
            rack.bytes -= shelf.bytes;
        }
    }

    /// Pictures, and the bytes that they count for.
    pub fn size(&self) -> (usize, usize) {
        let held = self.held();
        let racks = [&held.participants, &held.askers];
        let pictures = racks.iter().flat_map(|rack| rack.shelves.values()).map(|shelf| shelf.pictures.len()).sum();
        (pictures, racks.iter().map(|rack| rack.bytes).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fednano_shared::settings::Format;

    fn packed(bytes: usize, fill: u8) -> Arc<Packed> {
        Arc::new(Packed { format: Format::F32, deflated: false, bytes: vec![fill; bytes] })
    }

    fn owner(name: &str) -> Owner {
        Owner::Participant(SessionToken(name.into()))
    }

    /// One that is here.
    fn arrived(store: &FeatureStore, owner: Owner) -> Owner {
        store.arrive(&owner);
        owner
    }

    /// A store of this size, and owners that are here.
    fn with<const N: usize>(bytes: usize, names: [&str; N]) -> (FeatureStore, [Owner; N]) {
        let store = FeatureStore::new(bytes);
        let owners = names.map(|name| arrived(&store, owner(name)));
        (store, owners)
    }

    /// Put in pictures of 1,000 bytes with these keys.
    fn put(store: &FeatureStore, owner: &Owner, keys: std::ops::Range<u64>) {
        keys.for_each(|key| store.insert(owner, PictureKey(key), packed(1000, 0)));
    }

    /// Keys of this owner's pictures; asking for them does not count as use.
    fn here(store: &FeatureStore, owner: &Owner) -> Vec<u64> {
        let mut held = store.held();
        let shelf = held.rack(owner).shelves.get(owner);
        shelf.map_or_else(Vec::new, |shelf| shelf.pictures.keys().map(|key| key.0).collect())
    }

    #[test]
    fn the_least_recently_used_is_dropped_first() {
        let (store, [a, b]) = with(3000, ["a", "b"]);
        for key in 1..=2 {
            store.insert(&a, PictureKey(key), packed(1000, key as u8));
        }
        store.insert(&b, PictureKey(1), packed(1000, 9));
        assert_eq!(store.size(), (3, 3000));
        // The same key of another owner is another picture.
        assert_eq!(store.get(&a, PictureKey(1)), Some(packed(1000, 1)));
        assert_eq!(store.get(&b, PictureKey(1)), Some(packed(1000, 9)));
        assert_eq!(store.get(&b, PictureKey(2)), None);
        // The second has not been used since.
        let held = store.get(&a, PictureKey(1)).unwrap();
        store.insert(&b, PictureKey(3), packed(500, 3));
        assert_eq!(store.get(&a, PictureKey(2)), None);
        assert_eq!(store.size(), (3, 2500));
        // Alone, an owner has all the room: the others go for a large one. Who holds one has it still.
        store.forget(&b);
        store.insert(&a, PictureKey(4), packed(3000, 4));
        assert_eq!((store.size(), store.get(&a, PictureKey(1))), ((1, 3000), None));
        assert_eq!(held, packed(1000, 1));
        // Too large: not kept, and nothing is dropped for it.
        store.insert(&a, PictureKey(5), packed(3001, 5));
        assert_eq!((store.size(), store.get(&a, PictureKey(5))), ((1, 3000), None));
        assert!(store.get(&a, PictureKey(4)).is_some());
    }

    #[test]
    fn nobody_pushes_out_what_others_have_within_their_share() {
        let (store, [greedy, modest, third]) = with(6000, ["greedy", "modest", "third"]);
        put(&store, &modest, 1..3);
        put(&store, &greedy, 1..5);
        assert_eq!(store.size(), (6, 6000));
        // The modest one's are the oldest, and stay.
        put(&store, &greedy, 5..50);
        assert_eq!((here(&store, &modest), here(&store, &greedy)), (vec![1, 2], vec![46, 47, 48, 49]));
        // It is given its share from what the other has beyond its own, and no more.
        put(&store, &modest, 3..10);
        assert_eq!((here(&store, &modest), here(&store, &greedy)), (vec![7, 8, 9], vec![47, 48, 49]));
        // A third one: a third each.
        put(&store, &third, 1..10);
        assert_eq!((here(&store, &modest), here(&store, &greedy)), (vec![8, 9], vec![48, 49]));
        assert_eq!((here(&store, &third), store.size()), (vec![8, 9], (6, 6000)));
        // Who is gone leaves its room to the others.
        store.forget(&greedy);
        put(&store, &modest, 10..20);
        assert_eq!((here(&store, &modest), here(&store, &third)), (vec![16, 17, 18, 19], vec![8, 9]));
    }

    #[test]
    fn of_several_above_their_share_the_oldest_picture_goes() {
        // Four owners, for whom there is not a picture each: a picture has been used, so it stays.
        let (store, owners) = with(3500, ["a", "b", "c", "d"]);
        for one in &owners[..3] {
            put(&store, one, 1..2);
        }
        assert!(store.get(&owners[0], PictureKey(1)).is_some());
        put(&store, &owners[3], 1..2);
        assert_eq!(owners.each_ref().map(|one| here(&store, one).len()), [1, 0, 1, 1]);
        // What would fit only at the cost of others' shares is not kept, and takes nothing from them.
        let (store, [a, b, c]) = with(3000, ["a", "b", "c"]);
        put(&store, &a, 1..2);
        put(&store, &b, 1..2);
        store.insert(&c, PictureKey(1), packed(1500, 0));
        assert_eq!([a, b, c].map(|one| here(&store, &one).len()), [1, 1, 0]);
    }

    #[test]
    fn who_is_away_has_no_share() {
        let (store, [gone, stays]) = with(6000, ["gone", "stays"]);
        put(&store, &stays, 1..3);
        put(&store, &gone, 1..5);
        // One of its two connections has ended.
        store.arrive(&gone);
        store.depart(&gone);
        put(&store, &stays, 3..5);
        assert_eq!((here(&store, &gone), here(&store, &stays)), (vec![2, 3, 4], vec![2, 3, 4]));
        // Away, it keeps what nobody needs the room for.
        store.depart(&gone);
        put(&store, &stays, 5..7);
        assert_eq!((here(&store, &gone), here(&store, &stays)), (vec![4], vec![2, 3, 4, 5, 6]));
        assert!(store.get(&gone, PictureKey(4)).is_some());
        put(&store, &stays, 7..9);
        assert_eq!((here(&store, &gone), here(&store, &stays)), (vec![], vec![3, 4, 5, 6, 7, 8]));
        // It comes back to its share.
        store.arrive(&gone);
        put(&store, &gone, 1..10);
        assert_eq!((here(&store, &gone), here(&store, &stays)), (vec![7, 8, 9], vec![6, 7, 8]));
    }

    #[test]
    fn who_is_away_gives_before_who_has_too_much() {
        let (store, [large, gone, new]) = with(4000, ["large", "gone", "new"]);
        put(&store, &large, 1..4);
        put(&store, &gone, 1..2);
        store.depart(&gone);
        put(&store, &new, 1..2);
        assert_eq!([&large, &gone, &new].map(|one| here(&store, one).len()), [3, 0, 1]);
        put(&store, &new, 2..3);
        assert_eq!([&large, &gone, &new].map(|one| here(&store, one).len()), [2, 0, 2]);
    }

    #[test]
    fn participants_that_are_here_and_lose_pictures_are_counted() {
        let (store, [a, b]) = with(3000, ["a", "b"]);
        let lost = || store.held().participants.lost;
        put(&store, &b, 1..4);
        store.depart(&b);
        put(&store, &a, 1..4);
        assert_eq!(lost(), 0, "nobody who is here has lost any");
        put(&store, &a, 4..6);
        assert_eq!(lost(), 2);
        store.insert(&a, PictureKey(9), packed(3001, 0));
        assert_eq!(lost(), 3, "what is not kept is lost");
        store.insert(&arrived(&store, Owner::Connection(1)), PictureKey(1), packed(1000, 0));
        assert_eq!(lost(), 3, "askers have their part");
        let words = store.held().participants.shortage();
        let all = ["of 3 pictures", "3 with 0 MiB", "--feature-cache", "feature_format"];
        assert!(all.iter().all(|word| words.contains(word)), "{words}");
        let said: Vec<u64> = (0..5000).filter(|lost| worth_saying(*lost)).collect();
        assert_eq!(said, [1, 1024, 2048, 4096]);
    }

    #[test]
    fn who_only_asks_has_a_small_part() {
        let (store, [trains]) = with(32_000, ["a"]);
        let asking = |number: u64| Owner::Connection(number);
        (0..=30).for_each(|number| store.arrive(&asking(number)));
        put(&store, &trains, 1..40);
        assert_eq!(store.size(), (32, 32_000));
        // Two pictures, of however many connections; a participant has the rest.
        for number in 0..20 {
            put(&store, &asking(number), 1..10);
        }
        let asked: usize = (0..20).map(|number| here(&store, &asking(number)).len()).sum();
        assert_eq!((asked, here(&store, &trains).len(), store.size()), (2, 30, (32, 32_000)));
        put(&store, &trains, 40..80);
        assert_eq!((store.size(), here(&store, &trains).len()), ((32, 32_000), 30));
        // A picture that is too large for the part is not kept, and takes nobody's place.
        store.insert(&asking(30), PictureKey(1), packed(2001, 0));
        assert_eq!((here(&store, &asking(30)).len(), store.size()), (0, (32, 32_000)));
        (0..20).for_each(|number| store.forget(&asking(number)));
        put(&store, &trains, 80..90);
        assert_eq!((store.size(), here(&store, &trains).len()), ((32, 32_000), 32));
    }

    #[test]
    fn what_is_sent_again_takes_its_own_place() {
        let (store, [a]) = with(2000, ["a"]);
        store.insert(&a, PictureKey(1), packed(1000, 1));
        store.insert(&a, PictureKey(2), packed(1000, 2));
        store.insert(&a, PictureKey(1), packed(900, 3));
        assert_eq!((store.size(), store.get(&a, PictureKey(1))), ((2, 1900), Some(packed(900, 3))));
        store.insert(&a, PictureKey(3), packed(1000, 4));
        assert!(store.get(&a, PictureKey(1)).is_some() && store.get(&a, PictureKey(2)).is_none());
    }

    #[test]
    fn owners_are_forgotten_alone_and_small_ones_count() {
        let (store, [one, two]) = with(10 * LEAST, ["one", "two"]);
        for key in 0..50 {
            store.insert(&one, PictureKey(key), packed(1, 0));
        }
        assert_eq!(store.size(), (10, 10 * LEAST));
        store.insert(&two, PictureKey(1), packed(1, 0));
        store.forget(&one);
        assert_eq!(store.size(), (1, LEAST));
        store.forget(&one);
        assert!(store.get(&two, PictureKey(1)).is_some());
        let none = FeatureStore::new(0);
        none.insert(&one, PictureKey(1), packed(1, 0));
        assert_eq!((none.size(), none.get(&one, PictureKey(1))), ((0, 0), None));
    }
}
