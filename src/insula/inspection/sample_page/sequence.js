"use strict";
// 1. The sequence: images and their patches, every token with its four masks, and the chunk as FAST writes it.
insula.sections.push(["The sequence", "sequence", (page) => {
  const { el } = insula;
  const masks = [
    ["token_mask", "token", "real, not padding"],
    ["ar_mask", "ar", "starts a causal step"],
    ["loss_mask", "loss", "scored by the token loss"],
    ["visible", "expert", "visible to the action expert"],
  ];
  const bits = (token) => masks.map(([key]) => `${key === "visible" ? "visible to expert" : key} ${token[key]}`).join(", ");

  const patchReadout = readoutOf("patch-readout", "Hover a patch, or walk over them with the arrow keys.");
  const cameras = page.cameras.map((camera) => {
    if (!camera.present)
      return el("figure", { class: "camera" }, el("p", { class: "absent" }, "absent"),
        el("figcaption", {}, `${camera.name}: this sample has no such camera; its tokens are masked`));
    const say = (patch) => {
      const column = camera.first + patch;
      patchReadout.textContent = `column ${column}: ${camera.name}, patch in row ${Math.floor(patch / camera.grid)}, ` +
        `column ${patch % camera.grid}; token_mask 1, ar_mask 0, loss_mask 0, visible to expert 1`;
    };
    const { canvas } = insula.patches(camera, { label: `${camera.name}, ${camera.grid} × ${camera.grid} patches`, say, mark: true });
    const [h, w] = camera.original;
    const resized = h === camera.size && w === camera.size ? "" : `, resized from ${w} × ${h}`;
    return el("figure", { class: "camera" }, canvas,
      el("figcaption", {}, `${camera.name}: columns ${camera.first} to ${camera.first + camera.grid ** 2 - 1}, ` +
        `${camera.size} × ${camera.size} px${resized}`));
  });

  const [images, all] = page.about.cut;
  return [
    el("p", {}, `${all} columns: ${images} of images, then ${all - images} of text. Positions count real columns only. ` +
      "Under each token, from the left: " + masks.map(([, name, why]) => `${name} (${why})`).join(", ") + "."),
    el("div", { class: "cameras" }, cameras),
    patchReadout,
    insula.each(page, tokensOf),
  ];

  function readoutOf(id, text) {
    return el("output", { class: "readout", id, "aria-live": "polite" }, text);
  }

  function tokensOf(data, id) {
    const readout = readoutOf(id("token-readout"), "Hover a token, or walk over them with the arrow keys.");
    const chunk = data.chunk;
    const coefficients = chunk?.coefficients && coefficientTable(chunk, id);
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
    return [
      el("p", { class: "legend" }, kinds.map((kind) => el("span", { class: `key kind-${kind}` }, kind))),
      list,
      readout,
      chunk ? chunkParts(chunk, coefficients, id) : el("p", { class: "soft" }, "The answer is in words: it has no chunk of actions."),
    ];
  }

  /** Rows: frequencies; columns: action dimensions. `mark` takes a span as FAST counts: row by row. */
  function coefficientTable({ names, coefficients: rows }, id) {
    const cells = rows.flatMap((row) => row.map((value) => el("td", { class: value ? null : "zero" }, value)));
    const body = rows.map((_, f) => [`frequency ${f}`, ...cells.slice(f * names.length, (f + 1) * names.length)]);
    return {
      node: insula.table(["DCT coefficient", ...names], body, { class: "coefficients", id: id("coefficients") }),
      mark: (span) => cells.forEach((cell, n) => cell.classList.toggle("marked", Boolean(span) && n >= span[0] && n < span[1])),
    };
  }

  function chunkParts(seen, drawn, id) {
    if (!seen.actions) return el("p", { class: "bad" }, `The chunk has no FAST tokens: ${seen.invalid}.`);
    const real = seen.action_mask.filter((row) => row.some(Boolean)).length;
    const charts = insula.chunks(id("chunk"), seen.names, [["what was recorded", seen.actions, "ink"],
      ["read back from FAST tokens", seen.decoded, "fast", [6, 4]], ["what the policy does", seen.policy, "look", [2, 3]]]);
    return [
      el("h4", {}, "The chunk of actions, in FAST tokens and back"),
      el("p", {}, seen.decoded
        ? `${seen.actions.length} steps (${real} real) × ${seen.names.length} dimensions, normalized; ${Object.keys(seen.spans).length} ` +
          `FAST tokens carry the coefficients, scaled by ${seen.scale} and rounded. Root mean square of what is lost: ${insula.number(seen.error)}.`
        : `There is nothing to read back, ${seen.invalid}.`),
      charts,
      drawn.node,
    ];
  }
}]);
