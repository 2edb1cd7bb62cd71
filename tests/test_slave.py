"""slave.py in a process of its own: what it promises about updates."""

import fcntl
import http.client
import json
import os
import random
import re
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from signal import SIGINT, SIGTERM

import pytest
from processes import processes_below, rss_kib, threads_of, wait_until
from product import ISOLATED, VERSION, with_no_rights
from slave_support import (
    LONG_POLLS,
    ONE,
    SOON_ENDED,
    THREADS,
    forget_bin,
    kill_hard,
    record_file,
    runs,
    stand_in,
    start_by_hand,
    wait_runs,
)

ROUNDS = int(os.environ.get("ROUNDS", 6))  # of kill -9, with a quick slave-activate of ours
REAL_ROUNDS = int(os.environ.get("REAL_ROUNDS", 3))  # with the real one
BURST = 1000  # signals
UPDATES = 100  # for zombies, memory and open files
TOO_LONG = "x" * 256  # for the name of a file
EXCHANGES = int(os.environ.get("EXCHANGES", 6))  # of the repository that has the served file
# -- never lost


def kill_rounds(slave, upstream, rounds, longest_s, seed):
    """Signals and kills at random moments; after every second kill all must have happened."""
    dice = random.Random(seed)
    repos = {name: upstream.create(name, files={"a": "0"}) for name in ("hanuman", "b", "c")}
    order = {name: [repo.head()] for name, repo in repos.items()}
    last_id = dict.fromkeys(repos, 0)
    for number in range(rounds):
        asked = []
        for name in dice.sample(sorted(repos), dice.randint(1, 3)):
            if dice.random() < 0.5:
                order[name].append(repos[name].commit({"a": str(number)}))
            update = slave.signal(name)
            assert update > last_id[name], "ids only grow"
            last_id[name] = update
            asked.append((name, update, len(order[name]) - 1))
        for _ in range(number % 2 + 1):
            time.sleep(dice.random() * longest_s)
            kill_hard(slave)
            slave.start()
        for name, update, at_least in asked:
            record = slave.wait_update(name, update)
            assert record["state"] == "live", record
            assert order[name].index(record["commit"]) >= at_least, "not what was asked for"
            assert record["update"] >= update
    assert not re.search("Traceback|broken|connection of", slave.log())


def test_accepted_updates_survive_kill_9(start_slave, upstream):
    slave = start_slave()
    stand_in(slave, "sleep 0.05")
    kill_rounds(slave, upstream, ROUNDS, 0.12, seed=41)
    starts = [line.split()[0] for line in runs(slave) if " begins" in line]
    ends = [line.split()[0] for line in runs(slave) if line.endswith(" ends")]
    kills = slave.log().count("listening on port") - 1
    assert len(starts) - len(ends) <= 3 * kills, "no more runs than the interrupted ones"
    assert sorted(os.listdir(str(slave.state))) == ["b.json", "c.json", "hanuman.json"]


@pytest.mark.slow
def test_accepted_updates_survive_kill_9_with_real_clones(start_slave, upstream):
    slave = start_slave()
    kill_rounds(slave, upstream, REAL_ROUNDS, 0.4, seed=42)
    for name in ("hanuman", "b", "c"):
        if (slave.repos / name).exists():
            status = subprocess.check_output(
                ["git", "-C", str(slave.repos / name), "status", "--porcelain"]
            )
            assert status == b""


def test_what_the_slave_ends_three_times_is_failed(start_slave, upstream):
    upstream.create("hanuman", files={"a": "1"})
    slave = start_slave()
    stand_in(slave, "sleep 1000")
    update = slave.signal()
    for number in range(1, 4):
        wait_runs(slave, number)
        kill_hard(slave)
        slave.start()
    record = slave.wait_update(update=update)
    assert record["state"] == "failed"
    assert record["message"].startswith("interrupted three times by the slave's own end")
    stand_in(slave)
    assert slave.wait_update()["state"] == "live", "and the next signal is as good as any"


BROKEN = {
    "empty": b"",
    "torn": b'{"repo": "torn", "upd',
    "zeros": b"\0" * 512,
    "list": b"[]",
    "null": b"null",
    "deep": b"[" * 100000,
    "other": b'{"repo": "b"}',
    "bytes": b"\xff\xfe",
}


