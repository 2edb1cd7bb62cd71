"""What slave.py remembers: lost by nothing, bounded, and never another's."""

import json
import os
import re
import shutil
import socket
import subprocess
import time

import pytest
from processes import is_alive, wait_until
from product import ISOLATED, SERVER_UPDATE, daily
from slave_support import (
    ONE,
    SOON_ENDED,
    kill_hard,
    record_file,
    runs,
    stand_in,
    start_by_hand,
    wait_runs,
)

NOBODY = 65534
FULL = 1000  # repositories without a tree that are remembered
TWO = "2" * 40
WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
WITHOUT_KILL = ["setpriv", "--bounding-set=-kill", "--inh-caps=-kill"]


def need_root():
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv")


def restart(slave, *prefix):
    slave.stop()
    slave.command = [*prefix, *slave.command]
    slave.start()


def queued_record(repo="hanuman", **changes):
    record = {"repo": repo, "update": 1000, "ref": None, "state": "queued", "requested": 1.0}
    return json.dumps(dict(record, **changes))


# -- every accepted update ends

OTHER_USER = """#!/bin/sh
setpriv --reuid=%d --clear-groups sh -c 'echo $$; exec sleep 1000' >"%s" &
until [ -s "%s" ]; do sleep 0.02; done
echo "$1 %s -"
%s
"""


def test_what_runs_as_another_user_is_left_and_the_update_ends(start_slave, tmp_path):
    """killpg says EPERM, as in a service without CAP_KILL whose hook restarts something."""
    need_root()
    slave = start_slave(constants=SOON_ENDED)
    restart(slave, *WITHOUT_KILL)
    pid = tmp_path / "pid"
    stand_in(slave, text=OTHER_USER % (NOBODY, pid, pid, ONE, "exit 0"))
    record = slave.wait_update()
    assert (record["state"], record["message"]) == ("live", "")
    wait_until(lambda: "as another user can't be ended, and is left" in slave.log())
    os.kill(int(pid.read_text()), 9)
    slave.settings["TIMEOUT"] = 1
    restart(slave)
    text = '#!/bin/sh\necho $$ >"%s"\nexec setpriv --reuid=%d --clear-groups sleep 1000\n'
    stand_in(slave, text=text % (pid, NOBODY))
    record = slave.wait_update()
    assert record["state"] == "failed"
    assert record["message"] == "stopped as it took longer than 1 s (TIMEOUT)"
    assert is_alive(int(pid.read_text())), "TERM, KILL, and then no longer waited for"
    assert "Traceback" not in slave.log()
    stand_in(slave)
    assert slave.wait_update()["state"] == "live"


RAISES = {
    "judge": "def judge(*run):\n    raise RuntimeError('on purpose')\n",
    "start": "def start(*run):\n    raise MemoryError('on purpose')\nRun.__init__ = start\n",
    "listen": "def listen(*run):\n    raise KeyError('on purpose')\nRun.listen_until = listen\n",
    "close": "def close(*run):\n    raise ValueError('on purpose')\nRun.close = close\n",
    "live": "def read_live_commit(tree):\n    raise RuntimeError('on purpose')\n",
}


@pytest.mark.parametrize("name", daily(2, sorted(RAISES)))
def test_whatever_is_raised_the_update_ends(start_slave, name):
    slave = start_slave()
    script = slave.bin / "slave.py"
    text = script.read_text(encoding="utf-8")
    before, guard, after = text.rpartition('\nif __name__ == "__main__":')
    script.write_text(before + RAISES[name] + "\n" + guard + after, encoding="utf-8")
    restart(slave)
    stand_in(slave)
    slave.signal()
    wait_until(lambda: record_file(slave)["state"] in ("failed", "live"), what="its end")
    update = record_file(slave)["update"]
    stand_in(slave)
    slave.signal()
    wait_until(lambda: record_file(slave)["update"] > update
               and record_file(slave)["state"] in ("failed", "live"), what="the next one's end")
    assert slave.stop() == 0


# -- records that can't be read, or are of a newer version


