#!/usr/bin/env python3
"""What keys of their own cost a master: a key for each slave beside one secret for all.

    python3 bench/keys.py [--slaves 10000] [--pairs 7] [--no-wait]

Both sign each request to slaves on this machine, and follow updates of 5 s to their end. The two
take turns, strictly one after the other, and in each pair the other one begins. What is told is
the master's CPU time, user and system, and the median of the pairs' ratios, with an interval that
holds the true median with at least 95 % probability (see against.py).
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile

import against
import fanout
import measure

OWN, SHARED = "keys of their own", "one secret"
SECRET = "0123456789abcdef0123456789abcdef"
FILES = {OWN: "--master-key-file", SHARED: "--secret-file"}
MOST = 1.05  # what is promised


def write_secret(folder):
    """The file that both sign with."""
    path = os.path.join(folder, "secret")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="ascii") as handle:
        handle.write(SECRET + "\n")
    return path


def measure_pairs(args, work):
    """The CPU seconds of each pair: [{who: seconds}]."""
    update_s = 0.0 if args.no_wait else fanout.UPDATE_S
    fleet = fanout.Fleet(work, args.slaves, fanout.DELAY_S, update_s=update_s)
    secret = write_secret(work)
    pairs = []
    try:
        argv, mark = fleet.commands(follow=not args.no_wait)[fanout.OURS]
        for number in range(args.pairs):
            pair = {}
            for who in measure.in_turn([OWN, SHARED], number):
                command = [*argv[:2], FILES[who], secret, *argv[2:]]
                pair[who] = fanout.run_counted(command, mark, args.slaves)["cpu"]
            pairs.append(pair)
            print(f"{pair[OWN]:.3f} s {pair[SHARED]:.3f} s", flush=True)
    finally:
        fleet.stop()
    return pairs


def print_ratio(pairs):
    """The medians, and the ratio's median and interval."""
    ratios = [pair[OWN] / pair[SHARED] for pair in pairs]
    low, high = against.interval(ratios)
    for who in (OWN, SHARED):
        print(f"{who}: {statistics.median(pair[who] for pair in pairs):.3f} s of CPU")
    print(
        f"ratio: {statistics.median(ratios):.3f}, the median of {len(pairs)} pairs"
        f" ({low:.3f} .. {high:.3f}); at most {MOST} is promised"
    )


def main(argv):
    parser = argparse.ArgumentParser(
        "keys.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slaves", type=int, default=10000, help="(%(default)s)")
    parser.add_argument("--pairs", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--no-wait", action="store_true", help="signals alone")
    args = parser.parse_args(argv)
    work = tempfile.mkdtemp(prefix="server-update-keys.")
    try:
        print_ratio(measure_pairs(args, work))
    except measure.Failed as error:
        sys.exit(f"keys: {error}")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main(sys.argv[1:])
