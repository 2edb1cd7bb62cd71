#!/usr/bin/env python3
"""This checkout beside another version of it: is it as quick?

    sh bench/against COMMIT [--pairs 11] [--quick] [row...]

The scripts of COMMIT come out of git's history into a temporary folder, those of this checkout as
they are now. The two take turns, strictly one after the other; two neighbouring runs are a pair.
What is told of a row is the median of the pairs' ratios (this checkout divided by COMMIT) and an
interval that holds the true median with at least 95 % probability. That is by order statistics:
of 11 pairs the 2nd and the 10th, as 11 coins fall alike but for one or less only 1.2 times in a
hundred. It supposes nothing of how the times are spread.

BENCH_DIR (/var/tmp/server-update-bench) is where it works, and keeps the repositories it makes. On
ext4 without a journal whoever comes second waits for inodes that the first has freed: there no
figure of an update means anything (see the end of docs/benchmarks.md), and it says so.
"""

import argparse
import functools
import glob
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile

import clients
import daemon
import fanout
import measure
import update
import upstream

PAIRS, QUICK_PAIRS = 11, 2
CONFIDENCE = 0.95
SCRIPTS = ("server-update", "slave.py", "slave-activate")
HERE = "this checkout"
SLAVES, QUICK_SLAVES = 10000, 10
CONNECTIONS = 16
LOAD_S, QUICK_LOAD_S = 1.0, 0.2
UPDATE_S = 5
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
METRICS = {"seconds": ("time", "ms"), "cpu": ("CPU", "ms"), "rate": ("signals", "/s")}


class Versions:
    """The two versions' scripts: {name: folder}, COMMIT first."""

    def __init__(self, commit, folder):
        self.root = os.path.dirname(measure.HERE)
        self.other = self.short_hash(commit)
        self.folders = {}
        for name in (self.other, HERE):
            self.folders[name] = os.path.join(folder, "".join(filter(str.isalnum, name)))
            os.mkdir(self.folders[name])
        for script in SCRIPTS:
            path = os.path.join(self.folders[self.other], script)
            with open(path, "wb") as handle:
                handle.write(self.git("show", f"{commit}:./{script}"))
            os.chmod(path, 0o755)
            shutil.copy(os.path.join(self.root, script), self.folders[HERE])

    def git(self, *args):
        """git's output; CalledProcessError, with git's own words on stderr, where it fails."""
        argv = ("git", "-C", self.root, *args)
        return subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout

    def short_hash(self, commit):
        """What COMMIT is called in the table; SystemExit where there is no such commit."""
        argv = ("rev-parse", "--quiet", "--verify", "--short", commit + "^{commit}")
        try:
            return self.git(*argv).decode().strip()
        except subprocess.CalledProcessError:
            print(f"against: no commit {commit!r} in {self.root}", file=sys.stderr)
            raise SystemExit(2)


class Row:
    """What one row measured: the values of each pair, {version: {metric: value}}."""

    def __init__(self, title):
        self.title = title
        self.pairs = []

    def take_turns(self, pairs, versions, run, before_pair=None):
        """Runs both versions, one after the other, that many times; run(version) gives values."""
        for _ in range(pairs):
            if before_pair:
                before_pair()
            self.pairs.append({version: run(version) for version in versions})

    def print(self, other):
        """A line for each metric: both medians, the ratio's median and its interval."""
        title = self.title
        for metric in self.pairs[0][other]:
            old = [pair[other][metric] for pair in self.pairs]
            new = [pair[HERE][metric] for pair in self.pairs]
            ratios = [mine / theirs for mine, theirs in zip(new, old)]
            low, high = interval(ratios)
            name, unit = METRICS[metric]
            print(
                f"{title:34} {name:7} {figure(statistics.median(old), unit):>10}"
                f" {figure(statistics.median(new), unit):>13}"
                f" {statistics.median(ratios):7.3f}   {low:.3f} .. {high:.3f}",
                flush=True,
            )
            title = ""


