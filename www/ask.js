// "Ask the model": a picture, a question, or both; the answers before and after tuning, word by word.
import { $, clearError, drawPicture, make, note, showError, socketUrl } from './page.js';

const SUGGESTIONS = 4;

export class AskView {
  constructor(tab, federation) {
    this.tab = tab;
    this.federation = federation;
    this.look = { pictures: [], samples: [] };
    this.picture = null;
    this.file = null;
    $('ask-file').onchange = ({ target }) => {
      const [file] = target.files;
      target.value = '';
      if (!file) return;
      this.select(null, file);
    };
    $('ask-stop').onclick = () => this.tab.call('stopAnswer').catch(showError);
    $('ask-form').onsubmit = (e) => {
      e.preventDefault();
      this.ask();
    };
  }

  /** An answer grows. */
  hear({ which, text }) {
    $(`answer-${which}`).textContent = text;
  }

  /** Own pictures to choose from. */
  setData(look) {
    this.look = look;
    this.buttons = look.pictures.map((p) => {
      const button = make('button');
      button.type = 'button';
      button.append(drawPicture(p, `own picture ${p.index + 1}`));
      button.onclick = () => this.select(p.index, null);
      return button;
    });
    this.none = make('button', 'No picture', 'none');
    this.none.type = 'button';
    this.none.onclick = () => this.select(null, null);
    $('ask-pictures').replaceChildren(...this.buttons, this.none);
    $('ask').disabled = false;
    this.select(look.pictures.length ? 0 : null, null);
  }

  select(picture, file) {
    this.picture = picture;
    this.file = file;
    $('ask-file-name').textContent = file ? file.name : '';
    (this.buttons ?? []).forEach((b, i) => b.setAttribute('aria-pressed', String(i === picture)));
    this.none?.setAttribute('aria-pressed', String(picture === null && !file));
    // Another picture may be asked whatever was asked before; a sample without picture has null there.
    const own = this.look.samples.filter((s) => file || s.picture === picture);
    const questions = [...new Set(own.map((s) => s.question))].filter(Boolean).slice(0, SUGGESTIONS);
    $('ask-suggestions').replaceChildren(
      ...questions.map((question) => {
        const button = make('button', question, 'suggestion');
        button.type = 'button';
        button.onclick = () => {
          $('question').value = question;
          this.ask();
        };
        return button;
      }),
    );
  }

  async ask() {
    const question = $('question').value.trim();
    if (!question && this.picture === null && !this.file) {
      showError('there is neither a picture nor a question; choose a picture or write a question');
      return;
    }
    clearError();
    $('ask').disabled = true;
    $('ask-stop').hidden = false;
    $('answer-before').textContent = '…';
    $('answer-after').textContent = '…';
    $('answer-origin').textContent = '';
    try {
      const answer = await this.tab.call('ask', { url: socketUrl, federation: this.federation, picture: this.picture, file: this.file, question });
      $('answer-before').textContent = answer.before || '(an empty answer)';
      $('answer-after').textContent = answer.after === null ? '–' : answer.after || '(an empty answer)';
      const known = this.look.samples.find((s) => this.file === null && s.picture === this.picture && s.question === question);
      const origin = answer.adapters ? `Adapters: ${answer.adapters}.` : 'There are no tuned adapters in this tab yet; join first.';
      $('answer-origin').textContent = known ? `${origin} Your answer: ${known.answer}.` : origin;
      note({ type: 'answered', question, ...answer });
    } catch (e) {
      $('answer-before').textContent = '–';
      $('answer-after').textContent = '–';
      showError(e);
    } finally {
      $('ask').disabled = false;
      $('ask-stop').hidden = true;
    }
  }
}
