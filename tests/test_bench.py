"""The benchmark works, at its smallest, and its page says what was measured."""

import json
import os
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from product import ROOT

MAX_LINES = 280
REPORT = str(ROOT / "bench" / "report.py")


def run(*argv, **env):
    return subprocess.run(
        argv,
        env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1", **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        encoding="utf-8",
    )


def group(title, plot=None, **results):
    found = [{"who": who.replace("_", "-"), "values": values} for who, values in results.items()]
    facts = {"kind": "middle", "situation": "one small commit", "note": ""}
    return dict(facts, title=title, ours="slave-activate", plot=plot or {}, results=found)


@pytest.fixture
def page(tmp_path):
    """Writes results, runs the report on them; the page's text."""

    def write(*groups):
        found = {"row": "update", "date": "2026-11-23", "groups": groups}
        (tmp_path / "update.json").write_text(json.dumps(found), encoding="utf-8")
        out = tmp_path / "page.md"
        done = run(sys.executable, REPORT, "--results", str(tmp_path), "--out", str(out))
        assert done.returncode == 0, done.stdout
        return out.read_text(encoding="utf-8")

    return write


def rows(text, who):
    heads = ("| %s |" % who, "| **%s** |" % who)
    return [line for line in text.splitlines() if line.startswith(heads)]


def test_ratios_are_of_medians_and_figures_beside_the_page(page, tmp_path):
    ours = {"seconds": [0.2, 9.0, 0.25], "wire": [0.003], "broken": [0]}
    clone = {"seconds": [2.0, 2.0, 99.0], "wire": [105.0], "broken": [1234]}
    text = page(group("A repository", slave_activate=ours, git_clone=clone))
    for metric, row in (
        ("time", "| A repository | 250 ms | 8.0 × |"),
        ("over the wire", "| A repository | 3 KB | 35,000 × |"),
        ("missing or mixed", "| A repository | 0 ms | 1,234 ms |"),
    ):
        head = "| %s | **slave-activate** | git-clone |\n|---|---:|---:|\n" % metric
        assert head + row + "\n" in text
    found = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    ours, clone = found["groups"][0]["results"]
    assert ours["values"]["seconds"] == {"median": 0.25, "min": 0.2, "max": 9.0}
    assert (clone["who"], clone["runs"]) == ("git-clone", 3)
    assert clone["values"]["wire"]["median"] == 105


def test_a_group_of_no_family_has_a_table_of_its_own(page):
    one = group("Something else", slave_activate={"seconds": [0.2]}, other={"seconds": [0.5]})
    text = page(dict(one, kind="else"))
    assert rows(text, "slave-activate") == ["| **slave-activate** | 200 ms |"]
    assert rows(text, "other") == ["| other | 2.5 × |"]


def test_the_page_that_is_here_is_short_and_is_of_its_data():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    found = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))
    titles = [one["title"] for one in found["groups"]]
    assert len(titles) > 10 and all(title in text for title in titles)


def test_a_bound_that_is_missed_says_no(page):
    ours, clone = {"seconds": [0.5]}, {"seconds": [2.0]}
    found = {"slave-activate": ours, "rm -rf && git clone": clone}
    text = page(group("A repository", **found))
    (row,) = [line for line in text.splitlines() if "at least 8 times" in line]
    assert row.endswith("| 4 | **no** |")
    found["slave-activate"] = {"seconds": [0.25]}
    text = page(group("A repository", **found))
    (row,) = [line for line in text.splitlines() if "at least 8 times" in line]
    assert row.endswith("| 8 | yes |")
    (row,) = [line for line in text.splitlines() if "git's own, one small commit: a clone" in line]
    assert row.endswith("| not measured |  |")


def test_the_page_tells_day_machine_versions_and_keeps_the_notes(page):
    text = page(group("A repository", slave_activate={"seconds": [1.0]}))
    assert "on 2026-11-23" in text
    assert re.search(r"^- \d+ cores \(.*\), \d+ GB of memory, Linux .*, files on \w+", text, re.M)
    assert re.search(r"^- git version \d", text, re.M)
    assert text.endswith((ROOT / "bench" / "notes.md").read_text(encoding="utf-8"))


def test_the_plot_has_a_curve_for_each_with_all_its_points(page, tmp_path):
    def values(seconds):
        return {"seconds": [seconds], "memory": [10 * seconds]}

    for_each = {files: values(files / 1e4) for files in (500, 40, 5000)}
    page(
        *[
            group("A", {"files": files}, **{"slave-activate": ours, "the limit": values(1)})
            for files, ours in for_each.items()
        ]
    )
    svg = ElementTree.parse(str(tmp_path / "page.svg")).getroot()
    curves = svg.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(curve.get("points").split()) for curve in curves] == [3, 3, 3, 3]
    across = [float(point.split(",")[0]) for point in curves[0].get("points").split()]
    assert across == sorted(across)
    words = [text.text for text in svg.findall("{http://www.w3.org/2000/svg}text")]
    assert {"time", "memory", "files in the tree", "slave-activate", "the limit"} <= set(words)


