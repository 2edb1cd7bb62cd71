"""However the old clone was left: slave-activate ends in a clean fresh clone, and says why."""

import os
import shutil
import subprocess
import tempfile

import pytest
from activate_support import Activate, assert_fresh, git
from product import daily

SLOW = "slave-activate: can't reuse the old clone, cloning without it: "


@pytest.fixture
def live(activate, upstream):
    """A live clone with two packs; its folder."""
    repo = upstream.create("r", {"f": "1", "big": "".join(map(str, range(5000)))})
    for number in range(2):
        activate.good("r")
        repo.commit({"f": "next %d" % number})
    return activate.live()


def first_pack(live):
    return max((live / ".git/objects/pack").glob("*.pack"), key=lambda path: path.stat().st_size)


def writable(path):
    path.chmod(0o644)
    return path


def corrupt_pack(live):
    with writable(first_pack(live)).open("r+b") as pack:
        pack.seek(-60, 2)
        pack.write(b"\xff" * 8)


def corrupt_pack_unseen(live):
    """As corrupt_pack; the file's time stays, as when a disk rots."""
    pack = first_pack(live)
    times = (pack.stat().st_atime_ns, pack.stat().st_mtime_ns)
    data = pack.read_bytes()
    writable(pack).write_bytes(data[:200] + b"\xff" * (len(data) - 220) + data[-20:])
    os.utime(str(pack), ns=times)


def truncate_pack(live):
    with writable(first_pack(live)).open("r+b") as pack:
        pack.truncate(100)


def empty_pack(live):
    writable(first_pack(live)).write_bytes(b"")


def remove_index(live):
    first_pack(live).with_suffix(".idx").unlink()


def remove_pack_and_index(live):
    for path in (live / ".git/objects/pack").glob("pack-*"):
        if path.stem == first_pack(live).stem:
            path.unlink() if path.suffix != ".pack" else None
    first_pack(live).unlink()


def remove_git_folder(live):
    shutil.rmtree(str(live / ".git"))


def empty_git_folder(live):
    remove_git_folder(live)
    (live / ".git").mkdir()


def make_shallow(live):
    url = git(live, "remote", "get-url", "origin")
    shutil.rmtree(str(live))
    subprocess.check_call(["git", "clone", "-q", "--depth=1", "file://" + url, str(live)])


def make_partial(live):
    url = git(live, "remote", "get-url", "origin")
    git(url, "config", "uploadpack.allowFilter", "true")
    shutil.rmtree(str(live))
    subprocess.check_call(["git", "clone", "-q", "--filter=blob:none", "file://" + url, str(live)])


def make_borrow(live):
    url = git(live, "remote", "get-url", "origin")
    shutil.rmtree(str(live))
    subprocess.check_call(["git", "clone", "-q", "--shared", url, str(live)])


def make_by_hand(live):
    url = git(live, "remote", "get-url", "origin")
    shutil.rmtree(str(live))
    subprocess.check_call(["git", "clone", "-q", "--no-local", url, str(live)])


def break_head(live):
    (live / ".git/HEAD").write_text("garbage\n")


def break_ref(live):
    (live / ".git/packed-refs").write_bytes(b"\0" * 100)


def become_worktree(live):
    """.git is a file that points elsewhere."""
    (live / ".git").rename(live.parent / "elsewhere")
    (live / ".git").write_text("gitdir: %s\n" % (live.parent / "elsewhere"))


def become_file(live):
    shutil.rmtree(str(live))
    live.write_text("a file")


def become_symlink(live):
    live.rename(live.parent / "target")
    live.symlink_to("target")


def become_dangling_symlink(live):
    shutil.rmtree(str(live))
    live.symlink_to(str(live.parent / "none"))


def become_foreign(live):
    for folder, folders, files in os.walk(str(live)):
        for name in folders + files + ["."]:
            os.chown(os.path.join(folder, name), 12345, 12345, follow_symlinks=False)


