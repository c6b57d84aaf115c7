// Small things that every part of the page uses. Text from anywhere goes in through textContent only.

export { bytes } from './units.js';

export const $ = (id) => document.getElementById(id);

/** An element with text. */
export function make(tag, text = '', className = '') {
  const element = document.createElement(tag);
  if (text !== '') element.textContent = text;
  if (className) element.className = className;
  return element;
}

/** For tests: the last events, newest last; so many that a slow reader misses none. */
const KEPT = 5000;
const events = [];
window.fednano = { events };

export function note(event) {
  events.push({ at: Math.round(performance.now()), ...event });
  if (events.length > KEPT) events.shift();
}

/** loading | ready | joined | training | finished | left | error */
export function setState(state) {
  document.body.dataset.state = state;
  note({ type: 'state', state });
}

/** Errors are "cause; remedy". */
export function showError(error) {
  const message = error instanceof Error ? error.message : String(error);
  const at = message.lastIndexOf('; ');
  $('error-cause').textContent = at < 0 ? message : `${message.slice(0, at)}.`;
  $('error-remedy').textContent = at < 0 ? 'Reload the page; if it happens again, tell the operator.' : capital(`${message.slice(at + 2)}.`);
  $('error').hidden = false;
  document.body.dataset.error = message;
  note({ type: 'error', message });
}

export function clearError() {
  $('error').hidden = true;
  delete document.body.dataset.error;
}

export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

export function setProgress(id, done, all) {
  const bar = $(id);
  bar.max = Math.max(1, all);
  bar.value = Math.min(done, all);
}

/** {width, height, rgba} on a canvas. */
export function drawPicture({ width, height, rgba }, label) {
  const canvas = make('canvas');
  canvas.width = width;
  canvas.height = height;
  canvas.getContext('2d').putImageData(new ImageData(new Uint8ClampedArray(rgba), width, height), 0, 0);
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', label);
  return canvas;
}

const query = new URLSearchParams(location.search);
const number = (name, fallback, most) => {
  const value = Number.parseInt(query.get(name) ?? '', 10);
  return Number.isFinite(value) && value >= 0 ? Math.min(value, most) : fallback;
};

/** The address' parameters. */
export const params = {
  federation: query.get('federation') ?? '',
  device: ['cpu', 'webgpu'].includes(query.get('device')) ? query.get('device') : 'auto',
  shard: ['workshop', 'garden', 'harbour'].includes(query.get('shard')) ? query.get('shard') : '',
  pictures: Math.max(1, number('pictures', 60, 5000)),
  questions: Math.max(1, number('questions', 4, 50)),
  seed: number('seed', Math.floor(Math.random() * 1e6), 0xffffffff),
  name: (query.get('name') ?? '').slice(0, 40),
  auto: query.get('auto') === '1',
  memory: query.get('edge') === 'memory',
};

export const socketUrl = `${location.protocol === 'https:' ? 'wss' : 'ws'}://${location.host}/ws`;
