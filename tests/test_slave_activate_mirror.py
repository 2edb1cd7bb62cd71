"""slave-activate with GIT_FROM: the bare mirror that slaves beneath clone from."""

import os
import shutil
import signal
import subprocess
import time
from functools import partial

import pytest
from activate_support import finish, git, in_mounts
from processes import wait_until
from product import SHELLS, daily
from upstream import run_git

FORMAT = "--format=%(refname) %(objectname) %(*objectname)"


class Mirror:
    """The mirror of the repository r, as slave-activate keeps it."""

    def __init__(self, activate):
        activate.settings["GIT_FROM"] = "127.0.0.1"
        self.activate = activate
        self.path = activate.state / "r.git"
        self.packs = self.path / "objects" / "pack"
        self.whole_script = activate.script.read_text()

    def break_script(self, old, new):
        """Have the script say something else, until mend_script()."""
        broken = self.whole_script.replace(old, new)
        assert broken != self.whole_script
        self.activate.script.write_text(broken)

    def mend_script(self):
        self.activate.script.write_text(self.whole_script)

    def update(self, *args):
        """An update must go live, and leave a sound mirror."""
        result = self.activate("r", *args)
        assert result.status == 0, result
        self.check()

    def check(self):
        assert self.git("fsck", "--full", "--no-dangling") == ""
        assert self.git("rev-parse", "--is-bare-repository") == "true"
        assert sorted(os.listdir(str(self.path))) == [
            "HEAD",
            "config",
            "objects",
            "packed-refs",
            "refs",
        ]
        assert self.activate.leftovers() == ["r.git"]

    def git(self, *args, **kwargs):
        return run_git("--git-dir", self.path, *args, **kwargs)

    def refs(self):
        return self.git("for-each-ref", FORMAT)

    def names(self):
        """Of all objects' files."""
        return {path.name for path in (self.path / "objects").rglob("*") if path.is_file()}


@pytest.fixture
def mirror(activate):
    return Mirror(activate)


def force_push(repo):
    """Another root commit on main; what was there is in no branch any more."""
    return repo.commit({"a": "another history\n"}, parent="")


@pytest.mark.parametrize("shell", SHELLS)
def test_it_has_all_branches_and_tags_of_the_forge_and_its_default_branch(mirror, upstream, shell):
    repo = upstream.create("r", branch="trunk")
    repo.commit({"b": "1"}, branch="topic/one")
    repo.git("tag", "light", "topic/one")
    repo.git("tag", "-a", "-m", "one", "v1.0", "trunk")
    repo.git("tag", "-a", "-m", "of a tag", "v1.0-again", "v1.0")
    result = mirror.activate("r", "topic/one", prefix=shell.split())
    assert result.status == 0, result
    mirror.check()
    assert mirror.refs() == repo.git("for-each-ref", FORMAT)
    assert mirror.git("symbolic-ref", "HEAD") == "refs/heads/trunk"
    # What vanishes and what moves on the forge does so here, and a new default branch is one.
    repo.git("branch", "-m", "trunk", "main")
    repo.git("branch", "-D", "topic/one")
    repo.git("tag", "-d", "v1.0")
    repo.git("symbolic-ref", "HEAD", "refs/heads/main")
    repo.commit({"a": "2"})
    mirror.update()
    assert mirror.refs() == repo.git("for-each-ref", FORMAT)
    assert mirror.git("symbolic-ref", "HEAD") == "refs/heads/main"


def test_its_objects_are_those_of_the_clone(mirror, upstream):
    upstream.create("r").commit({"big": os.urandom(100000)})
    mirror.update()
    for path in mirror.activate.live().glob(".git/objects/pack/*"):
        assert path.samefile(mirror.packs / path.name)


def log_programs(activate, log):
    """From now on each start of git and python3 by the script is a line of the log."""
    folder = activate.bin / "logged"
    folder.mkdir()
    for name in ("git", "python3"):
        path = folder / name
        path.write_text(
            "#!/bin/sh\n"
            "printf '%%s\\n' \"%s $(echo \"$*\" | tr -d '\\n')\" >>'%s'\n"
            'exec %s "$@"\n' % (name, log, shutil.which(name))
        )
        path.chmod(0o755)
    activate.path = "%s:%s" % (folder, os.environ["PATH"])


