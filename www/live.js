// The live view of a federation: state line, round, charts, rounds so far, participants, bytes.
import { $, make, setProgress } from './page.js';
import { agreedWords } from './agreed.js';
import { accuracyChart, lossChart } from './charts.js';
import { OwnCount, drawLedger, same } from './ledger.js';

const KINDS = { tab: 'browser tab', native: 'program', simulated: 'simulated' };
const PHASES = {
  lobby: 'waiting for participants',
  training: 'training',
  paused: 'paused, waiting for people',
  evaluating: 'merging and testing',
  finished: 'finished',
};
/** Phases in which a round is under way. */
const ROUND = ['training', 'paused', 'evaluating'];
/** Redraw at most so often, milliseconds; own steps may follow one another faster. */
const PAUSE = 150;
const MOST_POINTS = 4000;

const percent = (share) => `${(share * 100).toFixed(1)} %`;
/** Own test samples: with the federation's adapters, then with the own ones. */
const judged = ({ global, own }) => `${percent(global.accuracy)} → ${percent(own.accuracy)}`;

export class Live {
  constructor() {
    this.loss = lossChart($('loss-chart'));
    this.accuracy = accuracyChart($('accuracy-chart'));
    this.steps = [];
    this.losses = [];
    this.count = 0;
    this.me = null;
    this.own = new OwnCount();
    this.status = null;
    this.settings = null;
    /** What is said while there is nothing to do. */
    this.waiting = '';
    this.timer = 0;
  }

  say(words) {
    if ($('state-line').textContent !== words) $('state-line').textContent = words;
  }

  /** A status, from the socket or from polling. */
  setStatus(status) {
    this.status = status;
    this.later();
  }

  addStep(loss) {
    this.count += 1;
    this.steps.push(this.count);
    this.losses.push(loss);
    if (this.steps.length > MOST_POINTS) {
      this.steps.shift();
      this.losses.shift();
    }
    this.later();
  }

  later() {
    if (!this.timer) {
      this.timer = setTimeout(() => {
        this.timer = 0;
        this.draw();
      }, PAUSE);
    }
  }

  draw() {
    this.loss.set(this.steps, this.losses);
    if (!this.status) return;
    const { phase, round, rounds, participants, history } = this.status;
    const where = ROUND.includes(phase) && round > 0 ? `, round ${round} of ${rounds}` : '';
    $('phase').textContent = `${phase === 'evaluating' && round === 0 ? 'testing the untouched model' : (PHASES[phase] ?? phase)}${where}`;
    this.accuracy.set(history.map((h) => h.round), history.map((h) => h.held_out.accuracy * 100));
    this.drawRounds(history);
    this.drawParticipants(participants, phase);
    this.drawTraffic(participants.find((p) => p.id === this.me)?.traffic);
  }

  /** How many more people are needed to go on; null where it is not known, 0 where nobody waits for people. */
  lacking() {
    const { phase, round, participants, min_participants: first } = this.status;
    const here = participants.filter((p) => p.connected || (phase === 'paused' && p.updated)).length;
    if (phase === 'lobby' && round === 0) return Math.max(0, first - here);
    if (phase !== 'lobby' && phase !== 'paused') return 0;
    return this.settings ? Math.max(phase === 'paused' ? 1 : 0, this.settings.min_updates - here) : null;
  }

  /** Newest first. */
  drawRounds(history) {
    if (history.length === this.drawn) return; // they never change
    this.drawn = history.length;
    const judges = history.some((h) => h.local);
    $('rounds-own').hidden = !judges;
    const rows = history.map((h) => {
      const late = h.late.length ? ` + ${h.late.length} late` : '';
      const row = make('tr');
      const own = make('td', h.local ? judged(h.local) : '–');
      own.hidden = !judges;
      row.append(
        make('td', h.round === 0 ? 'untouched model' : String(h.round)),
        make('td', percent(h.held_out.accuracy)),
        own,
        make('td', h.round === 0 ? '–' : `${h.participants.length}${late}`),
        make('td', `${h.seconds.toFixed(h.seconds < 10 ? 1 : 0)} s`),
      );
      return row;
    });
    $('rounds').replaceChildren(...(rows.length ? rows.reverse() : [note('None yet.', 5)]));
  }

