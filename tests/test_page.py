"""The page in web/: its models, and what it does in a browser."""

import base64
import contextlib
import functools
import http.server
import io
import itertools
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from common import models, storage
from tests.testing import HERE, random_images
from tiny_vae_32 import TinyVAE32

VENDOR = HERE / "web" / "vendor"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


def test_the_models_of_the_page_are_the_released_student():
    runtime_library = pytest.importorskip("onnxruntime")
    paths = {name: HERE / "web" / f"{name}.onnx" for name in ("encoder", "decoder")}
    assert sum(path.stat().st_size for path in paths.values()) < 1_500_000
    vae, _ = models.load_model(models.RELEASED, TinyVAE32)
    sessions = {name: runtime_library.InferenceSession(path) for name, path in paths.items()}
    for session in sessions.values():
        notes = session.get_modelmeta().custom_metadata_map
        assert notes["student_sha256"] == storage.fingerprint(vae)
    images = random_images(2)
    mu, _ = sessions["encoder"].run(None, {"image": images.numpy()})
    (decoded,) = sessions["decoder"].run(None, {"latent": mu})
    torch.testing.assert_close(
        torch.from_numpy(decoded), vae.decode(vae.encode(images)[0]), atol=1e-5, rtol=0
    )


@contextlib.contextmanager
def served(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.fixture
def browser_page():
    """A tab in headless Chromium that reaches no other machine."""
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium here")
    with api.sync_playwright() as playwright:
        # In a container there is no sandbox; without the others it asks for its maker's servers.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page()
        elsewhere = re.compile(r"^(?!http://127\.0\.0\.1|file:|blob:|data:)")
        page.route(elsewhere, lambda route: route.abort())
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def pixels_of(page, selector):
    """A canvas as uint8, 3×H×W."""
    height, width, rgba = page.eval_on_selector(selector, """c => [c.height, c.width,
        Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]""")
    return torch.tensor(rgba, dtype=torch.uint8).view(height, width, 4)[..., :3].permute(2, 0, 1)


def wait_until(page, is_so):
    """The page works while the test goes on: look again until it is so, for ten seconds."""
    for _ in range(200):
        if is_so():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it never came to be so")


def wait_for_drawn(page, selector, image):
    """The canvas comes to show this image, N=1, in [0, 1], to the last of its 256 levels."""
    wanted = 255 * image[0].detach()
    wait_until(page, lambda: (pixels_of(page, selector).float() - wanted).abs().max() <= 1)


def wait_for_text(page, text, selector="#what"):
    wait_until(page, lambda: text in page.inner_text(selector))


DROP = """([id, ...contents]) => {
    for (const content of contents) {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
        transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
        const event = { dataTransfer: transfer, bubbles: true, cancelable: true };
        document.getElementById(id).dispatchEvent(new DragEvent("drop", event));
    }
}"""


COUNT_DECODED = """() => {
    const decode = window.createImageBitmap;
    window.decoded = 0;
    window.createImageBitmap = async (...what) => {
        const image = await decode(...what);
        window.decoded++;
        return image;
    };
}"""


def as_png(pixels):
    """An image in [0, 1], 3×H×W, as a file."""
    file = io.BytesIO()
    array = (255 * pixels.permute(1, 2, 0)).round().byte().numpy()
    Image.fromarray(array).save(file, "PNG", compress_level=1)
    return file.getvalue()


def test_the_page_draws_what_pytorch_computes(browser_page):
    page = browser_page
    if not VENDOR.exists():
        pytest.skip("web/vendor/ does not hold the runtime: docs/deployment.md has the command")
    vae, _ = models.load_model(models.RELEASED, TinyVAE32)
    sheet = np.asarray(Image.open(HERE / "web" / "examples.png").convert("RGB"))
    examples = torch.from_numpy(sheet.copy()).permute(2, 0, 1).unfold(2, 32, 32).permute(2, 0, 1, 3)
    examples = examples.float() / 255
    mu, _ = vae.encode(examples)

    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    with served(HERE / "web") as address:
        page.goto(address)
        page.wait_for_selector("body[data-state=ready]")
        assert "offline copy" in page.inner_text("#runtime")
        wait_for_drawn(page, "#slot-a .original", examples[:1])
        wait_for_drawn(page, "#slot-b .decoded", vae.decode(mu[1:2]))
        wait_for_drawn(page, "#decoded", vae.decode(mu[:1]))
        wait_for_text(page, "A, encoded and decoded")
        mse = (vae.decode(mu[:1]) - examples[:1]).square().mean().item()
        assert float(page.inner_text("#mse")) == pytest.approx(mse, abs=1e-4)
        assert re.fullmatch(r"\d+\.\d\d ms", page.inner_text("#decode-ms"))

        page.locator("#between").fill("0.5")
        middle = (mu[:1] + mu[1:2]) / 2
        wait_for_drawn(page, "#decoded", vae.decode(middle))
        page.get_by_label("latent 7", exact=True).fill("3")
        middle[0, 7] = 3
        wait_for_drawn(page, "#decoded", vae.decode(middle))
        wait_for_text(page, "by hand")
        page.click("#prior")
        wait_for_text(page, "from the prior")
        sliders = page.eval_on_selector_all("#latents input", "all => all.map((i) => +i.value)")
        code = torch.tensor(sliders)  # to a hundredth, which the image hardly shows
        assert 0.6 < code.std() < 1.4
        assert (pixels_of(page, "#decoded") / 255 - vae.decode(code[None])[0]).abs().max() < 0.05

        page.click("#slot-b")
        page.get_by_label("Example 4").click()
        wait_for_drawn(page, "#decoded", vae.decode(mu[3:4]))

        # A picture of one's own, opened or dropped: its middle square.
        png = as_png(torch.nn.functional.pad(examples[5], (16, 16)))
        upload = {"name": "mine.png", "mimeType": "image/png", "buffer": png}
        page.set_input_files("#file", upload)
        wait_for_drawn(page, "#slot-b .original", examples[5:6])
        wait_for_drawn(page, "#decoded", vae.decode(mu[5:6]))
        page.evaluate(DROP, ["slot-a", base64.b64encode(png).decode()])
        wait_for_drawn(page, "#slot-a .decoded", vae.decode(mu[5:6]))
        page.set_input_files("#file", upload | {"name": "note.png", "buffer": b"not a picture"})
        wait_for_text(page, "note.png is not a picture", "#complaint")
        page.set_input_files("#file", upload | {"name": "a.HEIC", "buffer": b"not a picture"})
        wait_for_text(page, "that this browser can read: save it as JPEG.", "#complaint")
        page.evaluate(DROP, ["slot-a", ""])
        wait_for_text(page, "dropped.png is not a picture", "#complaint")
        page.get_by_label("Example 2").click()
        wait_for_drawn(page, "#slot-a .original", examples[1:2])
        assert page.inner_text("#complaint") == ""

        # A whole one, in tiles that start at 0, 24 and 28 across, 0 and 8 down.
        photograph = torch.cat([examples[6], examples[7]], 2)[..., :60]
        photograph = torch.cat([photograph, photograph[:, :8].flip(1)], 1)
        page.evaluate(DROP, ["tiled", base64.b64encode(as_png(photograph[:, :32])).decode()])
        wait_for_text(page, "60 × 32 pixels from 3 tiles, 192 numbers.", "#tiles")
        page.set_input_files("#whole", upload | {"buffer": as_png(photograph)})
        wait_for_text(page, "60 × 40 pixels from 6 tiles, 384 numbers.", "#tiles")
        torch.testing.assert_close(pixels_of(page, "#photograph") / 255, photograph)
        side = torch.arange(32)
        fade = torch.minimum(side + 0.5, 31.5 - side).clamp_max(8)
        fade, sums = fade[:, None] * fade, torch.zeros(4, 40, 60)
        for top, left in itertools.product((0, 8), (0, 24, 28)):
            place = slice(None), slice(top, top + 32), slice(left, left + 32)
            decoded = vae.decode(vae.encode(photograph[place][None].contiguous())[0])[0]
            sums[place] += torch.cat([fade * decoded, fade[None]])
        wait_for_drawn(page, "#tiled", (sums[:3] / sums[3])[None])
        for size, text in (((15, 20), "43 × 32 pixels from 2"), ((1300, 40), "32 × 1040 pix")):
            grey = as_png(torch.full((3, *size), 0.4))
            page.set_input_files("#whole", upload | {"buffer": grey})
            wait_for_text(page, text, "#tiles")
        page.set_input_files("#whole", upload | {"buffer": as_png(torch.zeros(3, 1, 101))})
        wait_for_text(page, "mine.png is too narrow for tiles", "#complaint")

        # 50 megapixels and a small picture at once: the later one stays, though it is ready first.
        grey, file = torch.full((1, 3, 32, 32), 0.4), io.BytesIO()
        Image.new("RGB", (7100, 7100), (102, 102, 102)).save(file, "PNG", compress_level=1)
        large = file.getvalue()
        page.evaluate(COUNT_DECODED)
        both = [base64.b64encode(content).decode() for content in (large, png)]
        page.evaluate(DROP, ["slot-a", *both])
        wait_for_drawn(page, "#decoded", vae.decode(mu[5:6]))
        wait_until(page, lambda: page.evaluate("window.decoded") == 4)  # two for each picture
        page.wait_for_timeout(500)
        wait_for_drawn(page, "#slot-a .original", examples[5:6])
        page.evaluate(DROP, ["tiled", *both])
        wait_for_text(page, "64 × 32 pixels from 3 tiles", "#tiles")
        wait_until(page, lambda: page.evaluate("window.decoded") >= 6 + 3)  # each tile is one
        page.wait_for_timeout(500)
        wait_for_text(page, "64 × 32 pixels from 3 tiles", "#tiles")
        page.set_input_files("#file", upload | {"name": "large.png", "buffer": large})
        wait_for_drawn(page, "#decoded", vae.decode(vae.encode(grey)[0]))
        page.evaluate("document.body.dispatchEvent(new DragEvent('drop', "
                      "{ dataTransfer: new DataTransfer(), bubbles: true, cancelable: true }))")
        wait_for_text(page, "That is not a file", "#complaint")
    assert not errors


def test_the_page_says_what_it_lacks(browser_page, tmp_path):
    site = tmp_path / "web"
    site.mkdir()
    for name in ("index.html", "style.css", "app.js"):
        shutil.copy(HERE / "web" / name, site)
    for name in ("model.json", "decoder.onnx", "examples.png"):  # cut: half of each
        content = (HERE / "web" / name).read_bytes()
        (site / name).write_bytes(content[: len(content) // 2])
    cases = [(None, "model.json is not JSON"), ("model.json", "runtime could not be loaded")]
    if VENDOR.exists():
        (site / "vendor").mkdir()
        shutil.copy(VENDOR / "ort.wasm.min.mjs", site / "vendor")
        cases += [
            ("vendor/ort-wasm-simd-threaded.mjs", "runtime could not be loaded"),
            ("vendor/ort-wasm-simd-threaded.wasm", "encoder.onnx could not be loaded (404)"),
            ("encoder.onnx", "decoder.onnx is not a model"),
            ("decoder.onnx", "examples.png is not a picture"),
        ]
    with served(site) as address:
        for added, message in cases:
            if added:
                (site / added).unlink(missing_ok=True)
                (site / added).symlink_to(HERE / "web" / added)
            browser_page.goto(address)
            browser_page.wait_for_selector("body[data-state=error]")
            assert message in browser_page.inner_text("#status")
        browser_page.add_init_script("WebAssembly.validate = () => false")
        browser_page.goto(address)
        browser_page.wait_for_selector("body[data-state=error]")
        assert "no SIMD" in browser_page.inner_text("#status")
        browser_page.add_init_script("delete window.WebAssembly")
        browser_page.goto(address)
        browser_page.wait_for_selector("body[data-state=error]")
        assert "no WebAssembly" in browser_page.inner_text("#status")
    browser_page.goto((site / "index.html").as_uri())
    assert "python -m http.server" in browser_page.inner_text("#status")
