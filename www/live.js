// The live view of a federation: state line, round, charts, participants, bytes.
import { $, bytes, make, setProgress } from './page.js';
import { accuracyChart, lossChart } from './charts.js';

const KINDS = { tab: 'browser tab', native: 'program', simulated: 'simulated' };
const PHASES = { lobby: 'waiting for participants', training: 'training', evaluating: 'merging and testing', finished: 'finished' };
/** Redraw at most so often, milliseconds; status messages come with every step of everyone. */
const PAUSE = 150;
const MOST_POINTS = 4000;

export class Live {
  constructor() {
    this.loss = lossChart($('loss-chart'));
    this.accuracy = accuracyChart($('accuracy-chart'));
    this.steps = [];
    this.losses = [];
    this.count = 0;
    this.me = null;
    this.status = null;
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
    const { phase, round, rounds, participants, history, min_participants: needed } = this.status;
    const where = phase === 'training' || phase === 'evaluating' ? `, round ${round} of ${rounds}` : '';
    $('phase').textContent = `${PHASES[phase] ?? phase}${where}`;
    this.accuracy.set(history.map((h) => h.round), history.map((h) => h.held_out.accuracy * 100));
    this.drawParticipants(participants, needed, phase);
    this.drawTraffic(participants.find((p) => p.id === this.me)?.traffic);
  }

  drawParticipants(participants, needed, phase) {
    const rows = participants.map((p) => {
      const row = make('tr', '', [p.id === this.me ? 'me' : '', p.connected ? '' : 'away'].join(' ').trim());
      const [step, steps] = p.progress;
      row.append(
        make('td', p.id === this.me ? `${p.name} (you)` : p.name),
        make('td', KINDS[p.kind] ?? p.kind),
        make('td', p.device, 'device'),
        make('td', String(p.samples)),
        make('td', steps ? `${step} of ${steps}` : '–'),
        make('td', p.loss == null ? '–' : p.loss.toFixed(3)),
        make('td', p.updated ? '✓' : '–'),
        make('td', p.connected ? 'yes' : 'away'),
      );
      return row;
    });
    if (phase === 'lobby' && participants.length < needed) {
      rows.push(note(`The first round starts with ${needed} participants; ${participants.length} here.`));
    } else if (rows.length === 0) {
      rows.push(note('Nobody yet.'));
    }
    $('participants').replaceChildren(...rows);
  }

  drawTraffic(traffic) {
    if (!traffic) return;
    const up = traffic.activations_up + traffic.updates_up + traffic.control_up;
    const down = traffic.gradients_down + traffic.adapters_down + traffic.control_down + traffic.edge_down;
    const lines = [
      ['Sent: activations and answer tokens', traffic.activations_up],
      ['Sent: adapters and their Fisher values', traffic.updates_up],
      ['Sent: everything else', traffic.control_up],
      ['Sent in all', up, 'total'],
      ['Received: gradients and answers', traffic.gradients_down],
      ['Received: merged adapters', traffic.adapters_down],
      ['Received: model part for this device', traffic.edge_down],
      ['Received: everything else', traffic.control_down],
      ['Received in all', down, 'total'],
    ];
    $('traffic').replaceChildren(...lines.flatMap(([name, count, kind = '']) => [make('dt', name, kind), make('dd', bytes(count), kind)]));
  }

  /** One event of the own participation; returns the page's new state, if it changes. */
  hear(event) {
    const rounds = this.status?.rounds ?? '?';
    switch (event.type) {
      case 'joined':
        this.me = event.participant;
        this.returned = event.resumed;
        this.say(event.resumed ? 'Back with the server.' : 'Joined. Waiting for the round to begin.');
        return 'joined';
      case 'status':
        this.setStatus(event.status);
        this.sayPhase();
        return null;
      case 'round':
        this.waiting = false;
        setProgress('round', event.fromStep, event.steps);
        $('round-words').textContent = `Round ${event.round}: step ${event.fromStep} of ${event.steps}`;
        this.say(
          event.fromStep > 0 && this.returned
            ? `Back: going on with round ${event.round} at step ${event.fromStep}.`
            : `Training round ${event.round} of ${rounds} on your samples.`,
        );
        return 'training';
      case 'step':
        this.addStep(event.loss);
        setProgress('round', event.step, event.steps);
        $('round-words').textContent = `Round ${event.round}: step ${event.step} of ${event.steps}`;
        this.say(`Training round ${event.round} of ${rounds} on your samples.`);
        return null;
      case 'fisher':
        $('round-words').textContent = `Round ${event.round}: weighed ${event.done} of ${event.all} samples`;
        this.say(`Round ${event.round} of ${rounds}: measuring which adapter weights matter to your samples.`);
        return null;
      case 'uploaded':
        this.waiting = true;
        this.say(`Round ${event.round} of ${rounds}: your adapters are in. Waiting for the others.`);
        return null;
      case 'notCounted':
        this.waiting = true;
        this.say(`Your update of round ${event.round} was not counted: ${event.fault.cause}; ${event.fault.remedy}.`);
        return null;
      case 'lost':
        this.say(`The server is away (${event.cause}); trying again in ${Math.ceil(event.retryMs / 1000)} s.`);
        return null;
      default:
        return null;
    }
  }

  /** While waiting, the federation's phase is the news. */
  sayPhase() {
    const { phase, round, rounds } = this.status;
    if (this.waiting && phase === 'evaluating') this.say(`Round ${round} of ${rounds}: the server merges and tests the adapters.`);
  }
}

function note(text) {
  const row = make('tr');
  const cell = make('td', text, 'quiet');
  cell.colSpan = 8;
  row.append(cell);
  return row;
}
