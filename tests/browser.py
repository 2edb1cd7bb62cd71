"""Chromium without a window, by its DevTools protocol over two pipes: what a page looks like."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

import pytest

LATEST_S = 120  # by then it has answered also on a busy machine
OPTIONS = (
    "--headless",
    "--no-sandbox",  # else it doesn't start as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def find_chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    return found


class Browser:
    """One Chromium with one page; it asks through pipe 3 and answers through pipe 4, each message
    JSON and a NUL: see chrome/browser/devtools and https://chromedevtools.github.io."""

    def __init__(self, folder):
        reads, self.asks = os.pipe()
        self.answers, writes = os.pipe()

        def take_pipes():
            # Both are moved out of the way first, as one may be the other's number.
            high = [os.dup(reads), os.dup(writes)]
            high = [os.dup2(fd, 10 + number) for number, fd in enumerate(high)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        profile = "--user-data-dir=%s" % (folder / "profile")
        self.process = subprocess.Popen(
            [find_chromium(), *OPTIONS, profile, "about:blank"],
            env=dict(os.environ, HOME=str(folder)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=take_pipes,
            pass_fds=(3, 4),
        )
        os.close(reads)
        os.close(writes)
        self.number, self.session, self.unread, self.events = 0, None, b"", []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(domain + ".enable")

    def ask(self, method, **parameters):
        """The result of a command; what happened meanwhile goes to `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.asks, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def read(self):
        """The next message of the browser."""
        end = time.monotonic() + LATEST_S
        while b"\0" not in self.unread:
            ready = select.select([self.answers], [], [], max(end - time.monotonic(), 0))[0]
            assert ready, "Chromium did not answer within %d s" % LATEST_S
            part = os.read(self.answers, 1 << 20)
            assert part, "Chromium has ended"
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message.decode())

    def open(self, url, width=1200, height=800, is_dark=False):
        """Shows a page in a window of that size, until it has been loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.events = []
        self.ask("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def wait_for(self, event):
        while not any(one.get("method") == event for one in self.events):
            self.events.append(self.read())

    def complaints(self):
        """What the browser itself found wrong with the page: of its policy, for example."""
        entries = [one for one in self.events if one.get("method") == "Log.entryAdded"]
        return [one["params"]["entry"]["text"] for one in entries]

    def asked_for(self):
        """The URLs that the page had the browser ask for, its own included."""
        sent = [one for one in self.events if one.get("method") == "Network.requestWillBeSent"]
        return [one["params"]["request"]["url"] for one in sent]

    def value(self, script):
        """What a script says in the page; the page's own policy doesn't hold for it."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self):
        """The whole page as PNG."""
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.asks)
        os.close(self.answers)
