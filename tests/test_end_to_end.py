"""The whole path: server-update, slave.py, slave-activate and a real upstream."""

import json
import os
import re
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from farm import answering, refusing_entry
from processes import processes_below, wait_until
from product import ROOT, daily, shorten_pauses
from update_support import Update
from upstream import run_git

SLAVES = 3


@pytest.fixture
def fleet(start_slave, upstream, http_upstream):
    """fleet("http" or "path"): three slaves whose upstream is reached that way."""
    def start(way="path", count=SLAVES):
        base = {"path": upstream.base_path, "http": http_upstream.url}[way]
        return [start_slave(BASE_URL=base) for _ in range(count)]
    return start


def commit_in(slave, repo="hanuman"):
    """The commit in a slave's clone, as git says, of a clean tree that is complete."""
    folder = str(slave.repos / repo)
    assert run_git("status", "--porcelain", "--ignored", cwd=folder) == ""
    run_git("fsck", "--full", cwd=folder)
    return run_git("rev-parse", "HEAD", cwd=folder)


def names_in(folder):
    """What a folder holds."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("way", daily(1, ["http", "path"]))
def test_one_command_updates_every_slave_and_says_what_is_live(fleet, upstream, update, way):
    repo = upstream.create("hanuman", {"index.html": "one\n", "old": "gone soon\n"})
    first, slaves = repo.head(), fleet(way)
    done = update(slaves)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(first[:7]) >= SLAVES
    for slave in slaves:
        assert commit_in(slave) == first
        (slave.repos / "hanuman" / "untracked").write_text("made on the slave\n")
    second = repo.commit({"index.html": "two\n", "old": None}, "Second")
    done = update(slaves)
    assert done.returncode == 0
    for slave in slaves:
        entry = slave.url
        line = [line for line in done.stdout.splitlines() if entry.split("//")[1] in line][0]
        assert re.search(r"\blive\b.*%s.*%s.*\d" % (second[:7], first[:7]), line)
        assert commit_in(slave) == second
        assert names_in(slave.repos / "hanuman") == [".git", "index.html"]
        assert names_in(slave.state) == ["hanuman.json", "hanuman.lock"]


def test_json_lines_say_it_to_programs(fleet, upstream, update):
    repo = upstream.create("hanuman")
    slaves = fleet()
    done = update(slaves, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["type"] for line in lines] == ["start"] + ["result"] * SLAVES + ["summary"]
    assert (lines[0]["repo"], lines[0]["slaves"]) == ("hanuman", SLAVES)
    assert {line["slave"] for line in lines[1:-1]} == {slave.url for slave in slaves}
    assert {line["commit"] for line in lines[1:-1]} == {repo.head()}
    assert lines[-1]["outcomes"] == {"live": SLAVES}
    assert lines[-1]["commits"] == {repo.head(): SLAVES}
    assert lines[-1]["exit"] == done.returncode == 0


def test_an_unreachable_slave_is_named_with_the_reason_and_is_exit_1(fleet, upstream, update):
    repo = upstream.create("hanuman")
    slaves = fleet()
    entry, holder = refusing_entry()
    with holder:
        done = update([*slaves, entry], "--retries", "1")
    assert done.returncode == 1
    assert re.search(re.escape(entry) + r".*unreachable.*refused", done.stdout)
    assert [commit_in(slave) for slave in slaves] == [repo.head()] * SLAVES


def test_a_bad_line_in_the_list_is_exit_2_with_its_number_and_signals_nobody(farm, update):
    entry = farm.add(answering({"/": (200, "ok")}))
    done = update(["# the fleet", entry, "web1:80x", entry])
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"^server-update: \S*slavelist.txt:3: bad port '80x'$", done.stderr, re.M)
    assert farm.requests == []


def test_a_slave_of_the_oldest_kind_is_signalled_which_is_enough_for_no_wait(
    fleet, upstream, farm, update
):
    upstream.create("hanuman")
    oldest = farm.add(answering({"/get/?repo=hanuman": (200, "Updating hanuman\n")}))
    slaves, env = [*fleet(count=1), "http://%s/get/" % oldest], {"SERVER_UPDATE_BY": "me@here"}
    for options, status in (([], 1), (["--no-wait"], 0)):
        done = update(slaves, *options, env=env)
        assert done.returncode == status, done.stdout + done.stderr
        assert re.search(re.escape(oldest) + r".*signalled", done.stdout)
    asked = {request.path for request in farm.requests}
    assert asked == {"/get/?repo=hanuman&by=me%40here"}


def test_the_old_habits_work_unchanged(fleet, upstream, run_script, own_home):
    repo = upstream.create("hanuman")
    slave = fleet(count=1)[0]
    for path in ("/get/?repo=hanuman", "/?repo=hanuman"):
        wanted = repo.commit({"page": path})
        assert subprocess.call(["curl", "-sf", "-o", os.devnull, slave.url + path]) == 0
        wait_until(lambda wanted=wanted: slave.json("/status?repo=hanuman")["commit"] == wanted)
        assert commit_in(slave) == wanted
    base = {"SERVER_UPDATE_BASE_URL": upstream.base_path}
    done = run_script("slave-activate", "hanuman", env=base)
    assert (done.returncode, done.stdout) == (0, "hanuman %s -\n" % repo.head())
    assert run_git("rev-parse", "HEAD", cwd=str(own_home / "repos" / "hanuman")) == repo.head()


def test_a_failing_upstream_leaves_what_was_live(fleet, upstream, http_upstream, update):
    repo = upstream.create("hanuman")
    slaves = fleet("http")
    assert update(slaves).returncode == 0
    first = repo.head()
    repo.commit({"x": "1"})
    for slave in slaves:
        shorten_pauses(slave.bin)
    http_upstream.fault = "503"
    done = update(slaves)
    assert done.returncode == 1
    assert done.stdout.count("failed") >= SLAVES
    assert "503" in done.stdout
    assert [commit_in(slave) for slave in slaves] == [first] * SLAVES


def test_slaves_at_different_commits_are_exit_1(fleet, upstream, update):
    repo = upstream.create("hanuman")
    slaves = fleet(count=2)
    other = upstream.folder.parent / "behind"
    run_git("clone", "-q", "--mirror", repo.path, other / "hanuman.git")
    assert slaves[1].stop() == 0
    slaves[1].settings["BASE_URL"] = other
    slaves[1].start()
    commits = repo.head() + "|" + repo.commit({"x": "1"})
    done = update(slaves)
    assert done.returncode == 1
    assert re.search(r"equal: \S*server-update --ref (%s)" % commits, done.stdout)
    totals = json.loads(update(slaves, "--json").stdout.splitlines()[-1])
    assert (totals["outcomes"], len(totals["commits"]), totals["exit"]) == ({"live": 2}, 2, 1)


def push_in_hook(slave, repo, commit):
    """Have a slave's post-update hook stand in for somebody who pushes `commit`."""
    hook = slave.hooks / "post-update"
    hook.write_text("#!/bin/sh\ngit --git-dir='%s' update-ref refs/heads/main %s\n" % (
        repo.path, commit))
    hook.chmod(0o755)


