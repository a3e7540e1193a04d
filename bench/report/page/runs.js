// The drawer: the runs behind a number. Its address, '#runs=<arms>/<column>[/<run>]', can be kept and sent.

const data = JSON.parse(document.getElementById("runs").textContent);
const drawer = document.getElementById("drawer");
const NAMES = { step_p10: "step, 10 % quantile", step_p50: "step, median", step_p90: "step, 90 % quantile" };
const ADDRESS = /^#runs=(\d+(?:,\d+)*)\/(\d+|all)(?:\/(\w+))?$/;
const DASHES = ["none", "6 3", "2 3"];

function unpacked(row) {
  const run = Object.fromEntries(data.fields.map((field, i) => [field, row[i]]));
  for (const field of data.pooled) run[field] = data.pool[run[field]];
  return run;
}

function runsOf(arm, protocol) {
  const [a, p] = [data.fields.indexOf("arm"), data.fields.indexOf("protocol")];
  return data.runs.filter((row) => row[a] === arm && row[p] === protocol).map(unpacked);
}

let shown = ""; // address of what is in the drawer, '' while it is closed

function follow() {
  if (drawer.open && location.hash === shown) return;
  const found = ADDRESS.exec(location.hash);
  const arms = found ? found[1].split(",").map(Number) : [];
  const place = found && found[2] !== "all" ? Number(found[2]) : null;
  if (!found || arms.some((a) => a >= data.arms.length) || (place !== null && place >= data.columns.length)) {
    if (drawer.open) drawer.close();
    shown = "";
    return;
  }
  shown = location.hash;
  const column = place === null ? null : data.columns[place];
  const parts = column ? column.parts : data.columns.flatMap((c) => c.parts.length === 1 ? c.parts : []);
  const names = arms.length > 3 ? `${arms.length} arms` : arms.map((a) => data.arms[a].label).join(" and ");
  document.getElementById("drawer-title").textContent = `${names}, ${column ? column.title : "all columns"}`;
  const body = document.getElementById("drawer-body");
  body.replaceChildren(summary(arms, column), ...parts.map((part, i) => partOf(arms, part, parts.length, i, found[3])));
  if (!drawer.open) drawer.showModal();
  const asked = body.querySelector("details[data-asked]");
  if (asked) asked.scrollIntoView();
  else drawer.scrollTop = 0;
}

// Mean and interval of each arm, where the number is of one column.
function summary(arms, column) {
  const list = element("ul", { class: "notes" });
  for (const a of column ? arms : []) {
    const [mean, low, high] = [column.mean[a], column.low[a], column.high[a]];
    const ends = low === null ? "" : `, t interval of the mean [${digits(low)}, ${digits(high)}]`;
    const text = mean === null ? "no mean: runs failed, or have no value" : `mean over seeds ${digits(mean)}${ends}`;
    list.append(element("li", {}, `${data.arms[a].label}: ${text}`));
  }
  return list;
}

function digits(value) {
  if (value === null) return "-";
  return value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3) ? value.toExponential(4) : value.toPrecision(5);
}

// One protocol x metric: the differences of a pair, curves, and a line a run. Of several only the first is open.
function partOf(arms, [protocol, metric], count, place, asked) {
  const title = `${data.protocols[protocol]}: ${metric.replaceAll("_", " ")}`;
  const runs = arms.map((a) => runsOf(a, protocol));
  const build = () => [
    arms.length === 2 ? paired(arms, runs, metric) : null,
    curves(arms, runs),
    ...arms.flatMap((a, i) => [
      element("h3", {}, arms.length > 1 ? data.arms[a].label : "Runs"),
      element("div", { class: "heads", "aria-hidden": "true" }, ...["seed", metric, "outcome", "run"].map((t) => element("span", {}, t))),
      ...runs[i].map((run) => line(run, metric, asked, runs.flat().length > 1)),
    ]),
  ].filter((node) => node !== null);
  if (count === 1) return element("section", { class: "part" }, ...build());
  const box = element("details", { class: "part" }, element("summary", {}, title));
  const open = () => box.childElementCount === 1 && box.append(...build());
  opens(box, open);
  if (place === 0 || runs.flat().some((run) => run.id === asked)) {
    open();
    box.open = true;
  }
  return box;
}

// What is inside is built before it shows; 'toggle' comes after.
function opens(box, build) {
  box.firstElementChild.addEventListener("click", build);
  box.addEventListener("toggle", build);
}

// Values of two arms seed by seed, replicas averaged; no value where a run failed.
function paired(arms, runs, metric) {
  const seeds = [...new Set(runs[0].map((run) => run.seed))];
  const mean = (of, seed) => {
    const values = of.filter((run) => run.seed === seed).map((run) => (run.outcome === "ok" ? run.metrics[metric] ?? NaN : NaN));
    return values.reduce((sum, v) => sum + v, 0) / values.length;
  };
  const triples = seeds.map((seed) => [mean(runs[0], seed), mean(runs[1], seed)]).map(([a, b]) => [a, b, a - b]);
  const largest = Math.max(...triples.flat().filter(Number.isFinite).map(Math.abs));
  const places = largest > 0 ? Math.min(Math.max(4 - Math.floor(Math.log10(largest)), 0), 12) : 1;
  const text = (v, i) => (Number.isFinite(v) ? (i === 2 && v > 0 ? "+" : "") + v.toFixed(places) : "-");
  const rows = seeds.map((seed, s) => element("tr", {}, element("th", { scope: "row" }, String(seed)),
    ...triples[s].map((v, i) => element("td", { class: "count" }, text(v, i)))));
  const heads = ["seed", data.arms[arms[0]].label, data.arms[arms[1]].label, "difference"];
  const head = heads.map((name, i) => element("th", { scope: "col", class: i ? "count" : "text" }, name));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  return element("div", { class: "scroll" }, table);
}