def figure(value, unit):
    """A median as text; seconds in ms."""
    if unit == "ms":
        return f"{value * 1000:,.1f} ms"
    return f"{value:,.0f} {unit}"


def places(pairs):
    """Which of the sorted values bound the interval, from either end: 0 for the outermost.

    The true median lies outside of the values at place k and -1-k with the probability that of
    so many coins k or less fall on one side, twice.
    """
    place, outside = 0, 2 * 0.5**pairs
    while True:
        outside += 2 * math.factorial(pairs) / (
            math.factorial(place + 1) * math.factorial(pairs - place - 1) * 2**pairs
        )
        if outside > 1 - CONFIDENCE or 2 * (place + 1) >= pairs - 1:
            return place
        place += 1


def interval(ratios):
    """The lowest and the highest value that the true median may have, with CONFIDENCE."""
    found = sorted(ratios)
    place = places(len(found))
    return found[place], found[-1 - place]


class Bench:
    """What all rows need: the versions, the sizes, a folder to work in."""

    def __init__(self, args, base, work, versions):
        self.quick, self.pairs = args.quick, args.pairs
        self.rounds = 1
        self.base, self.work = base, work
        self.versions = versions

    def updates(self, kind):
        """Two rows: slave-activate with one small commit, and with nothing new."""
        kind = "smoke" if self.quick else kind
        os.makedirs(os.path.join(self.work, "upstream"), exist_ok=True)
        os.makedirs(os.path.join(self.work, "home"), exist_ok=True)
        server = upstream.Server(os.path.join(self.work, "upstream"))
        try:
            contest = update.Contest(self, server, kind, self.versions.folders)
            self.copy_upstream(kind, contest.bare)
            for version in self.versions.folders:
                contest.empty(version)
                contest.sh(version, update.ACTIVATE)
            self.one_update(contest, "one small commit", 1)
            self.one_update(contest, "unchanged", 0)
        finally:
            server.stop()

    def copy_upstream(self, kind, bare):
        """A copy of the repository that is kept from run to run, as commits are added to it."""
        kept = os.path.join(self.base, "upstream", kind + ".git")
        if not os.path.exists(kept):
            print(f"bench: making the repository {kind}", flush=True)
            shutil.rmtree(kept + ".new", ignore_errors=True)
            upstream.make(kind, kept + ".new")
            os.rename(kept + ".new", kept)
        shutil.rmtree(bare, ignore_errors=True)
        shutil.copytree(kept, bare)

    def one_update(self, contest, situation, changed):
        row = Row(f"{contest.kind}: {situation}")

        def add_commit():
            if changed:
                upstream.commit(contest.bare, changed)

        def run(version):
            os.sync()
            values = contest.sh(version, update.ACTIVATE)
            contest.check(version, upstream.run_git(contest.bare, "rev-parse", "main"))
            return {"seconds": values["seconds"], "cpu": values["cpu"]}

        row.take_turns(self.pairs, self.versions.folders, run, add_commit)
        row.print(self.versions.other)

    def broadcast(self, follow=False):
        """A row: server-update to many slaves that answer after 50 ms."""
        number = QUICK_SLAVES if self.quick else SLAVES
        update_s = 0.0 if self.quick else UPDATE_S
        row = Row(f"{number:,} slaves " + ("followed" if follow else "signalled"))
        fleet = fanout.Fleet(self.work, number, fanout.DELAY_S, update_s=update_s)

        def run(version):
            commands = fleet.commands(follow, product=self.versions.folders[version])
            values = fanout.run_counted(*commands[fanout.OURS], number)
            return {"seconds": values["seconds"], "cpu": values["cpu"]}

        try:
            row.take_turns(self.pairs, self.versions.folders, run)
        finally:
            fleet.stop()
        row.print(self.versions.other)

    def signals(self):
        """A row: how many signals a second slave.py takes."""
        row = Row(f"signals on {CONNECTIONS} connections")

        def run(version):
            folder = self.versions.folders[version]
            slave = daemon.Slave(daemon.OURS, os.path.join(folder, "slave"), folder)
            try:
                return self.load(slave)
            finally:
                slave.stop()

        row.take_turns(self.pairs, self.versions.folders, run)
        row.print(self.versions.other)

    def load(self, slave):
        """Signals a second, and CPU seconds a signal, of the slave and what it has started."""
        run = clients.Clients(slave.port, slave.path, CONNECTIONS)
        before = cpu_seconds(slave.process.pid)
        took = run.run(seconds=QUICK_LOAD_S if self.quick else LOAD_S)
        used = max(cpu_seconds(slave.process.pid) - before, 1 / TICKS_PER_S)
        number = len(run.latencies)
        return {"rate": number / took, "cpu": used / number}


