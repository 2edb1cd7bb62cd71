#!/usr/bin/env python3
"""Prints the results' tables, and writes them to docs/benchmarks.md.

    report.py --results DIR [--work DIR] [--out FILE.md]

The page has ratios of medians; beside it are FILE.json with all figures, and a plot.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys

import claims
import plot

HEAD = """# Benchmarks

Made by `sh bench/run` on {date}; not to be edited (the last part is `bench/notes.md`).
Medians of {runs} runs in turns; the fastest and the slowest, CPU, disk and memory are in
[{data}]({data}).

![time and memory]({picture})
"""
SHOWN = "## What was to be shown\n"
RATIOS = """## Ratios

What is bold is as it was measured; the others took so many times that. For how long a reader found
files missing or of two commits is as it is.
"""
# Tables with a group a line: their headings, the kinds of groups, the metrics that get one each.
FAMILIES = [
    ("Updates", r"tiny|middle|files-\d+|given", ["seconds", "wire", "broken"]),
    ("A signal to all slaves", r"signal-\d+|followed", ["seconds"]),
    ("A command over ssh, beside a signal", "shells", ["seconds", "cpu"]),
    ("Signals that a slave takes", "daemon", ["rate", "p99"]),
]
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
ROW_ORDER = ["update", "given", "fanout", "daemon", "fleet", "at_once", "push", "relay", "prompt",
             "seen"]

# metric: what its column is called, how a value is written
METRICS = {
    "seconds": ("time", "s"),
    "median": ("median slave", "s"),
    "first": ("first result", "s"),
    "cpu": ("CPU", "s"),
    "wire": ("over the wire", "MB"),
    "clones": ("clones from the forge", ""),
    "failed": ("failures", ""),
    "disk": ("extra disk", "MB"),
    "memory": ("memory", "MB"),
    "grown": ("memory grew by", "MB"),
    "broken": ("missing or mixed", "ms"),
    "idle": ("idle", "MB"),
    "some": ("after 10,000 signals", "MB"),
    "many": ("after 100,000 more", "MB"),
    "rate": ("signals per second", "1/s"),
    "typical": ("median", "ms"),
    "p99": ("99 % within", "ms"),
}
NO_RATIO = ("broken", "first", "clones", "failed")


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


def summary(group):
    """A group with the median, the fastest and the slowest run in place of all its values."""
    results = [
        {
            "who": result["who"],
            "runs": max(map(len, result["values"].values()), default=0),
            "values": {metric: spread(values) for metric, values in result["values"].items()},
        }
        for result in group["results"]
    ]
    return dict(group, results=results)


def spread(values):
    figures = (statistics.median(values), min(values), max(values))
    return dict(zip(("median", "min", "max"), (float(f"{one:.4g}") for one in figures)))


def medians(group):
    """{who: {metric: median}} of a summary."""
    return {
        result["who"]: {metric: one["median"] for metric, one in result["values"].items()}
        for result in group["results"]
    }


def columns(group):
    seen = [set(result["values"]) for result in group["results"]]
    return [metric for metric in METRICS if any(metric in values for values in seen)]


def table(head, rows):
    """A Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def cell(values, ours, metric, is_ours):
    """A figure where it is ours or has no ratio, else how many times ours it is."""
    value, base = values.get(metric), ours.get(metric)
    if value is None:
        return ""
    if is_ours or metric in NO_RATIO:
        return figure(value, METRICS[metric][1])
    return times(value / base) if base else ""


def ratio_table(group):
    """A contestant a line, a metric a column."""
    found, shown = medians(group), columns(group)
    ours = found.get(group["ours"], {})
    rows = []
    for who, values in found.items():
        is_ours = who == group["ours"]
        row = [cell(values, ours, metric, is_ours) for metric in shown]
        rows.append([f"**{who}**" if is_ours else who, *row])
    return table([""] + [METRICS[metric][0] for metric in shown], rows)


def family_table(groups, metric):
    """A group a line, a contestant a column."""
    whos = list(dict.fromkeys(who for group in groups for who in medians(group)))
    whos = [who for who in whos if any(metric in medians(group).get(who, {}) for group in groups)]
    rows = []
    for group in groups:
        found, ours = medians(group), group["ours"]
        values = [
            cell(found.get(who, {}), found.get(ours, {}), metric, who == ours) for who in whos
        ]
        if any(values):
            rows.append([group["title"], *values])
    owners = {group["ours"] for group in groups}
    heads = [f"**{who}**" if who in owners else who for who in whos]
    return table([METRICS[metric][0], *heads], rows)


def absolute_table(group):
    """For the terminal: medians, and for the time also the fastest and the slowest run."""
    shown = columns(group)
    rows = []
    for result in group["results"]:
        row = [f"**{result['who']}**" if result["who"] == group["ours"] else result["who"]]
        for metric in shown:
            one = result["values"].get(metric)
            text = figure(one["median"], METRICS[metric][1]) if one else ""
            if metric == "seconds" and one and result["runs"] > 1:
                text += f" ({figure(one['min'], 's')} .. {figure(one['max'], 's')})"
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
            groups += map(summary, found["groups"])
            dates.append(found["date"])
    return groups, max(dates, default="")


def usual_runs(groups):
    """How many timed runs most contestants had."""
    counts = [result["runs"] for group in groups for result in group["results"]]
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


def is_of(group, kinds):
    rates = group.get("kind") == "daemon" and group.get("situation") == "memory"
    return bool(re.fullmatch(kinds, group.get("kind") or "")) and not rates


def ratios(groups):
    """The families' tables, then those of groups that are in none."""
    parts, left = [RATIOS], list(groups)
    for heading, kinds, metrics in FAMILIES:
        members = [group for group in groups if is_of(group, kinds)]
        left = [group for group in left if group not in members]
        if members:
            parts.append(f"### {heading}\n")
            parts += [family_table(members, metric) for metric in metrics]
    for group in left:
        parts += [f"### {group['title']}\n", ratio_table(group)]
        parts += [group["note"] + "\n"] if group.get("note") else []
    return "\n".join(parts)


def page(groups, date, machine_lines, name):
    """The whole of docs/benchmarks.md; name is what its plot and its data are called."""
    with open(os.path.join(HERE, "notes.md"), encoding="utf-8") as handle:
        notes = handle.read()
    runs = usual_runs(groups)
    head = HEAD.format(date=date, picture=name + ".svg", data=name + ".json", runs=runs)
    parts = [
        head,
        "".join(f"- {line}\n" for line in machine_lines),
        SHOWN,
        table(["", "measured", "holds"], claims.rows(groups, medians)),
        ratios(groups),
        notes,
    ]
    return "\n".join(parts)


def as_json(groups, date, machine_lines):
    """All figures, in seconds and MB ("broken" and "p99" in ms, "rate" in signals a second)."""
    lines = [json.dumps(group, ensure_ascii=False) for group in groups]
    head = json.dumps({"date": date, "machine": machine_lines}, ensure_ascii=False)
    return head[:-1] + ', "groups": [\n' + ",\n".join(lines) + "\n]}\n"


def write(path, text):
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(text)


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
        base = os.path.splitext(args.out)[0]
        lines = machine(args.work)
        write(base + ".svg", plot.picture(groups, medians))
        write(base + ".json", as_json(groups, date, lines))
        write(args.out, page(groups, date, lines, os.path.basename(base)))
        print(f"bench: wrote {args.out}, and beside it {base}.json and {base}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
