"""Small attacks, each on one promise. test_scenarios runs them on the product; test_mutations runs
them on broken copies of it, where each must fail.

A scenario is a function of a Place; it raises (AssertionError mostly) where the promise is broken.
"""
import hmac
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time

from checker import git
from farm import refusing_entry
from processes import kill, kill_all_below, processes_below, system_calls, wait_until
from product import ISOLATED, copy_scripts, shorten_pauses
from slave_support import SECRET, Slave, signature, stop_for_good
from upstream import HttpUpstream, Upstream

READER_UPDATES = 12
LONG_AGO_S = -86400


class Place:
    """A folder with an upstream, in which the scripts of `sources` run."""

    def __init__(self, folder, sources):
        self.folder, self.sources, self.slaves = folder, sources, []
        folder.mkdir()
        self.upstream = Upstream(folder / "upstream")
        self.http = HttpUpstream(self.upstream)
        self.repo = self.upstream.create("site", files(1))
        self.version = 1
        self.bin = copy_scripts(sources, folder / "bin", "server-update", "slave-activate")
        self.hooks, self.home = folder / "hooks", folder / "home"
        self.base_url = self.http.url  # of slave-activate by hand
        self.hooks.mkdir()
        self.home.mkdir()

    @property
    def tree(self):
        """The clone that activate makes."""
        return self.home / "repos" / "site"

    def push(self):
        """The next version; its commit."""
        self.version += 1
        return self.repo.commit(files(self.version))

    def slave(self, **settings):
        """A slave that listens."""
        folder = self.folder / ("slave-%d" % len(self.slaves))
        folder.mkdir()
        settings = dict({"BASE_URL": self.http.url, "HOOKS_DIR": self.hooks}, **settings)
        self.slaves.append(Slave(folder, settings, sources=self.sources))
        return self.slaves[-1].start()

    def environment(self):
        """What slave-activate by hand needs."""
        return dict(os.environ, HOME=str(self.home), SERVER_UPDATE_BASE_URL=self.base_url,
                    SERVER_UPDATE_HOOKS_DIR=str(self.hooks),
                    PATH="%s:%s" % (self.bin, os.environ["PATH"]))

    def start_activate(self, *args, before=()):
        """slave-activate by hand, in a process group of its own, maybe under another program."""
        return subprocess.Popen(
            [*before, str(self.bin / "slave-activate"), *(args or ("site",))],
            env=self.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, universal_newlines=True, start_new_session=True)

    def activate(self, *args):
        """slave-activate by hand to its end: (exit status, output)."""
        process = self.start_activate(*args)
        output = process.communicate(timeout=300)[0]
        return process.returncode, output

    def hook(self, name, text):
        """Put a hook in place."""
        (self.hooks / name).write_text("#!/bin/sh\n" + text)
        (self.hooks / name).chmod(0o755)

    def update(self, entries, *options):
        """server-update on these entries: (exit status, output)."""
        done = subprocess.run(
            [*ISOLATED, str(self.bin / "server-update"), "--list", "-", "--retries", "0",
             *options, "site"], input="\n".join(entries) + "\n", stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, universal_newlines=True, timeout=300)
        return done.returncode, done.stdout

    def close(self):
        """End all that runs here."""
        self.http.fault = None
        stop_for_good(*self.slaves)
        kill_all_below(self.folder)
        self.http.close()


def files(version):
    """A version of the site, big enough for its removal to take a moment."""
    text = "%d\n" % version
    return dict({"first": text, "second": text}, **{"many/%d" % n: text for n in range(60)})


def check_clean(folder, commit):
    """The clone is complete, clean and at that commit."""
    assert git(folder, "rev-parse", "HEAD") == (0, commit)
    assert git(folder, "status", "--porcelain", "--ignored") == (0, "")
    status, output = git(folder, "fsck", "--full", "--strict")
    assert status == 0, output


# -- promise 2: nothing accepted is lost, what was live stays whole ------------------------------