def test_without_git_from_there_is_none_and_no_process_more(mirror, upstream, tmp_path):
    upstream.create("r")
    mirror.update()
    mirror.activate.settings["GIT_FROM"] = ""
    mirror.activate.good("r")
    assert not mirror.path.exists()
    del mirror.activate.settings["GIT_FROM"]
    log = tmp_path / "programs"
    log_programs(mirror.activate, log)
    mirror.activate.good("r")
    without = log.read_text()
    assert "refs/tags" not in without
    mirror.activate.settings["GIT_FROM"] = "127.0.0.1"
    mirror.update()
    with_it = log.read_text()[len(without) :]
    assert "refs/tags" in with_it
    assert len(with_it.splitlines()) == len(without.splitlines()) + 2


def test_by_hand_the_mirror_of_a_slave_that_has_git_from_elsewhere_stays_up_to_date(
    mirror, upstream
):
    """As an option of slave.py, or in its unit: a run by hand knows nothing of that."""
    repo = upstream.create("r")
    mirror.update()
    repo.commit({"a": "2"})
    del mirror.activate.settings["GIT_FROM"]
    mirror.update()
    assert mirror.refs() == repo.git("for-each-ref", FORMAT)


def test_slave_conf_can_set_it(activate, upstream, tmp_path):
    conf = tmp_path / "slave.conf"
    conf.write_text("GIT_FROM=10.0.0.0/8, ::1\n")
    activate.settings["CONF"] = str(conf)
    upstream.create("r")
    assert activate("r").status == 0
    assert (activate.state / "r.git" / "HEAD").exists()


# -- odd upstreams -------------------------------------------------------------


def test_a_default_branch_that_is_missing_is_missing_here_too(mirror, upstream, tmp_path):
    repo = upstream.create("r")
    repo.git("symbolic-ref", "HEAD", "refs/heads/gone")
    mirror.update("main")
    assert mirror.refs() == repo.git("for-each-ref", FORMAT)
    run_git("clone", "-q", "--mirror", mirror.path, tmp_path / "again")
    got = run_git("--git-dir", tmp_path / "again", "for-each-ref", FORMAT)
    assert got == repo.git("for-each-ref", FORMAT)
    run_git("clone", "-q", mirror.path, tmp_path / "tree")
    assert git(tmp_path / "tree", "rev-parse", "-q", "--verify", "HEAD", check=False) == ""


def test_a_head_without_a_branch_is_one_here_too(mirror, upstream):
    repo = upstream.create("r")
    first = repo.head()
    repo.commit({"a": "2"})
    repo.git("update-ref", "--no-deref", "HEAD", first)
    mirror.update()
    assert mirror.git("rev-parse", "HEAD") == first
    assert mirror.refs() == repo.git("for-each-ref", FORMAT)


def test_an_upstream_without_a_commit(mirror, upstream):
    upstream.create("r", files={}, branch="trunk")
    mirror.update()
    assert mirror.refs() == ""
    assert mirror.git("symbolic-ref", "HEAD") == "refs/heads/trunk"


def test_an_upstream_with_sha256(mirror, upstream):
    path = upstream.folder / "r.git"
    run_git("init", "-q", "--bare", "--object-format=sha256", path)
    commit = run_git(
        "--git-dir", path, "commit-tree", "-m", "1", run_git("--git-dir", path, "mktree", text="")
    )
    run_git("--git-dir", path, "update-ref", "refs/heads/main", commit)
    run_git("--git-dir", path, "symbolic-ref", "HEAD", "refs/heads/main")
    mirror.update()
    assert mirror.git("rev-parse", "main") == commit


def test_what_a_hook_adds_is_not_the_forges(mirror, upstream):
    repo = upstream.create("r")
    mirror.activate.hook(
        "pre-update", "git tag deployed; git branch own; git commit -q --amend -m x\n"
    )
    mirror.update()
    assert mirror.refs() == repo.git("for-each-ref", FORMAT)


# -- what old refs need ----------------------------------------------------------