  drawParticipants(participants, phase) {
    const judges = participants.some((p) => p.local);
    $('participants-own').hidden = !judges;
    const rows = participants.map((p) => {
      const row = make('tr', '', [p.id === this.me ? 'me' : '', p.connected ? '' : 'away'].join(' ').trim());
      const [step, steps] = p.progress;
      const own = make('td', p.local ? judged(p.local) : '–');
      own.hidden = !judges;
      row.append(
        make('td', p.id === this.me ? `${p.name} (you)` : p.name),
        make('td', KINDS[p.kind] ?? p.kind),
        make('td', p.device, 'device'),
        make('td', String(p.samples)),
        make('td', part(p, phase)),
        make('td', steps ? `${step} of ${steps}` : '–'),
        make('td', p.loss == null ? '–' : p.loss.toFixed(3)),
        own,
        make('td', p.connected ? 'yes' : 'away'),
      );
      return row;
    });
    const lacking = this.lacking();
    if (lacking > 0 || lacking === null) rows.push(note(this.lackingWords(lacking), 9));
    else if (rows.length === 0) rows.push(note('Nobody yet.', 9));
    $('participants').replaceChildren(...rows);
  }

  lackingWords(lacking) {
    const { phase, round } = this.status;
    const next = phase === 'paused' ? `Round ${round} goes on` : `Round ${round + 1} starts`;
    const kept = round > 0 ? ' Nothing is lost: adapters that are in stay in.' : '';
    return lacking === null ? `${next} when enough people are here.${kept}` : `${next} with ${lacking} more participant${lacking === 1 ? '' : 's'}.${kept}`;
  }

  /** The person takes part, or takes part again. */
  begin() {
    this.own.begin();
  }

  /** The server's count beside this tab's own. */
  drawTraffic(server) {
    if (!server) return;
    const over = ['finished', 'left'].includes(document.body.dataset.state);
    const own = this.own.total();
    window.fednano.traffic = { own, server, same: own !== null && same(own, server) }; // for tests
    drawLedger(own, server, this.own.words(server, over));
  }

  /** What the server and this tab agreed on. */
  setAgreed(settings, agreement) {
    this.settings = settings;
    $('agreed').hidden = false;
    $('agreed-words').replaceChildren(...agreedWords(settings, agreement).flatMap(([what, words]) => [make('dt', what), make('dd', words)]));
  }

  /** "Round 2", or where it is after the last one, "Personal round"; `of` adds how many there are. */
  name(round, of = false) {
    const rounds = this.settings?.rounds ?? this.status?.rounds ?? '?';
    if (round > rounds) return 'Personal round';
    return of ? `Round ${round} of ${rounds}` : `Round ${round}`;
  }

  setStep(round, step, steps) {
    setProgress('round', step, steps);
    $('round-words').textContent = `${this.name(round)}: step ${step} of ${steps}`;
  }

  sayTraining(round) {
    const name = this.name(round, true);
    this.say(name === this.name(round) ? `${name}: tuning adapters of your own on your samples; nobody merges them, but the server can work them out from each step.` : `Training ${name.toLowerCase()} on your samples.`);
  }

