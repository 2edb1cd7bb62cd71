"""server-update in a process, its outputs on a terminal or in pipes, read as they come."""

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
import time

from processes import LATEST_S, wait_until
from product import SERVER_UPDATE


class Run:
    """One run; .text is what has come so far, .wait() all of it."""

    def __init__(self, tmp_path, entries, *options, columns=None, both=True, env=None):
        slavelist = tmp_path / "slavelist.txt"
        if entries is not None:  # else it is there already
            slavelist.write_text("".join(entry + "\n" for entry in entries))
        command = [*SERVER_UPDATE, "--list", str(slavelist)]
        environ = dict(os.environ, **dict({"TERM": "xterm", "LC_ALL": "C.UTF-8"}, **(env or {})))
        mine, theirs = pty.openpty() if columns else os.pipe()
        if columns:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.chunks, self.begun = [], time.monotonic()
        self.process = subprocess.Popen(
            [*command, *options, "hanuman"],
            stdin=subprocess.DEVNULL,
            stdout=theirs if both else subprocess.PIPE,
            stderr=theirs if columns else subprocess.PIPE,
            env=environ,
        )
        os.close(theirs)
        self.thread = threading.Thread(target=self._read, args=(mine,), daemon=True)
        self.thread.start()

    def _read(self, number):
        while True:
            try:
                data = os.read(number, 65536)
            except OSError:  # the other end of a terminal is closed
                data = b""
            if not data:
                os.close(number)
                return
            self.chunks.append((time.monotonic() - self.begun, data))

    @property
    def text(self):
        """All that has come so far."""
        return codecs.decode(b"".join(data for _, data in self.chunks), "utf-8", "replace")

    def wait(self, timeout=300):
        """The whole text, once it has ended."""
        self.code = self.process.wait(timeout)
        self.thread.join(10)
        self.errors = self.process.stderr.read().decode() if self.process.stderr else ""
        assert "Traceback" not in self.text + self.errors
        return self.text

    def wait_for(self, pattern, timeout=LATEST_S):
        """Wait until the text has `pattern`."""
        wait_until(lambda: re.search(pattern, self.text), timeout, what=pattern)
