// One file or piece over the network into a part: appended as it arrives, continued by Range requests after failures.
import { randomName } from './work.js';

/** Under this id the server counts what it sends; the tab names it again when it joins. */
export const download = randomName();
/** Not in the address, by which the browser's cache goes. */
export const counted = { 'X-Download': download };

/** Failures in a row, without at least WORTH bytes between them, before giving up. */
const TRIES = 5;
const WORTH = 2 ** 20;
const FIRST_PAUSE = 1000;
/** A connection that gives nothing for so long is dead, milliseconds. */
const SILENCE = 60_000;

/** What arrived cannot be the entry's bytes. */
export class Damaged extends Error {}
/** Trying again is of no use. */
class Final extends Error {}

export const addressOf = (entry) => new URL(`/edge/${entry.kind}/${entry.sha256}`, self.location.href).href;

export async function sha256(data) {
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', data));
  return Array.from(digest, (b) => b.toString(16).padStart(2, '0')).join('');
}

/** A part in memory, for browsers without private files. `opfs.js` has the other kind. */
export class MemoryPart {
  constructor(entry) {
    this.data = new Uint8Array(entry.bytes);
    this.size = 0;
    this.kept = false;
  }
  append(chunk) {
    this.data.set(chunk, this.size);
    this.size += chunk.length;
  }
  clear() {
    this.size = 0;
  }
}

/** Fill `part` up to the entry's size. `heard.got(bytes)` for bytes from the network, `heard.restart()` when the part was emptied. */
export async function transfer(entry, part, { cache, signal, heard }) {
  for (let failures = 0; part.size < entry.bytes; ) {
    const before = part.size;
    try {
      await request(entry, part, cache, signal, heard);
    } catch (e) {
      signal.throwIfAborted();
      // DOMExceptions other than the network's are the storage's: a full disk does not heal by trying again.
      if (e instanceof Damaged || e instanceof Final || (e instanceof DOMException && !['NetworkError', 'AbortError'].includes(e.name))) throw e;
      failures = part.size - before >= WORTH ? 1 : failures + 1;
      if (failures >= TRIES) throw gaveUp(entry, part, e);
      await pause(FIRST_PAUSE * 2 ** (failures - 1), signal);
    }
  }
}

function gaveUp(entry, part, cause) {
  const remedy = part.kept ? 'check the connection and reload, the download then goes on where it stopped' : 'check the connection and reload';
  return new Error(`${entry.name} stopped at ${part.size} of ${entry.bytes} bytes, ${TRIES} tries (${cause.message}); ${remedy}`);
}

async function request(entry, part, cache, signal, heard) {
  const control = new AbortController();
  const stop = () => control.abort(signal.reason);
  signal.addEventListener('abort', stop);
  let timer = 0;
  const alive = () => {
    clearTimeout(timer);
    timer = setTimeout(() => control.abort(new Error(`nothing came for ${SILENCE / 1000} s`)), SILENCE);
  };
  try {
    alive();
    const from = part.size;
    const headers = from > 0 ? { ...counted, Range: `bytes=${from}-`, 'If-Range': `"${entry.sha256}"` } : counted;
    const response = await fetch(addressOf(entry), { cache, headers, signal: control.signal });
    begin(entry, part, response, heard);
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      alive();
      heard.got(value.length);
      if (part.size + value.length > entry.bytes) throw new Damaged(`more than its ${entry.bytes} bytes came`);
      part.append(value);
    }
    if (part.size < entry.bytes) throw new Error(`the connection ended after ${part.size} bytes`);
  } finally {
    clearTimeout(timer);
    signal.removeEventListener('abort', stop);
    control.abort(); // a body that is not read to its end would go on arriving
  }
}

/** What comes must fit behind what is there. */
function begin(entry, part, response, heard) {
  const restart = () => {
    part.clear();
    heard.restart();
  };
  const { status } = response;
  if (status === 206) {
    const range = /^bytes (\d+)-\d+\/(\d+|\*)$/.exec(response.headers.get('Content-Range') ?? '');
    if (range && Number(range[1]) === part.size && (range[2] === '*' || Number(range[2]) === entry.bytes)) return;
    restart();
    throw new Error('the server answered with another range than the one asked for');
  }
  if (status === 200) {
    if (part.size > 0) restart();
    return;
  }
  if (status === 416) {
    restart();
    throw new Error('the server has fewer bytes than this device');
  }
  if (status === 404 || status === 410) {
    throw new Final(`the server no longer has ${entry.name} (${entry.sha256}, HTTP ${status}), perhaps its model has changed; reload the page`);
  }
  if (status >= 400 && status < 500 && status !== 408 && status !== 429) {
    throw new Final(`the server refuses ${entry.name} (${entry.sha256}, HTTP ${status}); ask the operator`);
  }
  throw new Error(`HTTP ${status}`);
}

export function pause(milliseconds, signal) {
  return new Promise((yes, no) => {
    const stop = () => {
      clearTimeout(timer);
      no(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener('abort', stop);
      yes();
    }, milliseconds);
    signal.addEventListener('abort', stop, { once: true });
    if (signal.aborted) stop();
  });
}
