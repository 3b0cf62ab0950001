import { png, read } from "./arrays.js";

const byId = (id) => document.getElementById(id);
const percent = (part) => (part >= 0.9995 ? "100 %" : part < 0.001 ? "< 0.1 %" : `${(100 * part).toFixed(1)} %`);
const OVERLAY_ALPHA = 165;
const MAX_BARS = 8;

let model = null; // the response of /model
let result = null; // the last response of /explain: height, width, classes, and the arrays
let file = null; // the image file of the prediction shown
let bitmap = null; // the decoded image
let selectedPixel = null; // the selected pixel, [x, y]
let request = null; // the AbortController of the current request
let highlighted = null; // the index of the only class that is colored; null: all are
let relationClass = null; // the index of the class whose relation is shown

// ---- requests to the server

function headers() {
  const token = sessionStorage.getItem("token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function send(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not respond; check that it is running");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const text = body.error || `the server returned status ${response.status}`;
  byId("token-form").hidden = response.status !== 401;
  if (response.status === 401) byId("token").focus();
  throw new Error(`${text}.`);
}

async function start() {
  try {
    model = await (await send("model")).json();
  } catch (error) {
    return showError(error.message);
  }
  const count = model.classes.length;
  byId("network").textContent = `${model.network}, ${count} classes`;
  byId("limits").textContent =
    `${model.formats.join(", ")}; up to ${model.max_bytes / 1e6} MB and ${model.max_pixels / 1e6} megapixels`;
  byId("all-title").textContent = `All ${count} classes`;
  byId("all").replaceChildren(...model.classes.map((one) => createElement("li", {}, swatch(one), one.name)));
  byId("mode").disabled = !model.averages;
  byId("mode").closest("section").hidden = !model.averages;
}

async function predict(given) {
  const multi = document.querySelector("[name=mode]:checked").value === "multi";
  request?.abort();
  request = new AbortController();
  const controller = request;
  showError(null);
  byId("busy").textContent = `Predicting ${given.name}${multi ? ", multi-scale + flip" : ""}`;
  byId("busy").hidden = false;
  try {
    if (!model) await start();
    if (!model) return;
    if (given.size > model.max_bytes) {
      throw new Error(`the image exceeds the limit of ${model.max_bytes / 1e6} MB.`);
    }
    const response = await send(`explain?multi_scale=${multi}&flip=${multi}`, {
      method: "POST", body: given, signal: controller.signal, headers: { "Content-Type": "application/octet-stream" },
    });
    const prediction = read(await response.arrayBuffer());
    const decoded = await createImageBitmap(given);
    if (controller.signal.aborted) return;
    const sameFile = file === given; // with another inference mode; the selected pixel is kept
    [result, bitmap, file] = [prediction, decoded, given];
    showResult(sameFile);
  } catch (error) {
    if (error.name !== "AbortError") showError(`${given.name}: ${error.message}`);
  } finally {
    if (request === controller) byId("busy").hidden = true;
  }
}

function showError(text) {
  byId("error").hidden = text === null;
  byId("error").textContent = text ?? "";
}

// ---- display of the prediction

function createElement(tag, attributes, ...inside) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...inside);
  return element;
}

function swatch(one) {
  const box = createElement("i", { className: "swatch" });
  box.style.background = one.color;
  return box;
}

function showResult(sameFile) {
  const { height, width } = result;
  byId("drop").hidden = true;
  byId("result").hidden = byId("side").hidden = false;
  const ratio = width / height;
  byId("frame").style.aspectRatio = `${width} / ${height}`;
  byId("frame").style.width = `min(100%, ${72 * ratio}vh)`;
  byId("frame").classList.toggle("coarse", width < 400);
  for (const id of ["image", "overlay"]) Object.assign(byId(id), { width, height });
  byId("image").getContext("2d").drawImage(bitmap, 0, 0, width, height);
  const tiles = result.tiles > 1 ? `, in ${result.tiles} tiles` : "";
  byId("caption").textContent = `${file.name}: ${width}\u00a0×\u00a0${height}${tiles}, ${result.seconds.toFixed(2)}\u00a0s`;
  highlighted = relationClass = null;
  if (!sameFile) selectedPixel = null;
  drawOverlay();
  updateDivider();
  drawLegend();
  selectPixel(selectedPixel);
}

function drawOverlay() {
  const { height, width } = result;
  const rgba = new Uint32Array(256); // little-endian: ABGR
  for (const { index, color } of model.classes) {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
    const alpha = highlighted === null ? OVERLAY_ALPHA : index === highlighted ? 215 : 20;
    rgba[index] = ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;
  }
  const context = byId("overlay").getContext("2d");
  const imageData = context.createImageData(width, height);
  const pixels = new Uint32Array(imageData.data.buffer);
  const labels = result.labels.data;
  for (let i = 0; i < labels.length; i++) pixels[i] = rgba[labels[i]];
  context.putImageData(imageData, 0, 0);
}

function drawRelation() {
  const visible = relationClass !== null && result.relation;
  byId("heat").hidden = !visible;
  byId("relation-hint").textContent = visible
    ? `Red: relation of each pixel to the object region of ${model.classes[relationClass].name}.`
    : "Select a class to show the relation of all pixels to its region.";
  byId("overlay").style.opacity = visible ? 0.25 : 1;
  if (!visible) return;
  const [, height, width] = result.relation.shape;
  Object.assign(byId("heat"), { width, height });
  const context = byId("heat").getContext("2d");
  const imageData = context.createImageData(width, height);
  const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().split(" ").map(Number);
  const values = result.relation.data.subarray(relationClass * height * width, (relationClass + 1) * height * width);
  const maximum = Math.max(1, values.reduce((a, c) => Math.max(a, c), 0));
  values.forEach((value, i) => imageData.data.set([r, g, b, (235 * value) / maximum], 4 * i));
  context.putImageData(imageData, 0, 0);
}

