// The work of a round, kept in this browser, so that a reload or a crash trains nothing twice. In a database (IndexedDB) rather than
// in files: a transaction leaves the old snapshot or the new one, and it also exists where a page has no private files (http).

const DATABASE = 'fednano-work';
/** Whose the work is, small; and the bytes: {owner, at} and Uint8Array, under the work's name. */
const [OWNERS, SNAPSHOTS] = ['owners', 'snapshots'];
/** Work that nobody came back for is removed after so long, milliseconds. */
const OLD = 7 * 24 * 3600e3;
/** A browser that takes longer is not waited for, milliseconds: training is worth more. */
const PATIENCE = 10e3;

/** A name that no other tab has. */
export const randomName = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, '0')).join('');

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const inTime = (promise) => {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error('it does not answer')), PATIENCE);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
};

function open() {
  const request = indexedDB.open(DATABASE, 1);
  request.onupgradeneeded = () => [OWNERS, SNAPSHOTS].forEach((name) => request.result.createObjectStore(name));
  return result(request);
}

/**
 * The snapshot of one participation. It belongs to the page that took it last, so that of two pages with one name (a tab was
 * duplicated before it took part, say) one writes.
 */
export class Work {
  /** Take the work of this name over; null, and `warn(cause)`, where the browser keeps nothing. */
  static async take(name, warn) {
    try {
      const work = new Work(await inTime(open()), name, warn);
      await inTime(work.change((owners, snapshots) => work.claim(owners, snapshots)));
      return work;
    } catch (e) {
      warn(e.message || e.name);
      return null;
    }
  }

  constructor(database, name, warn) {
    Object.assign(this, { database, name, warn, owner: randomName(), broken: false });
  }

  /** Run `action(owners, snapshots)`: all of what it changes is kept, or nothing. */
  async change(action) {
    const transaction = this.database.transaction([OWNERS, SNAPSHOTS], 'readwrite');
    const done = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error ?? new Error('the browser gave up'));
    });
    done.catch(() => {}); // it is awaited below, unless the action fails first
    const given = await action(...[OWNERS, SNAPSHOTS].map((name) => transaction.objectStore(name)));
    await done;
    return given;
  }

  async claim(owners, snapshots) {
    const now = Date.now();
    const [names, entries] = await Promise.all([result(owners.getAllKeys()), result(owners.getAll())]);
    names.forEach((name, i) => {
      if (name === this.name || now - entries[i].at < OLD) return;
      owners.delete(name);
      snapshots.delete(name);
    });
    owners.put({ owner: this.owner, at: now }, this.name);
  }

  async isMine(owners) {
    return (await result(owners.get(this.name)))?.owner === this.owner;
  }

  /** Replace the snapshot; a fault is told once, and training goes on. */
  keep = async (bytes) => {
    if (this.broken) return;
    try {
      await inTime(
        this.change(async (owners, snapshots) => {
          if (!(await this.isMine(owners))) return;
          owners.put({ owner: this.owner, at: Date.now() }, this.name);
          snapshots.put(bytes, this.name);
        }),
      );
    } catch (e) {
      this.broken = true;
      this.warn(e.message || e.name);
    }
  };

  /** The snapshot as bytes, or null. */
  kept = async () => {
    try {
      return (await inTime(this.change((_, snapshots) => result(snapshots.get(this.name))))) ?? null;
    } catch (e) {
      this.warn(e.message || e.name);
      return null;
    }
  };

  /** The participation is over: nothing goes on from here. */
  async forget() {
    const wipe = async (owners, snapshots) => {
      if (!(await this.isMine(owners))) return;
      owners.delete(this.name);
      snapshots.delete(this.name);
    };
    await inTime(this.change(wipe)).catch((e) => console.warn('the work of a round stays in this browser', e));
  }

  close() {
    this.database.close();
  }
}
