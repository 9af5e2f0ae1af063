"""The page in a browser: sliders, and how it fills while it is made. Skipped where there is no Chromium."""

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from ddpm.tools.figures import save_cells
from shared.experiments import EXPERIMENTS, Made
from shared.page import LivePage, write_page

BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


def shown(url: str, seconds: int) -> str:
    """A page's DOM after so many seconds of its own time."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--virtual-time-budget={1000 * seconds}", "--dump-dom"]
    return subprocess.run([BROWSER, *options, url], capture_output=True, text=True, timeout=120, check=True).stdout


def made(*keys: str) -> dict[str, Made]:
    command = "python scripts/some.py --seed 1"
    return {one.key: Made(one, command, 2.0) for one in EXPERIMENTS if set(one.keys) & set(keys)}


@pytest.fixture
def page(tmp_path):
    """A page of A1, A10 and A11 with tables of plain images."""
    grey = torch.full((3, 8, 8), 0.5)

    def cells(path, rows, columns):
        save_cells(tmp_path / path, [[grey] * len(columns)] * len(rows), row_labels=rows, column_labels=columns, seed=1)

    cells("A1/forward.png", [""], [f"t = {t}" for t in range(0, 1000, 90)])  # one more than ten: 10 is after 9
    cells("A10/anagrams.png", [f"{name}:\n<{name}>" for name in ("identity", "vertical_flip") * 2], ["seed 1"])
    cells("A11/hybrids.png", ["near view:\na giraffe", "far view, low pass:\na deer", "high pass:\n…"] * 3, ["seed 1"])
    write_page(tmp_path, made("A1", "A10", "A11"))
    return tmp_path / "index.html"


def moved(page, value: float) -> str:
    """The page's DOM when every slider is moved to a value."""
    move = f'i.value = {value}; i.dispatchEvent(new Event("input", {{ bubbles: true }}))'
    script = f'<script>for (const i of document.querySelectorAll("input")) {{ {move} }}</script>'
    page.with_name("moved.html").write_text(page.read_text().replace("</body>", f"{script}</body>"))
    return shown(page.with_name("moved.html").as_uri(), 2)


@needs_browser
def test_sliders_turn_go_away_and_scrub(page):
    dom = moved(page, 1)
    assert dom.count("rotateX(180deg)") == 2 and dom.count("scale(0.125)") == 3 and dom.count("blur(3.5px)") == 3
    assert 'src="A1/forward_0_1.png"' in dom and "<output>t = 90</output>" in dom
    assert dom.count('type="range"') == 6 and "hidden" not in dom[dom.index("<section") : dom.index("<script")]
    dom = moved(page, 11)
    assert 'src="A1/forward_0_11.png"' in dom and "<output>t = 990</output>" in dom
    dom = moved(page, 0)
    assert dom.count("rotateX(0deg)") == 2 and dom.count("scale(1)") == 3 and "<output>t = 0</output>" in dom


def test_without_a_script_no_slider_is_seen_and_no_text_is_lost(page):
    text = page.read_text()
    assert text.count('type="range"') == text.count(" hidden>") == 6
    assert "&lt;identity&gt;; turned over, &lt;vertical_flip&gt;" in text and "a giraffe; from afar, a deer" in text


@pytest.fixture
def serve():
    """serve({path: [text, …]}) -> the address, and a list of what is asked for; the last text of a path repeats."""
    servers = []

    def start(texts: dict[str, list[str]]):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.partition("?")[0]
                asked.append(path)
                there = texts.get(path, [])
                self.send_response(200 if there else 404)
                self.end_headers()
                self.wfile.write((there.pop(0) if len(there) > 1 else "".join(there)).encode())

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/index.html", asked

    yield start
    for server in servers:
        server.shutdown()


def in_the_making(folder) -> list[str]:
    """The page while A2 is made, and when it is done."""
    texts = []
    for there, making, version in ((made("A1"), EXPERIMENTS[2:3], "1"), (made("A1", "A2"), (), "2")):
        write_page(folder, there, making, version)
        texts.append((folder / "index.html").read_text())
    return texts


@needs_browser
def test_the_page_fills_and_then_rests(serve, tmp_path):
    first, last = in_the_making(tmp_path)
    assert "Being made now: A2 Classical denoising." in first and "fills by itself" not in last
    url, asked = serve({"/index.html": [first, last], "/alive.js": ['alive("1", 0)', 'alive("1", 1)', 'alive("2", 2)']})
    dom = shown(url, 60)
    assert 'id="A2"' in dom and "Being made now" not in dom
    assert asked.count("/index.html") == 2 and asked.count("/alive.js") == 3


@needs_browser
@pytest.mark.parametrize("alive", [['alive("1", 0)'], []])
def test_the_page_rests_when_its_process_has_died(serve, tmp_path, alive):
    url, asked = serve({"/index.html": in_the_making(tmp_path)[:1], "/alive.js": alive})
    dom = shown(url, 120)
    assert "The process that made this page has ended" in dom
    assert asked.count("/index.html") == 1 and 5 < asked.count("/alive.js") < 15


def test_the_heart_beats_and_its_last_beat_is_of_the_last_version(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.page.BEAT", 0.02)
    beats, alive = set(), tmp_path / "alive.js"
    with LivePage(tmp_path) as page:
        page.show({}, EXPERIMENTS)
        while len(beats) < 3:
            if alive.is_file():
                beats.add(alive.read_text())
        page.show({})
    assert f'alive("{page.version}", ' in alive.read_text()
    assert 'const VERSION = ""' in (tmp_path / "index.html").read_text()
