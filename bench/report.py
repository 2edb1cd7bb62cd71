#!/usr/bin/env python3
"""Prints the results' tables and writes them to docs/benchmarks.md, with a plot beside it.

    report.py --results DIR [--work DIR] [--out FILE.md]

Ratios first, absolute figures second; medians throughout.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys

import claims
import plot

HEAD = """# Benchmarks

Made by `sh bench/run` on {date}; not to be edited (the last part is `bench/notes.md`).
Medians of {runs} runs in turns, unless a note says otherwise.

![time and memory]({picture})
"""
SHOWN = "## What was to be shown\n"
RATIOS = """## Ratios

How many times the value of the bold row each of the others has. The times to a first result, and
those during which a reader found files missing or of two commits, are as they are.
"""
ABSOLUTE = """## Absolute figures

"CPU" is of the command and all that it starts (not of the server it asks), "extra disk" and
"memory" are the most at any moment beyond what was there before, in one more run that was watched.
"""
FLASK = "import importlib.metadata as m; print('Flask ' + m.version('flask'))"
TOOLS = [
    ("git", "--version"),
    ("python3", "--version"),
    ("curl", "--version"),
    ("ssh", "-V"),
    ("ansible", "--version"),
    ("clush", "--version"),
    ("pdsh", "-V"),
    ("webhook", "-version"),
    ("python-with-flask", "-c", FLASK),
]
HERE = os.path.dirname(os.path.abspath(__file__))
ROW_ORDER = ["update", "given", "fanout", "daemon", "fleet", "at_once", "prompt"]

# metric: what its column is called, how a value is written
METRICS = {
    "seconds": ("time", "s"),
    "median": ("median slave", "s"),
    "first": ("first result", "s"),
    "cpu": ("CPU", "s"),
    "wire": ("over the wire", "MB"),
    "disk": ("extra disk", "MB"),
    "memory": ("memory", "MB"),
    "broken": ("missing or mixed", "ms"),
    "idle": ("idle", "MB"),
    "some": ("after 10,000 signals", "MB"),
    "many": ("after 100,000 more", "MB"),
    "rate": ("signals per second", "1/s"),
    "p99": ("99 % within", "ms"),
}
NO_RATIO = ("broken", "first")


def figure(value, unit):
    """A value as people write it: three digits at most that mean something."""
    if unit == "s":
        return (
            f"{value * 1000:,.0f} ms" if value < 1 else f"{value:,.{1 if value >= 9.95 else 2}f} s"
        )
    if unit == "MB":
        return (
            f"{value * 1000:,.0f} KB"
            if value < 1
            else f"{value:,.{0 if value >= 99.5 else 1}f} MB"
        )
    if unit == "ms":
        return f"{value:,.{0 if value >= 10 or not value else 1}f} ms"
    return f"{value:,.0f}"


def times(value):
    """A ratio: 14 x, 3.2 x, 0.85 x."""
    return f"{value:,.{0 if value >= 20 else 1 if value >= 2 else 2}f} ×"


def medians(group):
    """{who: {metric: median}} of a group."""
    return {
        result["who"]: {
            metric: statistics.median(values) for metric, values in result["values"].items()
        }
        for result in group["results"]
    }


def columns(group):
    seen = [set(result["values"]) for result in group["results"]]
    return [metric for metric in METRICS if any(metric in values for values in seen)]


def table(head, rows):
    """A Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def ratio_table(group):
    """How many times ours each contestant took; what has no ratio as it is."""
    found, shown = medians(group), columns(group)
    ours = found.get(group["ours"], {})
    rows = []
    for who, values in found.items():
        row = [f"**{who}**" if who == group["ours"] else who]
        for metric in shown:
            if metric not in values:
                row.append("")
            elif metric in NO_RATIO:
                row.append(figure(values[metric], METRICS[metric][1]))
            else:
                row.append(times(values[metric] / ours[metric]) if ours.get(metric) else "")
        rows.append(row)
    return table([""] + [METRICS[metric][0] for metric in shown], rows)


