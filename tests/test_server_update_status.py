"""server-update --status: what is live, without a signal."""

import json
import re

from farm import COMMIT, OTHER, at_once, forgetful, http, record, updates


def test_status_of_a_repository_sends_no_signal(farm, update):
    entries = [farm.add(updates()), farm.add(updates(commit=OTHER))]
    done = update(entries, "--status")
    assert done.returncode == 1
    assert not farm.signals
    assert re.search(
        r"^%s  live         1d5d931  since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\dZ$"
        % entries[0],
        done.stdout,
        re.M,
    )
    assert done.stdout.endswith(
        "\ncommits: 1d5d931 on 1, 77aa120 on 1\nexit status 1: live at 2 commits\n"
    )
    assert update(entries[:1], "--status").returncode == 0


def test_status_of_all_repositories(farm, update):
    def kind(commit):
        body = {
            "version": "1",
            "repos": {"hanuman": record(), "b": record(repo="b", commit=commit)},
        }
        return lambda request: at_once(http("200 OK", json.dumps(body)))

    entries = [farm.add(kind(COMMIT)), farm.add(kind(COMMIT)), farm.add(kind(OTHER))]
    done = update(entries, "--status", repo=None)
    assert done.returncode == 1
    assert done.stdout.endswith(
        "b: 1d5d931 on 2, 77aa120 on 1\nhanuman: 1d5d931 on 3\n"
        "exit status 1: b live at 2 commits\n"
    )
    done = update(entries[:2], "--status", "--json", repo=None)
    assert done.returncode == 0
    assert {(line["slave"], line["repo"]) for line in done.lines[1:-1]} == {
        (entry, repo) for entry in entries[:2] for repo in ("hanuman", "b")
    }
    assert {request.path for request in farm.requests} == {"/status"}


def test_one_repository_that_failed_counts_for_the_slave(farm, update):
    repos = {"a": record(repo="a"), "b": record("failed", repo="b", message="no")}
    body = json.dumps({"version": "1", "repos": repos})
    entry = farm.add(lambda request: at_once(http("200 OK", body)))
    done = update([entry], "--status", "--json", repo=None)
    assert [line["outcome"] for line in done.lines[1:-1]] == ["live", "failed"]
    assert (done.summary["outcomes"], done.returncode) == ({"failed": 1}, 1)


def test_status_of_many_repositories_is_read_whole(farm, update):
    names = ["service-%d" % number for number in range(1000)]
    body = json.dumps({"version": "1", "repos": {name: record(repo=name) for name in names}})
    entry = farm.add(lambda request: at_once(http("200 OK", body)))
    assert len(body) > 300000
    done = update([entry], "--status", "--json", repo=None)
    assert ({line["repo"] for line in done.lines[1:-1]}, done.returncode) == (set(names), 0)


def test_status_of_what_was_never_asked_for(farm, update):
    done = update([farm.add(forgetful)], "--status", "--json")
    assert done.summary["outcomes"] == {"refused": 1}
    assert done.returncode == 1