@pytest.mark.parametrize("pace", daily(1, ["--batch=1", "--at-once=1"]))
def test_a_push_in_the_middle_of_a_rollout_waits_for_the_next(fleet, upstream, update, pace):
    """What was tried first is what all get."""
    repo = upstream.create("hanuman")
    slaves, before = fleet(), repo.head()
    assert update(slaves).returncode == 0
    asked = repo.commit({"page": "asked for"})
    pushed = repo.commit({"page": "pushed"}, branch="next", parent=asked)
    push_in_hook(slaves[0], repo, pushed)
    done = update(slaves, pace)
    assert done.returncode == 0, done.stdout
    assert "\nhanuman: 3 live of 3, " in done.stdout
    assert "\ncommits: %s on 3\n" % asked[:7] in done.stdout
    assert repo.head() == pushed
    command = re.search("^to go back: (.*)$", done.stdout, re.M).group(1)
    pasted = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, timeout=300)
    assert (pasted.returncode, before in command) == (0, True), pasted.stdout
    assert [commit_in(slave) for slave in slaves] == [before] * SLAVES


@pytest.mark.slow
def test_a_push_between_slaves_is_seen_and_the_printed_command_mends_it(
    fleet, upstream, tmp_path
):
    """The others stand still until the first one has put live what was newest then."""
    repo = upstream.create("hanuman")
    slaves = fleet()
    asked = repo.head()
    pushed = repo.commit({"page": "pushed"}, branch="next", parent=asked)
    push_in_hook(slaves[0], repo, pushed)
    for slave in slaves[1:]:
        slave.process.send_signal(signal.SIGSTOP)
    run = Update(tmp_path, slaves)
    wait_until(lambda: repo.head() == pushed)
    for slave in slaves[1:]:
        slave.process.send_signal(signal.SIGCONT)
    done = run.finish()
    assert done.returncode == 1
    assert "hanuman: 3 live of 3, " in done.stdout
    assert "\ncommits: %s on 2, %s on 1\n" % (pushed[:7], asked[:7]) in done.stdout
    command = re.search("^to make them equal: (.*)$", done.stdout, re.M).group(1)
    pasted = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, timeout=300)
    assert pasted.returncode == 0, pasted.stdout
    assert len({commit_in(slave) for slave in slaves}) == 1


