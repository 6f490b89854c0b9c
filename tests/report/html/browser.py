"""Drives a headless Chromium over its debugging pipe, with nothing but the standard library."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

CHROMIUM: Final = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
_OPTIONS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-pipe",
)


class Tab:
    """One open page.

    Args:
        write: the end of the pipe that Chromium reads.
        read: the end that it writes.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._number = 0
        self._left = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            chunk = os.read(self._read, 1 << 16)
            assert chunk, "the browser ended"
            self._left += chunk
        first, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(first))

    def open(self, page: str, file: Path) -> None:
        """Load a page from a file, and wait until it stands."""
        file.write_text(page, encoding="utf-8")
        self.call("Page.navigate", url=file.as_uri())
        while self.run("document.readyState") != "complete":
            pass

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        """One key, down and up."""
        code = {"Enter": 13, "ArrowDown": 40, "Escape": 27}.get(key, 0)
        down = {"key": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self.call("Input.dispatchKeyEvent", type="keyDown", **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def complaints(self) -> list[str]:
        """Errors, blocked code, dialogs, and requests for anything but the file."""
        bad = []
        for event in self.events:
            name, told = event.get("method", ""), event.get("params", {})
            if name in ("Runtime.exceptionThrown", "Log.entryAdded"):
                bad.append(json.dumps(told)[:300])
            if name == "Page.javascriptDialogOpening":
                bad.append("a dialog opened")
            if name == "Network.requestWillBeSent":
                url = told["request"]["url"]
                if not url.startswith("file://"):
                    bad.append(url)
        return bad


@contextlib.contextmanager
def chromium() -> Iterator[Tab]:
    """A fresh browser with one tab."""
    assert CHROMIUM is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The browser expects its pipes at the numbers 3 and 4.
        line = f'exec "$@" 3<&{to_read} 4>&{from_write}'
        command = ["bash", "-c", line, "sh", CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            command,
            pass_fds=(to_read, from_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        try:
            yield Tab(to_write, from_read)
        finally:
            process.terminate()
            process.wait(timeout=30)
            os.close(to_write)
            os.close(from_read)
