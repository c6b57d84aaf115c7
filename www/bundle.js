// The edge bundle: manifest, room, small files, pieces, in the worker. The wasm loader gets each piece in the manifest's order.
import { download } from './fetching.js';
import { fetchManifest } from './manifest.js';
import { Opfs } from './opfs.js';
import { MemorySource, StoredSource } from './sources.js';
import { judgeMemory, judgeStorage, measure, withMargin } from './storage.js';

/** Progress is told at most so often, milliseconds. */
const PAUSE = 100;

/** Bytes by entry: `have` on this device, `cached` of them from an earlier visit or another tab. Equal pieces count once. */
class Tally {
  constructor(listed, tell) {
    this.known = new Map();
    for (const e of listed) if (!this.known.has(e.sha256)) this.known.set(e.sha256, { ...e, have: 0, cached: 0, complete: false });
    this.entries = [...this.known.values()];
    this.all = this.sum('bytes');
    this.fetched = 0;
    this.tell = tell;
    this.told = 0;
  }

  of(entry) {
    return this.known.get(entry.sha256);
  }

  sum(key) {
    return this.entries.reduce((sum, e) => sum + e[key], 0);
  }

  found(entry, size, complete) {
    Object.assign(this.of(entry), { have: size, cached: size, complete });
    this.report(entry, complete);
  }

  restart(entry) {
    this.found(entry, 0, false);
  }

  complete(entry) {
    this.of(entry).complete = true;
    this.report(entry, true);
  }

  /** Listens to one entry's transfer. */
  heard(entry) {
    return {
      got: (n) => {
        this.of(entry).have += n;
        this.fetched += n;
        this.report(entry);
      },
      restart: () => this.restart(entry),
    };
  }

  report({ kind, name }, now = false) {
    if (!now && performance.now() - this.told < PAUSE) return;
    this.told = performance.now();
    const file = kind === 'files' ? { file: name } : {};
    this.tell({ ...file, done: this.sum('have'), all: this.all, fetched: this.fetched, fromCache: this.sum('cached') });
  }
}

/** Words on storage and memory, before anything is downloaded; an Error if there is too little. */
async function room(manifest, tally, store) {
  const edgeDtype = manifest.edge_dtype;
  const memory = judgeMemory({ needed: manifest.resident_bytes, deviceMemory: navigator.deviceMemory, edgeDtype });
  if (!store) return memory;
  const missing = tally.all - tally.sum('have');
  const needed = withMargin(missing);
  let found = await measure(store, needed);
  if (found.claimed < needed) {
    await store.keepOnly(tally.entries); // what another model left is the first to go
    found = await measure(store, needed);
  }
  return `${judgeStorage({ missing, ...found, edgeDtype })} ${memory}`;
}

/**
 * {tab, info} from `open(manifest, files)`, which gives the wasm loader. `memory`: keep nothing on this device.
 * `say(event, data)` hears of room, download, waiting (for another tab), damaged and opening.
 */
export async function loadBundle({ memory, open, say }) {
  const { text, bytes: manifestBytes, manifest, entries } = await fetchManifest();
  const tally = new Tally(entries, (progress) => say('download', progress));
  const verified = Boolean(globalThis.crypto?.subtle);
  const { store, why } = memory ? { store: null, why: 'the address says so (edge=memory)' } : await Opfs.open();
  const kept = verified ? store : null; // unverified bytes are not worth keeping
  const source = kept ? new StoredSource(kept, tally, say) : new MemorySource(tally, verified, say);
  const { model, edge_dtype: edgeDtype } = manifest;
  const pieces = entries.filter((e) => e.kind === 'pieces');
  let loader = null;
  try {
    await source.survey();
    say('room', { model, edgeDtype, words: await room(manifest, tally, kept) });
    source.start();
    const files = {};
    for (const e of entries.filter((e) => e.kind === 'files')) files[e.name] = await source.take(e, async (data) => data);
    loader = await open(text, files);
    for (const [i, piece] of pieces.entries()) {
      await source.take(piece, (data) => loader.addPiece(data));
      say('opening', { done: i + 1, all: pieces.length });
    }
    const tab = await loader.finish();
    await source.tidy().catch((e) => console.warn('old pieces stay', e)); // no reason to fail
    // What came over the network is `received`, and the server has counted it as `download`; `fetched` of it is the model itself.
    const counts = { bytes: tally.all, fetched: tally.fetched, received: tally.fetched + manifestBytes, download, fromCache: tally.sum('cached'), pieces: pieces.length };
    return { tab, info: { model, ...counts, verified, edgeDtype, notKept: kept ? '' : why, pictureFlops: pictureFlops(files['config.json']) } };
  } catch (e) {
    try {
      loader?.free(); // gives its memory back
    } catch {
      // already consumed, or the program has panicked
    }
    throw await source.abandon(e);
  }
}

/** Multiplications and additions to encode one picture, from config.json; 0 if it does not say. */
function pictureFlops(configBytes) {
  const vision = JSON.parse(new TextDecoder().decode(configBytes)).vision_config ?? {};
  const { hidden_size: d = 0, intermediate_size: f = 4 * d, num_hidden_layers: layers = 0, image_size: size = 0, patch_size: patch = 1 } = vision;
  const tokens = (size / patch) ** 2 + 1;
  return layers * tokens * (2 * (4 * d * d + 2 * d * f) + 4 * tokens * d);
}