def accepted_survives_a_loss_of_power(place):
    """A running and a queued update, all killed the moment the 202 has come: both happen."""
    slave = place.slave()
    place.http.fault = "hang"
    ids = [slave.signal("site")]
    wait_until(lambda: slave.json("/status?repo=site")["state"] == "running")
    ids.append(slave.signal("site"))
    for pid in processes_below(slave.bin.parent):
        kill(pid, signal.SIGKILL)
    slave.process.wait()
    commit = place.push()
    place.http.fault = None
    slave.start()
    wait_until(lambda: slave.json("/status?repo=site")["state"] != "queued")
    for update in ids:
        record = slave.wait_update("site", update)
        assert (record["state"], record["commit"]) == ("live", commit), record
    check_clean(slave.repos / "site", commit)


def accepted_is_on_disk_before_the_answer(place):
    """The system calls between a signal and its 202: file synced, renamed, folder synced."""
    slave = place.slave()
    trace = place.folder / "trace"
    calls = "fsync,fdatasync,rename,renameat,renameat2,sendto,write,sendmsg"
    tracer = subprocess.Popen(["strace", "-f", "-y", "-s", "64", "-e", "trace=" + calls,
                               "-o", str(trace), "-p", str(slave.process.pid)],
                              stderr=subprocess.PIPE)
    tracer.stderr.readline()  # attached
    slave.signal("site")
    tracer.terminate()
    tracer.wait(300)
    tracer.stderr.close()
    text = system_calls(trace)
    before = text[:text.index("HTTP/1.1 202")]
    order = [r"fsync\(\d+<[^>]*\.server-update/[^>]+>", r"rename.*site\.json",
             r"fsync\(\d+<[^>]*\.server-update>"]
    at = 0
    for step in order:
        found = re.compile(step).search(before, at)
        assert found, "no %s in\n%s" % (step, before)
        at = found.end()


def a_clone_is_on_disk_before_it_goes_live(place):
    """The system calls of slave-activate: filesystem flushed, exchanged, folder flushed."""
    place.activate()
    place.push()
    trace = place.folder / "trace"
    calls = "trace=syncfs,sync,renameat2,rename,fsync"
    process = place.start_activate(before=["strace", "-f", "-y", "-o", str(trace), "-e", calls])
    assert process.wait(300) == 0
    process.stdout.close()
    text = system_calls(trace)
    exchange = text.find("RENAME_EXCHANGE")
    pid = text[:exchange].rsplit("\n", 1)[1].split()[0]  # there may be others who flush
    assert re.search(r"(?m)^%s .*syncfs.* = 0$" % pid, text[:exchange]), text
    assert re.search(r"fsync\(\d+<[^>]*/repos>", text[exchange:]), text


def what_was_live_survives_a_failing_upstream(place):
    """Upstream refuses, breaks off and talks rubbish: exit 1, and the old tree as it was."""
    place.activate()
    first = place.repo.head()
    place.push()
    shorten_pauses(place.bin)
    for fault in ("503", "cut:300", "garbage", "reset"):
        place.http.fault = fault
        assert place.activate()[0] == 1, fault
        check_clean(place.tree, first)


def a_failing_hook_keeps_what_is_live(place):
    """pre-update says no: the old tree stays."""
    place.activate()
    first = place.repo.head()
    place.push()
    place.hook("pre-update", "exit 7\n")
    assert place.activate()[0] == 1
    check_clean(place.tree, first)


def the_next_run_sweeps_what_a_killed_one_left(place):
    """kill -9 of the whole group before it is live; the next run works and leaves nothing."""
    commit = place.repo.head()
    place.hook("pre-update", "kill -9 0\n")
    process = place.start_activate()
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert (place.home / "repos" / ".server-update" / "site.new").is_dir()
    (place.hooks / "pre-update").unlink()
    status, output = place.activate()
    assert status == 0, output
    check_clean(place.tree, commit)
    state = os.listdir(str(place.home / "repos" / ".server-update"))
    assert state == ["site.lock"]


