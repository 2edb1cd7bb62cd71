"""The pure core of server-update: batches, requests, what replies mean, exit codes, the report."""

import argparse
import http.client
import io
import json
import re

import pytest
from farm import COMMIT, OTHER, PREVIOUS, REPO, UPDATE, record


@pytest.mark.parametrize(
    ("spec", "total", "expected"),
    [
        ("10", 25, [10, 10, 5]),
        ("100", 25, [25]),
        ("25%", 10, [3, 3, 3, 1]),  # 2.5 is rounded up
        ("1%", 3, [1, 1, 1]),  # at least one
        ("100%", 7, [7]),
        ("1,10,25%", 100, [1, 10, 25, 25, 25, 14]),
        ("1,10,25%", 5, [1, 4]),
        ("1,2", 7, [1, 2, 2, 2]),
    ],
)
def test_batches(server_update, spec, total, expected):
    batches = server_update.split_batches(total, server_update.read_amounts(spec))
    assert batches == expected
    assert sum(batches) == total


@pytest.mark.parametrize(
    "spec", ["", "x", "-1", "1,,2", "1,", "%", "1.5", "10%%", " 1", "1\n", "٣", "9999999999"]
)
def test_bad_sizes(server_update, spec):
    with pytest.raises(argparse.ArgumentTypeError, match="is not like 10, 25% or 1,10,25%"):
        server_update.read_amounts(spec)


@pytest.mark.parametrize(
    ("entry", "signal", "status"),
    [
        ("web1", "/?repo=hanuman", "/status?repo=hanuman&update=5&wait=25"),
        ("http://web1/get", "/get?repo=hanuman", "/status?repo=hanuman&update=5&wait=25"),
        ("http://web1/get/", "/get/?repo=hanuman", "/status?repo=hanuman&update=5&wait=25"),
        (
            "http://web1/a/get/?k=1&l",
            "/a/get/?k=1&l&repo=hanuman",
            "/a/status?k=1&l&repo=hanuman&update=5&wait=25",
        ),
        (
            "http://web1/widget/",
            "/widget/?repo=hanuman",
            "/widget/status?repo=hanuman&update=5&wait=25",
        ),
    ],
)
def test_what_is_asked(server_update, entry, signal, status):
    slave, query = server_update.parse_slave(entry), server_update.encode_query
    path = server_update.request_path
    assert path(slave, "", query(repo=REPO, ref=None)) == signal
    assert path(slave, "status", query(repo=REPO, update=5, wait=25)) == status
    polled = path(slave, "status", query(repo=REPO, update=5, wait=None))
    assert polled == status.replace("&wait=25", "")


def test_what_is_asked_is_percent_encoded(server_update):
    """A space is %20, a + is a plus."""
    slave, query = server_update.parse_slave("web1"), server_update.encode_query
    path = server_update.request_path
    asked = query(repo=REPO, ref="fix/ü&x", by="a b@c", note="1+1 = 2\u2026")
    assert path(slave, "", asked) == (
        "/?repo=hanuman&ref=fix%2F%C3%BC%26x&by=a%20b%40c&note=1%2B1%20%3D%202%E2%80%A6"
    )
    assert path(slave, "status", query(repo=REPO)) == "/status?repo=hanuman"
    assert path(slave, "status", query(repo=None)) == "/status"


def reply(server_update, status=200, body=None, **more):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server_update.Reply(status, text=text, **more)


NO_ID = "its answer has no update id: nothing more is known"


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (202, {"update": 7}, ("follow", "", "", None)),
        (200, {"update": 7}, ("follow", "", "", None)),
        (200, b"updating hanuman", ("end", "signalled", NO_ID, None)),
        (200, b"", ("end", "signalled", NO_ID, None)),
        (204, b"", ("end", "signalled", NO_ID, None)),
        (200, b"<html>", ("end", "signalled", NO_ID, None)),
        (200, {"update": "7"}, ("end", "signalled", NO_ID, None)),
        (200, [1], ("end", "signalled", NO_ID, None)),
        (200, b"[" * 30000, ("end", "signalled", NO_ID, None)),
        (302, b"", ("end", "refused", "Found (HTTP 302, not followed)", None)),
        (400, {"error": "bad repo"}, ("end", "refused", "bad repo (HTTP 400)", None)),
        (401, {"error": 5}, ("end", "refused", "Unauthorized (HTTP 401)", None)),
        (404, b"<html>", ("end", "refused", "Not Found (HTTP 404)", None)),
        (499, b"", ("end", "refused", "error (HTTP 499)", None)),
        (
            500,
            {"error": "a\nb\x1b[2J\u202e"},
            ("end", "failed", r"a\nb\x1b[2J\u202e (HTTP 500)", None),
        ),
        (503, {"error": "stopping"}, ("retry", "failed", "stopping (HTTP 503)", "retries")),
    ],
)
def test_the_reply_to_a_signal(server_update, status, body, expected):
    step = server_update.judge_signal(reply(server_update, status, body, pause_s=5), True)
    assert (step.action, step.outcome, step.message, step.budget) == expected
    assert step.pause_s == (5 if status == 503 else 0)
    assert step.update == (7 if step.action == "follow" else None)


