"""A filesystem that is mounted in the tree: it is named, and nothing in it is touched."""

import os
import shutil

import pytest
from activate_support import Activate, git, in_mounts
from product import SHELLS

KINDS = {
    "a bind of the same filesystem": "mount --bind '{volume}' '{at}'",
    "another filesystem": "mount -t tmpfs tmpfs '{at}'\ntouch '{at}/precious'",
}


@pytest.fixture
def volume(tmp_path):
    folder = tmp_path / "volume"
    folder.mkdir()
    (folder / "precious").write_text("theirs")
    return folder


@pytest.fixture
def activate(tmp_path, http_upstream, upstream):
    upstream.create("r", {"f": "1", "uploads/.keep": ""})
    return Activate(tmp_path, http_upstream.url)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["uploads", "uploads/deep er/and\\deeper", ".git/x", "."])
def test_a_volume_in_the_live_tree_is_named_and_kept(
    activate, upstream, http_upstream, volume, kind, place
):
    first, _ = activate.good("r")
    at = activate.live() / place
    at.mkdir(parents=True, exist_ok=True)
    http_upstream.requests.clear()
    command = KINDS[kind].format(volume=volume, at=at)
    check = "%s\n\"$@\" || status=$?\ntest -e '%s/precious'\nexit $status" % (command, at)
    result = activate("r", prefix=in_mounts(check))
    assert (result.status, result.out) == (1, ""), result
    assert "a filesystem is mounted at '%s'" % at in result.last
    assert http_upstream.requests == [], "it was fetched before that"
    assert (volume / "precious").read_text() == "theirs"
    assert (activate.head(), activate.leftovers()) == (first, [])


def test_a_single_file_that_is_mounted(activate, volume):
    activate.good("r")
    mount = "mount --bind '%s/precious' '%s/f'" % (volume, activate.live())
    result = activate("r", prefix=in_mounts(mount))
    assert (result.status, result.last.count(str(activate.live() / "f"))) == (1, 1), result
    assert (volume / "precious").read_text() == "theirs"


@pytest.mark.parametrize("name", ["my repos", "back\\slash", "both \\040", "x'y"])
def test_a_path_that_the_kernel_writes_in_another_way(
    tmp_path, http_upstream, upstream, volume, name
):
    upstream.create("r", {"f": "1", "uploads/.keep": ""})
    activate = Activate(tmp_path, http_upstream.url, repos=tmp_path / "home" / name)
    activate.good("r")
    quoted = str(activate.live() / "uploads").replace("'", "'\\''")
    result = activate("r", prefix=in_mounts("mount --bind '%s' '%s'" % (volume, quoted)))
    assert (result.status, (volume / "precious").exists()) == (1, True), result
    assert str(activate.live() / "uploads") in result.last
    assert activate.good("r")


@pytest.mark.parametrize("shell", ["dash", "busybox ash", "bash"])
def test_a_folder_that_is_written_with_two_slashes(tmp_path, upstream, volume, shell):
    """bash keeps the second one, and no mount's path begins with it."""
    upstream.create("r", {"f": "1", "uploads/.keep": ""})
    activate = Activate(tmp_path, upstream.base_path)
    activate.good("r")
    activate.settings["REPOS_DIR"] = "/%s//" % activate.repos
    mount = "mount --bind '%s' '%s/uploads'" % (volume, activate.live())
    result = activate("r", prefix=in_mounts(mount) + shell.split())
    assert "a filesystem is mounted at '%s/uploads'" % activate.live() in result.last
    assert (result.status, (volume / "precious").exists()) == (1, True), result
    result = activate("r", prefix=shell.split())
    assert (result.status, "can't reuse" in result.err) == (0, False), result


# A root folder of our own, in which all that the host's has is mounted.
OWN_ROOT = """mkdir '{root}'
for path in /*; do
    if [ -L "$path" ]; then
        cp -a "$path" '{root}/'
    elif [ -d "$path" ]; then
        mkdir '{root}'"$path"
        mount --rbind "$path" '{root}'"$path"
    fi
done
set -- chroot '{root}' sh -c '"$@" && mount --bind "{volume}" /r/uploads && "$@"' sh "$@"
"""


