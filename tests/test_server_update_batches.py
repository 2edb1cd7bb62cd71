"""Batches, what stops them, and slaves that end at different commits."""

import json
import re
import signal
import socket
import subprocess
import threading
from urllib.parse import parse_qs, urlsplit

import pytest
from farm import (
    COMMIT,
    OTHER,
    PREVIOUS,
    accepted,
    at_once,
    error,
    hold,
    http,
    raw,
    record,
    updates,
    updates_when,
)
from processes import wait_until
from update_support import Update


def test_batches_go_in_the_order_of_the_list(farm, update):
    entries = [farm.add(updates(0.2)) for _ in range(20)]
    done = update(entries, "--json", "--batch", "1,5,50%")
    assert done.returncode == 0
    order = farm.addresses_signalled()
    names = [entry.split(":")[0] for entry in entries]
    assert order[0] == names[0]
    assert set(order[1:6]) == set(names[1:6])
    assert set(order[6:16]) == set(names[6:16])
    assert done.stderr.splitlines() == [
        "server-update: batch 1 of 4: 1 slave",
        "server-update: batch 2 of 4: 5 slaves",
        "server-update: batch 3 of 4: 10 slaves",
        "server-update: batch 4 of 4: 4 slaves",
    ]
    last = {}
    for request in farm.requests:  # each batch ended before the next began
        number = names.index(request.slave)
        batch = 0 if number < 1 else 1 if number < 6 else 2 if number < 16 else 3
        assert batch >= max(last, default=0)
        last[batch] = request


def test_a_failed_canary_leaves_the_others_alone(farm, update):
    entries = [farm.add(updates(state="failed", message="no")) for _ in range(1)]
    entries += [farm.add(updates()) for _ in range(99)]
    done = update(entries, "--json", "--batch", "1,10,25%")
    assert (done.returncode, len(farm.signals)) == (1, 1)
    assert done.summary["outcomes"] == {"failed": 1, "not started": 99}
    assert {line["message"] for line in done.results.values()} == {
        "no",
        "stopped after batch 1 of 6",
    }
    assert "server-update: stopped after batch 1 of 6: 1 not good, 99 not started\n" in done.stderr


@pytest.mark.parametrize(
    ("allowed", "signalled"),
    [("0", 10), ("1", 10), ("2", 30), ("20%", 30), ("6%", 10), ("10%", 30)],
)
def test_max_fail_counts_all_that_are_not_live(farm, update, allowed, signalled):
    """2 of the first 10 slaves of 30 fail, one of them because it can't be reached."""
    bad = [farm.add(error("500 Oops")), farm.add(raw(b"", "reset"))]
    entries = bad + [farm.add(updates()) for _ in range(28)]
    if allowed == "10%":  # 3 of 30
        entries[2] = farm.add(error("403 No"))
    done = update(entries, "--json", "--batch", "10", "--max-fail", allowed, "--retries", "0")
    assert done.returncode == 1
    assert len(farm.addresses_signalled()) == signalled
    assert done.summary["outcomes"].get("not started", 0) == 30 - signalled


def test_slaves_at_different_commits_are_exit_1_and_told_how_to_be_equal(farm, update):
    entries = [farm.add(updates()), farm.add(updates(0.3, commit=OTHER))]
    done = update(entries)
    assert done.returncode == 1
    assert "\ncommits: 1d5d931 on 1, 77aa120 on 1\n" in done.stdout
    assert re.search(
        r"\nto make them equal: \S+ --ref %s --list \S+ hanuman\n" % OTHER, done.stdout
    )
    assert re.search(r"\nto go back: \S+ --ref %s --list \S+ hanuman\n" % PREVIOUS, done.stdout)