def a_damaged_pack_heals(place):
    """A byte of a pack has changed that no checkout reads any more; the next clone is sound."""
    place.activate()
    pack = next((place.tree / ".git" / "objects" / "pack").glob("*.pack"))
    place.push()
    place.activate()
    assert pack.exists()
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 0x55
    pack.unlink()
    pack.write_bytes(bytes(data))
    commit = place.push()
    status, output = place.activate()
    assert status == 0, output
    check_clean(place.tree, commit)


def a_clone_stands_alone(place):
    """After two updates nothing in the clone depends on a tree that is gone."""
    for _ in range(2):
        place.activate()
        assert not (place.tree / ".git" / "objects" / "info" / "alternates").exists()
        check_clean(place.tree, place.repo.head())
        place.push()


def two_at_once_take_turns(place):
    """Three slave-activates by hand at once: one after the other, none fails."""
    busy, overlap = place.folder / "busy", place.folder / "overlap"
    text = "mkdir '{busy}' || echo >'{overlap}'\nsleep 0.3\nrmdir '{busy}'\n"
    place.hook("pre-update", text.format(busy=busy, overlap=overlap))
    running = [place.start_activate() for _ in range(3)]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert not overlap.exists()


# -- promise 1: a reader never sees it missing or mixed ------------------------------------------


def a_reader_never_sees_it_missing(place):
    """A reader by path in a tight loop over a dozen updates."""
    place.base_url = place.upstream.base_path  # the reader leaves this process no time to serve
    place.activate()
    missing, over = [], threading.Event()

    def read():
        while not over.is_set():
            try:
                (place.tree / "first").read_bytes()
            except OSError as error:
                missing.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(READER_UPDATES):
            place.push()
            assert place.activate()[0] == 0
            assert not missing, missing[0]
    finally:
        over.set()
        reader.join()


# -- promise 3: the last signal sees the last commit ---------------------------------------------


def the_last_signal_wins(place):
    """Signals with different refs while one runs: the last one's ref is live in the end."""
    side = place.repo.commit({"side": "1"}, branch="side", parent=place.repo.head())
    slave = place.slave()
    place.http.fault = "hang"
    slave.signal("site")
    wait_until(lambda: slave.json("/status?repo=site")["state"] == "running")
    slave.signal("site")
    last = slave.signal("site", "side")
    place.http.fault = None
    record = slave.wait_update("site", last)
    assert (record["state"], record["commit"], record["ref"]) == ("live", side, "side"), record


def ids_grow_although_the_clock_went_back(place):
    """A slave starts again with a clock that is a day behind."""
    slave = place.slave()
    first = slave.signal("site")
    slave.wait_update("site", first)
    slave.stop()
    clock = place.folder / "clock"
    clock.write_text(str(LONG_AGO_S))
    slave.command[-1:-1] = [os.path.join(os.path.dirname(__file__), "clock.py"), str(clock)]
    second = slave.start().signal("site")
    assert second > first
    assert slave.wait_update("site", second)["update"] == second


# -- promise 4: nothing reaches outside ----------------------------------------------------------


def no_name_reaches_outside_by_hand(place):
    """slave-activate ../outside, with such a repository upstream."""
    place.base_url = place.upstream.base_path
    place.upstream.create("outside")
    (place.home / "repos").mkdir()
    shutil.move(str(place.upstream.folder / "outside.git"), str(place.folder / "outside.git"))
    status, output = place.activate("../outside")
    assert status == 2, output
    assert sorted(os.listdir(str(place.home))) == ["repos"]


def no_name_reaches_outside_by_http(place):
    """The slave refuses it by itself, before anything is run."""
    slave = place.slave()
    for name in ("../outside", "%2e%2e/x", "..", "a/b", "-x"):
        assert slave.get("/?repo=" + name)[0] == 400, name
    assert slave.json("/status")["repos"] == {}


