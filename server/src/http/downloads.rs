//! Downloads of edge weights: who downloads makes up an id, names it with each request, and names it again when it joins. So the
//! bytes that the server has sent are those of a participant, without asking the participant how many they were.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Ids known at once; beyond that, the one that was used least recently is forgotten. Strangers can make up as many as they like.
const MOST: usize = 10_000;
/// An id that nobody has used for so long is forgotten.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// All downloads under way, and those whose participants may still come.
#[derive(Debug, Default)]
pub(super) struct Downloads(Mutex<BTreeMap<String, Download>>);

#[derive(Debug)]
struct Download {
    sent: Arc<AtomicU64>,
    claimed: u64,
    used: Instant,
}

impl Downloads {
    /// Where bytes under this id are counted; none: it is no id (32 hexadecimal digits).
    pub(super) fn of(&self, id: &str) -> Option<Arc<AtomicU64>> {
        self.of_at(id, Instant::now())
    }

    fn of_at(&self, id: &str, now: Instant) -> Option<Arc<AtomicU64>> {
        if id.len() != 32 || !id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let mut all = self.lock();
        if !all.contains_key(id) && all.len() >= MOST {
            all.retain(|_, download| now.saturating_duration_since(download.used) < KEPT);
            let oldest = all.iter().min_by_key(|(_, download)| download.used).map(|(id, _)| id.clone());
            if let Some(oldest) = oldest.filter(|_| all.len() >= MOST) {
                all.remove(&oldest);
            }
        }
        let download =
            all.entry(id.to_owned()).or_insert_with(|| Download { sent: Arc::default(), claimed: 0, used: now });
        download.used = now;
        Some(download.sent.clone())
    }

    /// Bytes sent under this id since they were claimed last; none: it is not known, or no more. Each byte is claimed once, however
    /// often a participant comes back.
    pub(super) fn claim(&self, id: &str) -> Option<u64> {
        let mut all = self.lock();
        let download = all.get_mut(id)?;
        let sent = download.sent.load(Ordering::Relaxed);
        let fresh = sent.saturating_sub(download.claimed);
        (download.claimed, download.used) = (sent, Instant::now());
        Some(fresh)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Download>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: usize) -> String {
        format!("{number:032x}")
    }

    fn send(downloads: &Downloads, id: &str, bytes: u64) {
        downloads.of(id).unwrap().fetch_add(bytes, Ordering::Relaxed);
    }

    #[test]
    fn each_byte_is_claimed_once() {
        let downloads = Downloads::default();
        assert_eq!(downloads.claim(&id(1)), None);
        send(&downloads, &id(1), 100);
        send(&downloads, &id(1), 20);
        send(&downloads, &id(2), 7);
        assert_eq!([downloads.claim(&id(1)), downloads.claim(&id(1))], [Some(120), Some(0)]);
        send(&downloads, &id(1), 5);
        assert_eq!([downloads.claim(&id(1)), downloads.claim(&id(2))], [Some(5), Some(7)]);
        for wrong in ["", "abc", &"g".repeat(32), &"a".repeat(33), "..%2f"] {
            assert!(downloads.of(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn there_are_never_too_many() {
        let (downloads, start) = (Downloads::default(), Instant::now());
        let at = |number: usize| start + Duration::from_secs(number as u64);
        for number in 0..MOST {
            downloads.of_at(&id(number), at(number)).unwrap();
        }
        downloads.of_at(&id(0), at(MOST)).unwrap(); // used again
        downloads.of_at(&id(MOST), at(MOST)).unwrap();
        assert_eq!(downloads.lock().len(), MOST);
        assert!(downloads.claim(&id(1)).is_none() && downloads.claim(&id(0)).is_some());
        // A day later nobody comes for them any more.
        downloads.of_at(&id(MOST + 1), at(2 * MOST) + KEPT).unwrap();
        assert_eq!(downloads.lock().keys().cloned().collect::<Vec<_>>(), [id(MOST + 1)]);
    }
}
