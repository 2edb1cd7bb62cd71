#!/usr/bin/env python3
"""What it costs a slave to be looked at: signals while all views are asked for, and while none is.

    seen.py --work DIR --results DIR [--quick] [--rounds N]

The slave has 1,000 repositories with a tree each. Signals come from 16 clients without a pause, in
turns: for 5 s nobody looks; for 5 s somebody does once, at JSON, page and metrics.
"""
import json
import os
import statistics
import threading
import time
import urllib.request

import clients
import daemon
import measure

REPOSITORIES, QUICK_REPOSITORIES = 1000, 20
CLIENTS = 16
SECONDS, QUICK_SECONDS = 5, 0.5
UNSEEN, SEEN = "nobody looks", "seen once in 5 s"
VIEWS = (("/status", "*/*"), ("/status", "text/html"), ("/metrics", "*/*"))
COMMIT = "1d5d931e0c3a1f0b8e5b0c6f7a2d4e6f8091a2b3"


def lay_out(folder, number):
    """Repositories as slave-activate leaves them: a tree on a branch, a record."""
    state = os.path.join(folder, "repos", ".server-update")
    os.makedirs(state)
    for count in range(number):
        name = f"repository-{count:04}"
        git = os.path.join(folder, "repos", name, ".git")
        os.makedirs(os.path.join(git, "refs/heads"))
        for path, text in (("HEAD", "ref: refs/heads/main"), ("refs/heads/main", COMMIT)):
            with open(os.path.join(git, path), "w", encoding="ascii") as handle:
                handle.write(text + "\n")
        open(os.path.join(git, "..", "index.html"), "w").close()
        record = {"repo": name, "update": 1, "ref": None, "state": "live", "requested": 1,
                  "started": 1, "finished": 2, "commit": COMMIT, "previous": None, "message": "",
                  "tries": 1}
        with open(os.path.join(state, name + ".json"), "w", encoding="ascii") as handle:
            json.dump(record, handle)


def look(port):
    """Asks for all views; the seconds of that."""
    before = time.monotonic()
    for path, accept in VIEWS:
        asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", None, {"Accept": accept})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            if not answer.read():
                raise measure.Failed(f"{path} is empty")
    return time.monotonic() - before


def signals(slave, seconds, is_seen):
    """The values of so many seconds of signals; all views are asked for in the midst of them."""
    run = clients.Clients(slave.port, slave.path, CLIENTS)
    took = []
    looker = threading.Timer(seconds / 3, lambda: took.append(look(slave.port)))
    if is_seen:
        looker.start()
    whole = run.run(seconds=seconds)
    if is_seen:
        looker.join()
        if not took:
            raise measure.Failed("nobody could look")
    times = sorted(run.latencies)
    return {
        "typical": statistics.median(times) * 1000,
        "p99": times[int(len(times) * 0.99)] * 1000,
        "rate": len(times) / whole,
    }


def measure_all(args, results):
    number = QUICK_REPOSITORIES if args.quick else REPOSITORIES
    seconds = QUICK_SECONDS if args.quick else SECONDS
    title = f"Signals to a slave with {number:,} repositories that is looked at"
    group = results.group(title, UNSEEN, kind="seen", situation="seen")
    lay_out(os.path.join(args.work, "slavepy"), number)
    slave = daemon.Slave(daemon.OURS, args.work)
    try:
        for turn in range(1 if args.quick else args.rounds):
            for who in measure.in_turn([UNSEEN, SEEN], turn):
                measure.Results.add(group, who, signals(slave, seconds, who == SEEN))
    finally:
        slave.stop()
    measure.Results.sort(group, [UNSEEN, SEEN])


if __name__ == "__main__":
    measure.run_row("seen", __doc__, measure_all)
