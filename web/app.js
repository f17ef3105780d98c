// The page: an image goes through encoder.onnx to 64 numbers, these through decoder.onnx to an image.
// Images are float32, 1×3×32×32, in [0, 1], as everywhere in this project.

const VERSION = "1.30.0"; // of onnxruntime-web
const RUNTIMES = [
  ["vendor/ (offline copy)", new URL("vendor/", location.href).href],
  ["cdn.jsdelivr.net", `https://cdn.jsdelivr.net/npm/onnxruntime-web@${VERSION}/dist/`],
];
const SIDE = 32;
const LATENTS = 64;
const REACH = 4; // of a latent's slider, either way
const KEPT = 31; // times that the medians are of

const element = (id) => document.getElementById(id);
const slots = { a: element("slot-a"), b: element("slot-b") };

// --- State ---

const images = { a: null, b: null }; // pixels, Float32Array 3×32×32
const codes = { a: null, b: null }; // mu of each, Float32Array 64
let active = "a"; // the slot that the next image goes to
let z = new Float32Array(LATENTS); // what is drawn
let origin = "between"; // of z: between, moved or sample
const times = { encode: [], decode: [] };
let ort, encoder, decoder;

// --- Loading ---

class Failure extends Error {}

async function loadRuntime() {
  for (const [name, base] of RUNTIMES) {
    try {
      const module = await import(`${base}ort.wasm.min.mjs`);
      module.env.wasm.wasmPaths = base;
      module.env.wasm.numThreads = 1; // more gain nothing at this size
      element("runtime").textContent = `onnxruntime-web ${VERSION}, WebAssembly, from ${name}.`;
      return module;
    } catch {
      // Not there: the next one. Which one it became is said at the foot of the page.
    }
  }
  throw new Failure(
    "The runtime could not be loaded: web/vendor/ does not hold it and cdn.jsdelivr.net did not "
    + "answer. Go online, or put its three files there with the command in the README, Deploy.",
  );
}

async function loadModel(name) {
  const response = await fetch(name).catch(() => null);
  if (!response?.ok) {
    throw new Failure(
      `${name} could not be loaded (${response?.status ?? "no answer"}): write it with `
      + "“python export_tinyvae.py --web” and reload.",
    );
  }
  const content = await response.arrayBuffer();
  try {
    return [await ort.InferenceSession.create(content, { executionProviders: ["wasm"] }),
            content.byteLength];
  } catch (error) {
    throw new Failure(
      `${name} is not a model that onnxruntime-web ${VERSION} can run (${error.message}): write it `
      + "again with “python export_tinyvae.py --web” and reload.",
    );
  }
}

// --- The model ---

// One thing at a time, in the order of the asking: a session does not run twice at once.
let turn = Promise.resolve();

