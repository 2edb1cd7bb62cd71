#!/usr/bin/env python3
"""40 real slaves on this machine, all at once and 8 at a time: how long each takes, and the whole.

    at_once.py --work DIR --results DIR [--quick] [--rounds N]

All slaves share this machine's processors and the one upstream, as slaves share a forge.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import fleet
import measure
import upstream

SLAVES, QUICK_SLAVES = 40, 2
WINDOW, QUICK_WINDOW = 8, 1
ALL, WINDOWED = "all at once", "--at-once 8"


def run_update(argv, env, slaves):
    """The seconds of a whole update, and of the median slave from its signal to its outcome."""
    before = time.monotonic()
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, check=False)
    seconds = time.monotonic() - before
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    took = [line["seconds"] for line in lines if line.get("outcome") == "live"]
    if done.returncode or len(took) != slaves:
        raise measure.Failed(f"{argv}: {done.stdout.decode()[-2000:]}")
    return {"seconds": seconds, "median": statistics.median(took)}


def take_turns(slaves, group, rounds, window):
    """Each run brings a commit of its own to all slaves."""
    program = os.path.join(measure.PRODUCT, "server-update")
    base = [sys.executable, program, "--list", slaves.list, "--json"]
    commands = {ALL: base, WINDOWED: [*base, "--at-once", str(window)]}
    run_update([*base, slaves.kind], slaves.environment(), slaves.slaves)
    for number in range(rounds):
        for who in measure.in_turn(list(commands), number):
            upstream.commit(slaves.bare, 1)
            os.sync()
            argv = [*commands[who], slaves.kind]
            values = run_update(argv, slaves.environment(), slaves.slaves)
            measure.Results.add(group, who, values)
    measure.Results.sort(group, list(commands))


def main(argv):
    args = measure.parser(__doc__).parse_args(argv)
    number = QUICK_SLAVES if args.quick else SLAVES
    title = f"One small commit on {number} real slaves, all at once and a few at a time"
    facts = {"kind": "at once", "situation": "one small commit"}
    with measure.kept_results("at_once", args.results) as results:
        with fleet.with_upstream(args, number) as slaves:
            slaves.start()
            group = results.group(title, WINDOWED, **facts)
            rounds, window = (1, QUICK_WINDOW) if args.quick else (args.rounds, WINDOW)
            take_turns(slaves, group, rounds, window)


if __name__ == "__main__":
    main(sys.argv[1:])