def test_no_reply_to_a_signal(server_update):
    step = server_update.judge_signal(server_update.Reply(0, "connection refused"), True)
    assert step[:3] == ("retry", "unreachable", "connection refused")
    assert step.budget == "retries"
    local = server_update.Reply(0, "too many open files", True)
    step = server_update.judge_signal(local, True)  # not the slave's fault
    assert (step.action, step.budget) == ("retry", "shortages")


def test_broken_json_is_no_answer(server_update):
    broken = reply(server_update, 202, b'{"update": 1')
    step = server_update.judge_signal(broken, True)
    assert step[:3] == ("retry", "unreachable", "answered with broken JSON")
    assert step.budget == "retries"


def test_without_following_a_signal_is_enough(server_update):
    step = server_update.judge_signal(reply(server_update, 202, {"update": 7}), False)
    assert step == server_update.Step("end", "signalled")


def poll(server_update, ref=None, status=200, body=None, pin=None, is_pinned=False):
    args = argparse.Namespace(repo=REPO, ref=ref, commit=pin if is_pinned else None)
    return server_update.judge_poll(reply(server_update, status, body), args, pin, UPDATE)


def new_record(state="live", **more):
    """A record of slaves that know of pins, hooks and what is beneath."""
    known = {"pin": None, "hook": None, "beneath": None, "by": "root@master", "note": None}
    return record(state, **dict(known, **more))


def test_the_outcome_of_an_update(server_update):
    live = poll(server_update, body=new_record(message="an old tree is set aside"))
    assert live == server_update.Step("end", "live", "an old tree is set aside", COMMIT, PREVIOUS)
    failed = poll(server_update, body=record("failed", message="no such\x07 branch"))
    assert failed[:3] == ("end", "failed", r"no such\x07 branch")
    assert poll(server_update, body=record(update=UPDATE + 5)).outcome == "live"
    for said, told in (("no net", "a newer update failed: no net"), ("", "a newer update failed")):
        newer = poll(server_update, body=record("failed", message=said, update=UPDATE + 5))
        assert newer[:3] == ("end", "failed", told)
    assert poll(server_update, body=record(commit="-", previous=None)).commit is None
    for state in ("queued", "running"):
        assert poll(server_update, body=record(state))[:3] == ("wait", "timeout", "")


def test_nothing_live_is_no_success(server_update):
    """A hook may have removed the tree, or upstream be empty: --status calls that failed, too."""
    step = poll(server_update, body=new_record(commit=None))
    assert step[:3] == ("end", "failed", server_update.NOTHING_LIVE)


def test_a_hook_that_failed_is_no_success(server_update):
    """Nor where a slave of 1.0 says so: it has no `hook`, and a message for nothing else."""
    for status in (1, 126, 143, 0, "x"):
        step = poll(server_update, body=new_record(hook=status, message="nginx: [emerg] no"))
        assert step[1:4] == ("hook failed", "nginx: [emerg] no", COMMIT)
    step = poll(server_update, body=record(message="the post-update hook failed (1)"))
    assert step[1:4] == ("hook failed", "the post-update hook failed (1)", COMMIT)
    assert poll(server_update, body=record()).outcome == "live"
    assert poll(server_update, body=new_record("failed", hook=1)).outcome == "failed"


