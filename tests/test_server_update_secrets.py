"""Whole rollouts on real slaves that are signed: nothing of a key is told, and keys can change."""

import json
import os
import re
import subprocess
import threading
from signal import SIGINT

import pytest
from farm import refusing_entry
from processes import ProcessList, wait_until
from product import ISOLATED, SOURCES, copy_scripts
from slave_support import make_secret, record_file, signature, stand_in
from test_server_update_keys import key_of

# Others may run the same test on this machine meanwhile.
USER, PASSWORD = "us3r-%d" % os.getpid(), "hunter2-and-more-%d" % os.getpid()
MASTER_KEY, SECRET = "the master key of %d" % os.getpid(), "the secret of %d" % os.getpid()
NONCE_OR_MAC = re.compile(r"\b[ns]=(?:[0-9a-f]{64}|[0-9a-f]{32})\b")


@pytest.fixture
def start_signed(start_slave, tmp_path):
    """start_signed(NAME, key=None, ...): a slave whose secret file has its own key, or `key`."""

    def start(name, key=None, **settings):
        secret = make_secret(tmp_path / ("secret-" + name), "0" * 64)
        slave = start_slave(SECRET_FILE=secret, **settings)
        make_secret(secret, key or key_of(slave.url, MASTER_KEY))  # read anew for each request
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


@pytest.fixture
def fleet(start_signed, http_upstream, tmp_path):
    """{outcome: a signed slave that has it}, with a login in each BASE_URL that upstream knows."""
    http_upstream.create("hanuman", files={"a": "1"})
    http_upstream.login = "%s:%s" % (USER, PASSWORD)
    url = http_upstream.url.replace("://", "://%s:%s@" % (USER, PASSWORD))
    gone, keep = refusing_entry()
    beneath = tmp_path / "beneath"
    beneath.write_text(gone + "\n")
    relay = {"SLAVELIST": beneath, "RELAY_OPTIONS": "--retries 0 --connect-timeout 2"}
    slaves = {
        "live": start_signed("live", BASE_URL=url, env={"SERVER_UPDATE_GIT_FROM": "127.0.0.1"}),
        "hook failed": start_signed("hook", BASE_URL=url),
        "beneath failed": start_signed("relay", BASE_URL=url, **relay),
        "failed": start_signed("failed", BASE_URL="http://%s:%s@127.0.0.1:1" % (USER, PASSWORD)),
        "not let in": start_signed("let-in", BASE_URL=url.replace(PASSWORD, PASSWORD + "x")),
        "not found": start_signed("not-found", BASE_URL=url + "/nowhere"),
        "refused": start_signed("refused", key="f" * 64),
        "timeout": start_signed("timeout"),
    }
    hook(slaves["hook failed"], "post-update", "env >&2\necho broken >&2\nexit 3\n")
    for slave in slaves.values():
        hook(slave, "update-ended", '{ echo "$*"; env; } >>"$HOME/ended"\n')
    stand_in(slaves["timeout"], "sleep 300")
    yield slaves
    keep.close()