def absolute_table(group):
    """Medians, and for the time also the fastest and the slowest run."""
    shown = columns(group)
    rows = []
    for result in group["results"]:
        row = [f"**{result['who']}**" if result["who"] == group["ours"] else result["who"]]
        for metric in shown:
            values = result["values"].get(metric)
            text = figure(statistics.median(values), METRICS[metric][1]) if values else ""
            if metric == "seconds" and values and len(values) > 1:
                text += f" ({figure(min(values), 's')} .. {figure(max(values), 's')})"
            row.append(text)
        rows.append(row)
    return table([""] + [METRICS[metric][0] for metric in shown], rows)


def read_results(folder):
    """The groups of all rows, in the page's order, and the day of the newest."""
    groups, dates = [], []
    for row in ROW_ORDER:
        path = os.path.join(folder, row + ".json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as handle:
                found = json.load(handle)
            groups += found["groups"]
            dates.append(found["date"])
    return groups, max(dates, default="")


def usual_runs(groups):
    """How many timed runs most contestants had."""
    counts = [
        len(result["values"].get("seconds", result["values"].get("rate", [])))
        for group in groups
        for result in group["results"]
    ]
    return max(counts, key=counts.count, default=0)


def first_line(*argv):
    """The first line a tool says of its version, or None where there is no such tool."""
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError:
        return None
    return done.stdout.decode(errors="replace").strip().partition("\n")[0]


def file_system(folder):
    """The type of the file system that a folder is on, as the kernel calls it."""
    folder = os.path.realpath(folder)
    best = ("", "?")
    with open("/proc/mounts", encoding="utf-8", errors="replace") as handle:
        for line in handle:
            point, kind = line.split()[1:3]
            if (folder + "/").startswith(point.rstrip("/") + "/"):
                best = max(best, (point, kind), key=lambda found: len(found[0]))
    return best[1]


def machine(work):
    """What it ran on, as a list of lines."""
    with open("/proc/cpuinfo", encoding="utf-8") as handle:
        models = [
            line.partition(":")[2].strip() for line in handle if line.startswith("model name")
        ]
    with open("/proc/meminfo", encoding="utf-8") as handle:
        memory = int(handle.readline().split()[1]) / 2**20
    cores = f"{os.cpu_count()} cores ({models[0] if models else '?'})"
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    said = [first_line(*tool) for tool in TOOLS if shutil.which(tool[0])]
    return [f"{cores}, {memory:.0f} GB of memory, {system}, files on {file_system(work)}"] + [
        line.split(" (x86")[0] for line in said if line
    ]


def section(text, groups, as_table):
    """The text and every group's table, each with its note."""
    parts = [text]
    for group in groups:
        parts += [f"### {group['title']}\n", as_table(group)]
        parts += [group["note"] + "\n"] if group["note"] else []
    return "\n".join(parts)


def page(groups, date, work, picture):
    """The whole of docs/benchmarks.md."""
    with open(os.path.join(HERE, "notes.md"), encoding="utf-8") as handle:
        notes = handle.read()
    parts = [
        HEAD.format(date=date, picture=picture, runs=usual_runs(groups)),
        "".join(f"- {line}\n" for line in machine(work)),
        SHOWN,
        table(["", "measured", "holds"], claims.rows(groups, medians)),
        section(RATIOS, groups, ratio_table),
        section(ABSOLUTE, groups, absolute_table),
        notes,
    ]
    return "\n".join(parts)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", required=True)
    parser.add_argument("--work", default=".")
    parser.add_argument("--out")
    args = parser.parse_args(argv)
    groups, date = read_results(args.results)
    if not groups:
        sys.exit(f"report.py: no results in {args.results}")
    for group in groups:
        print(f"\n{group['title']}\n\n{absolute_table(group)}")
    if args.out:
        picture = os.path.splitext(args.out)[0] + ".svg"
        with open(picture, "w", encoding="utf-8") as handle:
            handle.write(plot.picture(groups, medians))
        with open(args.out, "w", encoding="utf-8") as handle:
            handle.write(page(groups, date, args.work, os.path.basename(picture)))
        print(f"bench: wrote {args.out} and {picture}")


if __name__ == "__main__":
    main(sys.argv[1:])