def test_broken_records_are_kept_aside(start_slave, upstream):
    slave = start_slave()
    stand_in(slave)
    slave.wait_update("good")
    slave.stop()
    for name, data in BROKEN.items():
        (slave.state / (name + ".json")).write_bytes(data)
    (slave.state / "record.tmp").write_bytes(b"x")
    before = len(slave.log())
    slave.start()
    log = slave.log()[before:]
    for name, data in BROKEN.items():
        assert (slave.state / (name + ".json.broken")).read_bytes() == data
        lines = [line for line in log.splitlines() if "/%s.json" % name in line]
        assert len(lines) == 1
        assert "%s.json is broken, kept as %s.json.broken: " % (name, name) in lines[0]
    assert not (slave.state / "record.tmp").exists()
    assert list(slave.json("/status")["repos"]) == ["good"]
    assert slave.wait_update("torn")["state"] == "live"


def test_a_full_disk_is_an_honest_503(start_slave, upstream, small_disk):
    upstream.create("hanuman", files={"a": "1"})
    disk = small_disk(256 * 1024)
    slave = start_slave(REPOS_DIR=disk)
    stand_in(slave)
    before = slave.wait_update()
    with open(str(disk / "filler"), "wb", buffering=0) as filler:
        with pytest.raises(OSError):
            while True:
                filler.write(b"x" * 4096)
    for _ in range(5):
        status, headers, body = slave.get("/?repo=hanuman")
        assert (status, headers["Retry-After"]) == (503, "2")
        assert json.loads(body.decode()) == {
            "error": "can't record the update: No space left on device"
        }
    told = slave.json("/status?repo=hanuman")
    assert told == before, "what was refused never was"
    assert sorted(os.listdir(str(slave.state))) == ["hanuman.json"]
    (disk / "filler").unlink()
    assert slave.wait_update()["state"] == "live"


# -- serialised and coalesced


def test_a_thousand_signals_cost_two_runs(start_slave, upstream):
    repo = upstream.create("hanuman", files={"a": "0"})
    slave = start_slave()
    stand_in(
        slave,
        'n=$(cat "$HOME/lock" 2>/dev/null); echo $$ >"$HOME/lock"; '
        '[ -z "$n" ] || echo two at once >>"$HOME/runs"; '
        'until [ -e "$HOME/go" ]; do sleep 0.02; done; : >"$HOME/lock"',
    )
    first = slave.signal()
    wait_runs(slave, 1)
    one_commit = threading.Lock()

    def ask(number):
        if number % 250 == 0:
            with one_commit:
                repo.commit({"a": str(number)})
        return slave.signal()

    with ThreadPoolExecutor(16) as pool:
        updates = list(pool.map(ask, range(BURST)))
    updates.append(slave.signal())  # once all commits are there
    (slave.home / "go").touch()
    assert len(set(updates)) == BURST + 1, "each signal has an id of its own"
    outcomes = {slave.wait_update(update=update)["commit"] for update in updates[::50]}
    last = slave.wait_update(update=updates[-1])
    assert last["commit"] == repo.head()
    assert last["state"] == "live" and outcomes
    assert slave.wait_update(update=first)["state"] == "live"
    begins = [line for line in runs(slave) if " begins" in line]
    assert len(begins) == 2, "the one that ran while signals came, and one more"
    assert [line.split()[1] for line in runs(slave)] == ["begins", "ends"] * len(begins)


def test_a_later_ref_wins(start_slave, upstream):
    repo = upstream.create("hanuman", files={"a": "0"})
    one = repo.head()
    repo.git("tag", "v1")
    two = repo.commit({"a": "1"})
    slave = start_slave()
    slave.wait_update()
    stop = slave.home / "go"
    real = (slave.bin / "slave-activate").read_bytes()
    (slave.bin / "real-activate").write_bytes(real)
    (slave.bin / "real-activate").chmod(0o755)
    stand_in(
        slave,
        text='#!/bin/sh\nuntil [ -e "%s" ]; do sleep 0.02; done\nexec real-activate "$@"\n' % stop,
    )
    slave.signal()
    wait_until(lambda: slave.json("/status?repo=hanuman")["state"] == "running")
    asked = [slave.signal(ref=ref) for ref in ("main", "v1")]
    stop.touch()
    told = [slave.wait_update(update=update) for update in asked]
    assert told[0] == told[1]
    assert (told[1]["ref"], told[1]["commit"], told[1]["previous"]) == ("v1", one, two)
    assert (slave.repos / "hanuman" / "a").read_text() == "0"


