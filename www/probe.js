// Computations of this device for tests, through the same worker as the page: the probe of shared/src/probe.rs with the server's
// LLM, or the comparison of shared/src/check with PyTorch's values.
import { WorkerTab } from './tab.js';

const query = new URLSearchParams(location.search);
const socket = `${location.protocol === 'https:' ? 'wss' : 'ws'}://${location.host}/ws`;

function finish(state, text) {
  if (document.body.dataset.state !== 'loading') return;
  document.getElementById('result').textContent = text;
  document.body.dataset.state = state;
}

const tab = new WorkerTab((message) => {
  if (message.event === 'crash' || message.event === 'gpuLost') finish('error', message.cause);
});

try {
  const device = query.get('device') ?? 'cpu';
  const checkpoint = query.get('checkpoint');
  if (checkpoint) {
    finish('done', await tab.call('check', { checkpoint: new URL(checkpoint, location.href).href, device }));
  } else {
    await tab.call('load', { device });
    finish('done', await tab.call('probe', { url: socket, federation: query.get('federation') ?? '' }));
  }
} catch (e) {
  finish('error', e.message);
}
