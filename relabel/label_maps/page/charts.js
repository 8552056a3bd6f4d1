// The curves of a run, as SVG and as a table.

/** An element with properties and children; of SVG where `tag` is one of its. */
function make(tag, properties = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (svg || name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Three significant digits, for people. */
function digits(value) {
  return value === 0 || Math.abs(value) >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString();
}

/** About `count` round numbers from `low` to `high`. */
function ticks(low, high, count) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

const CHART = { width: 340, height: 190, left: 44, right: 10, top: 8, bottom: 24 };

/** One chart: `series` of {name, color, dashed, points: [[epoch, value], ...]}, not all without points. */
function chart(title, unit, series) {
  const points = series.flatMap((one) => one.points);
  const [first, last] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  const [low, high] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  const { width, height, left, right, top, bottom } = CHART;
  const x = (epoch) => left + ((epoch - first) / (last - first || 1)) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low || 1)) * (height - top - bottom);
  const said = series.map(({ name, points: own }) => {
    const [[, begun], [, ended]] = [own[0], own[own.length - 1]];
    return `${name} from ${digits(begun)} to ${digits(ended)}`;
  });
  const svg = make("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}, epochs ${first} to ${last}: ${said.join("; ")}`,
  });
  for (const value of ticks(low, high, 4)) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, digits(value)));
  }
  for (const epoch of ticks(first, last, 6).filter(Number.isInteger)) {
    svg.append(make("text", { x: x(epoch), y: height - 6, "text-anchor": "middle" }, String(epoch)));
  }
  for (const { color, dashed, points: own } of series) {
    const path = own.map(([epoch, value], i) => `${i ? "L" : "M"}${x(epoch).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    svg.append(make("path", { d: path, class: `curve ${color}${dashed ? " dashed" : ""}` }));
    if (own.length === 1) svg.append(make("circle", { cx: x(own[0][0]), cy: y(own[0][1]), r: 3, class: `dot ${color}` }));
  }
  const names = series.map(({ name, color, dashed }) =>
    make("span", { className: `key ${color}${dashed ? " dashed" : ""}` }, name));
  return make("figure", {}, make("figcaption", {}, make("strong", {}, title), ` ${unit} `, ...names), svg);
}

/** The charts and the table of a log's lines: dicts of numbers, one an epoch. */
function showCurves(lines) {
  const series = (key, name, color, dashed) => ({
    name, color, dashed, points: lines.filter((line) => Number.isFinite(line[key])).map((line) => [line.epoch + 1, line[key]]),
  });
  const charts = [
    ["Loss", "by epoch", [series("train_loss", "training", "one", false), series("loss", "validation", "two", true)]],
    ["Validation accuracy", "%, by epoch", [
      series("top_1", "top-1", "one", false), series("top_5", "top-5", "two", true),
      series("multilabel", "multi-label", "three", true),
    ]],
    ["Learning rate", "at the epoch's end", [series("lr", "learning rate", "one", false)]],
  ];
  for (const [title, unit, all] of charts) {
    const there = all.filter(({ points }) => points.length);
    if (there.length) document.getElementById("charts").append(chart(title, unit, there));
  }
  const keys = [...new Set(lines.flatMap(Object.keys))];
  const cell = (line, key) => (Number.isFinite(line[key]) ? String(key === "epoch" ? line[key] + 1 : digits(line[key])) : "");
  document.getElementById("lines").append(
    make("thead", {}, make("tr", {}, ...keys.map((key) => make("th", { scope: "col" }, key)))),
    make("tbody", {}, ...lines.map((line) => make("tr", {}, ...keys.map((key) => make("td", {}, cell(line, key)))))),
  );
  document.getElementById("curves").hidden = false;
}
