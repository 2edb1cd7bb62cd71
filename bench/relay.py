#!/usr/bin/env python3
"""Clones from a slave: 200 real slaves beneath a relay, 60 large clones, fetches during updates.

    relay.py --work DIR --results DIR [--quick] [--rounds N] [--all]

The 200 slaves fetch one small commit from the relay, or, in turns, from `git http-backend` behind
http.server, which serves the very same mirror. The relay's CPU is that of its slave.py and of all
that it starts: to serve git, its own slave-activate, the server-update that follows all beneath.
http-backend's is that of its server, which does nothing else.
"""

import contextlib
import hashlib
import http.client
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time

import fleet
import measure
import upstream

SLAVES, QUICK_SLAVES = 200, 2
SERVED, BACKEND = "slave.py", "git http-backend"
CLONES, QUICK_CLONES = 60, 3
OF_GIT = 4  # of them: git clone itself; the others speak as it does, and keep nothing
SPARE = 2  # of what the clones take on disk
UPDATES, QUICK_UPDATES = 100, 3
FETCHES_EACH = 5  # in the time of an update
CLIENTS = 4
ANEW_EVERY = 10  # so many fetches begin with a clone, and updates rewrite history
TIMEOUT_S = 600
# The slaves clone from this; git's own configuration says where that is.
ALIAS = "http://relay.invalid/git/"
DETAILS = "--format=%(refname) %(objectname) %(*objectname)"
READ_BYTES = 256 * 1024


class Relay:
    """A slave that this machine may clone from: its process, its mirror, its server-update."""

    def __init__(self, slaves, name, **settings):
        self.slaves = slaves
        process = slaves.launch(name, GIT_FROM="127.0.0.1", **settings)
        self.pid = process.pid
        self.port = fleet.wait_until_up(process)
        self.base = f"http://127.0.0.1:{self.port}/git"
        self.url = f"{self.base}/{slaves.kind}.git"
        self.state = os.path.join(slaves.work, fleet.OURS, name, ".server-update")
        self.mirror = os.path.join(self.state, slaves.kind + ".git")

    def update(self):
        """One signal, followed to its end by server-update; raises Failed unless all is live."""
        program = os.path.join(measure.PRODUCT, "server-update")
        done = subprocess.run(
            [sys.executable, program, "--list", "-", "-q", self.slaves.kind],
            input=f"127.0.0.1:{self.port}\n".encode(), env=self.slaves.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )
        if done.returncode:
            raise measure.Failed(f"the relay: {done.stdout.decode(errors='replace')[-2000:]}")


    def ask(self, target):
        """The relay's answer to a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        connection.request("GET", target)
        found = json.loads(connection.getresponse().read())
        connection.close()
        return found

    def signal(self):
        """One signal, followed by hand; raises Failed unless it is live here."""
        repo = "repo=" + self.slaves.kind
        target = f"/status?{repo}&update={self.ask('/?' + repo)['update']}&wait=30"
        record = self.ask(target)
        while record["state"] in ("queued", "running"):
            record = self.ask(target)
        if record["state"] != "live":
            raise measure.Failed(f"the relay's record: {record}")


# -- 200 slaves beneath a relay


def lead_to(slaves, base):
    """From now on the slaves' BASE_URL is this server."""
    path = os.path.join(slaves.work, "home", ".gitconfig")
    with open(path, "w", encoding="ascii") as handle:
        handle.write(f'[url "{base}/"]\n\tinsteadOf = {ALIAS}\n')


def update_all(relay, server):
    """One commit from the upstream to all slaves; server is who serves git to them: a process."""
    slaves = relay.slaves
    commit = upstream.commit(slaves.bare, 1)
    os.sync()
    clones, cpu = slaves.server.clones(), measure.cpu_s(server)
    before = time.monotonic()
    relay.update()
    values = {
        "seconds": time.monotonic() - before,
        "cpu": measure.cpu_s(server) - cpu,
        "clones": slaves.server.clones() - clones,
    }
    slaves.check(fleet.OURS, commit)
    return values


def take_turns(relay, backend, group, rounds):
    lead_to(relay.slaves, relay.base)
    relay.update()  # the first clones
    for number in range(rounds):
        for who in measure.in_turn([SERVED, BACKEND], number):
            lead_to(relay.slaves, relay.base if who == SERVED else backend.url)
            server = relay.pid if who == SERVED else backend.process.pid
            values = update_all(relay, server)
            if who == SERVED:
                values["memory"] = measure.most_memory(relay.pid)
            measure.Results.add(group, who, values)
    measure.Results.sort(group, [SERVED, BACKEND])


def measure_beneath(args, results):
    number = QUICK_SLAVES if args.quick else SLAVES
    title = f"One small commit on {number} real slaves beneath a relay that they fetch from"
    group = results.group(title, SERVED, kind="beneath", situation="one small commit")
    with fleet.with_upstream(args, number, "tiny") as slaves:
        slaves.start(BASE_URL=ALIAS.rstrip("/"))
        relay = Relay(slaves, "relay", SLAVELIST=slaves.list)
        os.makedirs(relay.state, exist_ok=True)
        backend = upstream.Server(relay.state)
        try:
            take_turns(relay, backend, group, args.rounds if args.all else 1)
        finally:
            backend.stop()


