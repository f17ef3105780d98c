// The page: an image goes through encoder.onnx to a code, and the code through decoder.onnx to an
// image. Images are float32, 1×3×32×32, RGB in [0, 1], as everywhere in this project.

const VERSION = "1.30.0"; // of onnxruntime-web
const RUNTIMES = [
  ["vendor/, the offline copy", new URL("vendor/", location.href).href],
  ["cdn.jsdelivr.net", `https://cdn.jsdelivr.net/npm/onnxruntime-web@${VERSION}/dist/`],
];
const RUNTIME_FILES = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs",
                       "ort-wasm-simd-threaded.wasm"];
const SIDE = 32;
const REACH = 4; // of a latent's slider, either way
const LONGEST = 640; // pixels of a photograph's longer side that is drawn in tiles
const OVERLAP = 8; // pixels of neighbouring tiles, which fade into each other
const PATIENCE = 20; // seconds that a server may take to say whether it has a file
const SIMD = "AGFzbQEAAAABBQFgAAF7AwIBAAoKAQgAQQD9D/1iCw=="; // a module of one vector instruction
const TIMED = 31; // runs that a time is the mean of: a clock may tick in whole milliseconds

const element = (id) => document.getElementById(id);
const slots = { a: element("slot-a"), b: element("slot-b") };

// --- State ---

const shown = { a: null, b: null }; // of each slot: its pixels and its code, mu
const asked = { a: 0, b: 0 }; // how many images each was given, to know a stale one
let active = "a"; // the slot that the next image goes to
let z; // the code that is drawn, Float32Array
let origin = "between"; // of z: between, moved or prior
const tiled = { asked: 0, shown: 0 }; // photographs: how many, and which of them is drawn
const times = { encode: [], decode: [] };
let ort, encoder, decoder;

// --- Loading ---

class Failure extends Error {}

async function isThere(url) {
  const signal = AbortSignal.timeout?.(1000 * PATIENCE); // older browsers have none
  const response = await fetch(url, { method: "HEAD", signal }).catch(() => null);
  return response?.ok;
}

async function loadRuntime() {
  if (typeof WebAssembly === "undefined") {
    throw new Failure("This browser has no WebAssembly, or it is turned off: use another one.");
  }
  if (!WebAssembly.validate(Uint8Array.from(atob(SIMD), (letter) => letter.charCodeAt(0)))) {
    throw new Failure("This browser's WebAssembly has no SIMD: update it, or use another one.");
  }
  for (const [name, base] of RUNTIMES) {
    const there = await Promise.all(RUNTIME_FILES.map((file) => isThere(base + file)));
    if (!there.every(Boolean)) continue; // which one it becomes is said at the foot of the page
    const module = await import(`${base}${RUNTIME_FILES[0]}`);
    module.env.wasm.wasmPaths = base;
    module.env.wasm.numThreads = 1; // more gain nothing at this size
    const version = module.env.versions.web;
    element("runtime").textContent = `onnxruntime-web ${version}, WebAssembly, from ${name}.`;
    return module;
  }
  throw new Failure(
    "The runtime could not be loaded: web/vendor/ does not hold it and cdn.jsdelivr.net did not "
    + "answer. Go online, or put its three files there with the command in docs/deployment.md.",
  );
}

// The bytes of a file.
async function load(name) {
  const response = await fetch(name).catch(() => null);
  const content = response?.ok ? await response.arrayBuffer().catch(() => null) : null;
  if (!content) {
    const reason = response && !response.ok ? response.status : "no answer, or not to its end";
    throw new Failure(
      `${name} could not be loaded (${reason}): reload, or write it with `
      + "“python export_tinyvae.py --web” and reload.",
    );
  }
  return content;
}

// A file as what `read` makes of its bytes.
async function loadAs(what, name, read) {
  const content = await load(name);
  try {
    return await read(content);
  } catch (error) {
    throw new Failure(
      `${name} is not ${what} (${error.message}): write it again with `
      + "“python export_tinyvae.py --web” and reload.",
    );
  }
}

