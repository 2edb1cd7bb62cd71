"""The real slave.py in a process of its own, stand-ins for slave-activate, and signed requests."""

import hashlib
import hmac
import http.client
import json
import os
import random
import re
import socket
import subprocess
import time
from pathlib import Path
from signal import SIGTERM

from processes import descendants, kill, kill_all_below, wait_until
from product import ISOLATED, SOURCES, copy_scripts

START_TIMEOUT_S = 300
THREADS = 3  # of a slave that has nothing to do: who accepts, who writes, who tells somebody
SECRET = "a secret that nobody knows"
# For start_slave(constants=...): how soon a run that takes too long gets TERM, then KILL.
# Not at once: what the run has to do before that is to be done on a busy machine, too.
SOON_ENDED = {"BACKSTOP_S": 4, "KILL_AFTER_S": 2}
# For start_slave(constants=...): polls that are held for longer than a busy machine stands still.
LONG_POLLS = {"MAX_WAIT_S": 250, "ANSWER_TIMEOUT_S": 280}
ONE = "1" * 40  # the commit that a stand-in puts live where upstream has none
# A slave-activate that notes when it runs and makes a clone of nothing but upstream's commit.
STAND_IN = """#!/bin/sh
echo "$1 begins ${2:-} $$" >>"$HOME/runs"
%s
commit=$(cat "$SERVER_UPDATE_BASE_URL/$1.git/refs/heads/main" 2>/dev/null || echo %s)
tree=$SERVER_UPDATE_REPOS_DIR/$1
mkdir -p "$tree/.git"
echo "$commit" >"$tree/.git/new"
mv "$tree/.git/new" "$tree/.git/HEAD"
echo "$1 ends" >>"$HOME/runs"
echo "$1 $commit -"
"""


def keep_port(address):
    """(what to keep, port): a port of that BIND where a slave can listen, once and again.

    While it is kept the kernel gives it to no connection that comes from here: after a stop,
    another test's would hold it. A port that is free on one address is not on all: another test's
    connection to 127.0.0.7 may have ended there just now."""
    everywhere = "::" if os.path.exists("/proc/net/if_inet6") else "0.0.0.0"
    address = str(address) or everywhere
    kept = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    if kept.family == socket.AF_INET6:
        kept.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    # Bound only: who listens there may have it, too.
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind((address, 0))
    return kept, kept.getsockname()[1]