function points(run) {
  return run.steps.map((step, i) => [step, run.losses[i]]).filter((p) => p[1] !== null);
}

function curves(arms, runs) {
  const style = (i) => ({ colour: data.arms[arms[i]].colour, dash: DASHES[i % DASHES.length] });
  const series = runs.flatMap((of, i) =>
    of.map((run) => ({ points: points(run), ...style(i), name: `${data.arms[arms[i]].label}, ${named(run)}` })));
  const figure = element("div", {}, chart(series, "Training loss of these runs over optimiser steps"));
  if (arms.length > 1) {
    const mark = (i) => shape("svg", { viewBox: "0 0 24 10", "aria-hidden": "true" },
      shape("line", { x1: 0, x2: 24, y1: 5, y2: 5, stroke: style(i).colour, "stroke-dasharray": style(i).dash, "stroke-width": 2 }));
    figure.append(element("ul", { class: "legend" }, ...arms.map((a, i) => element("li", {}, mark(i), ` ${data.arms[a].label}`))));
  }
  return figure;
}

function named(run) {
  return `seed ${run.seed}${run.replica ? `, replica ${run.replica}` : ""}`;
}

// A run: one line, and all that its record says when it is opened, its own curve where it is one of several.
function line(run, metric, asked, curve) {
  const value = run.outcome === "ok" ? digits(run.metrics[metric] ?? null) : "-";
  const state = run.outcome === "ok" ? element("span", {}, "ok") : element("span", { class: "why" }, `${run.outcome}: ${run.reason}`);
  const seed = run.replica ? `${run.seed}.${run.replica}` : String(run.seed);
  const head = element("summary", {}, element("span", {}, seed), element("span", {}, value), state, element("code", {}, run.id));
  const box = element("details", { class: "run" }, head);
  const open = () => box.childElementCount === 1 && box.append(record(run, curve));
  opens(box, open);
  if (run.id === asked) {
    open();
    box.open = true;
    box.dataset.asked = "";
  }
  return box;
}

function record(run, curve) {
  const text = run.config.map((place) => data.pool[place]).join("");
  const copy = element("button", { type: "button", class: "copy" }, "Copy");
  copy.addEventListener("click", () => navigator.clipboard.writeText(text).then(() => (copy.textContent = "Copied")));
  const { packages, ...environment } = run.environment;
  const arm = data.arms[run.arm];
  return element("div", {},
    run.outcome === "ok" ? null : element("p", { class: "why" }, `${run.outcome}: ${run.reason}`),
    curve ? chart([{ points: points(run), colour: arm.colour, dash: "none", name: named(run) }], "Training loss over optimiser steps") : null,
    ...group("Metrics", run.metrics, String),
    ...group("Cost", run.cost, cost),
    ...group("Capacity", { ...run.capacity, gain: run.gain.join(", ") || "not measured" }, (v, k) =>
      v === -1 && k === "state_per_head" ? "grows with the length" : typeof v === "number" ? v.toLocaleString("en") : v),
    element("h4", {}, "Configuration"), copy, element("pre", { tabindex: 0 }, text),
    ...group("Ran on", { ...environment, ...packages }, (v) => (v === "" ? "-" : String(v))),
    ...group("Identity", { run: run.id, protocol: run.protocol_id, ...run.hashes, registration: run.registration || "none", finished: run.finished }, String),
    element("details", {}, element("summary", {}, "Digests of the code that ran"), ...group("", run.digests, String)));
}

function group(title, values, text) {
  const pairs = Object.entries(values).flatMap(([key, value]) =>
    [element("dt", {}, NAMES[key] ?? key.replaceAll("_", " ")), element("dd", {}, value === null ? "not finite" : text(value, key))]);
  return [title ? element("h4", {}, title) : null, element("dl", { class: "pairs" }, ...pairs)];
}

function cost(value, key) {
  if (key === "peak_memory") return `${(value / 2 ** 20).toLocaleString("en", { maximumFractionDigits: 0 })} MiB`;
  if (key === "tokens") return value.toLocaleString("en");
  return key.startsWith("step_") ? `${short(value * 1000)} ms` : `${short(value)} s`;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-runs]");
  if (!button) return;
  location.hash = button.dataset.runs;
  follow();
});
addEventListener("hashchange", follow);
// However it was closed. The event comes late: by then another address may be open.
drawer.addEventListener("close", () => {
  if (drawer.open || shown === "") return;
  if (location.hash === shown) history.replaceState(null, "", "#");
  shown = "";
});
for (const box of document.querySelectorAll("dialog")) {
  box.querySelector(".close").addEventListener("click", () => box.close());
  box.addEventListener("click", (event) => event.target === box && box.close());
}
for (const button of document.querySelectorAll(".zoom")) {
  button.addEventListener("click", () => {
    const lens = document.getElementById("lens");
    const [shown, image] = [lens.querySelector("img"), button.querySelector("img")];
    [shown.src, shown.alt] = [image.src, image.alt];
    lens.showModal();
  });
}
follow();