def test_the_way_back_works_when_pasted(farm, update):
    def kind(request):
        if "ref=" + PREVIOUS in request.path or request.slave in farm.back:
            farm.back.add(request.slave)
            return updates(ref=PREVIOUS, commit=PREVIOUS, previous=COMMIT)(request)
        return updates()(request)

    farm.back = set()
    entries = [farm.add(kind) for _ in range(3)]
    done = update(entries)
    back = re.search("^to go back: (.*)$", done.stdout, re.M).group(1)
    again = subprocess.run(
        ["sh", "-c", back], stdout=subprocess.PIPE, universal_newlines=True, timeout=300
    )
    assert again.returncode == 0
    assert "commits: 8c2f4e0 on 3\n" in again.stdout
    assert re.search("^to go back: .* --ref %s " % COMMIT, again.stdout, re.M)


# A sliding window.


def test_at_once_never_has_more_between_signal_and_outcome(farm, update):
    delay_s, size = 0.2, 3
    entries = [farm.add(updates(delay_s, hook=None)) for _ in range(12)]
    entries.insert(1, farm.add(raw(b"", "reset")))  # an unreachable one has its place too
    done = update(entries, "--json", "--at-once", str(size), "--max-fail", "1", "--retries", "0")
    assert done.summary["outcomes"] == {"live": 12, "unreachable": 1}
    live = [entry for entry in entries if done.outcomes[entry] == "live"]
    begun = [farm.begun[entry.split(":")[0]] for entry in live]
    busy = [sum(0 <= time - other < delay_s for other in begun) for time in begun]
    assert max(busy) <= size
    assert done.stderr == ""


def test_at_once_begins_the_next_as_one_ends(farm, update):
    """The first one waits for the signal of the last: with batches that would never come."""

    def first(request):
        if request.path.startswith("/status") and not farm.signals[last]:
            return at_once(http("200 OK", json.dumps(record("running"))))
        return updates()(request)

    entries = [farm.add(first)] + [farm.add(updates()) for _ in range(5)]
    last = entries[-1].split(":")[0]
    done = update(entries, "--at-once", "2", "--timeout", "50")
    assert done.returncode == 0, done.stdout


def test_at_once_begins_no_more_where_too_many_are_not_good(farm, start_update):
    """Those that are under way go on to their ends."""
    is_told = threading.Event()
    bad = updates(hook=1)
    slow = updates_when(is_told.is_set, hook=None)
    entries = [farm.add(kind) for kind in (slow, bad, bad, slow, slow)]
    options = ["--json", "--at-once", "2", "--max-fail", "1", "--parallel", "8"]
    run = start_update(entries, *options)
    told = run.process.stderr.readline()
    is_told.set()
    done = run.finish()
    assert done.returncode == 1
    assert [done.outcomes[entry] for entry in entries] == [
        "live",
        "hook failed",
        "hook failed",
        "not started",
        "not started",
    ]
    assert told == "server-update: stopped after 3 of 5 slaves: 2 not good, 2 not started\n"
    assert done.stderr == ""
    assert done.results[entries[4]]["message"] == "stopped after 3 of 5 slaves"
    assert len(farm.signals) == 3


def test_at_once_interrupted(farm, tmp_path):
    entries = [farm.add(hold) for _ in range(5)]
    run = Update(tmp_path, entries, "--json", "--at-once", "2")
    wait_until(lambda: sum(farm.polls.values()) == 2)
    run.process.send_signal(signal.SIGINT)
    done = run.finish()
    assert done.returncode == 130
    assert done.summary["outcomes"] == {"interrupted": 2, "not started": 3}
    assert done.stderr == "server-update: interrupted: 0 not good, 2 unfinished, 3 not started\n"


# What was tried first is what goes out.


def as_asked(newest=COMMIT, **more):
    """A kind that has the commit live that it is asked for, else the newest."""
    pins = {}

    def kind(request):
        if not request.path.startswith("/status"):
            pins[request.slave] = asked(request).get("commit", [None])[0]
            return accepted()
        pin = pins[request.slave]
        fields = dict({"pin": pin, "hook": None, "commit": pin or newest}, **more)
        return at_once(http("200 OK", json.dumps(record(**fields))))

    return kind


def asked(request):
    return parse_qs(urlsplit(request.path).query)


def signals_of(farm):
    """The signals, in their order; polls come in between."""
    return [one for one in farm.requests if not one.path.startswith("/status")]


