"""Upstream at fault: what passes is asked again with the old clone, what is refused is the end."""

import random
import re
import socket
import time

import pytest
from activate_support import Activate, as_another_user, snapshot
from processes import wait_until
from product import daily

AGAIN = "slave-activate: upstream: "
SLOW = "can't reuse the old clone"
PACKS = 3  # the request for the packs: after the one for the protocol and the one for the refs
SILENT_S = 32  # longer than curl's limit was set to by version 1.0


@pytest.fixture
def repo(upstream):
    """With a history that is large beside what a commit adds."""
    noise = random.Random(1).getrandbits(8 * 300000).to_bytes(300000, "big")
    return upstream.create("r", {"f": "1", "noise": noise})


@pytest.fixture
def activate(tmp_path, http_upstream, repo):
    activate = Activate(tmp_path, http_upstream.url)
    activate.short_pauses()
    return activate


def forget(http_upstream):
    http_upstream.requests.clear()
    http_upstream.bytes_sent = 0


@pytest.mark.parametrize(
    "fault", daily(2, ["503", "reset", "cut:10", "500", "502", "429", "garbage", "200"])
)
@pytest.mark.parametrize("request_number", [1, 2, PACKS])
def test_a_hiccup_costs_no_whole_clone(activate, repo, http_upstream, fault, request_number):
    first, _ = activate.good("r")
    second = repo.commit({"f": "2"})
    forget(http_upstream)
    http_upstream.faults_at = {request_number: fault}
    result = activate("r")
    assert (result.status, result.out) == (0, "r %s %s\n" % (second, first)), result
    # Only an answer to POST is cut; on a connection that was used before, curl asks again itself.
    is_unseen = (fault, request_number) == ("cut:10", 1) or (
        fault == "reset" and request_number > 1
    )
    assert (result.err.count(AGAIN), result.err.count(SLOW)) == (int(not is_unseen), 0), result
    assert http_upstream.bytes_sent < 20000
    assert activate.leftovers() == []


@pytest.mark.parametrize("fault,request_number", [("200", 1), ("204", PACKS)])
def test_an_answer_that_is_not_gits(activate, repo, http_upstream, fault, request_number):
    """A page of a proxy, say, which has 200, too."""
    activate.good("r")
    repo.commit({"f": "2"})
    forget(http_upstream)
    http_upstream.faults_at = {request_number: fault}
    result = activate("r")
    assert (result.status, result.err.count(AGAIN), result.err.count(SLOW)) == (0, 1, 0), result
    assert http_upstream.bytes_sent < 20000


