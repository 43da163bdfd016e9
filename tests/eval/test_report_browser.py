"""The report in a real browser: its script runs, the gallery filters, nothing is fetched and nothing injected runs."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("matplotlib", reason="the report needs the extra [quickstart]")

from eval.registry import Benchmark
from eval.report import main
from eval.run import evaluate
from tests.eval.fake_generator import FakeGenerator

BROWSERS = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, BROWSERS), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here; on Debian: apt-get install chromium"),
    pytest.mark.timeout(600),
]

DRIVER = """<script>
const found = {};
function look(name) {
  const visible = [...document.querySelectorAll("article")].filter(card => card.offsetParent !== null);
  found[name] = {texts: visible.map(card => card.innerText), said: document.getElementById("shown").textContent,
                 widths: visible.flatMap(card => [...card.querySelectorAll("img")].map(image => image.naturalWidth))};
}
function choose(id, value, event) {
  const element = document.getElementById(id);
  element.value = value;
  element.dispatchEvent(new Event(event));
}
window.onload = () => {
  look("all");
  choose("outcome", "wrong", "change"); look("wrong");
  choose("outcome", "partly right", "change"); look("partly");
  choose("outcome", "right", "change"); look("right");
  choose("kind", "yes/no", "change"); look("right yes/no");
  choose("outcome", "all", "change"); choose("kind", "all", "change");
  choose("words", " COLOR ", "input"); look("color");
  choose("words", "", "input"); look("again");
  const picture = document.querySelector("article img");
  const widths = [0, 1, 2].map(() => { const width = picture.clientWidth; picture.click(); return width; });
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  const report = {found, clicked: widths,  injected: window.injected === true,
                  fetched: fetched.filter(name => !name.startsWith("data:"))};
  const element = document.createElement("pre");
  element.id = "report-of-test";
  element.textContent = btoa(encodeURIComponent(JSON.stringify(report)));
  document.body.append(element);
};
</script></body>"""


def in_browser(page: Path, tmp_path: Path) -> dict:
    """Load a page in headless Chromium and return what the driver at its end saw."""
    driven = page.with_name("driven.html")
    driven.write_text(page.read_text(encoding="utf-8").replace("</body>", DRIVER), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", driven.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    match = re.search(r'<pre id="report-of-test">([^<]+)</pre>', shown.stdout)
    assert match, f"the page's script did not run to its end: {shown.stderr[-2000:]}"
    return json.loads(unquote(base64.b64decode(match.group(1)).decode()))


@pytest.fixture
def page(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> Path:
    evaluate(benchmark, FakeGenerator(), tmp_path / "eval", data_root)
    path = tmp_path / "eval" / "easy_vqa" / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    samples[1] |= {"text": "<img src=x onerror='window.injected = true'>", "score": 0.0}
    samples[2] |= {"text": "half right", "score": 0.5}
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    output = tmp_path / "report.html"
    main(["--evaluation", str(path.parent), "--output", str(output)])
    return output


def test_gallery_filters_in_chromium(page: Path, tmp_path: Path) -> None:
    report = in_browser(page, tmp_path)
    path = tmp_path / "eval" / "easy_vqa" / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    right = [sample for sample in samples if sample["score"] == 1]
    counts = {
        "all": len(samples),
        "wrong": sum(sample["score"] == 0 for sample in samples),
        "partly": 1,
        "right": len(right),
        "right yes/no": sum(sample["categories"]["answer_type"] == "yes/no" for sample in right),
        "color": sum("color" in sample["question"] for sample in samples),
        "again": len(samples),
    }
    found = report["found"]
    assert {name: len(view["texts"]) for name, view in found.items()} == counts
    assert len(set(counts.values())) >= 5, "views of one size prove little"
    assert all(view["said"] == f"{len(view['texts'])} shown" for view in found.values())
    (partly,) = found["partly"]["texts"]
    for part in (samples[2]["question"], "half right", f"truth: {samples[2]['target']}", "score: 0.5"):
        assert part in partly
    assert found["all"]["widths"] == [64] * len(samples), "every picture is decoded"
    before, enlarged, after = report["clicked"]
    assert before == after < enlarged
    assert report["fetched"] == []
    assert report["injected"] is False
