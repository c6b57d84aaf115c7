// The page's flow: federation, device, data, participation. `body[data-state]` and `window.fednano` tell tests where it stands.
import { $, clearError, make, note, params, setProgress, setState, showError, socketUrl } from './page.js';
import { chooseDevice, deviceText, speedWords } from './device.js';
import { AskView } from './ask.js';
import { DataStep } from './data.js';
import { askedWords } from './ledger.js';
import { Live } from './live.js';
import { ModelStep } from './model.js';
import { WorkerTab } from './tab.js';
import { answerTwins, heldByTwin } from './twin.js';
import { randomName } from './work.js';

const POLL = 3000;
const live = new Live();
const tab = new WorkerTab(hearWorker);
const model = new ModelStep(tab);
const page = { federation: '', joined: false, ready: false, broken: false, source: null, work: '', kind: '', device: '', edgeBytes: 0, download: null, data: null, ask: null };

// ------------------------------------------------------------------------------------------------ federation

async function getJson(url) {
  let response;
  try {
    response = await fetch(url, { cache: 'no-store' });
  } catch {
    throw new Error('the server does not answer; check that it runs and reload');
  }
  if (response.ok) return response.json();
  const fault = await response.json().catch(() => null);
  throw new Error(fault?.cause ? `${fault.cause}; ${fault.remedy}` : `${url} gave HTTP ${response.status}; reload the page`);
}

/** The federation to join; null while the person must choose. */
async function findFederation() {
  if (params.federation) return params.federation;
  const all = await getJson('/api/federations');
  if (all.length === 0) throw new Error('this server has no federation; ask the operator for an invite link');
  if (all.length === 1) return all[0].federation;
  $('federations').replaceChildren(
    ...all.map((status) => {
      const link = make('a', status.federation);
      const address = new URL(location.href);
      address.searchParams.set('federation', status.federation);
      link.href = address.href;
      const item = make('li');
      item.append(link, make('span', ` – ${status.phase}, ${status.participants.length} participants`, 'quiet'));
      return item;
    }),
  );
  $('chooser').hidden = false;
  $('federation').textContent = 'Choose a federation below.';
  return null;
}

/** While not joined, the page asks for the status; while joined, it is told. */
async function poll() {
  if (!page.joined) {
    try {
      live.setStatus(await getJson(`/api/federations/${encodeURIComponent(page.federation)}`));
    } catch (e) {
      note({ type: 'poll', message: e.message });
    }
  }
  setTimeout(poll, POLL);
}

// ------------------------------------------------------------------------------------------------ device

async function prepareDevice() {
  const choice = await chooseDevice(params.device);
  $('device-words').textContent = `${choice.words} Loading …`;
  const info = await model.load(choice.device);
  page.edgeBytes = info.received;
  page.download = info.download;
  const gflops = await tab.call('speed');
  $('device-words').textContent = `${choice.words} ${speedWords(gflops, info.pictureFlops)}`;
  page.kind = choice.device;
  page.device = deviceText(choice, gflops);
  note({ type: 'device', device: choice.device, gflops, edgeBytes: info.fetched });
}

/** After a crash. Another device computes features with other last digits: the work that is kept does not fit them. */
const remedy = () => `reload the page to go on where you were${page.kind === 'cpu' ? '' : ', or add device=cpu to its address: then the processor computes, and the round begins again'}`;

function hearWorker(message) {
  const { event, done, all } = message;
  if (['room', 'download', 'waiting', 'damaged', 'opening'].includes(event)) {
    model.hear(message);
  } else if (event === 'encode') {
    setProgress('encode', done, all);
    $('encode-words').textContent = `Prepared pictures: ${done} of ${all}`;
  } else if (event === 'decode') {
    $('own-words').textContent = `Reading pictures: ${done} of ${all}`;
  } else if (event === 'answer') {
    page.ask?.hear(message);
  } else if (event === 'asked') {
    $('asked-words').textContent = askedWords(message.traffic);
    window.fednano.asked = message.traffic; // for tests
  } else if (event === 'client') {
    hearClient(message.client);
  } else if (event === 'unkept') {
    $('kept-words').textContent = `This browser does not keep your work (${message.cause}): after a reload the round begins again.`;
    note({ type: 'unkept', cause: message.cause });
  } else if (event === 'crash') {
    stop(`the program in this tab stopped (${message.cause}); ${remedy()}`);
  } else if (event === 'gpuLost') {
    stop(`the graphics processor was lost (${message.cause}); ${remedy()}`);
  }
}

/** Nothing works any more until a reload. */
function stop(message) {
  page.broken = true;
  page.joined = false;
  page.ready = false;
  $('ask').disabled = true;
  live.say('Stopped.');
  showButtons();
  setState('error');
  showError(message);
}

// ------------------------------------------------------------------------------------------------ participation

const sessionKey = () => `fednano:${page.federation}`;

/** {token, name, source, work, kind} of this browser tab's earlier participation, also from before a reload; `work` names what is kept of it, `kind` is that of its device. */
function savedSession() {
  try {
    return JSON.parse(sessionStorage.getItem(sessionKey()) ?? 'null');
  } catch {
    return null;
  }
}

