"""server-update on networks that are slow, mute, misleading or hostile."""

import socket
import subprocess
import threading
import time

import pytest
from farm import (
    Farm,
    after,
    drip,
    error,
    hold,
    http,
    mute,
    raw,
    silent_port,
    updates,
    updates_when,
)
from processes import LATEST_S, wait_until
from product import PYTHON, SERVER_UPDATE
from update_support import run_in_process

OVERRUN_S = 20  # beyond --timeout, on a busy machine
CHUNKED = b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b'{"repo": "hanuman", "update": 1, "state": "queued", "ref": null}'


def test_a_dripped_answer_does_not_outlive_its_time(farm, start_update):
    """The connection of a slave that never gets to its end is closed, while others go on."""
    slow = farm.add(drip(b"HTTP/1.1 202 Accepted\r\n" + b"X: y\r\n" * 1000, 0.05))
    is_seen = threading.Event()
    last = farm.add(updates_when(is_seen.is_set))
    options = ["--json", "--timeout", "10", "--batch", "1", "--max-fail", "9"]
    running = start_update([slow, last], *options)
    wait_until(lambda: farm.signals[last.split(":")[0]], what="the other signal")
    slow_address = slow.split(":")[0]
    wait_until(lambda: slow_address not in farm.addresses_open(), what="the slow one's end")
    is_seen.set()
    assert running.finish().outcomes == {slow: "unreachable", last: "live"}


@pytest.mark.parametrize(
    ("lives", "mutes", "timeout_s", "options"),
    [(1, 3, 10, ["--parallel=1"]), pytest.param(20, 600, 8, [], marks=pytest.mark.slow)],
)
def test_mute_slaves_keep_nobody_from_being_asked(farm, update, lives, mutes, timeout_s, options):
    """Outcomes are asked for before further signals are sent, and have threads of their own."""
    live = [farm.add(updates()) for _ in range(lives)]
    silent = [farm.add(mute) for _ in range(mutes)]
    options = ["--json", "--retries=0", "--timeout=%d" % timeout_s, *options]
    done = update(live + silent, *options)
    assert {done.outcomes[entry] for entry in live} == {"live"}
    assert {done.outcomes[entry] for entry in silent} == {"unreachable"}
    assert max(result["seconds"] for result in done.results.values()) < timeout_s + OVERRUN_S


@pytest.mark.slow
def test_slaves_mute_after_the_signal_keep_nobody_from_being_signalled(farm, update):
    """Their polls hold threads until --timeout: there are others for signals."""
    mutes = [farm.add(after(0.2, hold)) for _ in range(12)]
    live = [farm.add(updates()) for _ in range(8)]
    done = update(mutes + live, "--json", "--parallel=2", "--timeout=60")
    assert done.summary["outcomes"] == {"live": 8, "timeout": 12}
    begun = {entry: farm.begun[entry.partition(":")[0]] for entry in mutes + live}
    assert max(begun.values()) - min(begun.values()) < 60  # before any poll was given up


@pytest.mark.slow
def test_no_more_in_flight_than_parallel_where_some_stall(
    server_update, monkeypatch, farm, capsys
):
    """The place of one that stalled is not given to more than one."""
    monkeypatch.setattr(server_update, "STALLED_S", 3)
    entries = [farm.add(after(4, updates())) for _ in range(16)]
    options = ["--parallel=4", "--no-wait"]
    assert run_in_process(server_update, monkeypatch, entries, *options) == 0
    assert "hanuman: 16 signalled of 16" in capsys.readouterr().out
    times = sorted(farm.begun[entry.partition(":")[0]] for entry in entries)
    assert max(sum(time < other < time + 1 for other in times) for time in times) < 4


def test_a_short_timeout_is_no_reason_not_to_ask(server_update, monkeypatch, farm, capsys):
    """So many slaves that each would be asked every 50 s are asked before their time is up."""
    monkeypatch.setattr(server_update, "MAX_POLLS_PER_S", 0.2)
    entries = [farm.add(updates(0.2)) for _ in range(10)]
    options = ["--timeout=16", "--parallel=8"]
    assert run_in_process(server_update, monkeypatch, entries, *options) == 0
    assert "hanuman: 10 live of 10" in capsys.readouterr().out


def test_interim_answers_are_passed_over(farm, update):
    """RFC 9110, 15.2: any number of 1xx may come before the answer."""
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    final = http("202 Accepted", BODY.decode())
    early, only = farm.add(raw(interim + final)), farm.add(raw(interim))
    done = update([early, only], "--json", "--no-wait", "--retries=0")
    assert done.outcomes == {early: "signalled", only: "unreachable"}


def test_a_chunk_of_negative_size_is_not_read_for_ever(farm, update):
    """http.client takes it for all that comes: that would be 200 MB here."""
    entry = farm.add(raw(CHUNKED + b"-1\r\n" + b"x" * (200 << 20), "stays"))
    slavelist = "http://%s/" % entry
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], input=%r, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)" % slavelist.encode()
    )
    command = [*SERVER_UPDATE, "--list=-", "--retries=0", "x"]
    most = subprocess.check_output([PYTHON, "-c", code, *command], timeout=300)
    assert farm.requests and int(most) < 80 * 1024


@pytest.mark.slow
def test_a_slow_look_up_and_a_mute_slave(server_update, monkeypatch, farm, capsys):
    """The look-up of a name takes longer than its slave has: it sends no signal any more."""
    slow, live = farm.add(mute), [farm.add(updates()) for _ in range(4)]
    lookup, looked_up = socket.getaddrinfo, threading.Event()

    def slowly(host, *args):
        if host == "slow.example":
            time.sleep(8)
            looked_up.set()
            host = slow.partition(":")[0]
        return lookup(host, *args)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    entries = ["slow.example:%d" % farm.port, *live]
    options = ["--timeout=5", "--parallel=1", "--retries=1", "--json"]
    assert run_in_process(server_update, monkeypatch, entries, *options) == 1
    assert capsys.readouterr().out.count('"outcome": "live"') == len(live)
    assert looked_up.wait(LATEST_S)
    wait_until(lambda: not farm.open)
    assert not farm.signals[slow.partition(":")[0]]


def test_addresses_of_one_name_share_the_time(server_update, monkeypatch, farm, capsys):
    """A name with two dead addresses before the living one: it is reached, within the time."""
    silent, keep = silent_port()
    live = farm.add(updates())
    lookup = socket.getaddrinfo

    def both(host, port, *args, **kwargs):
        if host != "two.example":
            return lookup(host, port, *args, **kwargs)
        return [
            (2, 1, 6, "", ("127.78.0.1", silent)),
            (2, 1, 6, "", ("127.78.0.2", silent)),
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
        "6",
        "--retries",
        "0",
        "--no-wait",
    )
    assert code == 0, capsys.readouterr()
    assert time.monotonic() - begun < 12, "less than two times, which two dead ones would take"
    del keep


def test_a_name_look_up_that_hangs_is_given_up(server_update, monkeypatch, farm, capsys):
    hang, lookup = threading.Event(), socket.getaddrinfo

    def slow(host, *args, **kwargs):
        if host == "slow.example":
            hang.wait(100)
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
            "5",
        )
        assert time.monotonic() - begun < 5 + OVERRUN_S
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