def test_what_is_in_no_ref_any_more_stays_for_fetches_that_have_begun(mirror, upstream):
    repo = upstream.create("r")
    first = repo.head()
    mirror.update()
    packs = mirror.names()
    force_push(repo)
    # A clone that is made anew has nothing of the old history.
    (mirror.activate.live() / ".git" / "server-update").unlink()
    mirror.update()
    live = mirror.activate.live()
    assert git(live, "cat-file", "-t", first, check=False) == ""
    assert mirror.git("cat-file", "-t", first) == "commit"
    assert packs <= mirror.names()
    mirror.update()
    assert mirror.git("cat-file", "-t", first) == "commit", "it is not yet 15 minutes"


def stop_clock(activate, now):
    """From now on the clock of the script's python3 stands at that time."""
    folder = activate.bin / "clock"
    folder.mkdir(exist_ok=True)
    (folder / "python3").write_text(
        "#!%s\nimport os, sys\n"
        "python = %r\n"
        "argv = [one.replace('time.time()', '%f') for one in sys.argv[1:]]\n"
        "os.execv(python, [python] + argv)\n"
        % (shutil.which("python3"), shutil.which("python3"), now)
    )
    (folder / "python3").chmod(0o755)
    activate.path = "%s:%s" % (folder, os.environ["PATH"])


def test_it_goes_after_15_minutes(mirror, upstream):
    repo = upstream.create("r")
    first = repo.head()
    mirror.update()
    packs = list((mirror.path / "objects" / "pack").iterdir())
    force_push(repo)
    (mirror.activate.live() / ".git" / "server-update").unlink()
    mirror.update()
    newest = max(path.stat().st_ctime for path in packs)
    stop_clock(mirror.activate, newest + 890)
    mirror.update()
    assert mirror.git("cat-file", "-t", first) == "commit"
    stop_clock(mirror.activate, newest + 910)
    mirror.update()
    assert mirror.git("cat-file", "-t", first, check=False) == ""


@pytest.mark.slow
def test_packs_stay_bounded_over_many_updates(mirror, upstream):
    repo = upstream.create("r")
    for number in range(120):
        repo.commit({"a": str(number)})
        assert mirror.activate("r").status == 0
    mirror.check()
    assert mirror.git("rev-parse", "main") == repo.head()
    assert len([name for name in mirror.names() if name.endswith(".pack")]) <= 17 + 60


# -- what goes wrong -------------------------------------------------------------


def spoil_pack(mirror):
    for path in mirror.packs.glob("*.pack"):
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(20)
            file.write(b"damaged")


def spoil_only_the_mirror(mirror):
    for path in mirror.packs.glob("*.pack"):
        text = path.read_bytes()
        path.unlink()
        path.write_bytes(text[:20] + b"damaged" + text[27:])


def lose_index(mirror):
    for path in mirror.packs.glob("*.idx"):
        path.unlink()


def put_a_file_there(mirror):
    shutil.rmtree(str(mirror.path))
    mirror.path.write_text("what is this?")


def put_folders_there(mirror):
    for name in ("HEAD", "packed-refs", "config"):
        (mirror.path / name).unlink()
        (mirror.path / name).mkdir()
        (mirror.path / name / "x").write_text("x")


def put_a_file_for_the_objects(mirror):
    shutil.rmtree(str(mirror.path / "objects"))
    (mirror.path / "objects").write_text("x")


def add_what_is_none_of_ours(mirror):
    (mirror.path / "refs" / "heads").mkdir()
    (mirror.path / "refs" / "heads" / "main").write_text("1" * 40 + "\n")
    (mirror.path / "objects" / "info").mkdir()
    alternates = mirror.path / "objects" / "info" / "alternates"
    alternates.write_text("%s\n" % (mirror.path / "nothing"))
    (mirror.packs / "multi-pack-index").write_text("x")
    (mirror.packs / "pack-x.pack.new").write_text("x")
    (mirror.packs / "pack-1234.idx").write_text("x")
    (mirror.packs / "pack-1234.pack").write_text("x")
    (mirror.path / "config").write_text("[core]\n\tfoo = bar\n[uploadpack]\n\thideRefs = refs\n")


