"use strict";
// 4. Gradient flow, and what moves what: exact zeros are shown as such, beside controls that are not.
insula.sections.push(["Where gradients go", "gradients", (data) => {
  const { el } = insula;
  const { gradients, influence } = data;
  if (!gradients) return el("p", { class: "missing" }, "Not measured: the model was not run.");
  const exact = (value) => (value === null || value === undefined ? "" : value === 0 ? el("span", { class: "good" }, "0 exactly") : insula.number(value));
  const heads = {
    flow: "flow", flow_control: "flow, not insulated", flow_embeddings: "flow, stopped at the embeddings only",
    flow_frozen: "flow, backbone frozen", fast: "token", fast_control: "token, not insulated",
    fast_frozen: "token, backbone frozen",
  };
  const parts = Object.keys(gradients.table);
  const there = Object.keys(heads).filter((name) => name in gradients.table[parts[0]]);
  const rows = parts.map((part) => [part, ...there.map((name) => exact(gradients.table[part][name])),
    gradients.cosine[part] === null || gradients.cosine[part] === undefined ? "" : insula.number(gradients.cosine[part], 2)]);
  const effects = Object.keys(Object.values(influence.table)[0]);
  return [
    el("p", {}, gradients.outcome
      ? "Gradient norms of this sample on these weights. The columns “not insulated” are the same loss with gradients let through: " +
        "without them a zero would show nothing. The token head is the embedding. The final norm comes after the last keys and values."
      : "This sample lacks one of the two losses, so it shows where the other one's gradient goes, and nothing about insulation."),
    insula.table(["gradient norm on", ...there.map((name) => heads[name]), "cosine of the two losses"], rows, { id: "gradients-table" }),
    el("h3", {}, "What moves what"),
    el("p", {}, "One input is changed at a time; the largest change of the expert's velocity and of the backbone's last hidden states. " +
      "A gradient cannot show whether the expert sees the answer: it reads through a stop-gradient."),
    insula.table(["changed", ...effects], Object.entries(influence.table).map(([changed, row]) =>
      [changed, ...effects.map((effect) => exact(row[effect]))]), { id: "influence-table" }),
  ];
}]);
