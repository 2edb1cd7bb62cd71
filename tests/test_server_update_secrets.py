"""Whole rollouts on real slaves that are signed: nothing of a key is told, and keys can change."""

import re
import threading
from pathlib import Path

import pytest
from farm import refusing_entry
from processes import wait_until
from slave_support import make_secret, runs, signature, stand_in
from test_server_update_keys import MASTER_KEY, SECRET, key_of

USER, PASSWORD = "us3r", "hunter2-and-more"
NONCE_OR_MAC = re.compile(r"\b[ns]=(?:[0-9a-f]{64}|[0-9a-f]{32})\b")


@pytest.fixture
def start_signed(start_slave, tmp_path):
    """start_signed(NAME, key=None, ...): a slave whose secret file has its own key, or `key`."""

    def start(name, key=None, **settings):
        secret = make_secret(tmp_path / ("secret-" + name), "0" * 64)
        slave = start_slave(SECRET_FILE=secret, **settings)
        make_secret(secret, key or key_of(slave.url))  # read anew for each request
        slave.secret = secret
        return slave

    return start


class ProcessList(threading.Thread):
    """All arguments that any process has while it runs: .stop() returns them."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen = set()
        self.is_over = threading.Event()
        self.start()

    def run(self):
        while not self.is_over.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(path.read_bytes())
                except OSError:  # it has ended
                    continue

    def stop(self):
        self.is_over.set()
        self.join()
        return b"\n".join(self.seen).decode("utf-8", "replace")


def readable_by_others(folder):
    """The text of all files in which others may look, but for git's and the upstream's own."""
    for path in folder.rglob("*"):
        if ".git" in path.parts or "upstream" in path.parts or not path.is_file():
            continue
        if path.stat().st_mode & 0o044:
            yield path, path.read_text(encoding="utf-8", errors="replace")


def hook(slave, name, text):
    path = slave.hooks / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def test_nothing_tells_a_key_or_a_password(start_signed, http_upstream, update, tmp_path):
    """In a rollout that ends in each way there is: live, hook failed, failed and the others."""
    http_upstream.create("hanuman", files={"a": "1"})
    url = http_upstream.url.replace("://", "://%s:%s@" % (USER, PASSWORD))
    slaves = {
        "live": start_signed("live", BASE_URL=url),
        "hook failed": start_signed("hook", BASE_URL=http_upstream.url),
        "failed": start_signed("failed", BASE_URL="http://%s:%s@127.0.0.1:1" % (USER, PASSWORD)),
        "refused": start_signed("refused", key="f" * 64),
        "timeout": start_signed("timeout"),
    }
    hook(slaves["hook failed"], "post-update", "echo broken >&2\nexit 3\n")
    stand_in(slaves["timeout"], "sleep 300")
    gone, keep = refusing_entry()
    entries = {outcome: "127.0.0.1:%d" % slave.port for outcome, slave in slaves.items()}
    entries["unreachable"] = gone
    master_key = make_secret(tmp_path / "master-key", MASTER_KEY)
    secret = make_secret(tmp_path / "shared-secret", SECRET)
    processes = ProcessList()
    options = ["--master-key-file", str(master_key), "--secret-file", str(secret)]
    options += ["--retries=0", "--timeout=20", "--write-failed", str(tmp_path / "failed")]
    done = update(entries.values(), *options, "--json")
    plain = update(entries.values(), *options, "--status", "-v")
    # one whose secret is another, and who is told so
    make_secret(slaves["live"].secret, "e" * 64)
    wrong = update([entries["live"]], "--secret-file", str(secret))
    keep.close()
    assert {entry: outcome for outcome, entry in entries.items()} == done.outcomes, done.stdout
    assert (plain.returncode, wrong.returncode) == (1, 1)

    keys = [MASTER_KEY, SECRET, *(key_of(slave.url) for slave in slaves.values())]
    told = {"processes": processes.stop()}
    for name in keys:
        assert name not in told["processes"]
    del told["processes"]  # git itself has a URL in its arguments, with all that is in it
    for run in (done, plain, wrong):
        told["said %d" % len(told)] = run.stdout + run.stderr
    told["list"] = (tmp_path / "failed").read_text()
    for name, slave in slaves.items():
        told["log of " + name] = slave.log()
        for record in slave.state.glob("*.json"):
            told["record of " + name] = record.read_text()
    for path, text in readable_by_others(tmp_path):
        if path.name != "slave.conf":  # this is where the URL comes from
            told[str(path)] = text
    for where, text in told.items():
        for name in [*keys, USER, PASSWORD]:
            assert name not in text, where
        assert not NONCE_OR_MAC.search(text), where


def test_keys_of_their_own_come_without_a_gap(start_slave, start_update, update, tmp_path):
    """As docs/security.md says, while a command that began with the shared secret is under way."""
    shared = make_secret(tmp_path / "shared", SECRET)
    master_key = make_secret(tmp_path / "master-key", MASTER_KEY)
    old, new = ["--secret-file", str(shared)], ["--master-key-file", str(master_key)]
    slaves = []
    for number in range(3):
        slave = start_slave(SECRET_FILE=make_secret(tmp_path / ("secret-%d" % number), SECRET))
        stand_in(slave, 'while [ -e "$HOME/wait" ]; do sleep 0.1; done')
        slave.secret = tmp_path / ("secret-%d" % number)
        slaves.append(slave)
    entries = ["127.0.0.1:%d" % slave.port for slave in slaves]
    assert update(entries, *old).returncode == 0

    (slaves[2].home / "wait").touch()
    under_way = start_update(entries, "--json", *old)
    wait_until(lambda: len(runs(slaves[2])) > 2, what="the update under way")
    # 1. each slave has its own key as a second line
    for slave in slaves:
        make_secret(slave.secret, SECRET, key_of(slave.url))
    assert update(entries[:2], *old).returncode == 0
    # 2. the master has the master key
    assert update(entries[:2], "--json", *new).outcomes == dict.fromkeys(entries[:2], "live")
    # 3. once what began before has ended, the old line goes
    assert under_way.process.poll() is None
    (slaves[2].home / "wait").unlink()
    assert under_way.finish().outcomes == dict.fromkeys(entries, "live")
    for slave in slaves:
        make_secret(slave.secret, key_of(slave.url))
    assert update(entries, "--json", *new).outcomes == dict.fromkeys(entries, "live")
    assert update(entries, "--json", *old).outcomes == dict.fromkeys(entries, "refused")
    header = signature("/status", SECRET)
    assert {slave.get("/status", headers=header)[0] for slave in slaves} == {401}