def lose_the_refs(mirror):
    (mirror.path / "packed-refs").unlink()
    (mirror.path / "HEAD").write_text("nonsense")


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_pack,
        spoil_only_the_mirror,
        lose_index,
        put_a_file_there,
        put_folders_there,
        put_a_file_for_the_objects,
        add_what_is_none_of_ours,
        lose_the_refs,
    ],
)
def test_a_mirror_that_is_damaged_is_whole_after_the_next_update(mirror, upstream, spoil):
    repo = upstream.create("r")
    repo.commit({"big": os.urandom(10000)})
    mirror.update()
    time.sleep(0.02)  # what is damaged now is newer than the update, by a file system's clock
    spoil(mirror)
    mirror.update()
    assert mirror.refs() == repo.git("for-each-ref", FORMAT)
    assert mirror.git("rev-parse", "HEAD") == repo.head()


STOPS = [
    "os.link(",
    "os.rename(",
    "os.chmod(",
    "os.fsync(",
    "flush(mirror)\n    for name",
    "os.utime(objects)",
]


@pytest.mark.parametrize("stop", daily(2, STOPS))
def test_killed_in_the_middle_it_is_whole_after_the_next_update(mirror, upstream, stop):
    repo = upstream.create("r")
    mirror.update()
    before = mirror.refs()
    repo.commit({"a": "2"})
    repo.git("tag", "new")
    mirror.break_script(stop, "os.kill(os.getpid(), 19) or " + stop)
    process = mirror.activate.start("r")
    wait_until(lambda: stopped_below(process.pid), what="the program at '%s'" % stop)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert mirror.refs() in (before, repo.git("for-each-ref", FORMAT))
    assert mirror.git("fsck", "--full", "--no-dangling") == ""
    mirror.mend_script()
    mirror.update()
    assert mirror.refs() == repo.git("for-each-ref", FORMAT)


def test_its_head_names_a_branch_that_is_there_at_every_moment(mirror, upstream):
    """Also where it is killed while the default branch gives way to another."""
    repo = upstream.create("r")
    mirror.update()
    repo.git("branch", "-m", "main", "trunk")
    new = repo.commit({"a": "2"})
    for stop in ("replace(head_file, head)", "time.sleep(READ_S)"):
        broken = mirror.whole_script.replace(
            "        " + stop, "        os.kill(os.getpid(), 19)\n        " + stop
        )
        assert broken != mirror.whole_script
        broken = broken.replace(
            "if set(kept) - set(refs):\n        os.kill", "if True:\n            os.kill"
        )
        mirror.activate.script.write_text(broken)
        process = mirror.activate.start("r")
        wait_until(partial(stopped_below, process.pid), what="the program at '%s'" % stop)
        assert mirror.git("rev-parse", "trunk") == new
        assert mirror.git("rev-parse", "HEAD") == mirror.git(
            "rev-parse", mirror.git("symbolic-ref", "HEAD")
        )
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    mirror.mend_script()
    before = (mirror.path / "packed-refs").stat().st_ino
    mirror.update()
    assert mirror.refs() == repo.git("for-each-ref", FORMAT)
    assert mirror.git("symbolic-ref", "HEAD") == "refs/heads/trunk"
    assert (mirror.path / "packed-refs").stat().st_ino != before


def test_another_default_branch_alone_makes_a_new_state(mirror, upstream):
    """slave.py knows states of a mirror by the file packed-refs."""
    repo = upstream.create("r")
    repo.commit({"a": "2"}, branch="other")
    mirror.update()
    before = (mirror.path / "packed-refs").stat()
    repo.git("symbolic-ref", "HEAD", "refs/heads/other")
    mirror.update("other")
    after = (mirror.path / "packed-refs").stat()
    assert (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns)
    assert mirror.git("rev-parse", "HEAD") == repo.head("other")
    mirror.update("other")
    assert (mirror.path / "packed-refs").stat().st_ino == after.st_ino


def stopped_below(pid):
    """Whether a process of this session is stopped."""
    done = subprocess.run(
        ["ps", "-o", "stat=", "--sid", str(pid)], stdout=subprocess.PIPE, check=False
    )
    return any(line.startswith("T") for line in done.stdout.decode().split())


