"""server-update where its own machine is short of files, threads or processors."""

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import threading

import pytest
from farm import mute, updates
from product import SERVER_UPDATE
from update_support import run_in_process

MANY_SLAVES = 300


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
    assert run_in_process(server_update, monkeypatch, entries, "--timeout=10", "--json") == 1
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


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_threads_share_one_cpu_unless_they_encrypt(scheme, tmp_path):
    """One that it may use; with https the work outside the interpreter needs all of them."""
    allowed = os.sched_getaffinity(0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        slavelist = tmp_path / "slavelist.txt"
        slavelist.write_text("%s://127.0.0.1:%d\n" % (scheme, listener.getsockname()[1]))
        command = [*SERVER_UPDATE, "--list", str(slavelist), "hanuman"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        listener.settimeout(60)
        listener.accept()[0].close()
        cpus = os.sched_getaffinity(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert cpus <= allowed
    assert len(cpus) == (1 if scheme == "http" else len(allowed))


@pytest.mark.parametrize("retries", [1, 2])
def test_shortages_eat_none_of_the_retries(server_update, monkeypatch, farm, capsys, retries):
    """Two times too few files, and then a slave that refuses as often as --retries forgives."""
    connect = socket.socket.connect
    errors = [(errno.EMFILE, "Too many open files")] * 2
    errors += [(errno.ECONNREFUSED, "Connection refused")] * retries

    def short(*args):
        if errors:
            raise OSError(*errors.pop(0))
        return connect(*args)

    monkeypatch.setattr(server_update, "MAX_PAUSE_S", 0.01)
    monkeypatch.setattr(socket.socket, "connect", short)
    options = ["--json", "--retries=%d" % retries]
    assert run_in_process(server_update, monkeypatch, [farm.add(updates())], *options) == 0
    assert '"outcome": "live"' in capsys.readouterr().out
    assert not errors