@pytest.mark.parametrize(
    ("beneath", "outcome"),
    [
        (None, "live"),
        ({}, "live"),
        ({"live": 298}, "live"),
        ({"live": 298, "failed": 0}, "live"),
        ({"live": 298, "unreachable": 2}, "beneath failed"),
        ({"not started": 1}, "beneath failed"),
        ({"live": 1, "hook failed": 1}, "beneath failed"),
        ({"live": 1, "signalled": 1}, "live but not good"),
        ({"of a later version": 1}, "beneath failed"),
        ([], "failed"),
        ({"failed": "many"}, "failed"),
    ],
)
def test_a_relay_is_as_good_as_all_beneath_it(server_update, beneath, outcome):
    step = poll(server_update, body=new_record(beneath=beneath))
    expected = "beneath failed" if outcome == "live but not good" else outcome
    assert step.outcome == expected
    if expected != "failed":
        hooked = poll(server_update, body=new_record(beneath=beneath, hook=1))
        assert hooked.outcome == "hook failed"


NEWER = "a newer update put 1d5d931 live"
OLD = "too old for --commit"


@pytest.mark.parametrize(
    ("pin", "is_pinned", "told", "outcome", "message"),
    [
        (COMMIT, True, {"pin": COMMIT}, "live", ""),
        (COMMIT, False, {"pin": COMMIT}, "live", ""),
        (
            COMMIT,
            True,
            {"pin": COMMIT, "commit": OTHER},
            "failed",
            NEWER.replace("1d5d931", "77aa120"),
        ),
        (COMMIT, True, {"pin": None}, "failed", NEWER),
        (COMMIT, True, {"pin": OTHER}, "failed", NEWER),
        (None, False, {"pin": COMMIT}, "failed", NEWER),
        (None, False, {"pin": ["x"]}, "failed", NEWER),
        (COMMIT, True, {"pin": COMMIT, "hook": 1}, "hook failed", ""),
        (COMMIT, True, {"pin": None, "hook": 1}, "failed", NEWER),
        (
            COMMIT,
            True,
            {"pin": COMMIT, "commit": None},
            "failed",
            "a newer update put nothing live",
        ),
        # of 1.0: what --batch pins is live there, or it is not; --commit it does not know
        (COMMIT, False, None, "live", ""),
        (OTHER, False, None, "failed", OLD),
        (COMMIT, True, None, "failed", OLD),
        (None, False, None, "live", ""),
    ],
)
def test_another_commit_than_the_pin_is_no_success(
    server_update, pin, is_pinned, told, outcome, message
):
    body = record() if told is None else new_record(**told)
    step = poll(server_update, pin=pin, is_pinned=is_pinned, body=body)
    assert step[:3] == ("end", outcome, message)


@pytest.mark.parametrize(
    ("asked", "told", "message"),
    [
        (None, "v2", "a newer update put v2 live"),
        ("v1", "v2", "a newer update put v2 live"),
        ("v1", None, "a newer update put the default branch live"),
        ("v1", 7, "a newer update put the default branch live"),
    ],
)
def test_another_ref_than_the_one_asked_for_is_no_success(server_update, asked, told, message):
    step = poll(server_update, asked, body=record(ref=told))
    assert step[:3] == ("end", "failed", message)
    assert poll(server_update, "v1", body=record(ref="v1")).outcome == "live"
    assert poll(server_update, None, body=record(ref="")).outcome == "live"


def test_a_poll_without_an_answer_is_no_outcome(server_update):
    for status, body in ((0, b""), (500, b""), (502, b"<html>"), (503, {"error": "stopping"})):
        step = poll(server_update, status=status, body=body)
        assert step[:2] == ("wait", "timeout")


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"error": "no such update"}),
        (401, b""),
        (302, b""),
        (200, b""),
        (200, b"<html>"),
        (200, []),
        (200, {"repo": REPO}),
        (200, record(repo="sugriva")),
        (200, record(update=UPDATE - 1)),
        (200, record(update="1")),
        (200, record("done")),
        (200, record([])),
        (200, record(commit="x; reboot")),
        (200, record(commit=COMMIT.upper())),
        (200, record(commit=COMMIT + "\n")),
        (200, record(commit=7)),
        (200, record(previous=["x"])),
        (200, {key: value for key, value in record().items() if key != "commit"}),
    ],
)
def test_nonsense_is_asked_about_again_and_then_a_failure(server_update, status, body):
    step = poll(server_update, status=status, body=body)
    assert step[:2] == ("retry", "failed")
    assert step.budget == "doubts"
    assert 0 < server_update.DOUBTS_ALLOWED < 10