def commit_and_edit(live):
    (live / "f").write_text("edited")
    git(live, "commit", "-q", "-a", "-m", "local")
    (live / "f").write_text("edited again")
    (live / "g").write_text("untracked")
    git(live, "add", "g")


def gc_by_hand(live):
    git(live, "gc", "-q")


def become_pipe(path):
    """A pipe to which nobody writes, so that who opens it waits for ever."""
    path.unlink()
    os.mkfifo(str(path))


def pipe_as_head(live):
    become_pipe(live / ".git/HEAD")


def pipe_as_ref(live):
    become_pipe(live / ".git/refs/heads/main")


def pipe_as_index_of_a_pack(live):
    become_pipe(first_pack(live).with_suffix(".idx"))


def pipe_as_object(live):
    (live / ".git/objects/ab").mkdir()
    os.mkfifo(str(live / ".git/objects/ab" / ("c" * 38)))


# How the old clone is damaged, and a part of the reason that is logged for cloning once more.
# NONE: there is nothing to say. TAKEN: git itself goes on without the old clone, and says so.
NONE, TAKEN = "none", "taken"
CHANGED, ODD = "changed after it went live: ", "not a file: "
DAMAGES = {
    corrupt_pack: "",
    truncate_pack: "",
    empty_pack: "",
    remove_index: "",
    remove_pack_and_index: "",
    remove_git_folder: TAKEN,
    empty_git_folder: TAKEN,
    make_shallow: TAKEN,
    make_partial: "it was made by other means",
    make_borrow: "it was made by other means",
    make_by_hand: "it was made by other means",
    break_head: TAKEN,
    break_ref: TAKEN,
    become_worktree: "it borrows from ",
    become_file: "",
    become_symlink: "it borrows from ",
    become_dangling_symlink: NONE,
    become_foreign: CHANGED,
    commit_and_edit: CHANGED,
    gc_by_hand: CHANGED,
    pipe_as_head: ODD,
    pipe_as_ref: ODD,
    pipe_as_index_of_a_pack: ODD,
    pipe_as_object: ODD,
}


@pytest.mark.parametrize("damage", daily(10, DAMAGES), ids=lambda damage: damage.__name__)
def test_a_damaged_old_clone_ends_in_a_fresh_one(activate, upstream, live, tmp_path, damage):
    if damage is become_foreign and os.getuid():
        pytest.skip("another user's tree needs root")
    damage(live)
    result = activate("r")
    assert result.status == 0, result
    reason = DAMAGES[damage]
    said = [line for line in result.err.split("\n") if line.startswith(SLOW)]
    if reason == NONE:
        assert result.err == ""
    elif reason == TAKEN:
        assert str(live) in result.err and not said, result
    else:
        assert len(said) == 1 and reason in said[0], result
    assert activate.leftovers() == []
    assert os.path.isdir(str(live)) and not live.is_symlink()
    assert_fresh(activate, upstream.base_path + "/r.git", tmp_path / "clone", "--no-local")
    assert {os.lstat(str(path)).st_uid for path in live.rglob("*")} == {os.getuid()}
    assert activate("r").err == "", "the next one is fast again"


@pytest.mark.parametrize("name", daily(1, ["SSL_certs", "gnutls_x", "kex_exchange_id"]))
def test_a_name_is_no_reason_to_blame_upstream(activate, upstream, name):
    """As what libraries print about a connection: the old clone is at fault all the same."""
    repo = upstream.create(name)
    activate.good(name)
    repo.commit({"f": "next"})
    gc_by_hand(activate.live(name))
    result = activate(name)
    assert (result.status, result.err.count(SLOW)) == (0, 1), result
    assert activate.head(name) == repo.head()


def test_rot_that_has_no_trace_is_found_where_it_is_read(activate, upstream, live, tmp_path):
    for pack in (live / ".git/objects/pack").glob("*.pack"):
        corrupt_pack_unseen(live) if pack == first_pack(live) else None
    result = activate("r")
    assert (result.status, result.err.count(SLOW)) == (0, 1), result
    assert len(result.err) < 20000
    assert_fresh(activate, upstream.base_path + "/r.git", tmp_path / "clone", "--no-local")


