// The page: choose an image, move and resize a crop on it, see the crop's target.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const COLORS = 8; // of classes: --class-0 ... in page.css
const ROWS = 8; // of the table of targets, of classes with at least
const LEAST = 0.0005; // of the target
const WHOLE = [0, 0, 1, 1];

// What is shown; a crop is [left, top, width, height] in whole pixels of the stored image, as training draws them.
const state = { image: null, crop: null, layer: "best", exchanged: data.exchanged, drawn: -1 };
let map = null; // of the image, decoded
let best = []; // the image's classes by their share of the whole image's target, best first

const nameOf = (c) => data.names[c] ?? `class ${c}`;
const percent = (share) => (100 * share).toFixed(1);
const boxOf = ([x, y, w, h], { width, height }) => [x / width, y / height, (x + w) / width, (y + h) / height];
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const colorOf = (c) => { const i = best.indexOf(c); return i >= 0 && i < COLORS ? `var(--class-${i})` : "var(--class-other)"; };

/** The target of the crop, or of another box in fractions: see poolCrop. */
function targetOf(box = boxOf(state.crop, state.image)) {
  return poolCrop(map, box, data.pooling, state.exchanged);
}

const byShare = (target) => [...target.shares.entries()].sort((a, b) => b[1] - a[1]);
const shareOf = (target, c) => (c < 0 ? 0 : target.shares.get(c) ?? target.rest);

// --- the images -----------------------------------------------------------------------------------------------

const ORDERS = {
  hardest: ["hardest first", (a, b) => b.excess - a.excess],
  relabelled: ["most relabelled first", (a, b) => a.share - b.share],
  uncertain: ["least certain target first", (a, b) => b.entropy - a.entropy],
  file: ["as in the data", (a, b) => a.number - b.number],
};

function fillGallery() {
  for (const image of data.images) {
    const other = image.best === image.label ? "" : `→ ${nameOf(image.best)}`;
    image.option = make("div", { role: "option", tabIndex: -1, "aria-selected": "false", title: image.name },
      make("img", { src: `data:image/webp;base64,${image.pixels}`, alt: "", loading: "lazy", decoding: "async" }),
      make("span", { className: "label" }, image.labelName),
      make("span", { className: "other" }, other));
    image.words = `${image.name} ${image.labelName} ${nameOf(image.best)}`.toLowerCase();
    image.option.addEventListener("click", () => choose(image));
  }
  for (const [key, [name]] of Object.entries(ORDERS)) {
    if (key !== "hardest" || data.run) byId("order").append(make("option", { value: key }, name));
  }
  byId("order").value = data.run ? "hardest" : "file";
  arrangeGallery();
}

/** The images that the search finds, in order. */
function found() {
  const words = byId("search").value.toLowerCase();
  return data.images.filter((image) => image.words.includes(words)).sort(ORDERS[byId("order").value][1]);
}

function arrangeGallery() {
  const images = found();
  byId("gallery").replaceChildren(...images.map(({ option }) => option));
  byId("count").textContent = `${images.length === data.images.length ? "" : `${images.length} of `}${data.images.length}`;
  if (images.length && !images.includes(state.image)) images[0].option.tabIndex = 0;
}

function choose(image) {
  if (state.image) {
    state.image.option.setAttribute("aria-selected", "false");
    state.image.option.tabIndex = -1;
  }
  image.option.setAttribute("aria-selected", "true");
  image.option.tabIndex = 0;
  image.option.scrollIntoView({ block: "nearest", inline: "nearest" });
  Object.assign(state, { image, drawn: -1, layer: "best" });
  map = decodeMap(image.map, data.shape);
  const stage = byId("stage");
  stage.style.aspectRatio = `${image.width} / ${image.height}`;
  stage.style.setProperty("--ratio", image.width / image.height);
  byId("picture").src = `data:image/webp;base64,${image.pixels}`;
  byId("picture").alt = `${image.name}, single label ${image.labelName}`;
  byId("name").textContent = image.name;
  showFacts(image);
  for (const [id, most] of [["left", image.width - 1], ["width", image.width], ["top", image.height - 1], ["height", image.height]]) {
    byId(id).max = most;
  }
  rankClasses();
  drawCrop();
}