function updateDivider() {
  byId("frame").style.setProperty("--cut", `${byId("slider").value}%`);
  byId("part").textContent = `${byId("slider").value} %`;
}

function drawBars(list, rows, onPress) {
  list.replaceChildren(...rows.map(({ one, part, text }) => {
    const fill = createElement("i");
    fill.style.width = `${100 * part}%`;
    const button = createElement("button", { type: "button" },
      swatch(one), createElement("span", { className: "name", textContent: one.name }), createElement("span", { textContent: text }),
      createElement("span", { className: "bar" }, fill));
    button.dataset.index = one.index;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => onPress(one.index));
    return createElement("li", {}, button);
  }));
}

function setPressed(list, index) {
  for (const button of list.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.index) === index));
  }
}

function drawLegend() {
  const rows = result.classes.map((one) => ({ one, part: one.share, text: percent(one.share) }));
  drawBars(byId("legend"), rows, (index) => {
    highlighted = highlighted === index ? null : index;
    setPressed(byId("legend"), highlighted);
    drawOverlay();
    if (highlighted !== null && byId("slider").value === "0") moveTo(100);
  });
}

function selectPixel(where) {
  selectedPixel = where;
  byId("pixel-result").hidden = byId("marker").hidden = where === null;
  byId("pick").hidden = where !== null;
  if (where === null) return drawRelation();
  const [x, y] = where;
  const { width, height } = result;
  const one = model.classes[result.labels.data[y * width + x]];
  byId("marker").style.left = `${(100 * (x + 0.5)) / width}%`;
  byId("marker").style.top = `${(100 * (y + 0.5)) / height}%`;
  const [box, name] = byId("chosen").children;
  box.style.background = one.color;
  name.textContent = one.name;
  name.dataset.index = one.index;
  const confidence = result.confidence && result.confidence.data[y * width + x] / 255;
  byId("confidence").textContent = `${result.confidence ? `Probability ${percent(confidence)}, at` : "At"} column ${x}, row ${y}`;
  showRelation(x, y);
}

function showRelation(x, y) {
  const { relation, width, height } = result;
  for (const id of ["relation-title", "relation-hint", "relation"]) byId(id).hidden = !relation;
  if (!relation) return;
  const [count, rows, columns] = relation.shape;
  const cell = Math.min(rows - 1, Math.floor((y * rows) / height)) * columns + Math.min(columns - 1, Math.floor((x * columns) / width));
  const parts = model.classes.map((one) => ({ one, part: relation.data[one.index * rows * columns + cell] / 255 }));
  parts.sort((a, b) => b.part - a.part);
  const shown = parts.slice(0, Math.min(count, MAX_BARS)).map((row) => ({ ...row, text: percent(row.part) }));
  drawBars(byId("relation"), shown, (index) => {
    relationClass = relationClass === index ? null : index;
    setPressed(byId("relation"), relationClass);
    drawRelation();
  });
  setPressed(byId("relation"), relationClass);
  drawRelation();
}

// ---- user input

function moveTo(value) {
  byId("slider").value = value;
  updateDivider();
}

function openFirst(files) {
  const first = [...(files ?? [])].find((item) => item instanceof File);
  if (first) predict(first);
}

byId("file").addEventListener("change", (event) => {
  openFirst(event.target.files);
  event.target.value = "";
});
byId("slider").addEventListener("input", updateDivider);
byId("mode").addEventListener("change", () => file && predict(file));
byId("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", byId("token").value.trim());
  byId("token-form").hidden = true;
  showError(null);
  await start();
});

byId("frame").addEventListener("click", (event) => {
  if (event.target === byId("divider")) return;
  const box = byId("frame").getBoundingClientRect();
  const toPixel = (part, size) => Math.max(0, Math.min(size - 1, Math.floor(part * size)));
  selectPixel([toPixel((event.clientX - box.left) / box.width, result.width), toPixel((event.clientY - box.top) / box.height, result.height)]);
});
byId("frame").addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const stride = event.shiftKey ? 10 : 1;
  const [x, y] = selectedPixel ?? [result.width >> 1, result.height >> 1];
  const [dx, dy] = steps[event.key];
  selectPixel([Math.max(0, Math.min(result.width - 1, x + stride * dx)), Math.max(0, Math.min(result.height - 1, y + stride * dy))]);
});
byId("divider").addEventListener("pointerdown", (event) => byId("divider").setPointerCapture(event.pointerId));
byId("divider").addEventListener("pointermove", (event) => {
  if (!byId("divider").hasPointerCapture(event.pointerId)) return;
  const box = byId("frame").getBoundingClientRect();
  moveTo(Math.round((100 * (event.clientX - box.left)) / box.width));
});

function download(blob, ending) {
  const link = createElement("a", { href: URL.createObjectURL(blob), download: file.name.replace(/\.[^.]*$/, "") + ending });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

byId("save-labels").addEventListener("click", async () => download(await png(result.labels.data, result.height, result.width), "_labels.png"));
byId("save-overlay").addEventListener("click", () => {
  const canvas = createElement("canvas", { width: result.width, height: result.height });
  const context = canvas.getContext("2d");
  context.drawImage(byId("image"), 0, 0);
  context.drawImage(byId("overlay"), 0, 0);
  canvas.toBlob((blob) => download(blob, "_overlay.png"), "image/png");
});

for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") openFirst(event.dataTransfer.files);
  });
}
addEventListener("paste", (event) => openFirst(event.clipboardData.files));

start();