def test_the_header_of_an_answer(server_update):
    """As http.client asks for it: 3.15 also says how many fields it would have."""
    stream = io.BytesIO(b"Content-LENGTH: 2\r\ncontent-length:3\r\nA: b:c \r\n\r\n{}")
    found = server_update.parse_headers(stream, _max_headers=None)
    assert found == {"content-length": "2", "a": "b:c"}
    assert stream.read() == b"{}"


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (b"", http.client.IncompleteRead),
        (b"Content-Length: 2\r\n", http.client.IncompleteRead),
        (b"A: b\r\n" * 101 + b"\r\n", http.client.HTTPException),
    ],
)
def test_a_header_without_an_end(server_update, header, error):
    with pytest.raises(error) as caught:
        server_update.parse_headers(io.BytesIO(header))
    assert caught.type is error


def status(server_update, body, code=200):
    return server_update.judge_status(reply(server_update, code, body), REPO)


def whole_status(server_update, body):
    return server_update.judge_whole_status(reply(server_update, 200, body))


@pytest.mark.parametrize(
    ("told", "outcome", "message"),
    [
        ({}, "live", "since 1970-01-01 00:00:00Z"),
        (
            {"message": "an old tree is set aside"},
            "live",
            "since 1970-01-01 00:00:00Z an old tree is set aside",
        ),
        ({"finished": None}, "live", ""),
        ({"hook": 1, "message": "no nginx"}, "hook failed", "since 1970-01-01 00:00:00Z no nginx"),
        ({"beneath": {"failed": 1}}, "beneath failed", "since 1970-01-01 00:00:00Z"),
        ({"commit": None}, "failed", "no commit is live: the tree is gone or empty"),
        (
            {"state": "failed", "message": "no net"},
            "failed",
            "update failed 1970-01-01 00:00:00Z: no net",
        ),
        ({"state": "failed", "message": ""}, "failed", "update failed 1970-01-01 00:00:00Z"),
        ({"state": "failed", "commit": None}, "failed", "update failed 1970-01-01 00:00:00Z"),
        ({"state": "running", "finished": None}, "signalled", "update running"),
        ({"state": "queued", "finished": None, "commit": None}, "signalled", "update queued"),
    ],
)
def test_the_status_of_a_repository(server_update, told, outcome, message):
    """Good is what is live, is there, and whose last update ended good."""
    step = status(server_update, new_record(**dict({"finished": 0.0}, **told)))
    assert step[:3] == ("end", outcome, message)
    assert step.commit == told.get("commit", COMMIT)


def test_a_status_that_makes_no_sense_is_no_success(server_update):
    assert status(server_update, {"error": "never asked for"}, 404).outcome == "refused"
    assert status(server_update, b"<html>").outcome == "failed"
    for finished in ("x", 1e300, float("nan"), -1, True):
        assert status(server_update, record(finished=finished)).outcome == "live"


def test_the_status_of_all_repositories(server_update):
    """One that was never live is just a name that somebody asked for, a typo say."""
    bodies = {
        REPO: new_record(),
        "b": new_record(repo="b", commit=OTHER),
        "hanumna": new_record("failed", repo="hanumna", commit=None, previous=None),
        "gone": new_record("failed", repo="gone", commit=None),
    }
    steps = whole_status(server_update, {"version": "1", "repos": bodies})
    assert [(step.repo, step.outcome, step.commit) for step in steps] == [
        (REPO, "live", COMMIT),
        ("b", "live", OTHER),
        ("gone", "failed", None),
    ]
    (step,) = whole_status(server_update, {"repos": {}})
    assert step[1:3] == ("live", "no repository yet")
    for body in (
        {},
        {"repos": []},
        {"repos": {"a": 1}},
        {"repos": {"\x1b[2J": record(repo="\x1b[2J")}},
        {"repos": {"a": record(repo="b")}},
        [],
    ):
        assert whole_status(server_update, body)[0].outcome == "failed", body


def test_the_history_of_a_repository(server_update):
    def history(body, code=200):
        return server_update.judge_history(reply(server_update, code, body), REPO)

    bodies = [new_record("running"), new_record()]
    step = history({"repo": REPO, "updates": bodies})
    assert (step.outcome, step.updates) == ("answered", bodies)
    assert history(record()).updates[0]["commit"] == COMMIT  # of 1.0: its newest alone
    assert history({"error": "no such update"}, 404)[:2] == ("end", "answered")
    assert history(b"<html>", 404).outcome == "refused"
    for body in (b"<html>", {}, {"updates": 7}, {"updates": [7]}, {"updates": [record(repo="x")]}):
        assert history(body).outcome == "failed", body