def test_a_record_that_cannot_be_read_now_stays_and_is_not_lost(start_slave):
    need_root()
    slave = start_slave()
    restart(slave, *WITHOUT_RIGHTS)
    stand_in(slave)
    slave.stop()
    path = slave.state / "hanuman.json"
    path.write_text(queued_record())
    path.chmod(0)
    slave.start()
    assert "hanuman.json can't be read now and is left as it is: " in slave.log()
    status, headers, body = slave.get("/?repo=hanuman")
    assert (status, headers["Retry-After"]) == (503, "2")
    assert json.loads(body.decode()) == {
        "error": "can't record the update: its record can't be read"
    }
    assert slave.json("/status?repo=hanuman", status=503) == {"error": "its record can't be read"}
    assert slave.wait_update("other")["state"] == "live", "others are as they were"
    assert slave.log().count("can't be read now") == 1
    path.chmod(0o600)
    wait_until(lambda: "hanuman ends" in runs(slave), what="the accepted update")
    assert slave.wait_update(update=1000)["state"] == "live"
    assert not list(slave.state.glob("*.broken"))


def test_a_record_that_is_no_file_holds_up_nobody(start_slave):
    slave = start_slave()
    stand_in(slave)
    slave.stop()
    os.mkfifo(str(slave.state / "fifo.json"))
    (slave.state / "folder.json").mkdir()
    slave.start()
    assert slave.wait_update()["state"] == "live"
    assert slave.get("/?repo=fifo", timeout=300)[0] == 503
    assert slave.get("/?repo=folder", timeout=300)[0] == 503
    (slave.state / "fifo.json").unlink()
    wait_until(lambda: slave.get("/?repo=fifo")[0] == 202, what="a repository without a record")


def test_what_a_newer_version_wrote_keeps_what_this_one_understands(start_slave):
    slave = start_slave()
    stand_in(slave)
    slave.stop()
    earlier = [{"repo": "hanuman", "update": 5, "state": "rolled back", "why": ["x"]}, 7]
    (slave.state / "hanuman.json").write_text(queued_record(earlier=earlier, shade="new"))
    slave.start()
    assert slave.wait_update(update=1000)["state"] == "live"
    assert not list(slave.state.glob("*.broken"))


def test_an_update_at_something_that_this_version_does_not_know_is_begun_again(start_slave):
    slave = start_slave()
    stand_in(slave)
    slave.stop()
    (slave.state / "hanuman.json").write_text(queued_record(state="relaying", started=1.0))
    slave.start()
    assert slave.wait_update(update=1000)["state"] == "live"
    assert not list(slave.state.glob("*.broken"))


# -- the state folder


def test_a_state_folder_that_is_removed_is_made_anew(start_slave, tmp_path):
    slave = start_slave()
    stand_in(slave, 'until [ -e "$HOME/go-$1" ]; do sleep 0.02; done')
    slave.signal("running")
    wait_runs(slave, 1)
    shutil.rmtree(str(slave.state))
    status, stderr = start_by_hand(slave, "--port", 0, "--repos-dir", slave.repos)
    assert (status, stderr) == (1, "slave.py: another slave.py works in '%s'\n" % slave.repos)
    slave.signal("hanuman")
    wait_runs(slave, 2)
    assert record_file(slave)["state"] == "running"
    assert record_file(slave, "running")["state"] == "running", "all that it knew is there again"
    status, stderr = start_by_hand(slave, "--port", 0, "--repos-dir", slave.repos)
    assert (status, stderr) == (1, "slave.py: another slave.py works in '%s'\n" % slave.state)
    kill_hard(slave)
    for name in ("running", "hanuman"):
        (slave.home / ("go-" + name)).touch()
    slave.start()
    for name in ("running", "hanuman"):
        wait_until(lambda name=name: slave.json("/status?repo=" + name)["state"] == "live")


def test_a_state_folder_that_is_moved_away_is_made_anew(start_slave):
    slave = start_slave()
    stand_in(slave)
    slave.wait_update()
    slave.state.rename(slave.repos / ".moved")
    assert slave.wait_update("other")["state"] == "live"
    assert sorted(os.listdir(str(slave.state)))[:2] == ["hanuman.json", "other.json"]
    shutil.rmtree(str(slave.repos))
    assert slave.wait_update()["state"] == "live", "and so is all of REPOS_DIR"