# -- 60 clones of 100 MB at once


class Pack:
    """What a fetch answers, as it comes: whether it has come whole, by git's own check sum."""

    def __init__(self, answer):
        self.answer = answer
        self.sha = hashlib.sha1()
        self.last = b""  # 20 bytes, which may be the sum

    def packets(self):
        """The packets of an answer up to its end, where there must be a flush packet."""
        while True:
            size = int(self.answer.read(4) or b"-1", 16)
            if size == 0:
                return
            if size > 4:
                yield self.read(size - 4)
            elif size != 1:  # 1 stands between two parts
                raise measure.Failed("an answer has been cut off")

    def read(self, size):
        found = self.answer.read(size)
        if len(found) != size:
            raise measure.Failed("an answer has been cut off")
        return found

    def check(self):
        """Reads all; its bytes."""
        size = 0
        for packet in self.packets():
            if packet[:1] == b"\x03":
                raise measure.Failed(f"git: {packet[1:]!r}")
            if packet[:1] == b"\x01":
                size += len(packet) - 1
                seen = self.last + packet[1:]
                self.sha.update(seen[:-20])
                self.last = seen[-20:]
        if self.sha.digest() != self.last:
            raise measure.Failed(f"a pack of {size} bytes has a bad check sum")
        return size


def packet(text):
    return b"%04x%s" % (len(text) + 4, text)


