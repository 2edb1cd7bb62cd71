"""server-update, run to its end: in a process of its own, or by its main() in this one."""

import io
import json
import os
import signal
import subprocess
from collections import namedtuple

from product import ISOLATED, SOURCES, copy_scripts, set_constants

TIMEOUT_S = 300


class Update:
    """One run on a list of entries, alone in `folder`; .finish() waits for its end.

    constants: {NAME: value} of server-update that are others in this copy.
    Then .returncode, .stdout and .stderr tell how it was, and with --json: .lines (all of them),
    .results ({slave: its line}), .outcomes ({slave: outcome}) and .summary.
    """

    def __init__(
        self, folder, entries, *options, repo="hanuman", env=None, constants=None, **kwargs
    ):
        self.entries = [getattr(entry, "url", entry) for entry in entries]
        self.is_json = "--json" in options
        script = copy_scripts(SOURCES, folder / "alone" / "bin", "server-update")
        set_constants(script / "server-update", constants or {})
        # Lists and keys of this machine are none of its.
        (folder / "alone" / "etc" / "server-update").mkdir(parents=True, exist_ok=True)
        slavelist = folder / "slavelist.txt"
        slavelist.write_text("".join(entry + "\n" for entry in self.entries))
        command = [*ISOLATED, str(script / "server-update"), "--list", str(slavelist)]
        self.process = subprocess.Popen(
            [*command, *options, *([repo] if repo else [])],
            env=dict(os.environ, **(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            encoding="utf-8",
            **kwargs,
        )

    def finish(self):
        """Wait for its end; itself."""
        try:
            self.stdout, self.stderr = self.process.communicate(timeout=TIMEOUT_S)
        finally:
            self.process.kill()
        self.returncode = self.process.returncode
        assert "Traceback" not in self.stderr
        if self.is_json and self.stdout:
            self._read_json()
        return self

    def _read_json(self):
        self.lines = [json.loads(line) for line in self.stdout.splitlines()]
        start, *results, self.summary = self.lines
        assert (start["type"], self.summary["type"]) == ("start", "summary")
        assert {line["type"] for line in results} <= {"result"}
        assert self.summary["exit"] == self.returncode
        self.results = {line["slave"]: line for line in results}
        self.outcomes = {slave: line["outcome"] for slave, line in self.results.items()}


def run_in_process(server_update, monkeypatch, entries, *options):
    """main() in this process, with the list on standard input; its exit status."""
    source = namedtuple("Input", "buffer")(io.BytesIO("\n".join(entries).encode()))
    monkeypatch.setattr("sys.stdin", source)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    cpus = os.sched_getaffinity(0)
    try:
        return server_update.main(["--list", "-", *options, "hanuman"])
    finally:
        os.sched_setaffinity(0, cpus)
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(one, handler)
