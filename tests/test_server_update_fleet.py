"""server-update against a fleet in which every slave is bad in its own way: none is lost."""

import re
import time
from urllib.parse import parse_qs, urlsplit

import pytest
from farm import (
    COMMIT,
    PREVIOUS,
    accepted,
    at_once,
    drip,
    error,
    forgetful,
    hold,
    http,
    raw,
    refusing_entry,
    silent_port,
    told,
    updates,
    updates_when,
)
from processes import wait_until
from update_support import run_in_process

FLEET_TIMEOUT_S = 10
BIG_BODY_BYTES = 10 * 1024 * 1024
OVERRUN_S = 20  # beyond --timeout, on a busy machine; some answers would take 1,000 s
CHUNKED = b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b'{"repo": "hanuman", "update": 1, "state": "queued", "ref": null}'


def flaky(request):
    """503 for the first two signals, then fine."""
    if request.count <= 2 and not request.path.startswith("/status"):
        return at_once(http("503 Service Unavailable", '{"error": "stopping"}'))
    return updates()(request)


def restarting(request):
    """Takes the signal, is gone for the first polls, then tells the outcome."""
    if not request.path.startswith("/status"):
        return accepted()
    return raw(b"", "reset")(request) if request.count <= 2 else told()


def odd_status(request):
    """Takes the signal; its status is JSON of another shape."""
    if request.path.startswith("/status"):
        return at_once(http("200 OK", '{"repo": "hanuman", "state": "live"}'))
    return accepted()


NO_ID = "its answer has no update id: nothing more is known"
# The last answer may come too late on a busy machine: a time that is over is told by it.
CUT = "no outcome within 10 s; connected, but no whole answer in time"
NO_SENSE = "(.*took the signal, but its status makes no sense|%s)" % CUT
FLEET = [  # kind, outcome, what the message says
    (updates(), "live", ""),
    (updates(0.7), "live", ""),
    (updates(message="a hook failed (1)"), "hook failed", "a hook failed .1."),
    (updates(hook=143, message="nginx: no"), "hook failed", "nginx: no"),
    (updates(beneath={"live": 3, "unreachable": 1}), "beneath failed", ""),
    (updates(beneath={"live": 3}, hook=None), "live", ""),
    (updates(hook=None, message="a tree is set aside"), "live", "a tree is set aside"),
    (
        updates(state="failed", message="repository 'x' not found", commit=PREVIOUS),
        "failed",
        "repository 'x' not found",
    ),
    (error("400 Bad Request", "repeated repo"), "refused", "repeated repo .HTTP 400."),
    (error("401 Unauthorized", "signature missing"), "refused", "signature missing .HTTP 401."),
    (error("403 Forbidden", "not allowed"), "refused", "not allowed .HTTP 403."),
    (error("404 Not Found"), "refused", "Not Found .HTTP 404."),
    (error("500 Oops"), "failed", "Internal Server Error .HTTP 500."),
    (flaky, "live", ""),
    (
        error("503 Later", "too much is queued", "Retry-After: 1\r\n"),
        "failed",
        "too much is queued .HTTP 503.",
    ),
    (raw(b"", "reset"), "unreachable", "(connection reset by peer|remote end closed.*)"),
    (raw(b""), "unreachable", "remote end closed connection without response"),
    (raw(http("202 Accepted", BODY, length=len(BODY) + 9)), "unreachable", "answer cut short"),
    (
        raw(http("202 Accepted", BODY, length=len(BODY) - 9)),
        "unreachable",
        "answered with broken JSON",
    ),
    (raw(http("202 Accepted", BODY)[:30]), "unreachable", "answer cut short"),
    (raw(b"HTTP/1.1 200 OK\r\ncontent-LENGTH:9\r\n\r\ncut"), "unreachable", "answer cut short"),
    (raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200), "unreachable", "does not answer in HTTP"),
    (raw(http("200 OK", b"x" * BIG_BODY_BYTES, "text/plain")), "signalled", NO_ID),
    (
        raw(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)),
        "(failed|timeout)",
        NO_SENSE,
    ),
    (raw(CHUNKED + b"-1\r\n" + b"x" * BIG_BODY_BYTES), "unreachable", "does not answer in HTTP"),
    (drip(http("202 Accepted", BODY), 5.0), "unreachable", "connected, but no whole answer.*"),
    (drip(b"x" * 1000, 1.0), "unreachable", "connected, but no whole answer.*"),
    (raw(b"", "stays"), "unreachable", "connected, but no whole answer in time"),
    (raw(http("200 OK", "<html><h1>It works!</h1></html>", "text/html")), "signalled", NO_ID),
    (raw(http("200 OK", '["hanuman"]')), "signalled", NO_ID),
    (raw(http("200 OK", "{}")), "signalled", NO_ID),
    (raw(http("200 OK", '{"update": "soon"}')), "signalled", NO_ID),
    (
        error("302 Found", headers="Location: http://127.0.0.1:1/\r\n"),
        "refused",
        "Found .HTTP 302, not followed.",
    ),
    (raw(b"\x15\x03\x03\x00\x02\x02\x16"), "unreachable", "does not answer in HTTP"),
    (raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "unreachable", "does not answer in HTTP"),
    (restarting, "live", ""),
    (updates(1000), "timeout", "no outcome within 10 s(; connected, but no whole answer.*)?"),
    (forgetful, "(failed|timeout)", "(.*no such update .HTTP 404.|%s)" % CUT),
    (odd_status, "(failed|timeout)", NO_SENSE),
    (hold, "timeout", CUT),
    (raw(http("200 OK", "updating hanuman\n", "text/plain")), "signalled", NO_ID),
    (raw(b"HTTP/1.0 200 OK\r\n\r\nupdating hanuman"), "signalled", NO_ID),
    (raw(b"HTTP/1.0 200 OK\n\nupdating hanuman"), "signalled", NO_ID),
]


