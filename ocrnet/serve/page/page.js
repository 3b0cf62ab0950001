import { png, read } from "./arrays.js";

const at = (id) => document.getElementById(id);
const percent = (part) => (part >= 0.9995 ? "100 %" : part < 0.001 ? "< 0.1 %" : `${(100 * part).toFixed(1)} %`);
const OVERLAY_ALPHA = 165;
const MOST_BARS = 8;

let about = null; // what /model tells
let seen = null; // the last answer: height, width, classes, and the arrays
let file = null; // what was looked at, or is
let bitmap = null;
let chosen = null; // [x, y]
let running = null; // AbortController
let marked = null; // the class that alone is colored
let warmed = null; // the class whose relation is shown

// ---- asking the server

function headers() {
  const token = sessionStorage.getItem("token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not respond; check that it is running");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  const text = told.error || `status ${answer.status}`;
  at("ask").hidden = answer.status !== 401;
  if (answer.status === 401) at("token").focus();
  throw new Error(`${text}.`);
}

async function start() {
  try {
    about = await (await ask("model")).json();
  } catch (error) {
    return say(error.message);
  }
  const count = about.classes.length;
  at("network").textContent = `${about.network}, ${count} classes`;
  at("limits").textContent =
    `${about.formats.join(", ")}; up to ${about.max_bytes / 1e6} MB and ${about.max_pixels / 1e6} megapixels`;
  at("all-title").textContent = `All ${count} classes`;
  at("all").replaceChildren(...about.classes.map((one) => make("li", {}, swatch(one), one.name)));
  at("look").disabled = !about.averages;
  at("look").closest("section").hidden = !about.averages;
}

async function look(given) {
  const multi = document.querySelector("[name=look]:checked").value === "multi";
  running?.abort();
  running = new AbortController();
  const mine = running;
  say(null);
  at("busy").textContent = `Predicting ${given.name}${multi ? ", multi-scale + flip" : ""}`;
  at("busy").hidden = false;
  try {
    if (!about) await start();
    if (!about) return;
    if (given.size > about.max_bytes) {
      throw new Error(`the image exceeds the limit of ${about.max_bytes / 1e6} MB.`);
    }
    const answer = await ask(`explain?multi_scale=${multi}&flip=${multi}`, {
      method: "POST", body: given, signal: mine.signal, headers: { "Content-Type": "application/octet-stream" },
    });
    const found = read(await answer.arrayBuffer());
    const picture = await createImageBitmap(given);
    if (mine.signal.aborted) return;
    const same = file === given; // looked at in another way: what was chosen stays
    [seen, bitmap, file] = [found, picture, given];
    show(same);
  } catch (error) {
    if (error.name !== "AbortError") say(`${given.name}: ${error.message}`);
  } finally {
    if (running === mine) at("busy").hidden = true;
  }
}

function say(text) {
  at("error").hidden = text === null;
  at("error").textContent = text ?? "";
}

// ---- showing

function make(tag, attributes, ...inside) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...inside);
  return element;
}

function swatch(one) {
  const box = make("i", { className: "swatch" });
  box.style.background = one.color;
  return box;
}

function show(same) {
  const { height, width } = seen;
  at("drop").hidden = true;
  at("result").hidden = at("side").hidden = false;
  const ratio = width / height;
  at("frame").style.aspectRatio = `${width} / ${height}`;
  at("frame").style.width = `min(100%, ${72 * ratio}vh)`;
  at("frame").classList.toggle("coarse", width < 400);
  for (const id of ["image", "overlay"]) Object.assign(at(id), { width, height });
  at("image").getContext("2d").drawImage(bitmap, 0, 0, width, height);
  const how = seen.tiles > 1 ? `, in ${seen.tiles} tiles` : "";
  at("caption").textContent = `${file.name}: ${width}\u00a0×\u00a0${height}${how}, ${seen.seconds.toFixed(2)}\u00a0s`;
  marked = warmed = null;
  if (!same) chosen = null;
  paint();
  wipe();
  legend();
  pick(chosen);
}

function paint() {
  const { height, width } = seen;
  const rgba = new Uint32Array(256); // little-endian: ABGR
  for (const { index, color } of about.classes) {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
    const alpha = marked === null ? OVERLAY_ALPHA : index === marked ? 215 : 20;
    rgba[index] = ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;
  }
  const context = at("overlay").getContext("2d");
  const picture = context.createImageData(width, height);
  const pixels = new Uint32Array(picture.data.buffer);
  const labels = seen.labels.data;
  for (let i = 0; i < labels.length; i++) pixels[i] = rgba[labels[i]];
  context.putImageData(picture, 0, 0);
}

function warm() {
  const there = warmed !== null && seen.relation;
  at("heat").hidden = !there;
  at("relation-hint").textContent = there
    ? `Red: relation of each pixel to the region of ${about.classes[warmed].name}.`
    : "Select a class to show its relation over the whole image.";
  at("overlay").style.opacity = there ? 0.25 : 1;
  if (!there) return;
  const [, height, width] = seen.relation.shape;
  Object.assign(at("heat"), { width, height });
  const context = at("heat").getContext("2d");
  const picture = context.createImageData(width, height);
  const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().split(" ").map(Number);
  const values = seen.relation.data.subarray(warmed * height * width, (warmed + 1) * height * width);
  const most = Math.max(1, values.reduce((a, c) => Math.max(a, c), 0));
  values.forEach((value, i) => picture.data.set([r, g, b, (235 * value) / most], 4 * i));
  context.putImageData(picture, 0, 0);
}

