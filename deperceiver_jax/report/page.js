"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// Charts: as wide as their places, also when these change.
const look = {
  font: "system-ui, sans-serif",
  axis: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelLimit: 160, gridColor: "#e8edf2", labelOverlap: true },
  legend: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
  view: { stroke: "#dde3ea" },
};
for (const [id, chart] of Object.entries(data.charts)) {
  vegaEmbed("#" + id, chart, { actions: false, renderer: "svg", config: look }).catch((error) => {
    byId(id).textContent = error.message;
    throw error;
  });
}

// Tables: a touch sorts by a column, the greatest first (names: the first), another one turns the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.firstElementChild.addEventListener("click", () => {
      const names = column === 0;
      const before = heading.getAttribute("aria-sort");
      const ascending = before === "none" ? names : before === "descending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const value = (row) => (names ? row.cells[0].textContent : row.cells[column].dataset.value);
      const sign = ascending ? 1 : -1;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what there is no number for stays below
        return sign * (names ? x.localeCompare(y) : x - y);
      });
      table.tBodies[0].append(...rows);
    });
  });
}