def test_every_one_of_a_mixed_fleet_is_accounted_for(farm, update):
    silent, keep_silent = silent_port()
    refused, keep_refused = refusing_entry()
    expected = {farm.add(kind): (outcome, message) for kind, outcome, message in FLEET}
    expected["127.78.0.1:%d" % silent] = ("unreachable", "no answer within 0.5 s")
    expected[refused] = ("unreachable", "connection refused")
    expected["https://" + farm.add(updates())] = (
        "unreachable",
        ".*(wrong version number|record).*",
    )
    begun = time.monotonic()
    done = update(
        expected,
        "--json",
        "--timeout",
        "%g" % FLEET_TIMEOUT_S,
        "--retries",
        "2",
        "--connect-timeout",
        "0.5",
    )
    assert time.monotonic() - begun < FLEET_TIMEOUT_S + OVERRUN_S
    assert set(done.outcomes) == set(expected)
    wrong = [
        (farm.kinds.get(slave.split(":")[0]), result, expected[slave])
        for slave, result in done.results.items()
        if not re.fullmatch(expected[slave][0], result["outcome"])
        or not re.fullmatch(expected[slave][1], result["message"])
    ]
    assert wrong == []
    assert done.returncode == 1
    assert sum(done.summary["outcomes"].values()) == len(expected)
    wait_until(lambda: not farm.open, what="no connection left")
    del keep_silent
    keep_refused.close()


def test_retries_are_as_many_as_asked_for_and_only_where_they_make_sense(farm, update):
    kinds = {
        "later": error("503 Later", "x"),
        "reset": raw(b"", "reset"),
        "refused": error("403 No", "x"),
        "failed": error("500 Oops", "x"),
        "old": raw(http("200 OK", "ok", "text/plain")),
    }
    entries = {name: farm.add(kind) for name, kind in kinds.items()}
    done = update(entries.values(), "--json", "--retries", "1")
    assert done.returncode == 1
    asked = {name: farm.signals[entry.split(":")[0]] for name, entry in entries.items()}
    assert asked == {"later": 2, "reset": 2, "refused": 1, "failed": 1, "old": 1}