def test_the_lines_of_a_history(server_update):
    told = {"requested": 1.0, "ref": "v1", "by": "anna@master", "note": "the fair"}
    assert server_update.format_update(new_record(**told)) == (
        "    1970-01-01 00:00:01Z  live         1d5d931  anna@master  v1 (the fair)"
    )
    line = server_update.format_update(new_record("failed", requested=0, message="no\x1b net"))
    assert line == r"    1970-01-01 00:00:00Z  failed       1d5d931  root@master  no\x1b net"
    line = server_update.format_update(record("running", requested=None))
    assert line == "    -                     running      1d5d931  -"


def result(
    server_update,
    slave="web1",
    outcome="live",
    commit=COMMIT,
    previous=PREVIOUS,
    seconds=1.234,
    message="",
    repo=None,
    number=0,
    is_followed=True,
):
    good = server_update.is_good(outcome, is_followed)
    fields = (outcome, commit, previous, message, repo, None, None, None)
    return server_update.Result(slave, number, seconds, good, *fields)


def test_exit_code(server_update):
    def code(*results):
        return server_update.exit_code([result(server_update, **fields) for fields in results])

    live, old = {}, {"outcome": "signalled", "commit": None}
    assert code(live, live, dict(old, is_followed=False)) == 0
    assert code(live, live, old) == 1
    for outcome in server_update.OUTCOMES[server_update.OUTCOMES.index("hook failed") :]:
        assert code(live, {"outcome": outcome, "commit": None}) == 1
    assert code(live, {"commit": OTHER}) == 1
    assert code(live, {"commit": None}) == 1  # an empty repository is another commit
    assert code({"repo": "a"}, {"repo": "b", "commit": OTHER}) == 0
    assert code({"repo": "a"}, {"repo": "a", "commit": OTHER}) == 1


def test_result_lines(server_update):
    def line(width=6, **fields):
        return server_update.format_result(result(server_update, **fields), width)

    assert line() == "web1    live         1d5d931  was 8c2f4e0    1.2 s"
    assert line(previous=COMMIT) == "web1    live         1d5d931  unchanged      1.2 s"
    assert line(previous=None) == "web1    live         1d5d931  -              1.2 s"
    assert line(outcome="failed", message="no net") == (
        "web1    failed       1d5d931  still live     1.2 s  no net"
    )
    assert line(outcome="unreachable", commit=None, previous=None, message="x") == (
        "web1    unreachable  -        -              1.2 s  x"
    )
    assert line(outcome="hook failed", message="no") == (
        "web1    hook failed  1d5d931  was 8c2f4e0    1.2 s  no"
    )


def test_status_lines(server_update):
    def line(width=6, **fields):
        return server_update.format_status(result(server_update, **fields), width)

    assert line(message="since x") == "web1    live         1d5d931  since x"
    assert line(repo="hanuman") == "web1 hanuman  live         1d5d931"
    assert line(outcome="failed", commit=None, message="no") == "web1    failed       -        no"


