"""The report in headless Chromium, where there is one: it renders, fits a phone, and asks the network for nothing."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest
import tiny_run

from radlads.report.page import write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
LIGHT, DARK = 1, 0
# What the page is asked once it stands; an image that never loads would hold up nothing else
PROBE = """<script>
addEventListener("load", () => {
  const root = document.documentElement, boxes = [...document.querySelectorAll("svg, p, dl, pre, h1, .wide")];
  top.document.documentElement.dataset.probe = JSON.stringify({
    width: innerWidth,
    widest: Math.max(root.scrollWidth, ...boxes.map((box) => box.getBoundingClientRect().right)),
    asked: performance.getEntriesByType("resource").map((each) => each.name),
    paper: getComputedStyle(document.body).backgroundColor,
    flat: [...document.querySelectorAll("svg")].filter((chart) => chart.getBoundingClientRect().height < 100).length,
    charts: document.querySelectorAll("svg").length,
  });
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page(tiny_run.run_folder(tmp_path_factory.mktemp("run"))).read_text()


def seen(page, folder, *, width=1200, scheme=LIGHT):
    """What the browser says of the page, and its console's lines."""
    # A window is never narrower than 500 pixels, a frame may be
    frame = f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{escape(page + PROBE)}"></iframe>'
    (folder / "page.html").write_text(f'<!doctype html><meta charset="utf-8">{frame}')
    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars"]
    command = [CHROMIUM, "--headless", *quiet, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom"]
    done = subprocess.run([*command, str(folder / "page.html")], capture_output=True, text=True, timeout=120)
    probe = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert probe is not None, done.stderr
    return json.loads(unescape(probe.group(1))), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [390, 1200])
def test_it_renders_and_fits(page, tmp_path, width):
    probe, console = seen(page, tmp_path, width=width)
    assert console == []
    assert probe["asked"] == []
    assert probe["width"] == width
    assert probe["widest"] <= width
    assert probe["charts"] == 15
    assert probe["flat"] == 0


def test_it_follows_the_readers_light(page, tmp_path):
    papers = [seen(page, tmp_path, scheme=scheme)[0]["paper"] for scheme in (LIGHT, DARK)]
    assert papers == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"]


def test_a_request_and_an_error_would_be_seen(tmp_path):
    body = '<img src="https://example.invalid/x.png"><p style="width: 2000px">wide</p><script>undefined_name()</script>'
    probe, console = seen(f"<html><body>{body}</body></html>", tmp_path)
    assert probe["asked"] == ["https://example.invalid/x.png"]
    assert "undefined_name" in console[0]
    assert probe["widest"] > 2000
