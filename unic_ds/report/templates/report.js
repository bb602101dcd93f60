"use strict";
// Draws the curves of a report; every switch is a button, so all of it works by keyboard.
(() => {
  const DASHES = [[], [9, 4], [2, 3], [9, 3, 2, 3]];
  const COLOURS = 8;
  const HEIGHT = 220;
  const holder = document.getElementById("data");
  const data = JSON.parse(holder.textContent);
  const several = data.runs.length > 1;
  const plots = [];
  const runsOff = new Set();
  let range = null; // steps that all charts show; null: all
  let logarithmic = false;
  let smoothed = false;

  const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = (value) => {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  };

  const stepText = (ticks) => {
    const far = ticks.length > 1 && ticks[1] - ticks[0] >= 1000;
    const format = new Intl.NumberFormat("en", far ? { notation: "compact", maximumFractionDigits: 2 } : {});
    return ticks.map((tick) => (Number.isInteger(tick) ? format.format(tick) : ""));
  };

  // Running mean over a fiftieth of the points, an even number: extremes come in pairs. A gap stays.
  function smooth(values) {
    const half = Math.max(1, Math.round(values.length / 100));
    const sums = [0];
    const counts = [0];
    values.forEach((value, i) => {
      sums.push(sums[i] + (value ?? 0));
      counts.push(counts[i] + (value === null ? 0 : 1));
    });
    return values.map((value, i) => {
      const [from, to] = [Math.max(0, i - half), Math.min(values.length, i + half)];
      return value === null ? null : (sums[to] - sums[from]) / (counts[to] - counts[from]);
    });
  }

  // One table [steps, values...] of all curves of a chart, whose steps may differ.
  function tableOf(chart) {
    const tables = chart.lines.map((line) => {
      const run = data.runs[line.run];
      const [axis, values] = run.series[line.name];
      const means = smoothed ? smooth(values) : values;
      const shown = logarithmic && chart.log ? means.map((v) => (v > 0 ? v : null)) : means;
      return [run.steps[axis], shown];
    });
    const first = tables[0][0];
    if (tables.every((table) => table[0] === first)) return [first, ...tables.map((t) => t[1])];
    return uPlot.join(tables);
  }

  class Plot {
    constructor(figure) {
      this.figure = figure;
      this.place = figure.querySelector(".plot");
      this.chart = data.charts[Number(figure.dataset.chart)];
      this.buttons = [...figure.querySelectorAll("[data-line]")];
      this.outputs = this.buttons.map((button) => button.querySelector("output"));
      this.last = this.outputs.map((output) => output.textContent);
      this.off = new Set();
      this.buttons.forEach((button, i) => button.addEventListener("click", () => this.toggle(i)));
    }

    shown(i) {
      return !this.off.has(i) && !runsOff.has(this.chart.lines[i].run);
    }

    toggle(i) {
      if (!this.off.delete(i)) this.off.add(i);
      this.show();
    }

    show() {
      this.buttons.forEach((button, i) => {
        button.setAttribute("aria-pressed", String(this.shown(i)));
        if (this.plot) this.plot.setSeries(i + 1, { show: this.shown(i) });
      });
    }

    draw() {
      if (this.plot) this.plot.destroy();
      const table = tableOf(this.chart);
      const steps = table[0];
      this.ends = [steps[0], steps[steps.length - 1]];
      if (this.ends[0] === this.ends[1]) this.ends = [this.ends[0] - 1, this.ends[1] + 1];
      this.plot = new uPlot(this.options(), table, this.place);
      if (range) this.zoom();
    }

    options() {
      const ink = colourOf("--faint");
      const grid = { stroke: colourOf("--grid"), width: 1 };
      const axis = { stroke: ink, grid, ticks: grid, font: "12px system-ui, sans-serif" };
      const log = logarithmic && this.chart.log;
      return {
        width: this.place.clientWidth || 300,
        height: HEIGHT,
        padding: [8, 18, 0, 0],
        legend: { show: false },
        cursor: {
          y: false,
          sync: { key: "steps" },
          drag: { x: true, y: false, setScale: false },
          bind: { dblclick: () => () => setRange(null) },
        },
        scales: { x: { time: false, range: () => this.span() }, y: { distr: log ? 3 : 1 } },
        axes: [
          { ...axis, size: 30, space: 70, values: (_, ticks) => stepText(ticks) },
          { ...axis, size: 64, space: log ? 24 : 34, values: (_, ticks) => ticks.map(number) },
        ],
        series: [{}, ...this.chart.lines.map((line, i) => this.style(several ? line.run : i, i))],
        hooks: {
          setSelect: [(u) => this.select(u)],
          setCursor: [(u) => this.read(u)],
        },
      };
    }

    style(place, i) {
      const colour = place % COLOURS;
      const dash = (colour + Math.floor(place / COLOURS)) % DASHES.length;
      return {
        show: this.shown(i),
        stroke: colourOf(`--c${colour}`),
        width: 1.75,
        dash: DASHES[dash],
        spanGaps: false,
        points: { size: 5, space: 12 },
      };
    }

    span() {
      return range || this.ends;
    }

    zoom() {
      const [min, max] = this.span();
      this.plot.setScale("x", { min, max });
    }

    select(u) {
      if (u.select.width < 4) return;
      const from = u.posToVal(u.select.left, "x");
      const to = u.posToVal(u.select.left + u.select.width, "x");
      u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      setRange([from, to]);
    }

    // Shows the values at the cursor beside the names; the last values without one.
    read(u) {
      const at = u.cursor.idx;
      this.outputs.forEach((output, i) => {
        if (at === null || at === undefined) {
          output.textContent = this.last[i];
          return;
        }
        let k = at;
        while (k > 0 && u.data[i + 1][k] === undefined) k -= 1;
        output.textContent = number(u.data[i + 1][k]);
      });
    }

    resize() {
      const width = this.place.clientWidth;
      if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
    }
  }

  function everything() {
    const ends = plots.filter((p) => p.ends).map((p) => p.ends);
    return [Math.min(...ends.map((e) => e[0])), Math.max(...ends.map((e) => e[1]))];
  }

  function setRange(wanted) {
    const [first, last] = everything();
    range = wanted;
    if (range) {
      const width = Math.min(Math.max(range[1] - range[0], 1), last - first);
      const from = Math.min(Math.max(range[0], first), last - width);
      range = width >= last - first ? null : [from, from + width];
    }
    plots.forEach((plot) => plot.plot && plot.zoom());
    const text = range ? `steps ${Math.ceil(range[0]).toLocaleString("en")} to ${Math.floor(range[1]).toLocaleString("en")}` : "all steps";
    document.querySelector(".range").textContent = text;
  }

  const views = {
    in: ([a, b]) => [a + (b - a) / 4, b - (b - a) / 4],
    out: ([a, b]) => [a - (b - a) / 2, b + (b - a) / 2],
    left: ([a, b]) => [a - (b - a) / 2, b - (b - a) / 2],
    right: ([a, b]) => [a + (b - a) / 2, b + (b - a) / 2],
    all: () => null,
  };

  function drawAll() {
    plots.forEach((plot) => plot.draw());
  }

  function tools() {
    const bar = document.querySelector(".tools");
    if (!bar) return;
    bar.hidden = false;
    bar.querySelectorAll("[data-view]").forEach((button) => {
      button.addEventListener("click", () => {
        const view = button.dataset.view;
        if (view in views) {
          setRange(views[view](range || everything()));
          return;
        }
        const on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(on));
        if (view === "log") logarithmic = on;
        else smoothed = on;
        plots.filter((plot) => plot.chart.log || view === "smooth").forEach((plot) => plot.draw());
      });
    });
    bar.querySelectorAll("[data-run]").forEach((button) => {
      button.addEventListener("click", () => {
        const run = Number(button.dataset.run);
        if (!runsOff.delete(run)) runsOff.add(run);
        button.setAttribute("aria-pressed", String(!runsOff.has(run)));
        plots.forEach((plot) => plot.show());
      });
    });
  }

  // On paper: light colours, all details open, every chart drawn at the page's width.
  function printing() {
    let opened = [];
    window.addEventListener("beforeprint", () => {
      document.documentElement.classList.add("paper");
      opened = [...document.querySelectorAll("details:not([open])")];
      opened.forEach((details) => { details.open = true; });
      drawAll();
      plots.forEach((plot) => plot.resize());
    });
    window.addEventListener("afterprint", () => {
      document.documentElement.classList.remove("paper");
      opened.forEach((details) => { details.open = false; });
      drawAll();
    });
  }

  // Off unless asked for: a page that loads itself anew loses a zoom and a screen reader's place.
  function reloading() {
    const box = document.getElementById("reload");
    if (!box) return;
    box.parentElement.hidden = false;
    box.checked = location.hash === "#reload";
    box.addEventListener("change", () => {
      history.replaceState(null, "", box.checked ? "#reload" : location.pathname + location.search);
    });
    setInterval(() => {
      if (box.checked && document.visibilityState === "visible") location.reload();
    }, 60_000);
  }

  document.querySelectorAll("[data-chart]").forEach((figure) => plots.push(new Plot(figure)));
  tools();
  printing();
  reloading();
  drawAll();
  const sized = new ResizeObserver(() => plots.forEach((plot) => plot.resize()));
  plots.forEach((plot) => sized.observe(plot.place));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  document.documentElement.dataset.drawn = String(plots.length);
})();
