//! Features of pictures that clients have sent, kept for those who sent them: encoded as they came, for all sessions together within
//! one bound. Where room is needed, it is taken from owners that have more than their fair share (the bound over the owners), the least
//! recently used picture first: nobody pushes out what others have within theirs. Whoever needs a picture holds it by its `Arc`, so
//! nothing that is under way misses what is dropped; what is missed later is asked for again.

use fednano_shared::wire::SessionToken;
use fednano_shared::wire::numbers::{Packed, PictureKey};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a picture counts for at least, bytes: its entry takes memory too.
const LEAST: usize = 256;
/// Connections that only ask have at most this part of the room, all together: anybody may open any number of them, and whoever trains
/// comes back to its pictures in every round.
const ASKERS: usize = 16;

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
    bytes: usize,
    clock: u64,
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
        }
        true
    }

    /// The picture to go first: of the owners that have more than their share, counting what is to come, the least recently used.
    fn victim(&self, wants: Option<&Owner>, bytes: usize, capacity: usize) -> Option<(Owner, PictureKey)> {
        let newcomer = wants.is_some_and(|owner| !self.shelves.contains_key(owner));
        let share = capacity / (self.shelves.len() + usize::from(newcomer)).max(1);
        let coming = |owner: &Owner| if wants == Some(owner) { bytes } else { 0 };
        let above = self.shelves.iter().filter(|(owner, shelf)| shelf.bytes.saturating_add(coming(owner)) > share);
        let oldest = above.filter_map(|(owner, shelf)| Some((owner, shelf.order.first_key_value()?)));
        let (owner, (_, key)) = oldest.min_by_key(|(_, (used, _))| **used)?;
        Some((owner.clone(), *key))
    }
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

    /// Keep a picture, if there is room for it or can be made.
    pub fn insert(&self, owner: &Owner, key: PictureKey, packed: Arc<Packed>) {
        let mut held = self.held();
        held.rack(owner).remove(owner, key);
        let (bytes, Held { participants, askers }) = (size(&packed), &mut *held);
        let (rack, capacity) = match owner {
            Owner::Participant(_) => (&mut *participants, self.capacity.saturating_sub(askers.bytes)),
            Owner::Connection(_) => (&mut *askers, self.capacity / ASKERS),
        };
        // For what does not fit anyway nothing is dropped.
        if bytes > capacity || !rack.make_room(Some(owner), bytes, capacity) {
            return;
        }
        rack.put(owner, key, packed);
        // What askers have, participants have not. Somebody is above the share where all together are above the bound.
        participants.make_room(None, 0, self.capacity.saturating_sub(askers.bytes));
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
        let (store, a, b) = (FeatureStore::new(3000), owner("a"), owner("b"));
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
        let (store, greedy, modest) = (FeatureStore::new(6000), owner("greedy"), owner("modest"));
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
        put(&store, &owner("third"), 1..10);
        assert_eq!((here(&store, &modest), here(&store, &greedy)), (vec![8, 9], vec![48, 49]));
        assert_eq!((here(&store, &owner("third")), store.size()), (vec![8, 9], (6, 6000)));
        // Who is gone leaves its room to the others.
        store.forget(&greedy);
        put(&store, &modest, 10..20);
        assert_eq!((here(&store, &modest), here(&store, &owner("third"))), (vec![16, 17, 18, 19], vec![8, 9]));
    }

    #[test]
    fn of_several_above_their_share_the_oldest_picture_goes() {
        // Four owners, for whom there is not a picture each: a picture has been used, so it stays.
        let (store, owners) = (FeatureStore::new(3500), ["a", "b", "c", "d"].map(owner));
        for one in &owners[..3] {
            put(&store, one, 1..2);
        }
        assert!(store.get(&owners[0], PictureKey(1)).is_some());
        put(&store, &owners[3], 1..2);
        assert_eq!(owners.each_ref().map(|one| here(&store, one).len()), [1, 0, 1, 1]);
        // What would fit only at the cost of others' shares is not kept, and takes nothing from them.
        let (store, [a, b, c, _]) = (FeatureStore::new(3000), owners);
        put(&store, &a, 1..2);
        put(&store, &b, 1..2);
        store.insert(&c, PictureKey(1), packed(1500, 0));
        assert_eq!([a, b, c].map(|one| here(&store, &one).len()), [1, 1, 0]);
    }

    #[test]
    fn who_only_asks_has_a_small_part() {
        let (store, trains) = (FeatureStore::new(32_000), owner("a"));
        let asking = |number: u64| Owner::Connection(number);
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
        let (store, a) = (FeatureStore::new(2000), owner("a"));
        store.insert(&a, PictureKey(1), packed(1000, 1));
        store.insert(&a, PictureKey(2), packed(1000, 2));
        store.insert(&a, PictureKey(1), packed(900, 3));
        assert_eq!((store.size(), store.get(&a, PictureKey(1))), ((2, 1900), Some(packed(900, 3))));
        store.insert(&a, PictureKey(3), packed(1000, 4));
        assert!(store.get(&a, PictureKey(1)).is_some() && store.get(&a, PictureKey(2)).is_none());
    }

    #[test]
    fn owners_are_forgotten_alone_and_small_ones_count() {
        let (store, one, two) = (FeatureStore::new(10 * LEAST), owner("one"), owner("two"));
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
