"use strict";
const tip = document.getElementById("tip");
for (const title of document.querySelectorAll("svg title")) {
  title.parentNode.dataset.tip = title.textContent;
  title.remove();
}
document.addEventListener("mousemove", (event) => {
  const point = event.target.closest ? event.target.closest("[data-tip]") : null;
  tip.hidden = !point;
  if (!point) return;
  tip.textContent = point.dataset.tip;
  const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  tip.style.left = left + "px";
  tip.style.top = event.clientY + 16 + "px";
});
for (const drawing of document.querySelectorAll("figure .drawing"))
  drawing.addEventListener("click", () => drawing.classList.toggle("large"));
const value = (row, column) => (row.cells[column] ? row.cells[column].textContent.trim() : "");
const number = (text) => {  // 1,200 and 73.05 ms and 72.8 % are numbers, a date and a name with digits are none
  const found = text.match(/^([-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?)\D*$/);
  return found ? Number(found[1].replace(/,/g, "")) : NaN;
};
for (const head of document.querySelectorAll("thead th")) {
  head.tabIndex = 0;
  const sort = () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a, column), y = value(b, column), d = number(x) - number(y);
      if (!x || !y) return (!x - !y) * (down ? -1 : 1);  // empty ones are last either way
      return Number.isNaN(d) ? x.localeCompare(y) : d;
    });
    if (down) rows.reverse();
    body.append(...rows);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
}
for (const table of document.querySelectorAll("table")) {
  if (!table.tBodies[0] || table.tBodies[0].rows.length < (table.className === "runs" ? 2 : 12)) continue;
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = document.body.dataset.filter;
  field.setAttribute("aria-label", field.placeholder);
  field.addEventListener("input", () => {
    const word = field.value.toLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(word);
  });
  table.before(field);
}
const contents = document.querySelector("nav details");
if (contents) contents.open = window.innerWidth > 860;
window.addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details:not(.code)")) fold.open = true;
});
