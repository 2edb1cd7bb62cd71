"""Batches, what stops them, and slaves that end at different commits."""

import re
import subprocess

import pytest
from farm import COMMIT, OTHER, PREVIOUS, error, raw, updates


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
        "server-update: batch 1 of 4: 1",
        "server-update: batch 2 of 4: 5",
        "server-update: batch 3 of 4: 10",
        "server-update: batch 4 of 4: 4",
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
    assert "server-update: stopped after batch 1 of 6: 1 not live, 99 unfinished" in done.stderr


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
        ["sh", "-c", back], stdout=subprocess.PIPE, universal_newlines=True, timeout=30
    )
    assert again.returncode == 0
    assert "commits: 8c2f4e0 on 3\n" in again.stdout
    assert re.search("^to go back: .* --ref %s " % COMMIT, again.stdout, re.M)
