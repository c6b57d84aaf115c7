// /edge/manifest.json: what the model's edge part consists of. Checked here, because all that follows relies on its sizes.
import { counted } from './fetching.js';

const HEX = /^[0-9a-f]{64}$/;
const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$/;
const FORMAT = 1;
/** Larger ones are mistakes: a piece is held in memory as a whole. */
const LARGEST = { files: 256 * 2 ** 20, pieces: 2 ** 30 };
const MOST = 1e5;

/**
 * {text, bytes, manifest, entries}: `bytes` came over the network; an entry is {kind: 'files' | 'pieces', name, sha256, bytes}, in the
 * manifest's order, files first.
 */
export async function fetchManifest() {
  const url = '/edge/manifest.json';
  let response;
  let data;
  try {
    // Always anew: what a cache answers, the server does not count.
    response = await fetch(url, { cache: 'no-store', headers: counted });
    data = await response.arrayBuffer();
  } catch (e) {
    throw new Error(`${url} could not be fetched (${e.message}); check that the server runs and reload`);
  }
  if (!response.ok) throw new Error(`${url} could not be fetched (HTTP ${response.status}); ask the operator which model the server holds`);
  const text = new TextDecoder().decode(data);
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch {
    throw new Error(`${url} is not JSON; check that this address is a FedNano server's and reload`);
  }
  const fault = faultOf(manifest);
  if (fault) throw new Error(`${url} cannot be used: ${fault}; reload the page, and if it stays so ask the operator to update the server`);
  const entry = (kind) => (e, i) => ({ kind, name: e.name ?? `piece ${i + 1} of ${manifest.pieces.length}`, sha256: e.sha256, bytes: e.bytes });
  return { text, bytes: data.byteLength, manifest, entries: [...manifest.files.map(entry('files')), ...manifest.pieces.map(entry('pieces'))] };
}

/** What is implausible, or ''. */
export function faultOf(m) {
  const count = (n) => Number.isSafeInteger(n) && n > 0;
  if (typeof m !== 'object' || m === null) return 'it is not an object';
  if (m.format !== FORMAT) return `its format is ${JSON.stringify(m.format)}, and this page reads format ${FORMAT}`;
  for (const key of ['model', 'edge_dtype']) if (typeof m[key] !== 'string' || !m[key] || m[key].length > 100) return `it does not name its ${key}`;
  for (const key of ['parameters', 'resident_bytes']) if (!count(m[key])) return `its ${key} is not a positive whole number`;
  const sizes = new Map();
  for (const kind of ['files', 'pieces']) {
    if (!Array.isArray(m[kind]) || m[kind].length === 0 || m[kind].length > MOST) return `it does not list its ${kind}`;
    for (const e of m[kind]) {
      if (!HEX.test(e?.sha256)) return `one of its ${kind} has no SHA-256`;
      if (!count(e.bytes) || e.bytes > LARGEST[kind]) return `${e.sha256} is said to have ${e.bytes} bytes`;
      const other = sizes.get(e.sha256);
      if (other !== undefined && other !== e.bytes) return `${e.sha256} has two sizes`;
      sizes.set(e.sha256, e.bytes);
    }
  }
  const names = m.files.map((f) => f.name);
  if (!names.every((n) => typeof n === 'string' && NAME.test(n))) return 'one of its files has a strange name';
  if (new Set(names).size !== names.length) return 'two of its files have the same name';
  if (!names.includes('config.json')) return 'it has no config.json';
  return '';
}
