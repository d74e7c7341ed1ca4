"""A headless Chromium for tests of pages, spoken to over a pipe in the DevTools protocol; nothing else is needed.

python tests/chromium.py PAGE.html WIDTH HEIGHT light|dark OUT.png takes a screenshot.
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run
--disable-background-networking --disable-component-update --disable-sync --disable-extensions --disable-quic
--disable-default-apps --no-default-browser-check --mute-audio --remote-debugging-pipe""".split()
SECONDS = 60  # for an answer, on a busy machine


def find() -> str | None:
    """The browser's command, if there is one that runs."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            said = subprocess.run([path, "--version"], capture_output=True, check=False, timeout=SECONDS)
            if said.returncode == 0:
                return path
    return None


def find_or_skip() -> str:
    """The browser's command; a test that needs it is skipped where there is none."""
    if found := find():
        return found
    pytest.skip("no Chromium here (Debian: apt-get install chromium), so pages are not tested in a browser")


class Chromium:
    """One browser with one page. `with Chromium(command) as browser: browser.open(file, 400, "dark")`"""

    def __init__(self, command: str):
        self.profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()
        # it reads commands from descriptor 3 and writes answers to 4
        line = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, "bash", command, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self.answers = os.fdopen(self.read, "rb")
        self.rest, self.numbers = b"", itertools.count(1)
        self.events: list[dict] = []
        self.session = None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session = None
        self.ask("Browser.close")
        self.process.wait(SECONDS)
        os.close(self.write)
        self.answers.close()
        self.profile.cleanup()

    def ask(self, method: str, **parameters) -> dict:
        """Send one command and wait for its answer; events that come before it are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self.rest:
            piece = self.answers.read1(1 << 20)
            assert piece, "the browser ended"
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, page: Path, width: int, scheme: str, height: int = 800) -> None:
        """Load a file in a window of a width in CSS pixels, light or dark, and forget earlier events."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=media)
        self.events = []
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script: str):
        """The value of a JavaScript expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """What the page wrote to the console, errors that nobody caught, and addresses that it asked for."""
        found = []
        for event in self.events:
            method, about = event.get("method"), event.get("params", {})
            if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                found.append(json.dumps(about))
            elif method == "Network.requestWillBeSent" and not about["request"]["url"].startswith(("file:", "data:")):
                found.append(f"asked for {about['request']['url']}")
        return found

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))


if __name__ == "__main__":
    page, width, height, scheme, out = sys.argv[1:]
    with Chromium(find()) as browser:
        browser.open(Path(page), int(width), scheme, int(height))
        browser.screenshot(Path(out))
        print(browser.run("[innerWidth, document.documentElement.scrollWidth, getComputedStyle(document.body).color]"))
        print(browser.complaints())
