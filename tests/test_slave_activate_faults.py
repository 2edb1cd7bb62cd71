"""Kills, full disks, broken upstreams: the old tree stays, and the next run mends the rest."""

import fcntl
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
from activate_support import Activate, finish, git, snapshot
from processes import descendants, is_alive, kill, system_calls, wait_until
from product import SHELLS, daily, need

KILLS = 100  # kill -9 at random moments: of the shell, of its git, of the whole group
TERMS = 20  # TERM at evenly spaced moments of a run
SEED = 20240607


def duration(activate):
    """How long a run takes, in seconds; the best of three."""
    times = []
    for _ in range(3):
        start = time.monotonic()
        activate.good("r")
        times.append(time.monotonic() - start)
    return min(times)


def kill_shell(process, _):
    kill(process.pid)


def kill_a_child(process, rng):
    below = descendants(process.pid)
    kill(rng.choice(below) if below else process.pid)


def kill_group(process, _):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass


def is_free(lock):
    """Whether nobody has a lock; what makes the exchange outlives the shell that told it to."""
    with open(str(lock)) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("victim", [kill_shell, kill_a_child, kill_group])
def test_kill_9_at_any_moment(activate, upstream, victim):
    """After each kill the live tree is the old one to the byte, or the whole new one."""
    rng = random.Random(SEED)
    repo = upstream.create("r", {"a": "0", "b": "0"})
    took = duration(activate)
    for number in range(KILLS // 3 + 1):
        before, old = snapshot(activate.live()), activate.head()
        new = repo.commit({"a": str(number), "b": str(number)})
        process = activate.start("r")
        time.sleep(rng.uniform(0, took * 1.1))
        victim(process, rng)
        process.communicate(timeout=300)
        wait_until(lambda: is_free(activate.state / "r.lock"))
        head = activate.head()
        assert head in (old, new), number
        if head == old:
            assert snapshot(activate.live()) == before, number
        assert git(activate.live(), "status", "--porcelain") == "", number
        assert activate.good("r") == (new, head), number
    assert git(activate.live(), "fsck", "--full", "--no-dangling") == ""


def test_a_killed_shell_leaves_no_git_that_writes_later(activate, upstream, http_upstream):
    """Its git hangs on; the next run ends it, however it was started, before it begins."""
    repo = upstream.create("r")
    first, _ = activate.good("r")
    activate.settings["BASE_URL"] = http_upstream.url
    http_upstream.fault = "hang"
    process = activate.start("r")
    wait_until(lambda: http_upstream.requests)
    orphans = descendants(process.pid)
    process.kill()
    process.wait()
    assert [pid for pid in orphans if os.path.exists("/proc/%d" % pid)]
    http_upstream.fault = None
    second = repo.commit({"new": "1"})
    assert activate.good("r") == (second, first)
    process.stdout.close()
    process.stderr.close()
    wait_until(lambda: not [pid for pid in orphans if is_alive(pid)])


def check_term(activate, process, old, new, before):
    """What a run that was sent TERM or INT must have done; whether it was interrupted."""
    result = finish(process, timeout=300)
    status, out, err = result.status, result.out, result.err
    assert status in (0, 1, -signal.SIGTERM, -signal.SIGINT), (status, err)
    if status == 0:
        assert out == "r %s %s\n" % (new, old) and activate.head() == new, (out, err)
        assert activate.leftovers() == []
        return False
    assert (out, snapshot(activate.live())) == ("", before), (status, err)
    if status == 1:  # git's handler of TERM aborts at times
        assert re.fullmatch("((Terminated|Aborted)\n)?slave-activate: interrupted\n", err)
    if activate.state.exists():
        assert activate.leftovers() == []
    return status == 1


@pytest.mark.slow
def test_term_at_every_stage(activate, upstream):
    repo = upstream.create("r", {"a": "0", "b": "0"})
    took, interrupted = duration(activate), 0
    for number in range(TERMS):
        before, old = snapshot(activate.live()), activate.head()
        new = repo.commit({"a": str(number)})
        process = activate.start("r")
        time.sleep(took * number / TERMS)
        signum = signal.SIGTERM if number % 3 else signal.SIGINT
        os.kill(process.pid, signum) if number % 2 else os.killpg(process.pid, signum)
        interrupted += check_term(activate, process, old, new, before)
        began = time.monotonic()
        assert activate.good("r")[0] == new
        took = time.monotonic() - began  # on a machine that is busier now, or less
    assert interrupted > TERMS / 4


def calls_of(activate, tmp_path, call):
    """How often the shell of an update makes a system call, until the exchange and after it."""
    log = tmp_path / "calls"
    activate.good("r", prefix=["strace", "-qq", "-e", "trace=" + call, "-o", str(log)])
    return len(log.read_text().splitlines())


def term_at(call, number):
    """What a run gets as a prefix that is to be sent TERM at a system call of its shell."""
    fault = "inject=%s:signal=TERM:when=%d" % (call, number)
    return ["strace", "-qq", "-e", "trace=" + call, "-e", fault, "-o", "/dev/null"]


@pytest.mark.parametrize("number", [1, 2])
def test_term_is_told_where_stderr_leads_elsewhere_for_a_moment(activate, upstream, number):
    """While the lock is opened (1) and while its holder is written into it (2)."""
    need("strace")
    upstream.create("r")
    activate.good("r")
    prefix = ["-P", str(activate.state / "r.lock")]
    result = activate("r", prefix=term_at("openat", number) + prefix)
    assert (result.status, result.err) == (1, "slave-activate: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["clone", "dup2"])
def test_term_at_every_system_call(activate, upstream, tmp_path, call):
    """At each process that the shell starts, and wherever one of its descriptors changes."""
    need("strace")
    repo = upstream.create("r", {"a": "0"})
    activate.good("r")
    interrupted = 0
    for number in range(1, calls_of(activate, tmp_path, call) + 1):
        before, old = snapshot(activate.live()), activate.head()
        new = repo.commit({"a": str(number)})
        process = activate.start("r", prefix=term_at(call, number))
        interrupted += check_term(activate, process, old, new, before)
    assert interrupted > 5


@pytest.mark.parametrize("shell", SHELLS)
def test_term_while_upstream_hangs(activate, upstream, http_upstream, shell):
    upstream.create("r")
    first, _ = activate.good("r")
    before = snapshot(activate.live())
    activate.settings["BASE_URL"] = http_upstream.url
    http_upstream.fault = "hang"
    process = activate.start("r", prefix=shell.split())
    wait_until(lambda: http_upstream.requests)
    below = descendants(process.pid)
    assert below
    process.terminate()
    assert check_term(activate, process, first, None, before)
    wait_until(lambda: not [pid for pid in below if is_alive(pid)])


def test_term_while_it_waits_for_the_lock(activate, upstream):
    upstream.create("r")
    activate.good("r")
    marker = activate.bin / "in-hook"
    activate.hook("pre-update", "touch %s; exec sleep 1000\n" % marker)
    first = activate.start("r")
    wait_until(marker.exists)
    for shell in ("dash", "busybox ash", "bash"):
        second = activate.start("r", prefix=shell.split())
        wait_until(lambda pid=second.pid: b"flock" in commands(descendants(pid)))
        below = descendants(second.pid)
        second.terminate()
        result = finish(second, timeout=300)
        assert (result.status, result.last) == (1, "slave-activate: interrupted"), result
        wait_until(lambda pids=below: not [pid for pid in pids if is_alive(pid)])
    os.killpg(first.pid, signal.SIGTERM)
    assert finish(first, timeout=300).status == 1


def commands(pids):
    """The command lines of processes, one a line."""
    found = []
    for pid in pids:
        try:
            with open("/proc/%d/cmdline" % pid, "rb") as handle:  # one has a byte of no text
                found.append(handle.read())
        except OSError:
            pass
    return b"\n".join(found)


@pytest.mark.parametrize("shell", SHELLS)
def test_nothing_of_the_callers_is_held_after_its_end(activate, upstream, shell):
    """Such as the lock of flock(1), in descriptor 3, or a pipe that somebody reads to its end."""
    upstream.create("r")
    prefix = ["sh", "-c", 'exec "$@" 3>&1 7>&1', "sh", *shell.split()]
    with activate.start("r", prefix=prefix, stderr=None) as process:
        assert process.wait(60) == 0
        number = process.stdout.fileno()
        os.set_blocking(number, False)
        assert os.read(number, 4096).startswith(b"r ")
        assert os.read(number, 1) == b""  # BlockingIOError, where it is still open elsewhere


def test_term_when_git_hangs_by_itself(activate, upstream, http_upstream):
    """git's handler of TERM allocates memory, and now and then waits for ever, as if stopped."""
    upstream.create("r")
    first, _ = activate.good("r")
    before = snapshot(activate.live())
    activate.settings["BASE_URL"] = http_upstream.url
    http_upstream.fault = "hang"
    process = activate.start("r")
    wait_until(lambda: http_upstream.requests)
    below = descendants(process.pid)
    for pid in below:
        kill(pid, signal.SIGSTOP)
    process.terminate()
    try:
        assert check_term(activate, process, first, None, before)
    finally:
        for pid in below:
            kill(pid, signal.SIGCONT)
    wait_until(lambda: not [pid for pid in below if is_alive(pid)])


def test_term_in_the_hooks(activate, upstream):
    repo = upstream.create("r")
    first, _ = activate.good("r")
    before = snapshot(activate.live())
    marker = activate.bin / "in-hook"
    hook = activate.hook("pre-update", "touch %s; exec sleep 1000\n" % marker)
    process = activate.start("r")
    wait_until(marker.exists)
    process.terminate()
    assert check_term(activate, process, first, None, before)
    hook.unlink()
    marker.unlink()
    activate.hook("post-update", "touch %s; exec sleep 1000\n" % marker)
    second = repo.commit({"new": "1"})
    process = activate.start("r")
    wait_until(marker.exists)
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out.decode()) == (3, "r %s %s\n" % (second, first))
    assert err == b"slave-activate: live, but post-update hook failed (143)\n"
    assert (activate.head(), activate.leftovers()) == (second, [])


# -- the disk ---------------------------------------------------------------

DISK_BYTES = 12 << 20


def noise(size, seed=0):
    """Bytes that can't be compressed."""
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "big")


