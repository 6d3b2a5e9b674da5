"use strict";
// Elements, packed arrays, numbers as text, and charts: what every section needs.
const insula = { sections: [] };

/** el("p", {class: "soft"}, "text", node, [more]): text is never read as HTML. */
insula.el = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "style") Object.assign(node.style, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
};

insula.table = (head, rows, attributes = {}) => {
  const { el } = insula;
  const line = (cell, tag, scope) => (cell instanceof HTMLTableCellElement ? cell : el(tag, { scope }, cell));
  return el("div", { class: "scroll" },
    el("table", attributes,
      el("thead", {}, el("tr", {}, head.map((cell) => line(cell, "th", "col")))),
      el("tbody", {}, rows.map((row) =>
        el("tr", {}, row.map((cell, i) => (i ? line(cell, "td") : line(cell, "th", "row"))))))));
};

/** What `build` makes of every sequence of the frame: one after another, each under its name where there are several.
 * `build(sequence, id)`: `id(name)` makes a name that no other sequence has. */
insula.each = (data, build) => {
  const { el } = insula;
  const all = [data, ...data.others];
  if (all.length === 1) return build(data, (name) => name);
  return all.map((one, n) => el("article", { "data-source": one.about.source },
    el("h3", { class: "title" }, one.about.title, el("span", { class: "soft" }, ` ${one.about.source}, sample ${one.about.number}`)),
    build(one, (name) => (n ? `${name}-${n}` : name))));
};
/** What `build` makes of one sequence of the frame, with a choice where there are several. */
insula.either = (data, build) => {
  const { el } = insula;
  const all = [data, ...data.others];
  if (all.length === 1) return build(data);
  const place = el("div", {}, build(data));
  const choices = all.map(({ about }, n) => el("label", {},
    el("input", { type: "radio", name: "sequence", value: about.source, checked: !n }), about.title));
  choices.forEach((label, n) => label.firstChild.addEventListener("change", () =>
    place.replaceChildren(...[build(all[n])].flat(Infinity))));
  return [el("fieldset", { class: "choices" }, el("legend", {}, "sequence"), choices), place];
};

/** A row of a table: its first `cells`, then the probability of a token `id` and the likeliest in its place, where
 * `mark` is the class of that token. */
insula.likeliest = (cells, { id, probability, top }, mark) => [
  ...cells,
  insula.el("td", {}, insula.el("span", { class: "meter" }, insula.el("i", { style: { width: `${100 * probability}%` } })),
    insula.el("span", { class: "share" }, insula.percent(probability))),
  insula.el("td", { class: "top" }, top.map((other) => insula.el("span", {
    class: other.id === id ? mark : null, title: `id ${other.id}`,
  }, `${insula.visible(other.text)} ${insula.percent(other.probability)}`))),
];

/** The typed array of what `pack` wrote: base64 of a deflated buffer. */
insula.unpack = async ({ dtype, data }) => {
  const raw = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return dtype === "uint8" ? new Uint8Array(buffer) : new Float32Array(buffer);
};

insula.number = (value, digits = 3) => {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
};
insula.percent = (value) => (value === null ? "–" : `${insula.number(100 * value, value < 0.1 ? 2 : 3)} %`);
/** A token's text with its blanks made visible. */
insula.visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "·");

insula.color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");
/** Draw now, and again whenever light turns dark. */
insula.themed = (draw) => {
  draw();
  dark.addEventListener("change", draw);
};

/** A tenth above and below; what hardly moves is not blown up to look as if it did. */
const margin = (low, high) => Math.max(0.1 * (high - low), (0.25 - (high - low)) / 2);
/** A uPlot chart: lines of `series` ({label, color, dash, width}) over x, as wide as its place. */
insula.chart = (place, { title, x, xLabel, series, values, height = 170, legend = true, points = false }) => {
  let plot = null;
  insula.themed(() => {
    plot?.destroy();
    const axis = { stroke: insula.color("soft"), grid: { stroke: insula.color("line"), width: 1 }, ticks: { show: false } };
    plot = new uPlot({
      title,
      width: Math.max(place.clientWidth, 180),
      height,
      legend: { show: legend },
      scales: { x: { time: false }, y: { range: (_, low, high) => [low - margin(low, high), high + margin(low, high)] } },
      axes: [{ ...axis, label: xLabel, labelSize: 20, size: 30 }, { ...axis, size: 44 }],
      series: [{ label: xLabel }, ...series.map((s) => ({
        label: s.label, stroke: insula.color(s.color), dash: s.dash, width: s.width ?? 2, points: { show: points },
        value: (_, v) => insula.number(v),
      }))],
    }, [x, ...values], place);
  });
  new ResizeObserver(() => plot.setSize({ width: Math.max(place.clientWidth, 180), height })).observe(place);
};

/** Chunks of actions over each other, a small chart for each dimension: `drawn` are [label, rows or null, color, dash]. */
insula.chunks = (id, names, drawn) => {
  const { el } = insula;
  const series = drawn.filter(([, rows]) => rows);
  const place = el("div", { class: "charts", id });
  // Later: a chart takes its width from its place, which has none before it is in the page.
  queueMicrotask(() => names.forEach((name, d) => {
    const box = el("div", { class: "small-chart" });
    place.append(box);
    insula.chart(box, {
      title: name, x: series[0][1].map((_, n) => n), xLabel: "step", height: 140, legend: false,
      series: series.map(([label, , color, dash]) => ({ label, color, dash })),
      values: series.map(([, rows]) => rows.map((row) => row[d])),
    });
  }));
  return [
    el("p", { class: "legend" }, series.map(([label, , color]) => el("span", { class: "key", style: { color: `var(--${color})` } }, label))),
    place,
  ];
};

/** Two canvases never agree on pixels by themselves: size one to its place, in device pixels. Returns the ratio. */
insula.fit = (canvas, width, height) => {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  return ratio;
};
