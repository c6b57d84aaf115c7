// Step 1 on the page: the model part's progress, what is stored on this device, and deleting it.
import { $, bytes, clearError, note, params, setProgress, showError } from './page.js';
import { deleteStored } from './opfs.js';

export class ModelStep {
  constructor(tab) {
    this.tab = tab;
    this.edge = { edgeDtype: '', done: 0, all: 0, fromCache: 0, opened: '', mended: [] };
    $('forget').onclick = () => this.forget();
  }

  /** The worker loads the model; its info. */
  async load(device) {
    // Without it the browser may drop the model when space gets short. Refused or unknown: no matter. Only pages may ask.
    if (!params.memory) navigator.storage?.persist?.().catch(() => {});
    try {
      const info = await this.tab.call('load', { device, memory: params.memory });
      const { model, bytes, fetched, fromCache, verified, edgeDtype, pieces } = info;
      window.fednano.edge = { model, bytes, fetched, fromCache, verified, edgeDtype, pieces };
      $('download-words').textContent = `Model part for this device (${model}, ${edgeDtype}): ${summary(info)}${this.mended()}.`;
      setProgress('download', 1, 1);
      return info;
    } finally {
      $('forget').disabled = false; // while loading, the worker holds the files
    }
  }

  /** What the worker says while it loads. */
  hear(message) {
    const { event, done, all } = message;
    if (event === 'room') {
      this.edge.edgeDtype = message.edgeDtype;
      $('room-words').textContent = message.words;
      note({ type: 'room', words: message.words });
      return;
    }
    if (event === 'download') {
      Object.assign(this.edge, { done, all, fromCache: message.fromCache, waiting: '' });
      window.fednano.download = message; // for tests
      setProgress('download', done, all);
    } else if (event === 'waiting') {
      this.edge.waiting = `; waiting for another tab of this browser that downloads ${message.name}`;
    } else if (event === 'damaged') {
      this.edge.mended.push(message.name);
      note({ type: 'damaged', name: message.name, sha256: message.sha256, why: message.why });
    } else if (event === 'opening') {
      this.edge.opened = `; ${done} of ${all} pieces opened`;
      note({ type: 'opening', done, all });
    }
    const { edgeDtype, fromCache, opened, waiting = '' } = this.edge;
    const cached = fromCache ? `, ${bytes(fromCache)} from this device's storage` : '';
    const dtype = edgeDtype ? ` (${edgeDtype})` : '';
    $('download-words').textContent = `Model part for this device${dtype}: ${bytes(this.edge.done)} of ${bytes(this.edge.all)}${cached}${opened}${waiting}${this.mended()}`;
  }

  /** What arrived or was kept damaged, in words; '' if nothing. */
  mended() {
    const { mended } = this.edge;
    return mended.length ? `; damaged and fetched again: ${mended.join(', ')}` : '';
  }

  async forget() {
    $('forget').disabled = true;
    clearError();
    try {
      const freed = await deleteStored();
      const open = window.fednano.edge ? ' This tab goes on with what it has in memory; the next visit downloads the model again.' : '';
      $('forget-words').textContent = freed ? `Deleted: ${bytes(freed)} freed.${open}` : 'Nothing of the model is stored on this device.';
      note({ type: 'deleted', freed });
    } catch (e) {
      showError(e);
    } finally {
      $('forget').disabled = false;
      $('forget').focus(); // a button that was disabled has lost it
    }
  }
}

/** "6.10 MB, all from this device; every piece checked by its SHA-256" */
function summary({ bytes: all, fetched, fromCache, verified, notKept }) {
  const check = verified ? 'every piece checked by its SHA-256' : 'not checked, because browsers offer SHA-256 only to pages from localhost or over https';
  let origin = `downloaded ${bytes(fetched)}`;
  if (fetched === 0) origin = notKept ? `${bytes(all)}, all from the browser's cache` : `${bytes(all)}, all from this device`;
  else if (fromCache > 0) origin = `${bytes(all)}: downloaded ${bytes(fetched)}, ${bytes(fromCache)} from this device`;
  return `${origin}; ${notKept ? `not kept on this device, because ${notKept}; ` : ''}${check}`;
}
