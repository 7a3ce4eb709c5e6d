"use strict";
// Click a column's head to sort by it, again to turn the order round. Empty cells stay last. Without this script
// the page only lacks the buttons.
document.querySelectorAll("table.sortable").forEach((table) => {
  const heads = Array.from(table.tHead.rows[0].cells);
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        const number = cell.dataset.sort;
        return number === undefined ? cell.textContent.trim() : Number(number);
      };
      const empty = (value) => value === "" || Number.isNaN(value);
      const compare = (a, b) =>
        typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
      const rows = Array.from(body.rows, (row) => [key(row), row]);
      rows.sort(([a], [b]) => (empty(a) || empty(b) ? empty(a) - empty(b) : (down ? -1 : 1) * compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  });
});