def fill_disk(folder, leave):
    """Fill the filesystem until about `leave` bytes are free."""
    info = os.statvfs(str(folder))
    with open(str(folder / "filler"), "wb") as filler:
        filler.write(b"x" * max(0, info.f_bavail * info.f_bsize - leave))


@pytest.mark.parametrize("stage", ["start", "clone", "checkout"])
def test_a_full_disk(upstream, tmp_path, small_disk, stage):
    """While packs are written, while files are; and at once. The old tree stays."""
    disk = small_disk(DISK_BYTES)
    repo = upstream.create("r", {"f": "1"})
    activate = Activate(tmp_path, upstream.base_path, repos=disk / "repos")
    first, _ = activate.good("r")
    before = snapshot(activate.live())
    packed = noise(1 << 20)
    contents = {"noise": packed} if stage == "clone" else {"zeros": b"0" * (4 << 20)}
    second = repo.commit(contents)
    fill_disk(disk, {"start": 0, "clone": 600 << 10, "checkout": 1 << 20}[stage])
    result = activate("r")
    assert (result.status, result.out) == (1, ""), result
    assert "; make room for '%s'" % activate.repos in result.last, result
    assert snapshot(activate.live()) == before
    assert activate.leftovers() == []
    (disk / "filler").unlink()
    assert activate.good("r") == (second, first)


