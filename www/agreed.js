// What was agreed at the handshake, in plain words. Pure: settings as in shared/src/settings, and what this connection speaks as in
// shared/src/wire/agreement.rs.

const STRATEGIES = {
  local: 'nothing is merged: everybody trains alone; adapters are not uploaded after a round, but the server can work them out from each step',
  centralised: 'one place holds all data',
  fedavg: 'the mean of all adapters, by number of samples',
  fedprox: 'the mean of all adapters, by number of samples; each participant is held near where the round began',
  fedadam: 'the server follows the mean change of all adapters, smoothed over the rounds',
  median: 'the median of all adapters, value by value',
  'trimmed-mean': 'the mean of all adapters without the largest and smallest values',
  'feddpa-f': 'the mean of all adapters; after the last round each participant tunes adapters of its own',
  fisher: 'each value by how much it matters to each participant (Fisher), measured after training',
  'fisher-ef': 'each value by how much it matters to each participant (Fisher), measured while training',
  'fisher-adam': "each value by how much it matters to each participant (Fisher), taken from the optimiser's memory",
};

const ADAPTERS = { image: 'the one for pictures', text: 'the one for text', both: 'one for pictures, one for text' };

/** How numbers are sent. */
const FORMATS = { f32: 'exact', f16: 'in 16 bits', int8: 'in 8 bits' };

const OVERLAPS = {
  off: 'this device waits',
  parts: 'this device prepares and sends the next part of the same step',
  stale: 'this device goes on with the next samples, with adapters that are one step old',
};

const percent = (share) => `${Number((share * 100).toPrecision(3))} %`;
const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

function time(seconds) {
  if (seconds < 120) return count(seconds, 'second');
  if (seconds < 7200) return count(Math.round(seconds / 60), 'minute');
  return `${Number((seconds / 3600).toPrecision(2))} hours`;
}

function training(s) {
  const length = s.local_steps ? count(s.local_steps, 'step') : `${count(s.local_epochs, 'pass', 'passes')} over your samples`;
  const parts = s.micro_batch ? `, sent ${s.micro_batch} at a time` : '';
  return `${length}, ${count(s.batch_size, 'sample')} a step${parts}`;
}

function optimiser(s) {
  const kind = s.optimizer === 'sgd' ? `SGD with momentum ${s.momentum}` : 'AdamW';
  const words = [`${kind}, rate ${s.learning_rate}`];
  if (s.final_rate < 1) words.push(`falling to ${percent(s.final_rate)} of it in the last round`);
  if (s.warmup > 0) words.push(`rising over the first ${percent(s.warmup)} of each round`);
  if (s.round_end_rate < 1) words.push(`falling to ${percent(s.round_end_rate)} within each round`);
  if (s.weight_decay > 0) words.push(`weight decay ${s.weight_decay}`);
  if (s.clip_norm > 0) words.push(`gradients no longer than ${s.clip_norm}`);
  return words.join(', ');
}

function people(s) {
  if (s.fraction >= 1) return 'everybody who is here';
  const more = s.over_selection > 0 ? `, and ${percent(s.over_selection)} more in case some are slow` : '';
  return `${percent(s.fraction)} of those who are here, drawn anew each round${more}; the others wait`;
}

function ending(s) {
  const late = s.max_staleness ? `adapters up to ${count(s.max_staleness, 'round')} late still count, but less` : 'late adapters do not count';
  const enough = count(Math.max(1, s.min_updates), 'participant');
  return `when the adapters that it needs are in, or after ${time(s.round_deadline_s)} with those of ${enough} or more; a lost connection is waited for ${time(s.grace_s)}; ${late}`;
}

/** What goes to the server's language model in training and what comes back, each with its number format. */
function boundary(a) {
  const as = (format) => FORMATS[format] ?? format;
  if (a.mode === 'activations') return `at each step what the language model reads at every position (${as(a.codes)}); its gradients come back (${as(a.gradients)})`;
  return `each picture's features once (${as(a.features)}) and words by their numbers in the vocabulary; then at each step a few numbers for every position (${as(a.codes)}) and the outer halves of the adapters (${as(a.matrices)}); the gradients of both come back (${as(a.gradients)} and ${as(a.matrices)})`;
}

/** How numbers in fewer bits come about, if there are any. */
function numbers(a) {
  const formats = a.mode === 'activations' ? [a.codes, a.gradients] : [a.features, a.codes, a.gradients, a.matrices];
  const words = [];
  if (formats.some((format) => format !== 'f32')) {
    words.push(a.rounding === 'stochastic' ? 'rounded up or down by lot, so that errors do not add up' : 'rounded to the nearest');
  }
  if (a.mode !== 'activations' && a.features !== 'f32') words.push('this device trains on the rounded features that it sent');
  if (a.deflate) words.push('compressed where that makes them smaller');
  return words.join('; ');
}

/** [[what, words]] */
export function agreedWords(s, agreement) {
  const rounding = numbers(agreement);
  const lines = [
    ['Merging', STRATEGIES[s.strategy] ?? s.strategy],
    ['Adapters', `${ADAPTERS[s.adapters] ?? s.adapters}; rank ${s.rank}`],
    ['Rounds', `${s.rounds}, the first with ${count(s.min_participants, 'participant')} or more`],
    ['Who trains in a round', people(s)],
    ['Training in a round', training(s)],
    ['Optimiser', optimiser(s)],
    ['Sent in training', boundary(agreement)],
    ['While the server computes', OVERLAPS[agreement.overlap] ?? agreement.overlap],
    ['A round ends', ending(s)],
  ];
  if (rounding) lines.push(['Numbers', rounding]);
  if (s.local_test > 0) lines.push(['Your own test', `${percent(s.local_test)} of your samples are never trained on; with them this tab measures what adapters are worth to you`]);
  if (s.strategy === 'feddpa-f') lines.push(['Your own adapters', `after the last round, ${count(s.personal_epochs, 'pass', 'passes')} over your samples; they make up ${percent(s.personal_share)} of what you end with`]);
  return lines;
}
