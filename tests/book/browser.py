"""A real browser, for what a page's script does."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), "")


def found_in_the_browser(tmp_path: Path, shown: str, script: str) -> Any:
    """What a script leaves in `document.body.dataset.found` of a page with a figure."""
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><body>{shown}{script}</body>', encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    run = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    written = re.search(r'data-found="([^"]*)"', run.stdout)
    assert written, run.stdout[-2000:]
    return json.loads(html.unescape(written[1]))