def test_causes_are_folded_with_the_worst_last_and_names_are_limited(server_update):
    results = [
        result(server_update, "web%d" % n, "unreachable", message="refused", number=n)
        for n in range(0, 500, 2)
    ]
    results += [
        result(server_update, "db1", "failed", message="b"),
        result(server_update, "db3", "failed", message="a", number=9),
        result(server_update, "db2", "failed", message="a", number=8),
        result(server_update, "ok", message=""),
        result(server_update, "aside", message="an old tree is set aside"),
        result(server_update, "hooked", "hook failed", message="no nginx"),
        result(server_update, "asked", message="since 2026-11-25 10:00:00Z"),
    ]
    lines = server_update.format_causes(results)
    assert lines[:8] == [
        ("1 live: an old tree is set aside", "live"),
        ("    aside", ""),
        ("1 hook failed: no nginx", "hook failed"),
        ("    hooked", ""),
        ("2 failed: a", "failed"),
        ("    db[2-3]", ""),
        ("1 failed: b", "failed"),
        ("    db1", ""),
    ]
    assert lines[8] == ("250 unreachable: refused", "unreachable")
    assert lines[9][0].startswith("    web[0,2,4,") and lines[9][0].endswith("398], and 50 more")
    times = ["update failed 2026-11-25 10:00:0%dZ: no net" % n for n in range(9)]
    failed = [
        result(server_update, "web%d" % n, "failed", message=told) for n, told in enumerate(times)
    ]
    assert server_update.format_causes(failed)[0] == ("9 failed: update failed: no net", "failed")
    many = [result(server_update, "web%d" % n, "failed", message=str(n)) for n in range(1000)]
    *lines, (last, _) = server_update.format_causes(many)
    assert len(lines) == 100
    assert last == "950 more, each for a reason of its own: -v names them"


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ("web01 web02 web03 web09", "web[01-03,09]"),
        ("web1 web2", "web[1-2]"),
        ("web9 web10 web11", "web[9-11]"),
        ("web09 web010", "web09 web010"),
        ("web2 web1", "web2 web1"),  # the list's order stays
        ("web1 db1 web2", "web1 db1 web2"),
        ("web1.a.example web2.a.example web3.b.example", "web[1-2].a.example web3.b.example"),
        ("web1:8000 web2:8000 web3:8001", "web[1-2]:8000 web3:8001"),
        ("web1:8000 web1:8001", "web1:8000 web1:8001"),
        ("10.0.0.7 10.0.0.8 10.0.1.9", "10.0.0.[7-8] 10.0.1.9"),
        ("http://web1/x http://web2/x https://web3/x", "http://web[1-2]/x https://web3/x"),
        ("rack1-web1a rack1-web2a rack2-web3a", "rack1-web[1-2]a rack2-web3a"),
        ("[2001:db8::7] [2001:db8::8]", "[2001:db8::7] [2001:db8::8]"),
        ("web db", "web db"),
        ("7 8", "[7-8]"),
        ("", ""),
    ],
)
def test_names_of_neighbours_are_folded(server_update, names, folded):
    assert server_update.fold_names(names.split()) == folded.split()


def test_totals_by_outcome_and_by_commit(server_update):
    counts = {"live": 2, "unreachable": 1, "failed": 0}
    results = [
        result(server_update),
        result(server_update),
        result(server_update, outcome="unreachable", commit=None, previous=None),
    ]
    lines = server_update.format_totals(results, server_update.Counter(counts), "hanuman", 12.34)
    assert lines == ["hanuman: 2 live, 1 unreachable of 3, 12.3 s", "commits: 1d5d931 on 2"]


def advice(server_update, argv, *pairs):
    results = [
        result(server_update, commit=commit, previous=previous) for commit, previous in pairs
    ]
    return server_update.format_advice(results, argv)


def test_the_way_back_is_told_where_there_is_one(server_update, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["/opt/su/server-update"])
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    argv = ["--limit", "web *", "--ref=x", "--write-failed", "f", "hanuman"]
    assert advice(server_update, argv, (COMMIT, PREVIOUS), (COMMIT, PREVIOUS), (COMMIT, None)) == [
        "to go back: /opt/su/server-update --ref %s --limit 'web *' hanuman" % PREVIOUS
    ]
    for pairs in (
        [(COMMIT, COMMIT)],
        [(COMMIT, None)],
        [(COMMIT, PREVIOUS), (COMMIT, OTHER)],
        [(COMMIT, PREVIOUS), (COMMIT, COMMIT)],
        [(None, None)],
    ):
        assert advice(server_update, ["hanuman"], *pairs) == []


def test_slaves_at_different_commits_are_told_how_to_be_made_equal(
    server_update, monkeypatch, tmp_path
):
    monkeypatch.setattr("sys.argv", ["/opt/su/server-update"])
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    lines = advice(server_update, ["hanuman"], (COMMIT, PREVIOUS), (OTHER, PREVIOUS))
    assert lines == [
        "to make them equal: /opt/su/server-update --ref %s hanuman" % OTHER,
        "to go back: /opt/su/server-update --ref %s hanuman" % PREVIOUS,
    ]


def test_the_program_is_named_as_it_can_be_called(server_update, monkeypatch, tmp_path):
    program = tmp_path / "server-update"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    again = server_update.command_again
    assert again(["x"], ["--ref", "v1"], ()) == "server-update --ref v1 x"
    argv = ["--ref", "v2", "--json", "--ref=v3", "--limit", "a b", "x"]
    assert again(argv, [], ("--ref",)) == "server-update --json --limit 'a b' x"