function timed(what, work) {
  const result = turn.then(async () => {
    const start = performance.now();
    const found = await work();
    times[what] = [...times[what], performance.now() - start].slice(-KEPT);
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
  const latent = new ort.Tensor("float32", code, [1, LATENTS]);
  const found = await timed("decode", () => decoder.run({ latent }));
  return found.image.data;
}

// While an image is being decoded, only the last wish is remembered: a slider asks faster.
let running = false;
let wanted = false;

async function draw() {
  wanted = true;
  if (running) return;
  running = true;
  try {
    while (wanted) {
      wanted = false;
      paint(element("decoded"), await decode(z.slice()));
    }
  } finally {
    running = false;
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
  const canvas = new OffscreenCanvas(SIDE, SIDE);
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

async function put(slot, pixels) {
  images[slot] = pixels;
  paint(slots[slot].querySelector(".original"), pixels);
  codes[slot] = await encode(pixels);
  paint(slots[slot].querySelector(".decoded"), await decode(codes[slot]));
  backToImages();
}

function choose(slot) {
  active = slot;
  for (const name in slots) slots[name].setAttribute("aria-pressed", name === slot);
}

async function open(slot, file) {
  if (!file) return;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    complain(`${file.name} is not a picture that this browser can read.`);
    return;
  }
  const side = Math.min(bitmap.width, bitmap.height);
  await put(slot, await pixelsOf(
    bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side));
  choose(slot);
  element("between").value = slot === "a" ? 0 : 1;
  backToImages();
}

function backToImages() {
  if (!codes.a || !codes.b) return;
  const t = Number(element("between").value);
  z = codes.a.map((value, i) => value + t * (codes.b[i] - value));
  show("between");
}

function sampleFromPrior() {
  // Box and Muller 1958: two uniform numbers make a normal one.
  z = z.map(() => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()));
  show("sample");
}

function show(where) {
  origin = where;
  for (const input of element("latents").children) {
    input.value = z[input.index];
    input.title = `z${input.index} = ${z[input.index].toFixed(2)}`;
  }
  draw();
}

// --- Words and figures ---

const median = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];

function describe() {
  for (const what in times) {
    const known = times[what].length;
    element(`${what}-ms`).textContent = known ? `${median(times[what]).toFixed(2)} ms` : "–";
  }
  const t = Number(element("between").value);
  const end = { 0: "a", 1: "b" }[t];
  const texts = {
    sample: "A code drawn from the prior, N(0, 1): an image of nothing in particular.",
    moved: "A code changed by hand.",
    between: end ? `${end.toUpperCase()}, encoded and decoded.`
      : `${Math.round(100 * (1 - t))} % of A's code and ${Math.round(100 * t)} % of B's.`,
  };
  element("what").textContent = texts[origin];
  element("mse").textContent = origin === "between" && end
    ? squaredError(images[end], element("decoded").pixels).toFixed(4) : "–";
}

function squaredError(one, other) {
  return one.reduce((sum, value, i) => sum + (value - other[i]) ** 2, 0) / one.length;
}

function complain(text) {
  element("what").textContent = text;
}

// --- Building the page ---

function addLatents() {
  for (let i = 0; i < LATENTS; i++) {
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

async function addSamples() {
  const response = await fetch("samples.png").catch(() => null);
  if (!response?.ok) return; // the page works without them
  const sheet = await createImageBitmap(await response.blob(), { colorSpaceConversion: "none" });
  for (let x = 0; x < sheet.width; x += SIDE) {
    const pixels = await pixelsOf(sheet, x, 0, SIDE);
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIDE;
    button.setAttribute("aria-label", `Sample ${x / SIDE + 1}`);
    button.append(canvas);
    paint(canvas, pixels);
    button.addEventListener("click", async () => {
      element("between").value = active === "a" ? 0 : 1;
      await put(active, pixels);
    });
    element("samples").append(button);
    if (x === 0) await put("a", pixels);
    if (x === SIDE) await put("b", pixels);
  }
}

function listen() {
  for (const name in slots) {
    const slot = slots[name];
    slot.addEventListener("click", () => choose(name));
    slot.addEventListener("dragover", (event) => {
      event.preventDefault();
      slot.classList.add("over");
    });
    slot.addEventListener("dragleave", () => slot.classList.remove("over"));
    slot.addEventListener("drop", (event) => {
      event.preventDefault();
      slot.classList.remove("over");
      open(name, event.dataTransfer.files[0]);
    });
  }
  // A picture dropped beside a slot goes to the chosen one, instead of replacing the page.
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (event.defaultPrevented) return;
    event.preventDefault();
    open(active, event.dataTransfer.files[0]);
  });
  element("file").addEventListener("change", (event) => {
    open(active, event.target.files[0]);
    event.target.value = "";
  });
  element("between").addEventListener("input", backToImages);
  element("sample").addEventListener("click", sampleFromPrior);
  element("reset").addEventListener("click", backToImages);
}

async function main() {
  ort = await loadRuntime();
  const models = await Promise.all([loadModel("encoder.onnx"), loadModel("decoder.onnx")]);
  const [[, encoderBytes], [, decoderBytes]] = models;
  [[encoder], [decoder]] = models;
  element("size").textContent = `${((encoderBytes + decoderBytes) / 1e6).toFixed(2)} MB`;
  addLatents();
  listen();
  await addSamples();
  for (let i = 0; i < KEPT; i++) await decode(z); // the first are slow
  document.body.dataset.state = "ready";
  backToImages();
}

if (location.protocol !== "file:") {
  main().catch((error) => {
    document.body.dataset.state = "error";
    element("status").textContent = error instanceof Failure ? error.message
      : `Something went wrong that should not have: ${error.message}`;
    if (!(error instanceof Failure)) throw error;
  });
}
