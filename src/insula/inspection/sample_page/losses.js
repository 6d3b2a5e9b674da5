"use strict";
// 3. Losses: what is averaged over what, each scored token, and the flow error over time.
insula.sections.push(["Losses", "losses", (page) => insula.each(page, (data, id) => {
  const { el } = insula;
  const { losses, about } = data;
  if (!losses) return el("p", { class: "missing" }, "Not measured: the model was not run.");
  const { number, visible } = insula;
  const of = Object.fromEntries(data.tokens.map((token) => [token.column, token]));
  const summary = insula.table(["loss", "value", "mean over", "weight", "share of the total"], [
    ["token", about.scored ? number(losses.fast, 4) : "none",
      el("td", { class: "wrap" }, `${about.scored} scored tokens; never prompt, state or padding`), `λ = ${losses.weight}`, number(losses.weight * losses.fast, 4)],
    ["flow", losses.error ? number(losses.flow, 4) : "none",
      el("td", { class: "wrap" }, losses.error
        ? `${about.real_steps} real of ${losses.horizon} steps × ${losses.real_dims} of ${losses.action_dim} dimensions × ` +
          `${losses.flow_draws} draws of noise and time`
        : "this sample has no actions"), "1", number(losses.flow, 4)],
    ["total", number(losses.total, 4), "", "", ""],
  ], { id: id("totals") });

  const rows = losses.tokens.map((scored) => {
    const token = of[scored.column];
    return insula.likeliest([`${scored.column} “${visible(token.text)}”`, number(scored.loss)], { ...scored, id: token.id }, "right");
  });
  const nodes = [el("p", {}, `total = flow + λ · token = ${number(losses.total, 4)}, on this sample, with ${page.subject.parameters} weights.`), summary];
  if (rows.length) {
    const place = el("div", { class: "wide-chart" });
    queueMicrotask(() => insula.chart(place, {
      title: "token loss of each scored token", x: losses.tokens.map((t) => t.column), xLabel: "column", points: true,
      series: [{ label: "−log p", color: "fast" }], values: [losses.tokens.map((t) => t.loss)],
    }));
    nodes.push(el("h4", {}, "Each scored token"), place,
      insula.table(["column, token", "loss", "probability", "the five likeliest"], rows, { class: "scored", id: id("scored") }));
  }
  if (losses.error) nodes.push(el("h4", {}, "The flow error over time"), ...flow(losses.error));
  return nodes;

  function flow(error) {
    // Steps past the end of the episode hold 0, and would pull the curve down.
    const mean = error.times.map((_, t) => average(error.by_step[t].filter((_, n) => error.steps[n])));
    const place = el("div", { class: "wide-chart" });
    queueMicrotask(() => insula.chart(place, {
      title: "mean over steps and dimensions", x: error.times, xLabel: "t (1 is noise)", points: true,
      series: [{ label: "squared error", color: "look" }], values: [mean],
    }));
    const heat = (name, labels, rows, real) => {
      const largest = Math.max(...rows.flat(), 1e-12);
      const lines = labels.map((label, n) => [label, ...error.times.map((t, i) => real[n]
        ? el("td", {
          class: "heat", title: `${label}, t = ${t}: ${number(rows[i][n])}`,
          style: { background: `color-mix(in srgb, var(--look) ${(85 * rows[i][n]) / largest}%, transparent)` },
        }, number(rows[i][n], 2))
        : el("td", { class: "zero", title: "not real: no loss" }, "no loss"))]);
      return insula.table([name, ...error.times.map((t) => `t ${t}`)], lines, { class: "heats" });
    };
    const dims = data.chunk?.names ?? [];
    return [
      el("p", {}, `Squared error of the velocity, the mean of ${error.draws} draws of noise, the same at every t.`),
      place,
      heat("step", error.steps.map((_, n) => `step ${n}`), error.by_step, error.steps),
      heat("dimension", error.dims.map((_, n) => dims[n] ?? `dimension ${n}`), error.by_dim, error.dims),
    ];
  }
  function average(values) {
    return values.reduce((sum, value) => sum + value, 0) / values.length;
  }
})]);