function showFacts(image) {
  const facts = [
    `single label ${image.labelName}`,
    `${percent(image.share)} % of the whole image's target`,
    `${image.width} × ${image.height} pixels`,
  ];
  if (data.run) facts.push(`loss ${digits(image.loss)}, ${digits(image.excess)} above its target's entropy`);
  byId("facts").textContent = facts.join(" · ");
}

function moveInGallery(event) {
  const images = found();
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
  if (step === undefined || !images.length) return;
  event.preventDefault();
  const image = images[clamp(images.indexOf(state.image) + step, 0, images.length - 1)];
  choose(image);
  image.option.focus();
}

// --- the label map over the image -----------------------------------------------------------------------------

/** After a change of the image or of the axes: its best classes, and the choice of what is drawn. */
function rankClasses() {
  best = byShare(targetOf(WHOLE)).map(([c]) => c);
  if (typeof state.layer === "number" && !best.slice(0, COLORS).includes(state.layer)) state.layer = "best";
  const choice = (layer, name, swatch) => {
    const input = make("input", { type: "radio", name: "layer", checked: state.layer === layer });
    input.addEventListener("change", () => { state.layer = layer; drawLayer(); });
    const mark = make("span", { className: "swatch" });
    mark.style.background = swatch;
    return make("label", {}, input, mark, name);
  };
  byId("choices").replaceChildren(
    choice("none", "none", "none"),
    choice("best", "the best class of each cell", "conic-gradient(var(--class-0) 33%, var(--class-1) 0 66%, var(--class-2) 0)"),
    ...best.slice(0, COLORS).map((c, i) => choice(c, nameOf(c), `var(--class-${i})`)),
  );
  drawLayer();
}

/** The index of entry `k` of a cell, in rows and columns as they are shown. */
function entryAt(k, row, column) {
  const [y, x] = state.exchanged ? [column, row] : [row, column];
  return (k * map.height + y) * map.width + x;
}

const gridOf = () => (state.exchanged ? [map.width, map.height] : [map.height, map.width]);

/** A cell's `[class, score]`s, best first, without its empty entries. */
function cellAt(row, column) {
  const entries = Array.from({ length: map.topK }, (_, k) => entryAt(k, row, column));
  return entries.filter((at) => map.classes[at] >= 0).map((at) => [map.classes[at], map.scores[at]]).sort((a, b) => b[1] - a[1]);
}

function drawLayer() {
  const canvas = byId("layer");
  const [rows, columns] = gridOf();
  [canvas.width, canvas.height] = [columns, rows];
  canvas.hidden = state.layer === "none";
  canvas.style.opacity = byId("strength").value / 100;
  if (canvas.hidden) return;
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const color = (c) => style.getPropertyValue(colorOf(c).slice(4, -1));
  const greatest = map.scores.reduce((most, score, at) => (map.classes[at] < 0 ? most : Math.max(most, score)), 0) || 1;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const cell = cellAt(row, column);
      const shown = state.layer === "best" ? cell[0] : cell.find(([c]) => c === state.layer);
      if (!shown) continue;
      context.fillStyle = color(shown[0]);
      context.globalAlpha = state.layer === "best" ? 1 : clamp(shown[1] / greatest, 0, 1);
      context.fillRect(column, row, 1, 1);
    }
  }
}

function showCell(event) {
  const [x, y] = pointOf(event);
  const [rows, columns] = gridOf();
  const row = clamp(Math.floor((y / state.image.height) * rows), 0, rows - 1);
  const column = clamp(Math.floor((x / state.image.width) * columns), 0, columns - 1);
  const listed = cellAt(row, column).map(([c, score]) => `${nameOf(c)} ${digits(score)}`);
  byId("cell").textContent = `Cell in row ${row + 1}, column ${column + 1}: ${listed.join(", ") || "empty"}`;
}

// --- the crop -------------------------------------------------------------------------------------------------

function setCrop(crop) {
  const { width, height } = state.image;
  const w = clamp(Math.round(crop[2]), 1, width);
  const h = clamp(Math.round(crop[3]), 1, height);
  const x = clamp(Math.round(crop[0]), 0, width - w);
  const y = clamp(Math.round(crop[1]), 0, height - h);
  state.crop = [x, y, w, h];
  for (const { style } of [byId("crop"), byId("shade")]) {
    style.left = `${(100 * x) / width}%`;
    style.top = `${(100 * y) / height}%`;
    style.width = `${(100 * w) / width}%`;
    style.height = `${(100 * h) / height}%`;
  }
  byId("crop").classList.toggle("whole", isWhole());
  for (const [id, value] of [["left", x], ["top", y], ["width", w], ["height", h]]) byId(id).value = value;
  byId("crop").setAttribute("aria-label", `Crop, ${w} by ${h} pixels, left ${x}, top ${y}`);
  byId("drawn").textContent =
    state.drawn < 0 ? "" : data.drawn.replace("{}", state.drawn + 1);
  showTarget();
}