def roll_out(slaves, start_update, tmp_path):
    """Rollouts that end in each way there is; what they have said, {a name for it: text}."""
    gone, keep = refusing_entry()
    master_key = make_secret(tmp_path / "master-key", MASTER_KEY)
    secret = make_secret(tmp_path / "shared-secret", SECRET)
    options = ["--retries=0", "--write-failed", str(tmp_path / "failed")]
    options += ["--master-key-file", str(master_key), "--secret-file", str(secret)]
    urls = {name: slave.url for name, slave in slaves.items()}
    late = urls.pop("timeout")
    runs = {"rollout": start_update([*urls.values(), gone], "--json", *options).finish()}
    outcomes = {url: name for name, url in urls.items()}
    outcomes.update({urls["not let in"]: "failed", urls["not found"]: "failed"})
    outcomes[gone] = "unreachable"
    assert runs["rollout"].outcomes == outcomes, runs["rollout"].stdout
    assert "Authentication failed for 'http://127.0.0.1:" in runs["rollout"].stdout

    runs["timeout"] = start_update([late], "--json", "--timeout=5", *options).finish()
    assert runs["timeout"].outcomes == {late: "timeout"}
    runs["status"] = start_update(urls.values(), "--status", "-v", *options).finish()
    some = [gone, urls["live"]]
    stopped = ["--json", "--batch=1", "--max-fail=0", *options]
    runs["not started"] = start_update(some, *stopped).finish()
    assert set(runs["not started"].outcomes.values()) == {"unreachable", "not started"}
    runs["signalled"] = start_update(some[1:], "--no-wait", "-v", *options).finish()
    interrupted = start_update([late], "--json", *options)
    signals = slaves["timeout"].log().count("asked for")
    wait_until(lambda: slaves["timeout"].log().count("asked for") > signals)
    interrupted.process.send_signal(SIGINT)
    runs["interrupted"] = interrupted.finish()
    assert set(interrupted.outcomes.values()) == {"interrupted"}
    # one whose secret is another, and who is told so
    make_secret(slaves["live"].secret, "e" * 64)
    runs["wrong"] = start_update(some[1:], "--secret-file", str(secret)).finish()
    keep.close()
    said = {"said of " + name: run.stdout + run.stderr for name, run in runs.items()}
    return dict(said, list=(tmp_path / "failed").read_text())


@pytest.mark.slow
def test_nothing_tells_a_key_or_a_password(fleet, http_upstream, start_update, tmp_path):
    """What is said, logged, kept where others can read it, in arguments and in hooks."""
    processes = ProcessList()
    http_upstream.before_request = lambda requests: processes.look()
    told = roll_out(fleet, start_update, tmp_path)
    # None of these runs curl; a test that runs beside this one may.
    seen = [one for one in processes.stop().split("\n") if not one.startswith("curl\0")]
    told["processes"] = "\n".join(seen)
    assert "remote-http\0" in told["processes"]
    ended = ["live", "hook failed", "beneath failed", "failed", "not let in", "not found"]
    for name in ended:
        wait_until((fleet[name].home / "ended").exists, what="update-ended of " + name)
    for name, slave in fleet.items():
        told["log of " + name] = slave.log()
        for record in slave.state.glob("*.json"):
            told["record of " + name] = record.read_text()
    for path, text in readable_by_others(tmp_path):
        if path.name != "slave.conf":  # this is where the URL comes from
            told[str(path)] = text
    for path in ("repos/hanuman/.git/config", "ended"):
        assert str(fleet["live"].home / path) in told
    assert (fleet["live"].state / "hanuman.git/config").exists()
    keys = [MASTER_KEY, SECRET, *(key_of(slave.url, MASTER_KEY) for slave in fleet.values())]
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


@pytest.mark.slow
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
        make_secret(slave.secret, SECRET, key_of(slave.url, MASTER_KEY))
    rollouts.wait_for_more()
    # 2. the master has the master key, while one that began before is under way on each slave
    http_upstream.fault = "hang"
    wait_until(lambda: all(record_file(slave)["state"] == "running" for slave in slaves))
    make_secret(etc / "master-key.next", MASTER_KEY).rename(etc / "master-key")
    http_upstream.fault = None
    rollouts.wait_for_more()
    # 3. once what began before has ended, the old line goes
    for slave in slaves:
        make_secret(slave.secret, key_of(slave.url, MASTER_KEY))
    rollouts.wait_for_more()
    rollouts.stop()

    assert rollouts.done == [["live", "live"]] * len(rollouts.done)
    for slave in slaves:
        assert "signature" not in slave.log()
        assert slave.get("/status", headers=signature("/status", SECRET))[0] == 401
        own = signature("/status", key_of(slave.url, MASTER_KEY))
        assert slave.get("/status", headers=own)[0] == 200