# -- upstream ---------------------------------------------------------------

FAULTS = {
    "503": "The requested URL returned error: 503",
    "404": "' not found; see BASE_URL",
    "cut:100": "",
    "reset": "unable to access",
    "garbage": "unable to access",
    "cut:30000": "",
}


@pytest.mark.parametrize("old", ["there", "not there"])
@pytest.mark.parametrize("fault", daily(3, FAULTS))
def test_a_broken_upstream(activate, upstream, http_upstream, fault, old):
    repo = upstream.create("r", {"f": "1"})
    activate.short_pauses()
    activate.settings["BASE_URL"] = http_upstream.url
    first = activate.good("r")[0] if old == "there" else "-"
    before = snapshot(activate.live())
    second = repo.commit({"noise": noise(100 << 10)})
    http_upstream.fault = fault
    result = activate("r")
    assert (result.status, result.out) == (1, ""), result
    assert FAULTS[fault] in result.last, result
    assert result.last.startswith("slave-activate: ")
    assert (snapshot(activate.live()), activate.leftovers()) == (before, [])
    assert activate.live().exists() == (old == "there")
    http_upstream.fault = None
    assert activate.good("r") == (second, first)


def test_an_upstream_that_hangs_is_given_up(activate, upstream, http_upstream, own_home):
    """By git's low-speed limit, which is the user's where one is set."""
    upstream.create("r")
    activate.settings["BASE_URL"] = http_upstream.url
    http_upstream.fault = "hang"
    activate.short_pauses()
    env = {"GIT_HTTP_LOW_SPEED_TIME": "1"}
    result = activate("r", env=env)
    assert result.status == 1
    assert "Operation too slow. Less than 1000 bytes/sec transferred" in result.last
    assert activate.leftovers() == []