const isWhole = () => state.crop[2] === state.image.width && state.crop[3] === state.image.height;

/** A crop that is the user's own, not one that was drawn. */
function setOwnCrop(crop) {
  state.drawn = -1;
  setCrop(crop);
}

/** Where a pointer is, in pixels of the image. */
function pointOf(event) {
  const { left, top, width, height } = byId("stage").getBoundingClientRect();
  return [((event.clientX - left) / width) * state.image.width, ((event.clientY - top) / height) * state.image.height];
}

/** Moves the edges that a handle holds; "new" has the crop begin at a point. */
function resized([x, y, w, h], edges, [px, py]) {
  const { width, height } = state.image;
  let [x1, y1, x2, y2] = [x, y, x + w, y + h];
  if (edges.includes("w")) x1 = clamp(Math.round(px), 0, x2 - 1);
  if (edges.includes("e")) x2 = clamp(Math.round(px), x1 + 1, width);
  if (edges.includes("n")) y1 = clamp(Math.round(py), 0, y2 - 1);
  if (edges.includes("s")) y2 = clamp(Math.round(py), y1 + 1, height);
  return [x1, y1, x2 - x1, y2 - y1];
}

function spanned([ax, ay], [bx, by]) {
  const { width, height } = state.image;
  const [x1, x2] = [clamp(Math.min(ax, bx), 0, width), clamp(Math.max(ax, bx), 0, width)];
  const [y1, y2] = [clamp(Math.min(ay, by), 0, height), clamp(Math.max(ay, by), 0, height)];
  return [x1, y1, x2 - x1, y2 - y1];
}

function beginDrag(event) {
  if (event.button !== 0) return;
  event.preventDefault();
  const stage = byId("stage");
  const [begun, crop, edges] = [pointOf(event), state.crop, event.target.dataset.edges];
  const moves = event.target === byId("crop") && !isWhole(); // which could not move
  const drag = (moved) => {
    const point = pointOf(moved);
    if (edges) setOwnCrop(resized(crop, edges, point));
    else if (moves) setOwnCrop([crop[0] + point[0] - begun[0], crop[1] + point[1] - begun[1], crop[2], crop[3]]);
    else setOwnCrop(spanned(begun, point));
  };
  const end = () => {
    stage.removeEventListener("pointermove", drag);
    stage.removeEventListener("pointerup", end);
    stage.removeEventListener("pointercancel", end);
  };
  stage.setPointerCapture(event.pointerId);
  stage.addEventListener("pointermove", drag);
  stage.addEventListener("pointerup", end);
  stage.addEventListener("pointercancel", end);
  byId("crop").focus({ preventScroll: true });
}

function cropByKey(event) {
  const { width, height } = state.image;
  if (event.key === "Home") {
    event.preventDefault();
    setOwnCrop([0, 0, width, height]);
  }
  const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!direction) return;
  event.preventDefault();
  const step = event.ctrlKey ? 1 : Math.max(1, Math.round(Math.min(width, height) / 40));
  const [dx, dy] = direction.map((sign) => sign * step);
  const [x, y, w, h] = state.crop;
  setOwnCrop(event.shiftKey
    ? [x, y, clamp(w + dx, 1, width - x), clamp(h + dy, 1, height - y)]
    : [x + dx, y + dy, w, h]);
}

function cropByNumbers() {
  const values = ["left", "top", "width", "height"].map((id) => byId(id).valueAsNumber);
  if (values.every(Number.isFinite)) setOwnCrop(values);
}

function drawCrop() {
  state.drawn = (state.drawn + 1) % state.image.crops.length;
  setCrop(state.image.crops[state.drawn]);
}

// --- the target -----------------------------------------------------------------------------------------------

