"""The tests' own upstream: what it serves is what git clones, and its faults are faults."""

import subprocess

import pytest
from processes import wait_until
from upstream import run_git


def clone(url, folder, *options):
    """git clone; (exit status, stderr)."""
    done = subprocess.run(
        ["git", "clone", "-q", *options, url, str(folder)],
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=300,
    )
    return done.returncode, done.stderr


def test_a_clone_by_path_and_over_http_is_what_was_committed(upstream, http_upstream, tmp_path):
    repo = upstream.create(
        "hanuman", {"a.txt": "one\n", "run": ("100755", "#!/bin/sh\n"), "l": ("120000", "a.txt")}
    )
    second = repo.commit({"a.txt": "two\n", "b/c.txt": b"\x00\xff"})
    for base in (upstream.base_path, http_upstream.url):
        folder = tmp_path / base.replace("/", "_")
        assert clone(base + "/hanuman.git", folder) == (0, "")
        assert run_git("rev-parse", "HEAD", cwd=str(folder)) == second == repo.head()
        assert (folder / "l").read_text() == "two\n"
        assert (folder / "b/c.txt").read_bytes() == b"\x00\xff"
    assert 300 < http_upstream.bytes_sent < 5000
    assert any(
        line.startswith("POST /hanuman.git/git-upload-pack") for line in http_upstream.requests
    )


def test_commits_go_to_branches_and_replace_history(upstream):
    repo = upstream.create("r")
    first = repo.head()
    side = repo.commit({"x": "1"}, branch="side", parent=first)
    forced = repo.commit({"y": "1"}, parent="")
    assert repo.head("side^") == first
    assert repo.head() == forced
    assert repo.git("rev-list", "--count", "main") == "1"
    assert side != forced


@pytest.mark.parametrize("fault", ["reset", "garbage", "401", "503", "cut:100"])
def test_a_fault_fails_a_clone(upstream, http_upstream, tmp_path, fault):
    upstream.create("r", {"big": "".join(map(str, range(2000)))})
    http_upstream.fault = fault
    status, _ = clone(http_upstream.url + "/r.git", tmp_path / "clone", "-c", "core.askPass=true")
    assert status
    http_upstream.fault = None
    assert clone(http_upstream.url + "/r.git", tmp_path / "clone")[0] == 0


def test_a_hanging_upstream_goes_on_when_it_is_released(upstream, http_upstream, tmp_path):
    upstream.create("r")
    http_upstream.fault = "hang"
    url = http_upstream.url + "/r.git"
    process = subprocess.Popen(
        ["git", "clone", "-q", url, str(tmp_path / "clone")], stderr=subprocess.DEVNULL
    )
    wait_until(lambda: http_upstream.requests)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    http_upstream.fault = None
    assert process.wait(60)  # it was answered by an end of the connection
    assert clone(url, tmp_path / "clone")[0] == 0