def an_unsigned_signal_is_refused(place):
    """With a secret, a signal without a signature starts nothing."""
    secret = place.folder / "secret"
    secret.write_text("0123456789abcdef\n")
    secret.chmod(0o600)
    slave = place.slave(SECRET_FILE=secret)
    assert slave.get("/?repo=site")[0] == 401
    assert not (slave.repos / "site").exists()


def a_slaves_key_is_worth_nothing_at_another(place):
    """Two slaves with keys of their own; once one has the other's, it takes no signal."""
    master_key = place.folder / "master-key"
    master_key.write_text("0123456789abcdef0123456789abcdef\n")
    master_key.chmod(0o600)
    options = ["--master-key-file", str(master_key)]
    slaves = [place.slave(), place.slave()]
    keys = []
    for slave in slaves:
        told = subprocess.run([*ISOLATED, str(place.bin / "server-update"), *options,
                               "--slave-key", slave.url], stdout=subprocess.PIPE, check=True)
        keys.append(told.stdout)
    give_keys(slaves, keys)
    status, output = place.update([slave.url for slave in slaves], *options)
    assert status == 0, output
    give_keys(slaves, [keys[0], keys[0]])
    status, output = place.update([slave.url for slave in slaves], *options)
    assert status == 1, output
    assert re.search(re.escape(slaves[1].url) + ".*refused", output), output


def give_keys(slaves, keys):
    """Start slaves anew, each with its key."""
    for slave, key in zip(slaves, keys):
        slave.settings["SECRET_FILE"] = slave.home / "key"
        slave.settings["SECRET_FILE"].write_bytes(key)
        slave.settings["SECRET_FILE"].chmod(0o600)
        slave.stop()
        slave.start()


def nothing_of_a_run_outlives_it(place):
    """What a hook leaves running in the background is gone soon after the update."""
    place.hook("post-update", "sleep 300 >/dev/null 2>&1 &\n")
    slave = place.slave()
    assert slave.wait_update("site")["state"] == "live"
    wait_until(lambda: processes_below(slave.bin.parent) == [slave.process.pid],
               what="a run that leaves nothing")


# -- promises 5 and 6: every slave accounted for, the exit status right --------------------------


def a_dead_slave_is_no_success(place):
    """One slave live, one that nobody listens on: exit 1."""
    slave = place.slave()
    entry, holder = refusing_entry()
    with holder:
        status, output = place.update([slave.url, entry])
    assert status == 1, output
    assert re.search(re.escape(entry) + ".*unreachable", output)


def a_failed_update_is_no_success(place):
    """Upstream is down: the slave says failed, server-update exit 1."""
    slave = place.slave()
    shorten_pauses(slave.bin)
    place.http.fault = "503"
    record = slave.wait_update("site")
    assert (record["state"], record["commit"]) == ("failed", None), record
    status, output = place.update([slave.url])
    assert status == 1, output


def a_failed_update_is_none_seen_from_outside(place):
    """One update is live, the next one fails: neither the metrics nor the page call that good."""
    slave = place.slave()
    shorten_pauses(slave.bin)
    assert slave.wait_update("site")["state"] == "live"
    success = 'server_update_last_update_success{repo="site"} %d\n'
    assert success % 1 in slave.get("/metrics")[2].decode()
    place.http.fault = "503"
    assert slave.wait_update("site")["state"] == "failed"
    metrics = slave.get("/metrics")[2].decode()
    assert success % 0 in metrics, metrics
    assert 'updates_total{repo="site",outcome="failed"} 1\n' in metrics, metrics
    page = slave.get("/status", headers={"Accept": "text/html"})[2].decode()
    assert "failed" in page and "503" in page, page