@pytest.mark.parametrize("ref", daily(1, [None, "side", "v1"]))
def test_exactly_a_commit_goes_live(fleet, upstream, update, ref):
    """Whatever has come since; and what is no commit of upstream is told by each slave."""
    repo = upstream.create("hanuman")
    wanted = repo.commit({"page": "wanted"}, branch="side")
    repo.git("tag", "v1", wanted)
    repo.git("update-ref", "refs/heads/main", wanted)
    repo.commit({"page": "newer"})
    slaves = fleet(count=2)
    options = ["--ref", ref] if ref else []
    done = update(slaves, *options, "--commit", wanted.upper(), "--note", "as agreed")
    assert done.returncode == 0, done.stdout
    assert [commit_in(slave) for slave in slaves] == [wanted] * 2
    told = slaves[0].json("/status?repo=hanuman")
    assert (told["pin"], told["ref"], told["note"]) == (wanted, ref, "as agreed")
    assert re.fullmatch(r"\S+@\S+", told["by"])
    done = update(slaves, "--commit", "1" * 40)
    assert done.returncode == 1
    assert re.search(r"  failed .*  still live .*1111111 is in no branch or tag", done.stdout)
    done = update(slaves, "--history")
    assert done.returncode == 0
    line = r"    20\S+ \S+Z  live         %s  %s  .*\(as agreed\)" % (
        wanted[:7], re.escape(told["by"]))
    assert len(re.findall(line, done.stdout)) == 2
    assert len(re.findall(r"  failed  .*1111111 is in no branch or tag", done.stdout)) == 2


def test_a_hook_that_fails_stops_a_rollout(fleet, upstream, update):
    """The canary is live, but what was to happen then did not: the others are not touched."""
    upstream.create("hanuman")
    slaves = fleet()
    hook = slaves[0].hooks / "post-update"
    hook.write_text("#!/bin/sh\necho 'nginx: [emerg] bad config in line 7' >&2\nexit 1\n")
    hook.chmod(0o755)
    done = update(slaves, "--batch", "1", "-q")
    assert done.returncode == 1
    assert re.search(r"  hook failed  .*nginx: \[emerg\] bad config in line 7", done.stdout)
    assert "hanuman: 1 hook failed, 2 not started of 3, " in done.stdout
    assert [names_in(slave.repos) for slave in slaves[1:]] == [[".server-update"]] * 2
    done = update(slaves[:1], "--status")
    assert done.returncode == 1
    assert re.search(r"  hook failed  .*bad config in line 7", done.stdout)


