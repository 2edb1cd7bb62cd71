"""docs/outcomes.md says what each option makes of each outcome; here the program is asked."""

import json
import re
import signal

import pytest
from farm import COMMIT, at_once, error, hold, http, raw, record, updates
from processes import wait_until
from product import ROOT
from update_support import Update

PLAIN_TEXT = raw(http("200 OK", "updating hanuman\n", "text/plain"))
KINDS = {  # an outcome: what the slave does, and the options
    "live": (updates(hook=None), []),
    "signalled": (PLAIN_TEXT, []),
    "signalled with --no-wait": (PLAIN_TEXT, ["--no-wait"]),
    "hook failed": (updates(hook=1), []),
    "beneath failed": (updates(hook=None, beneath={"live": 7, "failed": 1}), []),
    "failed": (updates(state="failed"), []),
    "refused": (error("403 No"), []),
    "unreachable": (raw(b"", "reset"), ["--retries=0"]),
    "timeout": (updates(1000), ["--timeout=4"]),
}
STOPPED = ("interrupted", "not started")


def told(**fields):
    """A kind that answers the question for the status."""
    return lambda request: at_once(http("200 OK", json.dumps(record(hook=None, **fields))))


STATUS = {  # an outcome of --status, and what a slave tells or does then
    "live": [told()],
    "signalled": [told(state="running"), told(state="queued", commit=None)],
    "hook failed": [updates(hook=1)],
    "beneath failed": [told(beneath={"failed": 1})],
    "failed": [told(state="failed"), told(commit=None), told(state="failed", commit=None)],
    "refused": [error("404 No"), error("403 No")],
    "unreachable": [raw(b"", "reset")],
}


def table():
    """{outcome: {column: text}} of the page, without its marks."""
    text = (ROOT / "docs" / "outcomes.md").read_text(encoding="utf-8").replace("`", "")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    head, _, *rows = lines
    return {row[0]: dict(zip(head, row)) for row in rows}


TABLE = table()


def test_the_page_has_every_outcome(server_update):
    assert {name.partition(" with ")[0] for name in TABLE} == set(server_update.OUTCOMES)
    assert set(TABLE) == {*KINDS, *STOPPED, "answered"}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_what_each_option_makes_of_it(farm, update, tmp_path, name):
    kind, options = KINDS[name]
    outcome, row = name.partition(" with ")[0], TABLE[name]
    failed = tmp_path / "failed"
    entry = farm.add(kind)
    done = update([entry], "--json", *options)
    assert (str(done.returncode), done.outcomes) == (row["exit status"], {entry: outcome})
    assert (row["--json"], done.summary["outcomes"]) == ("result", {outcome: 1})
    done = update([entry], "-q", "--write-failed", str(failed), *options)
    if row["-q"] == "silent":
        assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    else:
        assert row["-q"] == "printed"
        assert re.match(r"%s +%s +" % (re.escape(entry), outcome), done.stdout)
    assert row["--write-failed"] == ("written" if failed.read_text() else "left out")
    assert failed.read_text().startswith("%s  # %s" % (entry, outcome)) or not failed.read_text()
    for pace in ("--batch=1", "--at-once=1"):
        others = [farm.add(updates(hook=None)), farm.add(updates(hook=None))]
        done = update([entry, *others], "--json", pace, "--max-fail=0", *options)
        if row["--max-fail"] == "not allowed":
            assert done.returncode == 2
        else:
            begun = [one for one in others if done.outcomes[one] != "not started"]
            assert len(begun) == {"counted": 0, "not counted": 2}[row["--max-fail"]]


@pytest.mark.parametrize("options", [[], ["--status"]])
def test_what_is_interrupted_or_not_started(farm, tmp_path, options):
    """By Ctrl-C; the one that is not started has found no room."""
    entries = [farm.add(hold), farm.add(hold)]
    failed = tmp_path / "failed"
    arguments = ["--write-failed", str(failed), "-q", *options]
    if not options:
        arguments += ["--batch=1"]
    run = Update(tmp_path, entries, *arguments)
    wait_until(lambda: len(farm.requests) >= 2)
    run.process.send_signal(signal.SIGINT)
    done = run.finish()
    assert done.returncode == 130
    names = {"interrupted", "not started"} if not options else {"interrupted"}
    for name in names:
        assert "%s: " % name in done.stdout
        assert "# %s " % name in failed.read_text()
        assert "130" in TABLE[name]["exit status"]
        assert (TABLE[name]["-q"], TABLE[name]["--write-failed"]) == ("printed", "written")
        assert TABLE[name]["--status"] != "-"


@pytest.mark.parametrize("name", sorted(TABLE))
def test_what_the_status_says(farm, update, name):
    kinds = STATUS.get(name, [])
    assert bool(kinds) == (TABLE[name]["--status"] != "-") or name in STOPPED
    for kind in kinds:
        entry = farm.add(kind)
        done = update([entry], "--status", "--json", "--retries=0")
        assert done.outcomes == {entry: name}
        assert done.returncode == (0 if name == "live" else 1)
        quiet = update([entry], "--status", "-q", "--retries=0")
        assert (quiet.stdout == "") == (name == "live")
        if name != "live":
            assert quiet.stdout.endswith("\nexit status 1: 1 slave not good\n")


def test_history_is_good_where_all_have_answered(farm, update):
    """However their updates ended."""
    assert TABLE["answered"]["exit status"] == "0"
    bodies = [record("failed", message="no net"), record(requested=0, by="anna@here", note="fair")]
    body = json.dumps({"repo": "hanuman", "updates": bodies})
    entry = farm.add(lambda request: at_once(http("200 OK", body)))
    done = update([entry], "--history")
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first == entry
    assert re.fullmatch(r"    \S+ \S+Z  failed       1d5d931  -  no net", lines[0])
    assert lines[1:] == ["    1970-01-01 00:00:00Z  live         1d5d931  anna@here  (fair)"]
    assert [request.path for request in farm.requests] == ["/status?repo=hanuman&history=1"]
    done = update([entry], "--history", "--json")
    assert done.results[entry]["updates"][1]["commit"] == COMMIT
    assert done.summary["outcomes"] == {"answered": 1}
    assert update([entry], "--history", "-q").stdout == ""
    bad = farm.add(error("403 No", "not from here"))
    done = update([entry, bad], "--history")
    assert done.returncode == 1
    assert re.search(r"^%s +refused +- +.*not from here \(HTTP 403\)$" % bad, done.stdout, re.M)
    assert "\nhanuman: 1 answered, 1 refused of 2, " in done.stdout
