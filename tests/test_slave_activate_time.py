"""TIMEOUT, from the start to the end; who has the lock; and that nothing outlives a run."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from activate_support import finish, hang_in, snapshot
from processes import wait_until
from product import PYTHON, SHELLS

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def activate(activate, repo):
    activate.settings["TIMEOUT"] = "4"
    return activate


@pytest.fixture
def late(activate, tmp_path):
    """The same, whose TIMEOUT of a minute is over once there is a file, `late.now`."""
    activate.now = tmp_path / "late"
    activate.make_late_by(activate.now)
    return activate


@pytest.mark.parametrize("shell", SHELLS)
def test_an_upstream_that_hangs(activate, http_upstream, shell):
    activate.settings["BASE_URL"] = http_upstream.url
    first, _ = activate.good("r", env={"SERVER_UPDATE_TIMEOUT": "60"})
    before = snapshot(activate.live())
    http_upstream.fault = "hang"
    result = activate("r", prefix=shell.split())
    assert (result.status, result.out) == (1, ""), result
    assert result.last.startswith("slave-activate: TIMEOUT (4 s) is over; ")
    assert (snapshot(activate.live()), activate.leftovers()) == (before, [])


@pytest.mark.parametrize("shell", SHELLS)
def test_a_pre_update_that_hangs(late, shell):
    late.hook("pre-update", "echo thinking; touch %s; sleep 1000\n" % late.now)
    result = late("r", prefix=shell.split())
    assert (result.status, result.out) == (1, ""), result
    assert "TIMEOUT (60 s) is over" in result.err
    assert result.last == "slave-activate: pre-update hook failed (143): thinking"
    assert (late.live().exists(), late.leftovers()) == (False, [])


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("ignores", ["", "trap '' TERM\n"])
def test_a_post_update_that_hangs(late, repo, tmp_path, shell, ignores):
    """What it has started is ended too."""
    pids = tmp_path / "pids"
    hangs = "sleep 1000 & echo $! $$ >%s; touch %s; wait; sleep 1000\n" % (pids, late.now)
    late.hook("post-update", ignores + hangs)
    result = late("r", prefix=shell.split())
    assert (result.status, result.out) == (3, "r %s -\n" % repo.head()), result
    status = 137 if ignores else 143
    assert result.last == (
        "slave-activate: live, but post-update hook failed (%d): TIMEOUT is over" % status
    )
    for pid in pids.read_text().split():
        wait_until(lambda pid=pid: not is_running(pid))


# Each is ended by TERM and exits 0 all the same; the file says that it was reached.
WELL_BEHAVED = {
    "sh": """#!/bin/sh
trap "exit 0" TERM
sleep 1000 & touch %s
wait
exit 1
""",
    "python": """#!%s
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open("%%s", "w").close()
while True:
    signal.pause()
