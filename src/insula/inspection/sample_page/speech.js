"use strict";
// 4. What the backbone says by itself: a subtask, an answer or FAST tokens, each token beside what it might have been.
insula.sections.push(["What the backbone says", "speech", (page) => insula.each(page, (data, id) => {
  const { el, visible } = insula;
  const { speech } = data;
  if (speech.missing) return el("p", { class: "missing" }, `Not decoded: ${speech.missing}.`);

  const asked = el("p", {}, "Asked with the prompt of this sample alone; the likeliest token is taken each time.");
  return [asked, ...(speech.truth === null ? action() : words())];

  function words() {
    const { free, truth, right } = speech;
    const verdict = !free.ended ? `It did not end within ${free.tokens.length} tokens, so it means nothing.`
      : right ? "It is what the sample says." : "It is not what the sample says.";
    return [
      el("p", { id: id("said") }, "Said: ", el("b", {}, `“${free.text}”`)),
      el("p", { id: id("truth") }, "True: ", el("b", {}, `“${truth}”`)),
      el("p", { id: id("right"), class: right ? "good" : "bad" }, verdict),
      tokensOf(free, "free", true),
    ];
  }

  function action() {
    const { free, bound, alike, common, unbound } = speech;
    const parts = [["free: any token may be said", free, "free"]];
    if (bound && !alike) parts.push(["bound by the grammar of actions: only whole chunks can be said", bound, "bound"]);

    const drawn = parts.filter(([, said]) => said.chunk);
    return [
      ...parts.map(([title, said, way]) => [
        el("h4", {}, title),
        el("p", { class: said.chunk ? null : "bad", id: id(`${way}-chunk`) }, said.chunk
          ? `${said.tokens.length} tokens, a chunk. Root mean square of what differs from the recorded one: ${insula.number(said.error)}.`
          : `${said.tokens.length} tokens, and no chunk, ${said.invalid}.`),
        way === "bound" ? el("p", {}, common ? `The first ${common} are the same as without the grammar.` : "It differs from the first token on.") : null,
        tokensOf(said, way, false),
      ]),
      alike ? el("p", {}, "Bound by the grammar of actions it says the same.") : null,
      unbound ? el("p", { class: "bad" }, `Not decoded within the grammar of actions: ${unbound}.`) : null,
      drawn.length && data.chunk.actions ? insula.chunks(id("spoken"), data.chunk.names, [["what was recorded", data.chunk.actions, "ink"],
        ...drawn.map(([, said, way]) => [`what was said, ${alike ? "free and bound" : way}`, said.chunk,
          way === "free" ? "fast" : "mark", way === "free" ? [6, 4] : [2, 3]])]) : null,
    ];
  }

  /** An action has many tokens, which few will read: they are opened by whoever does. */
  function tokensOf(said, way, open) {
    const rows = said.tokens.map((token, n) => insula.likeliest([`${n} “${visible(token.text)}”`, token.id], token, "said"));
    return el("details", { open }, el("summary", {}, "each token said, and the likeliest in its place"),
      insula.table(["token", "id", "probability", "the five likeliest"], rows, { class: "scored", id: id(`${way}-tokens`) }));
  }
})]);