def test_where_it_cannot_be_written_that_is_said_and_the_old_one_stays(mirror, upstream):
    """The exit status is 3, after which nothing beneath is started; the hook runs all the same."""
    repo = upstream.create("r")
    mirror.update()
    before = mirror.refs()
    ran = mirror.activate.home / "ran"
    mirror.activate.hook("post-update", "touch '%s'\n" % ran)
    repo.commit({"a": "2"})
    write = '    with open(path + ".new", "wb") as file:\n'
    mirror.break_script(write, '    raise OSError(28, "No space left on device", path)\n' + write)
    result = mirror.activate("r")
    assert (result.status, mirror.activate.head()) == (3, repo.head())
    assert result.last == (
        "slave-activate: live, but the mirror for GIT_FROM could not be brought up to date: "
        "can not write '%s/packed-refs': No space left on device; make room for '%s'"
        % (mirror.path, mirror.activate.repos)
    )
    assert (mirror.refs(), ran.exists()) == (before, True)
    mirror.mend_script()
    mirror.update()
    assert mirror.refs() == repo.git("for-each-ref", FORMAT)


def test_where_links_are_impossible_it_copies(mirror, upstream):
    repo = upstream.create("r")
    mirror.break_script(
        "        os.link(source, beside)\n",
        '        raise OSError(1, "Operation not permitted")\n',
    )
    mirror.update()
    inodes = {path.name: path.stat().st_ino for path in mirror.packs.iterdir()}
    repo.commit({"a": "2"})
    mirror.update()
    for path in mirror.activate.live().glob(".git/objects/pack/*"):
        assert not path.samefile(mirror.packs / path.name)
    now = {path.name: path.stat().st_ino for path in mirror.packs.iterdir()}
    assert inodes.items() <= now.items(), "what is there is not copied again"
    spoil_only_the_mirror(mirror)
    mirror.update()


def test_on_a_full_disk_the_old_mirror_stays(mirror, upstream, small_disk):
    """A filesystem of its own for the mirror alone: no links lead there, and there is no room."""
    repo = upstream.create("r")
    mirror.update()
    disk = small_disk(1 << 20)
    before = mirror.refs()
    repo.commit({"big": os.urandom(3 << 20)})
    mount = "cp -a '{0}/.' '{1}'; mount --bind '{1}' '{0}'".format(mirror.path, disk)
    result = mirror.activate("r", prefix=in_mounts(mount))
    assert (result.status, mirror.activate.head()) == (3, repo.head())
    assert "No space left" in result.last
    assert run_git("--git-dir", disk, "for-each-ref", FORMAT) == before
    assert run_git("--git-dir", disk, "fsck", "--full", "--no-dangling") == ""


def test_timeout_ends_it(mirror, upstream, tmp_path):
    repo = upstream.create("r")
    late = tmp_path / "late"
    mirror.break_script(
        "def update(source, mirror, refs, head):\n",
        'def update(source, mirror, refs, head):\n    open("%s", "w"); time.sleep(600)\n' % late,
    )
    mirror.activate.make_late_by(late)
    result = mirror.activate("r")
    assert (result.status, mirror.activate.head()) == (3, repo.head())
    assert result.last.endswith("brought up to date: TIMEOUT (60 s) is over")


def test_a_term_ends_it(mirror, upstream, tmp_path):
    repo = upstream.create("r")
    ready = tmp_path / "ready"
    mirror.break_script(
        "def update(source, mirror, refs, head):\n",
        'def update(source, mirror, refs, head):\n    open("%s", "w"); time.sleep(600)\n' % ready,
    )
    process = mirror.activate.start("r")
    wait_until(ready.exists)
    process.terminate()
    result = finish(process, 60)
    assert (result.status, mirror.activate.head()) == (3, repo.head())
    assert result.last.endswith("brought up to date: interrupted")


def test_a_hook_that_fails_too_has_the_last_word(mirror, upstream):
    upstream.create("r")
    mirror.activate.hook("post-update", "echo broken; exit 5\n")
    mirror.activate.state.mkdir(parents=True)
    (mirror.activate.state / "r.git").mkdir()
    mirror.break_script('os.path.join(mirror, "objects")', '"/dev/null/objects"')
    result = mirror.activate("r")
    assert result.status == 3
    assert "slave-activate: can't bring the mirror up to date: " in result.err
    assert result.last == "slave-activate: live, but post-update hook failed (5): broken"
