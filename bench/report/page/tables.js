// Sorting: each head is a button, aria-sort says how its column stands. Filters: one form for the arms of all tables.

const STATES = { ascending: "descending", descending: "", "": "ascending" };

function sortable(table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const written = [...body.rows];
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const next = STATES[head.getAttribute("aria-sort") ?? ""];
    for (const other of heads) other.removeAttribute("aria-sort");
    if (next) head.setAttribute("aria-sort", next);
    body.append(...(next ? sorted(written, place, next === "descending" ? -1 : 1) : written));
  }));
}

// By number where the column has numbers, else by text; rows without a number come last either way.
function sorted(rows, place, sign) {
  const cells = new Map(rows.map((row) => [row, row.cells[place]]));
  const numbers = new Map(rows.map((row) => [row, "order" in cells.get(row).dataset ? Number(cells.get(row).dataset.order) : NaN]));
  if ([...numbers.values()].every(Number.isNaN)) {
    return [...rows].sort((a, b) => sign * cells.get(a).textContent.localeCompare(cells.get(b).textContent, "en", { numeric: true }));
  }
  const missing = (row) => Number(Number.isNaN(numbers.get(row)));
  return [...rows].sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : sign * compare(numbers.get(a), numbers.get(b))));
}

function compare(a, b) {
  return a === b ? 0 : a < b ? -1 : 1;
}

const form = document.getElementById("filter");

// Every word must occur in the arm's label, every chosen key must be the arm's.
function passes(arm, asked) {
  const words = asked.get("words").toLowerCase().split(/\s+/).filter(Boolean);
  const keys = arm.keys.every((value, place) => [null, "", value].includes(asked.get(`key-${place}`)));
  return keys && words.every((word) => arm.label.toLowerCase().includes(word)) && (!asked.has("failed") || arm.failed);
}

function applied() {
  const asked = new FormData(form);
  const shown = new Set(data.arms.flatMap((arm, place) => (passes(arm, asked) ? [String(place)] : [])));
  for (const row of document.querySelectorAll("tr[data-arms]")) {
    row.hidden = !row.dataset.arms.split(" ").some((place) => shown.has(place));
  }
  const protocol = asked.get("protocol") ?? "";
  for (const cell of document.querySelectorAll(".sortable [data-protocol]")) {
    cell.hidden = protocol !== "" && cell.dataset.protocol !== protocol;
  }
  form.querySelector("output").textContent = `${shown.size} of ${data.arms.length} arms`;
}

for (const name of ["input", "change"]) form.addEventListener(name, applied);
form.querySelector("[type=reset]").addEventListener("click", (event) => {
  event.preventDefault(); // the event comes before the form is reset
  form.reset();
  applied();
});
form.addEventListener("submit", (event) => event.preventDefault());
document.querySelectorAll("table.sortable").forEach(sortable);
