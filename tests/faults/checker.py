"""Checks the fleet from outside: by HTTP, git, /proc and the hooks' journal; no product code."""
import fcntl
import os
import subprocess
import threading
import time

from fleet import REPO
from processes import processes_below, sockets_of, wait_until

ENDED = ("live", "failed")
STATE_FILES = {REPO + ".json", REPO + ".lock", "relay-id", "signed"}
TRASH = "trash"  # has what could not be removed, until it can be
CALM_S = 60  # the time in which everything under way has ended once the faults are over


class Violation(AssertionError):
    """A promise was broken; the message says which, by whom."""


def git(folder, *args):
    """(exit status, output) of git in a clone."""
    done = subprocess.run(["git", "-C", str(folder), *args], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    return done.returncode, done.stdout.strip()


class Reader(threading.Thread):
    """Reads the live trees all the time; a missing file or a mixture of versions is noted."""

    def __init__(self, fleet):
        super().__init__(daemon=True)
        self.fleet, self.found, self.reads, self.over = fleet, [], 0, threading.Event()
        self.start()

    def run(self):
        while not self.over.wait(0.002):
            slave = self.fleet.slaves[self.reads % len(self.fleet.slaves)]
            self.reads += 1
            try:
                self._read(slave)
            except FileNotFoundError as error:
                self.found.append("%s: a reader by path: %s" % (slave.folder.name, error))

    def _read(self, slave):
        (slave.tree / "first").read_text()
        tree = os.open(str(slave.tree), os.O_RDONLY | os.O_DIRECTORY)
        try:
            texts = set()
            for name in ("first", "deep/er/third", "second"):
                with open(os.open(name, os.O_RDONLY, dir_fd=tree)) as handle:
                    texts.add(handle.read())
            if len(texts) > 1:
                self.found.append("%s: a reader saw a mixture: %s" % (slave.folder.name, texts))
        except FileNotFoundError:
            pass  # the tree that it had opened has been replaced and is being removed
        finally:
            os.close(tree)

    def finish(self):
        """Stop; what was found."""
        self.over.set()
        self.join(10)
        return self.found


def wait_for_calm(slave):
    """Wait until the slave has nothing queued or running and none of its processes is left."""
    def is_at_rest():
        return slave.json("/status")["repos"].get(REPO, {}).get("state") in (*ENDED, None)

    wait_until(is_at_rest, CALM_S, 0.05, "%s at rest" % slave.folder.name)
    wait_until(lambda: processes_below(slave.folder) == [slave.process.pid], CALM_S, 0.05,
               "%s without other processes" % slave.folder.name)


def check_accepted(fleet, slave, since, excused):
    """Every update accepted after `since` has ended, at a commit no older than its acceptance."""
    for when, update in slave.accepted():
        if when < since or when < slave.forgotten_until:
            continue
        status, _, body = slave.get("/status?repo=%s&update=%d" % (REPO, update))
        if status != 200:
            yield "update %d was accepted and is lost: %d %r" % (update, status, body)
            continue
        record = slave.json("/status?repo=%s&update=%d" % (REPO, update))
        if record["update"] < update or record["state"] not in ENDED:
            yield "update %d was accepted and has not ended: %s" % (update, record)
        elif record["state"] == "live":
            yield from check_live_record(fleet, record, when)
        elif not excused:
            yield "update %d failed although nothing was wrong: %s" % (update, record["message"])


def check_live_record(fleet, record, when):
    """A live record names a commit of its ref, not one out of date when it was asked for."""
    order = fleet.history.order(record["commit"])
    if order is None:
        yield "live at a commit that upstream never had: %s" % record
    elif record["pin"]:
        if record["pin"] != record["commit"]:
            yield "asked for exactly a commit and live at another: %s" % record
    elif len(record["ref"] or "") == 40:
        if record["ref"] != record["commit"]:
            yield "asked for a commit and live at another: %s" % record
    else:
        branch = record["ref"] or "main"
        before = [at for at, pushed_at in enumerate(fleet.history.pushed_at)
                  if pushed_at <= when and fleet.history.pushed[at][1] == branch]
        if fleet.history.pushed[order][1] != branch or (before and order < before[-1]):
            yield "live at a commit from before it was asked for: %s" % record


def check_tree(fleet, slave):
    """The live tree is exactly one commit that upstream had, and the slave says which."""
    commit = git(slave.tree, "rev-parse", "HEAD")[1]
    if fleet.history.order(commit) is None:
        yield "the live tree is at %r, which upstream never had" % commit
    said = slave.json("/status?repo=" + REPO)["commit"]
    if said != commit:
        yield "says that %s is live, and it is %s" % (said, commit)
    dirty = git(slave.tree, "status", "--porcelain", "--ignored")[1]
    if dirty:
        yield "the live tree is not what was committed: %s" % dirty[:200]


def check_left_behind(slave):
    """Nothing else in the folders, no temporary file, no lock held, no two updates at once."""
    for folder, allowed in ((slave.repos, {REPO, ".server-update"}), (slave.state, STATE_FILES),
                            (slave.tmp, set())):
        if not folder.exists():
            yield "there is no %s" % folder.name
            return
        extra = set(os.listdir(str(folder))) - allowed - {REPO + ".json.broken"}
        if TRASH in extra and not os.listdir(str(folder / TRASH)):
            extra.discard(TRASH)
        if extra:
            yield "left in %s: %s" % (folder.name, sorted(extra))
    with open(str(slave.state / (REPO + ".lock"))) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield "the repository's lock is still held"
    if ["overlap"] in slave.journal()[slave.journal_before:]:
        yield "two updates ran at once"


def check_volume(slave):
    """Nothing that is mounted in the tree was touched."""
    names = os.listdir(str(slave.volume))
    if names != ["precious"] or not (slave.volume / "precious").read_text():
        yield "the volume in the tree is no longer as it was: %s" % names


def check_master(fleet, master, status):
    """What a master told is true: each result, the totals, the exit status."""
    told = {}
    for result, journal in master.results:
        told[result["slave"]] = result
        put_live = [line[1] for line in journal if len(line) == 3]
        if result["outcome"] == "live" and result["commit"] not in put_live:
            yield "told that %s is live on %s, which put live only %s" % (
                result["commit"], result["slave"], put_live)
    if "Traceback" in master.errors:
        yield "server-update broke: " + master.errors[-500:]
    if status < 0:
        return  # killed
    if master.torn:
        yield "not a JSON line: %r" % master.torn
    tally = {}
    for result in told.values():
        tally[result["outcome"]] = tally.get(result["outcome"], 0) + 1
    if status in (0, 1) and set(told) != set(fleet.by_entry):
        yield "slaves without an account: %s" % sorted(set(fleet.by_entry) - set(told))
    if len(master.results) != len(told):
        yield "slaves told twice"
    if master.summary is None or master.summary["exit"] != status:
        yield "exit %s, and the summary says %s" % (status, master.summary)
    elif master.summary["outcomes"] != tally:
        yield "the summary %s is not the sum of the results %s" % (master.summary, tally)
    commits = {result["commit"] for result in told.values()}
    all_right = tally == {"live": len(fleet.slaves)} and len(commits) == 1
    if status in (0, 1) and (status == 0) != all_right:
        yield "exit %d with %s at %d commits" % (status, tally, len(commits))


def check_slave(fleet, slave, since, excused):
    """All that must hold of one slave that is at rest."""
    checks = [check_accepted(fleet, slave, since, excused), check_left_behind(slave),
              check_volume(slave)]
    if slave.tree.exists():
        checks.append(check_tree(fleet, slave))
    log = slave.log()
    if "Traceback" in log:
        checks.append(["a traceback in its log: " + log[log.index("Traceback"):][:600]])
    return ["%s: %s" % (slave.folder.name, problem) for check in checks for problem in check]


def check_clean_run(fleet, master):
    """After the faults one run of the master puts all right, with nothing left of the past."""
    status, head = master.process.returncode, fleet.history.head()
    problems = list(check_master(fleet, master, status))
    if status != 0 or {result["commit"] for result, _ in master.results} != {head}:
        wrong = [result for result, _ in master.results if result["commit"] != head]
        problems.append("the next run did not put all right: exit %s, %s" % (status, wrong[:3]))
    for slave in fleet.slaves:
        wait_for_calm(slave)
        fsck = git(slave.tree, "fsck", "--full", "--strict")
        if fsck[0]:
            problems.append("%s: git fsck: %s" % (slave.folder.name, fsck[1][-300:]))
        end = time.monotonic() + 12
        while sockets_of(slave.process.pid) and time.monotonic() < end:
            time.sleep(0.05)
        left = sockets_of(slave.process.pid)
        if left:
            problems.append("%s: connections are left open: %s" % (slave.folder.name, left))
    return problems
