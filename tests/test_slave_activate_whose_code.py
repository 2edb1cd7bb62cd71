"""Whose code goes live: of a hash, only what upstream has in a branch or tag, or the old clone."""

import functools
import hashlib
import http.server
import random
import threading

import pytest
from activate_support import Activate, git, snapshot
from product import SHELLS



@pytest.fixture
def repo(upstream):
    repo = upstream.create(
        "r", {"f": "1", "noise": random.Random(1).getrandbits(800000).to_bytes(100000, "big")}
    )
    repo.commit({"f": "2"})
    repo.commit({"f": "side"}, branch="side")
    repo.git("config", "uploadpack.allowAnySHA1InWant", "true")
    repo.git("config", "uploadpack.allowTipSHA1InWant", "true")
    return repo


@pytest.fixture
def activate(tmp_path, http_upstream, repo):
    return Activate(tmp_path, http_upstream.url)


@pytest.fixture
def stranger(repo):
    """A commit that only a pull request has, as a forge keeps it."""
    commit = repo.commit({"f": "a stranger's"}, branch="stranger")
    repo.git("update-ref", "refs/pull/1/head", commit)
    repo.git("update-ref", "-d", "refs/heads/stranger")
    return commit


def refused(activate, commit, url, *args):
    """The one message for a commit that is in no branch or tag."""
    result = activate(*args)
    assert (result.status, result.out) == (1, ""), result
    assert result.last == "slave-activate: %s is in no branch or tag of %s" % (commit[:7], url)
    assert activate.leftovers() == []


@pytest.mark.parametrize("old", ["there", "not there"])
def test_a_pull_requests_commit_does_not_go_live(activate, repo, http_upstream, stranger, old):
    if old == "there":
        activate.good("r")
    before = snapshot(activate.live())
    url = http_upstream.url + "/r.git"
    for args in (
        ("r", stranger),
        ("--commit", stranger, "r"),
        ("--commit", stranger, "r", "side"),
        ("r", stranger[:12]),
    ):
        refused(activate, stranger, url, *args)
    assert activate("r", "refs/pull/1/head").status == 1
    assert activate("r", "pull/1/head").status == 1
    assert snapshot(activate.live()) == before


def test_a_typo_costs_no_whole_clone(activate, http_upstream):
    activate.good("r")
    whole = http_upstream.bytes_sent
    http_upstream.bytes_sent = 0
    refused(activate, "0123456", http_upstream.url + "/r.git", "r", "0123456789" * 4)
    assert http_upstream.bytes_sent < whole / 10


def test_no_credentials_are_in_that_message(activate, http_upstream):
    activate.settings["BASE_URL"] = http_upstream.url.replace("//", "//user:secret@")
    refused(activate, "0123456", http_upstream.url + "/r.git", "r", "0123456789" * 4)


def test_what_the_old_clone_has_goes_live_again(activate, repo):
    lost = activate.good("r")[0]
    repo.commit({"f": "forced"}, parent=repo.head("main^"))
    forced = activate.good("r")[0]
    repo.git("gc", "-q", "--prune=now")
    assert activate.good("r", lost) == (lost, forced)
    repo.git("update-ref", "refs/heads/main", repo.head("side"))
    assert activate.good("r", lost[:7]) == (lost, lost)


def test_a_commit_in_a_tag_alone(activate, repo):
    commit = repo.commit({"f": "tagged"}, branch="old")
    repo.git("tag", "-a", "-m", "x", "v1", commit)
    repo.git("update-ref", "-d", "refs/heads/old")
    assert activate.good("r", commit)[0] == commit


@pytest.mark.parametrize("shell", SHELLS)
def test_the_first_digits_of_a_hash(activate, repo, shell):
    old = repo.head("main^")
    prefix = shell.split()
    for digits in (7, 12, 39):
        assert activate.good("r", old[:digits].upper(), prefix=prefix)[0] == old
    assert git(activate.live(), "symbolic-ref", "-q", "HEAD", check=False) == ""
    assert git(activate.live(), "status", "--porcelain") == ""
    assert activate("r", old[:6], prefix=prefix).status == 1


def test_a_branch_or_tag_that_looks_like_a_hash_goes_before_it(activate, repo, upstream, tmp_path):
    old = repo.head("main^")
    repo.git("branch", old[:8], "side")
    repo.git("tag", "20240101", "side")
    for ref in (old[:8], "20240101"):
        assert activate.good("r", ref)[0] == repo.head("side")
    assert git(activate.live(), "describe", "--tags") == "20240101"


