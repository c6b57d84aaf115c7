// Two line charts, by uPlot.
import uPlot from './pkg/uplot/uPlot.esm.js';

const HEIGHT = 200;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = matchMedia('(prefers-color-scheme: dark)');

/** A chart that fills `box`; `set(xs, ys)` shows values. */
function lineChart(box, { x, y, stroke, range, points, ticks, minimum }) {
  const axis = { stroke: () => colour('--quiet'), grid: { stroke: () => colour('--line'), width: 1 }, ticks: { stroke: () => colour('--line'), width: 1 } };
  const plot = new uPlot(
    {
      width: Math.max(200, box.clientWidth),
      height: HEIGHT,
      legend: { show: false },
      cursor: { drag: { x: false, y: false } },
      scales: { x: { time: false, range: (_, low, high) => (low == null ? [0, minimum] : [low, Math.max(high, low + minimum)]) }, y: { range } },
      axes: [{ ...axis, size: 34, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] }, { ...axis, size: 60, values: ticks }],
      series: [{ label: x }, { label: y, stroke: () => colour(stroke), width: 2, points: { show: points, size: 7, fill: () => colour(stroke) } }],
    },
    [[], []],
    box,
  );
  new ResizeObserver(() => plot.setSize({ width: Math.max(200, box.clientWidth), height: HEIGHT })).observe(box);
  dark.addEventListener('change', () => plot.redraw());
  return { set: (xs, ys) => plot.setData([xs, ys]) };
}

export const lossChart = (box) =>
  lineChart(box, {
    x: 'step',
    y: 'loss',
    stroke: '--accent',
    points: false,
    minimum: 10,
    range: (_, low, high) => [0, Math.max(0.1, (high ?? 1) * 1.05)],
    ticks: (_, values) => values.map((v) => String(Number(v.toPrecision(3)))),
  });

export const accuracyChart = (box) =>
  lineChart(box, {
    x: 'round',
    y: 'right',
    stroke: '--second',
    points: true,
    minimum: 1,
    range: [0, 100],
    ticks: (_, values) => values.map((v) => `${v} %`),
  });
