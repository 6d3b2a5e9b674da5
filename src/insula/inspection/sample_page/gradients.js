"use strict";
// 5. Gradient flow, and what moves what: exact zeros are shown as such, beside controls that are not.
insula.sections.push(["Where gradients go", "gradients", (data) => {
  const { el } = insula;
  const { gradients, influence } = data;
  if (!gradients) return el("p", { class: "missing" }, "Not measured: the model was not run.");
  /** undefined: not measured, nothing to say. null: measured, and not a number. */
  const exact = (value) => {
    if (value === undefined) return "";
    if (value === null) return el("span", { class: "bad" }, "not finite");
    return value === 0 ? el("span", { class: "good" }, "0 exactly") : insula.number(value);
  };
  const { columns, table, cosine } = gradients;
  const rows = Object.entries(table).map(([part, row]) => [
    part,
    ...columns.map(({ loss, scheme }) => exact(row[loss][scheme])),
    typeof cosine[part] === "number" ? insula.number(cosine[part], 2) : "",
  ]);
  return [
    el("p", {}, gradients.outcome
      ? "Gradient norms of this sample on these weights. The columns “not insulated” are the same loss with gradients let through: " +
        "without them a zero would show nothing. The token head is the embedding. The final norm comes after the last keys and values."
      : "This sample lacks one of the two losses, so it shows where the other one's gradient goes, and nothing about insulation."),
    insula.table(["gradient norm on", ...columns.map(({ title }) => title), "cosine of the two losses"], rows, { id: "gradients-table" }),
    el("h4", {}, "What moves what"),
    el("p", {}, "One input is changed at a time; the largest change of the expert's velocity and of the backbone's last hidden states. " +
      "A gradient cannot show whether the expert sees the answer: it reads through a stop-gradient."),
    insula.table(["changed", ...influence.effects], influence.rows.map(({ label, moved }) =>
      [label, ...influence.effects.map((effect) => exact(moved[effect]))]), { id: "influence-table" }),
  ];
}]);