class Slave:
    """The real slave.py beside the real slave-activate, with a process and a home of its own.

    And a folder of settings and keys, so that those of this machine are none of its.
    """

    def __init__(self, folder, settings, args=(), env=None, sources=SOURCES):
        self.bin = copy_scripts(
            sources, folder / "bin", "slave.py", "slave-activate", "server-update"
        )
        self.etc = folder / "etc" / "server-update"
        self.etc.mkdir(parents=True)
        self.command = [*ISOLATED, str(self.bin / "slave.py")]
        self.args, self.env = list(map(str, args)), dict(env or {})
        self.home, self.hooks = folder / "home", folder / "hooks"
        self.home.mkdir()
        self.hooks.mkdir()
        self.conf, self.log_file = folder / "slave.conf", folder / "log"
        self.settings = dict({"BIND": "127.0.0.1", "HOOKS_DIR": self.hooks}, **settings)
        self.kept, port = keep_port(self.settings["BIND"])
        self.settings.setdefault("PORT", port)
        self.repos = Path(self.settings.get("REPOS_DIR") or self.home / "repos")
        self.state = self.repos / ".server-update"
        self.process = self.port = None

    def start(self, wait=True):
        """Start it (again, then on the port that it had); with `wait`, until it listens."""
        self.conf.write_text(
            "".join("%s=%s\n" % item for item in self.settings.items()), encoding="utf-8"
        )
        before = len(self.log())
        env = dict(
            os.environ,
            HOME=str(self.home),
            SERVER_UPDATE_CONF=str(self.conf),
            PATH=str(self.bin) + os.pathsep + os.environ["PATH"],
        )
        env.update(self.env)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command + self.args,
                env=env,
                cwd=str(self.home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.port = int(
                wait_until(
                    lambda: self._listening(before), START_TIMEOUT_S, what="slave.py listening"
                ).group(1)
            )
            self.settings["PORT"] = self.port
        return self

    def _listening(self, before):
        new = self.log()[before:]
        if self.process.poll() is not None:
            raise AssertionError("slave.py ended with %s:\n%s" % (self.process.returncode, new))
        return re.search(r"listening on port (\d+)", new)

    @property
    def url(self):
        """http://127.0.0.1:PORT"""
        return "http://127.0.0.1:%d" % self.port

    def log(self):
        """All that it has logged so far, over its restarts."""
        return (
            self.log_file.read_text(encoding="utf-8", errors="replace")
            if self.log_file.exists()
            else ""
        )

    def get(self, path, headers=None, method="GET", timeout=120):
        """One request on a connection of its own: (status, headers, body as bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def json(self, path, status=200, **kwargs):
        """The JSON answer, which must have that status."""
        got, _, body = self.get(path, **kwargs)
        assert got == status, "%s: %d %r" % (path, got, body)
        return json.loads(body.decode("utf-8"))

    def signal(self, repo="hanuman", ref=None, secret=None):
        """Ask for an update, signed where there is a secret; it must be accepted; its id."""
        target = "/?repo=%s%s" % (repo, "&ref=" + ref if ref else "")
        headers = signature(target, secret) if secret else None
        return self.json(target, status=202, headers=headers)["update"]

    def wait_update(self, repo="hanuman", update=None, timeout=300, secret=None):
        """Signal if no update id is given; wait for its end; the record."""
        update = self.signal(repo, secret=secret) if update is None else update
        target = "/status?repo=%s&update=%s&wait=20" % (repo, update)
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            record = self.json(target, headers=signature(target, secret) if secret else None)
            if record["state"] in ("live", "failed"):
                return record
        raise AssertionError("update %s of %s did not end: %s" % (update, repo, record))

    def kill(self):
        """kill -9 of slave.py alone; what it started lives on."""
        self.process.kill()
        self.process.wait()

    def stop(self, signum=SIGTERM, timeout=300):
        """Stop it cleanly; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(timeout)


def forget_bin(slave):
    """Have it look for programs in an empty folder and not in /bin, where one may be installed."""
    empty = slave.home / "bin"
    empty.mkdir()
    script = slave.bin / "slave.py"
    text = script.read_text(encoding="utf-8")
    assert text.count('{beside}:/bin"') == 1
    script.write_text(text.replace('{beside}:/bin"', '{beside}:%s"' % empty), encoding="utf-8")


def stop_for_good(*slaves):
    """End slaves and whatever they have started, however a test left them.

    By KILL: a clean stop takes half a second, and what it does is for the tests themselves to see.
    """
    running = [slave for slave in slaves if slave.process and slave.process.poll() is None]
    for slave in running:
        below = descendants(slave.process.pid)
        slave.kill()
        for pid in below:
            kill(pid)
    for slave in slaves:
        kill_all_below(slave.bin.parent)


def kill_hard(slave):
    """kill -9 of slave.py and of all that it has started."""
    slave.kill()
    kill_all_below(slave.home.parent)


def start_by_hand(slave, *args, **env):
    """Runs slave.py until it ends by itself: (status, stderr)."""
    run = subprocess.run(
        slave.command + list(map(str, args)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=300,
        universal_newlines=True,
        encoding="utf-8",
        env=dict(os.environ, HOME=str(slave.home), **env),
    )
    return run.returncode, run.stderr


# -- stand-ins for slave-activate


def stand_in(slave, body="", text=None):
    """Has `slave` run a script of our own in place of slave-activate from now on."""
    path = slave.bin / "slave-activate.new"
    path.write_text(text or STAND_IN % (body, ONE), encoding="utf-8")
    path.chmod(0o755)
    path.rename(slave.bin / "slave-activate")


def runs(slave):
    """The lines that stand-ins have noted."""
    notes = slave.home / "runs"
    return notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []


def wait_runs(slave, count):
    wait_until(lambda: len(runs(slave)) >= count, what="%d notes of runs" % count)


def record_file(slave, repo="hanuman"):
    return json.loads((slave.state / (repo + ".json")).read_text(encoding="utf-8"))


# -- secrets


def make_secret(path, *lines, mode=0o600):
    """A file with these secrets, a line each; its path."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    path.chmod(mode)
    return path


def signature(target, secret=SECRET, method="GET", when=None, nonce=None):
    """The header, made without any of the product's code."""
    if not isinstance(when, str):
        when = str(int(time.time() if when is None else when))
    nonce = nonce or "%032x" % random.getrandbits(128)
    text = "\n".join(["server-update-1", method, target, when, nonce]).encode()
    mac = hmac.new(secret.encode(), text, hashlib.sha256).hexdigest()
    return {"X-Server-Update-Signature": "t=%s,n=%s,s=%s" % (when, nonce, mac)}