def test_those_that_are_not_good_can_be_tried_again(server_update, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/opt/su/server-update"])
    monkeypatch.setenv("PATH", "")
    bad = [
        result(server_update, "db1", "failed", number=2),
        result(server_update, "[::1]:1", "interrupted", number=1),
    ]
    results = [result(server_update), *bad]

    def retry(*argv, pin=None, results=results):
        args = server_update.parse_args(argv)
        return server_update.format_retry(results, argv, args, pin)

    assert retry("--limit=x", "--ref", "v1", "hanuman") == (
        "to try again: /opt/su/server-update --limit '[::1]:1' --limit db1 --ref v1 hanuman"
    )
    assert retry("--write-failed", "f", "--list", "l", "--batch=1", "x", pin=COMMIT) == (
        "to try again: /opt/su/server-update --list f --commit %s --batch=1 x" % COMMIT
    )
    assert retry("x", results=results[:1]) == ""
    assert retry("x", results=bad * 11) == (
        "to try them again: add --write-failed FILE, and then --list FILE"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ü 例", "plain ü 例"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\x1b]0;x\x07", r"\x1b]0;x\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202e\u200b", r"\u202e\u200b"),
        ("\ud800", r"\ud800"),
        ("x" * 500, "x" * 300),
        (None, ""),
        (7, ""),
        ([], ""),
    ],
)
def test_untrusted_text_is_one_short_harmless_line(server_update, text, expected):
    assert server_update.printable(text) == expected


def test_progress(server_update):
    counts = server_update.Counter({"live": 5, "failed": 1})
    names = ["web%d" % n for n in range(1, 7)]

    def progress(columns, total=12, counts=counts, names=names):
        return server_update.format_progress("hanuman", total, counts, 61.9, names, columns)

    assert progress(160) == (
        "hanuman  6 of 12  1:01  [##########          ]  5 live, 1 failed  "
        "web1, web2, web3, web4, web5, web6"
    )
    assert (
        progress(77)
        == "hanuman  6 of 12  1:01  [####     ]  5 live, 1 failed  web1, web2, web3, ..."
    )
    assert progress(77, names=[]) == "hanuman  6 of 12  1:01  [####     ]  5 live, 1 failed"
    assert progress(37) == "hanuman  6 of 12  1:01  5 live, 1 ..."
    assert progress(49) == "hanuman  6 of 12  1:01  5 live, 1 failed  web1..."
    assert progress(77, counts=server_update.Counter(), names=names[:1]) == (
        "hanuman  0 of 12  1:01  [         ]  web1"
    )
    for columns in range(20, 200):
        assert len(progress(columns)) <= columns


