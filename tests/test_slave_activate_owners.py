"""Files in the tree that are another user's, or immutable; and links that somebody swaps in."""

import os
import shutil

import pytest
from activate_support import ANOTHER_USER, Activate, as_another_user, snapshot
from product import PYTHON


@pytest.fixture
def activate(tmp_path, upstream):
    upstream.create("r", {"f": "1", "app/main": "1", "app/more/x": "1"})
    return Activate(tmp_path, upstream.base_path)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_another_users_folder_stops_no_later_update(activate, upstream, tmp_path):
    """As a container that runs as root leaves a __pycache__ in the tree."""
    prefix = as_another_user(activate)
    assert activate("r", prefix=prefix).status == 0
    for number in range(3):
        cache = activate.live() / "app" / "__pycache__"
        cache.mkdir()
        (cache / "main.pyc").write_text("root's")
        result = activate("r", prefix=prefix)
        assert result.status == 0, result
        assert "app/__pycache__/main.pyc" in result.err and "belongs to root" in result.err
        assert activate.leftovers() == ["trash"]
        assert len(list((activate.state / "trash").iterdir())) == number + 1
    assert files_below(activate.state / "trash")[0].endswith("app/__pycache__/main.pyc")
    assert len(files_below(activate.state / "trash")) == 3, "the rest alone is set aside"
    for folder, folders, files in os.walk(str(activate.state / "trash")):
        for name in folders + files:
            os.chown(os.path.join(folder, name), ANOTHER_USER, ANOTHER_USER)
    for _ in range(5):  # a run takes a second for it, which is little on a busy machine
        assert activate("r", prefix=prefix).status == 0
    assert activate.leftovers() == [], "what can be removed at last is"


def test_another_users_tree_says_whose_it_is(activate):
    prefix = as_another_user(activate)
    assert activate("r", prefix=prefix).status == 0
    for name in (".", ".git"):
        os.chown(str(activate.live() / name), 0, 0)
    before = snapshot(activate.live())
    result = activate("r", prefix=prefix)
    assert (result.status, snapshot(activate.live())) == (1, before), result
    assert "'%s' belongs to root" % activate.live() in result.last
    assert activate.leftovers() == []


MANY = 8000


@pytest.mark.slow
def test_many_folders_of_another_user_stop_no_later_update(activate, upstream):
    """No process of an update may take 10 s of CPU time: a busy machine makes no difference."""
    limit = ["sh", "-c", 'ulimit -t 10; exec "$@"', "sh"]
    prefix = as_another_user(activate) + limit
    assert activate("r", prefix=prefix).status == 0
    for number in range(MANY):
        folder = activate.live() / "cache" / str(number)
        folder.mkdir(parents=True)
        for name in "abc":
            (folder / name).touch()
    result = activate("r", prefix=prefix)
    assert (result.status, result.err.count("\n")) == (0, 1), result
    assert " and %d more of the old tree: " % (3 * MANY - 1) in result.err
    assert activate.leftovers() == ["trash"]
    assert activate("r", prefix=prefix).status == 0


# Before the program that removes trees: %s s are over whenever it looks at the clock.
CLOCK = "import itertools, time; time.monotonic = itertools.count(0, %s).__next__"
REMOVAL = """#!/bin/sh
case $4 in *"class Removal"*)
    program="%s
$4"
    shift 4
    exec "%s" -I -S -c "$program" "$@"
esac
exec "%s" "$@"
"""


def on_removal(folder, statement):
    """A folder for PATH: its python3 begins with a statement where it is to remove trees, and its
    rm is one that isn't used for that."""
    folder.mkdir()
    (folder / "python3").write_text(REMOVAL % (statement, PYTHON, PYTHON))
    (folder / "python3").chmod(0o755)
    (folder / "rm").symlink_to(shutil.which("rm"))
    return "%s:%s" % (folder, os.environ["PATH"])


def test_what_is_not_removed_in_half_of_the_time_is_left_for_later_runs(activate, tmp_path):
    first, _ = activate.good("r")
    for number in range(10):
        (activate.live() / str(number)).touch()
    path = on_removal(tmp_path / "fake", CLOCK % 10)
    result = activate("r", env={"PATH": path, "SERVER_UPDATE_TIMEOUT": "120"})
    assert (result.status, result.out) == (0, "r %s %s\n" % (first, first)), result
    assert "of the old tree: out of time, it belongs to " in result.err
    assert activate.leftovers() == ["trash"]
    for _ in range(5):
        assert activate("r").status == 0
    assert activate.leftovers() == []