""" % PYTHON,
}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("language", sorted(WELL_BEHAVED))
def test_a_pre_update_that_is_ended_has_not_passed(late, repo, shell, language):
    """What it says itself is not about the whole check."""
    first, _ = late.good("r")
    before = snapshot(late.live())
    repo.commit({"f": "2"})
    late.hook("pre-update", "").write_text(WELL_BEHAVED[language] % late.now)
    result = late("r", prefix=shell.split())
    assert (result.status, result.out) == (1, ""), result
    assert result.last == "slave-activate: pre-update hook failed (143): TIMEOUT is over"
    assert (snapshot(late.live()), late.leftovers()) == (before, [])


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("language", sorted(WELL_BEHAVED))
def test_a_post_update_that_is_ended_has_failed(late, repo, shell, language):
    late.hook("post-update", "").write_text(WELL_BEHAVED[language] % late.now)
    result = late("r", prefix=shell.split())
    assert (result.status, result.out) == (3, "r %s -\n" % repo.head()), result
    assert result.last == (
        "slave-activate: live, but post-update hook failed (143): TIMEOUT is over"
    )


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name, status", [("pre-update", 1), ("post-update", 3)])
def test_a_hook_that_is_ended_by_a_term_has_failed(late, repo, tmp_path, shell, name, status):
    ready = tmp_path / "ready"
    late.hook(name, "").write_text(WELL_BEHAVED["sh"] % ready)
    process = late.start("r", prefix=shell.split())
    wait_until(ready.exists)
    process.terminate()
    result = finish(process, 60)
    last = "interrupted" if status == 1 else "live, but post-update hook failed (143)"
    assert (result.status, result.last) == (status, "slave-activate: " + last), result
    assert late.live().exists() == (status == 3)


def is_running(pid):
    try:
        with open("/proc/%s/stat" % pid) as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("shell", SHELLS)
def test_who_has_the_lock_is_told(late, shell):
    marker = late.bin / "in-hook"
    late.hook("pre-update", "touch %s; sleep 1000\n" % marker)
    holder = late.start("r", env={"PATH": os.environ["PATH"]})  # and a minute of the true time
    wait_until(marker.exists)
    process = late.start("r", prefix=shell.split())
    told = [process.stderr.readline().decode() for _ in range(2)]
    late.now.touch()
    result = finish(process, 60)
    holder.terminate()
    assert finish(holder, 60).status == 1
    lock = late.state / "r.lock"
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert (result.status, result.out) == (1, "")
    assert re.fullmatch(
        r"slave-activate: TIMEOUT \(60 s\) is over; waited for the lock '%s', process %d has it %s"
        % (re.escape(str(lock)), holder.pid, since),
        result.last,
    ), result
    assert "slave-activate: process %d has it since" % holder.pid in told[1]


def test_a_timeout_before_it_waits_for_the_lock(activate):
    marker = activate.bin / "in-hook"
    activate.hook("pre-update", "touch %s; sleep 1000\n" % marker)
    holder = activate.start("r", env={"SERVER_UPDATE_TIMEOUT": "100"})
    wait_until(marker.exists)
    text = activate.script.read_text()
    late = text.replace("    take_lock\n", "    kill -ALRM $$\n    take_lock\n")
    assert late != text
    activate.script.write_text(late)
    result = activate("r")
    holder.terminate()
    assert finish(holder, 60).status == 1
    assert (result.status, result.out) == (1, "")
    assert result.last.startswith("slave-activate: TIMEOUT (4 s) is over; "), result


@pytest.mark.parametrize("name, status", [("pre-update", 1), ("post-update", 3)])
def test_a_timeout_that_is_lost_just_before_a_hook_begins(activate, name, status):
    """There is no process yet that a trap could end."""
    text = activate.script.read_text()
    text = text.replace("    kill -ALRM $$\n", "    :\n")
    # So soon for the hook alone: until it begins there is a minute.
    soon = text.replace('$hook_program" $$ "$deadline"', '$hook_program" $$ "$((deadline - 52))"')
    assert activate.script.read_text() != text != soon
    activate.script.write_text(soon)
    activate.hook(name, "sleep 1000\n")
    result = activate("r", env={"SERVER_UPDATE_TIMEOUT": "60"})
    assert result.status == status, result
    assert result.last.endswith("%s hook failed (143): TIMEOUT is over" % name), result


def test_a_kill_of_the_shell_ends_its_git_soon(late, http_upstream):
    """By what keeps its time, which sees that it is gone when it next looks."""
    late.settings["BASE_URL"] = http_upstream.url
    http_upstream.fault = "hang"
    process = late.start("r")
    wait_until(lambda: http_upstream.requests)
    gits = [pid for pid in pids_in_session(process.pid) if b"git" in cmdline(pid)]
    assert gits
    process.kill()
    process.wait()
    late.now.touch()
    process.communicate()
    wait_until(lambda: not [pid for pid in gits if is_running(pid)])


def pids_in_session(session):
    listing = subprocess.check_output(["ps", "-o", "pid=", "--sid", str(session)])
    return [int(pid) for pid in listing.split()]


def test_a_kill_leaves_the_lock_free(activate):
    marker = activate.bin / "in-hook"
    hook = activate.hook("pre-update", "touch %s; sleep 1000\n" % marker)
    process = activate.start("r", env={"SERVER_UPDATE_TIMEOUT": "100"})
    wait_until(marker.exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    hook.unlink()
    assert activate.good("r", env={"SERVER_UPDATE_TIMEOUT": "100"})


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "1000000", "060"])
def test_a_bad_timeout(activate, value):
    result = activate("r", env={"SERVER_UPDATE_TIMEOUT": value})
    assert (result.status, result.last) == (
        2,
        "slave-activate: bad TIMEOUT '%s' (set by SERVER_UPDATE_TIMEOUT)" % value,
    )


def test_the_settings_file_has_it_too(activate, http_upstream, tmp_path):
    del activate.settings["TIMEOUT"]
    (tmp_path / "slave.conf").write_text("TIMEOUT=900\nTIMEOUT.r=1\n")
    activate.settings["CONF"] = str(tmp_path / "slave.conf")
    activate.settings["BASE_URL"] = http_upstream.url
    http_upstream.fault = "hang"
    assert "TIMEOUT (1 s) is over" in activate("r").last


# -- leftovers ---------------------------------------------------------------------------

REAPER = (
    """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(%d, 1, 0, 0, 0)
process = subprocess.Popen(sys.argv[1:])
os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
with open("/proc/self/task/%%d/children" %% os.getpid()) as children:
    orphans = [pid for pid in children.read().split() if pid != str(process.pid)]