const loadModel = (name) =>
  loadAs("a model that onnxruntime-web can run", name, async (content) => {
    const bytes = content.byteLength;
    const session = await ort.InferenceSession.create(content, { executionProviders: ["wasm"] });
    return [session, bytes];
  });

// --- The model ---

// One thing at a time, in the order of the asking: a session does not run twice at once.
let turn = Promise.resolve();

function timed(what, work) {
  const result = turn.then(async () => {
    const start = performance.now();
    const found = await work();
    times[what] = [...times[what], performance.now() - start].slice(-TIMED);
    return found;
  });
  turn = result.catch(() => {});
  return result;
}

async function encode(pixels) {
  const image = new ort.Tensor("float32", pixels, [1, 3, SIDE, SIDE]);
  const found = await timed("encode", () => encoder.run({ image }));
  return found.mu.data;
}

async function decode(code) {
  const latent = new ort.Tensor("float32", code, [1, code.length]);
  const found = await timed("decode", () => decoder.run({ latent }));
  return found.image.data;
}

// While an image is being decoded, only the last wish is remembered: a slider asks faster.
let drawing = false;
let wanted = false;

async function draw() {
  wanted = true;
  if (drawing) return;
  drawing = true;
  try {
    while (wanted) {
      wanted = false;
      paint(element("decoded"), await decode(z.slice()));
    }
  } finally {
    drawing = false;
  }
  describe();
}

// --- Pixels ---

function paint(canvas, pixels) {
  const picture = new ImageData(SIDE, SIDE);
  for (let i = 0; i < SIDE * SIDE; i++) {
    for (let c = 0; c < 3; c++) {
      picture.data[4 * i + c] = Math.round(255 * pixels[c * SIDE * SIDE + i]);
    }
    picture.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
  canvas.pixels = pixels;
}

// A bitmap's square (x, y, side) as pixels of the model's size, on white where it is transparent.
async function pixelsOf(bitmap, x, y, side) {
  const small = await createImageBitmap(bitmap, x, y, side, side, {
    resizeWidth: SIDE, resizeHeight: SIDE, resizeQuality: "high",
  });
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE;
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, SIDE, SIDE);
  context.drawImage(small, 0, 0);
  const { data } = context.getImageData(0, 0, SIDE, SIDE);
  const pixels = new Float32Array(3 * SIDE * SIDE);
  for (let i = 0; i < SIDE * SIDE; i++) {
    for (let c = 0; c < 3; c++) pixels[c * SIDE * SIDE + i] = data[4 * i + c] / 255;
  }
  return pixels;
}

// --- What a person does ---

// Give a slot the image that `find` comes to, and draw it, unless a later one has overtaken it.
async function put(slot, find) {
  complain("");
  const request = ++asked[slot];
  const pixels = await find();
  const code = await encode(pixels);
  const decoded = await decode(code);
  if (request !== asked[slot]) return;
  shown[slot] = { pixels, code };
  paint(slots[slot].querySelector(".original"), pixels);
  paint(slots[slot].querySelector(".decoded"), decoded);
  element("between").value = slot === "a" ? 0 : 1;
  drawBetween();
}

function choose(slot) {
  active = slot;
  for (const name in slots) slots[name].setAttribute("aria-pressed", name === slot);
}

// What `use` makes of a file's picture.
async function withBitmap(file, use) {
  if (!file) throw new Failure("That is not a file: drop a picture from a folder.");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    const remedy = /\.hei[cf]$/i.test(file.name) ? ": save it as JPEG" : "";
    throw new Failure(`${file.name} is not a picture that this browser can read${remedy}.`);
  }
  try {
    return await use(bitmap);
  } finally {
    bitmap.close(); // a large photograph takes hundreds of megabytes
  }
}

function open(slot, file) {
  choose(slot);
  return put(slot, () => withBitmap(file, (bitmap) => {
    const side = Math.min(bitmap.width, bitmap.height);
    return pixelsOf(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side);
  }));
}