def ask(port, target, body=None):
    """One request of git's protocol 2; the answer, which is to be read."""
    headers = {"Git-Protocol": "version=2"}
    if body:
        headers["Content-Type"] = "application/x-git-upload-pack-request"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("POST" if body else "GET", target, body, headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise measure.Failed(f"{target}: {answer.status}: {answer.read(300)!r}")
    return answer


def read_clone(relay, commit):
    """Asks what `git clone` asks, and keeps nothing of the pack; its bytes."""
    path = f"/git/{relay.slaves.kind}.git"
    ask(relay.port, path + "/info/refs?service=git-upload-pack").read()
    refs = ask(relay.port, path + "/git-upload-pack", packet(b"command=ls-refs") + b"0000")
    want = commit.encode()
    if want not in refs.read():
        raise measure.Failed(f"{relay.url} doesn't have {commit}")
    options = packet(b"ofs-delta") + packet(b"want " + want) + packet(b"done")
    body = packet(b"command=fetch") + b"0001" + options + b"0000"
    return Pack(ask(relay.port, path + "/git-upload-pack", body)).check()


def clone(url, path):
    """git's own clone, which checks what it gets, and is not kept."""
    try:
        upstream.run_git(".", "clone", "-q", "--bare", url, path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def run_at_once(tasks):
    """Calls functions at once, each in a thread of its own; what went wrong."""
    faults = []
    begin = threading.Barrier(len(tasks))

    def run(task):
        begin.wait()
        try:
            task()
        except (measure.Failed, OSError, http.client.HTTPException, ValueError,
                subprocess.CalledProcessError) as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return faults


def plan_clones(args, relay, size):
    """Functions, one a clone of so many bytes: some are git's, with --all all of them."""
    commit = upstream.run_git(relay.slaves.bare, "rev-parse", "main")
    number = QUICK_CLONES if args.quick else CLONES
    of_git = 1 if args.quick else OF_GIT
    if args.all:
        of_git = number
        if shutil.disk_usage(args.work).free < SPARE * number * size:
            of_git = OF_GIT
            measure.skip(f"{number} clones by git itself", "too little room on the disk")
    folder = os.path.join(args.work, "clone")
    tasks = [lambda number=number: clone(relay.url, folder + str(number))
             for number in range(of_git)]
    return tasks + [lambda: read_clone(relay, commit)] * (number - of_git)


def tell(faults, group, values):
    """Keeps the values of a run, faults counted; raises Failed where there are any."""
    measure.Results.add(group, SERVED, dict(values, failed=len(faults)))
    if faults:
        raise measure.Failed(f"{len(faults)} failed, the first: {faults[0]}")


def measure_clones(args, results):
    with fleet.with_upstream(args, 0, "middle") as slaves:
        os.makedirs(os.path.join(slaves.work, "home"))
        relay = Relay(slaves, "relay")
        relay.update()
        packs = os.scandir(os.path.join(relay.mirror, "objects", "pack"))
        size = sum(entry.stat().st_size for entry in packs)
        tasks = plan_clones(args, relay, size)
        title = f"{len(tasks)} clones at once of {size / 1e6:.0f} MB from one relay"
        group = results.group(title, SERVED, kind="clones", situation="at once")
        measure.forget_memory(relay.pid)
        memory = measure.most_memory(relay.pid)
        before = time.monotonic()
        faults = run_at_once(tasks)
        values = {
            "seconds": time.monotonic() - before,
            "grown": measure.most_memory(relay.pid) - memory,
        }
        tell(faults, group, values)


# -- fetches while the relay is updated


class Client:
    """Fetches into a mirror of its own, again and again, and has git check each outcome."""

    def __init__(self, url, path):
        self.url, self.path = url, path
        self.faults = []
        self.fetches = 0

    def git(self, *args):
        """What git says, on both streams."""
        done = subprocess.run(
            ("git", "--git-dir", self.path, *args),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )
        text = done.stdout.decode(errors="replace")
        if done.returncode:
            raise measure.Failed(f"git {args}: {done.returncode}: {text}")
        return text

    def fetch(self):
        """One fetch, a whole clone now and then."""
        if self.fetches % ANEW_EVERY == 0:
            shutil.rmtree(self.path, ignore_errors=True)
            self.git("clone", "-q", "--mirror", self.url, self.path)
        else:
            self.git("fetch", "-q", "--prune")

    def check(self):
        """Raises Failed unless all is whole, and of one moment: all refs move in one push."""
        said = self.git("fsck", "--full", "--no-dangling", "--no-progress")
        commits = set(self.git("for-each-ref", "--format=%(objectname)").split())
        if said or len(commits) != 1:
            raise measure.Failed(f"git fsck: {said!r}, refs at {commits}")

    def run(self, turns):
        """A fetch a turn, until a turn is None."""
        while turns.get() is not None:
            try:
                self.fetch()
                self.check()
            except measure.Failed as error:
                self.faults.append(repr(error))
            self.fetches += 1


def push(bare, number):
    """A commit that main, a branch and a tag are at; now and then another history."""
    if number % ANEW_EVERY == 0:
        upstream.run_git(bare, "update-ref", "refs/heads/main", "main~3")
    commit = upstream.commit(bare, 1)
    lines = [f"update {name} {commit}\n" for name in ("refs/heads/other", "refs/tags/tag")]
    upstream.run_git(bare, "update-ref", "--stdin", data="".join(lines).encode())


def describe(repo):
    """All refs of a bare repository, and its default branch."""
    head = upstream.run_git(repo, "symbolic-ref", "HEAD")
    return head + "\n" + upstream.run_git(repo, "for-each-ref", DETAILS)


def check_two_tiers(slaves, work, relay, below):
    """Raises Failed unless a mirror clone that came through two relays equals the forge's."""
    below.signal()
    path = os.path.join(work, "through-two-tiers")
    shutil.rmtree(path, ignore_errors=True)
    upstream.run_git(".", "clone", "-q", "--mirror", below.url, path)
    if describe(path) != describe(slaves.bare):
        raise measure.Failed(f"the forge: {describe(slaves.bare)}, two tiers: {describe(path)}")
    for repo in (path, relay.mirror, below.mirror):
        upstream.run_git(repo, "fsck", "--full", "--no-dangling", "--no-progress")


@contextlib.contextmanager
def clients_of(relay, work):
    """Clients, and a queue on which each entry is a fetch; it gets full where they are behind."""
    clients = [Client(relay.url, os.path.join(work, f"client{number}"))
               for number in range(CLIENTS)]
    turns = queue.Queue(CLIENTS)
    threads = [threading.Thread(target=client.run, args=(turns,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield clients, turns
    finally:
        for _ in threads:
            turns.put(None)
        for thread in threads:
            thread.join()


def fetch_during_updates(slaves, work, updates):
    """Clients fetch from a relay while it is updated so often; what failed."""
    relay = Relay(slaves, "relay")
    below = Relay(slaves, "below", BASE_URL=relay.base)
    push(slaves.bare, 1)
    relay.update()
    with clients_of(relay, work) as (clients, turns):
        for number in range(1, updates + 1):
            push(slaves.bare, number)
            for _ in range(FETCHES_EACH):
                turns.put("fetch")
            relay.signal()
            if number % ANEW_EVERY == 0:
                check_two_tiers(slaves, work, relay, below)
    check_two_tiers(slaves, work, relay, below)
    return [fault for client in clients for fault in client.faults]


def measure_fetches(args, results):
    updates = QUICK_UPDATES if args.quick else UPDATES
    title = f"{updates * FETCHES_EACH} fetches from a relay during {updates} updates of it"
    group = results.group(title, SERVED, kind="fetches", situation="during updates")
    with fleet.with_upstream(args, 0, "tiny") as slaves:
        os.makedirs(os.path.join(slaves.work, "home"))
        before = time.monotonic()
        faults = fetch_during_updates(slaves, args.work, updates)
        tell(faults, group, {"seconds": time.monotonic() - before})


def measure_all(args, results):
    """Each in a folder of its own, one after the other."""
    work = args.work
    for measured in (measure_beneath, measure_clones, measure_fetches):
        args.work = os.path.join(work, measured.__name__)
        os.makedirs(args.work)
        measured(args, results)
        shutil.rmtree(args.work)


if __name__ == "__main__":
    measure.run_row("relay", __doc__, measure_all)