states = []
for pid in orphans:
    with open("/proc/%%s/stat" %% pid) as stat:
        states.append(stat.read().rpartition(")")[2].split()[0])
print("zombies", states.count("Z"), "running", len(states) - states.count("Z"),
      "status", process.wait())
"""
    % PR_SET_CHILD_SUBREAPER
)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("how", ["live", "failed", "interrupted", "late"])
def test_nothing_is_left_to_process_1(activate, http_upstream, shell, how):
    """What git leaves where it fails or is killed has ended too; else there is nothing at all."""
    activate.settings.update(BASE_URL=http_upstream.url, TIMEOUT="2" if how == "late" else "60")
    expected = "running 0 status 1\n"
    if how == "live":
        expected = "zombies 0 running 0 status 0\n"
    elif how == "failed":
        http_upstream.fault = "404"
    elif how == "interrupted":
        activate.hook("pre-update", "kill -TERM $(cat %s/r.lock); sleep 1000\n" % activate.state)
    else:
        http_upstream.fault = "hang"
    result = activate("r", prefix=[sys.executable, "-c", REAPER, *shell.split()])
    assert result.out.endswith(expected), result


# -- what a killed run left is ended, and nothing else -----------------------------------


def test_a_forged_name_has_nobody_killed(activate, tmp_path):
    """A path with a newline in it, held open by anybody, that reads like another's open file."""
    activate.settings["TIMEOUT"] = "60"
    activate.good("r")
    victim = subprocess.Popen(["sleep", "1000"])
    lock = activate.state / "r.lock"
    forged = tmp_path / ("a\nb/proc/%d/fd/6 -> " % victim.pid) / str(lock)[1:]
    forged.parent.mkdir(parents=True)
    forged.write_text("")
    holder = subprocess.Popen(["sh", "-c", 'exec sleep 1000 6<"$1"', "sh", str(forged)])
    try:
        wait_until(lambda: has_open(holder.pid, forged))
        (activate.state / "r.log").write_text("as a killed run leaves it")
        activate.good("r")
        assert victim.poll() is None and holder.poll() is None
    finally:
        for process in (victim, holder):
            process.kill()
            process.wait()


def outlives_an_update(activate, command, is_ready):
    """What `command` starts is there before an update that sweeps, and after it."""
    holder = subprocess.Popen(command)
    try:
        wait_until(lambda: is_ready(holder.pid))
        (activate.state / "r.log").write_text("as a killed run leaves it")
        activate.good("r")
        assert holder.poll() is None
    finally:
        holder.kill()
        holder.wait()


def has_open(pid, path):
    try:
        return os.readlink("/proc/%d/fd/6" % pid) == str(path)
    except OSError:
        return False


# Process 1 of a namespace: as a hook waits, it has a process begin at each number that is free, so
# also at those of what the update has ended meanwhile; it fails where one of them is ended.
STRANGERS = '''
import os, subprocess, sys, time
script, reached, go, shell = sys.argv[1:]

def is_shell(pid):
    """Whether it is a shell of the update; in the end there are the first one and its watcher."""
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as handle:
            return os.fsencode(script) in handle.read().split(bytes(1))
    except OSError:
        return False

def numbers():
    """Of all processes but this one, which is 1."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]

update = subprocess.Popen([*shell.split(), script, "r"])
while not os.path.exists(reached) or sum(map(is_shell, numbers())) > 2:
    time.sleep(0.01)  # its flushers have not ended yet
strangers = []
for number in set(range(2, max(numbers()))).difference(numbers()):
    with open("/proc/sys/kernel/ns_last_pid", "w") as handle:
        handle.write(str(number - 1))
    strangers.append(subprocess.Popen(["sleep", "600"]))
open(go, "w").close()
status = update.wait()
ended = [stranger.pid for stranger in strangers if stranger.poll() is not None]
sys.exit("exit status %d, ended: %r" % (status, ended) if status or ended else 0)
'''


