"""Whole rollouts on real slaves that are signed: nothing of a key is told, and keys can change."""

import json
import os
import re
import subprocess
import threading

import pytest
from farm import refusing_entry
from processes import ProcessList, wait_until
from product import ISOLATED, SOURCES, copy_scripts
from slave_support import make_secret, record_file, signature, stand_in
from test_server_update_keys import MASTER_KEY, SECRET, key_of

# Others may run the same test on this machine meanwhile.
USER, PASSWORD = "us3r-%d" % os.getpid(), "hunter2-and-more-%d" % os.getpid()
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


def readable_by_others(folder):
    """The text of all files in which others may look, but for the upstream's own."""
    for path in folder.rglob("*"):
        if "upstream" in path.parts or not path.is_file():
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
    http_upstream.login = "%s:%s" % (USER, PASSWORD)
    processes = ProcessList()
    http_upstream.before_request = lambda requests: processes.look()
    url = http_upstream.url.replace("://", "://%s:%s@" % (USER, PASSWORD))
    slaves = {
        "live": start_signed("live", BASE_URL=url, env={"SERVER_UPDATE_GIT_FROM": "127.0.0.1"}),
        "hook failed": start_signed("hook", BASE_URL=url),
        "failed": start_signed("failed", BASE_URL="http://%s:%s@127.0.0.1:1" % (USER, PASSWORD)),
        "refused": start_signed("refused", key="f" * 64),
    }
    late = start_signed("timeout")
    not_let_in = start_signed("let-in", BASE_URL=url.replace(PASSWORD, PASSWORD + "x"))
    not_found = start_signed("not-found", BASE_URL=url + "/nowhere")
    hook(slaves["hook failed"], "post-update", "env >&2\necho broken >&2\nexit 3\n")
    stand_in(late, "sleep 300")
    gone, keep = refusing_entry()
    entries = {outcome: "127.0.0.1:%d" % slave.port for outcome, slave in slaves.items()}
    entries["unreachable"] = gone
    master_key = make_secret(tmp_path / "master-key", MASTER_KEY)
    secret = make_secret(tmp_path / "shared-secret", SECRET)
    options = ["--master-key-file", str(master_key), "--secret-file", str(secret)]
    options += ["--retries=0", "--write-failed", str(tmp_path / "failed")]
    done = update(entries.values(), *options, "--json")
    in_vain = update([late], *options, "--timeout=5", "--json")
    plain = update(entries.values(), *options, "--status", "-v")
    failed = update([not_let_in.url, not_found.url], *options, "--json")
    # one whose secret is another, and who is told so
    make_secret(slaves["live"].secret, "e" * 64)
    wrong = update([entries["live"]], "--secret-file", str(secret))
    keep.close()
    assert {entry: outcome for outcome, entry in entries.items()} == done.outcomes, done.stdout
    assert set(failed.outcomes.values()) == {"failed"}
    assert "Authentication failed for 'http://127.0.0.1:" in failed.stdout
    assert in_vain.outcomes == {late.url: "timeout"}
    assert (plain.returncode, wrong.returncode) == (1, 1)

    slaves.update(late=late, let_in=not_let_in, not_found=not_found)
    keys = [MASTER_KEY, SECRET, *(key_of(slave.url) for slave in slaves.values())]
    told = {"processes": processes.stop()}
    assert "remote-http\0" in told["processes"]
    for run in (done, in_vain, plain, failed, wrong):
        told["said %d" % len(told)] = run.stdout + run.stderr
    told["list"] = (tmp_path / "failed").read_text()
    for name, slave in slaves.items():
        told["log of " + name] = slave.log()
        for record in slave.state.glob("*.json"):
            told["record of " + name] = record.read_text()
    for path, text in readable_by_others(tmp_path):
        if path.name != "slave.conf":  # this is where the URL comes from
            told[str(path)] = text
    assert str(slaves["live"].repos / "hanuman/.git/config") in told
    assert (slaves["live"].state / "hanuman.git/config").exists()
    for where, text in told.items():
        for name in [*keys, USER, PASSWORD]:
            assert name not in text, where
        assert not NONCE_OR_MAC.search(text), where


class Rollouts(threading.Thread):
    """Runs server-update without end, one rollout of a new commit after another."""

    def __init__(self, command, repo):
        super().__init__(daemon=True)
        self.command = command
        self.repo = repo
        self.done = []  # the outcomes of each that has ended
        self.is_over = threading.Event()
        self.start()

    def run(self):
        while not self.is_over.is_set():
            self.repo.commit({"a": str(len(self.done))})
            run = subprocess.run(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            lines = map(json.loads, run.stdout.decode("utf-8", "replace").splitlines())
            self.done.append([line["outcome"] for line in lines if line["type"] == "result"])

    def wait_for_more(self):
        """Wait until one has ended that began after this was called."""
        enough = len(self.done) + 2
        wait_until(lambda: len(self.done) >= enough, 120, what="%d rollouts" % enough)

    def stop(self):
        self.is_over.set()
        self.join()


def test_keys_of_their_own_come_without_a_gap(start_slave, http_upstream, tmp_path):
    """As docs/security.md says, on real slaves, while they are updated all the time."""
    repo = http_upstream.create("hanuman", files={"a": "1"})
    slaves = []
    for number in range(2):
        secret = make_secret(tmp_path / ("secret-%d" % number), SECRET)
        slaves.append(start_slave(SECRET_FILE=secret, BASE_URL=http_upstream.url))
        slaves[-1].secret = secret
    # A master with its files where it looks for them by itself.
    etc = tmp_path / "prefix" / "etc" / "server-update"
    etc.mkdir(parents=True)
    script = copy_scripts(SOURCES, tmp_path / "prefix" / "bin", "server-update") / "server-update"
    (etc / "slavelist.txt").write_text("".join(slave.url + "\n" for slave in slaves))
    make_secret(etc / "secret", SECRET)
    rollouts = Rollouts([*ISOLATED, str(script), "--json", "hanuman"], repo)

    rollouts.wait_for_more()
    # 1. each slave has its own key as a second line
    for slave in slaves:
        make_secret(slave.secret, SECRET, key_of(slave.url))
    rollouts.wait_for_more()
    # 2. the master has the master key, while one that began before is under way on each slave
    http_upstream.fault = "hang"
    wait_until(lambda: all(record_file(slave)["state"] == "running" for slave in slaves))
    make_secret(etc / "master-key.next", MASTER_KEY).rename(etc / "master-key")
    http_upstream.fault = None
    rollouts.wait_for_more()
    # 3. once what began before has ended, the old line goes
    for slave in slaves:
        make_secret(slave.secret, key_of(slave.url))
    rollouts.wait_for_more()
    rollouts.stop()

    assert rollouts.done == [["live", "live"]] * len(rollouts.done)
    for slave in slaves:
        assert "signature" not in slave.log()
        assert slave.get("/status", headers=signature("/status", SECRET))[0] == 401
        assert slave.get("/status", headers=signature("/status", key_of(slave.url)))[0] == 200
