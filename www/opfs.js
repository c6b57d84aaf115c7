// What this browser keeps of the model: fednano/{files,pieces}/SHA256 in the origin's private file system (OPFS). SHA256.part is a
// download under way. A final name is only given to verified bytes.
import { pause } from './fetching.js';

const HOME = 'fednano';
const KINDS = ['files', 'pieces'];
/** Bytes after which writes are forced to the disk, against power cuts; a killed tab loses nothing that was written. */
const FLUSH = 16 * 2 ** 20;
const BUSY_PAUSE = 300;
const CLAIM = 'claim';

/** A part on disk, held exclusively until closed. */
class DiskPart {
  constructor(handle, size) {
    this.handle = handle;
    this.size = size;
    this.kept = true;
    this.loose = 0;
  }
  append(chunk) {
    const written = this.handle.write(chunk, { at: this.size });
    this.size += written;
    if (written !== chunk.length) throw new DOMException('the disk took only part of the bytes', 'QuotaExceededError');
    this.loose += written;
    if (this.loose < FLUSH) return;
    this.handle.flush();
    this.loose = 0;
  }
  clear() {
    this.handle.truncate(0);
    this.size = 0;
  }
  close() {
    try {
      this.handle.flush();
    } finally {
      this.handle.close();
    }
  }
}

/** `null` instead of a file that is not there. */
async function orNull(promise) {
  try {
    return await promise;
  } catch (e) {
    if (e.name === 'NotFoundError') return null;
    throw e;
  }
}

export class Opfs {
  constructor(folders) {
    this.folders = folders;
  }

  /** {store, why}: no store where the browser lacks something, and why. */
  static async open() {
    try {
      if (!navigator.storage?.getDirectory) {
        const why = globalThis.isSecureContext ? 'this browser has no private file storage' : 'browsers offer storage only to pages from localhost or over https';
        return { store: null, why };
      }
      const { createSyncAccessHandle, move } = globalThis.FileSystemFileHandle?.prototype ?? {};
      if (!createSyncAccessHandle || !move) return { store: null, why: "this browser's private file storage is too old" };
      const root = await navigator.storage.getDirectory();
      const home = await root.getDirectoryHandle(HOME, { create: true });
      const folders = {};
      for (const kind of KINDS) folders[kind] = await home.getDirectoryHandle(kind, { create: true });
      return { store: new Opfs(folders), why: '' };
    } catch (e) {
      if (e.name === 'QuotaExceededError') throw new Error(`this browser has no storage left for this page (${e.message}); free storage on this device, or add edge=memory to the address`);
      return { store: null, why: `this browser refused its private file storage: ${e.message}` };
    }
  }

  /** Bytes under a name; -1 if there is nothing. */
  async size({ kind, sha256 }, suffix = '') {
    const handle = await orNull(this.folders[kind].getFileHandle(sha256 + suffix));
    return handle ? ((await orNull(handle.getFile()))?.size ?? -1) : -1;
  }

  /** The bytes; null if they are not there or cannot be read. */
  async read({ kind, sha256 }, suffix = '') {
    try {
      const file = await (await this.folders[kind].getFileHandle(sha256 + suffix)).getFile();
      return new Uint8Array(await file.arrayBuffer());
    } catch (e) {
      console.warn(`${sha256}${suffix} cannot be read back`, e);
      return null;
    }
  }

  /**
   * The part, to append to; null if another tab finished it meanwhile. Its handle is exclusive: `busy()` is called when another
   * tab has it (without Web Locks), or a tab that is just closing.
   */
  async openPart(entry, busy, signal) {
    for (;;) {
      try {
        const handle = await this.folders[entry.kind].getFileHandle(`${entry.sha256}.part`, { create: true });
        const access = await handle.createSyncAccessHandle();
        return new DiskPart(access, access.getSize());
      } catch (e) {
        if (e.name !== 'NoModificationAllowedError') throw e;
      }
      busy();
      await pause(BUSY_PAUSE, signal);
      if ((await this.size(entry)) === entry.bytes) return null;
    }
  }

  /**
   * How much of `needed` bytes can really be had, by claiming them in an empty file and giving them back. Browsers' estimates are
   * rounded against fingerprinting: Chromium says "10 GiB more than now" whatever the disk holds.
   * It hands space out in powers of two (up to a point), as it will to the parts, so the answer is cautious.
   */
  async claim(needed) {
    const claim = async () => {
      let access;
      try {
        access = await (await this.folders.pieces.getFileHandle(CLAIM, { create: true })).createSyncAccessHandle();
      } catch (e) {
        if (e.name === 'QuotaExceededError') return 0;
        if (e.name === 'NoModificationAllowedError') return needed; // another tab claims: no answer is no refusal
        throw e;
      }
      const fits = (size) => {
        try {
          access.truncate(size);
          return true;
        } catch {
          return false;
        }
      };
      let [low, high] = [0, needed];
      try {
        if (fits(needed)) return needed;
        while (high - low > needed / 200) {
          const middle = Math.floor((low + high) / 2);
          if (fits(middle)) low = middle;
          else high = middle;
        }
        return low;
      } finally {
        fits(0);
        access.close();
        await this.folders.pieces.removeEntry(CLAIM);
      }
    };
    return needed === 0 ? 0 : exclusively(CLAIM, claim);
  }

  /** The verified part becomes the entry. */
  async adopt({ kind, sha256 }) {
    await this.remove({ kind, sha256 });
    const handle = await this.folders[kind].getFileHandle(`${sha256}.part`);
    await handle.move(sha256);
  }

  async remove({ kind, sha256 }, suffix = '') {
    await orNull(this.folders[kind].removeEntry(sha256 + suffix));
  }

  /** Remove all but `entries`, finished or not. What another tab is using right now stays for the next time. */
  async keepOnly(entries) {
    const keep = new Set(entries.flatMap(({ kind, sha256 }) => [`${kind}/${sha256}`, `${kind}/${sha256}.part`]));
    for (const kind of KINDS) {
      const names = [];
      for await (const name of this.folders[kind].keys()) names.push(name);
      for (const name of names.filter((n) => !keep.has(`${kind}/${n}`))) {
        const remove = () => orNull(this.folders[kind].removeEntry(name)).catch((e) => console.warn(`${name} stays`, e));
        await exclusively(name.replace('.part', ''), remove, { ifAvailable: true });
      }
    }
  }
}

/** One tab at a time for a hash, where the browser has Web Locks; elsewhere the part's handle alone keeps tabs apart. */
export function exclusively(sha256, action, options = {}) {
  if (!navigator.locks) return action();
  return navigator.locks.request(`fednano-piece-${sha256}`, options, (lock) => (lock ? action() : null));
}

async function bytesBelow(folder) {
  let sum = 0;
  for await (const handle of folder.values()) sum += handle.kind === 'file' ? (await handle.getFile()).size : await bytesBelow(handle);
  return sum;
}

/** Remove all that is stored; the bytes freed. Also for the page itself. */
export async function deleteStored() {
  const root = await navigator.storage?.getDirectory?.();
  const home = root && (await orNull(root.getDirectoryHandle(HOME)));
  if (!home) return 0;
  const sum = await bytesBelow(home);
  try {
    await root.removeEntry(HOME, { recursive: true });
  } catch (e) {
    if (e.name !== 'NoModificationAllowedError') throw e;
    throw new Error('the stored model is in use by another tab of this browser that is downloading it; close that tab and press again');
  }
  return sum;
}