@pytest.mark.slow
def test_every_row_works_at_its_smallest(tmp_path):
    out = tmp_path / "docs" / "benchmarks.md"
    options = ("--quick", "--no-peers", "--out", str(out))
    done = run("sh", str(ROOT / "bench" / "run"), *options, BENCH_DIR=str(tmp_path / "bench"))
    assert done.returncode == 0, done.stdout
    text = out.read_text(encoding="utf-8")
    for title in ("first clone", "unchanged", "one small commit", "A signal to 10 slaves",
                  "Memory of a slave", "Signals from 16 clients", "on 2 real slaves",
                  "From a push to a relay and 2 real slaves", "2 real slaves beneath a relay",
                  "3 clones at once of 0 MB", "15 fetches from a relay", "How soon"):
        assert title in text
    assert re.search(r"(?m)^bench: took \d+ min \d+ s in all$", done.stdout)
    assert [path.name for path in (tmp_path / "bench").glob("work.*")] == []
    limit = [line for line in text.splitlines() if line.startswith("| the limit")]
    assert len(limit) == 2  # unchanged and one small commit


def test_an_unknown_row_is_a_mistake(tmp_path):
    done = run("sh", str(ROOT / "bench" / "run"), "updates", BENCH_DIR=str(tmp_path / "bench"))
    assert (done.returncode, done.stdout) == (
        2,
        "bench: unknown row or option 'updates'; see --help\n",
    )


def test_no_results_are_a_mistake(tmp_path):
    done = run(sys.executable, REPORT, "--results", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == "report.py: no results in %s\n" % tmp_path


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one commit: the scripts and the benchmark as they are now."""
    root = tmp_path / "checkout"
    shutil.copytree(str(ROOT / "bench"), str(root / "bench"))
    for script in ("server-update", "slave.py", "slave-activate"):
        shutil.copy(str(ROOT / script), str(root / script))
    git("init", "-q", str(root))
    git("-C", str(root), "add", ".")
    git("-C", str(root), "commit", "-q", "-m", "as it is")
    return root


def git(*args):
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
    done = run("git", *who, *args)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def against(checkout, *args):
    work = str(checkout.parent / "bench")
    return run("sh", str(checkout / "bench" / "against"), *args, BENCH_DIR=work)


@pytest.mark.slow
def test_two_versions_are_compared_row_by_row(checkout):
    slow = "#!/bin/sh\nsleep 0.5\nexec '%s' \"$@\"\n" % (ROOT / "slave-activate")
    (checkout / "slave-activate").write_text(slow, encoding="utf-8")
    done = against(checkout, "HEAD", "--quick")
    assert done.returncode == 0, done.stdout
    head = git("-C", str(checkout), "rev-parse", "--short", "HEAD")
    assert "ratio: this checkout divided by %s, the median of 2 pairs" % head in done.stdout
    found = {line[:34].strip(): line[34:].split() for line in done.stdout.splitlines()
             if line[34:].split()[:1] in (["time"], ["signals"])}
    assert list(found) == ["smoke: one small commit", "smoke: unchanged",
                           "10 slaves signalled", "signals on 16 connections"]
    _, _, _, new, _, ratio, low, _, high = found["smoke: one small commit"]
    assert float(new.replace(",", "")) > 500
    assert 0 < float(low) <= float(ratio) <= float(high)
    assert os.listdir(str(checkout.parent / "bench")) == ["upstream"]


def test_a_comparison_that_is_ended_leaves_nothing(checkout):
    base = checkout.parent / "bench"
    command = ["sh", str(checkout / "bench" / "against"), "HEAD", "--quick", "tiny"]
    env = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", BENCH_DIR=str(base))
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as process:
        assert any(line.startswith(b"ratio:") for line in process.stdout)
        process.terminate()
    assert process.returncode == 128 + 15
    assert os.listdir(str(base)) == ["upstream"]


@pytest.mark.parametrize("args, message", [
    (["nope", "--quick"], "against: no commit 'nope' in "),
    (["HEAD", "nope"], "against: error: unknown row 'nope': it is one of tiny, middle, "),
    (["HEAD", "--pairs", "0"], "against: error: --pairs takes a number of at least 1"),
])
def test_a_comparison_that_cannot_be_made_is_a_mistake(checkout, args, message):
    done = against(checkout, *args)
    assert done.returncode == 2
    assert message in done.stdout
    assert "Traceback" not in done.stdout


def test_the_interval_is_that_of_order_statistics():
    """Of n pairs the places of the bounds: tables of the sign test have them so (n = 6 .. 40)."""
    program = "import against; print([against.places(n) for n in (1, 2, 5, 6, 9, 11, 20, 40)])"
    done = run(sys.executable, "-c", program, PYTHONPATH=str(ROOT / "bench"))
    assert done.stdout.strip() == "[0, 0, 0, 0, 1, 1, 5, 13]"


def test_the_price_of_keys_is_a_ratio_of_pairs(tmp_path):
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(ROOT / "bench" / "keys.py"), "--slaves=3", "--pairs=2"]
    done = run(*command, "--no-wait", TMPDIR=str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout
    seconds = r"\d+\.\d{3} s"
    pair = "%s %s\n" % (seconds, seconds)
    ratio = r"ratio: \d\.\d{3}, the median of 2 pairs \(.*\); at most 1\.05 is promised\n"
    medians = "keys of their own: %s of CPU\none secret: %s of CPU\n" % (seconds, seconds)
    assert re.fullmatch(pair * 2 + medians + ratio, done.stdout), done.stdout
    assert os.listdir(str(tmp_path / "work")) == []