function showTarget() {
  const [target, whole, image] = [targetOf(), targetOf(WHOLE), state.image];
  const ranked = byShare(target);
  const rows = ranked.slice(0, ROWS).filter(([, share], i) => i === 0 || share >= LEAST).map(([c]) => c);
  const network = new Map(image.predicted ?? []);
  for (const c of [image.label, ...[...network.keys()].slice(0, 1)]) if (c >= 0 && !rows.includes(c)) rows.push(c);
  rows.sort((a, b) => shareOf(target, b) - shareOf(target, a));
  byId("rows").replaceChildren(...rows.map((c) => row(c, shareOf(target, c), shareOf(whole, c), network)));
  const listed = rows.reduce((sum, c) => sum + shareOf(target, c), 0);
  const total = data.pooling.softmax ? 1 : ranked.reduce((sum, [, share]) => sum + share, 0);
  byId("sum").textContent = `all other classes together: ${percent(Math.max(total - listed, 0))} %`;
  sayLater(() => {
    const [x, y, w, h] = state.crop;
    const top = ranked.slice(0, 3).map(([c, share]) => `${nameOf(c)} ${percent(share)} percent`);
    return `Crop ${w} by ${h} pixels at ${x}, ${y}: ${top.join(", ")}`;
  });
}

function row(c, share, whole, network) {
  const bar = make("span", { className: "bar" });
  bar.style.width = `${100 * clamp(share, 0, 1)}%`;
  bar.style.background = colorOf(c);
  const mark = make("span", { className: "mark" });
  mark.style.left = `${100 * clamp(whole, 0, 1)}%`;
  const name = make("th", { scope: "row" }, nameOf(c));
  if (c === state.image.label) name.append(" ", make("span", { className: "badge" }, "single label"));
  const track = make("span", { className: "track", "aria-hidden": "true" }, bar, mark);
  name.append(track);
  const cells = [make("td", {}, percent(share)), make("td", {}, percent(whole))];
  if (data.run) cells.push(make("td", {}, network.has(c) ? percent(network.get(c)) : "–"));
  return make("tr", { className: c === state.image.label ? "single" : "" }, name, ...cells);
}

let speaking = 0;

/** Has a screen reader say it, once the crop rests. */
function sayLater(sentence) {
  clearTimeout(speaking);
  speaking = setTimeout(() => { byId("said").textContent = sentence(); }, 400);
}

// --- the start ------------------------------------------------------------------------------------------------

function exchange(exchanged) {
  state.exchanged = exchanged;
  rankClasses();
  showTarget();
}

function start() {
  document.title = data.title;
  byId("title").textContent = data.title;
  byId("report").querySelector("ul").append(...data.report.map((line) => make("li", {}, line)));
  byId("columns").append(...["Class", "Crop, %", "Whole image, %", ...(data.run ? ["Network, %"] : [])].map(
    (name) => make("th", { scope: "col" }, name)));
  byId("crop").append(...["nw", "n", "ne", "e", "se", "s", "sw", "w"].map((edges) => {
    const handle = make("span", { className: `handle ${edges}`, "aria-hidden": "true" });
    handle.dataset.edges = edges;
    return handle;
  }));
  byId(state.exchanged ? "exchanged" : "straight").checked = true;
  byId("axes-note").textContent = data.axesNote;
  if (data.run?.lines.length) showCurves(data.run.lines);
  byId("seen").hidden = !data.run;
  fillGallery();

  byId("search").addEventListener("input", arrangeGallery);
  byId("order").addEventListener("change", arrangeGallery);
  byId("gallery").addEventListener("keydown", moveInGallery);
  byId("stage").addEventListener("pointerdown", beginDrag);
  byId("stage").addEventListener("pointermove", showCell);
  byId("stage").addEventListener("pointerleave", () => { byId("cell").textContent = ""; });
  byId("crop").addEventListener("keydown", cropByKey);
  for (const id of ["left", "top", "width", "height"]) byId(id).addEventListener("change", cropByNumbers);
  byId("whole").addEventListener("click", () => setOwnCrop([0, 0, state.image.width, state.image.height]));
  byId("seen").addEventListener("click", () => setOwnCrop(state.image.seen));
  byId("random").addEventListener("click", drawCrop);
  byId("strength").addEventListener("input", drawLayer);
  byId("straight").addEventListener("change", () => exchange(false));
  byId("exchanged").addEventListener("change", () => exchange(true));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawLayer);
  choose(found()[0]);
}

start();
