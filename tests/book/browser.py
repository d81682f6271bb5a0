"""A real browser, for what a page's script does."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
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


class Window:
    """A page in a browser that is told what to do as its developer tools would: input comes as from a real hand."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._numbers = commands, answers, count(1)
        self._unread, self._session = b"", {}
        self.requests: list[str] = []  # addresses, of everything that the page has loaded
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The browser's answer to a command of its protocol."""
        number = next(self._numbers)
        message = json.dumps({"id": number, "method": method, "params": parameters} | self._session)
        os.write(self._commands, message.encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            read = os.read(self._answers, 1 << 20)
            assert read, "the browser has ended"
            self._unread += read
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int, *, height: int = 900, touch: bool = False) -> None:
        """Show a file in a window of that width; wait until it is there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch, maxTouchPoints=5)
        self.requests.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for(f"location.href === {json.dumps(path.as_uri())} && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression, or what its promise comes to."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true, at most half a minute."""
        wait = f"new Promise((go) => {{ let n = 0; const look = () => (({condition}) || n++ > 300 ? go({condition}) : "
        assert self.run(wait + "setTimeout(look, 100)); look(); })"), condition

    def draw(self, points: list[tuple[float, float]], *, touch: bool = False) -> None:
        """A stroke through points of the window, by mouse or finger."""
        for i, (x, y) in enumerate([*points, points[-1]]):
            end = i == len(points)
            if touch:
                kind = "touchEnd" if end else "touchMove" if i else "touchStart"
                self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[] if end else [{"x": x, "y": y}])
            else:
                kind = "mouseReleased" if end else "mouseMoved" if i else "mousePressed"
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@contextmanager
def window(tmp_path: Path) -> Iterator[Window]:
    """A browser with one window; no port is opened, commands go through a pipe."""
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    shell = f'exec "$@" 3<&{read_commands} 4>&{write_answers}'
    command = ["bash", "-c", shell, "bash", BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}"]
    process = subprocess.Popen(
        command, pass_fds=(read_commands, write_answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Window(commands, answers)
    finally:
        os.close(commands)  # the browser ends with its pipe
        os.close(answers)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
