"""A chromium without a window and without a network, driven over two pipes by the
DevTools protocol.
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *(
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-pipe",
        "--hide-scrollbars",
    ),
    "--disable-dev-shm-usage",
    *(
        "--no-first-run",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ),
)


def executable() -> str | None:
    """Where a browser of this kind is, if anywhere."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in one browser; `events` holds what it reported meanwhile."""

    def __init__(self):
        self.profile = tempfile.mkdtemp()
        (reads, self.commands) = os.pipe()
        (self.answers, writes) = os.pipe()
        # The protocol wants the file descriptors 3 and 4.
        line = f'exec "$@" 3<&{reads} 4>&{writes}'
        command = [
            "bash",
            "-c",
            line,
            "-",
            executable(),
            *OPTIONS,
            f"--user-data-dir={self.profile}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            command, pass_fds=(reads, writes), stderr=subprocess.DEVNULL
        )
        os.close(reads)
        os.close(writes)
        self.last = 0
        self.session = None
        self.rest = b""
        self.events = []
        target = next(
            t
            for t in self.call("Target.getTargets")["targetInfos"]
            if t["type"] == "page"
        )
        attached = self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.close(self.commands)
        self.process.terminate()
        self.process.wait(10)
        os.close(self.answers)
        shutil.rmtree(self.profile, ignore_errors=True)

    def receive(self) -> dict:
        """The next message; they end with a zero byte."""
        while b"\0" not in self.rest:
            more = os.read(self.answers, 1 << 20)
            if not more:
                raise RuntimeError("the browser has left")
            self.rest += more
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **parameters) -> dict:
        """Ask for something and wait for the answer; what arrives before it is kept."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        answer = self.receive()
        while answer.get("id") != self.last:
            self.events.append(answer)
            answer = self.receive()
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, page: Path) -> None:
        """Load a file from disk and wait until it is there, fonts too."""
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(
            event.get("method") == "Page.loadEventFired" for event in self.events
        ):
            self.events.append(self.receive())
        self.run("document.fonts.ready.then(() => 0)")

    def look(self, width: int, dark: bool, height: int = 900) -> None:
        """Take a screen of this width, by day or by night."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str):
        """The value of a JavaScript expression, awaited."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"])
        return done["result"].get("value")

    def reported(self, *methods: str) -> list[dict]:
        """Parameters of the events of these kinds since the page was opened."""
        return [
            event["params"] for event in self.events if event.get("method") in methods
        ]