def test_four_side_by_side(start_slave, upstream):
    slave = start_slave()
    stand_in(slave, 'until [ -e "$HOME/go-$1" ]; do sleep 0.02; done')
    names = ["r1", "r2", "r3", "r4", "r5"]
    updates = {name: slave.signal(name) for name in names}
    wait_runs(slave, 4)
    time.sleep(0.2)
    states = {name: slave.json("/status?repo=" + name)["state"] for name in names}
    assert [states[name] for name in names] == ["running"] * 4 + ["queued"]
    (slave.home / "go-r3").touch()
    wait_until(lambda: slave.json("/status?repo=r5")["state"] == "running")
    for name in ("r2", "r4", "r5"):  # r1 hangs on; that holds up nobody
        (slave.home / ("go-" + name)).touch()
        assert slave.wait_update(name, updates[name])["state"] == "live"
    for name in ("r6", "r7"):
        (slave.home / ("go-" + name)).touch()
        assert slave.wait_update(name)["state"] == "live"
    assert slave.json("/status?repo=r1")["state"] == "running"


def test_too_many_queued_is_503(start_slave, upstream):
    slave = start_slave()
    stand_in(slave, "sleep 1000")
    answers = [slave.get("/?repo=r%d" % number)[0] for number in range(106)]
    assert answers == [202] * 104 + [503] * 2
    status, headers, body = slave.get("/?repo=more")
    assert (status, headers["Retry-After"], json.loads(body.decode())) == (
        503,
        "2",
        {"error": "too many updates are queued"},
    )
    assert slave.get("/?repo=r103")[0] == 202, "one that waits already takes no more room"
    (slave.repos / "site").mkdir()
    assert slave.get("/?repo=site")[0] == 202, "who makes up names keeps nothing real from it"


# -- status


def test_states_and_the_long_poll(start_slave, upstream):
    upstream.create("hanuman", files={"a": "1"})
    slave = start_slave(constants=LONG_POLLS)
    stand_in(
        slave,
        'until [ -e "$HOME/go" ]; do sleep 0.01; done; rm "$HOME/go"; date +%s.%N >"$HOME/ended"',
    )
    status, headers, body = slave.get("/?repo=hanuman&ref=main")
    told = json.loads(body.decode())
    assert status == 202
    assert told == {"repo": "hanuman", "update": told["update"], "state": "queued", "ref": "main"}
    path = "/status?repo=hanuman&update=%d" % told["update"]
    assert headers["Location"] == path
    wait_runs(slave, 1)
    running = slave.json(path + "&wait=0")
    assert running["state"] == "running" and running["finished"] is None
    assert list(running) == [
        "repo",
        "update",
        "ref",
        "state",
        "requested",
        "started",
        "finished",
        "commit",
        "previous",
        "message",
        "pin",
        "hook",
        "beneath",
        "beneath_bad",
        "by",
        "note",
    ]
    second = slave.signal()
    assert slave.json("/status?repo=hanuman")["state"] == "queued"
    late = []
    with ThreadPoolExecutor(9) as pool:
        polls = [pool.submit(slave.json, path + "&wait=240", timeout=300) for _ in range(8)]
        time.sleep(0.3)
        (slave.home / "go").touch()
        for poll in polls:
            record = poll.result()
            assert record["state"] == "live"
            late.append(time.time() - record["finished"])
    assert min(late) < 60, "a long poll returns at the end, not when its time is up: %s" % late
    ended = float((slave.home / "ended").read_text())
    assert 0 < record["finished"] - ended < 60
    of_second = "/status?repo=hanuman&update=%d" % second
    wait_until(lambda: slave.json(of_second)["state"] == "running")
    began = time.monotonic()
    assert slave.json(of_second + "&wait=1")["state"] == "running"
    assert 0.9 < time.monotonic() - began < 60
    (slave.home / "go").touch()
    assert slave.wait_update(update=second)["state"] == "live"
    everything = slave.json("/status")
    assert list(everything) == ["version", "repos"]
    assert everything["repos"] == {"hanuman": slave.json("/status?repo=hanuman")}


