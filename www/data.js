// Step 2: a generated demo shard, or own pictures with a question file. A sample may lack its picture or its question.
import { $, clearError, drawPicture, make, note, params, setProgress, showError } from './page.js';

// As in shared/src/data/scene/theme.rs.
const SHARDS = [
  ['workshop', 'Workshop', 'Small angular parts in rust and signal colours on a cool bench: tints, missing parts, tallies.'],
  ['garden', 'Garden', 'Large round blooms in flower colours on pale green: hues, what grows here, shared tints.'],
  ['harbour', 'Harbour', 'Vessels in sea colours on sand: who flies which colour, where they lie, what the bay lacks.'],
];
const SHOWN = 12;
const MOST_SAMPLES_LOOKED_AT = 400;
const FAULTS_SHOWN = 20;

export class DataStep {
  /** `onBusy(busy)` around each choice; `onReady(look)` once pictures are encoded: {pictures, samples, source}. */
  constructor(tab, onBusy, onReady) {
    this.tab = tab;
    this.onBusy = onBusy;
    this.onReady = onReady;
    this.busy = false;
    this.cards = new Map();
    this.own = new Map();
    for (const [id, title, words] of SHARDS) {
      const card = make('button', '', 'card');
      card.type = 'button';
      card.setAttribute('aria-pressed', 'false');
      const thumbs = make('span', '', 'thumbs');
      const question = make('span', '', 'quiet');
      card.append(make('strong', title), make('span', words), thumbs, question);
      card.onclick = () => this.run(() => this.chooseDemo({ shard: id, pictures: params.pictures, questions: params.questions, seed: params.seed }));
      this.cards.set(id, { card, thumbs, question });
      $('cards').append(card);
    }
    for (const id of ['folder', 'files']) {
      $(id).onchange = ({ target }) => {
        const files = [...target.files].map((file) => ({ name: file.webkitRelativePath || file.name, file }));
        target.value = '';
        this.run(() => this.addOwn(files));
      };
    }
    $('own-clear').onclick = () => this.run(() => this.clearOwn());
    const drop = $('drop');
    drop.ondragover = (e) => {
      e.preventDefault();
      drop.classList.add('over');
    };
    drop.ondragleave = () => drop.classList.remove('over');
    drop.ondrop = (e) => {
      e.preventDefault();
      drop.classList.remove('over');
      // Entries are gone after the event: take them now.
      const entries = [...e.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
      if (!$('data').disabled) this.run(async () => this.addOwn((await Promise.all(entries.map((entry) => filesOf(entry)))).flat()));
    };
  }

  /** Thumbnails on the cards. */
  async preview() {
    for (const [id, { thumbs, question }] of this.cards) {
      const found = await this.tab.call('preview', { theme: id, seed: params.seed, pictures: 3 });
      thumbs.replaceChildren(...found.pictures.map((p, i) => drawPicture(p, `example ${i + 1}`)));
      const s = found.samples[0];
      question.textContent = s ? `“${s.question}” – ${s.answer}` : '';
    }
  }

  /** One choice at a time; errors to the banner. */
  async run(action) {
    if (this.busy) return false;
    this.busy = true;
    clearError();
    this.onBusy(true);
    try {
      await action();
      return true;
    } catch (e) {
      $('data-words').textContent = 'These pictures could not be used.';
      showError(e);
      return false;
    } finally {
      this.busy = false;
      this.onBusy(false);
    }
  }

  async chooseDemo(source) {
    $('data-words').textContent = 'Drawing the pictures …';
    await this.tab.call('clear');
    const summary = await this.tab.call('demo', { theme: source.shard, ...source });
    await this.prepare(summary, source);
  }

  async prepare(summary, source) {
    for (const [id, { card }] of this.cards) card.setAttribute('aria-pressed', String(id === source.shard));
    const answers = summary.answers.map(([answer, count]) => `${answer} (${count})`).join(', ');
    const words = `${counted(summary)}. Most frequent answers: ${answers}.`;
    $('data-words').textContent = `${words} Preparing …`;
    setProgress('encode', 0, summary.pictures);
    const { seconds } = await this.tab.call('encode');
    const speed = summary.pictures / Math.max(seconds, 0.001);
    const fast = summary.pictures ? ` (${speed < 10 ? speed.toFixed(1) : Math.round(speed)} pictures a second)` : '';
    $('data-words').textContent = `${words} Prepared in ${seconds.toFixed(1)} s${fast}.`;
    note({ type: 'encoded', pictures: summary.pictures, samples: summary.samples, seconds });
    const look = await this.tab.call('look', { pictures: SHOWN, samples: Math.min(summary.samples, MOST_SAMPLES_LOOKED_AT) });
    this.onReady({ ...look, source });
  }

  async clearOwn() {
    this.own.clear();
    $('own-faults').replaceChildren();
    $('own-words').textContent = '';
    $('own-clear').hidden = true;
    await this.tab.call('clear');
  }

  /** Pictures and the question file may come in several goes. */
  async addOwn(files) {
    for (const { name, file } of files) {
      if (!name.split('/').at(-1).startsWith('.')) this.own.set(name, file);
    }
    $('own-clear').hidden = this.own.size === 0;
    const all = [...this.own].map(([name, file]) => ({ name, file }));
    const isQuestions = ({ name }) => /\.(json|csv)$/i.test(name);
    const questions = all.filter(isQuestions);
    const pictures = all.filter((f) => !isQuestions(f));
    $('own-words').textContent = `${pictures.length} picture files, ${questions.length} question files.`;
    if (questions.length === 0) {
      $('own-words').textContent += ' Now add a question file (.json or .csv).';
      return;
    }
    if (questions.length > 1) {
      throw new Error(`there is more than one question file (${questions.map((q) => q.name).join(', ')}); start over and choose one`);
    }
    await this.tab.call('clear');
    const { added, faults } = await this.tab.call('addPictures', { files: pictures });
    $('own-words').textContent = `${added} pictures read, ${faults.length} files not.`;
    $('own-faults').replaceChildren(...faults.slice(0, FAULTS_SHOWN).map((fault) => this.faultLine(fault)));
    const [{ name, file }] = questions;
    const asked = this.tab.call('questions', { name, text: await file.text() });
    const summary = await asked.catch((e) => {
      if (pictures.length === 0 && LACKS_PICTURE.test(e.message)) return null;
      throw causeOf(e, faults, name);
    });
    if (!summary) {
      $('own-words').textContent = `${name} speaks of pictures. Now add the pictures.`;
      return;
    }
    await this.prepare(summary, { shard: null });
  }

  /** A chosen file that is no picture, and a way to be rid of it. */
  faultLine({ name, message }) {
    const line = make('li', `${message}. `);
    const button = make('button', 'Leave it out', 'plain');
    button.type = 'button';
    button.setAttribute('aria-label', `Leave out ${name}`);
    button.onclick = () =>
      this.run(async () => {
        this.own.delete(name);
        line.remove();
        await this.addOwn([]);
      });
    line.append(button);
    return line;
  }
}

/** In words, what a data set holds. */
function counted({ pictures, samples, textOnly, pictureOnly }) {
  if (!textOnly && !pictureOnly) return `${pictures} pictures with ${samples} questions`;
  const lacks = [textOnly && `${textOnly} without a picture`, pictureOnly && `${pictureOnly} without a question`].filter(Boolean);
  return `${pictures} pictures, ${samples} samples (${lacks.join(', ')})`;
}

/** As shared's errors begin, and with which name in it. */
const LACKS_PICTURE = /^'(.+?)' is not a picture that can be read: /;

const withoutFolders = (name) => name.split(/[/\\]/).at(-1);

/** Questions about a chosen file that is no picture: the file is the cause, not its absence. */
function causeOf(error, faults, questionFile) {
  const wanted = LACKS_PICTURE.exec(error.message)?.[1];
  const fault = wanted && faults.find(({ name }) => withoutFolders(name) === withoutFolders(wanted));
  return fault ? new Error(`${fault.message}, or take its questions out of ${questionFile}`) : error;
}

/** All files below a dropped file or folder. */
async function filesOf(entry, path = '') {
  const name = path + entry.name;
  if (entry.isFile) return [{ name, file: await new Promise((yes, no) => entry.file(yes, no)) }];
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((yes, no) => reader.readEntries(yes, no)); // at most 100 at a time
    if (some.length === 0) return found;
    for (const child of some) found.push(...(await filesOf(child, `${name}/`)));
  }
}