function showButtons() {
  const saved = savedSession();
  const idle = page.data !== null && !page.data.busy && !page.joined && !page.broken;
  $('join').textContent = saved ? 'Rejoin' : 'Join';
  $('join').disabled = !(idle && (page.ready || saved?.source?.shard));
  $('leave').disabled = !page.joined;
  $('name').disabled = page.joined;
  $('data').disabled = !idle;
}

async function join() {
  const saved = savedSession();
  // After a reload the same demo shard is drawn again; own pictures must be chosen again.
  if (!page.ready && saved?.source?.shard && !(await page.data.run(() => page.data.chooseDemo(saved.source)))) return;
  if (!page.ready || page.joined) return;
  page.joined = true;
  clearError();
  live.say('Connecting …');
  live.begin();
  showButtons();
  const options = {
    url: socketUrl,
    federation: page.federation,
    name: $('name').value.trim() || 'tab',
    deviceText: page.device,
    edgeBytes: page.edgeBytes,
    download: page.download,
    resume: saved?.token ?? null,
  };
  page.work = saved?.work ?? randomName();
  try {
    const { outcome } = await tab.call('join', { options, work: page.work });
    page.joined = false;
    if (outcome === 'finished') {
      sessionStorage.removeItem(sessionKey());
      live.say('All rounds are done. Thank you! Ask the model below.');
    } else {
      live.say('You left. Your adapters stay in this tab; rejoin whenever you like.');
    }
    setState(outcome);
  } catch (e) {
    page.joined = false;
    if (page.broken) return; // said already
    // The token is kept: a server that does not know it takes a newcomer. Only a participation that went elsewhere is let go,
    // since coming back with it would take it away there.
    const elsewhere = e.message.includes('another tab or program goes on');
    if (elsewhere) sessionStorage.removeItem(sessionKey());
    live.say(elsewhere ? 'This tab has stopped: another tab or program goes on with its participation.' : 'Not taking part.');
    setState('error');
    showError(e);
  } finally {
    showButtons();
  }
}

/** An event as it is noted: without secrets, and without what comes often and is long. */
function noted(event) {
  if (event.type === 'joined') return { ...event, token: undefined };
  if (event.type === 'status') return { type: 'status', phase: event.status.phase, round: event.status.round };
  if (event.type === 'traffic') return { type: 'traffic', traffic: event.traffic };
  return event;
}

function hearClient(event) {
  note(noted(event));
  if (event.type === 'joined') {
    sessionStorage.setItem(sessionKey(), JSON.stringify({ token: event.token, name: $('name').value.trim(), source: page.source, work: page.work, kind: page.kind }));
    [page.edgeBytes, page.download] = [0, null]; // the server has counted them
  }
  // Bytes are also told when there is no connection any more.
  if (event.type !== 'traffic') document.body.dataset.connection = event.type === 'lost' ? 'lost' : 'up';
  const state = live.hear(event);
  if (state) setState(state);
}

// ------------------------------------------------------------------------------------------------ start

async function start() {
  $('error-close').onclick = clearError;
  $('join-form').onsubmit = (e) => {
    e.preventDefault();
    join();
  };
  $('leave').onclick = () => {
    live.say('Leaving …');
    tab.call('leave').catch(showError);
  };
  const data = new DataStep(
    tab,
    (busy) => {
      if (busy) page.ready = false;
      showButtons();
    },
    (look) => {
      page.ready = true;
      page.source = look.source;
      page.ask.setData(look);
    },
  );
  const federation = await findFederation();
  if (!federation) return;
  page.federation = federation;
  $('federation').textContent = `Federation “${federation}”`;
  document.title = `FedNano – ${federation}`;
  answerTwins(() => (page.joined ? savedSession()?.token : null));
  let saved = savedSession();
  if (saved && (await heldByTwin(saved.token))) {
    sessionStorage.removeItem(sessionKey()); // a duplicate of a tab that takes part is somebody new
    saved = null;
  }
  $('name').value = params.name || saved?.name || `tab-${Math.random().toString(36).slice(2, 6)}`;
  live.setStatus(await getJson(`/api/federations/${encodeURIComponent(federation)}`));
  setTimeout(poll, POLL);

  await prepareDevice();
  page.ask = new AskView(tab, federation);
  await data.preview();
  page.data = data;
  $('ask').disabled = false;
  setState('ready');
  showButtons();
  if (saved) {
    const rejoin = saved.kind && saved.kind !== page.kind ? 'press Rejoin; on another device than before the round begins again' : 'press Rejoin to go on where you were';
    const how = saved.source?.shard ? rejoin : `choose the same pictures and questions again (a page cannot keep them), then ${rejoin}`;
    live.say(`This tab took part before: ${how}.`);
  }
  const shard = params.shard || (params.auto ? 'workshop' : '');
  if (shard && !saved) {
    await data.run(() => data.chooseDemo({ shard, pictures: params.pictures, questions: params.questions, seed: params.seed }));
  }
  if (params.auto) await join();
}

start().catch((e) => {
  setState('error');
  showError(e);
  $('device-words').textContent = 'This page could not get ready; the message above says why.';
});