def commits_that_begin_alike(repo):
    """The texts of two commits whose hashes have the first seven digits in common."""
    text = "tree %s\nparent %s\nauthor A <a@b> %d +0000\ncommitter A <a@b> %d +0000\n\nx\n"
    tree, parent = repo.git("rev-parse", "main^{tree}"), repo.head()
    seen = {}
    for number in range(200000):
        body = (text % (tree, parent, number, number)).encode()
        name = hashlib.sha1(b"commit %d\0" % len(body) + body).hexdigest()
        if name[:7] in seen:
            return seen[name[:7]], body
        seen[name[:7]] = body
    raise AssertionError("no two of them")


def test_digits_that_begin_two_commits(activate, repo):
    for number, body in enumerate(commits_that_begin_alike(repo)):
        name = repo.git("hash-object", "-t", "commit", "-w", "--stdin", text=body)
        repo.git("update-ref", "refs/heads/twin%d" % number, name)
    result = activate("r", name[:7])
    assert (result.status, result.last) == (
        1,
        "slave-activate: '%s' begins more than one commit; give more digits" % name[:7],
    )
    assert activate.good("r", name[:12])[0] == name


def test_a_tag_that_a_branch_hides_and_a_branch_that_a_tag_does(activate, repo, upstream):
    repo.git("tag", "both", "main^")
    repo.git("branch", "both", "side")
    repo.git("tag", "only-tag", "main")
    assert activate.good("r", "both")[0] == repo.head("refs/heads/both")
    assert activate.good("r", "refs/tags/both")[0] == repo.head("refs/tags/both")
    assert git(activate.live(), "branch", "--list", "both") == "", "as a clone of a tag has none"
    assert git(activate.live(), "symbolic-ref", "-q", "HEAD", check=False) == ""
    assert activate.good("r", "refs/heads/both")[0] == repo.head("refs/heads/both")
    assert git(activate.live(), "rev-parse", "--abbrev-ref", "both@{upstream}") == "origin/both"
    assert git(activate.live(), "status", "--porcelain") == ""
    assert activate.good("r", "refs/tags/only-tag")[0] == repo.head("main")
    for ref in ("refs/heads/only-tag", "refs/tags/side", "refs/heads/nowhere"):
        result = activate("r", ref)
        assert (result.status, " not found in upstream origin" in result.last) == (1, True), result


class DumbServer(http.server.ThreadingHTTPServer):
    """Files of a folder, as any web server has them: git fetches whole packs from it."""

    def __init__(self, folder):
        handler = functools.partial(QuietHandler, directory=str(folder))
        super().__init__(("127.0.0.1", 0), handler)
        self.url = "http://127.0.0.1:%d" % self.server_port
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Say nothing."""


def test_what_came_along_in_a_pack_does_not_go_live(activate, repo, upstream, stranger):
    repo.git("repack", "-a", "-d", "-q")
    repo.git("update-server-info")
    server = DumbServer(upstream.folder)
    activate.settings["BASE_URL"] = server.url
    try:
        for args in (("r", stranger), ("--commit", stranger, "r"), ("r", stranger[:9])):
            refused(activate, stranger, server.url + "/r.git", *args)
        assert activate.good("r", repo.head("main^"))[0] == repo.head("main^")
    finally:
        server.shutdown()
        server.server_close()


def test_a_tree_is_no_commit_and_costs_no_whole_clone(activate, repo, http_upstream):
    activate.good("r")
    url = http_upstream.url + "/r.git"
    http_upstream.bytes_sent = 0
    for name in ("main^{tree}", "main:f"):
        commit = repo.git("rev-parse", name)
        refused(activate, commit, url, "r", commit)
        refused(activate, commit, url, "--commit", commit, "r")
    assert http_upstream.bytes_sent < 20000


@pytest.mark.parametrize("digits", [7, 40])
def test_a_commit_of_an_empty_upstream(activate, upstream, http_upstream, digits):
    upstream.create("empty", {})
    url = http_upstream.url + "/empty.git"
    refused(activate, "1" * 7, url, "empty", "1" * digits)
    refused(activate, "1" * 7, url, "--commit", "1" * 40, "empty")