// Draw a whole photograph from the codes of its tiles, a row of them after the other.
async function drawTiles(file) {
  complain("");
  const request = ++tiled.asked;
  const [original, canvas] = [element("photograph"), element("tiled")];
  await withBitmap(file, (bitmap) => {
    if (request < tiled.shown) return; // a later one was ready first
    const sides = [bitmap.width, bitmap.height];
    const [shortest, longest] = [Math.min(...sides), Math.max(...sides)];
    if (longest > 100 * shortest) throw new Failure(`${file.name} is too narrow for tiles.`);
    tiled.shown = request;
    const scale = Math.max(SIDE / shortest, Math.min(1, LONGEST / longest));
    for (const either of [original, canvas]) {
      [either.width, either.height] = sides.map((side) => Math.round(scale * side));
      either.hidden = false;
    }
    const onto = original.getContext("2d");
    onto.fillStyle = "white";
    onto.fillRect(0, 0, original.width, original.height);
    onto.imageSmoothingQuality = "high";
    onto.drawImage(bitmap, 0, 0, original.width, original.height);
    element("tiles").textContent = "Drawing…";
  });
  const { width, height } = canvas;
  const sums = new Float32Array(4 * width * height); // of weight · red, green, blue, and weights
  const weight = (i) => Math.min(i + 0.5, SIDE - i - 0.5, OVERLAP);
  const picture = new ImageData(width, height);
  const context = canvas.getContext("2d");
  for (const top of starts(height)) {
    for (const left of starts(width)) {
      const made = await decode(await encode(await pixelsOf(original, left, top, SIDE)));
      if (request !== tiled.shown) return;
      for (let i = 0; i < SIDE * SIDE; i++) {
        const [x, y] = [i % SIDE, Math.floor(i / SIDE)];
        const at = 4 * ((top + y) * width + left + x);
        const here = weight(x) * weight(y);
        for (let c = 0; c < 3; c++) sums[at + c] += here * made[c * SIDE * SIDE + i];
        sums[at + 3] += here;
      }
    }
    for (let i = 0; i < sums.length; i++) {
      const total = sums[i | 3]; // of the same pixel
      picture.data[i] = total && (i % 4 === 3 ? 255 : Math.round((255 * sums[i]) / total));
    }
    context.putImageData(picture, 0, 0);
  }
  const tiles = starts(width).length * starts(height).length;
  element("tiles").textContent = `${width} × ${height} pixels from ${tiles.toLocaleString("en")} `
    + `tiles, ${(tiles * z.length).toLocaleString("en")} numbers.`;
}

// Where tiles start along a side: a stride apart, the last one at its end.
function starts(length) {
  const stride = SIDE - OVERLAP;
  const count = Math.ceil((length - SIDE) / stride) + 1;
  return Array.from({ length: count }, (_, i) => Math.min(i * stride, length - SIDE));
}

function drawBetween() {
  const t = Number(element("between").value);
  z = shown.a.code.map((value, i) => value + t * (shown.b.code[i] - value));
  show("between");
}

function samplePrior() {
  // Two uniform numbers make a normal one (Box and Muller 1958).
  const normal = () =>
    Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  z = z.map(normal);
  show("prior");
}

function show(where) {
  origin = where;
  for (const input of element("latents").children) {
    input.value = z[input.index];
    input.title = `z${input.index} = ${z[input.index].toFixed(2)}`;
  }
  return draw();
}

// --- Words and figures ---

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function describe() {
  for (const what in times) {
    element(`${what}-ms`).textContent = `${mean(times[what]).toFixed(2)} ms`;
  }
  const t = Number(element("between").value);
  const end = { 0: "a", 1: "b" }[t];
  const texts = {
    prior: "A code drawn from the prior, N(0, 1): an image of nothing in particular.",
    moved: "A code changed by hand.",
    between: end ? `${end.toUpperCase()}, encoded and decoded.`
      : `${Math.round(100 * (1 - t))} % of A's code and ${Math.round(100 * t)} % of B's.`,
  };
  element("what").textContent = texts[origin];
  element("mse").textContent = origin === "between" && end
    ? squaredError(shown[end].pixels, element("decoded").pixels).toFixed(4) : "–";
}

