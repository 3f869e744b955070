"""Chromium without a window, driven by its DevTools protocol through a pipe, which needs no library."""

import base64
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from conftest import HUNG

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which root has none of
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)


class Browser:
    """
    One page of a browser with a profile of its own; a context manager that ends it.

    Args:
        size: width and height of the page in pixels.
        downloads: folder to which downloads go.
    """

    def __init__(self, size: tuple[int, int], downloads: Path):
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        (read, self._write), (self._read, write) = os.pipe(), os.pipe()
        # the browser has its ends at 3 and 4, where these must not be already
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read, write)]
        arguments = [PROGRAM, *OPTIONS, f"--user-data-dir={self._profile}", f"--window-size={size[0]},{size[1]}"]
        log = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, end, place) for place, end in enumerate(high, 3)]
        self._pid = os.posix_spawn(PROGRAM, arguments, dict(os.environ), file_actions=actions, setsid=True)
        for end in (read, write, log, *high):
            os.close(end)
        self._number, self._rest, self._session = 0, b"", None
        self.requested: list[str] = []  # URLs
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters) -> dict:
        """A command of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._receive()
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._number:
                break
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._rest:
            part = os.read(self._read, 2**16)
            if not part:
                raise RuntimeError("the browser has ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def evaluate(self, script: str):
        """The value of an expression in JavaScript."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, script: str):
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + HUNG
        while not (value := self.evaluate(script)):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{script} never came true; the page says {self.evaluate('document.body.innerText')}"
                )
            time.sleep(0.1)
        return value

    def go(self, url: str):
        self.call("Page.navigate", url=url)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width, height of an element, scrolled into view."""
        script = f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "nearest"}});
            const frame = element.getBoundingClientRect();
            return [frame.left, frame.top, frame.width, frame.height];
        }})()"""
        return tuple(self.evaluate(script))

    def mouse(self, kind: str, x: float, y: float):
        pressed = {"mousePressed": 1, "mouseReleased": 1}.get(kind, 0)
        held = 1 if kind != "mouseReleased" else 0
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=held, clickCount=pressed)

    def click(self, selector: str):
        left, top, width, height = self.box(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, left + width / 2, top + height / 2)

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]):
        """From one place in an element to another, each as parts of its width and height."""
        left, top, width, height = self.box(selector)
        (x, y), (x_end, y_end) = ((left + across * width, top + down * height) for across, down in (start, end))
        self.mouse("mousePressed", x, y)
        self.mouse("mouseMoved", (x + x_end) / 2, (y + y_end) / 2)
        self.mouse("mouseMoved", x_end, y_end)
        self.mouse("mouseReleased", x_end, y_end)

    def type(self, selector: str, text: str):
        """Replaces what is in a field."""
        self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.focus(); e.select(); }})()"
        )
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def choose_file(self, selector: str, path: Path):
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self) -> bytes:
        """PNG of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        return base64.b64decode(data)