SECONDS = "timeout: above 0 and below 1e9 seconds"
MISTAKES = [
    ([], "which repository?"),
    (["../x"], "bad repository name '../x'"),
    (["x.git"], "bad repository name 'x.git'"),
    (["x\n"], r"bad repository name 'x\n'"),
    (["--ref", "a..b", "x"], "bad ref 'a..b'"),
    (["--ref=-x", "x"], "bad ref '-x'"),
    (["--ref", "", "x"], "bad ref ''"),
    (["--parallel", "0", "x"], "--parallel: 1 to 10000"),
    (["--parallel", "many", "x"], "argument --parallel: invalid int value: 'many'"),
    (["--retries", "-1", "x"], "--retries: 0 to 9999"),
    (["--timeout", "0", "x"], "--" + SECONDS),
    (["--timeout", "nan", "x"], "--" + SECONDS),
    (["--timeout", "-5", "--connect-timeout", "-1", "x"], "--" + SECONDS),
    (["--connect-timeout", "inf", "x"], "--connect-" + SECONDS),
    (["--batch", "0", "x"], "--batch: sizes from 1, percentages to 100%"),
    (["--batch", "1,0%", "x"], "--batch: sizes from 1, percentages to 100%"),
    (["--batch", "1,101%", "x"], "--batch: sizes from 1, percentages to 100%"),
    (["--max-fail", "1", "x"], "--max-fail: one number, with --batch or --at-once"),
    (["--batch", "1", "--max-fail", "1,2", "x"], "--max-fail: one number, with --batch or --at"),
    (["--at-once", "0", "x"], "--at-once: from 1"),
    (["--at-once", "2", "--batch", "2", "x"], "--batch and --at-once exclude each other"),
    (
        ["--at-once", "2", "--no-wait", "x"],
        "--batch and --at-once wait for outcomes: not with --n",
    ),
    (["--batch", "2", "--no-wait", "x"], "--batch and --at-once wait for outcomes: not with --n"),
    (["--status", "--history", "x"], "--status and --history exclude each other"),
    (["--status", "--ref", "v1", "x"], "--status and --history update nothing: not with --ref"),
    (["--status", "--batch", "1"], "--status and --history update nothing: not with --batch"),
    (
        ["--status", "--commit", "a" * 40],
        "--status and --history update nothing: not with --commit",
    ),
    (
        ["--history", "--at-once", "1", "x"],
        "--status and --history update nothing: not with --at-",
    ),
    (["--history"], "which repository?"),
    (["--commit", "1d5d931", "x"], "bad commit '1d5d931' (all its 40 or 64 hex digits)"),
    (["--commit", "g" * 40, "x"], "bad commit '%s' (all its 40 or 64 hex digits)" % ("g" * 40)),
    (["--commit", "a" * 41, "x"], "bad commit '%s' (all its 40 or 64 hex digits)" % ("a" * 41)),
    (["--commit=", "x"], "bad commit '' (all its 40 or 64 hex digits)"),
    (["--note", "a\nb", "x"], "--note, SERVER_UPDATE_NOTE: printable text of at most 200 charact"),
    (["--note", "x" * 201, "x"], "--note, SERVER_UPDATE_NOTE: printable text of at most 200 char"),
    (["--list", "-", "--list", "-", "x"], "--list -: standard input can be read once"),
    (
        ["https://github.com/aiegoo/hanuman.git"],
        "bad repository name 'https://github.com/aiegoo/hanuman.git'; give hanuman",
    ),
    (["git@host:hanuman/"], "bad repository name 'git@host:hanuman/'; give hanuman"),
    (["--secret-file=", "x"], "a file option is empty"),
    (["--write-failed=", "x"], "a file option is empty"),
    (["--nonsense", "x"], "unrecognized arguments: --nonsense"),
    (["x", "y"], "unrecognized arguments: y"),
    (["--stat", "x"], "unrecognized arguments: --stat"),
    (["--color", "blue", "x"], "argument --color: invalid choice: 'blue'"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_mistakes_in_the_arguments(server_update, capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        server_update.main(argv)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("usage: server-update [options] REPO\n")
    assert "server-update: error: " + message in err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("BY", "x" * 201, "SERVER_UPDATE_BY: printable text of at most 200 characters"),
        ("BY", "a\x1bb", "SERVER_UPDATE_BY: printable text of at most 200 characters"),
        ("NOTE", "a\tb", "--note, SERVER_UPDATE_NOTE: printable text of at most 200 characters"),
        ("VIA", "x", "SERVER_UPDATE_VIA: ids of relays, 16 hex digits each, with commas between"),
        ("VIA", ",".join(["ab" * 8] * 9), "SERVER_UPDATE_VIA: more than 8 relays"),
    ],
)
def test_mistakes_in_the_environment(server_update, capsys, monkeypatch, name, value, message):
    monkeypatch.setenv("SERVER_UPDATE_" + name, value)
    with pytest.raises(SystemExit) as caught:
        server_update.main(["x"])
    assert caught.value.code == 2
    assert "server-update: error: " + message in capsys.readouterr().err


def test_help_is_the_same_everywhere_and_fits_80_columns(server_update, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert server_update.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text == server_update.__doc__
    assert max(map(len, text.split("\n"))) <= 80
    assert server_update.main(["-h", "../x", "--ref", ".."]) == 0


def test_help_names_every_option_and_its_default(server_update, monkeypatch):
    names, defaults = [], {}
    add = argparse.ArgumentParser.add_argument

    def spy(self, *flags, **kwargs):
        names.extend(flag for flag in flags if flag.startswith("-"))
        if kwargs.get("default"):
            defaults[flags[0]] = kwargs["default"]
        return add(self, *flags, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", spy)
    server_update.parse_args(["x"])
    for name in names:
        assert re.search(r"\n  (-., )?%s[ ,]" % name, server_update.__doc__), name
    assert len(names) == 30
    for name, default in defaults.items():
        entry = server_update.__doc__.partition("\n  %s " % name)[2].partition("\n  -")[0]
        assert "(%s)" % (default if isinstance(default, str) else "%g" % default) in entry, name


def test_version(server_update, capsys):
    assert server_update.main(["--version"]) == 0
    assert capsys.readouterr().out == "server-update %s\n" % server_update.VERSION
