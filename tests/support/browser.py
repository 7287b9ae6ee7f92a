"""Headless Chromium, driven by the DevTools protocol over pipes: it needs no package and no open port."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run")
_SECONDS = 60

# `condition` is checked whenever the page has drawn a frame.
_WAIT = """new Promise((resolve, reject) => {
  const began = performance.now();
  const check = () => {
    if (%s) resolve();
    else if (performance.now() - began > %d) reject(new Error("not true in time"));
    else requestAnimationFrame(check);
  };
  check();
})"""


class Browser:
    """A running browser. Use `browser()` to start one. Only one thread may use it."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._numbers = itertools.count(1)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Return the result of a command of the protocol."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": parameters}
        os.write(self._to, json.dumps(command | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        return message

    def open(self, url: str) -> Page:
        """Return a new tab, with its own cookies and storage."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Page.setLifecycleEventsEnabled", enabled=True)
        page.go(url)
        return page

    def wait_for_load(self, loader: str) -> None:
        """Wait until a document has been loaded, by the id that `Page.navigate` returned."""
        loaded = {"loaderId": loader, "name": "load"}
        while not any(loaded.items() <= event.get("params", {}).items() for event in self.events):
            self.events.append(self._read())


class Page:
    """A tab."""

    def __init__(self, owner: Browser, session: str) -> None:
        self._browser, self._session = owner, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of a command for this tab."""
        return self._browser.call(method, self._session, **parameters)

    def go(self, url: str) -> None:
        """Open a URL in the tab."""
        # Not by a condition on the page: before a reload, the old document would fulfil it, too.
        self._browser.wait_for_load(self.call("Page.navigate", url=url)["loaderId"])

    def run(self, script: str) -> Any:
        """Return the value of an expression; that of a promise once it is settled."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        try:
            self.run(_WAIT % (condition, 1000 * _SECONDS))
        except AssertionError as error:
            raise AssertionError(f"{condition}\n{self.run('document.body.innerText')}") from error

    def type(self, text: str, *, enter: bool = True) -> None:
        """Type text where the focus is, then Enter."""
        self.call("Input.insertText", text=text)
        if enter:
            self.key("Enter")

    def key(self, name: str, **parameters: Any) -> None:
        """Press a key."""
        code = {"Enter": 13}[name]
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": "\r"} if kind == "char" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                windowsVirtualKeyCode=code,
                **text,
                **parameters,
            )

    def click(self, selector: str) -> None:
        """Click the element that a CSS selector finds."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def text(self, selector: str) -> str:
        """Return the visible text of the element that a CSS selector finds."""
        found: str = self.run(f"document.querySelector({json.dumps(selector)}).innerText")
        return found

    def complaints(self) -> list[str]:
        """Return errors of scripts and of the Content-Security-Policy in this tab."""
        self.run("0")  # what happened before this has arrived
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        thrown = [
            event["params"]["exceptionDetails"]["exception"]["description"]
            for event in mine
            if event["method"] == "Runtime.exceptionThrown"
        ]
        logged = [event["params"]["entry"] for event in mine if event["method"] == "Log.entryAdded"]
        return thrown + [entry["text"] for entry in logged if entry["source"] != "network"]

    def picture(self, path: Path, width: int, height: int, scheme: str) -> None:
        """Write a picture of the tab as PNG. `scheme` is light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start the browser, with its files in `profile`, and end it with the block."""
    assert CHROMIUM is not None
    from_us, to_browser = os.pipe()
    from_browser, from_them = os.pipe()
    # Chromium reads commands from file descriptor 3 and writes to 4.
    process = subprocess.Popen(
        [
            "bash",
            "-c",
            f'exec "$@" 3<&{from_us} 4>&{from_them}',
            "-",
            CHROMIUM,
            *_FLAGS,
            f"--user-data-dir={profile}",
        ],
        pass_fds=(from_us, from_them),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(from_us)
    os.close(from_them)
    running = Browser(to_browser, from_browser)
    try:
        yield running
    finally:
        with suppress(AssertionError, OSError):
            running.call("Browser.close")
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_browser)
        os.close(from_browser)