  /** One event of the own participation; returns the page's new state, if it changes. */
  hear(event) {
    switch (event.type) {
      case 'joined':
        if (this.me !== event.participant) {
          this.own = new OwnCount();
          if (event.resumed) this.own.lacks = 'this tab took part before the page was loaded, and has counted since then';
        }
        this.me = event.participant;
        this.returned = event.resumed;
        this.setAgreed(event.settings, event.agreement);
        this.wait(event.resumed ? 'Back with the server.' : 'Joined. Waiting for the round to begin.');
        return 'joined';
      case 'status':
        this.setStatus(event.status);
        this.sayPhase();
        return null;
      case 'round':
        this.waiting = '';
        this.setStep(event.round, event.fromStep, event.steps);
        if (event.fromStep > 0 && this.returned) this.say(`Back: going on with ${this.name(event.round).toLowerCase()} at step ${event.fromStep}.`);
        else this.sayTraining(event.round);
        return 'training';
      case 'step':
        this.addStep(event.loss);
        this.setStep(event.round, event.step, event.steps);
        this.sayTraining(event.round);
        return null;
      case 'fisher':
        $('round-words').textContent = `${this.name(event.round)}: weighed ${event.done} of ${event.all} samples`;
        this.say(`${this.name(event.round, true)}: measuring which adapter weights matter to your samples.`);
        return null;
      case 'local':
        this.sayOwn(event);
        return null;
      case 'uploaded':
        this.wait(`${this.name(event.round, true)}: ${this.alone() ? 'you are done' : 'your adapters are in'}. Waiting for the others.`);
        return null;
      case 'waiting':
        this.wait(`${this.name(event.round, true)}: others train this time. You wait here; a later round may draw you.`);
        return null;
      case 'notCounted':
        this.wait(`${this.name(event.round)}: ${event.fault.cause}; ${event.fault.remedy}.`);
        return null;
      case 'traffic':
        this.own.set(event.traffic);
        window.fednano.rounds = event.rounds; // for tests
        this.later();
        return null;
      case 'lost':
        this.own.lacks ||= 'a connection was lost, and what was on its way was counted by one end only; a server that was killed has also forgotten its newest counts (it keeps them when it merges and when it is stopped in order)';
        this.say(`The server is away (${event.cause}); trying again in ${Math.ceil(event.retryMs / 1000)} s.`);
        return null;
      default:
        return null;
    }
  }

  /** What the adapters are worth on the own test samples. */
  sayOwn({ round, local: { global, own } }) {
    const received = this.alone() ? 'with the untouched model' : "with the federation's adapters";
    const whose = this.name(round) === 'Personal round' ? 'with your own mixed in' : 'with those trained on your samples';
    $('own-test').textContent = `${this.name(round)}, your own ${own.samples} test samples: ${percent(global.accuracy)} right ${received}, ${percent(own.accuracy)} ${whose}.`;
    $('own-test').hidden = false;
  }

  /** Nothing is merged. */
  alone() {
    return this.settings?.strategy === 'local';
  }

  /** Nothing to do but to wait; these words are shown unless the federation has other news. */
  wait(words) {
    this.waiting = words;
    this.say(words);
  }

  /** While waiting, the federation's phase is the news. */
  sayPhase() {
    const { phase, round } = this.status;
    if (!this.waiting) return;
    const lacking = this.lacking();
    if (phase === 'evaluating') this.say(round === 0 ? 'Joined. The server tests the untouched model.' : `${this.name(round, true)}: the server merges and tests the adapters.`);
    else if (phase === 'paused') this.say(`${this.name(round, true)} is paused, waiting for people: ${lacking} more needed. Nothing is lost.`);
    else if (lacking > 0) this.say(`Waiting for people: ${lacking} more needed.`);
    else this.say(this.waiting);
  }
}

/** What a participant does in the round under way. */
function part({ selected, updated, connected }, phase) {
  if (!ROUND.includes(phase)) return '–';
  if (updated) return 'done';
  if (!selected) return 'waits';
  if (phase === 'evaluating') return 'not done';
  return connected ? 'trains' : 'waited for';
}

function note(text, columns) {
  const row = make('tr');
  const cell = make('td', text, 'quiet');
  cell.colSpan = columns;
  row.append(cell);
  return row;
}
