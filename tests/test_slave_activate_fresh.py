"""What slave-activate puts live equals what `git clone` gives, whatever upstream has done."""

import os
import shutil
import subprocess

import pytest
from activate_support import assert_fresh, git, snapshot
from product import daily


@pytest.fixture
def repo(upstream):
    """A repository with two branches and two tags, one of them annotated."""
    repo = upstream.create(
        "r", {"f": "1", ".gitignore": "*.log\n", "d/x": ("100755", "#!/bin/sh\n")}
    )
    repo.git("tag", "light", "main")
    repo.git("tag", "-a", "-m", "annotated", "v1", "main")
    repo.commit({"f": "side"}, branch="side")
    repo.commit({"f": "2", "link": ("120000", "d/x")})
    return repo


def force_push(repo):
    repo.commit({"f": "forced"}, parent=repo.head("main^"))


def rename_default_branch(repo):
    repo.git("branch", "-m", "main", "trunk")
    repo.git("symbolic-ref", "HEAD", "refs/heads/trunk")


def delete_branch(repo):
    repo.git("branch", "-D", "side")


def nest_branch(repo):
    """`side` goes, `side/deeper` comes: the names collide as files."""
    repo.git("branch", "-m", "side", "side/deeper")


def move_tags(repo):
    repo.git("tag", "-f", "light", "side")
    repo.git("tag", "-f", "-a", "-m", "moved", "v1", "side")


def delete_files(repo):
    repo.commit({"f": None, "d/x": None, "d": "a file now"})


def add_nothing(repo):
    """Upstream as it was."""


def pack_refs(repo):
    repo.git("gc", "-q", "--prune=now")


CHANGES = [
    force_push,
    rename_default_branch,
    delete_branch,
    nest_branch,
    move_tags,
    delete_files,
    add_nothing,
    pack_refs,
]


@pytest.mark.parametrize("change", daily(4, CHANGES), ids=lambda change: change.__name__)
def test_after_a_change_upstream_it_equals_a_clone(activate, upstream, repo, tmp_path, change):
    url = upstream.base_path + "/r.git"
    activate.good("r")
    assert_fresh(activate, url, tmp_path / "before", "--no-local")
    for junk in ("untracked", "debug.log", "d/junk/deep"):
        path = activate.live() / junk
        path.parent.mkdir(exist_ok=True)
        path.write_text("junk")
    change(repo)
    assert activate.good("r")[0] == repo.head()
    assert_fresh(activate, url, tmp_path / "after", "--no-local")


def test_over_http_it_equals_a_clone(activate, http_upstream, repo, tmp_path):
    activate.settings["BASE_URL"] = http_upstream.url + "//"
    for number in range(2):
        activate.good("r")
        assert_fresh(activate, http_upstream.url + "/r.git", tmp_path / str(number))
        repo.commit({"g": "new"})


def test_an_empty_upstream_goes_live_empty_and_fills(activate, upstream, tmp_path):
    repo = upstream.create("r", files={})
    url = upstream.base_path + "/r.git"
    assert activate.good("r") == ("-", "-")
    assert_fresh(activate, url, tmp_path / "empty", "--no-local")
    assert activate.good("r") == ("-", "-")
    first = repo.commit({"f": "1"})
    assert activate.good("r") == (first, "-")
    assert_fresh(activate, url, tmp_path / "full", "--no-local")
    repo.git("update-ref", "-d", "refs/heads/main")
    assert activate("r").status == 1, "nothing does not go live where something was"
    assert (activate.head(), activate.leftovers()) == (first, [])


def test_a_head_that_names_no_branch_asks_for_one(activate, upstream, repo):
    first, _ = activate.good("r")
    repo.git("symbolic-ref", "HEAD", "refs/heads/nowhere")
    result = activate("r")
    assert result.status == 1
    assert result.last == (
        "slave-activate: upstream's HEAD names no branch that it has; "
        "name one: slave-activate r REF"
    )
    assert (activate.head(), activate.leftovers()) == (first, [])
    assert activate.good("r", "side")[0] == repo.head("side")


def test_another_base_url_is_followed(activate, upstream, http_upstream, repo, tmp_path):
    activate.good("r")
    activate.settings["BASE_URL"] = http_upstream.url
    http_upstream.bytes_sent = 0
    activate.good("r")
    assert http_upstream.bytes_sent < 5000
    assert_fresh(activate, http_upstream.url + "/r.git", tmp_path / "http")
    stranger = upstream.create("sub/r", {"quite": "different"})
    activate.settings["BASE_URL"] = upstream.base_path + "/sub"
    assert activate.good("r")[0] == stranger.head()
    assert_fresh(activate, upstream.base_path + "/sub/r.git", tmp_path / "sub", "--no-local")


@pytest.mark.parametrize("ref", daily(2, ["side", "v1", "light", "main"]))
def test_a_branch_or_tag_equals_a_clone_of_it(activate, upstream, repo, tmp_path, ref):
    for number in range(2):
        assert activate.good("r", ref)[0] == repo.head(ref)
        assert_fresh(
            activate,
            upstream.base_path + "/r.git",
            tmp_path / str(number),
            "--no-local",
            "--branch",
            ref,
        )
        repo.commit({"f": "more"}, branch="side")


