// Where the bundle's bytes come from, in order: kept on this device (OPFS), or passing through memory where that is impossible.
// Both: survey(), start(), take(entry, use), abandon(), tidy().
import { Damaged, MemoryPart, addressOf, sha256, transfer } from './fetching.js';
import { bytes } from './units.js';
import { exclusively } from './opfs.js';

const PARALLEL = 4;

/** At most `count` of the actions given to it run at once, in the order in which they came. */
function limiter(count) {
  const waiting = [];
  let running = 0;
  const next = () => {
    if (running >= count || waiting.length === 0) return;
    running += 1;
    const { action, yes, no } = waiting.shift();
    action().then(yes, no).finally(() => {
      running -= 1;
      next();
    });
  };
  return (action) => new Promise((yes, no) => (waiting.push({ action, yes, no }), next()));
}

function damagedTwice(entry, why) {
  return new Error(`${entry.name} (SHA-256 ${entry.sha256}, ${entry.bytes} bytes) arrived damaged twice: ${why}; reload, and if it stays so tell the operator to check the server's files and any proxy`);
}

/** Through OPFS: up to four downloads at once, verified, then read back one by one. */
export class StoredSource {
  constructor(store, tally, say) {
    this.store = store;
    this.tally = tally;
    this.say = say;
    this.control = new AbortController();
    this.ready = new Map();
    this.network = limiter(PARALLEL);
    /** One whole piece in memory at a time, be it to verify or to hand on. */
    this.whole = limiter(1);
    this.failure = null;
  }

  /** What is here already. Whether it is sound shows when it is read. */
  async survey() {
    for (const entry of this.tally.entries) {
      const size = await this.store.size(entry);
      const part = size === entry.bytes ? -1 : await this.store.size(entry, '.part');
      this.tally.found(entry, size === entry.bytes ? size : part > 0 && part <= entry.bytes ? part : 0, size === entry.bytes);
    }
  }

  start() {
    for (const entry of this.tally.entries) {
      const ready = entry.complete ? Promise.resolve() : this.network(() => this.obtain(entry));
      this.ready.set(entry.sha256, ready);
      // The first failure ends the rest; it is reported by `take` or `abandon`.
      ready.catch((e) => this.fail(e));
    }
  }

  fail(e) {
    this.failure ??= e;
    this.control.abort(this.failure);
  }

  /** Verified bytes to `use`. A kept piece that was damaged is fetched anew. */
  async take(entry, use) {
    const known = this.tally.of(entry);
    const ready = this.ready.get(entry.sha256);
    for (const last of [false, true]) {
      await ready;
      const used = await this.whole(async () => {
        const data = await this.store.read(known);
        if (!data || (await sha256(data)) !== known.sha256) return null;
        return { result: await use(data) };
      });
      if (used) return used.result;
      if (!last) this.say('damaged', { name: known.name, sha256: known.sha256, why: 'what this device kept of it is damaged' });
      if (!last) await this.network(() => this.obtain(known, true));
    }
    throw new Error(`${entry.name} (${bytes(entry.bytes)}) cannot be read back from this device's storage; press "Delete the stored model" and reload, or add edge=memory to the address`);
  }

  /** Download, verify, name. With `distrust`, what is there is verified first: another tab may have replaced it. */
  async obtain(entry, distrust = false) {
    const { signal } = this.control;
    signal.throwIfAborted();
    const busy = () => this.say('waiting', { name: entry.name });
    const action = () => this.obtainAlone(entry, distrust, busy);
    // First without waiting, so that waiting can be said.
    let entered = false;
    const enter = () => ((entered = true), action());
    await exclusively(entry.sha256, enter, { ifAvailable: true });
    if (entered) return;
    busy();
    await exclusively(entry.sha256, action, { signal });
  }

