// A duplicated tab has a copy of the session storage, token included, and would take the participation away from the first tab:
// so tabs ask each other. A broadcast channel works without https too, unlike Web Locks.

/** The others' pages are never busy for so long, milliseconds. */
const PATIENCE = 300;
const channel = new BroadcastChannel('fednano');

/** Answer other tabs about the token that `mine()` gives. */
export function answerTwins(mine) {
  channel.addEventListener('message', ({ data }) => {
    if (data.asked && data.asked === mine()) channel.postMessage({ held: data.asked });
  });
}

/** Does another tab take part with this token? */
export function heldByTwin(token) {
  return new Promise((resolve) => {
    const timer = setTimeout(() => finish(false), PATIENCE);
    const hear = ({ data }) => {
      if (data.held === token) finish(true);
    };
    const finish = (held) => {
      clearTimeout(timer);
      channel.removeEventListener('message', hear);
      resolve(held);
    };
    channel.addEventListener('message', hear);
    channel.postMessage({ asked: token });
  });
}