function wipe() {
  at("frame").style.setProperty("--cut", `${at("slider").value}%`);
  at("part").textContent = `${at("slider").value} %`;
}

function bars(list, rows, press) {
  list.replaceChildren(...rows.map(({ one, part, text }) => {
    const fill = make("i");
    fill.style.width = `${100 * part}%`;
    const button = make("button", { type: "button" },
      swatch(one), make("span", { className: "name", textContent: one.name }), make("span", { textContent: text }),
      make("span", { className: "bar" }, fill));
    button.dataset.index = one.index;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => press(one.index));
    return make("li", {}, button);
  }));
}

function pressed(list, index) {
  for (const button of list.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.index) === index));
  }
}

function legend() {
  const rows = seen.classes.map((one) => ({ one, part: one.share, text: percent(one.share) }));
  bars(at("legend"), rows, (index) => {
    marked = marked === index ? null : index;
    pressed(at("legend"), marked);
    paint();
    if (marked !== null && at("slider").value === "0") moveTo(100);
  });
}

function pick(where) {
  chosen = where;
  at("answer").hidden = at("marker").hidden = where === null;
  at("pick").hidden = where !== null;
  if (where === null) return warm();
  const [x, y] = where;
  const { width, height } = seen;
  const one = about.classes[seen.labels.data[y * width + x]];
  at("marker").style.left = `${(100 * (x + 0.5)) / width}%`;
  at("marker").style.top = `${(100 * (y + 0.5)) / height}%`;
  const [box, name] = at("chosen").children;
  box.style.background = one.color;
  name.textContent = one.name;
  name.dataset.index = one.index;
  const sure = seen.confidence && seen.confidence.data[y * width + x] / 255;
  at("sure").textContent = `${seen.confidence ? `Probability ${percent(sure)}, at` : "At"} column ${x}, row ${y}`;
  related(x, y);
}

function related(x, y) {
  const { relation, width, height } = seen;
  for (const id of ["relation-title", "relation-hint", "relation"]) at(id).hidden = !relation;
  if (!relation) return;
  const [count, rows, columns] = relation.shape;
  const place = Math.min(rows - 1, Math.floor((y * rows) / height)) * columns + Math.min(columns - 1, Math.floor((x * columns) / width));
  const parts = about.classes.map((one) => ({ one, part: relation.data[one.index * rows * columns + place] / 255 }));
  parts.sort((a, b) => b.part - a.part);
  const shown = parts.slice(0, Math.min(count, MOST_BARS)).map((row) => ({ ...row, text: percent(row.part) }));
  bars(at("relation"), shown, (index) => {
    warmed = warmed === index ? null : index;
    pressed(at("relation"), warmed);
    warm();
  });
  pressed(at("relation"), warmed);
  warm();
}

// ---- people

function moveTo(value) {
  at("slider").value = value;
  wipe();
}

function take(files) {
  const given = [...(files ?? [])].find((one) => one instanceof File);
  if (given) look(given);
}

at("file").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = "";
});
at("slider").addEventListener("input", wipe);
at("look").addEventListener("change", () => file && look(file));
at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  at("ask").hidden = true;
  say(null);
  await start();
});

at("frame").addEventListener("click", (event) => {
  if (event.target === at("divider")) return;
  const box = at("frame").getBoundingClientRect();
  const inside = (part, size) => Math.max(0, Math.min(size - 1, Math.floor(part * size)));
  pick([inside((event.clientX - box.left) / box.width, seen.width), inside((event.clientY - box.top) / box.height, seen.height)]);
});
at("frame").addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const far = event.shiftKey ? 10 : 1;
  const [x, y] = chosen ?? [seen.width >> 1, seen.height >> 1];
  const [dx, dy] = steps[event.key];
  pick([Math.max(0, Math.min(seen.width - 1, x + far * dx)), Math.max(0, Math.min(seen.height - 1, y + far * dy))]);
});
at("divider").addEventListener("pointerdown", (event) => at("divider").setPointerCapture(event.pointerId));
at("divider").addEventListener("pointermove", (event) => {
  if (!at("divider").hasPointerCapture(event.pointerId)) return;
  const box = at("frame").getBoundingClientRect();
  moveTo(Math.round((100 * (event.clientX - box.left)) / box.width));
});

function keep(blob, ending) {
  const link = make("a", { href: URL.createObjectURL(blob), download: file.name.replace(/\.[^.]*$/, "") + ending });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

at("save-labels").addEventListener("click", async () => keep(await png(seen.labels.data, seen.height, seen.width), "_labels.png"));
at("save-overlay").addEventListener("click", () => {
  const whole = make("canvas", { width: seen.width, height: seen.height });
  const context = whole.getContext("2d");
  context.drawImage(at("image"), 0, 0);
  context.drawImage(at("overlay"), 0, 0);
  whole.toBlob((blob) => keep(blob, "_overlay.png"), "image/png");
});

for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files);
  });
}
addEventListener("paste", (event) => take(event.clipboardData.files));

start();
