// Bytes by direction and kind: this tab's own count beside the server's. Both count the same frames with the same code, so after an
// orderly end they are equal. Pure, but for `drawLedger`.
import { $, bytes, make } from './page.js';

/** As in shared/src/ledger.rs. */
const KINDS = [
  ['edge_bundle', 'model part for this device'],
  ['features', 'features of pictures'],
  ['text', 'token ids'],
  ['activations', 'hidden states of a batch'],
  ['codes', 'codes of a batch'],
  ['matrices', "the adapters' up matrices"],
  ['gradients', 'gradients'],
  ['labels', 'right answers'],
  ['hidden_states', 'hidden states of a text'],
  ['predictions', "the model's answers"],
  ['adapters', 'adapters'],
  ['fisher', 'Fisher values'],
  ['control', 'everything else'],
];
const DIRECTIONS = ['up', 'down'];
/** The server's last word comes with a status, milliseconds after the end at the latest. */
const LAST_WORD = 10e3;

const of = (traffic, direction, kind) => traffic?.[direction]?.[kind] ?? 0;
const sum = (traffic, direction) => KINDS.reduce((all, [kind]) => all + of(traffic, direction, kind), 0);

function plus(a, b) {
  const kinds = (direction) => Object.fromEntries(KINDS.map(([kind]) => [kind, of(a, direction, kind) + of(b, direction, kind)]));
  return Object.fromEntries(DIRECTIONS.map((direction) => [direction, kinds(direction)]));
}

export const same = (a, b) => DIRECTIONS.every((direction) => KINDS.every(([kind]) => of(a, direction, kind) === of(b, direction, kind)));

/** This tab's own count of one participant. */
export class OwnCount {
  constructor() {
    this.earlier = null;
    this.now = null;
    /** Why it may lack bytes that the server has; '' if it does not. */
    this.lacks = '';
    this.ended = 0;
  }

  /** A participation begins, perhaps another one (the person left and rejoins): it counts from 0, and comes on top. */
  begin() {
    this.earlier = this.total();
    this.now = null;
    this.ended = 0;
  }

  /** The newest count of this participation. */
  set(traffic) {
    this.now = traffic;
    this.ended = 0;
  }

  /** null: nothing was counted. */
  total() {
    return this.now ? plus(this.earlier, this.now) : this.earlier;
  }

  /** What is to be said of both counts; `over`: the participation has ended. */
  words(server, over, now = performance.now()) {
    if (!this.total()) return 'As counted by the server; this tab has counted nothing yet.';
    if (!over) return "Each byte is counted at both ends; the server's count is shown a moment later.";
    this.ended ||= now;
    if (same(this.total(), server)) return 'Both ends have counted the same, to the byte.';
    if (now - this.ended < LAST_WORD) return "The server's last count is not here yet.";
    return `The counts differ${this.lacks ? `: ${this.lacks}` : '; please tell the operator'}.`;
  }
}

/** What all questions of this tab have cost, which no table has. */
export const askedWords = (traffic) => `Questions to the model go over connections of their own, counted apart: ${bytes(sum(traffic, 'up'))} sent, ${bytes(sum(traffic, 'down'))} received.`;

/** The table; `own` or `server` may be null. */
export function drawLedger(own, server, words) {
  // Said aloud by screen readers when it changes, and only then.
  if ($('traffic-words').textContent !== words) $('traffic-words').textContent = words;
  $('traffic-table').hidden = false;
  const cell = (traffic, count) => {
    const found = make('td', traffic ? bytes(count) : '–');
    if (traffic) found.title = `${count} bytes`;
    return found;
  };
  const line = (name, count, className) => {
    const row = make('tr', '', className);
    const head = make('th', name);
    head.scope = 'row';
    row.append(head, ...DIRECTIONS.flatMap((direction) => [own, server].map((traffic) => cell(traffic, count(traffic, direction)))));
    return row;
  };
  const there = KINDS.filter(([kind]) => DIRECTIONS.some((direction) => of(own, direction, kind) + of(server, direction, kind) > 0));
  const rows = there.map(([kind, name]) => {
    const differs = own && server && DIRECTIONS.some((direction) => of(own, direction, kind) !== of(server, direction, kind));
    return line(name, (traffic, direction) => of(traffic, direction, kind), differs && words.startsWith('The counts differ') ? 'differs' : '');
  });
  $('traffic').replaceChildren(...rows, line('together', sum, 'total'));
}
