"""slave-activate --commit HASH: exactly that commit, on its branch or detached."""

import pytest
from activate_support import Activate, git, snapshot
from product import daily

BAD = ["", "main", "1234567", "g" * 40, "1" * 39, "1" * 41, "1" * 63, "-x", "HEAD"]


@pytest.fixture
def repo(upstream):
    repo = upstream.create("r", {"f": "1"})
    repo.git("tag", "v1", "main")
    repo.commit({"f": "2", "g": "2"})
    repo.commit({"f": "side"}, branch="side", parent=repo.head("main^"))
    repo.commit({"f": "3"})
    return repo


@pytest.fixture
def activate(tmp_path, http_upstream, repo):
    return Activate(tmp_path, http_upstream.url)


def branch(activate):
    return git(activate.live(), "symbolic-ref", "-q", "--short", "HEAD", check=False)


@pytest.mark.parametrize("commit", BAD)
def test_what_is_no_full_hash_is_refused(activate, commit):
    result = activate("--commit", commit, "r")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1), result
    assert not activate.repos.exists()


def test_usage(activate):
    for args in (
        ("--commit",),
        ("--commit", "1" * 40),
        ("--commit", "1" * 40, "r", "x", "y"),
        ("r", "--commit", "1" * 40),
    ):
        result = activate(*args)
        assert (result.status, result.err.count("\n")) == (2, 1), result


@pytest.mark.parametrize(
    "ref, name", daily(2, [((), "main"), (("side",), "side"), (("main",), "main")])
)
@pytest.mark.parametrize("which", daily(2, ["main^", "side", "main", "v1"]))
def test_a_branch_is_reset_to_it(activate, repo, ref, name, which):
    commit = repo.head(which)
    for old in ("-", commit):
        assert activate.good("--commit", commit, "r", *ref) == (commit, old)
        assert branch(activate) == name
        upstream = git(activate.live(), "rev-parse", "--abbrev-ref", name + "@{upstream}")
        assert upstream == "origin/" + name
        assert git(activate.live(), "status", "--porcelain") == ""
        assert git(activate.live(), "rev-parse", "refs/remotes/origin/" + name) == repo.head(name)
    assert git(activate.live(), "fsck", "--full") == ""


@pytest.mark.parametrize("ref", ["v1", "refs/tags/v1", "HASH"])
def test_with_a_tag_or_a_hash_it_is_detached(activate, repo, ref):
    commit = repo.head("side")
    ref = repo.head("main") if ref == "HASH" else ref
    assert activate.good("--commit", commit, "r", ref)[0] == commit
    assert branch(activate) == ""
    assert git(activate.live(), "status", "--porcelain") == ""


def test_upper_case_is_as_good(activate, repo):
    commit = repo.head("main^")
    assert activate.good("--commit", commit.upper(), "r")[0] == commit


def test_the_hash_of_a_tag_is_not_that_of_a_commit(activate, repo):
    """Who compares what is live with what was asked for would find them differ."""
    repo.git("tag", "-a", "-m", "x", "v2", "main^")
    tag = repo.git("rev-parse", "v2")
    result = activate("--commit", tag, "r")
    assert (result.status, result.last) == (
        1,
        "slave-activate: %s is a tag, not a commit" % tag[:7],
    )
    assert activate.good("r", tag)[0] == repo.head("main^"), "as REF it names its commit"


def test_no_such_branch_beside_a_commit(activate, repo):
    result = activate("--commit", repo.head(), "r", "nowhere")
    assert (result.status, "not found in upstream" in result.last) == (1, True), result


def test_submodules_are_those_of_the_commit(activate, repo, upstream, http_upstream):
    one = upstream.create("one", {"s": "1"})
    text = '[submodule "one"]\n\tpath = one\n\turl = ../one.git\n'
    first = repo.commit({".gitmodules": text, "one": ("160000", one.head())})
    one_head = one.commit({"s": "2"})
    repo.commit({"one": ("160000", one_head)})
    activate.good("r")
    assert (activate.live() / "one/s").read_text() == "2"
    assert activate.good("--commit", first, "r")[0] == first
    assert (activate.live() / "one/s").read_text() == "1"


def test_what_is_live_is_told_by_git_where_files_do_not_tell(activate, repo):
    """Packed refs, as git gc leaves them."""
    first = activate.good("r")[0]
    git(activate.live(), "gc", "-q")
    assert not (activate.live() / ".git/refs/heads/main").exists()
    second = repo.commit({"f": "4"})
    result = activate("r")
    assert (result.status, result.out) == (0, "r %s %s\n" % (second, first))
    git(activate.live(), "pack-refs", "--all")
    git(activate.live(), "update-ref", "-d", "refs/heads/nothing")
    assert activate("--commit", first, "r").out == "r %s %s\n" % (first, second)


MOVES = {
    "a commit of its own": "git commit -q --allow-empty -m local\n",
    "another one": "git checkout -q --detach HEAD^\n",
}


@pytest.mark.parametrize("move", MOVES)
def test_a_pre_update_that_moves_head_is_an_error_with_a_commit(activate, repo, move):
    """Without one, what the hook has chosen goes live."""
    first, _ = activate.good("r", "side")
    before = snapshot(activate.live())
    activate.hook("pre-update", MOVES[move] + "git rev-parse HEAD >$0.head\n")
    result = activate("--commit", repo.head(), "r")
    moved = (activate.hooks / "pre-update.head").read_text().strip()
    assert (result.status, result.out) == (1, ""), result
    assert result.err == (
        "slave-activate: the pre-update hook has moved HEAD to %s, not the commit of --commit\n"
        % moved
    )
    assert (snapshot(activate.live()), activate.leftovers()) == (before, [])
    new, old = activate.good("r")
    assert (new, old) == ((activate.hooks / "pre-update.head").read_text().strip(), first)
