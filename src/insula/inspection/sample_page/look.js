"use strict";
// 6. Model attention: where the action expert's queries look, layer by layer.
insula.sections.push(["Where the expert looks", "look", (data) => {
  const { el } = insula;
  const { look } = data;
  if (!look) {
    const why = data.subject.parameters !== "trained" ? "needs a trained model: --run RUN" : "this sample has no actions";
    return el("p", { class: "missing" }, `Not measured: ${why}.`);
  }
  const [times, depth, heads, columns] = look.weights.shape;
  const [images] = data.about.cut;
  const readout = el("output", { class: "readout", id: "look-readout", "aria-live": "polite" }, "Hover a patch or a word for its share.");
  const choose = (name, options) => el("label", {}, name, el("select", { name }, options.map((text, n) => el("option", { value: n }, text))));
  const pick = [
    choose("layer", Array.from({ length: depth }, (_, n) => `layer ${n}`)),
    choose("head", ["mean of all", ...Array.from({ length: heads }, (_, n) => `head ${n}`)]),
    choose("time", look.times.map((t) => `t = ${t}${t === 1 ? " (noise)" : ""}`)),
  ];
  const value = (n) => Number(pick[n].lastChild.value);
  let shares = new Float32Array(columns);
  const views = data.cameras.filter((camera) => camera.present).map((camera) => {
    const shown = insula.patches(camera, {
      label: `attention over ${camera.name}`,
      say: (patch) => { readout.textContent = `${camera.name}, patch ${Math.floor(patch / camera.grid)}, ${patch % camera.grid}: ${insula.percent(shares[camera.first + patch])} of the attention`; },
    });
    const caption = el("figcaption", {});
    return { camera, caption, ...shown, node: el("figure", { class: "camera" }, shown.canvas, caption) };
  });
  const words = data.tokens.filter((token) => token.visible).map((token) => {
    const node = el("span", { class: "word", tabindex: 0 }, insula.visible(token.text));
    const say = () => { readout.textContent = `“${insula.visible(token.text)}” (${token.kind}): ${insula.percent(shares[token.column])} of the attention`; };
    node.addEventListener("pointerenter", say);
    node.addEventListener("focus", say);
    return { token, node };
  });
  const split = el("p", { id: "look-split" });

  const update = async () => {
    // Packed as [time, layer, head, column].
    const all = await (insula.looked ??= insula.unpack(look.weights));
    const [layer, head, time] = [value(0), value(1), value(2)];
    shares = new Float32Array(columns);
    for (let h = 0; h < heads; h += 1) {
      if (head && h !== head - 1) continue;
      const from = ((time * depth + layer) * heads + h) * columns;
      for (let n = 0; n < columns; n += 1) shares[n] += all[from + n] / (head ? 1 : heads);
    }
    const sum = (from, to) => shares.subarray(from, to).reduce((total, share) => total + share, 0);
    // Relative to the strongest: with hundreds of patches every share by itself would be invisible.
    const brightest = Math.max(...shares.subarray(0, images), 1e-9);
    for (const { camera, caption, show } of views) {
      const own = shares.subarray(camera.first, camera.first + camera.grid ** 2);
      show(own.map((share) => share / brightest));
      caption.textContent = `${camera.name}: ${insula.percent(sum(camera.first, camera.first + camera.grid ** 2))}`;
    }
    const heaviest = Math.max(...words.map(({ token }) => shares[token.column]), 1e-9);
    for (const { token, node } of words) node.style.background = `color-mix(in srgb, var(--look) ${(70 * shares[token.column]) / heaviest}%, transparent)`;
    split.textContent = `Images ${insula.percent(sum(0, images))}, prompt and state ${insula.percent(sum(images, look.memory))}, ` +
      `the action tokens themselves ${insula.percent(sum(look.memory, columns))}.`;
  };
  pick.forEach((label) => label.lastChild.addEventListener("change", update));
  update();
  return [
    el("p", {}, "Softmax weights of the action tokens' queries, the mean over them; brightest is the strongest patch, or word, of the layer. " +
      "Weights are not reasons, but a policy that looks at nothing is worth knowing."),
    el("fieldset", { class: "choices" }, el("legend", {}, "attention of"), pick),
    split,
    el("div", { class: "cameras" }, views.map(({ node }) => node)),
    el("p", { class: "words" }, words.map(({ node }) => node)),
    readout,
  ];
}]);
