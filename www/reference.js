// A checkpoint with PyTorch's reference values beside it, from a folder of this server, in the worker: for the comparison of probe.html.
import { decode } from './decode.js';

/** Beside the weights; those of the second list may be absent. */
const NEEDED = ['config.json', 'tokenizer.json', 'expected.safetensors', 'meta.json'];
const OPTIONAL = ['preprocessor_config.json', 'generation_config.json', 'processor_config.json'];
/** Lists the weight files, where there are several. */
const INDEX = 'model.safetensors.index.json';

/** A Response; null where nothing is and nothing need be. */
async function get(folder, name, optional = false) {
  const url = new URL(name, folder);
  // What the files name stays in their folder.
  if (!url.href.startsWith(folder)) throw new Error(`'${name}' lies outside of ${folder}; check the checkpoint's files`);
  let response;
  try {
    response = await fetch(url, { cache: 'no-store' });
  } catch (e) {
    throw new Error(`${url} could not be fetched (${e.message}); check that the server runs and reload`);
  }
  if (response.ok) return response;
  if (optional && response.status === 404) return null;
  throw new Error(`${url} could not be fetched (HTTP ${response.status}); check the address of the checkpoint's folder`);
}

const bytes = async (response) => new Uint8Array(await response.arrayBuffer());
const json = (data) => JSON.parse(new TextDecoder().decode(data));

/**
 * {files, pictures} of the folder at `address`: `files` are Uint8Array by name, `pictures` {width, height, rgba} in the order of meta.json's
 * samples, decoded by this browser as a participant's are.
 */
export async function fetchReference(address) {
  const base = new URL(address, self.location.href);
  if (base.origin !== self.location.origin) throw new Error(`${base.href} lies on another server; put the checkpoint beside this page`);
  const folder = new URL('./', base).href;
  const files = {};
  for (const name of NEEDED) files[name] = await bytes(await get(folder, name));
  for (const name of OPTIONAL) {
    const found = await get(folder, name, true);
    if (found) files[name] = await bytes(found);
  }
  const index = await get(folder, INDEX, true);
  const weights = index ? new Set(Object.values(json(await bytes(index)).weight_map)) : ['model.safetensors'];
  for (const name of weights) files[name] = await bytes(await get(folder, name));
  const pictures = [];
  for (const { image } of json(files['meta.json']).samples) {
    const blob = await (await get(folder, image)).blob();
    pictures.push(await decode(new File([blob], image, { type: blob.type })));
  }
  return { files, pictures };
}