def different_commits_are_no_success(place):
    """Two slaves whose upstreams differ: both live, exit 1."""
    behind = place.folder / "behind"
    shutil.copytree(str(place.upstream.folder), str(behind))
    slaves = [place.slave(), place.slave(BASE_URL=behind)]
    place.push()
    status, output = place.update([slave.url for slave in slaves], "--json")
    summary = json.loads(output.splitlines()[-1])
    assert summary["outcomes"] == {"live": 2}, output
    assert (status, len(summary["commits"])) == (1, 2), output


def what_is_told_as_live_is_live(place):
    """The commit in the result is the one in the tree, at the moment the result comes."""
    slave = place.slave()
    place.update([slave.url])
    for _ in range(3):
        commit = place.push()
        status, output = place.update([slave.url], "--json")
        result = json.loads(output.splitlines()[1])
        check_clean(slave.repos / "site", commit)
        assert (status, result["outcome"], result["commit"]) == (0, "live", commit), output


def a_replaced_update_is_no_success(place):
    """Somebody else's signal, with another ref, takes the place of ours: exit 1."""
    place.repo.commit({"side": "1"}, branch="side", parent=place.repo.head())
    slave = place.slave()
    place.http.fault = "hang"
    slave.signal("site")
    wait_until(lambda: slave.json("/status?repo=site")["state"] == "running")
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(place.update([slave.url])))
    waiting.start()
    wait_until(lambda: slave.json("/status?repo=site")["state"] == "queued")
    slave.signal("site", "side")
    place.http.fault = None
    waiting.join(300)
    assert answers[0][0] == 1, answers


def a_restart_between_signal_and_outcome_is_seen_through(place):
    """The slave is killed and started again while server-update waits for the outcome."""
    slave = place.slave()
    place.http.fault = "hang"
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(place.update([slave.url], "--json")))
    waiting.start()
    wait_until(lambda: slave.json("/status")["repos"].get("site", {}).get("state") == "running")
    for pid in processes_below(slave.bin.parent):
        kill(pid, signal.SIGKILL)
    slave.process.wait()
    time.sleep(0.5)  # a poll must meet nobody
    place.http.fault = None
    slave.start()
    waiting.join(300)
    status, output = answers[0]
    assert status == 0, output
    assert json.loads(output.splitlines()[1])["commit"] == place.repo.head()


# -- promise 9: what a relay has answered with 202 is live beneath, or told ----------------------


class Forge:
    """A relay with slaves beneath it, and what a forge sends to it."""

    def __init__(self, place, beneath=(), **settings):
        """`beneath` are entries of a list beside the one slave that there is."""
        secret = place.folder / "forge-secret"
        secret.write_text(SECRET + "\n")
        secret.chmod(0o600)
        slavelist = place.folder / "beneath"
        self.slave = place.slave(SECRET_FILE=secret, **settings)
        slavelist.write_text("\n".join([self.slave.url, *beneath]) + "\n")
        options = "--retries 0 --connect-timeout 2"
        self.relay = place.slave(SECRET_FILE=secret, SLAVELIST=slavelist, RELAY_OPTIONS=options)

    def push(self, repo="site", key=None):
        """Announce a push to the relay: its answer's status. key: made without the product."""
        text = b'{"ref": "refs/heads/main", "repository": {"default_branch": "main"}}'
        key = key or hook_key(repo)
        proof = hmac.new(key, text, "sha256").hexdigest()
        headers = {"X-Hub-Signature-256": "sha256=" + proof, "X-GitHub-Event": "push"}
        request = http.client.HTTPConnection("127.0.0.1", self.relay.port, timeout=300)
        try:
            request.request("POST", "/hook?repo=" + repo, text, headers)
            return request.getresponse().status
        finally:
            request.close()

    def record(self, slave):
        """The record of `site` of one of the two, None while there is none."""
        path = "/status?repo=site"
        status, _, body = slave.get(path, headers=signature(path))
        return json.loads(body.decode()) if status == 200 else None

    def wait_end(self):
        """The relay's record once its update has ended."""
        def ended():
            record = self.record(self.relay)
            return record if record and record["state"] in ("live", "failed") else None
        return wait_until(ended, what="the end of the relay's update")