def test_all_of_the_trash_has_one_second(activate, tmp_path):
    activate.good("r")
    for number in range(20):
        folder = activate.state / "trash" / ("r.new.%d" % number)
        folder.mkdir(parents=True)
        (folder / "f").touch()
    path = on_removal(tmp_path / "fake", CLOCK % 0.1)
    assert activate("r", env={"PATH": path}).status == 0
    assert 10 < len(files_below(activate.state / "trash")) < 20
    for _ in range(5):
        assert activate("r").status == 0
    assert activate.leftovers() == []


def test_an_immutable_file_stops_no_later_update(activate, make_immutable):
    activate.good("r")
    kept = activate.live() / "app/main"
    inode = kept.stat().st_ino
    release = make_immutable(kept)
    for _ in range(2):
        result = activate("r")
        assert result.status == 0, result
    (aside,) = (activate.state / "trash").iterdir()
    assert files_below(aside) == ["app/main"]
    assert (aside / "app/main").stat().st_ino == inode
    release()
    assert activate.good("r")


def test_chmod_follows_no_link_that_is_swapped_in(activate, tmp_path):
    """A chmod before which somebody puts a link in the place of the folder that it is for."""
    prefix = as_another_user(activate)
    assert activate("r", prefix=prefix).status == 0
    outside = activate.home / "outside"
    outside.mkdir()
    (outside / "theirs").write_text("x")
    os.chown(str(outside), ANOTHER_USER, ANOTHER_USER)
    outside.chmod(0o500)
    fake = tmp_path / "fake"
    fake.mkdir()
    path = activate.state / "r.new/app"
    (fake / "chmod").write_text(
        '#!/bin/sh\nfor last; do :; done\nif [ "$last" = {0} ] && [ ! -L {0} ]; then\n'
        "  {1} -R u+w {0}; rm -rf {0}; ln -s {2} {0}\nfi\nexec {1} \"$@\"\n".format(
            path, shutil.which("chmod"), outside
        )
    )
    (fake / "chmod").chmod(0o755)
    (activate.live() / "app").chmod(0o500)
    env = {"PATH": "%s:%s" % (fake, os.environ["PATH"])}
    before = snapshot(outside)
    assert activate("r", prefix=prefix, env=env).status == 0
    assert snapshot(outside) == before


def test_an_rm_that_goes_by_paths_is_not_used_for_trees(activate, tmp_path):
    """Such as busybox's, a link to it: who swaps a folder for a link meanwhile leads it away."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "busybox").write_text(
        '#!/bin/sh\ncase $1 in -r*) touch %s/ran ;; esac\nexec %s "$@"\n'
        % (fake, shutil.which("rm"))
    )
    (fake / "busybox").chmod(0o755)
    (fake / "rm").symlink_to("busybox")
    env = {"PATH": "%s:%s" % (fake, os.environ["PATH"])}
    activate.good("r")
    (activate.live() / "app").chmod(0o000)
    assert activate.good("r", env=env)
    assert not (fake / "ran").exists()


def test_what_it_cannot_write_says_whose_it_is(activate):
    """After somebody has run it once as root."""
    prefix = as_another_user(activate)
    activate.state.mkdir(parents=True)
    for path in (activate.repos, activate.state):
        os.chown(str(path), ANOTHER_USER, ANOTHER_USER)
    lock = activate.state / "r.lock"
    lock.touch(mode=0o600)
    result = activate("r", prefix=prefix)
    assert result.status == 1
    assert result.last.startswith(
        "slave-activate: can't write '%s'; '%s' belongs to root: chown" % (lock, lock)
    )


def test_a_user_without_a_name_is_told_by_number(activate):
    """As in a container, whose user no file there has."""
    prefix = [word.replace(str(ANOTHER_USER), "1234512345") for word in as_another_user(activate)]
    activate.state.mkdir(parents=True)
    lock = activate.state / "r.lock"
    lock.touch(mode=0o600)
    result = activate("r", prefix=prefix)
    assert (result.status, result.last) == (
        1,
        "slave-activate: can't write '%s'; '%s' belongs to root: chown it to 1234512345"
        % (lock, lock),
    ), result


def test_nobody_else_can_open_the_lock(activate):
    activate.good("r")
    assert (activate.state / "r.lock").stat().st_mode & 0o077 == 0
