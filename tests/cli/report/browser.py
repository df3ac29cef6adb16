"""A headless Chromium spoken to over a pipe: what a page shows, logs and asks the network for."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM", "Browser", "open_browser"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One tab.

    Attributes:
        errors: What the console was told, and exceptions.
        requests: Addresses asked for, other than those of the page itself.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out = os.fdopen(to_browser, "wb", buffering=0)
        self._in = os.fdopen(from_browser, "rb", buffering=0)
        self._unread = b""
        self._last_id = 0
        self._session: str | None = None
        self._page = ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        answer = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = answer["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the answer to a command of the DevTools protocol."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self._last_id:
            self._note(found)
        assert "error" not in found, found
        return found["result"]

    def show(self, page: Path, *, width: int, scheme: str = "light") -> None:
        """Loads a page at a width and in a colour scheme."""
        self._page = page.resolve().as_uri()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        self.scheme(scheme)
        self.call("Page.navigate", url=self._page)
        while (found := self._next()).get("method") != "Page.loadEventFired":
            self._note(found)

    def scheme(self, name: str) -> None:
        """Says that the user prefers light or dark."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def run(self, script: str) -> Any:
        """Returns the value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, height: int | None = None) -> None:
        """Writes a picture of the page, or of its top."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"]}
        answer = self.call(
            "Page.captureScreenshot", captureBeyondViewport=True, clip={**clip, "scale": 1}
        )
        path.write_bytes(base64.b64decode(answer["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            block = self._in.read(65536)
            assert block, "the browser ended"
            self._unread += block
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(json.dumps(params))
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if url != self._page and not url.startswith("data:"):
                self.requests.append(url)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Starts a browser with an empty profile, and ends it."""
    assert CHROMIUM is not None
    # The browser reads commands from descriptor 3 and writes to 4; dash moves single digits alone.
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    # The browser may still be writing to it as it ends.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", CHROMIUM),
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
                *(
                    "--no-first-run",
                    "--hide-scrollbars",
                    "--disable-dev-shm-usage",
                    f"--user-data-dir={profile}",
                ),
            ],
            pass_fds=(commands, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        try:
            yield Browser(to_browser, from_browser)
        finally:
            process.terminate()
            process.wait(timeout=20)
