"use strict";
// 1. The sequence: images and their patches, every token with its four masks, and the chunk as FAST writes it.
insula.sections.push(["The sequence", "sequence", (data) => {
  const { el } = insula;
  const readout = el("output", { class: "readout", id: "token-readout", "aria-live": "polite" },
    "Hover a patch or a token, or walk over them with the arrow keys.");
  const masks = [
    ["token_mask", "token", "real, not padding"],
    ["ar_mask", "ar", "starts a causal step"],
    ["loss_mask", "loss", "scored by the token loss"],
    ["visible", "expert", "visible to the action expert"],
  ];
  const bits = (token) => masks.map(([key]) => `${key === "visible" ? "visible to expert" : key} ${token[key]}`).join(", ");

  const cameras = data.cameras.map((camera) => {
    if (!camera.present)
      return el("figure", { class: "camera" }, el("p", { class: "absent" }, "absent"),
        el("figcaption", {}, `${camera.name}: this sample has no such camera; its tokens are masked`));
    const say = (patch) => {
      const column = camera.first + patch;
      readout.textContent = `column ${column}: ${camera.name}, patch in row ${Math.floor(patch / camera.grid)}, ` +
        `column ${patch % camera.grid}; token_mask 1, ar_mask 0, loss_mask 0, visible to expert 1`;
    };
    const { canvas } = insula.patches(camera, { label: `${camera.name}, ${camera.grid} × ${camera.grid} patches`, say, mark: true });
    const [h, w] = camera.original;
    const resized = h === camera.size && w === camera.size ? "" : `, resized from ${w} × ${h}`;
    return el("figure", { class: "camera" }, canvas,
      el("figcaption", {}, `${camera.name}: columns ${camera.first} to ${camera.first + camera.grid ** 2 - 1}, ` +
        `${camera.size} × ${camera.size} px${resized}`));
  });

  const chunk = data.chunk;
  const coefficients = chunk?.coefficients && coefficientTable(chunk);
  const describe = (token) => {
    const words = token.kind === "padding" ? "padding" : `“${insula.visible(token.text)}”`;
    let text = `column ${token.column}: ${words} (${token.kind}), id ${token.id}, position ${token.position}; ${bits(token)}`;
    const span = chunk?.spans?.[token.column];
    if (span) {
      const dims = chunk.names.length;
      const shown = [];
      for (let n = span[0]; n < span[1]; n += 1)
        shown.push(`frequency ${Math.floor(n / dims)} of ${chunk.names[n % dims]}: ${chunk.coefficients[Math.floor(n / dims)][n % dims]}`);
      text += `. Carries ${span[1] - span[0]} DCT coefficients: ${shown.join("; ")}`;
    }
    readout.textContent = text;
    coefficients?.mark(span);
  };
  const chips = data.tokens.map((token, n) => {
    const chip = el("li", {
      class: `token kind-${token.kind}`, "data-column": token.column, tabindex: n ? -1 : 0, role: "option",
      "aria-label": `${token.kind} ${token.text}, id ${token.id}`,
    },
    el("span", { class: "piece" }, token.kind === "padding" ? "" : insula.visible(token.text)),
    el("small", {}, token.id),
    el("span", { class: "masks", "aria-hidden": "true" },
      masks.map(([key]) => el("i", { "data-mask": key, class: token[key] ? "on" : "off" }))));
    chip.addEventListener("pointerenter", () => describe(token));
    chip.addEventListener("focus", () => describe(token));
    return chip;
  });
  // One stop of the Tab key for the whole list, and arrow keys inside it: a prompt has hundreds of tokens.
  const list = el("ol", { class: "tokens", role: "listbox", "aria-label": "tokens" }, chips);
  list.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -chips.length, End: chips.length }[event.key];
    const here = chips.indexOf(document.activeElement);
    if (!step || here < 0) return;
    event.preventDefault();
    const next = chips[Math.min(chips.length - 1, Math.max(0, here + step))];
    chips[here].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  const kinds = [...new Set(data.tokens.map((token) => token.kind))];
  const [images, all] = data.about.cut;
  return [
    el("p", {}, `${all} columns: ${images} of images, then ${all - images} of text. Positions count real columns only. ` +
      "Under each token, from the left: " + masks.map(([, name, why]) => `${name} (${why})`).join(", ") + "."),
    el("div", { class: "cameras" }, cameras),
    el("p", { class: "legend" }, kinds.map((kind) => el("span", { class: `key kind-${kind}` }, kind))),
    list,
    readout,
    chunk ? chunkParts(chunk, coefficients) : el("p", { class: "soft" }, "A question: it has no chunk of actions."),
  ];

  /** Rows: frequencies; columns: action dimensions. `mark` takes a span as FAST counts: row by row. */
  function coefficientTable({ names, coefficients: rows }) {
    const cells = rows.flatMap((row) => row.map((value) => el("td", { class: value ? null : "zero" }, value)));
    const body = rows.map((_, f) => [`frequency ${f}`, ...cells.slice(f * names.length, (f + 1) * names.length)]);
    return {
      node: insula.table(["DCT coefficient", ...names], body, { id: "coefficients" }),
      mark: (span) => cells.forEach((cell, n) => cell.classList.toggle("marked", Boolean(span) && n >= span[0] && n < span[1])),
    };
  }

  function chunkParts(seen, drawn) {
    if (!seen.actions) return el("p", { class: "bad" }, `The chunk has no FAST tokens: ${seen.invalid}.`);
    const steps = seen.actions.map((_, n) => n);
    const real = seen.action_mask.filter((row) => row.some(Boolean)).length;
    const place = el("div", { class: "charts", id: "chunk" });
    const series = [["what was recorded", "actions", "ink", null], ["read back from FAST tokens", "decoded", "fast", [6, 4]],
      ["what the policy does", "policy", "look", [2, 3]]].filter(([, key]) => seen[key]);
    // Later: a chart takes its width from its place, which has none before it is in the page.
    queueMicrotask(() => seen.names.forEach((name, d) => {
      const box = el("div", { class: "small-chart" });
      place.append(box);
      insula.chart(box, {
        title: name, x: steps, xLabel: "step", height: 140, legend: false,
        series: series.map(([label, , color, dash]) => ({ label, color, dash: dash ?? undefined })),
        values: series.map(([, key]) => seen[key].map((row) => row[d])),
      });
    }));
    return [
      el("h3", {}, "The chunk of actions, in FAST tokens and back"),
      el("p", {}, seen.decoded
        ? `${seen.actions.length} steps (${real} real) × ${seen.names.length} dimensions, normalized; ${Object.keys(seen.spans).length} ` +
          `FAST tokens carry the coefficients, scaled by ${seen.scale} and rounded. Root mean square of what is lost: ${insula.number(seen.error)}.`
        : `There is nothing to read back, ${seen.invalid}.`),
      el("p", { class: "legend" }, series.map(([label, , color]) => el("span", { class: "key", style: { color: `var(--${color})` } }, label))),
      place,
      drawn.node,
    ];
  }
}]);
