// The Web Worker: gets the edge bundle, holds the wasm `Tab`, answers commands {id, cmd, args} with {id, result | error};
// in between it posts {event, ...}. The page never computes, so it never freezes.
import init, { EdgeLoader, checkReference } from './pkg/fednano_web.js';
import { loadBundle } from './bundle.js';
import { decode, decodeAll } from './decode.js';
import { Work } from './work.js';

let tab = null;
/** The person had enough of the answer under way. */
let stopped = false;
/** What Rust wrote to the console last: the text of a panic. */
let panic = '';

const post = (event, data = {}) => self.postMessage({ event, ...data });

/** RGBA of a picture of the data set. */
function picture(index) {
  const [width, height] = tab.pictureSize(index);
  return { index, width, height, rgba: tab.pictureRgba(index) };
}

/** The first pictures, and `samples` samples. */
function look(pictures, samples) {
  const found = { pictures: [], samples: [] };
  for (let i = 0; i < Math.min(pictures, tab.pictures()); i++) found.pictures.push(picture(i));
  for (let i = 0; i < samples; i++) found.samples.push(JSON.parse(tab.sample(i)));
  return found;
}

/** The wasm program. */
const program = () =>
  init().catch((e) => {
    throw new Error(`the program (www/pkg) could not be loaded: ${e.message}; run 'just web' on the server and reload`);
  });

const commands = {
  async load({ device, memory }) {
    const wasm = program();
    wasm.catch(() => {}); // reported below, unless the download fails first
    const open = async (manifest, files) => {
      await wasm;
      return EdgeLoader.open(manifest, files, device);
    };
    const loaded = await loadBundle({ memory, open, say: post });
    tab = loaded.tab;
    return loaded.info;
  },
  speed: () => tab.speed(),
  preview({ theme, seed, pictures }) {
    const summary = JSON.parse(tab.loadDemo(theme, seed, pictures, 2));
    const found = look(pictures, summary.samples);
    tab.clearData();
    return found;
  },
  demo: ({ theme, seed, pictures, questions }) => JSON.parse(tab.loadDemo(theme, seed, pictures, questions)),
  clear: () => tab.clearData(),
  addPictures: ({ files }) => decodeAll(files, (name, p) => tab.addPicture(name, p.width, p.height, p.rgba), (progress) => post('decode', progress)),
  questions: ({ name, text }) => JSON.parse(tab.setQuestions(name, text)),
  look: ({ pictures, samples }) => look(pictures, samples),
  async encode() {
    const start = performance.now();
    await tab.encode((done, all) => post('encode', { done, all }));
    return { seconds: (performance.now() - start) / 1000 };
  },
  async join({ options, work: name }) {
    const work = await Work.take(name, (cause) => post('unkept', { cause }));
    try {
      const onEvent = (json) => post('client', { client: JSON.parse(json) });
      const outcome = JSON.parse(await tab.join(JSON.stringify(options), onEvent, work?.keep, work?.kept));
      await work?.forget(); // finished or left; after an error it may go on
      return outcome;
    } finally {
      work?.close();
    }
  },
  leave: () => tab.leave(),
  async ask({ url, federation, picture, file, question }) {
    stopped = false;
    // Hears the text so far after each token; false stops the answer.
    const onText = (which, text) => {
      post('answer', { which, text });
      return !stopped;
    };
    try {
      if (!file) return JSON.parse(await tab.ask(url, federation, picture, question, onText));
      const p = await decode(file);
      return JSON.parse(await tab.askPicture(url, federation, p.width, p.height, p.rgba, question, onText));
    } finally {
      post('asked', { traffic: JSON.parse(tab.asked()) });
    }
  },
  stopAnswer() {
    stopped = true;
  },
  probe: ({ url, federation }) => tab.probe(url, federation),
  async check({ checkpoint, device }) {
    const { fetchReference } = await import('./reference.js'); // participants never need it
    const { files, pictures } = await fetchReference(checkpoint);
    await program();
    return checkReference(files, pictures, device);
  },
};

/** Commands that need no model. */
const FIRST = ['load', 'check'];

self.onmessage = async ({ data: { id, cmd, args } }) => {
  try {
    if (!FIRST.includes(cmd) && !tab) throw new Error('the model is not loaded yet; wait for step 1');
    self.postMessage({ id, result: await commands[cmd](args ?? {}) });
  } catch (e) {
    if (e instanceof WebAssembly.RuntimeError) crash(e);
    self.postMessage({ id, error: e instanceof Error ? e.message : String(e) });
  }
};

/** A wasm program that panicked cannot go on; its promises would never settle. */
function crash(error) {
  const cause = panic || (error && error.message) || String(error);
  post('crash', { cause: cause.split('\n\nStack')[0].slice(0, 600) });
}

const consoleError = console.error;
console.error = (...parts) => {
  const text = parts.map(String).join(' ');
  if (text.includes('panicked at')) panic = text;
  consoleError.apply(console, parts);
};
/** A panic surfaces as an uncaught RuntimeError; what else is uncaught does no harm and stays in the console. */
const uncaught = (error) => {
  if (panic || error instanceof WebAssembly.RuntimeError) crash(error);
};
self.addEventListener('error', (e) => {
  e.preventDefault(); // the page takes what reaches it for a worker that did not start
  consoleError.call(console, e.error ?? e.message);
  uncaught(e.error);
});
self.addEventListener('unhandledrejection', (e) => uncaught(e.reason));

// Watch whatever GPU device the wasm program opens: a lost one must be said, not waited for.
if (typeof GPUAdapter !== 'undefined') {
  const requestDevice = GPUAdapter.prototype.requestDevice;
  GPUAdapter.prototype.requestDevice = async function (...args) {
    const device = await requestDevice.apply(this, args);
    device.lost.then((info) => {
      if (info.reason !== 'destroyed') post('gpuLost', { cause: info.message || 'no reason given' });
    });
    return device;
  };
}
