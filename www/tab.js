// The page's handle on the worker.

export class WorkerTab {
  /** `onEvent(message)` hears what the worker says by itself. */
  constructor(onEvent) {
    this.waiting = new Map();
    this.next = 1;
    /** Why nothing works any more. */
    this.broken = '';
    this.worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
    this.worker.onmessage = ({ data }) => {
      if (data.event) {
        if (data.event === 'crash') this.fail(`the program stopped: ${data.cause}; reload the page, or add device=cpu to its address`);
        onEvent(data);
        return;
      }
      const waiting = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if (!waiting) return;
      if (data.error === undefined) waiting.resolve(data.result);
      else waiting.reject(new Error(data.error));
    };
    // A worker that could not even start.
    this.worker.onerror = (e) => {
      if (!this.broken) this.fail(`the program could not be started (${e.message || 'www/pkg is missing or damaged'}); run 'just web' on the server and reload`);
    };
  }

  /** Everything that waits, and all that comes, gets this error. */
  fail(message) {
    this.broken = message;
    for (const { reject } of this.waiting.values()) reject(new Error(message));
    this.waiting.clear();
  }

  /** Run a command of worker.js. */
  call(cmd, args) {
    if (this.broken) return Promise.reject(new Error(this.broken));
    const id = this.next++;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, cmd, args });
    });
  }
}
