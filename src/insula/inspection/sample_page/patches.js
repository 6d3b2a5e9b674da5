"use strict";
/** One camera with its patches: a grid to walk over, or `values` (one for each patch, 0 to 1) as light over it. */
insula.patches = (camera, { label, say, mark = false }) => {
  const { el } = insula;
  const { grid } = camera;
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": label });
  const image = new Image();
  let values = null;
  let at = null;

  const draw = () => {
    const side = canvas.clientWidth;
    if (!side) return;
    insula.fit(canvas, side, side);
    const context = canvas.getContext("2d");
    const size = canvas.width;
    const cell = size / grid;
    context.imageSmoothingEnabled = camera.size > 128; // a small picture shows its pixels as they are
    if (image.complete && image.naturalWidth) context.drawImage(image, 0, 0, size, size);
    if (values) {
      context.fillStyle = "rgba(10, 12, 16, .62)";
      context.fillRect(0, 0, size, size);
      values.forEach((value, n) => {
        context.fillStyle = `rgba(255, 176, 32, ${Math.min(1, value) * 0.85})`;
        context.fillRect((n % grid) * cell, Math.floor(n / grid) * cell, cell, cell);
      });
    }
    if (mark) {
      context.strokeStyle = "rgba(255, 255, 255, .45)";
      context.lineWidth = Math.max(1, size / 640);
      context.beginPath();
      for (let i = 1; i < grid; i += 1) {
        context.moveTo(i * cell, 0); context.lineTo(i * cell, size);
        context.moveTo(0, i * cell); context.lineTo(size, i * cell);
      }
      context.stroke();
    }
    if (at !== null) {
      context.strokeStyle = insula.color("mark");
      context.lineWidth = Math.max(2, size / 200);
      context.strokeRect((at % grid) * cell, Math.floor(at / grid) * cell, cell, cell);
    }
  };
  const go = (patch) => {
    at = patch;
    say(patch, values?.[patch]);
    draw();
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const place = (v, low, size) => Math.min(grid - 1, Math.max(0, Math.floor(((v - low) / size) * grid)));
    go(place(event.clientY, box.top, box.height) * grid + place(event.clientX, box.left, box.width));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid, ArrowDown: grid }[event.key];
    if (!step) return;
    event.preventDefault();
    go(Math.min(grid * grid - 1, Math.max(0, (at ?? -step) + step)));
  });
  image.addEventListener("load", draw);
  image.src = camera.png;
  insula.themed(draw);
  new ResizeObserver(draw).observe(canvas);
  return { canvas, show: (found) => { values = found; draw(); if (at !== null) say(at, values?.[at]); } };
};
