// Elements and the chart of training curves. Texts become text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

// A few round numbers that span low to high.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((s) => s >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-3 ? value.toExponential(1).replace(".0e", "e") : String(Number(value.toPrecision(3)));
}

// Lines over steps; `series`: {points: [[x, y]], colour, dash, name}. Logarithmic where the values span two decades.
function chart(series, label) {
  const [width, height, left, right, top, bottom] = [640, 240, 56, 18, 30, 46];
  const all = series.flatMap((one) => one.points);
  if (!all.length) return element("p", { class: "hint" }, "No curve: no training step was recorded.");
  const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
  const bounds = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  const [first, last] = bounds(xs);
  const [lowest, highest] = bounds(ys);
  const log = lowest > 0 && highest / lowest > 100;
  const map = log ? Math.log10 : (v) => v;
  let [low, high] = [map(lowest), map(highest)];
  const pad = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  [low, high] = [low - pad, high + pad];
  const x = (v) => left + ((v - first) / (last - first || 1)) * (width - left - right);
  const y = (v) => height - bottom - ((map(v) - low) / (high - low)) * (height - top - bottom);
  const svg = shape("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const marks = log ? ticks(low, high, 4).map((v) => 10 ** v) : ticks(low, high, 4);
  for (const value of marks) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of last > first ? ticks(first, last, 5) : [first]) {
    const anchor = x(value) > width - right - 30 ? "end" : "middle";
    svg.append(shape("text", { x: x(value), y: height - bottom + 18, "text-anchor": anchor }, short(value)));
  }
  svg.append(shape("text", { x: width - right, y: height - 4, "text-anchor": "end" }, "optimiser step"));
  svg.append(shape("text", { x: left, y: 16 }, log ? "training loss (log scale)" : "training loss"));
  for (const one of series) {
    const d = one.points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    svg.append(shape("path", { d, stroke: one.colour, "stroke-dasharray": one.dash }, shape("title", {}, one.name)));
  }
  return svg;
}
