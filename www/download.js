// Edge weights: listed in /edge/manifest.json, fetched in full, checked against their SHA-256. Kept by the browser's HTTP cache.

const TRIES = 2;

/** All files by name, and {bytes, fetched, verified}; `progress({file, done, all})` hears of each piece. */
export async function download(progress) {
  const manifest = await getJson('/edge/manifest.json');
  const all = manifest.files.reduce((sum, f) => sum + f.bytes, 0);
  const canVerify = Boolean(globalThis.crypto?.subtle);
  const files = {};
  let before = 0;
  let fetched = 0;
  for (const entry of manifest.files) {
    const report = (bytes) => progress({ file: entry.name, done: before + bytes, all });
    const [bytes, network] = await fetchChecked(entry, canVerify, report);
    files[entry.name] = bytes;
    fetched += network;
    before += entry.bytes;
  }
  return [files, { model: manifest.model, bytes: all, fetched, verified: canVerify }];
}

async function getJson(url) {
  let response;
  try {
    response = await fetch(url);
  } catch (e) {
    throw new Error(`${url} could not be fetched (${e.message}); check that the server runs and reload`);
  }
  if (!response.ok) throw new Error(`${url} could not be fetched (HTTP ${response.status}); ask the operator which model the server holds`);
  return response.json();
}

/** A file that arrives damaged is fetched once more, past the cache. */
async function fetchChecked(entry, canVerify, report) {
  let cause = '';
  for (let attempt = 0; attempt < TRIES; attempt++) {
    try {
      const [bytes, network] = await fetchOnce(entry, attempt === 0 ? 'default' : 'reload', report);
      if (bytes.length !== entry.bytes) {
        cause = `it has ${bytes.length} bytes instead of ${entry.bytes}`;
      } else if (canVerify && (await sha256(bytes)) !== entry.sha256) {
        cause = 'its SHA-256 differs from the one in the manifest';
      } else {
        return [bytes, network];
      }
    } catch (e) {
      cause = e.message;
    }
  }
  throw new Error(`${entry.name} could not be downloaded, ${TRIES} tries: ${cause}; check the connection and reload`);
}

async function fetchOnce(entry, cache, report) {
  // The answer is kept for a year without asking again, so another content must have another address.
  const url = new URL(`/edge/${encodeURIComponent(entry.name)}?sha256=${entry.sha256}`, self.location.href).href;
  const response = await fetch(url, { cache });
  if (!response.ok) throw new Error(`HTTP ${response.status}`);
  const bytes = new Uint8Array(entry.bytes);
  const reader = response.body.getReader();
  let at = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > entry.bytes) throw new Error(`it is larger than the ${entry.bytes} bytes of the manifest`);
    bytes.set(value, at);
    at += value.length;
    report(at);
  }
  return [at === entry.bytes ? bytes : bytes.subarray(0, at), networkBytes(url, at)];
}

/** Bytes that really came over the network: none if the browser's cache had the file. */
function networkBytes(url, size) {
  const timing = performance.getEntriesByName(url, 'resource').at(-1);
  if (!timing || !timing.encodedBodySize) return size;
  return timing.transferSize >= timing.encodedBodySize ? timing.encodedBodySize : 0;
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return Array.from(digest, (b) => b.toString(16).padStart(2, '0')).join('');
}

/** Multiplications and additions to encode one picture, from config.json; 0 if it does not say. */
export function pictureFlops(configBytes) {
  const vision = JSON.parse(new TextDecoder().decode(configBytes)).vision_config ?? {};
  const { hidden_size: d = 0, intermediate_size: f = 4 * d, num_hidden_layers: layers = 0, image_size: size = 0, patch_size: patch = 1 } = vision;
  const tokens = (size / patch) ** 2 + 1;
  return layers * tokens * (2 * (4 * d * d + 2 * d * f) + 4 * tokens * d);
}