@pytest.mark.parametrize("shell", SHELLS)
def test_who_has_the_number_of_what_has_ended_is_not_ended(activate, repo, tmp_path, shell):
    if os.getuid() or subprocess.call(["unshare", "-p", "-m", "--fork", "true"]):
        pytest.skip("a process namespace needs root and unshare (util-linux)")
    activate.settings["TIMEOUT"] = "90"
    activate.good("r")
    repo.commit({"a": "1"})
    reached, go = tmp_path / "reached", tmp_path / "go"
    wait = ': >"%s"\nuntil [ -e "%s" ]; do sleep 0.05; done\n' % (reached, go)
    activate.hook("post-update", wait)
    command = ["unshare", "-p", "-m", "--fork", "--mount-proc", PYTHON, "-c", STRANGERS]
    command += [str(activate.script), str(reached), str(go), shell]
    done = subprocess.run(command, env=activate.environment(), stderr=subprocess.PIPE, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_file_of_the_same_name_elsewhere_has_nobody_killed(activate, tmp_path):
    """As in a container, where the lock's path is another file."""
    if os.getuid() or subprocess.call(["unshare", "-m", "true"]):
        pytest.skip("mounts need root and unshare (util-linux)")
    activate.settings["TIMEOUT"] = "60"
    activate.good("r")
    lock = activate.state / "r.lock"
    (tmp_path / "other").write_text("")
    script = 'mount --bind "$1" "$2"; exec sleep 1000 6<"$2"'
    command = ["unshare", "-m", "sh", "-ec", script, "sh", str(tmp_path / "other"), str(lock)]
    outlives_an_update(activate, command, lambda pid: has_open(pid, lock))


def test_another_users_process_is_not_killed(activate):
    """Who got hold of the lock, open, is not ours, whatever number it has there."""
    if os.getuid():
        pytest.skip("another user needs root")
    activate.settings["TIMEOUT"] = "60"
    activate.good("r")
    lock = activate.state / "r.lock"
    script = 'exec setpriv --reuid=12345 --clear-groups sleep 1000 6<"$1"'
    outlives_an_update(
        activate,
        ["sh", "-c", script, "sh", str(lock)],
        lambda pid: has_open(pid, lock) and b"sleep" in cmdline(pid)[:6],
    )


def cmdline(pid):
    """The command line of a process; nothing where it has ended."""
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as handle:
            return handle.read()
    except (FileNotFoundError, ProcessLookupError):
        return b""


# -- a removal that takes long -----------------------------------------------------------


@pytest.fixture
def slow_rm(late, tmp_path):
    """An rm that never ends, in place of the one for trees; TIMEOUT is over as it begins."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "rm").write_text(
        '#!/bin/sh\ncase "$*" in -rf*r.new*) : >"%s"; exec sleep 1000 ;; esac\nexec %s "$@"\n'
        % (late.now, shutil.which("rm"))
    )
    (fake / "rm").chmod(0o755)
    return {"PATH": "%s:%s" % (fake, late.path)}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("hook", [False, True])
def test_a_removal_that_takes_long(late, repo, slow_rm, shell, hook):
    """It is live; the rest of the old tree is the next run's, and the hook has not run."""
    first, _ = late.good("r")
    second = repo.commit({"f": "2"})
    if hook:
        late.hook("post-update", "touch ran\n")
    result = late("r", prefix=shell.split(), env=slow_rm)
    assert (result.status, result.out) == (3 if hook else 0, "r %s %s\n" % (second, first)), result
    assert "the next run removes the rest of the old tree" in result.err
    if hook:
        assert result.last == (
            "slave-activate: live, but post-update hook failed (143): "
            "not run, TIMEOUT (60 s) is over"
        )
    assert not (late.live() / "ran").exists()
    late.now.unlink()
    assert late.good("r")


@pytest.fixture
def slow_removal(late, tmp_path):
    """slow_removal(PATH) -> PATH's folder: it makes a file as it begins to remove for ever."""

    def make(began):
        fake = tmp_path / "fake"
        hang_in("class Removal", began, fake)
        # One that is a link isn't used.
        (fake / "rm").symlink_to(shutil.which("rm"))
        late.path = "%s:%s" % (fake, late.path)
        return fake

    return make


@pytest.mark.parametrize("shell", SHELLS)
def test_timeout_ends_a_thorough_removal(late, repo, slow_removal, shell):
    first, _ = late.good("r")
    second = repo.commit({"f": "2"})
    fake = slow_removal(late.now)
    result = late("r", prefix=shell.split(), timeout=100)
    assert (result.status, result.out) == (0, "r %s %s\n" % (second, first)), result
    assert result.last == (
        "slave-activate: TIMEOUT (60 s) is over, the next run removes the rest of the old tree"
    )
    late.now.unlink()
    shutil.rmtree(str(fake))
    assert late.good("r")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_term_ends_a_thorough_removal(late, slow_removal, tmp_path, shell):
    """Of what a killed run has left."""
    late.good("r")
    (late.state / "r.new").mkdir()
    began = tmp_path / "began"
    fake = slow_removal(began)
    process = late.start("r", prefix=shell.split())
    wait_until(began.exists)
    (fake / "python3").write_text('#!/bin/sh\nexec "%s" "$@"\n' % PYTHON)  # it sweeps as it ends
    process.terminate()
    result = finish(process, 100)
    assert (result.status, result.err) == (1, "slave-activate: interrupted\n"), result
    assert late.leftovers() == []
