// What was agreed at the handshake, in plain words. Pure: settings as in shared/src/settings.

const STRATEGIES = {
  local: 'nothing is merged: everybody trains alone, and no adapters leave a device',
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

/** [[what, words]] */
export function agreedWords(s) {
  const lines = [
    ['Merging', STRATEGIES[s.strategy] ?? s.strategy],
    ['Adapters', `${ADAPTERS[s.adapters] ?? s.adapters}; rank ${s.rank}`],
    ['Rounds', `${s.rounds}, the first with ${count(s.min_participants, 'participant')} or more`],
    ['Who trains in a round', people(s)],
    ['Training in a round', training(s)],
    ['Optimiser', optimiser(s)],
    ['A round ends', ending(s)],
  ];
  if (s.local_test > 0) lines.push(['Your own test', `${percent(s.local_test)} of your samples are never trained on; with them this tab measures what adapters are worth to you`]);
  if (s.strategy === 'feddpa-f') lines.push(['Your own adapters', `after the last round, ${count(s.personal_epochs, 'pass', 'passes')} over your samples; they make up ${percent(s.personal_share)} of what you end with`]);
  return lines;
}
