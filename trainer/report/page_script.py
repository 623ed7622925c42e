"""Script of the report page: it shows the values under the pointer and sorts tables; the page is whole without it."""

from typing import Final

PAGE_SCRIPT: Final = r"""
"use strict";
const readout = document.createElement("div");
readout.id = "readout"; readout.hidden = true; document.body.append(readout);
const show = (event, words) => {
  readout.textContent = words; readout.hidden = !words;
  const x = Math.min(event.clientX + 14, innerWidth - readout.offsetWidth - 8);
  readout.style.left = Math.max(4, x) + "px"; readout.style.top = event.clientY + 16 + "px";
};
for (const plot of document.querySelectorAll("svg.plot")) {
  const curves = [...plot.querySelectorAll("path[data-steps]")].map(path => ({name: path.dataset.name,
    steps: path.dataset.steps.split(" ").map(Number), values: path.dataset.values.split(" ")}));
  if (!curves.length) continue;
  const axis = plot.dataset.axis;
  const first = Math.min(...curves.map(curve => curve.steps[0]));
  const last = Math.max(...curves.map(curve => curve.steps.at(-1)));
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * 400;
    const step = first + (at - 52) / 336 * (last - first);
    const lines = curves.map(curve => {
      let best = 0;
      curve.steps.forEach((s, i) => { if (Math.abs(curve.steps[best] - step) > Math.abs(s - step)) best = i; });
      return (curve.name ? curve.name + ": " : "") + curve.values[best] + " at " + axis + " " + curve.steps[best];
    });
    show(event, lines.join("\n"));
  });
  plot.addEventListener("pointerleave", event => show(event, ""));
}
for (const heat of document.querySelectorAll("table.heat")) {
  const heads = [...heat.tHead.rows[0].cells].map(cell => cell.textContent);
  const corner = heads[0];
  heat.addEventListener("pointermove", event => {
    const cell = event.target.closest("tbody td");
    if (!cell) return show(event, "");
    if (cell.title) { cell.dataset.tip = cell.title; cell.removeAttribute("title"); }
    const row = cell.parentNode.cells[0].textContent;
    const column = (corner ? corner + " " : "") + heads[cell.cellIndex];
    show(event, row + ", " + column + ": " + (cell.dataset.tip ?? "none"));
  });
  heat.addEventListener("pointerleave", event => show(event, ""));
}
for (const table of document.querySelectorAll("table.sortable")) {
  if (table.tBodies[0].rows.length === 1) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button"; button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => {
        const x = key(a), y = key(b), n = Number(x) - Number(y);
        return Number.isNaN(n) ? x.localeCompare(y) : n;
      };
      const rows = [...table.tBodies[0].rows].sort(order);
      if (down) rows.reverse();
      table.tBodies[0].append(...rows);
    });
  });
}
"""
"""Without the characters that XML escapes, so that the page is well-formed."""