@pytest.mark.parametrize(
    "name",
    daily(
        2,
        [
            "index.lock",
            "refs/heads/main.lock",
            "HEAD.lock",
            "shallow.lock",
            "config.lock",
            "packed-refs.lock",
        ],
    ),
)
def test_locks_lying_about_are_no_obstacle(activate, live, name):
    (live / ".git" / name).write_text("")
    result = activate("r")
    assert (result.status, result.err) == (0, "")
    assert not (live / ".git" / name).exists()


def test_without_root_unwritable_folders_are_no_obstacle(upstream, tmp_path):
    """Folders of mode 0500 and 0000 inside, and a live folder that may not be written."""
    upstream.create("r", {"d/e/f": "1"})
    activate = Activate(tmp_path, upstream.base_path)
    prefix, paths = [], [tmp_path, activate.home, activate.bin]
    if not os.getuid():
        if not shutil.which("setpriv"):
            pytest.skip("as root this needs setpriv (util-linux)")
        prefix = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
        for path in paths + list(tmp_path.parents)[:3]:
            if str(path).startswith(tempfile.gettempdir() + "/") and path.stat().st_uid == 0:
                path.chmod(0o755)
        os.chown(str(activate.home), 12345, 12345)
        activate.settings["BASE_URL"] = upstream.base_path
        (activate.home / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")
    assert activate("r", prefix=prefix).status == 0
    live = activate.live()
    (live / "d/e").chmod(0o000)
    (live / "d").chmod(0o500)
    live.chmod(0o500)
    result = activate("r", prefix=prefix)
    assert (result.status, result.err) == (0, ""), result
    assert (live / "d/e/f").read_text() == "1"
    assert activate.leftovers() == []


def test_a_state_folder_that_is_a_link_leads_to_no_other_live_folder(activate, upstream, tmp_path):
    upstream.create("r", {"a": "1"})
    (tmp_path / "vault" / "r").mkdir(parents=True)
    (tmp_path / "vault" / "state").mkdir()
    (tmp_path / "vault" / "r" / "precious").touch()
    activate.repos.mkdir(parents=True)
    activate.state.symlink_to(tmp_path / "vault" / "state")
    for _ in range(2):
        activate.good("r")
    assert (activate.live() / "a").read_text() == "1"
    assert (tmp_path / "vault" / "r" / "precious").exists()


@pytest.mark.parametrize("name", daily(1, ["r.new", "r.log", "r.words", "r.old"]))
def test_a_dangling_link_in_the_state_folder_is_swept(activate, live, tmp_path, name):
    (activate.state / name).symlink_to(tmp_path / "outside")
    activate.good("r")
    assert activate.leftovers() == []
    assert not (tmp_path / "outside").exists()


def test_what_a_killed_run_left_is_swept(activate, upstream, live):
    """NAME.new in any form; NAME.old goes back where the live tree is missing."""
    new, aside = activate.state / "r.new", activate.state / "r.old"
    new.mkdir()
    (new / "x").mkdir(mode=0o000)
    aside.mkdir()
    activate.good("r")
    new.write_text("")
    aside.symlink_to(str(activate.home / "none"))
    activate.good("r")
    old = activate.head()
    live.rename(aside)
    new.symlink_to("/")
    assert activate.good("r")[1] == old
    assert os.path.isdir("/usr")


def test_the_old_commit_is_told_although_a_pipe_is_in_the_way(activate, upstream, live):
    """The files of HEAD are read; git itself is not asked, as it would wait."""
    old = activate.head()
    os.mkfifo(str(live / ".git/objects/pack/pack-1234.pack"))
    result = activate("r")
    assert (result.status, result.out.split()[2]) == (0, old), result