@pytest.mark.parametrize("shell", SHELLS)
def test_clones_in_the_root_folder(tmp_path, upstream, volume, shell):
    """REPOS_DIR=/, as in a container."""
    upstream.create("r", {"f": "1", "uploads/.keep": ""})
    activate = Activate(tmp_path, upstream.base_path)
    activate.settings["REPOS_DIR"] = "/"
    own_root = OWN_ROOT.format(root=tmp_path / "root", volume=volume)
    result = activate("r", prefix=in_mounts(own_root) + shell.split())
    assert "a filesystem is mounted at '/r/uploads'" in result.last, result
    assert (result.status, (volume / "precious").exists()) == (1, True), result


def test_a_link_to_a_path_with_a_control_character(tmp_path, upstream):
    """What is mounted in it could not be told."""
    upstream.create("r", {"f": "1"})
    odd = tmp_path / "a\nb"
    odd.mkdir()
    link = tmp_path / "link"
    link.symlink_to(odd)
    result = Activate(tmp_path, upstream.base_path, repos=link)("r")
    assert (result.status, "control character" in result.last) == (1, True), result
    assert not (odd / "r").exists()


def test_mounts_elsewhere_are_no_obstacle(activate, upstream, volume):
    """A bind of the tree to another place, and what is beside it."""
    activate.good("r")
    beside = activate.repos / "r-data"
    beside.mkdir()
    mounts = "mount --bind '%s' '%s'\nmount --bind '%s' '%s'" % (
        activate.live(),
        volume,
        volume,
        beside,
    )
    assert activate("r", prefix=in_mounts(mounts)).status == 0


@pytest.mark.parametrize("name", ["repos", "my repos", "back\\slash"])
def test_a_volume_that_comes_while_it_clones(tmp_path, http_upstream, upstream, volume, name):
    """Mounted in the live tree by the pre-update hook, after the first look."""
    upstream.create("r", {"f": "1", "uploads/.keep": ""})
    activate = Activate(tmp_path, http_upstream.url, repos=tmp_path / "home" / name)
    first, _ = activate.good("r")
    activate.hook("pre-update", "mount --bind '%s' '%s/uploads'" % (volume, activate.live()))
    result = activate("r", prefix=in_mounts(":"))
    assert (result.status, (volume / "precious").exists()) == (1, True), result
    assert "a filesystem is mounted at '%s/uploads'" % activate.live() in result.last
    assert activate.head() == first


def test_a_volume_in_what_a_killed_run_left_is_set_aside_with_it(activate, upstream, volume):
    activate.good("r")
    left = activate.state / "r.new"
    (left / "uploads").mkdir(parents=True)
    (left / "junk").write_text("x")
    mount = "mount --bind '%s' '%s/uploads'" % (volume, left)
    result = activate("r", prefix=in_mounts(mount))
    assert (result.status, (volume / "precious").read_text()) == (0, "theirs"), result
    assert "a filesystem is mounted there" in result.err and "/trash/" in result.err
    (aside,) = (activate.state / "trash").iterdir()
    assert [path.name for path in aside.iterdir()] == ["uploads"]
    assert (
        activate("r", prefix=in_mounts("mount --bind '%s' '%s/uploads'" % (volume, aside))).status
        == 0
    )
    assert (volume / "precious").read_text() == "theirs"
    activate.good("r")
    assert activate.leftovers() == [], "no longer mounted, it goes"


def test_a_volume_in_the_old_tree_after_the_exchange(activate, upstream, volume, tmp_path):
    """Mounted in the instant between the exchange and the removal, by a python3 that does it."""
    activate.good("r")
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "python3").write_text(
        '#!/bin/sh\n"%s" "$@" || exit\n'
        "case $* in *RENAME_EXCHANGE*) mount --bind '%s' '%s/r.new/uploads' ;; esac\n"
        % (shutil.which("python3"), volume, activate.state)
    )
    (fake / "python3").chmod(0o755)
    path = {"PATH": "%s:%s" % (fake, os.environ["PATH"])}
    upstream_head = git(upstream.folder / "r.git", "rev-parse", "HEAD")
    result = activate("r", prefix=in_mounts(":"), env=path)
    assert (result.status, (volume / "precious").read_text()) == (0, "theirs"), result
    assert activate.head() == upstream_head