def test_unknown_updates_are_404(start_slave, upstream):
    slave = start_slave()
    stand_in(slave)
    assert slave.json("/status") == {"version": VERSION, "repos": {}}
    error = {"error": "no such update was asked for here"}
    assert slave.json("/status?repo=hanuman&wait=9", status=404) == error
    update = slave.wait_update()["update"]
    assert slave.json("/status?repo=hanuman&update=%d&wait=9" % (update + 1), status=404) == error
    assert slave.json("/status?repo=hanuman&update=1", status=404) == error
    assert slave.json("/status?repo=hanuman&update=%d" % update)["update"] == update
    assert slave.json("/get", status=400) == {"error": "no 'repo'"}
    assert slave.json("/nowhere", status=404) == {"error": "no such path"}


def test_live_previous_and_message_with_real_clones(start_slave, upstream, http_upstream):
    repo = upstream.create("hanuman", files={"a": "1"})
    one = repo.head()
    slave = start_slave(BASE_URL=http_upstream.url, TIMEOUT=600)
    record = slave.wait_update()
    assert (record["state"], record["commit"], record["previous"]) == ("live", one, None)
    assert record["message"] == ""
    two = repo.commit({"a": "2"})
    record = slave.wait_update()
    assert (record["commit"], record["previous"]) == (two, one)
    record = slave.wait_update(update=slave.signal(ref="nowhere"))
    assert (record["state"], record["commit"], record["previous"]) == ("failed", two, two)
    assert "nowhere" in record["message"] and "\n" not in record["message"]
    record = slave.wait_update("nope")
    assert (record["state"], record["commit"]) == ("failed", None)
    assert "repository '%s/nope.git/' not found" % http_upstream.url in record["message"]
    slave.stop()
    slave.start()
    assert slave.json("/status?repo=hanuman")["commit"] == two
    env = dict(os.environ, HOME=str(slave.home), SERVER_UPDATE_CONF=str(slave.conf))
    three = repo.commit({"a": "3"})
    subprocess.check_call([str(slave.bin / "slave-activate"), "hanuman"], env=env)
    assert slave.json("/status?repo=hanuman")["commit"] == three, "by hand counts as well"


# -- timeouts, and what a run leaves behind

TERM_IGNORING = """#!/bin/sh
trap '' TERM
echo deaf >&2
python3 -c 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)' &
while :; do sleep 1; done
"""
PIPE_HOLDING = """#!/bin/sh
echo "fatal: I go" >&2
python3 -c 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)' &
exit 1
"""


def test_a_run_that_ignores_term_is_killed_with_its_group(start_slave, upstream):
    slave = start_slave(TIMEOUT=1, constants=SOON_ENDED)
    stand_in(slave, text=TERM_IGNORING)
    began = time.monotonic()
    record = slave.wait_update()
    assert time.monotonic() - began > 6.5, "first slave-activate has time to end, then TERM has"
    assert record["message"] == "stopped as it took longer than 1 s (TIMEOUT), and had said: deaf"
    wait_until(
        lambda: processes_below(slave.home.parent) == [slave.process.pid],
        what="the whole group's end",
    )
    stand_in(slave)
    assert slave.wait_update()["state"] == "live"


def test_a_grandchild_that_holds_the_pipe_open(start_slave, upstream):
    slave = start_slave()
    stand_in(slave, text=PIPE_HOLDING)
    began = time.monotonic()
    record = slave.wait_update()
    assert time.monotonic() - began < 30, "the end of slave-activate counts, not that of its pipe"
    assert (record["state"], record["message"]) == ("failed", "I go")
    wait_until(
        lambda: processes_below(slave.home.parent) == [slave.process.pid],
        what="the grandchild's end",
    )