function squaredError(one, other) {
  return mean(one.map((value, i) => (value - other[i]) ** 2));
}

function complain(text) {
  element("complaint").textContent = text;
}

// --- Building the page ---

function addLatents(count) {
  for (let i = 0; i < count; i++) {
    const input = document.createElement("input");
    Object.assign(input, { type: "range", min: -REACH, max: REACH, step: 0.01, index: i });
    input.setAttribute("aria-label", `latent ${i}`);
    input.addEventListener("input", () => {
      z[i] = Number(input.value);
      show("moved");
    });
    element("latents").append(input);
  }
}

async function addExamples() {
  const sheet = await loadAs("a picture", "examples.png", (content) =>
    createImageBitmap(new Blob([content]), { colorSpaceConversion: "none" }));
  const examples = [];
  for (let x = 0; x < sheet.width; x += SIDE) {
    const pixels = await pixelsOf(sheet, x, 0, SIDE);
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIDE;
    button.setAttribute("aria-label", `Example ${x / SIDE + 1}`);
    button.append(canvas);
    paint(canvas, pixels);
    button.addEventListener("click", () => put(active, () => pixels));
    element("examples").append(button);
    examples.push(pixels);
  }
  return examples;
}

function listen() {
  for (const name in slots) {
    const slot = slots[name];
    slot.addEventListener("click", () => choose(name));
    slot.addEventListener("dragover", () => slot.classList.add("over"));
    slot.addEventListener("dragleave", () => slot.classList.remove("over"));
  }
  // A picture dropped beside both slots goes to the chosen one, instead of replacing the page.
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    const under = event.target.closest?.(".slot");
    under?.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (event.target.closest?.(".in-tiles")) drawTiles(file);
    else open(under === slots.a ? "a" : under === slots.b ? "b" : active, file);
  });
  const jobs = { file: (file) => open(active, file), whole: drawTiles };
  for (const id in jobs) {
    element(id).addEventListener("change", (event) => {
      if (event.target.files[0]) jobs[id](event.target.files[0]);
      event.target.value = "";
    });
  }
  element("between").addEventListener("input", drawBetween);
  element("prior").addEventListener("click", samplePrior);
  element("reset").addEventListener("click", drawBetween);
  window.addEventListener("unhandledrejection", (event) => {
    complain(event.reason.message);
    if (event.reason instanceof Failure) event.preventDefault();
  });
}

async function main() {
  const card = await loadAs("JSON", "model.json", (content) =>
    JSON.parse(new TextDecoder().decode(content)));
  for (const what in card) {
    for (const place of document.getElementsByClassName(what)) {
      place.textContent = card[what].toLocaleString("en");
    }
  }
  ort = await loadRuntime();
  const models = await Promise.all(["encoder.onnx", "decoder.onnx"].map(loadModel));
  [encoder, decoder] = models.map(([session]) => session);
  const bytes = models.reduce((sum, [, size]) => sum + size, 0);
  element("size").textContent = `${(bytes / 1e6).toFixed(2)} MB`;
  addLatents(card.latents);
  const examples = await addExamples();
  for (const slot of ["a", "b"]) {
    shown[slot] = { pixels: examples[0], code: await encode(examples[0]) };
  }
  await put("b", () => examples[1]);
  for (let i = 0; i < TIMED; i++) await decode(await encode(examples[0])); // the first are slow
  await put("a", () => examples[0]);
  listen();
  document.querySelector("main").inert = false;
  document.body.dataset.state = "ready";
}

if (location.protocol !== "file:") {
  main().catch((error) => {
    document.body.dataset.state = "error";
    element("status").textContent = error instanceof Failure ? error.message
      : `Something went wrong that should not have: ${error.message}`;
    if (!(error instanceof Failure)) throw error;
  });
}