ODD_FILES = {
    "a link to what is too long": {"l": ("120000", "x" * 5000)},
    "submodules that git can't read": {".gitmodules": "[[["},
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_upstream_has_is_no_fault_of_the_old_clone(activate, repo, http_upstream, kind):
    first, _ = activate.good("r")
    repo.commit(ODD_FILES[kind])
    forget(http_upstream)
    result = activate("r")
    assert (result.status, result.err.count(AGAIN), result.err.count(SLOW)) == (1, 0, 0), result
    assert (http_upstream.bytes_sent < 20000, activate.head()) == (True, first)


@pytest.mark.parametrize("what", ["HEAD:f", "HEAD^{tree}"])
def test_a_tag_of_what_is_no_commit(activate, repo, http_upstream, what):
    first, _ = activate.good("r")
    repo.git("tag", "odd", what)
    result = activate("r", "odd")
    assert (result.status, result.err.count(AGAIN), result.err.count(SLOW)) == (1, 0, 0), result
    assert (", not a commit" in result.last, activate.head()) == (True, first)


def test_an_upstream_of_another_user(activate, repo, upstream):
    """git takes nothing from another user's folder, unless it is told to."""
    activate.settings["BASE_URL"] = upstream.base_path
    user = as_another_user(activate)
    result = activate("r", prefix=user)
    assert result.status == 0, result
    (activate.home / ".gitconfig").unlink()
    result = activate("r", prefix=user)
    assert (result.status, result.err.count(AGAIN)) == (1, 0), result
    assert "dubious ownership" in result.last and "safe.directory" in result.last


@pytest.mark.parametrize("old", ["there", "not there"])
def test_it_is_asked_three_times_and_no_more(activate, repo, http_upstream, old):
    if old == "there":
        activate.good("r")
    before = snapshot(activate.live())
    forget(http_upstream)
    http_upstream.fault = "503"
    result = activate("r")
    assert (result.status, result.err.count(AGAIN), len(http_upstream.requests)) == (1, 2, 3), (
        result
    )
    assert "error: 503; upstream is in trouble" in result.last
    pauses = [float(text) for text in re.findall(r"asking again in ([0-9.]+) s", result.err)]
    assert 1 <= pauses[0] <= 2 and 4 <= pauses[1] <= 8
    assert (snapshot(activate.live()), activate.leftovers()) == (before, [])


@pytest.mark.slow
def test_the_pauses_are_real_and_not_all_alike(activate, repo, http_upstream):
    activate.path = None
    activate.good("r")
    seen = set()
    for _ in range(3):
        forget(http_upstream)
        http_upstream.faults_at = {1: "503"}
        start = time.monotonic()
        result = activate("r")
        pause = re.search(r"asking again in ([0-9.]+) s", result.err).group(1)
        assert time.monotonic() - start > float(pause)
        seen.add(pause)
    assert len(seen) > 1


def test_without_time_it_is_not_asked_again(activate, repo, http_upstream):
    activate.settings["TIMEOUT"] = "1"  # the shortest pause takes that long
    forget(http_upstream)
    http_upstream.fault = "503"
    result = activate("r")
    assert (result.status, "asking again" in result.err) == (1, False), result
    assert len(http_upstream.requests) <= 1


@pytest.mark.parametrize("fault", ["401", "403", "404"])
def test_a_no_is_the_end_at_once(activate, repo, http_upstream, fault):
    first, _ = activate.good("r")
    forget(http_upstream)
    http_upstream.fault = fault
    result = activate("r")
    assert (result.status, result.err.count(AGAIN), result.err.count(SLOW)) == (1, 0, 0), result
    assert len(http_upstream.requests) == 1
    assert activate.head() == first


def test_no_such_branch_is_the_end_at_once(activate, repo, http_upstream):
    activate.good("r")
    forget(http_upstream)
    result = activate("r", "nowhere")
    assert (result.status, result.err.count(SLOW)) == (1, 0), result
    assert len(http_upstream.requests) == 2


@pytest.mark.parametrize(
    "words, times",
    [
        ("Host key verification failed.", 1),
        ("Permission denied (publickey).", 1),
        ("ERROR: Repository not found.", 1),
        ("kex_exchange_identification: Connection closed by remote host", 3),
        ("ssh: connect to host x port 22: Connection refused", 3),
        ("ssh: Could not resolve hostname x: Name or service not known", 3),
        ("ssh: Could not resolve hostname x: Temporary failure in name resolution", 3),
        ("ssh: connect to host x port 22: No route to host", 3),
    ],
)
def test_what_ssh_says_is_told_apart(activate, repo, tmp_path, words, times):
    activate.good("r")
    log = tmp_path / "log"
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\necho x >>%s\necho "%s" >&2\nexit 255\n' % (log, words))
    ssh.chmod(0o755)
    activate.settings["BASE_URL"] = "git@x:"
    activate.settings["BASE_URL"] = "ssh://git@x/y"
    result = activate("r", env={"GIT_SSH_COMMAND": str(ssh)})
    assert (result.status, result.err.count(SLOW)) == (1, 0), result
    assert log.read_text().count("x") == times, result
    assert words.rstrip(".") in result.last or words in result.err


def test_a_port_that_nobody_listens_at(activate, repo):
    activate.good("r")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        activate.settings["BASE_URL"] = "http://127.0.0.1:%d" % unused.getsockname()[1]
        result = activate("r")
    assert (result.status, result.err.count(AGAIN), result.err.count(SLOW)) == (1, 2, 0), result


@pytest.mark.slow
def test_a_silent_upstream_has_all_of_timeout(activate, repo, http_upstream):
    """As one that counts objects: no word for longer than curl would wait."""
    activate.good("r")
    second = repo.commit({"f": "2"})
    forget(http_upstream)
    http_upstream.fault = "hang"
    process = activate.start("r")
    wait_until(lambda: http_upstream.requests)
    time.sleep(SILENT_S)
    assert process.poll() is None, process.communicate()
    http_upstream.faults_at = {}
    http_upstream.fault = None
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out.decode().split()[1]) == (0, second), err


def test_an_upstream_that_became_empty_empties_nothing(activate, repo):
    """And one that is empty from the start goes live, where nothing was."""
    first, _ = activate.good("r")
    before = snapshot(activate.live())
    repo.git("update-ref", "-d", "refs/heads/main")
    result = activate("r")
    assert (result.status, result.out) == (1, ""), result
    assert result.last.startswith("slave-activate: upstream has no commit; ")
    assert (snapshot(activate.live()), activate.leftovers()) == (before, [])


def test_an_empty_upstream_empties_no_tree_without_git(activate, repo, tmp_path):
    """A folder that somebody made by hand, or a clone that is damaged, is something live too."""
    activate.live().mkdir(parents=True)
    (activate.live() / "index.html").write_text("by hand")
    repo.git("update-ref", "-d", "refs/heads/main")
    result = activate("r")
    assert result.status == 1, result
    assert (activate.live() / "index.html").exists()


def test_the_bytes_of_a_whole_clone_are_what_a_hiccup_saved(activate, repo, http_upstream):
    """So that the tests above would see one."""
    forget(http_upstream)
    activate.good("r")
    assert http_upstream.bytes_sent > 300000