def test_an_upstream_that_refuses_or_is_not_git(activate):
    activate.short_pauses()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        activate.settings["BASE_URL"] = "http://127.0.0.1:%d" % unused.getsockname()[1]
        result = activate("r")
    assert (result.status, result.out) == (1, "")
    assert re.match("slave-activate: unable to access .* see BASE_URL$", result.last)
    activate.settings["BASE_URL"] = str(activate.bin)
    (activate.bin / "r.git").mkdir()
    result = activate("r")
    assert result.status == 1 and "r.git' does not exist; see BASE_URL" in result.last


# -- the exchange -----------------------------------------------------------

STRACE = ["strace", "-f", "-qq", "-e", "signal=none"]
RENAMES = "renameat2,rename,renameat"


def test_all_is_flushed_before_the_exchange_and_the_folders_after_it(activate, upstream, tmp_path):
    need("strace")
    repo = upstream.create("r")
    activate.good("r")
    repo.commit({"new": "1"})
    log = tmp_path / "trace"
    calls = "trace=syncfs,fsync,fdatasync,openat,renameat2"
    activate.good("r", prefix=STRACE + ["-y", "-e", calls, "-o", str(log)])
    text = system_calls(log)
    exchange = re.search(r"renameat2\(.*r\.new\".*/r\", RENAME_EXCHANGE\) = 0", text)
    pid = text[: exchange.start()].split("\n")[-1].split()[0]  # that flushes again, what is left
    sync = re.search(r"(?m)^%s +syncfs\(\d+<%s/r\.new>" % (pid, activate.state), text)
    assert sync and sync.start() < exchange.start()
    assert re.search(r"(?m)^%s .*syncfs.* = 0$" % pid, text)
    written = [match.start() for match in re.finditer(r"/r\.new/[^\n]*O_(WRONLY|RDWR)", text)]
    assert written and max(written) < sync.start(), "something was written after the flush"
    for folder in (activate.repos, activate.state):
        assert re.search(r"fsync\(\d+<%s>\) = 0" % folder, text[exchange.end() :])


def inject(fault):
    return STRACE + ["-e", "trace=" + RENAMES, "-e", "inject=" + fault, "-o", "/dev/null"]


