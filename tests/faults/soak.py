"""The long form of the fault suite:  sh tests/run --soak MINUTES    (SEED=n: begin with that seed)

Runs rounds on a fresh fleet every ROUNDS_A_FLEET rounds, on seeds that follow each other from a
random one (or SEED), until the time is up; prints a line a round and a summary. A broken promise
ends it with exit 1 and the seed that replays it.
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
from product import PYTHON  # noqa: E402
from rounds import run_round  # noqa: E402

SLAVES = 20
ROUNDS_A_FLEET = 10


def prepare(folder):
    """The environment that the tests have: nothing of the caller's, a home, this Python."""
    conftest.pytest_configure(None)
    (folder / "python").mkdir()
    (folder / "python" / "python3").symlink_to(PYTHON)
    (folder / "home").mkdir()
    os.environ.update(HOME=str(folder / "home"),
                      PATH=str(folder / "python") + os.pathsep + os.environ["PATH"])


def soak(folder, minutes, seed):
    """Rounds until the time is up; the counts of what was done."""
    end, total, fleet = time.monotonic() + minutes * 60, {"rounds": 0}, None
    try:
        while time.monotonic() < end or not total["rounds"]:
            if total["rounds"] % ROUNDS_A_FLEET == 0:
                if fleet:
                    fleet.close()
                fleet = Fleet(folder / ("fleet-%d" % total["rounds"]), SLAVES)
                fleet.clean_run()
            try:
                counts = run_round(fleet, seed)
            except Exception:
                print("seed %d: broken" % seed, flush=True)
                raise
            print("seed %d: %s" % (seed, counts), flush=True)
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
            total["rounds"] += 1
            seed += 1
    finally:
        fleet.close()
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