def test_a_forgotten_update_is_a_failure_after_a_few_questions(farm, update):
    """Asked at once, then after 1, 2 and 4 seconds; in this copy sooner."""
    entry = farm.add(forgetful)
    done = update([entry], "--json", "--timeout=30", constants={"MAX_PAUSE_S": 0.2})
    assert done.results[entry]["message"] == "no such update (HTTP 404)"
    assert done.outcomes[entry] == "failed"
    assert 2 <= farm.polls[entry.split(":")[0]] <= 6


def test_a_slave_that_cannot_be_asked_is_no_outcome_until_the_timeout(farm, update):
    def gone(request):
        return (
            accepted()
            if request.count == 1 and "status" not in request.path
            else raw(b"", "reset")(request)
        )

    entry = farm.add(gone)
    begun = time.monotonic()
    done = update([entry], "--json", "--timeout", "2.5", "--retries", "0")
    assert time.monotonic() - begun >= 2.5
    assert done.outcomes == {entry: "timeout"}
    assert done.results[entry]["message"].startswith("no outcome within 2.5 s; ")
    assert farm.signals[entry.split(":")[0]] == 1


@pytest.mark.parametrize("ref", ["v1.4", "fix/ü", COMMIT])
def test_a_ref_is_asked_for_and_checked(farm, update, ref):
    right, wrong = farm.add(updates(ref=ref)), farm.add(updates(ref="main"))
    done = update([right, wrong], "--json", "--ref", ref)
    assert done.outcomes == {right: "live", wrong: "failed"}
    assert done.results[wrong]["message"] == "a newer update put main live"
    assert done.lines[0]["ref"] == ref
    asked = parse_qs(urlsplit(farm.requests[0].path).query)
    assert asked.pop("by")
    assert asked == {"repo": ["hanuman"], "ref": [ref]}


def test_without_following_each_slave_is_asked_once(farm, update):
    entries = [farm.add(updates(1000)) for _ in range(5)]
    done = update(entries, "--json", "--no-wait")
    assert done.outcomes == dict.fromkeys(entries, "signalled")
    assert done.returncode == 0
    assert not farm.polls


def test_few_slaves_are_asked_by_long_polls(farm, update):
    entry = farm.add(updates())
    assert update([entry], "--json", env={"SERVER_UPDATE_BY": "anna@here"}).returncode == 0
    assert [request.path for request in farm.requests] == [
        "/?repo=hanuman&by=anna%40here",
        "/status?repo=hanuman&update=1700000000000&wait=25",
    ]


def test_many_slaves_are_asked_in_turn(farm, update):
    """With 8 requests at a time, 40 slaves can't each hold one back."""
    entries = [farm.add(updates(0.3)) for _ in range(40)]
    # None counts as stalled, which makes room for more, where the farm itself stands still.
    done = update(entries, "--json", "--parallel", "8", constants={"STALLED_S": 30})
    assert done.outcomes == dict.fromkeys(entries, "live")
    assert farm.most_open <= 16
    assert sum(farm.signals.values()) == 40
    waits = ["wait=" in request.path for request in farm.requests if "/status" in request.path]
    assert not waits[0] and waits.count(True) <= 8


def test_polls_that_are_always_due_keep_no_signal_back(server_update, monkeypatch, farm, capsys):
    """No update ends before the last slave was signalled; polls would take all the room."""
    entries = []
    is_signalled = updates_when(lambda: len(farm.signals) == len(entries))
    entries += [farm.add(is_signalled) for _ in range(100)]
    monkeypatch.setattr(server_update, "POLL_PAUSE_S", 0)
    monkeypatch.setattr(server_update, "MAX_POLLS_PER_S", 1e9)
    monkeypatch.setattr(server_update, "MIN_POLLS_PER_S", 1e9)
    options = ["--parallel=8", "--json", "--timeout=60"]
    assert run_in_process(server_update, monkeypatch, entries, *options) == 0
    assert capsys.readouterr().out.count('"outcome": "live"') == len(entries)
    assert sum(farm.signals.values()) == len(entries)
