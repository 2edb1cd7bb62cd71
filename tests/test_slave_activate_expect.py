"""A push that is announced before it can be fetched: upstream is asked for it again, then not."""

import pytest
from activate_support import Activate
from product import shorten_pauses

NOT_YET = "%s is not there yet: no branch or tag of upstream has it; signal again"
AGAIN = "slave-activate: upstream does not show %s yet; asking again in %d s"


@pytest.fixture
def repo(upstream):
    return upstream.create("r", {"f": "1"})


@pytest.fixture
def activate(tmp_path, http_upstream, repo):
    """Pauses take no time."""
    activate = Activate(tmp_path, http_upstream.url)
    folder = activate.bin / "no-pauses"
    folder.mkdir()
    shorten_pauses(folder, "[124]")
    activate.path = "%s:%s" % (folder, activate.environment()["PATH"])
    return activate


class Late:
    """Upstream shows a ref only when it is cloned for the `at`-th time."""

    def __init__(self, http_upstream, repo, ref, commit, at):
        self.repo, self.ref, self.commit, self.at = repo, ref, commit, at
        self.clones = 0
        http_upstream.before_request = self.look

    def look(self, requests):
        if "/info/refs" in requests[-1]:
            self.clones += 1
            if self.clones == self.at:
                self.repo.git("update-ref", self.ref, self.commit)


def push_late(http_upstream, repo, at, ref="refs/heads/main"):
    """A commit that upstream has, but shows in no ref yet."""
    before = repo.git("rev-parse", "-q", "--verify", ref, check=False)
    commit = repo.commit({"f": "2"}, branch="hidden", parent=repo.head())
    repo.git("update-ref", "-d", "refs/heads/hidden")
    assert repo.git("rev-parse", "-q", "--verify", ref, check=False) == before
    return commit, Late(http_upstream, repo, ref, commit, at)


def expecting(commit):
    return {"SERVER_UPDATE_EXPECT": commit}


@pytest.mark.parametrize("old", ["with", "without"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_it_is_asked_for_again(activate, repo, http_upstream, old, at):
    first = repo.head()
    if old == "with":
        activate.good("r")
    commit, late = push_late(http_upstream, repo, at)
    result = activate("r", env=expecting(commit))
    assert (result.status, result.out) == (
        0, "r %s %s\n" % (commit, first if old == "with" else "-")), result
    assert late.clones == at
    pauses = [1, 2, 4][:at - 1]
    told = [line for line in result.err.splitlines() if "asking again" in line]
    assert told == [AGAIN % (commit[:7], pause) for pause in pauses]
    assert activate.leftovers() == []


def test_after_three_times_it_goes_on_and_says_so(activate, repo, http_upstream):
    first = repo.head()
    commit, late = push_late(http_upstream, repo, 99)
    result = activate("r", env=expecting(commit))
    assert (result.status, result.out) == (0, "r %s -\n" % first), "never by itself"
    assert result.last == "slave-activate: " + NOT_YET % commit[:7]
    assert late.clones == 4


@pytest.mark.parametrize("name, ref", [
    ("new", "refs/heads/new"), ("refs/heads/new", "refs/heads/new"), ("v1", "refs/tags/v1"),
    ("refs/tags/v1", "refs/tags/v1"),
])
def test_a_branch_or_tag_that_is_not_shown_yet(activate, repo, http_upstream, name, ref):
    commit, late = push_late(http_upstream, repo, 3, ref)
    result = activate("r", name, env=expecting(commit))
    assert (result.status, result.out) == (0, "r %s -\n" % commit), result
    assert late.clones == 3
    repo.git("update-ref", "-d", ref)
    result = activate("r", name, env=expecting("f" * 40))
    assert result.status == 1
    assert "not found in upstream origin" in result.last
    assert activate.head() == commit


def test_a_first_push_to_an_empty_repository(activate, upstream, http_upstream):
    repo = upstream.create("e", {})
    commit = repo.commit({"f": "1"}, branch="hidden")
    repo.git("update-ref", "-d", "refs/heads/hidden")
    Late(http_upstream, repo, "refs/heads/main", commit, 2)
    result = activate("e", env=expecting(commit))
    assert (result.status, result.out) == (0, "e %s -\n" % commit), result


def test_what_is_in_any_branch_or_tag_is_there(activate, repo, http_upstream):
    side = repo.commit({"f": "3"}, branch="side")
    repo.git("tag", "-a", "-m", "a tag", "v1", side)
    asked = []
    http_upstream.before_request = lambda requests: asked.append(requests[-1])
    for commit in (side, repo.head(), repo.git("rev-parse", "v1")):
        del asked[:]
        result = activate("r", env=expecting(commit))
        assert (result.status, "yet" in result.err) == (0, False), result
        assert len([one for one in asked if "/info/refs" in one]) == 1


def test_what_only_the_old_clone_has_is_not_there(activate, repo, http_upstream):
    """A branch that was pushed away, and is pushed again."""
    gone = repo.commit({"f": "2"})
    activate.good("r")
    repo.git("update-ref", "refs/heads/main", repo.head("main~1"))
    activate.good("r")
    late = Late(http_upstream, repo, "refs/heads/main", gone, 2)
    result = activate("r", env=expecting(gone))
    assert (activate.head(), late.clones) == (gone, 2), result


def test_where_there_is_no_time_for_it_it_goes_on(activate, repo, http_upstream):
    activate.settings["TIMEOUT"] = "1"
    first = repo.head()
    commit, late = push_late(http_upstream, repo, 2)
    result = activate("r", env=expecting(commit))
    if result.status == 1:
        assert "TIMEOUT" in result.last, "this machine is busy"
    else:
        assert result.out == "r %s -\n" % first
        assert NOT_YET % commit[:7] in result.last
        assert late.clones == 1


def test_it_is_no_hooks(activate, repo):
    activate.hook("pre-update", 'echo "x${SERVER_UPDATE_EXPECT-}x" >&2\n')
    result = activate("r", env=expecting(repo.head()))
    assert (result.status, "xx" in result.err) == (0, True), result


@pytest.mark.parametrize("bad", ["main", "--all", "a" * 39, "A" * 41])
def test_a_bad_one_is_a_mistake(activate, bad):
    result = activate("r", env=expecting(bad))
    assert (result.status, result.err) == (
        2, "slave-activate: bad commit '%s' (set by SERVER_UPDATE_EXPECT)\n" % bad)
