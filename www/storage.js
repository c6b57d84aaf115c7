// Is there room for the model? Said with numbers before anything is downloaded. Pure but for `measure`; tests import it.
import { bytes } from './units.js';

/** What a wasm program can address. */
export const WASM_LIMIT = 4 * 2 ** 30;
/** Browsers account for more than the files' bytes, and other tabs write too. */
const MARGIN = { share: 0.05, least: 4e6 };
/** A tab gets the system's memory but for what everything else needs. */
const USABLE = 0.75;

/** {quota, usage, claimed}: the browser's estimate, as far as it tells, and how many of `needed` bytes `store` can really have. */
export async function measure(store, needed) {
  const { quota, usage } = await navigator.storage.estimate().catch(() => ({}));
  const available = free({ quota, usage }) ?? needed;
  // What exceeds the estimate need not be tried.
  return { quota, usage, claimed: available < needed ? available : await store.claim(needed) };
}

/** Bytes to be free for `missing` bytes of downloads. */
export const withMargin = (missing) => (missing === 0 ? 0 : missing + Math.max(MARGIN.least, Math.round(missing * MARGIN.share)));

/** Free bytes; undefined where the browser does not tell. */
export const free = ({ quota, usage }) => (Number.isFinite(quota) && Number.isFinite(usage) ? Math.max(0, quota - usage) : undefined);

/** A sentence on storage; an Error if there is too little for `missing` bytes. `claimed` may be left out. */
export function judgeStorage({ missing, quota, usage, claimed, edgeDtype }) {
  const needed = withMargin(missing);
  const available = claimed < needed ? claimed : free({ quota, usage });
  if (needed === 0) return 'Storage: all of the model is on this device.';
  if (available === undefined) return `Storage: ${bytes(needed)} needed; this browser does not say how much is free.`;
  if (available >= needed) return `Storage: ${bytes(needed)} needed, ${bytes(available)} free for this page.`;
  throw new Error(
    `there is too little storage for the model: ${bytes(needed)} needed (${missing} bytes and a margin), about ${bytes(available)} (${available} bytes) free for this page; ` +
      `free storage on this device, use another browser or device, or ask the operator for a smaller --edge-dtype (now ${edgeDtype})`,
  );
}

/** A sentence on memory; an Error if `needed` bytes (the manifest's `resident_bytes`) cannot fit. `deviceMemory` is in GiB. */
export function judgeMemory({ needed, deviceMemory, edgeDtype }) {
  const dtype = `ask the operator for a smaller --edge-dtype (now ${edgeDtype})`;
  if (needed > WASM_LIMIT) {
    throw new Error(
      `the model does not fit into a web page: ${bytes(needed)} (${needed} bytes) of memory needed, ${bytes(WASM_LIMIT)} (${WASM_LIMIT} bytes) available to WebAssembly; ` +
        `take part with the native program instead, or ${dtype}`,
    );
  }
  if (!deviceMemory) return `Memory: ${bytes(needed)} needed; this browser does not say how much there is.`;
  const available = Math.min(WASM_LIMIT, Math.round(deviceMemory * USABLE * 2 ** 30));
  if (needed > available) {
    throw new Error(
      `this device has too little memory for the model: ${bytes(needed)} (${needed} bytes) needed, about ${bytes(available)} (${available} bytes) available; ` +
        `close other tabs and programs, use a device with more memory, or ${dtype}`,
    );
  }
  return `Memory: ${bytes(needed)} needed, of about ${bytes(available)} available.`;
}