@pytest.mark.slow
def test_the_status_is_good_only_where_a_commit_is_live_and_its_tree_is_there(
    fleet, upstream, update
):
    upstream.create("hanuman")
    slaves = fleet(count=2)
    assert update(slaves).returncode == 0
    assert update(slaves, "--status").returncode == 0
    tree = slaves[0].repos / "hanuman"
    for path in tree.iterdir():
        shutil.rmtree(str(path)) if path.is_dir() else path.unlink()
    for step in ("emptied", "removed"):
        if step == "removed":
            tree.rmdir()
        for repo in ("hanuman", None):
            done = update(slaves, "--status", repo=repo)
            assert done.returncode == 1, step
            words = "no commit is live: the tree is gone or empty"
            assert re.search(r"%s.* failed +-  +%s" % (slaves[0].url, words), done.stdout)
            assert "exit status 1: 1 slave not good\n" in done.stdout
    assert update(slaves[1:], "--status").returncode == 0
    assert update(slaves[1:], repo="hanumna").returncode == 1  # a typo
    assert update(slaves[1:], "--status", repo=None).returncode == 0
    assert update(slaves[1:], "--status", repo="hanumna").returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", daily(1, ["branch", "tag", "commit"]))
def test_a_ref_goes_live_on_every_slave(fleet, upstream, update, kind):
    repo = upstream.create("hanuman")
    wanted = repo.commit({"page": "of the ref"}, branch="feature/one")
    repo.git("tag", "v1.4", wanted)
    repo.commit({"page": "newer"})
    ref = {"branch": "feature/one", "tag": "v1.4", "commit": wanted}[kind]
    slaves = fleet()
    done = update(slaves, "--ref", ref)
    assert (done.returncode, "commits: %s on 3" % wanted[:7] in done.stdout) == (0, True)
    assert [commit_in(slave) for slave in slaves] == [wanted] * SLAVES


def test_many_signals_at_once_are_few_updates_and_the_last_commit(fleet, upstream, tmp_path):
    """While the first update runs, held by its hook, all others come: they are one more."""
    repo = upstream.create("hanuman")
    slave, gate, runs = fleet(count=1)[0], tmp_path / "gate", tmp_path / "runs"
    hook = slave.hooks / "pre-update"
    hook.write_text("#!/bin/sh\necho run >>'%s'\nuntil [ -e '%s' ]; do sleep 0.05; done\n" % (
        runs, gate))
    hook.chmod(0o755)
    with ThreadPoolExecutor(16) as pool:
        ids = [slave.signal()]
        wait_until(runs.exists)
        ids += pool.map(lambda _: slave.signal(), range(200))
        last = repo.commit({"x": "1"})
        ids.append(slave.signal())
    gate.touch()
    record = slave.wait_update("hanuman", max(ids))
    assert (record["state"], record["commit"]) == ("live", last)
    assert len(set(ids)) == len(ids)
    assert runs.read_text() == "run\n" * 2


# -- the demo --------------------------------------------------------------


def start_demo(tmp_path, errors):
    """tests/demo in a process group of its own."""
    return subprocess.Popen(
        ["sh", str(ROOT / "tests" / "demo")], start_new_session=True, universal_newlines=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, cwd=str(tmp_path),
        env=dict(os.environ, TMPDIR=str(tmp_path)))


@pytest.mark.slow
def test_the_demo_shows_both_commits_and_leaves_nothing(tmp_path):
    process = start_demo(tmp_path, subprocess.PIPE)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    before, after, pushed = output.split("# Somebody pushed ")
    assert before.count('"Version 20"') == SLAVES + 1
    newest = after.split()[0]
    assert after.count('%s "Version 21"' % newest) == SLAVES + 1
    assert pushed.count('%s "Version 22"' % pushed.split()[0]) == SLAVES + 1
    assert "beneath: 3 live" in pushed
    assert len(re.findall(r"\blive\b.*" + newest[:7], after)) >= SLAVES
    assert names_in(tmp_path) == ["home"]
    assert processes_below(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("end", ["ctrl-c", "kill", "nobody reads"])
def test_the_demo_leaves_nothing_however_it_ends(tmp_path, end):
    process = start_demo(tmp_path, subprocess.DEVNULL)
    while "$ server-update" not in process.stdout.readline():
        assert process.poll() is None
    if end == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    elif end == "kill":
        process.terminate()
    process.stdout.close()
    assert process.wait(60)
    assert names_in(tmp_path) == ["home"]
    assert processes_below(tmp_path) == []
