"use strict";
// The page: what was looked at, what came of it, and every section in turn.
(() => {
  const { el } = insula;
  const data = JSON.parse(document.getElementById("data").textContent);
  const { about, subject } = data;
  // The pictures and the weights are those of the frame, whichever sequence of it one reads.
  data.others = data.others.map((other) => ({ ...data, ...other, others: [] }));
  const color = { holds: "good", "not asked": "soft" }[data.outcome] ?? "bad";
  const card = (name, value, note, kind = null) =>
    el("div", { class: "card" }, el("span", {}, name), el("b", { class: kind }, value), el("span", {}, note));
  const losses = data.losses;
  const page = document.getElementById("page");
  const sections = insula.sections.map(([title, id, build]) =>
    el("section", { id }, el("h2", {}, title), build(data)));
  page.replaceChildren(
    el("h1", {}, "What the model sees, and what it learns from"),
    el("p", { class: "soft" }, `Sample ${about.number} of ${about.count} of ${about.source}: ${about.sample}. `,
      `Model ${subject.model}, ${subject.parameters} weights; ${subject.name}; seed ${subject.seed}.`),
    frame(),
    data.sources ? picker(data.sources) : "",
    el("p", { id: "verdict", class: color }, data.verdict),
    data.faults.length ? el("ul", { id: "faults", class: "bad" }, data.faults.map((fault) => el("li", {}, fault))) : "",
    el("div", { class: "cards" },
      card("insulation", data.outcome, losses ? "measured on this sample" : "not measured", color),
      subject.certified ? card("certificate", subject.certified, "of this checkpoint", subject.certified === "holds" ? "good" : "bad") : "",
      card("scored tokens", about.scored, "by the token loss"),
      card("scored action steps", about.real_steps, "by the flow loss"),
      card("total loss", losses ? insula.number(losses.total, 4) : "–", losses ? "flow + λ · token" : "not measured")),
    el("nav", { "aria-label": "sections" }, insula.sections.map(([title, id]) => el("a", { href: `#${id}` }, title))),
    ...sections);

  /** The other sequences of this frame, and how one comes to them. */
  function frame() {
    if (data.lacks_subtask) return el("p", { id: "frame" }, "This frame has no subtask, so this is its only sequence.");
    if (!data.others.length) return "";
    return el("p", { id: "frame" }, `This frame makes ${data.others.length + 1} sequences: ${about.title} (${about.source}, seen here), `,
      data.others.map(({ about: other }, n) => [n ? ", " : "", `${other.title} (`, data.sources
        ? el("a", { href: `/?${new URLSearchParams({ source: other.source, sample: other.number })}` }, other.source)
        : `--source ${other.source} --sample ${other.number}`, ")"]),
      ". Tokens, masks, losses and what is said are shown of each; gradients, influence and where the expert looks of the one seen here.");
  }
  function picker(sources) {
    const source = el("select", { name: "source", "aria-label": "source" },
      Object.entries(sources).map(([name, count]) => el("option", { value: name, selected: name === about.source }, `${name} (${count})`)));
    const sample = el("input", { name: "sample", type: "number", min: 0, max: about.count - 1, value: about.number, "aria-label": "sample" });
    const form = el("form", { method: "get", action: "/", class: "choices", id: "picker" }, source, sample,
      el("button", {}, "look"), step("previous", about.number - 1), step("next", about.number + 1));
    source.addEventListener("change", () => { sample.max = sources[source.value] - 1; sample.value = 0; });
    return form;
  }
  function step(name, number) {
    const there = number >= 0 && number < about.count;
    return there ? el("a", { href: `/?${new URLSearchParams({ source: about.source, sample: number })}` }, name) : "";
  }
})();