def cpu_seconds(pid):
    """What a process and those of its children that have ended took, user and system."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as handle:
        fields = handle.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS_PER_S  # proc(5): utime stime cutime cstime


ROWS = {
    "tiny": functools.partial(Bench.updates, kind="tiny"),
    "middle": functools.partial(Bench.updates, kind="middle"),
    "files-50000": functools.partial(Bench.updates, kind="files-50000"),
    "broadcast": Bench.broadcast,
    "followed": functools.partial(Bench.broadcast, follow=True),
    "signals": Bench.signals,
}
BY_DEFAULT = ["tiny", "middle", "files-50000", "broadcast", "signals"]
QUICK = ["tiny", "broadcast", "signals"]


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="against",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("commit", help="the other version, as git names it")
    parser.add_argument(
        "rows", metavar="row", nargs="*", help=f"{', '.join(ROWS)} (all but followed)"
    )
    parser.add_argument("--pairs", type=int, help=f"how many runs of each ({PAIRS})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it all work?")
    args = parser.parse_intermixed_args(argv)
    for row in args.rows:
        if row not in ROWS:
            parser.error(f"unknown row {row!r}: it is one of {', '.join(ROWS)}")
    if not args.rows:
        args.rows = QUICK if args.quick else BY_DEFAULT
    if args.pairs is None:
        args.pairs = QUICK_PAIRS if args.quick else PAIRS
    if args.pairs < 1:
        parser.error("--pairs takes a number of at least 1")
    return args


def put_python_first(folder):
    """As bench/run does: where python3 is a script (pyenv), its start costs more than the rest."""
    os.mkdir(folder)
    os.symlink(os.path.realpath(sys.executable), os.path.join(folder, "python3"))
    os.environ["PATH"] = folder + ":" + os.environ["PATH"]
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def warn_without_journal(folder):
    """Says so where files lie on an ext4 without a journal."""
    number = os.stat(folder).st_dev
    device = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    name = os.path.basename(device)
    is_ext4 = os.path.isdir("/proc/fs/ext4/" + name)
    if is_ext4 and not glob.glob(f"/proc/fs/jbd2/{name}-*"):
        print(f"bench: {folder} is on ext4 WITHOUT A JOURNAL: updates are not comparable there")


def print_head(other, pairs):
    place = places(pairs)
    words = f"of {pairs} pairs; interval: from value {place + 1} to {pairs - place} of the sorted"
    print(f"ratio: {HERE} divided by {other}, the median {words} ratios")
    print(f"{'':34} {'':7} {other:>10} {HERE:>13} {'ratio':>7}   95 % interval", flush=True)


def end_cleanly(number, _):
    """A signal ends it as an exception does: what it started ends, and its folder goes."""
    raise SystemExit(128 + number)


def main(argv):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, end_cleanly)
    signal.signal(signal.SIGHUP, end_cleanly)
    base = os.environ.get("BENCH_DIR") or "/var/tmp/server-update-bench"
    os.makedirs(os.path.join(base, "upstream"), exist_ok=True)
    work = tempfile.mkdtemp(prefix="against.", dir=base)
    try:
        put_python_first(os.path.join(work, "bin"))
        warn_without_journal(work)
        bench = Bench(args, base, work, Versions(args.commit, work))
        print_head(bench.versions.other, args.pairs)
        for row in args.rows:
            ROWS[row](bench)
    except (measure.Failed, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"against: {error}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
