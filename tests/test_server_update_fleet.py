"""server-update against a fleet in which every slave is bad in its own way: none is lost."""

import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import threading
import time
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import PYTHON, ROOT, wait_until
from farm import (
    COMMIT,
    OTHER,
    PREVIOUS,
    Answer,
    Farm,
    accepted,
    at_once,
    drip,
    error,
    http,
    raw,
    record,
    refused_port,
    silent_port,
    told,
    updates,
)

FLEET_TIMEOUT_S = 4
MANY_SLAVES = 300
BIG_BODY_BYTES = 10 * 1024 * 1024
OVERRUN_S = 1.0  # beyond --timeout, until the last connection is gone


@pytest.fixture
def farm():
    one = Farm()
    yield one
    one.close()


@pytest.fixture
def update(tmp_path):
    """update(entries, *options) -> CompletedProcess, with .lines and more where --json is."""

    def run(entries, *options, repo="hanuman", env=None, **kwargs):
        slavelist = tmp_path / "slavelist.txt"
        slavelist.write_text("".join(entry + "\n" for entry in entries))
        command = [PYTHON, "-I", str(ROOT / "server-update"), "--list", str(slavelist), *options]
        done = subprocess.run(
            command + [repo] * bool(repo),
            env=dict(os.environ, **(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=60,
            **kwargs,
        )
        assert "Traceback" not in done.stderr
        if "--json" in options and done.stdout:
            done.lines = [json.loads(line) for line in done.stdout.splitlines()]
            done.results = {line["slave"]: line for line in done.lines if line["type"] == "result"}
            done.outcomes = {slave: line["outcome"] for slave, line in done.results.items()}
            done.summary = done.lines[-1]
            assert [line["type"] for line in done.lines] == (
                ["start"] + ["result"] * (len(done.lines) - 2) + ["summary"]
            )
            assert done.summary["exit"] == done.returncode
        return done

    return run


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


def forgetful(request):
    """Takes the signal and no longer knows of it."""
    if request.path.startswith("/status"):
        return at_once(http("404 Not Found", '{"error": "no such update"}'))
    return accepted()


def silent_status(request):
    """Takes the signal; its status is held back for ever."""
    return Answer((), "stays") if request.path.startswith("/status") else accepted()


mute = raw(b"", "stays")  # takes the connection and says nothing


def accepted_after(delay_s):
    return Answer(((delay_s, accepted().parts[0][1]),), "close")


def odd_status(request):
    """Takes the signal; its status is JSON of another shape."""
    if request.path.startswith("/status"):
        return at_once(http("200 OK", '{"repo": "hanuman", "state": "live"}'))
    return accepted()


CHUNKED = b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b'{"repo": "hanuman", "update": 1, "state": "queued", "ref": null}'
FLEET = [  # kind, outcome, what the message says
    (updates(), "live", ""),
    (updates(0.7), "live", ""),
    (updates(message="the post-update hook failed"), "live", "the post-update hook failed"),
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
    (raw(http("200 OK", b"x" * BIG_BODY_BYTES, "text/plain")), "signalled", ""),
    (
        raw(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)),
        "(failed|timeout)",
        ".*took the signal, but its status makes no sense",
    ),
    (raw(CHUNKED + b"-1\r\n" + b"x" * BIG_BODY_BYTES), "unreachable", "does not answer in HTTP"),
    (drip(http("202 Accepted", BODY), 1.0), "unreachable", "connected, but no whole answer.*"),
    (drip(b"x" * 1000, 0.2), "unreachable", "connected, but no whole answer.*"),
    (raw(b"", "stays"), "unreachable", "connected, but no whole answer in time"),
    (raw(http("200 OK", "<html><h1>It works!</h1></html>", "text/html")), "signalled", ""),
    (raw(http("200 OK", '["hanuman"]')), "signalled", ""),
    (raw(http("200 OK", "{}")), "signalled", ""),
    (raw(http("200 OK", '{"update": "soon"}')), "signalled", ""),
    (
        error("302 Found", headers="Location: http://127.0.0.1:1/\r\n"),
        "refused",
        "Found .HTTP 302, not followed.",
    ),
    (raw(b"\x15\x03\x03\x00\x02\x02\x16"), "unreachable", "does not answer in HTTP"),
    (raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "unreachable", "does not answer in HTTP"),
    (restarting, "live", ""),
    (updates(1000), "timeout", "no outcome within 4 s"),
    (forgetful, "(failed|timeout)", ".*no such update .HTTP 404."),
    (odd_status, "(failed|timeout)", ".*took the signal, but its status makes no sense"),
    (silent_status, "timeout", "no outcome within 4 s; connected, but no whole answer in time"),
    (raw(http("200 OK", "updating hanuman\n", "text/plain")), "signalled", ""),
    (raw(b"HTTP/1.0 200 OK\r\n\r\nupdating hanuman"), "signalled", ""),
    (raw(b"HTTP/1.0 200 OK\n\nupdating hanuman"), "signalled", ""),
]


def test_every_one_of_a_mixed_fleet_is_accounted_for(farm, update):
    silent, keep_silent = silent_port()
    refused, keep_refused = refused_port()
    expected = {farm.add(kind): (outcome, message) for kind, outcome, message in FLEET}
    expected["127.78.0.1:%d" % silent] = ("unreachable", "no answer within 0.5 s")
    expected["127.0.0.1:%d" % refused] = ("unreachable", "connection refused")
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
    assert time.monotonic() - begun < FLEET_TIMEOUT_S + OVERRUN_S + 1  # and Python's own start
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
    wait_until(lambda: not farm.open, OVERRUN_S, what="no connection left")
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
    entry = farm.add(forgetful)  # asked at once, then after 1, 2 and 4 seconds
    done = update([entry], "--json", "--timeout", "30")
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


def test_a_dripped_answer_does_not_outlive_its_time(farm, update):
    """The connection of a slave that never gets to its end is closed, while others go on."""
    slow = farm.add(drip(b"HTTP/1.1 202 Accepted\r\n" + b"X: y\r\n" * 1000, 0.05))
    last = farm.add(updates(3))
    begun, closed = time.monotonic(), []

    def watch():
        wait_until(lambda: farm.signals[slow.split(":")[0]], 10, what="the signal")
        wait_until(lambda: farm.signals[last.split(":")[0]], 10, what="the other signal")
        wait_until(lambda: len(farm.open) <= 1, 10, what="the slow one being closed")
        closed.append(time.monotonic() - begun)

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = update([slow, last], "--json", "--timeout", "1.5", "--batch", "1", "--max-fail", "9")
    watcher.join(15)
    assert done.outcomes == {slow: "unreachable", last: "timeout"}
    assert closed and closed[0] < 1.5 + OVERRUN_S + 1


def test_local_limits_are_not_the_slaves_fault(farm, update):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    entries = [farm.add(updates()) for _ in range(MANY_SLAVES)]
    done = update(entries, "--json", preexec_fn=limit)
    assert done.summary["outcomes"] == {"live": MANY_SLAVES}
    assert done.returncode == 0
    assert farm.most_open <= 64


def test_too_few_files_are_waited_for(server_update, monkeypatch, farm, capsys):
    """EMFILE, or no port or thread left, puts the slave back, however few --retries there are."""
    entry, left = farm.add(updates()), [1]
    connect = socket.socket.connect

    def short(*args):
        if left and left.pop():
            raise OSError(24, "Too many open files")
        return connect(*args)

    monkeypatch.setattr(socket.socket, "connect", short)
    assert run_in_process(server_update, monkeypatch, [entry], "--json", "--retries", "0") == 0
    assert '"outcome": "live"' in capsys.readouterr().out
    assert not left


def test_no_more_threads_is_no_end(server_update, monkeypatch, farm, capsys):
    entries = [farm.add(updates()) for _ in range(20)]
    start = threading.Thread.start

    def few(self):
        if threading.active_count() > 8:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", few)
    code = run_in_process(server_update, monkeypatch, entries, "--json", "--retries", "0")
    assert (code, capsys.readouterr().out.count('"outcome": "live"')) == (0, 20)


@pytest.mark.parametrize(("lives", "mutes", "options"), [(1, 3, ["--parallel=1"]), (20, 600, [])])
def test_mute_slaves_keep_nobody_from_being_asked(farm, update, lives, mutes, options):
    """Outcomes are asked for before further signals are sent, and have threads of their own."""
    live = [farm.add(updates()) for _ in range(lives)]
    silent = [farm.add(mute) for _ in range(mutes)]
    done = update(live + silent, "--json", "--retries=0", "--timeout=3", *options)
    assert {done.outcomes[entry] for entry in live} == {"live"}
    assert {done.outcomes[entry] for entry in silent} == {"unreachable"}
    assert max(result["seconds"] for result in done.results.values()) < 3 + OVERRUN_S


def test_slaves_mute_after_the_signal_keep_nobody_from_being_signalled(farm, update):
    """Their polls hold threads until --timeout: there are others for signals."""

    def later_mute(request):
        is_poll = request.path.startswith("/status")
        return silent_status(request) if is_poll else accepted_after(0.5)

    mutes = [farm.add(later_mute) for _ in range(16)]
    live = [farm.add(updates()) for _ in range(8)]
    done = update(mutes + live, "--json", "--parallel=2", "--timeout=12")
    assert done.summary["outcomes"] == {"live": 8, "timeout": 16}
    begun = {entry: farm.begun[entry.partition(":")[0]] for entry in mutes + live}
    assert max(begun.values()) - min(begun.values()) < 11


def test_no_more_in_flight_than_parallel_where_some_stall(farm, update):
    """The place of one that stalled is not given to more than one."""
    entries = [farm.add(lambda request: accepted_after(1.3)) for _ in range(40)]
    done = update(entries, "--json", "--parallel=4", "--no-wait")
    assert done.summary["outcomes"] == {"signalled": 40}
    times = sorted(farm.begun[entry.partition(":")[0]] for entry in entries)
    assert max(sum(time < other < time + 0.9 for other in times) for time in times) < 4


def test_a_short_timeout_is_no_reason_not_to_ask(server_update, monkeypatch, farm, capsys):
    """So many slaves that each would be asked every 10 s are asked before their time is up."""
    monkeypatch.setattr(server_update, "POLLS_PER_S", 1)
    entries, options = [farm.add(updates(0.2)) for _ in range(10)], ["--timeout=4", "--parallel=8"]
    assert run_in_process(server_update, monkeypatch, entries, *options) == 0
    assert "hanuman: 10 live of 10" in capsys.readouterr().out


def test_interim_answers_are_passed_over(farm, update):
    """RFC 9110, 15.2: any number of 1xx may come before the answer."""
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    final = http("202 Accepted", BODY.decode())
    early, only = farm.add(raw(interim + final)), farm.add(raw(interim))
    done = update([early, only], "--json", "--no-wait", "--retries=0")
    assert done.outcomes == {early: "signalled", only: "unreachable"}


def test_mute_slaves_and_few_threads(server_update, monkeypatch, farm, capsys):
    """Nothing waits in a queue while its time runs: what is sent has a thread."""
    mutes = [farm.add(mute) for _ in range(8)]
    live = [farm.add(updates()) for _ in range(8)]
    start, most = threading.Thread.start, threading.active_count() + 6

    def few(self):
        if threading.active_count() >= most:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", few)
    entries = [entry for pair in zip(mutes, live) for entry in pair]
    assert run_in_process(server_update, monkeypatch, entries, "--timeout=3", "--json") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    outcomes = {line["slave"]: line["outcome"] for line in lines if line["type"] == "result"}
    assert outcomes == dict(dict.fromkeys(live, "live"), **dict.fromkeys(mutes, "unreachable"))
    assert set(farm.signals.values()) == {1}


def test_without_any_thread_nothing_is_sent(server_update, monkeypatch, farm, capsys):
    def none(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    assert run_in_process(server_update, monkeypatch, [farm.add(updates())]) == 2
    assert capsys.readouterr() == ("", "server-update: can't start a thread here: see ulimit -u\n")
    assert not farm.signals


def test_a_slow_look_up_and_a_mute_slave(server_update, monkeypatch, farm, capsys):
    """The look-up of a name takes longer than its slave has: it sends no signal any more."""
    slow, live = farm.add(mute), [farm.add(updates()) for _ in range(4)]
    lookup = socket.getaddrinfo

    def slowly(host, *args):
        if host == "slow.example":
            time.sleep(3)
            host = slow.partition(":")[0]
        return lookup(host, *args)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    entries, begun = ["slow.example:%d" % farm.port, *live], time.monotonic()
    options = ["--timeout=2", "--parallel=1", "--retries=1", "--json"]
    assert run_in_process(server_update, monkeypatch, entries, *options) == 1
    assert time.monotonic() - begun < 10
    assert capsys.readouterr().out.count('"outcome": "live"') == len(live)
    time.sleep(2)  # until the look-up is over
    assert not farm.signals[slow.partition(":")[0]]
    assert not farm.open


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_threads_share_one_cpu_unless_they_encrypt(scheme, tmp_path):
    """One that it may use; with https the work outside the interpreter needs all of them."""
    allowed = os.sched_getaffinity(0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        slavelist = tmp_path / "slavelist.txt"
        slavelist.write_text("%s://127.0.0.1:%d\n" % (scheme, listener.getsockname()[1]))
        command = [PYTHON, "-I", str(ROOT / "server-update"), "--list", str(slavelist), "hanuman"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        listener.settimeout(20)
        listener.accept()[0].close()
        cpus = os.sched_getaffinity(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert cpus <= allowed
    assert len(cpus) == (1 if scheme == "http" else len(allowed))


def run_in_process(server_update, monkeypatch, entries, *options):
    """main() in this process, with the list on standard input."""

    class Input:
        buffer = io.BytesIO("\n".join(entries).encode())

    monkeypatch.setattr("sys.stdin", Input)
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    cpus = os.sched_getaffinity(0)
    try:
        return server_update.main(["--list", "-", *options, "hanuman"])
    finally:
        os.sched_setaffinity(0, cpus)
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(one, handler)


def test_addresses_of_one_name_share_the_time(server_update, monkeypatch, farm, capsys):
    """A name with a dead address before the living one: it is reached, within the time."""
    silent, keep = silent_port()
    live = farm.add(updates())
    lookup = socket.getaddrinfo

    def both(host, port, *args, **kwargs):
        if host != "two.example":
            return lookup(host, port, *args, **kwargs)
        return [
            (2, 1, 6, "", ("127.78.0.1", silent)),
            (2, 1, 6, "", (live.split(":")[0], farm.port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    begun = time.monotonic()
    code = run_in_process(
        server_update,
        monkeypatch,
        ["two.example:%d" % farm.port],
        "--json",
        "--connect-timeout",
        "1",
        "--retries",
        "0",
        "--no-wait",
    )
    assert code == 0, capsys.readouterr()
    assert time.monotonic() - begun < 1
    del keep


def test_a_name_look_up_that_hangs_is_given_up(server_update, monkeypatch, farm, capsys):
    hang, lookup = threading.Event(), socket.getaddrinfo

    def slow(host, *args, **kwargs):
        if host == "slow.example":
            hang.wait(20)
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    begun = time.monotonic()
    try:
        code = run_in_process(
            server_update,
            monkeypatch,
            ["slow.example", farm.add(updates())],
            "--json",
            "--timeout",
            "1",
        )
        assert time.monotonic() - begun < 1 + OVERRUN_S
        assert code == 1
        assert capsys.readouterr().out.count('"outcome": "unreachable"') == 1
    finally:
        hang.set()


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"])
def test_a_proxy_of_the_environment_changes_nothing(farm, update, name):
    proxy = Farm()
    try:
        entry = farm.add(updates())
        done = update([entry], "--json", env={name: "http://127.0.0.1:%d" % proxy.port})
        assert done.outcomes == {entry: "live"}
        assert not proxy.requests
    finally:
        proxy.close()


def test_a_redirect_is_not_followed(farm, update):
    target = farm.add(updates())
    entry = farm.add(error("302 Found", headers="Location: http://%s/?repo=hanuman\r\n" % target))
    assert update([entry], "--json").outcomes == {entry: "refused"}
    assert not farm.signals[target.split(":")[0]]


def test_without_following_each_slave_is_asked_once(farm, update):
    entries = [farm.add(updates(1000)) for _ in range(5)]
    done = update(entries, "--json", "--no-wait")
    assert done.outcomes == dict.fromkeys(entries, "signalled")
    assert done.returncode == 0
    assert not farm.polls


def test_few_slaves_are_asked_by_long_polls(farm, update):
    entry = farm.add(updates())
    assert update([entry], "--json").returncode == 0
    assert [request.path for request in farm.requests] == [
        "/?repo=hanuman",
        "/status?repo=hanuman&update=1700000000000&wait=25",
    ]


def test_many_slaves_are_asked_in_turn(farm, update):
    """With 8 requests at a time, 40 slaves can't each hold one back."""
    entries = [farm.add(updates(0.3)) for _ in range(40)]
    done = update(entries, "--json", "--parallel", "8")
    assert done.outcomes == dict.fromkeys(entries, "live")
    assert farm.most_open <= 16
    assert sum(farm.signals.values()) == 40
    waits = ["wait=" in request.path for request in farm.requests if "/status" in request.path]
    assert not waits[0] and waits.count(True) <= 8


# Batches.


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


# The same commit.


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


@pytest.mark.parametrize("ref", ["v1.4", "fix/ü", COMMIT])
def test_a_ref_is_asked_for_and_checked(farm, update, ref):
    right, wrong = farm.add(updates(ref=ref)), farm.add(updates(ref="main"))
    done = update([right, wrong], "--json", "--ref", ref)
    assert done.outcomes == {right: "live", wrong: "failed"}
    assert done.results[wrong]["message"] == "a newer update put main live"
    assert done.lines[0]["ref"] == ref
    assert parse_qs(urlsplit(farm.requests[0].path).query) == {"repo": ["hanuman"], "ref": [ref]}


# --status, --dry-run, --write-failed.


def test_status_of_a_repository_sends_no_signal(farm, update):
    entries = [farm.add(updates()), farm.add(updates(commit=OTHER))]
    done = update(entries, "--status")
    assert done.returncode == 1
    assert not farm.signals
    assert re.search(
        r"^%s  live         1d5d931  -   +0\.\d s  since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\dZ$"
        % entries[0],
        done.stdout,
        re.M,
    )
    assert "\ncommits: 1d5d931 on 1, 77aa120 on 1\n" in done.stdout
    assert "to " not in done.stdout
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
    assert "b: 1d5d931 on 2, 77aa120 on 1\nhanuman: 1d5d931 on 3\n" in done.stdout
    done = update(entries[:2], "--status", "--json", repo=None)
    assert done.returncode == 0
    assert {(line["slave"], line["repo"]) for line in done.lines[1:-1]} == {
        (entry, repo) for entry in entries[:2] for repo in ("hanuman", "b")
    }
    assert {request.path for request in farm.requests} == {"/status"}


def test_one_repository_that_failed_counts_for_the_slave(farm, update):
    repos = {"a": record(repo="a"), "b": record("failed", commit=None, repo="b", message="no")}
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


def test_a_chunk_of_negative_size_is_not_read_for_ever(farm, update):
    """http.client takes it for all that comes: that would be 200 MB here."""
    entry = farm.add(raw(CHUNKED + b"-1\r\n" + b"x" * (200 << 20), "stays"))
    slavelist = "http://%s/" % entry
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], input=%r, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)" % slavelist.encode()
    )
    command = [PYTHON, "-I", str(ROOT / "server-update"), "--list=-", "--retries=0", "x"]
    most = subprocess.check_output([PYTHON, "-c", code, *command], timeout=60)
    assert farm.requests and int(most) < 80 * 1024


def test_status_of_what_was_never_asked_for(farm, update):
    done = update([farm.add(forgetful)], "--status", "--json")
    assert done.summary["outcomes"] == {"refused": 1}
    assert done.returncode == 1


def test_dry_run_sends_nothing_and_prints_a_list(farm, update, tmp_path):
    entries = [farm.add(updates()) for _ in range(60)]
    failed = tmp_path / "failed"
    done = update(
        entries,
        "--dry-run",
        "--limit",
        "127.77.0.?:*",
        "--batch",
        "2",
        "--write-failed",
        str(failed),
    )
    assert done.returncode == 0
    assert done.stdout.splitlines() == entries[:9]
    assert not farm.requests and not failed.exists()


def test_write_failed_is_a_list_of_exactly_those_not_live(farm, update, tmp_path):
    good = [farm.add(updates()), farm.add(raw(http("200 OK", "ok", "text/plain")))]
    bad = [
        farm.add(updates(state="failed", message="no # such\nthing")),
        farm.add(error("403 No")),
    ]
    failed = tmp_path / "failed"
    failed.write_text("old\n")
    assert update(good + bad, "--write-failed", str(failed)).returncode == 1
    assert {line.split()[0] for line in failed.read_text().splitlines()} == set(bad)
    again = subprocess.run(
        [PYTHON, "-I", str(ROOT / "server-update"), "--list", str(failed), "--dry-run", "x"],
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )
    assert (again.returncode, set(again.stdout.splitlines())) == (0, set(bad))
    assert update(good, "--write-failed", str(failed)).returncode == 0
    assert failed.read_text() == ""


# Mistakes: nothing is sent.


def test_a_mistake_in_the_list_sends_nothing(farm, update):
    done = update([farm.add(updates()), "web2:80x", "a b"])
    assert (done.returncode, done.stdout, farm.requests) == (2, "", [])
    assert re.fullmatch(
        r"server-update: \S+/slavelist.txt:2: bad port '80x'\n"
        r"server-update: \S+/slavelist.txt:3: bad host 'a b'\n",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--list", "/nonexistent/l"], "/nonexistent/l: No such file or directory"),
        (["--list="], "'': No such file or directory"),
        (["--write-failed", "/nonexistent/f"], "/nonexistent/f: No such file or directory"),
        (["--secret-file", "/nonexistent/s"], "/nonexistent/s: No such file or directory"),
        (["--cafile", "/nonexistent/c"], "/nonexistent/c: No such file or directory"),
        (["--cafile", "/dev/null"], "/dev/null: .*"),
        (["--limit", "db*"], r"no slave in \S+ matches --limit db\*"),
    ],
)
def test_a_mistake_in_the_files_sends_nothing(farm, update, options, message):
    done = update([farm.add(updates())], *options)
    assert (done.returncode, done.stdout, farm.requests) == (2, "", [])
    assert re.fullmatch("server-update: %s\n" % message, done.stderr)


def test_the_list_on_standard_input(farm, run_script):
    entry = farm.add(updates())
    done = run_script("server-update", "--list", "-", "hanuman", input="\ufeff%s\r\n" % entry)
    assert done.returncode == 0
    done = run_script("server-update", "--list", "-", "hanuman", input="%s\nx:y\n" % entry)
    assert (done.returncode, done.stderr) == (2, "server-update: standard input:2: bad port 'y'\n")


# Who may: the master's side.

SECRET = "correct horse battery staple"


def secret_file(tmp_path, text, mode=0o600):
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_each_request_is_signed_with_the_first_line(farm, update, tmp_path, server_update):
    entries = [farm.add(updates(0.1)) for _ in range(3)] + [
        "http://%s/get/?k=1" % farm.add(updates())
    ]
    path = secret_file(tmp_path, SECRET + "\nanother secret, for the change\n")
    assert update(entries, "--secret-file", str(path)).returncode == 0
    nonces = set()
    for request in farm.requests:
        field = request.headers["X-Server-Update-Signature"]
        when, nonce, signature = re.fullmatch(
            "t=([0-9]+),n=([0-9a-f]{32}),s=([0-9a-f]{64})", field
        ).groups()
        assert abs(int(when) - time.time()) < 60
        assert signature == server_update.sign(SECRET.encode(), "GET", request.path, when, nonce)
        nonces.add(nonce)
    assert len(nonces) == len(farm.requests) >= 8


def test_without_a_secret_nothing_is_signed(farm, update):
    assert update([farm.add(updates())]).returncode == 0
    assert all("X-Server-Update-Signature" not in request.headers for request in farm.requests)


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (SECRET, 0o644, "others can read secret file '.*'; do: chmod 600 .*"),
        (SECRET, 0o640, "others can read secret file '.*'; do: chmod 600 .*"),
        ("", 0o600, "secret file '.*' has no secret in it; do: .*"),
        ("short\n", 0o600, "secret file '.*' has a line of less than 16 bytes; do: .*"),
    ],
)
def test_a_secret_that_is_no_good_sends_nothing(farm, update, tmp_path, text, mode, message):
    path = secret_file(tmp_path, text, mode)
    done = update([farm.add(updates())], "--secret-file", str(path))
    assert (done.returncode, farm.requests) == (2, [])
    assert re.fullmatch("server-update: %s\n" % message, done.stderr)
    assert not text or text.strip() not in done.stderr