def test_a_commit_goes_live_detached(activate, repo):
    side, old = repo.head("side"), repo.head("main^")
    assert activate.good("r", old) == (old, "-")
    assert activate.good("r", side.upper()) == (side, old)
    assert git(activate.live(), "symbolic-ref", "-q", "HEAD", check=False) == ""
    assert git(activate.live(), "status", "--porcelain") == ""
    assert git(activate.live(), "branch", "--format=%(refname:short)", "--list", "main") == "main"
    assert activate.good("r")[1] == side
    assert git(activate.live(), "symbolic-ref", "HEAD") == "refs/heads/main"


@pytest.mark.parametrize("base", daily(1, ["http", "path"]))
def test_a_commit_of_no_branch_any_more(activate, upstream, http_upstream, repo, base):
    if base == "http":
        activate.settings["BASE_URL"] = http_upstream.url
    lost, _ = activate.good("r")
    force_push(repo)
    forced, _ = activate.good("r")
    repo.git("gc", "-q", "--prune=now")
    assert repo.git("cat-file", "-t", lost, check=False) == "", "upstream has forgotten it"
    assert activate.good("r", lost) == (lost, forced)
    assert git(activate.live(), "fsck", "--full", "--no-dangling") == ""
    assert activate.good("r") == (forced, lost)
    shutil.rmtree(str(activate.live()))
    result = activate("r", lost)
    assert result.status == 1 and "slave-activate: " in result.last
    assert not activate.live().exists() and activate.leftovers() == []


def test_a_commit_that_only_upstream_still_has_does_not_go_live(activate, repo):
    hidden = repo.commit({"f": "hidden"}, branch="hidden")
    repo.git("update-ref", "-d", "refs/heads/hidden")
    repo.git("config", "uploadpack.allowAnySHA1InWant", "true")
    first, _ = activate.good("r")
    for commit in (hidden, "0123456789" * 4):
        result = activate("r", commit)
        assert result.status == 1
        assert "%s is in no branch or tag of " % commit[:7] in result.last
    assert activate.head() == first


def test_refs_that_are_also_files(activate, repo):
    names = ["side", "v1", "light", "HEAD", "origin"]
    head = repo.commit({name: name for name in names + [repo.head()]})
    for ref in ("side", "v1", "light"):
        assert activate.good("r", ref)[0] == repo.head(ref)
    assert activate.good("r", head)[0] == head
    assert activate.good("r", repo.head("main^"))[0] == repo.head("main^")
    assert git(activate.live(), "status", "--porcelain") == ""


def test_file_names_of_all_sorts(activate, repo, upstream, tmp_path):
    names = [
        "-rf",
        "a b",
        "tab\t",
        'quo"te',
        "é",
        "\udcff\udcfe",
        "*",
        "$(touch x)",
        ".server-update",
        "r.new/x",
        "objects/info/alternates",
    ]
    repo.commit({name: name.encode("utf-8", "surrogateescape") for name in names})
    repo.commit({'"new\\nline"': "new\nline"})
    names.append("new\nline")
    for _ in range(2):
        activate.good("r")
        for name in names:
            path = os.path.join(os.fsencode(str(activate.live())), os.fsencode(name))
            with open(path, "rb") as handle:
                assert handle.read() == os.fsencode(name)
    assert_fresh(activate, upstream.base_path + "/r.git", tmp_path / "clone", "--no-local")


def test_nothing_is_shared_with_upstream_or_written_to_the_old_tree(activate, upstream, repo):
    activate.good("r")
    inside = {os.stat(str(path)).st_ino for path in repo.path.rglob("*") if path.is_file()}
    packs = list((activate.live() / ".git").rglob("*.pack"))
    assert packs and not [path for path in packs if path.stat().st_ino in inside]
    old = snapshot(activate.live())
    activate.hook("pre-update", "exit 1\n")
    repo.commit({"f": "3"})
    assert activate("r").status == 1
    assert snapshot(activate.live()) == old


def test_a_reader_of_the_state_folder_sees_its_own_names_only(activate, repo):
    seen = activate.bin / "seen"
    activate.hook("pre-update", "ls -A %s >>%s\n" % (activate.state, seen))
    activate.good("r")
    activate.good("r")
    assert seen.read_text().split() == ["r.lock", "r.log", "r.new"] * 2


def test_a_sha256_repository(activate, upstream):
    path = upstream.folder / "r.git"
    work = upstream.folder / "work"
    if subprocess.call(["git", "init", "-q", "--object-format=sha256", str(work)]):
        pytest.skip("this git has no SHA-256 repositories")
    git(work, "commit", "-q", "--allow-empty", "-m", "first")
    subprocess.check_call(["git", "clone", "-q", "--bare", str(work), str(path)])
    head = git(work, "rev-parse", "HEAD")
    assert len(head) == 64
    assert activate.good("r") == (head, "-")
    assert activate.good("r", head) == (head, head)
