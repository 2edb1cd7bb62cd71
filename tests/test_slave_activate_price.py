"""What an update costs, and what a reader of the live tree sees meanwhile."""

import os
import random
import re
import subprocess
import sys

import pytest
from activate_support import assert_fresh, git
from processes import system_calls
from product import need

# An update takes some 0.1 s; ACTIVATE_UPDATES=1000 runs the whole promise (docs/promises.md).
UPDATES = int(os.environ.get("ACTIVATE_UPDATES") or 30)
MAX_PACKS = 25
SMALL_UPDATE_BYTES = 100 * 1024

READER = """
import json, os, stat, sys

def read(name, folder):
    with open(name, opener=lambda path, flags: os.open(path, flags, dir_fd=folder)) as file:
        return file.read()

def which(folder):
    return folder.st_ino, folder.st_ctime_ns

live, stop = sys.argv[1:]
os.nice(10)  # looks whenever there is nothing else to do, and keeps nobody from it
seen = dict(rounds=0, missing=0, mixed=0, not_folder=0, gone=0)
while not os.path.exists(stop):
    seen["rounds"] += 1
    before = os.lstat(live)
    seen["not_folder"] += not stat.S_ISDIR(before.st_mode)
    try:
        for name in ("a", "deep/er/b"):
            with open(os.path.join(live, name)) as file:
                file.read()
    except FileNotFoundError:
        # The kernel may be on its way through the old tree while that goes and is removed.
        is_old = which(os.lstat(live)) != which(before)
        seen["gone" if is_old else "missing"] += 1
    try:
        folder = os.open(live, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        seen["missing"] += 1
        continue
    try:
        seen["mixed"] += read("a", folder) != read("deep/er/b", folder)
    except FileNotFoundError:
        seen["gone"] += 1  # the old tree, opened before the exchange, is being removed
    finally:
        os.close(folder)
print(json.dumps(seen))
"""


def both(text):
    return {"a": str(text), "deep/er/b": str(text)}


def test_over_many_updates_a_reader_sees_whole_trees_and_packs_stay_few(
    activate, upstream, tmp_path
):
    """The path is always there and a plain folder; two files of one tree always agree.

    All the while there are few packs.
    """
    repo = upstream.create("r", both("start"))
    commits = repo.commit_ahead([both(number) for number in range(UPDATES)])
    activate.good("r")
    stop = tmp_path / "stop"
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(activate.live()), str(stop)], stdout=subprocess.PIPE
    )
    packs = []
    for commit in commits:
        repo.show(commit)
        assert activate.good("r")[0] == commit
        packs.append(len(activate.packs()))
    stop.write_text("")
    seen = eval(reader.communicate(timeout=300)[0])  # a dict of numbers
    assert reader.returncode == 0
    assert seen["rounds"] > UPDATES, seen
    assert (seen["missing"], seen["mixed"], seen["not_folder"]) == (0, 0, 0), seen
    assert max(packs) <= MAX_PACKS
    assert max(packs) > 10, "a roll-up at every update would be a price as well"
    git(activate.live(), "fsck", "--full", "--strict")
    assert_fresh(activate, upstream.base_path + "/r.git", tmp_path / "clone", "--no-local")


@pytest.fixture
def history(upstream):
    """A repository with a history that is large beside what a commit adds."""
    rng = random.Random(1)
    repo = upstream.create("r", {"f": "1"})
    for number in range(20):
        names = ["dir%d/file%d" % (number, i) for i in range(10)]
        repo.commit({name: rng.getrandbits(8 * 9999).to_bytes(9999, "big") for name in names})
    repo.git("repack", "-q", "-a", "-d")
    return repo


def test_an_update_moves_what_is_new_and_no_more(activate, upstream, http_upstream, history):
    activate.settings["BASE_URL"] = http_upstream.url
    activate.good("r")
    whole = http_upstream.bytes_sent
    assert whole > 1900000
    for change in ({}, {"dir3/file3": "one small change\n"}):
        if change:
            history.commit(change)
        http_upstream.bytes_sent = 0
        http_upstream.requests.clear()
        packs = set(activate.packs())
        activate.good("r")
        assert http_upstream.bytes_sent < SMALL_UPDATE_BYTES / 10
        assert len(http_upstream.requests) <= (4 if change else 2)
        assert packs <= set(activate.packs())
    counts = git(activate.live(), "count-objects", "-v").split("\n")
    on_disk = int(counts[2].split()[1])
    assert on_disk == int(history.git("rev-list", "--all", "--objects", "--count")), counts


def test_the_disk_is_not_asked_for_a_second_copy_of_the_history(activate, history):
    activate.good("r")
    (pack,) = (activate.live() / ".git/objects/pack").glob("*.pack")
    number = pack.stat().st_ino
    activate.hook(
        "pre-update", 'stat -c "%%i %%h" .git/objects/pack/*.pack >%s/seen\n' % activate.bin
    )
    history.commit({"f": "2"})
    activate.good("r")
    assert "%d 2\n" % number in (activate.bin / "seen").read_text(), (
        "not the same file, linked twice"
    )
    assert (activate.live() / ".git/objects/pack" / pack.name).stat().st_nlink == 1


@pytest.mark.slow
def test_a_failing_roll_up_costs_nothing_but_a_clone_anew(activate, upstream, tmp_path):
    """A git before 2.32 has no --geometric: packs grow to 40, then all is cloned anew, once."""
    fake = tmp_path / "fake"
    fake.mkdir()
    real = subprocess.check_output(["sh", "-c", "command -v git"]).decode().strip()
    (fake / "git").write_text(
        '#!/bin/sh\ncase "$*" in *--geometric*) echo "usage: git repack" >&2; exit 129 ;; esac\n'
        'exec "%s" "$@"\n' % real
    )
    (fake / "git").chmod(0o755)
    env = {"PATH": "%s:%s" % (fake, os.environ["PATH"])}
    repo = upstream.create("r", {"f": "0"})
    activate.good("r")
    pack = activate.live() / ".git/objects/pack"
    for number in range(38):  # as 38 updates would have left it
        repo.commit({"f": str(number)})
        git(activate.live(), "-c", "fetch.unpackLimit=1", "-c", "gc.auto=0", "fetch", "-q")
    (activate.live() / ".git/server-update").write_text("")
    assert len(list(pack.glob("*.pack"))) == 39
    counts = []
    for number in range(3):
        repo.commit({"f": "last %d" % number})
        result = activate("r", env=env)
        assert result.status == 0, result
        counts.append((len(activate.packs()), result.err.count("can't reuse")))
    assert counts == [(40, 0), (1, 1), (2, 0)]


def test_a_tiny_update_starts_few_programs(activate, upstream, tmp_path):
    """Time is counted in bench/; here it is the programs, which is what a tiny update spends."""
    need("strace")
    upstream.create("r")
    activate.good("r")
    log = tmp_path / "trace"
    activate.good("r", prefix=["strace", "-f", "-qq", "-e", "trace=execve", "-o", str(log)])
    lines = [line for line in system_calls(log).split("\n") if "= 0" in line]
    # What is flushed meanwhile is more often the slower the machine is.
    started = [line for line in lines if not re.search(r'"[^"]*/(sleep|sync)"', line)]
    assert 10 < len(started) <= 30, started