def hook_key(repo, ref=""):
    """The key of a hook, as bytes of hex."""
    text = "server-update-hook-1\n%s\n%s" % (repo, ref)
    return hmac.new(SECRET.encode(), text.encode(), "sha256").hexdigest().encode()


def a_push_reaches_the_slaves_beneath(place):
    """A forge's push to a relay: live there and beneath, at one commit."""
    forge = Forge(place)
    assert forge.push() == 202
    record = forge.wait_end()
    assert (record["state"], record["beneath"]) == ("live", {"live": 1}), record
    for slave in (forge.relay, forge.slave):
        check_clean(slave.repos / "site", place.repo.head())


def a_dead_slave_beneath_is_told(place):
    """One of two slaves beneath can't be reached: the relay says so."""
    entry, holder = refusing_entry()
    with holder:
        forge = Forge(place, [entry])
        assert forge.push() == 202
        record = forge.wait_end()
    assert record["beneath"] == {"live": 1, "unreachable": 1}, record
    assert [bad["slave"] for bad in record["beneath_bad"]] == [entry], record


def a_push_survives_a_kill_of_the_relay(place):
    """kill -9 of the relay while the slave beneath is busy: after its start it goes on to the end.
    """
    go = place.folder / "go"
    hooks = place.folder / "hooks-beneath"
    hooks.mkdir()
    hook = hooks / "pre-update"
    hook.write_text('#!/bin/sh\nuntil [ -e "%s" ]; do sleep 0.05; done\n' % go)
    hook.chmod(0o755)
    forge = Forge(place, HOOKS_DIR=hooks)
    assert forge.push() == 202
    wait_until(lambda: forge.record(forge.slave), what="the signal to the slave beneath")
    assert forge.record(forge.relay)["state"] == "running"
    for pid in processes_below(forge.relay.bin.parent):
        kill(pid, signal.SIGKILL)
    forge.relay.process.wait()
    commit = place.push()
    go.write_text("")
    forge.relay.start()
    record = forge.wait_end()
    assert (record["state"], record["beneath"]) == ("live", {"live": 1}), record
    check_clean(forge.slave.repos / "site", commit)


def a_push_without_its_key_starts_nothing(place):
    """Neither a wrong key nor the one of another repository; the right one does."""
    forge = Forge(place)
    for key in (b"0" * 64, SECRET.encode(), hook_key("another"), hook_key("site", "main")):
        assert forge.push(key=key) == 401, key
    assert forge.record(forge.relay) is None
    assert forge.push() == 202
    assert forge.wait_end()["state"] == "live"


# The first of them are for every day, see test_scenarios.py.
SCENARIOS = [
    what_is_told_as_live_is_live, different_commits_are_no_success,
    accepted_survives_a_loss_of_power, what_was_live_survives_a_failing_upstream,
    the_last_signal_wins, a_reader_never_sees_it_missing, accepted_is_on_disk_before_the_answer,
    a_clone_is_on_disk_before_it_goes_live, a_failing_hook_keeps_what_is_live,
    the_next_run_sweeps_what_a_killed_one_left, a_damaged_pack_heals, a_clone_stands_alone,
    two_at_once_take_turns, ids_grow_although_the_clock_went_back,
    no_name_reaches_outside_by_hand, no_name_reaches_outside_by_http,
    an_unsigned_signal_is_refused, a_slaves_key_is_worth_nothing_at_another,
    nothing_of_a_run_outlives_it, a_dead_slave_is_no_success, a_failed_update_is_no_success,
    a_replaced_update_is_no_success, a_restart_between_signal_and_outcome_is_seen_through,
    a_push_reaches_the_slaves_beneath, a_dead_slave_beneath_is_told,
    a_push_survives_a_kill_of_the_relay, a_push_without_its_key_starts_nothing,
    a_failed_update_is_none_seen_from_outside,
]
