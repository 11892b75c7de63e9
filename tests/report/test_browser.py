"""The report in a browser, on a phone's width: nothing to scroll sideways, every picture drawn, nothing loaded."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from short_runs import trained

from hf_chts.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# looks into the report from outside, for scripts within it are forbidden
PROBE = """<!DOCTYPE html><title>probe</title><body style="margin:0"><pre id="found"></pre>
<iframe id="report" src="report.html" style="border:0;width:WIDTHpx;height:844px"></iframe>
<script>
document.getElementById('report').onload = async event => {
  const view = event.target.contentWindow, page = view.document;
  await Promise.all([...page.images].map(image => image.decode()));
  const small = [...page.querySelectorAll('body *')].filter(element =>
    [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
    && parseFloat(view.getComputedStyle(element).fontSize) < 14);
  document.getElementById('found').textContent = JSON.stringify({
    width: view.innerWidth, content: page.documentElement.scrollWidth,
    images: [...page.images].map(image => [image.naturalWidth, image.getBoundingClientRect().right]),
    loaded: view.performance.getEntriesByType('resource').map(entry => entry.name.slice(0, 5)),
    small: small.map(element => element.outerHTML.slice(0, 80)),
  });
};
</script>"""


def looked(command):
    """What the probe found; on a busy machine chromium may leave before the pictures are drawn."""
    for _ in range(4):
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        found = re.search(r'<pre id="found">(.*?)</pre>', dom)[1]
        if found:
            break
    return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_report_on_a_phone_and_on_a_desk(tmp_path):
    name = "a_run_with_a_name_so_long_that_it_would_not_fit_into_any_column_of_a_table_on_a_phone"
    runs = [trained(tmp_path / name, "set"), trained(tmp_path / "dense", "dense")]
    write_report(runs, tmp_path / "report.html")
    for width in (390, 1280):
        (tmp_path / "probe.html").write_text(PROBE.replace("WIDTH", str(width)))
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                   f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=30000",
                   "--dump-dom", (tmp_path / "probe.html").as_uri()]  # fmt: skip
        found = json.loads(unescape(looked(command)))
        assert found["width"] == width
        assert found["content"] <= width
        assert len(found["images"]) > 10
        assert all(natural > 300 and right <= width for natural, right in found["images"])
        assert set(found["loaded"]) <= {"data:"}
        assert found["small"] == []