NFS = """
import errno, fcntl, os, runpy, sys
def flock(fd, operation, real=fcntl.flock):
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real(fd, operation)
fcntl.flock = flock
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_nfs_locks_only_what_is_open_for_writing(start_slave, tmp_path):
    slave = start_slave()
    stand_in(slave)
    slave.stop()
    (tmp_path / "nfs.py").write_text(NFS)
    slave.command = [*ISOLATED, str(tmp_path / "nfs.py"), slave.command[-1]]
    slave.start()
    assert slave.wait_update()["state"] == "live"
    for folder in (slave.state, None):
        if folder:
            shutil.rmtree(str(folder))
        status, stderr = start_by_hand(slave, "--port", 0, "--repos-dir", slave.repos)
        assert status == 1 and "another slave.py works in" in stderr
    assert slave.wait_update()["state"] == "live"


# -- bounded


def failed_record(repo, number):
    return json.dumps({
        "repo": repo, "update": number, "ref": "r" * 100, "state": "failed", "requested": number,
        "started": number, "finished": number + 1, "message": "m" * 300, "by": "é" * 200,
        "note": "é" * 200,
    })


def test_only_so_many_repositories_without_a_tree_are_remembered(start_slave, tmp_path):
    slave = start_slave()
    stand_in(slave, text="#!/bin/sh\n: >\"$SERVER_UPDATE_REPOS_DIR/.server-update/$1.lock\"\n"
                         "echo 'fatal: no such repository' >&2\nexit 1\n")
    slave.stop()
    for number in range(FULL + 50):
        name = "x" * 90 + str(number)
        (slave.state / (name + ".json")).write_text(failed_record(name, number + 1))
        (slave.state / (name + ".lock")).touch()
    (slave.state / "live.json").write_text(failed_record("live", 1))
    (slave.repos / "live").mkdir()
    slave.start()
    assert slave.wait_update("newest")["state"] == "failed"
    wait_until(lambda: len(slave.json("/status")["repos"]) <= FULL + 1, what="some forgotten")
    repos = slave.json("/status")["repos"]
    assert {"live", "newest", "x" * 90 + "1000"} <= set(repos)
    assert "x" * 90 + "50" not in repos
    assert len(slave.get("/status")[2]) < 1 << 20
    wait_until(lambda: len(os.listdir(str(slave.state))) <= 2 * (FULL + 2), what="their files")
    entry = "127.0.0.1:%d" % slave.port
    (tmp_path / "list").write_text(entry + "\n")
    done = subprocess.run([*SERVER_UPDATE, "--list",
                           str(tmp_path / "list"), "--status"], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    assert "unreachable" not in done.stdout


def test_what_is_removed_by_hand_is_forgotten_without_a_restart(start_slave):
    slave = start_slave()
    stand_in(slave)
    for name in ("a", "b", "c"):
        slave.wait_update(name)
    shutil.rmtree(str(slave.repos / "a"))
    (slave.state / "a.json").unlink()
    (slave.state / "b.json").unlink()
    shutil.rmtree(str(slave.repos / "c"))
    assert sorted(slave.json("/status")["repos"]) == ["b", "c"]
    slave.json("/status?repo=a", status=404)
    assert slave.json("/status?repo=b")["commit"] == ONE
    assert slave.json("/status?repo=c")["commit"] is None
    assert slave.wait_update("a")["state"] == "live"


# -- what is live

PATIENT = {"GIT_TIMEOUT_S": 60}  # where git is to answer however busy the machine is


def make_clone(slave, upstream, name="hanuman"):
    repo = upstream.create(name, files={"a": "1"})
    assert slave.wait_update(name)["commit"] == repo.head()
    return repo, slave.repos / name


def git(tree, *args):
    subprocess.check_call(["git", "-C", str(tree), *args], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)


def test_packed_refs(start_slave, upstream):
    slave = start_slave(constants=PATIENT)
    repo, tree = make_clone(slave, upstream)
    new = repo.commit({"a": "2"})
    git(tree, "pull", "-q")
    git(tree, "gc", "-q")
    assert not (tree / ".git" / "refs" / "heads" / "main").exists(), "nothing to test here"
    assert slave.json("/status?repo=hanuman")["commit"] == new
    record = slave.wait_update(update=slave.signal(ref="nowhere"))
    assert (record["state"], record["commit"], record["previous"]) == ("failed", new, new)


def test_a_gitfile_and_a_worktree(start_slave, upstream, tmp_path):
    slave = start_slave(constants=PATIENT)
    repo, tree = make_clone(slave, upstream)
    git(tree, "worktree", "add", "-q", str(tmp_path / "worktree"), "HEAD")
    shutil.rmtree(str(tree))
    shutil.copytree(str(tmp_path / "worktree"), str(tree))
    record = slave.json("/status?repo=hanuman")
    assert record["commit"] is None, "its repository was removed with the old tree"
    git(tmp_path, "clone", "-q", "--separate-git-dir", str(tmp_path / "elsewhere"),
        str(repo.path), str(tmp_path / "clone"))
    shutil.rmtree(str(tree))
    (tmp_path / "clone").rename(tree)
    assert slave.json("/status?repo=hanuman")["commit"] == repo.head()


def test_refs_that_only_git_can_read(start_slave, upstream):
    """As with reftable: HEAD names a ref that is in no plain file; git is asked."""
    slave = start_slave(constants=PATIENT)
    repo, tree = make_clone(slave, upstream)
    real = tree / ".git-real"
    (tree / ".git").rename(real)
    (tree / ".git").write_text("gitdir: .git-real\n")
    assert slave.json("/status?repo=hanuman")["commit"] == repo.head()


@pytest.mark.parametrize(
    "name", daily(2, ["HEAD", "refs/heads/main", "packed-refs", "config", "index"])
)
def test_nothing_waits_for_a_fifo(start_slave, upstream, name):
    slave = start_slave()
    _, tree = make_clone(slave, upstream)
    path = tree / ".git" / name
    if path.exists():
        path.unlink()
    if name == "packed-refs":
        (tree / ".git" / "refs" / "heads" / "main").unlink()
    os.mkfifo(str(path))
    began = time.monotonic()
    slave.json("/status?repo=hanuman", timeout=300)
    slave.json("/status", timeout=300)
    assert time.monotonic() - began < 40
    if name == "HEAD":
        stand_in(slave, text="#!/bin/sh\nexit 1\n")
        assert slave.wait_update(timeout=300)["commit"] is None
    assert slave.stop() == 0


def test_a_tree_that_is_gone_or_empty_has_no_commit(start_slave, upstream):
    slave = start_slave()
    repo, tree = make_clone(slave, upstream)
    (tree / "a").unlink()
    assert os.listdir(str(tree)) == [".git"]
    assert slave.json("/status?repo=hanuman")["commit"] is None, "emptied, but for .git"
    shutil.rmtree(str(tree / ".git"))
    assert slave.json("/status?repo=hanuman")["commit"] is None, "emptied"
    tree.rmdir()
    assert slave.json("/status?repo=hanuman")["commit"] is None, "gone"
    assert slave.json("/status?repo=hanuman")["state"] == "live"
    empty = upstream.create("empty", files={"a": "1"})
    tree = empty.git("hash-object", "-t", "tree", "-w", "/dev/null")
    empty.git("update-ref", "refs/heads/main", empty.git("commit-tree", tree, "-m", "no files"))
    assert slave.wait_update("empty")["commit"] == empty.head(), "a commit without files"


def test_an_id_that_is_no_longer_remembered_is_404(start_slave):
    slave = start_slave()
    stand_in(slave)
    first = slave.wait_update()["update"]
    for _ in range(10):
        last = slave.wait_update()["update"]
    for update in (first, 0):
        slave.json("/status?repo=hanuman&update=%d" % update, status=404)
    assert slave.json("/status?repo=hanuman&update=%d" % last)["update"] == last
    slave.stop()
    slave.start()
    slave.json("/status?repo=hanuman&update=%d" % first, status=404)


def test_a_replaced_id_is_answered_by_its_successor_also_after_a_restart(start_slave):
    slave = start_slave()
    stand_in(slave, "sleep 1000")
    slave.signal()
    wait_runs(slave, 1)
    replaced = [slave.signal() for _ in range(3)]
    kill_hard(slave)
    stand_in(slave)
    slave.start()
    for update in replaced:
        assert slave.wait_update(update=update)["update"] == replaced[-1]


# -- a service manager


@pytest.mark.parametrize("is_abstract", [True, False], ids=["abstract", "path"])
def test_a_service_manager_hears_once_it_serves(start_slave, tmp_path, is_abstract):
    """As systemd with Type=notify; nothing that the slave runs can speak for it."""
    address = "@server-update-%d" % os.getpid() if is_abstract else str(tmp_path / "notify")
    slave = start_slave()
    slave.stop()
    stand_in(slave, text='#!/bin/sh\necho "${NOTIFY_SOCKET-none}" >>"$HOME/runs"\nexit 1\n')
    slave.env["NOTIFY_SOCKET"] = address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(60)
        manager.bind(address.replace("@", "\0"))
        slave.start(wait=False)
        assert manager.recv(99) == b"READY=1"
        assert slave.get("/healthz")[0] == 200
        slave.wait_update()
        assert runs(slave) == ["none"]
        assert slave.stop() == 0
        slave.args = ["--tls-key", str(tmp_path / "nothing")]
        slave.start(wait=False)
        assert slave.process.wait(60) == 2
        manager.settimeout(0)
        with pytest.raises(BlockingIOError):
            manager.recv(99)


def test_a_service_manager_that_is_gone_is_no_matter(start_slave, tmp_path):
    slave = start_slave(env={"NOTIFY_SOCKET": str(tmp_path / "nothing")})
    assert slave.get("/healthz")[0] == 200


def test_journald_gets_no_second_time(start_slave):
    """$JOURNAL_STREAM names device and inode of what systemd gave: systemd.exec(5)."""
    slave = start_slave()
    slave.stop()
    assert re.match(r"[0-9-]{10}T[0-9:]{8}Z slave\.py ", slave.log())
    here = slave.log_file.stat()
    for inode, pattern in ((here.st_ino, "slave"), (here.st_ino + 1, "[0-9T:-]{19}Z slave")):
        before = len(slave.log())
        slave.env["JOURNAL_STREAM"] = "%d:%d" % (here.st_dev, inode)
        slave.start()
        slave.stop()
        assert re.match(pattern, slave.log()[before:])


# -- process 1

ORPHAN = """#!/bin/sh
setsid sh -c ': >"$HOME/begun.$0"; sleep 0.2; echo >>"$HOME/orphans"' $$ &
until [ -e "$HOME/begun.$$" ]; do sleep 0.02; done
mkdir -p "$SERVER_UPDATE_REPOS_DIR/$1/.git"
echo %s >"$SERVER_UPDATE_REPOS_DIR/$1/.git/HEAD"
echo "$1 %s -"
""" % (ONE, ONE)


def children(pid):
    with open("/proc/%d/task/%d/children" % (pid, pid)) as handle:
        return [int(child) for child in handle.read().split()]


def is_zombie(pid):
    try:
        with open("/proc/%d/stat" % pid) as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return False


def test_process_1_reaps_what_it_inherits(start_slave):
    if os.getuid() or subprocess.call(["unshare", "--pid", "--fork", "true"]):
        pytest.skip("process 1 needs root")
    slave = start_slave()
    restart(slave, "unshare", "--pid", "--fork", "--mount-proc")
    stand_in(slave, text=ORPHAN)
    for _ in range(5):
        assert slave.wait_update()["state"] == "live"
    orphans = slave.home / "orphans"
    wait_until(lambda: orphans.exists() and len(orphans.read_text()) == 5, what="the orphans")
    (first,) = children(slave.process.pid)
    wait_until(lambda: not any(map(is_zombie, children(first))), what="no zombies")
    os.kill(first, 15)
    assert slave.process.wait(60) == 0
    slave.start()
    (first,) = children(slave.process.pid)
    os.kill(children(first)[0], 9)
    assert slave.process.wait(60) == 128 + 9


def test_process_1_says_what_keeps_it_from_starting(start_slave):
    if os.getuid() or subprocess.call(["unshare", "--pid", "--fork", "true"]):
        pytest.skip("process 1 needs root")
    slave = start_slave()
    slave.command = ["unshare", "--pid", "--fork", *slave.command]
    status, stderr = start_by_hand(slave, "--port", "x")
    assert (status, stderr) == (2, "slave.py: bad PORT 'x' (set by --port)\n")


def test_a_path_with_a_nul_in_one_clone_blinds_nobody(start_slave, upstream):
    """As a disk leaves it that lost a sector, or who may write in one tree."""
    upstream.create("hanuman", {"f": "1"})
    slave = start_slave()
    slave.wait_update()
    (slave.repos / "hanuman/.git/HEAD").write_bytes(b"ref: refs/heads/\0x\n")
    assert slave.json("/status")["repos"]["hanuman"]["commit"] is None
    record = slave.wait_update()
    assert (record["state"], record["message"]) == ("live", "")
