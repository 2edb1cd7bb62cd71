"""Submodules and large files: what a plain `git clone` leaves to a second command."""

import os
import shutil
import subprocess

import pytest
from activate_support import Activate, git
from product import daily

FILE_TRANSPORT = {  # git 2.38.1 and newer: submodules by path only where the user says so
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "protocol.file.allow",
    "GIT_CONFIG_VALUE_0": "always",
}


def gitmodules(**urls):
    return "".join(
        '[submodule "%s"]\n\tpath = %s\n\turl = %s\n' % (name, name.replace("_", "/"), url)
        for name, url in urls.items()
    )


@pytest.fixture
def nested(upstream):
    """r has sub_one (at sub/one), which has deep; each with some history."""
    deep = upstream.create("deep", {"deepest": "1"})
    one = upstream.create("one", {"f": "x" * 5000})
    one.commit({".gitmodules": gitmodules(deep="../deep.git"), "deep": ("160000", deep.head())})
    repo = upstream.create("r", {"f": "1"})
    repo.commit(
        {".gitmodules": gitmodules(sub_one="../one.git"), "sub/one": ("160000", one.head())}
    )
    return repo, one, deep


def borrowed(live):
    return [str(path) for path in (live / ".git").rglob("alternates")]


@pytest.mark.parametrize("base", daily(1, ["http", "path"]))
def test_nested_submodules_come_along_and_are_reused(
    tmp_path, upstream, http_upstream, nested, base
):
    repo, one, deep = nested
    activate = Activate(tmp_path, http_upstream.url if base == "http" else upstream.base_path)
    env = FILE_TRANSPORT if base == "path" else {}
    first, _ = activate.good("r", env=env)
    live = activate.live()
    assert (live / "sub/one/deep/deepest").read_text() == "1"
    http_upstream.bytes_sent = 0
    result = activate("r", env=env)
    assert (result.status, result.err) == (0, "")
    assert http_upstream.bytes_sent < 10000
    deep.commit({"deepest": "2"})
    one.commit({"deep": ("160000", deep.head())})
    second = repo.commit({"sub/one": ("160000", one.head())})
    assert activate.good("r", env=env) == (second, first)
    assert (live / "sub/one/deep/deepest").read_text() == "2"
    assert git(live, "submodule", "status", "--recursive").count("\n ") == 1
    assert git(live, "status", "--porcelain") == ""
    assert borrowed(live) == []
    for folder in (live, live / "sub/one", live / "sub/one/deep"):
        assert git(folder, "fsck", "--full", "--no-dangling") == ""
        assert not (folder / ".git/objects/info/alternates").exists()
    one.commit({"deep": None, ".gitmodules": None})
    repo.commit({"sub/one": ("160000", one.head())})
    activate.good("r", env=env)
    assert not (live / "sub/one/deep").exists()
    repo.commit({"sub/one": None, ".gitmodules": None})
    activate.good("r", env=env)
    assert not (live / "sub").exists() and not (live / ".git/modules").exists()


def test_submodules_no_leaves_them_out(tmp_path, http_upstream, nested):
    activate = Activate(tmp_path, http_upstream.url)
    activate.settings["SUBMODULES"] = "no"
    activate.good("r")
    assert os.listdir(str(activate.live() / "sub/one")) == []
    assert not [line for line in http_upstream.requests if "one.git" in line]
    activate.settings["SUBMODULES"] = "yes"
    activate.good("r")
    assert (activate.live() / "sub/one/deep/deepest").exists()


def test_a_submodule_that_is_not_there_leaves_the_old_tree(tmp_path, http_upstream, nested):
    repo, _, _ = nested
    activate = Activate(tmp_path, http_upstream.url)
    first, _ = activate.good("r")
    repo.commit({".gitmodules": gitmodules(sub_one="../nowhere.git")})
    repo.commit({"sub/one": ("160000", "1" * 40)})
    result = activate("r")
    assert (result.status, result.out) == (1, "")
    assert result.last == (
        "slave-activate: repository '%s/nowhere.git/' not found; see BASE_URL" % http_upstream.url
    )
    assert (activate.head(), activate.leftovers()) == (first, [])


def test_a_damaged_submodule_is_cloned_anew(tmp_path, http_upstream, nested):
    activate = Activate(tmp_path, http_upstream.url)
    activate.good("r")
    (pack,) = (activate.live() / ".git/modules/sub_one/objects/pack").glob("*.pack")
    pack.chmod(0o644)
    pack.write_bytes(pack.read_bytes()[:50])
    result = activate("r")
    assert (result.status, result.err.count("can't reuse the old clone")) == (0, 1), result
    assert git(activate.live() / "sub/one", "fsck", "--full") == ""
    assert activate.leftovers() == []


def test_large_files_come_along_and_are_reused(tmp_path, upstream, own_home):
    if not shutil.which("git-lfs"):
        pytest.skip("this needs git-lfs")
    subprocess.check_call(["git", "lfs", "install", "--skip-repo"], stdout=subprocess.DEVNULL)
    repo = upstream.create("r", {"f": "1"})
    work = tmp_path / "work"
    subprocess.check_call(["git", "clone", "-q", str(repo.path), str(work)])
    git(work, "lfs", "track", "*.bin")
    (work / "big.bin").write_bytes(b"\0large" * 1000)
    git(work, "add", ".")
    git(work, "commit", "-q", "-m", "large file")
    git(work, "push", "-q", "origin", "main")
    activate = Activate(tmp_path, "file://" + upstream.base_path)
    first, _ = activate.good("r")
    assert (activate.live() / "big.bin").read_bytes() == b"\0large" * 1000
    shutil.rmtree(str(repo.path / "lfs"))  # upstream can't give it once more
    second = repo.commit({"f": "2"})
    assert activate.good("r") == (second, first)
    assert (activate.live() / "big.bin").read_bytes() == b"\0large" * 1000
    assert git(activate.live(), "status", "--porcelain") == ""


def test_a_submodule_that_is_named_as_a_file_of_gits(upstream, tmp_path):
    """Its folder in .git/modules is none of those that say from where objects are borrowed."""
    one = upstream.create("one", {"f": "1"})
    repo = upstream.create("r", {"f": "1"})
    text = '[submodule "objects/info/alternates"]\n\tpath = sub\n\turl = ../one.git\n'
    commit = repo.commit({".gitmodules": text, "sub": ("160000", one.head())})
    activate = Activate(tmp_path, upstream.base_path)
    for old in ("-", commit):
        assert activate.good("r", env=FILE_TRANSPORT) == (commit, old)
    assert borrowed(activate.live()) == [
        str(activate.live() / ".git/modules/objects/info/alternates")  # that folder
    ]
    assert (activate.live() / "sub/f").read_text() == "1"