  async obtainAlone(entry, distrust, busy) {
    if ((await this.store.size(entry)) === entry.bytes) {
      if (!distrust || (await this.sound(entry))) {
        this.tally.found(entry, entry.bytes, true);
        return;
      }
    }
    await this.store.remove(entry);
    for (let round = 1; ; round++) {
      const why = await this.fill(entry, busy);
      if (why === null) return;
      if (why === '') break;
      this.say('damaged', { name: entry.name, sha256: entry.sha256, why });
      this.tally.restart(entry);
      await this.store.remove(entry, '.part');
      if (round === 2) throw damagedTwice(entry, why);
    }
    await this.store.adopt(entry);
    this.tally.complete(entry);
  }

  /** The part gets all its bytes. '' if they are right, else what is wrong; null if another tab did it all. */
  async fill(entry, busy) {
    const part = await this.store.openPart(entry, busy, this.control.signal);
    if (!part) {
      this.tally.found(entry, entry.bytes, true);
      return null;
    }
    try {
      if (part.size > entry.bytes) part.clear();
      this.tally.found(entry, part.size, false);
      // Kept here, so the HTTP cache need not keep it too.
      await transfer(entry, part, { cache: 'no-store', signal: this.control.signal, heard: this.tally.heard(entry) });
    } catch (e) {
      if (e instanceof Damaged) return e.message;
      throw e;
    } finally {
      part.close();
    }
    return (await this.sound(entry, '.part')) ? '' : 'its SHA-256 differs from the one in the manifest';
  }

  sound(entry, suffix = '') {
    return this.whole(async () => {
      const data = await this.store.read(entry, suffix);
      return data !== null && (await sha256(data)) === entry.sha256;
    });
  }

  /** After a failure: end all downloads and let go of their parts; the error to report. */
  async abandon(e) {
    this.fail(e);
    await Promise.allSettled(this.ready.values());
    if (!(this.failure instanceof DOMException)) return this.failure;
    if (this.failure.name === 'QuotaExceededError') {
      const [have, all] = [this.tally.sum('have'), this.tally.all];
      return new Error(`the storage for this page became full at ${bytes(have)} (${have} of ${all} bytes) of the model; free storage on this device and reload, the download then goes on where it stopped`);
    }
    return new Error(`this browser's storage failed (${this.failure.name}: ${this.failure.message}); close other tabs of this page and reload, or add edge=memory to the address`);
  }

  /** Only this manifest's entries are of use on the next visit, so nothing else is kept. */
  async tidy() {
    await this.store.keepOnly(this.tally.entries);
  }
}

/** Through memory and the HTTP cache, one after the other. */
export class MemorySource {
  constructor(tally, verify, say) {
    this.tally = tally;
    this.verify = verify;
    this.say = say;
    this.control = new AbortController();
  }

  async survey() {}
  start() {}
  async tidy() {}
  async abandon(e) {
    return e;
  }

  async take(entry, use) {
    const known = this.tally.of(entry);
    let why = '';
    for (const cache of ['default', 'reload']) {
      const part = new MemoryPart(entry);
      this.tally.restart(known);
      // The list of timings ends at 250 entries.
      performance.clearResourceTimings();
      const before = this.tally.fetched;
      try {
        await transfer(entry, part, { cache, signal: this.control.signal, heard: this.tally.heard(known) });
        why = this.verify && (await sha256(part.data)) !== entry.sha256 ? 'its SHA-256 differs from the one in the manifest' : '';
      } catch (e) {
        if (!(e instanceof Damaged)) throw e;
        why = e.message;
      }
      this.tally.fetched = before + networkBytes(addressOf(entry), this.tally.fetched - before);
      if (why) {
        this.say('damaged', { name: entry.name, sha256: entry.sha256, why });
        continue;
      }
      this.tally.complete(known);
      return use(part.data);
    }
    throw damagedTwice(entry, why);
  }
}

/** Bytes that really came over the network: none if the browser's cache had the file. */
function networkBytes(url, size) {
  const timing = performance.getEntriesByName(url, 'resource').at(-1);
  if (!timing || !timing.encodedBodySize) return size;
  return timing.transferSize >= timing.encodedBodySize ? size : 0;
}
