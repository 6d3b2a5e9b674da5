"use strict";
// 2. Attention: the boolean matrix, every cell with its reason, and how others draw it.
insula.sections.push(["Who may look at whom", "attention", (data) => insula.either(data, (data) => {
  const { el } = insula;
  const { reasons, variants, actions, own, state_token: stateToken } = data.attention;
  const [images, columns] = data.about.cut;
  const size = columns + actions;
  const names = Array.from({ length: size }, (_, n) => nameOf(n));
  const kinds = Array.from({ length: size }, (_, n) => kindOf(n));

  const canvas = el("canvas", { id: "matrix", tabindex: 0, role: "img", "aria-label": "attention mask: queries down, keys across" });
  const readout = el("output", { class: "readout", id: "cell-readout", "aria-live": "polite" }, "Hover a cell, or walk over them with the arrow keys.");
  const about = el("p", { id: "variant-about" });
  const legend = el("p", { class: "legend", id: "variant-legend" });
  const difference = el("input", { type: "checkbox", id: "difference" });
  const choices = variants.map(({ name }) => el("label", {},
    el("input", { type: "radio", name: "variant", value: name, checked: name === own }), name, name === own ? " (this model)" : ""));

  let cells = null; // Uint8Array [size · size] of the chosen variant: indices into reasons
  const packed = variants.map((variant) => insula.unpack(variant.cells));
  let ours = null;
  let bitmap = null;
  let at = null; // [query, key]
  const lens = { scale: 0, left: 0, top: 0 }; // device pixels of a cell, and where cell (0, 0) is

  /** One pixel for each cell, once for each choice: a million cells are too many to draw at every move of the mouse. */
  const paint = () => {
    const image = new ImageData(size, size);
    const palette = reasons.map(({ name, on, leak, withheld }) => {
      if (on) return [...rgb(leak ? "bad" : `mask-${name.replace("_", "-")}`), 255];
      return withheld ? [...rgb("soft"), 45] : [0, 0, 0, 0];
    });
    cells.forEach((cell, n) => {
      const color = palette[cell];
      const same = difference.checked && cell === ours[n];
      image.data.set(same ? [color[0], color[1], color[2], color[3] / 6] : color, 4 * n);
    });
    bitmap = new OffscreenCanvas(size, size);
    bitmap.getContext("2d").putImageData(image, 0, 0);
  };
  /** The bitmap through the lens, with a band of kinds at the left and on top. */
  const draw = () => {
    const width = canvas.clientWidth;
    if (!bitmap || !width) return;
    const ratio = insula.fit(canvas, width, width);
    const band = Math.round(8 * ratio);
    // Never smaller than all of it, and never moved so far that an edge comes into the picture.
    const fit = whole((canvas.width - band) / size);
    lens.scale = Math.max(lens.scale, fit);
    const bound = (v) => Math.round(Math.min(0, Math.max(v, canvas.width - band - lens.scale * size)));
    lens.left = bound(lens.left);
    lens.top = bound(lens.top);
    const context = canvas.getContext("2d");
    const [x0, y0] = [band + lens.left, band + lens.top];
    context.imageSmoothingEnabled = lens.scale < 1;
    context.drawImage(bitmap, x0, y0, size * lens.scale, size * lens.scale);
    // A moved bitmap reaches under the bands.
    context.clearRect(0, 0, canvas.width, band);
    context.clearRect(0, 0, band, canvas.height);
    for (let n = 0; n < size; n += 1) { // what each row and column is
      context.fillStyle = insula.color(`kind-${kinds[n]}`);
      const from = band + n * lens.scale;
      if (from + lens.top + lens.scale > band) context.fillRect(0, Math.max(band, from + lens.top), band - 2, Math.ceil(lens.scale));
      if (from + lens.left + lens.scale > band) context.fillRect(Math.max(band, from + lens.left), 0, Math.ceil(lens.scale), band - 2);
    }
    if (lens.scale > 7 * ratio) {
      context.strokeStyle = insula.color("line");
      context.lineWidth = 1;
      context.beginPath();
      const [right, bottom] = [x0 + size * lens.scale, y0 + size * lens.scale];
      for (let n = 0; n <= size; n += 1) {
        const [x, y] = [x0 + n * lens.scale, y0 + n * lens.scale];
        if (x >= band) { context.moveTo(x, band); context.lineTo(x, bottom); }
        if (y >= band) { context.moveTo(band, y); context.lineTo(right, y); }
      }
      context.stroke();
    }
    if (at) {
      context.strokeStyle = insula.color("mark");
      context.lineWidth = 2 * ratio;
      context.strokeRect(x0 + at[1] * lens.scale, y0 + at[0] * lens.scale, lens.scale, lens.scale);
    }
    canvas.style.touchAction = lens.scale > fit ? "none" : "pan-y"; // all of it in sight: a finger scrolls the page
    Object.assign(canvas.dataset, { scale: lens.scale, left: x0, top: y0, size, ratio, variant: chosen().name });
  };
  /** Cells of whole pixels, all alike, as soon as they have one each. */
  const whole = (scale) => (scale >= 1 ? Math.floor(scale) : scale);
  const chosen = () => variants[choices.findIndex((label) => label.firstChild.checked)];
  const choose = async () => {
    const variant = chosen();
    [ours, cells] = [await packed[0], await packed[variants.indexOf(variant)]];
    if (variant !== chosen()) return; // another one was chosen meanwhile
    about.textContent = variant.about;
    const count = new Uint32Array(reasons.length);
    cells.forEach((cell) => { count[cell] += 1; });
    legend.replaceChildren(...reasons.flatMap(({ name, on, why, leak }, n) => count[n] && name !== "padding"
      ? [el("span", { class: `key mask-${name.replace("_", "-")}${on ? "" : " off"}${leak ? " leak" : ""}` },
        `${on ? "on" : "off"}: ${leak ? "LEAK: " : ""}${why} (${count[n].toLocaleString("en")})`)] : []));
    paint();
    draw();
    if (at) say();
  };
  const say = () => {
    const [q, k] = at;
    const { on, why, leak } = reasons[cells[q * size + k]];
    readout.textContent = `${names[q]} → ${names[k]}: ${on ? "on" : "off"}, ${leak ? "LEAK: " : ""}${why}`;
    readout.classList.toggle("bad", leak);
  };
  const go = (q, k) => {
    at = [q, k].map((v) => Math.min(size - 1, Math.max(0, v)));
    say();
    draw();
  };
  const cellAt = (event) => {
    const box = canvas.getBoundingClientRect();
    const ratio = canvas.width / box.width;
    const find = (v, first) => Math.floor((v * ratio - first) / lens.scale);
    return [find(event.clientY - box.top, Number(canvas.dataset.top)), find(event.clientX - box.left, Number(canvas.dataset.left))];
  };
  const zoom = (factor, event) => {
    if (!bitmap) return;
    const ratio = canvas.width / canvas.clientWidth;
    const box = canvas.getBoundingClientRect();
    const x = event ? (event.clientX - box.left) * ratio : canvas.width / 2;
    const y = event ? (event.clientY - box.top) * ratio : canvas.height / 2;
    const scale = whole(Math.min(40 * ratio, factor > 1 ? Math.max(lens.scale * factor, lens.scale + 1) : lens.scale * factor));
    // The cell under the pointer stays where it is.
    const by = scale / lens.scale;
    lens.left = x - (x - lens.left) * by;
    lens.top = y - (y - lens.top) * by;
    lens.scale = scale;
    draw();
  };

  let held = null; // where a finger or a pressed button is, to drag from
  const hold = (event) => { held = [event.clientX, event.clientY]; canvas.setPointerCapture(event.pointerId); };
  canvas.addEventListener("pointerdown", hold);
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointercancel", () => { held = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (!cells) return;
    if (held && event.buttons) {
      const ratio = canvas.width / canvas.clientWidth;
      lens.left += (event.clientX - held[0]) * ratio;
      lens.top += (event.clientY - held[1]) * ratio;
      held = [event.clientX, event.clientY];
    }
    go(...cellAt(event));
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== canvas) return; // the page scrolls, unless this was asked for
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.25 : 0.8, event);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (!cells) return;
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (step) go(...(at ?? [-step[0], -step[1]]).map((v, i) => v + step[i] * (event.shiftKey ? 10 : 1)));
    else if (event.key === "+" || event.key === "=") zoom(1.5);
    else if (event.key === "-") zoom(1 / 1.5);
    else return;
    event.preventDefault();
  });
  choices.forEach((label) => label.firstChild.addEventListener("change", choose));
  difference.addEventListener("change", choose);
  new ResizeObserver(draw).observe(canvas);
  insula.themed(choose);

  const button = (text, label, act) => {
    const made = el("button", { type: "button", "aria-label": label }, text);
    made.addEventListener("click", act);
    return made;
  };
  return [
    el("p", {}, `Queries down, keys across: ${columns} columns of the backbone` +
      (actions ? `, then ${actions} of the action expert.` : ". This sample has no actions, so there is no action expert.") +
      " Hover a cell for its reason; drag to move; zoom with the buttons, + and −, or the wheel once the matrix has the focus."),
    el("fieldset", { class: "choices" }, el("legend", {}, "masks"), choices,
      el("label", {}, difference, "fade what is as in insulated")),
    about,
    el("div", { class: "beside" },
      el("div", { class: "matrix" }, canvas,
        el("div", { class: "buttons" }, button("+", "zoom in", () => zoom(1.5)), button("−", "zoom out", () => zoom(1 / 1.5)),
          button("all", "show all of it", () => { lens.scale = 0; draw(); }))),
      el("div", {}, readout, legend)),
  ];

  /** A color of the style sheet as three bytes; only a canvas reads every way of writing one. */
  function rgb(name) {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    canvas.fillStyle = insula.color(name);
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data.slice(0, 3);
  }
  function kindOf(n) {
    if (n >= columns) return stateToken && n === columns ? "state" : "action";
    if (n >= images) return data.tokens[n - images].kind;
    return data.cameras[Math.floor(n / data.cameras[0].grid ** 2)].present ? "image" : "absent";
  }
  function nameOf(n) {
    if (n >= columns) return stateToken && n === columns ? "the state's token" : `action ${n - columns - stateToken}`;
    if (n >= images) {
      const token = data.tokens[n - images];
      return `column ${n} (${token.kind}${token.kind === "padding" ? "" : ` “${insula.visible(token.text)}”`})`;
    }
    const camera = data.cameras[Math.floor(n / data.cameras[0].grid ** 2)];
    const patch = n - camera.first;
    return `column ${n} (${camera.name}, patch ${Math.floor(patch / camera.grid)}, ${patch % camera.grid})`;
  }
})]);
