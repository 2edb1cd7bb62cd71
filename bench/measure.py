"""Runs commands and measures them, watches a tree that is updated, keeps the values.

A row's result file is {"row", "date", "groups": [{"title", "note", "ours", "results": [{"who",
"values": {metric: [one value a run]}}]}]}; "ours" is who the ratios are to; report.py names the
metrics.
"""

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# bench/run measures copies of the scripts, so that they may be edited meanwhile
PRODUCT = os.environ.get("BENCH_PRODUCT") or os.path.dirname(HERE)
SAMPLE_S = 0.002
ROUNDS = 3


class Failed(Exception):
    """What was to be measured did not do its work."""


def skip(what, why):
    """Says loudly that a figure will be missing."""
    print(f"bench: WITHOUT {what}: {str(why)[:300]}", flush=True)


def run_measured(argv, env, cwd=None, started=None):
    """Seconds and CPU seconds of argv and its children; raises Failed; calls started(pid)."""
    with open(os.devnull) as null:
        before = time.monotonic()
        child = subprocess.Popen(
            argv, env=env, cwd=cwd, stdin=null, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            if started:
                started(child.pid)
            output = child.stdout.read()
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            stop(child)
            raise
        child.stdout.close()
        seconds = time.monotonic() - before
    child.returncode = status
    if status:
        raise Failed(f"{argv}: status {status}: {output.decode(errors='replace')[-2000:]}")
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime}


def stop(process):
    """Has a process of the benchmark's own end, and waits for that."""
    process.terminate()
    process.wait()
    if process.stdout:
        process.stdout.close()


def in_turn(whos, number):
    """Who runs when in a round: each of them begins one round after the other."""
    turn = number % len(whos)
    return whos[turn:] + whos[:turn]


def family(pid):
    """pid and all that it has started and that still runs."""
    pids = [pid]
    for parent in pids:
        try:
            with open(f"/proc/{parent}/task/{parent}/children") as handle:
                pids += map(int, handle.read().split())
        except OSError:
            pass  # it has just ended
    return pids


def own_bytes(pids):
    """Memory that processes have for themselves: resident, without what is mapped from files.

    (ru_maxrss is of no use here: it begins with what the process that forked had.)
    """
    pages = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as handle:
                _, resident, shared = handle.read().split()[:3]
        except (OSError, ValueError):
            continue
        pages += int(resident) - int(shared)
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid):
    """Processor seconds of a process and of all that it has started and waited for."""
    with open(f"/proc/{pid}/stat") as handle:
        spent = handle.read().rpartition(")")[2].split()[11:15]
    return sum(map(int, spent)) / os.sysconf("SC_CLK_TCK")


def most_memory(pid):
    """The most that a process itself has had resident since forget_memory(), in MB."""
    with open(f"/proc/{pid}/status", encoding="ascii") as handle:
        (line,) = [line for line in handle if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def forget_memory(pid):
    """Has the kernel begin anew with what most_memory() tells: see proc(5), clear_refs."""
    with open(f"/proc/{pid}/clear_refs", "w") as handle:
        handle.write("5")


class Watcher(threading.Thread):
    """Looks at a tree by path over and over, at its file system's space, at a process's memory.

    A look reads the first file, the last, and the first again: where the first changed in between,
    the look straddled a switch and says nothing. Otherwise both must be there and be the same.
    """

    def __init__(self, tree, first, last):
        super().__init__(daemon=True)
        self.first, self.last = os.path.join(tree, first), os.path.join(tree, last)
        self.folder = os.path.dirname(tree)
        self.done = threading.Event()
        self.broken_s = 0.0
        self.used_before = self.used()
        self.used_most = self.used_before
        self.pid = None
        self.memory_most = 0

    def used(self):
        """Bytes in use in the file system, what waits to be written included."""
        seen = os.statvfs(self.folder)
        return (seen.f_blocks - seen.f_bfree) * seen.f_frsize

    def is_whole(self):
        try:
            texts = []
            for path in (self.first, self.last, self.first):
                with open(path, "rb") as handle:
                    texts.append(handle.read())
        except OSError:
            return False
        return texts[0] != texts[2] or texts[0] == texts[1] != b""

    def run(self):
        last, sampled = time.monotonic(), 0.0
        while not self.done.is_set():
            whole = self.is_whole()
            now = time.monotonic()
            if not whole:
                self.broken_s += now - last
            last = now
            if now - sampled > SAMPLE_S:
                self.used_most, sampled = max(self.used_most, self.used()), now
                if self.pid:
                    self.memory_most = max(self.memory_most, own_bytes(family(self.pid)))

    def stop(self):
        """Milliseconds that a reader was let down; the most extra disk and memory, in MB."""
        self.done.set()
        self.join()
        return {
            "broken": self.broken_s * 1000,
            "disk": (self.used_most - self.used_before) / 1e6,
            "memory": self.memory_most / 1e6,
        }

    def follow(self, pid):
        self.pid = pid


class Results:
    """The values of one row, group by group, written when the row is done."""

    def __init__(self, row):
        self.row = row
        self.groups = []

    def group(self, title, ours, note="", **facts):
        """A table to be: ratios are to ours; facts (plot, x) say where its values are plotted."""
        print(f"bench: {time.strftime('%H:%M:%S')}  {title}", flush=True)
        self.groups.append(dict(facts, title=title, ours=ours, note=note, results=[]))
        return self.groups[-1]

    @staticmethod
    def add(group, who, values):
        """Adds one run's values to what this contestant has in the group."""
        for result in group["results"]:
            if result["who"] == who:
                break
        else:
            result = {"who": who, "values": {}}
            group["results"].append(result)
        for metric, value in values.items():
            result["values"].setdefault(metric, []).append(value)

    @staticmethod
    def sort(group, whos):
        """Brings the contestants into an order, whoever ran first."""
        group["results"].sort(key=lambda result: whos.index(result["who"]))

    def write(self, folder):
        groups = [group for group in self.groups if group["results"]]
        found = {"row": self.row, "date": str(datetime.date.today()), "groups": groups}
        path = os.path.join(folder, self.row + ".json")
        with open(path + ".new", "w", encoding="utf-8") as handle:
            json.dump(found, handle, indent=1)
        os.replace(path + ".new", path)


def parser(doc):
    """What every row takes; doc is the docstring of its program."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--work", required=True, help="an empty folder to work in")
    found.add_argument("--results", required=True, help="the folder that the values go to")
    found.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    found.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each (%(default)s)")
    found.add_argument("--all", action="store_true", help="also what takes long")
    return found


@contextlib.contextmanager
def kept_results(row, folder):
    """The Results of a row, written in any case; a failure ends the program with one line."""
    results = Results(row)
    try:
        yield results
    except (Failed, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{row}: {error}")
    finally:
        results.write(folder)


def run_row(row, doc, measure_all):
    """The whole program of a row: its arguments, measure_all(args, results), what it keeps."""
    args = parser(doc).parse_args()
    with kept_results(row, args.results) as results:
        measure_all(args, results)
