// Byte counts as people read them; for the page and the worker.

export function bytes(n) {
  if (n < 1000) return `${n} B`;
  const units = ['kB', 'MB', 'GB', 'TB'];
  let value = n;
  let unit = -1;
  do {
    value /= 1000;
    unit += 1;
  } while (value >= 999.5 && unit < units.length - 1);
  return `${value >= 100 ? Math.round(value) : value.toPrecision(3)} ${units[unit]}`;
}