def pins_asked(farm):
    """The commits of the signals, in their order."""
    return [asked(one).get("commit", [None])[0] for one in signals_of(farm)]


@pytest.mark.parametrize("pace", ["--batch=1", "--at-once=1", "--batch=1,2"])
def test_what_begins_after_the_first_is_asked_for_its_commit(farm, update, pace):
    entries = [farm.add(as_asked(newest)) for newest in (COMMIT, OTHER, OTHER)]
    done = update(entries, "--json", pace)
    assert done.returncode == 0, done.stdout
    assert pins_asked(farm) == [None, COMMIT, COMMIT]
    assert done.summary["commits"] == {COMMIT: 3}


def test_a_hook_that_failed_pins_nothing(farm, update):
    entries = [farm.add(as_asked(OTHER, hook=1))] + [farm.add(as_asked()) for _ in range(2)]
    done = update(entries, "--json", "--batch=1", "--max-fail=1")
    assert pins_asked(farm) == [None, None, COMMIT]
    assert done.summary["outcomes"] == {"live": 2, "hook failed": 1}


@pytest.mark.parametrize("options", [[], ["--batch=1"], ["--at-once=2"]])
def test_a_commit_that_is_asked_for_is_the_pin(farm, update, options):
    entries = [farm.add(as_asked(OTHER)) for _ in range(3)]
    done = update(entries, "--commit", COMMIT, *options)
    assert done.returncode == 0, done.stdout
    assert pins_asked(farm) == [COMMIT] * 3


def test_without_a_pace_nothing_is_pinned(farm, update):
    entries = [farm.add(as_asked()) for _ in range(3)]
    assert update(entries, "--parallel=1").returncode == 0
    assert pins_asked(farm) == [None] * 3


def test_those_that_began_before_are_not_started_again(farm, update):
    """They may end elsewhere: that is exit 1, and a line that makes them equal to the others."""
    entries = [farm.add(as_asked(newest)) for newest in (COMMIT, OTHER)]
    done = update(entries, "--at-once=2", "--parallel=8")
    assert done.returncode == 1
    first = re.search("^to make them equal: .* --ref ([0-9a-f]{40}) ", done.stdout, re.M)
    assert first.group(1) == re.search("  live +([0-9a-f]{7})", done.stdout).group(1) + (
        COMMIT[7:] if first.group(1) == COMMIT else OTHER[7:]
    )


def test_a_slave_of_1_0_is_too_old_for_a_commit(farm, update):
    entry = farm.add(updates())
    done = update([entry], "--json", "--commit", COMMIT)
    assert (done.returncode, done.results[entry]["message"]) == (1, "too old for --commit")
    old = [farm.add(updates()), farm.add(updates(commit=OTHER)), farm.add(updates())]
    done = update(old, "--json", "--batch=1", "--max-fail=1")
    assert [done.outcomes[one] for one in old] == ["live", "failed", "live"]
    assert done.results[old[1]]["message"] == "too old for --commit"


# Who asked, and why.


def test_who_asked_and_why_goes_to_each_slave(farm, update, tmp_path):
    entries = [farm.add(updates()), farm.add(updates())]
    env = {"SERVER_UPDATE_BY": "", "SERVER_UPDATE_NOTE": "from above", "SUDO_USER": "anna"}
    assert update(entries, env=env).returncode == 0
    for request in signals_of(farm):
        parameters = asked(request)
        assert parameters["by"] == ["anna@" + socket.gethostname()]
        assert parameters["note"] == ["from above"]
        assert "via" not in parameters
    farm.requests.clear()
    via = "0123456789abcdef,fedcba9876543210"
    env = {"SERVER_UPDATE_BY": "ü@m", "SERVER_UPDATE_NOTE": "x", "SERVER_UPDATE_VIA": via}
    assert update(entries, "--note", "1+1 = 2", env=env).returncode == 0
    for request in signals_of(farm):
        assert request.path == (
            "/?repo=hanuman&by=%C3%BC%40m&note=1%2B1%20%3D%202"
            "&via=0123456789abcdef%2Cfedcba9876543210"
        )