def test_a_timeout_in_the_hook_after_it_went_live(start_slave, upstream):
    slave = start_slave(TIMEOUT=1, constants=SOON_ENDED)
    stand_in(slave, text='#!/bin/sh\necho "$1 %s -"\nexec sleep 1000\n' % ONE)
    record = slave.wait_update()
    assert (record["state"], record["message"]) == (
        "live",
        "stopped as it took longer than 1 s (TIMEOUT)",
    )


def test_output_is_logged_in_bounded_lines(start_slave, upstream):
    slave = start_slave()
    stand_in(
        slave,
        text="#!/bin/sh\nhead -c 3000000 /dev/zero | tr '\\0' x >&2\n"
        "printf '\\n\\033[2Jred\\n\\377\\nerror: no\\n' >&2; exit 1\n",
    )
    assert slave.wait_update()["message"] == "no"
    assert "hanuman: \\x1b[2Jred\n" in slave.log()
    assert max(map(len, slave.log().splitlines())) < 8300
    stand_in(slave, text="#!/bin/sh\nyes 'error: the same again' | head -n 30000 >&2; exit 1\n")
    before = rss_kib(slave.process.pid)
    assert slave.wait_update()["message"] == "the same again"
    assert rss_kib(slave.process.pid) - before < 3000


def test_no_zombies_and_flat_memory(start_slave, upstream):
    slave = start_slave()
    stand_in(slave, text='#!/bin/sh\necho x >&2\necho "$1 %s -"\n' % ONE)
    names = ["a", "b", "c", "d"]

    def update(count):
        for _ in range(count):
            for name, number in [(name, slave.signal(name)) for name in names]:
                assert slave.wait_update(name, number)["state"] == "live"

    def measure():
        wait_until(lambda: processes_below(slave.home.parent) == [slave.process.pid])
        folder = "/proc/%d/" % slave.process.pid
        wait_until(lambda: len(os.listdir(folder + "task")) == THREADS, what="threads to end")
        return rss_kib(slave.process.pid), len(os.listdir(folder + "fd"))

    update(10)
    memory, files = measure()
    update(UPDATES // len(names))
    assert measure()[1] <= files
    assert measure()[0] - memory < 1500
    children = subprocess.run(["ps", "--ppid", str(slave.process.pid)], stdout=subprocess.PIPE)
    assert b"defunct" not in children.stdout
    assert len(record_file(slave, "a")["earlier"]) == 9


# -- stop and start


def test_sigterm_stops_cleanly_and_the_next_start_resumes(start_slave, upstream):
    repo = upstream.create("hanuman", files={"a": "1"})
    slave = start_slave()
    real = (slave.bin / "slave-activate").read_text(encoding="utf-8")
    hook = slave.hooks / "pre-update"
    hook.write_text('#!/bin/sh\ntouch "$HOME/in-hook"\nsleep 1000\n')
    hook.chmod(0o755)
    update = slave.signal()
    wait_until(lambda: (slave.home / "in-hook").exists())
    wait_until(lambda: threads_of(slave.process.pid) == THREADS + 1, what="idle threads to end")
    poll = http.client.HTTPConnection("127.0.0.1", slave.port, timeout=300)
    poll.request("GET", "/status?repo=hanuman&wait=30")
    wait_until(lambda: threads_of(slave.process.pid) > THREADS + 1, what="the poll")
    time.sleep(0.2)
    assert slave.stop() == 0, "it does not wait for the hook's end"
    told = json.loads(poll.getresponse().read().decode())
    assert told["state"] in ("running", "queued"), "who waits hears something"
    poll.close()
    wait_until(lambda: processes_below(slave.home.parent) == [], what="the end of all")
    left = set(os.listdir(str(slave.state)))
    assert left <= {"hanuman.json", "hanuman.lock"}, "nothing half done"
    assert (record_file(slave)["state"], record_file(slave)["tries"]) == ("queued", 0)
    assert not (slave.repos / "hanuman").exists()
    hook.unlink()
    assert real
    slave.start()
    record = slave.wait_update(update=update)
    assert (record["state"], record["commit"]) == ("live", repo.head())


def test_signals_in_the_midst_of_signals_stop_it_as_well(start_slave):
    """As a terminal and a script send them, to all of a group and then to each of it."""
    slave = start_slave()
    for _ in range(3):
        for number in [SIGINT, SIGTERM] * 20:
            slave.process.send_signal(number)
        assert slave.stop() == 0
        slave.start()


def test_signals_while_stopping_are_503(start_slave, upstream, tmp_path):
    slave = start_slave()
    stand_in(
        slave,
        'trap : TERM; echo trapped >>"$HOME/runs"; until [ -e "%s" ]; do sleep 0.1; done'
        % (tmp_path / "go"),
    )
    slave.signal()
    wait_runs(slave, 2)
    slave.process.terminate()
    wait_until(lambda: "Z stopping\n" in slave.log())
    status, headers, body = slave.get("/?repo=other")
    (tmp_path / "go").touch()
    assert (status, headers["Retry-After"]) == (503, "2")
    assert json.loads(body.decode()) == {"error": "this slave is stopping"}
    assert slave.process.wait(60) == 0
    assert not (slave.state / "other.json").exists()


def test_what_keeps_it_from_starting(start_slave, upstream, tmp_path):
    slave = start_slave()
    free = tmp_path / "free"
    conf = tmp_path / "conf"
    conf.write_text("PORT=80x\n")
    (tmp_path / "file").write_text("x")
    cases = [
        (
            ["--port", slave.port, "--bind", "127.0.0.1", "--repos-dir", free],
            {},
            1,
            "can't listen on port %d of 127.0.0.1: Address already in use (see PORT and BIND)"
            % slave.port,
        ),
        (
            ["--port", 0, "--repos-dir", slave.repos],
            {},
            1,
            "another slave.py works in '%s'" % slave.state,
        ),
        (
            ["--port", 0, "--repos-dir", tmp_path / "file"],
            {},
            1,
            "can't use '%s/.server-update': Not a directory" % (tmp_path / "file"),
        ),
        (
            ["--port", 0, "--repos-dir", tmp_path / TOO_LONG],
            {},
            1,
            "can't use '%s': File name too long" % (tmp_path / TOO_LONG),
        ),
        ([], {"SERVER_UPDATE_CONF": str(conf)}, 2, "%s:1: bad PORT '80x'" % conf),
        (["--port", "x"], {}, 2, "bad PORT 'x' (set by --port)"),
        (
            ["--port", 0, "--repos-dir", free, tmp_path],
            {},
            2,
            "'%s' is a folder, not a file to serve" % tmp_path,
        ),
        (
            ["--secret-file", tmp_path / "none"],
            {},
            1,
            "can't use '%s': No such file or directory" % (tmp_path / "none"),
        ),
    ]
    for args, env, status, text in cases:
        got, stderr = start_by_hand(slave, *args, **env)
        assert (got, stderr) == (status, "slave.py: %s\n" % text)
    status, stderr = start_by_hand(slave, "--frobnicate")
    assert status == 2 and "--frobnicate" in stderr
    (slave.bin / "slave-activate").unlink()
    forget_bin(slave)
    status, stderr = start_by_hand(slave, "--port", 0, "--repos-dir", free)
    assert (status, stderr) == (
        1,
        "slave.py: no slave-activate on PATH, beside slave.py or in /bin\n",
    )


def test_it_starts_and_answers_without_looking_up_names(start_slave, upstream, tmp_path):
    slave = start_slave()
    slave.stop()
    trap = tmp_path / "trap.py"
    trap.write_text(
        "import runpy, socket, sys\n"
        "def fail(*args): raise SystemExit('looked up %r' % (args,))\n"
        "socket.getfqdn = socket.gethostbyaddr = socket.getnameinfo = fail\n"
        "socket.gethostbyname = socket.getaddrinfo = fail\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    slave.command = [*ISOLATED, str(trap), slave.command[-1]]
    slave.start()
    assert slave.get("/healthz")[2] == b"ok\n"
    assert slave.get("/?repo=hanuman")[0] == 202
    assert slave.stop() == 0


def test_both_address_families(start_slave, upstream):
    slave = start_slave(BIND="")
    assert "(all addresses)" in slave.log()
    assert slave.get("/healthz")[0] == 200
    if not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("no IPv6 on this machine")
    with socket.create_connection(("::1", slave.port), 60) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert connection.recv(999).startswith(b"HTTP/1.1 200 OK\r\n")
    assert slave.get("/?repo=../x")[0] == 400
    assert "refused with 400 from 127.0.0.1: bad 'repo'" in slave.log()


def test_help_and_version(run_script):
    done = run_script("slave.py", "--help")
    assert done.returncode == 0
    for word in ("--base-url", "--tls-key", "GET /status", "SIGHUP"):
        assert word in done.stdout
    assert run_script("slave.py", "--version").stdout == "slave.py %s\n" % VERSION


# -- the served file


def test_served_file(start_slave, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<title>One</title>", encoding="utf-8")
    slave = start_slave(args=[page])
    status, headers, body = slave.get("/")
    assert (status, body) == (200, b"<title>One</title>")
    assert headers["Content-Type"] == "text/html"
    assert headers["Content-Length"] == "18"
    head = slave.get("/", method="HEAD")
    assert (head[0], head[2]) == (200, b"")
    assert head[1]["Content-Length"] == "18"
    since = {"If-Modified-Since": headers["Last-Modified"]}
    assert slave.get("/", headers=since)[0] == 304
    os.utime(str(page), (time.time() + 9,) * 2)
    assert slave.get("/", headers=since)[0] == 200
    page.with_suffix(".new").write_text("x" * 300000)
    page.with_suffix(".new").rename(page)
    assert slave.get("/")[2] == b"x" * 300000
    assert slave.get("/?zone=eu")[0] == 200, "a query without repo changes nothing"
    page.unlink()
    assert slave.json("/", status=404) == {"error": "the served file does not exist now"}
    page.mkdir()
    assert slave.json("/", status=404) == {"error": "the served file does not exist now"}
    page.rmdir()
    os.mkfifo(str(page))
    assert slave.get("/")[0] == 404, "a FIFO holds up nobody"
    assert slave.get("/healthz")[2] == b"ok\n"


def test_an_unreadable_file_is_403(start_slave, tmp_path):
    if os.getuid() == 0:
        pytest.importorskip("ctypes")
    page = tmp_path / "page.txt"
    page.write_text("x")
    page.chmod(0)
    slave = start_slave(args=[page], wait=False)
    slave.stop()
    slave.command = with_no_rights() + slave.command
    slave.start()
    assert slave.json("/", status=403) == {
        "error": "the served file may not be read by the slave's user"
    }


def test_without_a_file_the_front_says_what_this_is(start_slave):
    slave = start_slave()
    status, headers, body = slave.get("/")
    assert (status, headers["Content-Type"]) == (200, "text/plain")
    assert body == (
        b"a server-update slave: /?repo=NAME starts an update\n"
    )
    assert slave.get("/?repo=hanuman", method="HEAD")[0] == 405
    assert slave.json("/status") == {"version": VERSION, "repos": {}}


def test_served_file_is_never_missing_during_updates(start_slave, upstream):
    repo = upstream.create("site", files={"index.html": "<title>0</title>" * 50})
    slave = start_slave(args=["repos/site/index.html"])
    assert slave.get("/")[0] == 404
    slave.wait_update("site")
    stop, answers = threading.Event(), []

    def read():
        while not stop.wait(0.002):
            status, _, body = slave.get("/")
            answers.append((status, len(set(re.findall(rb"<title>\d+</title>", body)))))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(EXCHANGES):
        if number % 5 == 0:
            repo.commit({"index.html": "<title>%d</title>" % number * 50})
        assert slave.wait_update("site")["state"] == "live"
    stop.set()
    for reader in readers:
        reader.join()
    assert set(answers) == {(200, 1)}
    assert len(answers) > EXCHANGES


def test_another_process_may_hold_the_lock_file(start_slave, upstream):
    """slave-activate by hand keeps NAME.lock; slave.py itself does not wait for it."""
    slave = start_slave()
    stand_in(slave)
    with open(str(slave.state / "hanuman.lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert slave.wait_update()["state"] == "live"
