//! Features of pictures that clients have sent, kept for those who sent them: encoded as they came, for all sessions together within
//! one bound, the least recently used dropped first. Whoever needs a picture holds it by its `Arc`, so nothing that is under way
//! misses what is dropped; what is missed later is asked for again.

use fednano_shared::wire::SessionToken;
use fednano_shared::wire::numbers::{Packed, PictureKey};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a picture counts for at least, bytes: its entry takes memory too.
const LEAST: usize = 256;

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
    pictures: HashMap<Owner, BTreeMap<PictureKey, Entry>>,
    /// By last use.
    order: BTreeMap<u64, (Owner, PictureKey)>,
    bytes: usize,
    clock: u64,
}

struct Entry {
    packed: Arc<Packed>,
    used: u64,
}

fn size(packed: &Packed) -> usize {
    packed.bytes.len().max(LEAST)
}

impl Held {
    fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn remove(&mut self, owner: &Owner, key: PictureKey) {
        let Some(pictures) = self.pictures.get_mut(owner) else { return };
        if let Some(entry) = pictures.remove(&key) {
            self.order.remove(&entry.used);
            self.bytes -= size(&entry.packed);
        }
        if pictures.is_empty() {
            self.pictures.remove(owner);
        }
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
        let now = held.now();
        let entry = held.pictures.get_mut(owner)?.get_mut(&key)?;
        let (before, packed) = (std::mem::replace(&mut entry.used, now), entry.packed.clone());
        held.order.remove(&before);
        held.order.insert(now, (owner.clone(), key));
        Some(packed)
    }

    /// Keep a picture, and drop what has not been used for longest until all fits.
    pub fn insert(&self, owner: &Owner, key: PictureKey, packed: Arc<Packed>) {
        let mut held = self.held();
        held.remove(owner, key);
        let bytes = size(&packed);
        if bytes > self.capacity {
            return; // nothing else is dropped for what does not fit anyway
        }
        while held.bytes > self.capacity - bytes {
            let Some((_, (owner, key))) = held.order.pop_first() else { break };
            held.remove(&owner, key);
        }
        let used = held.now();
        held.bytes += bytes;
        held.order.insert(used, (owner.clone(), key));
        held.pictures.entry(owner.clone()).or_default().insert(key, Entry { packed, used });
    }

    /// This owner needs its pictures no more.
    pub fn forget(&self, owner: &Owner) {
        let mut held = self.held();
        for entry in held.pictures.remove(owner).unwrap_or_default().into_values() {
            held.order.remove(&entry.used);
            held.bytes -= size(&entry.packed);
        }
    }

    /// Pictures, and the bytes that they count for.
    pub fn size(&self) -> (usize, usize) {
        let held = self.held();
        (held.order.len(), held.bytes)
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
        // All others go for a large one; who holds one has it still.
        store.insert(&b, PictureKey(4), packed(3000, 4));
        assert_eq!((store.size(), store.get(&a, PictureKey(1))), ((1, 3000), None));
        assert_eq!(held, packed(1000, 1));
        // Too large: not kept, and nothing is dropped for it.
        store.insert(&a, PictureKey(5), packed(3001, 5));
        assert_eq!((store.size(), store.get(&a, PictureKey(5))), ((1, 3000), None));
        assert!(store.get(&b, PictureKey(4)).is_some());
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
        let (store, one, two) = (FeatureStore::new(10 * LEAST), Owner::Connection(1), Owner::Connection(2));
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
