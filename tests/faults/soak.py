"""The long form of the fault suite:  sh tests/run --soak MINUTES    (SEED=n: begin with that seed)

Runs rounds on a fresh fleet every ROUNDS_A_FLEET rounds, on seeds that follow each other from a
random one (or SEED), until the time is up; prints a line a round and a summary. Seeds that
RELAY_EVERY divides are of a fleet with two tiers of relays, the others of a master and its slaves.
A broken promise ends it with exit 1 and the seed that replays it.
"""
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))

from checker import Violation  # noqa: E402
from fleet import Fleet  # noqa: E402
from product import make_bare_python  # noqa: E402
from relays import RelayFleet, check_all_good, run_relay_round  # noqa: E402
from rounds import run_round  # noqa: E402

SLAVES = 20
ROUNDS_A_FLEET = 10
RELAY_EVERY = 4


def prepare(folder):
    """The environment that the tests have: nothing of the caller's, a home, this Python."""
    conftest.pytest_configure(None)
    (folder / "python").mkdir()
    python = make_bare_python(folder / "python")
    (folder / "home").mkdir()
    os.environ.update(HOME=str(folder / "home"), PATH=python + os.pathsep + os.environ["PATH"])


class Kind:
    """Rounds of one kind, on a fleet that is made anew every ROUNDS_A_FLEET rounds."""

    def __init__(self, name, make_fleet, run):
        self.name, self.make_fleet, self.run = name, make_fleet, run
        self.fleet = None
        self.rounds = 0

    def run_round(self, folder, seed):
        """The counts of what was done."""
        if self.rounds % ROUNDS_A_FLEET == 0:
            self.close()
            self.fleet = self.make_fleet(folder / ("%s-%d" % (self.name, self.rounds)))
        self.rounds += 1
        return self.run(self.fleet, seed)

    def close(self):
        """End the fleet."""
        if self.fleet:
            self.fleet.close()
        self.fleet = None


def make_fleet(folder):
    """A master and its slaves, all live."""
    fleet = Fleet(folder, SLAVES)
    fleet.clean_run()
    return fleet


def make_relay_fleet(folder):
    """Two tiers of relays and their leaves, all live."""
    folder.mkdir()
    fleet = RelayFleet(folder)
    problems = list(check_all_good(fleet))
    if problems:
        raise Violation("before any fault: %s" % "\n".join(problems))
    return fleet


def soak(folder, minutes, seed):
    """Rounds until the time is up; the counts of what was done."""
    end, total = time.monotonic() + minutes * 60, {"rounds": 0}
    slaves = Kind("fleet", make_fleet, run_round)
    relays = Kind("relays", make_relay_fleet, run_relay_round)
    try:
        while time.monotonic() < end or not total["rounds"]:
            kind = relays if seed % RELAY_EVERY == 0 else slaves
            try:
                counts = kind.run_round(folder, seed)
            except Exception:
                print("seed %d: broken" % seed, flush=True)
                raise
            print("seed %d: %s: %s" % (seed, kind.name, counts), flush=True)
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
            total["rounds"] += 1
            total[kind.name] = total.get(kind.name, 0) + 1
            seed += 1
    finally:
        slaves.close()
        relays.close()
    return total


def main():
    """Run, and clean up unless something was found."""
    minutes = float(sys.argv[1])
    seed = int(os.environ.get("SEED") or random.randrange(10 ** 6))
    folder = Path(tempfile.mkdtemp(prefix="server-update-soak-"))
    print("first seed %d, %d slaves, %.1f minutes" % (seed, SLAVES, minutes), flush=True)
    prepare(folder)
    began = time.monotonic()
    try:
        total = soak(folder, minutes, seed)
    except Violation as violation:
        print("%s\nall that it left is in %s" % (violation, folder))
        return 1
    print("all kept, in %.1f minutes: %s" % ((time.monotonic() - began) / 60, total))
    shutil.rmtree(str(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
