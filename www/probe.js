// The probe of shared/src/probe.rs on this device, through the same worker as the page.
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
  await tab.call('load', { device: query.get('device') ?? 'cpu' });
  finish('done', await tab.call('probe', { url: socket, federation: query.get('federation') ?? '' }));
} catch (e) {
  finish('error', e.message);
}