class Watcher(threading.Thread):
    """Looks whether a path is there, as fast as it can."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.path, self.done, self.missing, self.gaps = str(path), False, 0, 0

    def run(self):
        was_there = True
        while not self.done:
            there = os.path.isdir(self.path)
            self.missing += not there
            self.gaps += was_there and not there
            was_there = there


def test_where_exchange_is_refused_two_renames_do_it(activate, upstream):
    need("strace")
    repo = upstream.create("r")
    first, _ = activate.good("r")
    second = repo.commit({"new": "1"})
    watcher = Watcher(activate.live())
    watcher.start()
    assert activate.good("r", prefix=inject("renameat2:error=EINVAL")) == (second, first)
    watcher.done = True
    watcher.join()
    assert watcher.gaps <= 1
    assert (activate.live() / "new").exists()


def test_a_failing_second_rename_puts_the_old_tree_back(activate, upstream, tmp_path):
    """The first rename(2) of NEW to LIVE fails, after LIVE was moved aside."""
    need("strace")
    repo = upstream.create("r")
    first, _ = activate.good("r")
    before = snapshot(activate.live())
    second = repo.commit({"new": "1"})
    log = tmp_path / "trace"
    prefix = STRACE + ["-P", str(activate.state / "r.new"), "-e", "trace=rename,renameat2"]
    prefix += ["-e", "inject=renameat2:error=EINVAL", "-e", "inject=rename:error=EIO:when=1"]
    result = activate("r", prefix=prefix + ["-o", str(log)])
    assert (result.status, result.out) == (1, ""), result
    renames = [line for line in system_calls(log).split("\n") if " rename(" in line]
    assert len(renames) == 1 and "EIO" in renames[0], renames
    assert "Input/output error" in result.last and "Traceback" not in result.err
    assert (snapshot(activate.live()), activate.leftovers()) == (before, [])
    assert activate.good("r") == (second, first)


def test_a_kill_between_the_two_renames_is_mended(activate, upstream):
    need("strace")
    repo = upstream.create("r")
    first, _ = activate.good("r")
    second = repo.commit({"new": "1"})
    prefix = STRACE + ["-P", str(activate.live()), "-e", "trace=rename,renameat2"]
    prefix += ["-e", "inject=renameat2:error=EINVAL", "-e", "inject=rename:signal=KILL:when=1"]
    before = snapshot(activate.live())
    result = activate("r", prefix=prefix + ["-o", "/dev/null"])
    assert (result.status, result.out) == (1, ""), result
    assert (snapshot(activate.live()), activate.leftovers()) == (before, [])
    assert activate.good("r") == (second, first)


def test_no_python_no_exchange_no_harm(activate, upstream, tmp_path):
    """python3 is missing: one line, and the old tree stays."""
    upstream.create("r")
    activate.good("r")
    before = snapshot(activate.live())
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "python3").write_text("#!/bin/sh\nexit 127\n")
    (fake / "python3").chmod(0o755)
    result = activate("r", env={"PATH": "%s:%s" % (fake, os.environ["PATH"])})
    assert (result.status, result.out) == (1, "")
    assert result.last.startswith("slave-activate: ")
    assert (snapshot(activate.live()), activate.leftovers()) == (before, [])


# -- what makes the exchange, and waits until it is told to ---------------------------------


def find_publisher(process):
    """The number of the Python that a run has started beside its clone, once it is there."""

    def find():
        return [pid for pid in descendants(process.pid) if b"RENAME_EXCHANGE" in commands([pid])]

    return wait_until(find)[0]


@pytest.fixture
def in_hook(activate, upstream):
    """Starts an update that waits in its pre-update hook until there is a file `go`; the Popen."""
    repo = upstream.create("r")
    activate.good("r")
    repo.commit({"new": "1"})
    reached, go = activate.bin / "reached", activate.bin / "go"
    activate.hook(
        "pre-update", "touch %s\nuntil [ -e %s ]; do sleep 0.02; done\n" % (reached, go)
    )

    started = []

    def start(*args, **kwargs):
        started.append(activate.start(*args, **kwargs))
        wait_until(reached.exists)
        return started[-1]

    yield start
    go.touch()  # what a killed one has left ends, too
    for process in started:
        process.wait(60)
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_killed_shell_has_nothing_exchanged(activate, in_hook, shell):
    """All but the exchange is done: what waits for that ends at once, and the lock is free."""
    before = snapshot(activate.live())
    process = in_hook("r", prefix=shell.split())
    publisher = find_publisher(process)
    process.kill()
    process.wait()
    wait_until(lambda: not is_alive(publisher))
    assert (activate.state / "r.new" / "new").exists()
    assert snapshot(activate.live()) == before
    (activate.hooks / "pre-update").unlink()
    assert activate.good("r")


@pytest.mark.parametrize("shell", SHELLS)
def test_an_exchange_is_made_though_what_waits_for_it_was_killed(activate, in_hook, shell):
    first = activate.head()
    process = in_hook("r", prefix=shell.split())
    publisher = find_publisher(process)
    kill(publisher)
    # One that still flushes to disk ends only then; the shell reaps it.
    wait_until(lambda: not os.path.exists("/proc/%d" % publisher))
    (activate.bin / "go").touch()
    result = finish(process, timeout=60)
    assert (result.status, result.err) == (0, ""), result
    assert result.out.split()[2] == first != activate.head()
    assert activate.leftovers() == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_file_system_without_named_pipes(activate, upstream, tmp_path, shell):
    """Nothing waits beside the clone then; it is started when it is needed."""
    upstream.create("r")
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "mkfifo").write_text("#!/bin/sh\necho refused >&2\nexit 1\n")
    (fake / "mkfifo").chmod(0o755)
    activate.path = "%s:%s" % (fake, os.environ["PATH"])
    for _ in range(2):
        activate.good("r", prefix=shell.split())


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_waits_after_a_failure(activate, upstream, http_upstream, shell, signum):
    """TERM and KILL, to the shell alone, while upstream says nothing."""
    activate.settings["BASE_URL"] = http_upstream.url
    http_upstream.fault = "hang"
    process = activate.start("r", prefix=shell.split())
    wait_until(lambda: http_upstream.requests)
    publisher = find_publisher(process)
    process.send_signal(signum)
    process.wait()
    wait_until(lambda: not is_alive(publisher))
    if signum == signal.SIGKILL:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_it_stays_alone_on_a_terminal_too(activate, upstream):
    """Ctrl-C goes to the whole foreground group of a terminal."""
    upstream.create("r")
    activate.good("r")
    before = snapshot(activate.live())
    activate.hook("pre-update", "touch %s; sleep 1000\n" % (activate.bin / "in-hook"))
    master, slave = os.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", str(activate.script), "r"],
        env=activate.environment(),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    wait_until((activate.bin / "in-hook").exists)
    os.write(master, b"\x03")
    assert process.wait(60) == 1
    text = os.read(master, 4096)
    os.close(master)
    assert text.endswith(b"slave-activate: interrupted\r\n")
    assert (snapshot(activate.live()), activate.leftovers()) == (before, [])
