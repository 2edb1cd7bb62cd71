"""A relay: a slave with slaves beneath it. Real slaves, the real server-update, real clones."""

import json
import os
import subprocess
import time
from signal import SIGKILL

import pytest
from farm import refusing_entry
from forge_support import push
from pages import BLOCKS
from processes import fleet_runs_below, is_alive, kill, rss_kib, wait_until
from slave_support import (
    ONE,
    SECRET,
    forget_bin,
    kill_hard,
    make_secret,
    record_file,
    signature,
    stand_in,
    start_by_hand,
)

STORM = 200  # signals or pushes
STORM_S = 10  # of pushes
STORM_LEAVES = 8
FLEET = 100000  # slaves beneath
# A server-update that notes how it was called, and then does as it is told.
STAND_IN = """#!/bin/sh
case $1 in --dry-run) echo web1; echo web2; echo web3; exit ;; esac
echo "$*" >>"$HOME/calls"
echo "$SERVER_UPDATE_BY|$SERVER_UPDATE_NOTE|$SERVER_UPDATE_VIA" >>"$HOME/calls"
%s
"""
# A server-update that notes its runs around those of the real one beside it.
COUNTED = """#!/bin/sh
echo begins >>"$HOME/fleet-runs"
"$0.real" "$@"
"""
START = '{"type": "start", "slaves": 7}'
SUMMARY = '{"type": "summary", "outcomes": {"live": 3}}'


def put(path, text):
    """An executable, in its place from one moment to the next."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.chmod(0o755)
    new.rename(path)


def git(slave, *args):
    command = ["git", "-C", str(slave.repos / "hanuman"), *args]
    return subprocess.check_output(command, universal_newlines=True).strip()


def wait_at(path):
    """A hook that says that it has come so far, and waits to be let go."""
    return '#!/bin/sh\n: >"%s.reached"\nuntil [ -e "%s" ]; do sleep 0.02; done\n' % (path, path)


def find_fleet_run(relay):
    """The process of the relay's server-update."""
    runs = wait_until(lambda: fleet_runs_below(relay.bin.parent), what="a run of server-update")
    return runs[0]


@pytest.fixture
def start_relay(start_slave, tmp_path):
    """start_relay(slaves or entries, RELAY_OPTIONS=..., ...) -> a Slave with these beneath."""
    numbers = iter(range(100))

    def start(beneath, fleet=None, **settings):
        slavelist = tmp_path / ("beneath-%d" % next(numbers))
        write_list(slavelist, beneath)
        settings.setdefault("RELAY_OPTIONS", "--retries 0 --connect-timeout 2")
        relay = start_slave(SLAVELIST=slavelist, **settings)
        relay.slavelist = slavelist
        if fleet is not None:
            put(relay.bin / "server-update", STAND_IN % fleet)
        return relay

    return start


def write_list(path, beneath):
    entries = [getattr(entry, "url", entry) for entry in beneath]
    path.write_text("".join(entry + "\n" for entry in entries))


def hook(slave, name, text):
    put(slave.hooks / name, text)


# -- from one push to all beneath


@pytest.mark.slow
def test_two_tiers_have_the_commit_and_say_who_asked(start_slave, start_relay, update, upstream):
    repo = upstream.create("hanuman", files={"a": "1"})
    leaves = [start_slave() for _ in range(3)]
    below = start_relay(leaves[:2])
    relay = start_relay([below, leaves[2]])
    asked = relay.json("/?repo=hanuman&by=me@forge&note=a%20note", status=202)
    record = relay.wait_update(update=asked["update"])
    assert (record["state"], record["commit"]) == ("live", repo.head())
    assert (record["message"], record["beneath"]) == ("beneath: 4 live", {"live": 4})
    assert record["beneath_bad"] == []
    for slave in [below, *leaves]:
        told = slave.json("/status?repo=hanuman")
        assert (told["commit"], told["pin"], told["ref"]) == (repo.head(), repo.head(), None)
        assert (told["by"], told["note"]) == ("me@forge", "a note")
        assert git(slave, "symbolic-ref", "HEAD") == "refs/heads/main"
        assert git(slave, "rev-parse", "HEAD@{upstream}") == repo.head()
    ids = [(slave.state / "relay-id").read_text() for slave in (relay, below)]
    assert record_file(below)["via"] == ids[0]
    assert record_file(leaves[0])["via"] == ",".join(ids)
    assert record_file(leaves[2])["via"] == ids[0]
    repo.commit({"a": "2"})
    done = update([relay], "--json")
    assert (done.returncode, done.outcomes) == (0, {relay.url: "live"})
    assert {git(slave, "rev-parse", "HEAD") for slave in leaves} == {repo.head()}


def test_the_relays_commit_is_what_goes_on_whatever_is_pushed_meanwhile(
    start_slave, start_relay, upstream
):
    repo = upstream.create("hanuman", files={"a": "1"})
    first = repo.head()
    newer = repo.commit({"a": "2"}, branch="newer", parent=first)
    leaf = start_slave()
    relay = start_relay([leaf])
    # It moves once the relay has its clone.
    move = '#!/bin/sh\ngit --git-dir "%s" update-ref refs/heads/main %s\n' % (repo.path, newer)
    hook(relay, "pre-update", move)
    assert relay.wait_update(update=relay.signal(ref="main"))["commit"] == first
    assert leaf.json("/status?repo=hanuman")["commit"] == first
    assert git(leaf, "symbolic-ref", "HEAD") == "refs/heads/main"
    assert relay.wait_update()["commit"] == newer
    assert leaf.json("/status?repo=hanuman")["commit"] == newer


def test_with_a_secret_the_relay_signs(start_slave, start_relay, upstream, tmp_path):
    upstream.create("hanuman", files={"a": "1"})
    secret = make_secret(tmp_path / "secret", SECRET)
    leaf = start_slave(SECRET_FILE=secret)
    relay = start_relay([leaf], SECRET_FILE=secret)
    assert relay.wait_update(secret=SECRET)["beneath"] == {"live": 1}


def test_how_server_update_is_called(start_relay, upstream):
    upstream.create("hanuman", files={"a": "1"})
    options = "--batch '1,25%' --retries 0"
    relay = start_relay(["web1"], "echo '%s'" % SUMMARY, RELAY_OPTIONS=options)
    stand_in(relay)
    identity = (relay.state / "relay-id").read_text()
    commit = relay.wait_update()["commit"]
    above = "0123456789abcdef"
    asked = "/?repo=hanuman&ref=main&by=b%C3%A9&note=why&via=" + above
    relay.wait_update(update=relay.json(asked, status=202)["update"])
    options = "--commit %s --batch 1,25%% --retries 0 hanuman" % commit
    listed = "--json --list %s " % relay.slavelist
    assert (relay.home / "calls").read_text(encoding="utf-8").splitlines() == [
        listed + options,
        "||" + identity,
        listed + "--ref main " + options,
        "bé|why|%s,%s" % (above, identity),
    ]
    relay.stop()
    relay.start()
    assert (relay.state / "relay-id").read_text() == identity, "made once"


# -- what is not good beneath


def test_a_dead_leaf_is_told_to_everybody(start_slave, start_relay, update, upstream, tmp_path):
    upstream.create("hanuman", files={"a": "1"})
    leaf = start_slave()
    dead, keep = refusing_entry()
    below = start_relay([leaf, dead])
    relay = start_relay([below])
    ended = tmp_path / "ended"
    hook(relay, "update-ended", '#!/bin/sh\nprintf "<%%s>" "$@" >"%s"\n' % ended)
    with keep:
        done = update([relay], "--json")
    assert (done.returncode, done.outcomes) == (1, {relay.url: "beneath failed"})
    record = relay.json("/status?repo=hanuman")
    message = record["message"]
    assert record["state"] == "live"
    assert message.startswith("beneath: ")
    sums = message[len("beneath: "):].split(", ")
    assert sorted(sums) == ["1 beneath failed", "1 live", "1 unreachable"]
    assert record["beneath"] == {"live": 1, "beneath failed": 1, "unreachable": 1}
    assert [(bad["slave"], bad["outcome"]) for bad in record["beneath_bad"]] == [
        (below.url, "beneath failed"),
        (below.url + " > " + dead, "unreachable"),
    ]
    assert relay.json("/status?repo=hanuman&history=1")["updates"] == [record]
    short = relay.json("/status")["repos"]["hanuman"]
    assert short == dict(record, beneath_bad=None), "as it may be much"
    wait_until(ended.exists, what="update-ended")
    commit = record["commit"]
    names = "%s, %s > %s" % (below.url, below.url, dead)
    told = ["hanuman", "beneath failed", "-", commit, "%s (%s)" % (message, names)]
    wait_until(lambda: ended.read_text() == "".join("<%s>" % word for word in told))


def test_a_failed_hook_starts_nothing_beneath(start_slave, start_relay, update, upstream):
    upstream.create("hanuman", files={"a": "1"})
    leaf = start_slave()
    relay = start_relay([leaf, "web2", "web3"])
    hook(relay, "post-update", "#!/bin/sh\necho 'no restart' >&2\nexit 7\n")
    done = update([relay], "--json")
    assert (done.returncode, done.outcomes) == (1, {relay.url: "hook failed"})
    record = relay.json("/status?repo=hanuman")
    message = "live, but post-update hook failed (7): no restart"
    assert record["message"] == message + ": beneath: 3 not started"
    assert record["beneath"] == {"not started": 3}
    assert record["beneath_bad"] == [
        {"slave": str(relay.slavelist), "outcome": "not started", "message": message}
    ]
    assert leaf.json("/status")["repos"] == {}


def test_an_update_that_fails_starts_nothing_beneath(start_slave, start_relay, upstream):
    leaf = start_slave()
    relay = start_relay([leaf, "web2"])
    record = relay.wait_update("nothing")
    assert (record["state"], record["beneath"]) == ("failed", {"not started": 2})
    assert "beneath" not in record["message"]
    assert leaf.json("/status")["repos"] == {}


def test_a_list_that_is_gone_refuses_nothing(start_relay, upstream):
    repo = upstream.create("hanuman", files={"a": "1"})
    relay = start_relay(["web1", "web2"])
    relay.slavelist.unlink()
    record = relay.wait_update()
    assert (record["state"], record["commit"]) == ("live", repo.head())
    why = "%s: No such file or directory" % relay.slavelist
    assert record["message"] == "beneath: 1 not started: " + why
    assert record["beneath"] == {"not started": 1}
    assert record["beneath_bad"][0]["message"] == why


@pytest.mark.slow
def test_a_list_that_became_a_pipe_is_given_up(start_relay):
    relay = start_relay(["web1", "web2"])
    stand_in(relay)
    relay.slavelist.unlink()
    os.mkfifo(str(relay.slavelist))
    record = relay.wait_update()
    assert record["message"] == (
        "beneath: 1 not started: %s: no slave in the list" % relay.slavelist
    )


@pytest.mark.parametrize(
    ("fleet", "why"),
    [
        ("kill -9 $$", "server-update was killed by signal 9"),
        ("echo 'Error: no memory' >&2; exit 1", "server-update ended with exit status 1"),
        ("echo 'server-update: /key: bad' >&2; exit 2", "/key: bad"),
        ("echo '%s' | cut -c 1-30" % SUMMARY, "server-update ended with exit status 0"),
        ("echo '%s'; exit 1" % START, "server-update ended with exit status 1"),
    ],
)
def test_no_summary_is_not_started(start_relay, fleet, why):
    relay = start_relay(["web1", "web2", "web3"], fleet)
    stand_in(relay)
    record = relay.wait_update()
    assert record["beneath"] == {"not started": 3}
    assert record["message"] == "beneath: 3 not started: " + why
    assert record["beneath_bad"][0]["slave"] == str(relay.slavelist)


def test_server_update_that_can_not_be_run(start_relay):
    relay = start_relay(["web1"])
    stand_in(relay)
    (relay.bin / "server-update").write_text("no script")
    record = relay.wait_update()
    assert record["beneath"] == {"not started": 1}
    assert "Exec format error" in record["message"]


def test_what_server_update_says_of_a_bad_list_is_kept_over_a_restart(start_relay):
    """Whatever is in it: a record that can't be printed would not be read again."""
    relay = start_relay(["web1"])
    stand_in(relay)
    relay.slavelist.write_text("web[1\u00a0-%s]\n" % ("3" * 500), encoding="utf-8")
    record = relay.wait_update()
    assert record["beneath"] == {"not started": 1}
    assert ": bad range '[1\\xa0-333" in record["message"] and len(record["message"]) < 400
    write_list(relay.slavelist, ["web1"])
    relay.stop()
    relay.start()
    assert relay.json("/status?repo=hanuman") == record
    assert not list(relay.state.glob("*.broken"))


def test_who_puts_another_commit_live_by_hand_leaves_those_beneath(
    start_slave, start_relay, upstream
):
    repo = upstream.create("hanuman", files={"a": "1"})
    relay = start_relay([start_slave()])
    assert relay.wait_update()["beneath"] == {"live": 1}
    two = repo.commit({"a": "2"})
    env = dict(os.environ, HOME=str(relay.home), SERVER_UPDATE_CONF=str(relay.conf))
    subprocess.check_call([str(relay.bin / "slave-activate"), "hanuman"], env=env)
    record = relay.json("/status?repo=hanuman")
    assert (record["commit"], record["beneath"]) == (two, {"not started": 1})
    assert record["message"] == "what is live here was changed by hand, and not beneath"
    assert relay.wait_update()["beneath"] == {"live": 1}


# -- a circle


def test_a_circle_ends(start_slave, start_relay, upstream):
    upstream.create("hanuman", files={"a": "1"})
    one = start_relay(["web1"])
    two = start_relay([one])
    write_list(one.slavelist, [two])
    record = one.wait_update()
    assert record["beneath"] == {"beneath failed": 1, "refused": 1}
    assert [bad["slave"] for bad in record["beneath_bad"]] == [two.url, two.url + " > " + one.url]
    assert "a circle of relays" in record["beneath_bad"][1]["message"]
    identity = (one.state / "relay-id").read_text()
    before = one.json("/status?repo=hanuman")
    error = {"error": "a circle of relays: this one is beneath itself"}
    assert one.json("/?repo=hanuman&via=%s,%s" % ("0" * 16, identity), status=409) == error
    assert one.json("/?repo=other&via=" + identity, status=409) == error
    assert one.json("/status?repo=hanuman") == before
    assert one.json("/status?repo=other", status=404)
    nine = ",".join(["0" * 16] * 9)
    assert one.json("/?repo=hanuman&via=" + nine, status=400) == {"error": "bad 'via'"}


# -- interrupted


@pytest.fixture
def under_way(start_slave, start_relay, upstream, tmp_path):
    """A relay in the middle of an update of its one leaf, whose hook waits until `go` is there."""
    repo = upstream.create("hanuman", files={"a": "1"})
    leaf = start_slave()
    relay = start_relay([leaf])
    go = tmp_path / "go"
    hook(leaf, "pre-update", wait_at(go))
    update = relay.signal()
    wait_until((tmp_path / "go.reached").exists)
    return repo, leaf, relay, go, update, find_fleet_run(relay)


def test_kill_9_in_the_middle_and_it_goes_on(under_way):
    repo, leaf, relay, go, update, run = under_way
    assert relay.json("/status?repo=hanuman")["state"] == "running"
    relay.kill()
    wait_until(lambda: not is_alive(run))  # it would go on beside the next one
    commit = repo.commit({"a": "2"})
    relay.start()
    go.touch()
    record = relay.wait_update(update=update)
    assert (record["commit"], record["beneath"]) == (commit, {"live": 1})
    assert leaf.json("/status?repo=hanuman")["commit"] == commit


@pytest.mark.slow
def test_sigterm_in_the_middle_and_it_goes_on(under_way):
    repo, _, relay, go, update, run = under_way
    assert relay.stop() == 0
    assert not is_alive(run)
    assert (record_file(relay)["state"], record_file(relay)["tries"]) == ("queued", 0)
    relay.start()
    go.touch()
    record = relay.wait_update(update=update)
    assert (record["commit"], record["beneath"]) == (repo.head(), {"live": 1})


def test_a_run_that_ignores_term_is_killed(start_relay, upstream):
    fleet = "trap '' TERM\n: >\"$HOME/deaf\"\nsleep 1000"
    relay = start_relay(["web1"], fleet, constants={"KILL_AFTER_S": 1})
    stand_in(relay)
    relay.signal()
    wait_until((relay.home / "deaf").exists)
    assert relay.stop(timeout=300) == 0
    assert record_file(relay)["state"] == "queued"


@pytest.mark.slow
def test_what_the_relay_ends_three_times_is_not_started(start_relay, upstream):
    relay = start_relay(["web1", "web2", "web3"], "sleep 1000")
    stand_in(relay)
    update = relay.signal()
    for _ in range(3):
        find_fleet_run(relay)
        kill_hard(relay)
        relay.start()
    record = relay.wait_update(update=update)
    assert (record["state"], record["beneath"]) == ("failed", {"not started": 3})
    assert record["message"].startswith("interrupted three times by the slave's own end")
    assert record["beneath_bad"][0]["message"] == record["message"]


def test_kill_9_of_its_server_update(start_slave, start_relay, upstream, tmp_path):
    upstream.create("hanuman", files={"a": "1"})
    leaf = start_slave()
    relay = start_relay([leaf])
    hook(leaf, "pre-update", wait_at(tmp_path / "go"))
    update = relay.signal()
    wait_until((tmp_path / "go.reached").exists)
    kill(find_fleet_run(relay), SIGKILL)
    record = relay.wait_update(update=update)
    (tmp_path / "go").touch()
    assert record["beneath"] == {"not started": 1}
    assert record["message"] == (
        "beneath: 1 not started: server-update was killed by signal 9"
    )


# -- many


def test_a_storm_of_signals_costs_two_runs(start_slave, start_relay, upstream, tmp_path):
    """While the first update runs, held by its hook, all others come: they are one more."""
    repo = upstream.create("hanuman", files={"a": "0"})
    leaf = start_slave()
    relay = start_relay([leaf])
    go = tmp_path / "go"
    hook(relay, "pre-update", wait_at(go))
    updates = [relay.signal()]
    wait_until((tmp_path / "go.reached").exists)
    updates += [relay.signal() for _ in range(STORM)]
    last = repo.commit({"a": "last"})
    updates.append(relay.signal())
    go.touch()
    assert relay.wait_update(update=updates[-1])["commit"] == last
    assert leaf.json("/status?repo=hanuman")["commit"] == last
    for update in updates[::40]:
        assert relay.wait_update(update=update)["state"] == "live"
    assert leaf.log().count("was asked for by") == 2


@pytest.mark.slow
def test_a_storm_of_pushes_costs_few_fleet_runs(start_slave, start_relay, upstream, tmp_path):
    repo = upstream.create("hanuman", files={"a": "0"})
    secret = make_secret(tmp_path / "secret", SECRET)
    leaves = [start_slave(SECRET_FILE=secret) for _ in range(STORM_LEAVES)]
    relay = start_relay(leaves, SECRET_FILE=secret)
    program = relay.bin / "server-update"
    program.rename(str(program) + ".real")
    put(program, COUNTED)

    def ask(slave, query, status=200):
        target = "/status?repo=hanuman" + query
        return slave.json(target, status, headers=signature(target))

    def wait_end(update):
        def ended():
            return ask(relay, "&update=%d&wait=30" % update)["state"] == "live"

        wait_until(ended, what="the end of update %d" % update)

    assert push(relay, after=repo.head())[0] == 202
    wait_end(ask(relay, "")["update"])
    commits = [repo.commit({"a": str(number)}, branch="author") for number in range(STORM)]
    began = time.monotonic()
    updates = []
    for number, last in enumerate(commits):
        time.sleep(max(0, began + STORM_S * number / STORM - time.monotonic()))
        new = repo.path / "new"
        new.write_text(last + "\n")
        new.rename(repo.path / "refs/heads/main")
        status, said = push(relay, after=last)
        assert status == 202
        updates.append(said["update"])
    took = time.monotonic() - began
    wait_end(updates[-1])
    assert [ask(slave, "")["commit"] for slave in [relay, *leaves]] == [last] * (1 + len(leaves))
    assert ask(relay, "")["beneath"] == {"live": len(leaves)}
    told = ask(relay, "&history=1")["updates"]
    # where many runs were needed the oldest are forgotten
    remembered = [update for update in updates if update >= told[-1]["update"]]
    assert updates[-1] in remembered
    for update in remembered:
        assert ask(relay, "&update=%d" % update)["state"] == "live"
    run_s = min(record["finished"] - record["started"] for record in told)
    fleet_runs = len((relay.home / "fleet-runs").read_text().splitlines()) - 1  # before the storm
    assert 1 <= fleet_runs <= 2 + took / run_s, (fleet_runs, took, run_s)


def test_what_runs_beneath_takes_no_place(start_relay, tmp_path):
    wait = "until [ -e \"$HOME/go\" ]; do sleep 0.02; done\necho '%s'" % SUMMARY
    relay = start_relay(["web1"], wait)
    stand_in(relay)
    updates = {name: relay.signal(name) for name in "abcdef"}
    calls = relay.home / "calls"
    wait_until(lambda: calls.exists() and len(calls.read_text().splitlines()) == 12)
    assert {relay.json("/status?repo=" + name)["state"] for name in updates} == {"running"}
    again = relay.signal("a")
    assert relay.json("/status?repo=a")["state"] == "queued", "one after the other"
    (relay.home / "go").touch()
    updates["a"] = again
    for name, update in updates.items():
        assert relay.wait_update(name, update)["beneath"] == {"live": 3}


def test_timeout_is_not_for_what_runs_beneath(start_relay):
    fleet = "sleep 8\necho '%s'" % SUMMARY
    relay = start_relay(["web1"], fleet, TIMEOUT=1, constants={"BACKSTOP_S": 5})
    stand_in(relay)
    assert relay.wait_update()["beneath"] == {"live": 3}


@pytest.mark.slow
def test_a_large_fleet_beneath_takes_no_memory(start_relay, tmp_path):
    lines = tmp_path / "lines"
    with lines.open("w") as file:
        file.write('{"type": "start", "slaves": %d}\n' % FLEET)
        file.write("no JSON\n[]\n%s\n%s\n" % ("[" * 60000, "x" * 1000000))
        for number in range(FLEET):
            result = {"type": "result", "slave": "web%d" % number, "message": "m"}
            result["outcome"] = "unreachable" if number % 2 else "live"
            file.write(json.dumps(result) + "\n")
        outcomes = {"live": FLEET // 2, "unreachable": FLEET // 2}
        bad = [{"slave": "web1", "outcome": "unreachable", "message": "x" * 100}] * 100
        file.write(json.dumps({"type": "summary", "outcomes": outcomes, "bad": bad}) + "\n")
    relay = start_relay(["web1"], "cat '%s'" % lines)
    stand_in(relay)
    relay.wait_update("small")
    before = rss_kib(relay.process.pid)
    record = relay.wait_update(timeout=120)
    assert record["message"] == "beneath: 50000 live, 50000 unreachable"
    assert record["beneath_bad"] == bad
    assert rss_kib(relay.process.pid) - before < 3000


# -- docs/recipes.md


@pytest.mark.slow
def test_one_before_the_rest(start_slave, start_relay, upstream):
    repo = upstream.create("hanuman", files={"a": "1"})
    (text,) = [one.text for one in BLOCKS if one.begins("recipes.md", "RELAY_OPTIONS=")]
    leaves = [start_slave() for _ in range(4)]
    relay = start_relay(leaves, RELAY_OPTIONS=text.strip().partition("=")[2])
    assert relay.wait_update()["beneath"] == {"live": 4}
    first = repo.head()
    repo.commit({"a": "bad"})
    hook(leaves[0], "pre-update", "#!/bin/sh\nexit 1\n")
    assert relay.wait_update()["beneath"] == {"failed": 1, "not started": 3}
    assert {leaf.json("/status?repo=hanuman")["commit"] for leaf in leaves} == {first}


def test_what_must_happen_once_happens_before_all_else(start_slave, start_relay, upstream):
    repo = upstream.create("hanuman", files={"a": "1"})
    leaves = [start_slave() for _ in range(3)]
    relay = start_relay(leaves)
    migrate = '#!/bin/sh\necho "$3" >>"$HOME/migrated"\n[ "$(cat a)" != bad ]\n'
    hook(relay, "pre-update", migrate)
    assert relay.wait_update()["beneath"] == {"live": 3}
    good, bad = repo.head(), repo.commit({"a": "bad"})
    assert relay.wait_update()["beneath"] == {"not started": 3}
    assert (relay.home / "migrated").read_text() == "%s\n%s\n" % (good, bad)
    assert {leaf.json("/status?repo=hanuman")["commit"] for leaf in leaves} == {good}


@pytest.mark.slow
def test_a_fleet_that_grows_and_shrinks(start_slave, start_relay, upstream):
    repo = upstream.create("hanuman", files={"a": "1"})
    old, new = start_slave(), start_slave()
    relay = start_relay([old])
    assert relay.wait_update()["beneath"] == {"live": 1}
    # The new one's first boot.
    env = dict(os.environ, HOME=str(new.home), SERVER_UPDATE_CONF=str(new.conf))
    subprocess.check_call([str(new.bin / "slave-activate"), "hanuman"], env=env)
    assert git(new, "rev-parse", "HEAD") == repo.head()
    made_anew = relay.slavelist.with_name("slavelist.txt.new")
    write_list(made_anew, [old, new])
    made_anew.rename(relay.slavelist)
    repo.commit({"a": "2"})
    assert relay.wait_update()["beneath"] == {"live": 2}
    assert git(new, "rev-parse", "HEAD") == repo.head()
    write_list(made_anew, [new])
    made_anew.rename(relay.slavelist)
    before, last = repo.head(), repo.commit({"a": "3"})
    assert relay.wait_update()["beneath"] == {"live": 1}
    assert (git(old, "rev-parse", "HEAD"), git(new, "rev-parse", "HEAD")) == (before, last)


# -- the start


def test_what_is_wrong_is_told_at_the_start(start_relay, tmp_path):
    relay = start_relay(["web1"])
    free = tmp_path / "free"
    missing, bad = tmp_path / "missing", tmp_path / "bad"
    bad.write_text("web1\nweb2:80x\n")
    wrong = "SLAVELIST or RELAY_OPTIONS: "
    for args, text in (
        (["--slavelist", missing], "%s%s: No such file or directory" % (wrong, missing)),
        (["--slavelist", bad], "%s%s:2: bad port '80x'" % (wrong, bad)),
        (["--slavelist", "list"], "bad SLAVELIST 'list' (set by --slavelist)"),
        (["--slavelist", relay.slavelist, "--relay-options=--bacth 3"], "--bacth"),
        (["--slavelist", relay.slavelist, "--relay-options=--batch 'x"], "bad RELAY_OPTIONS"),
        (["--relay-options=--help"], "bad RELAY_OPTIONS '--help' (set by --relay-options)"),
        (["--relay-options=-qh"], "bad RELAY_OPTIONS '-qh' (set by --relay-options)"),
        (
            ["--relay-options=--slave-key web1"],
            "bad RELAY_OPTIONS '--slave-key web1' (set by --relay-options)",
        ),
        (["--relay-options=--no-wait"], "bad RELAY_OPTIONS '--no-wait' (set by --relay-options)"),
        (["--relay-options=--batch 1 --list=/x"], "bad RELAY_OPTIONS"),
    ):
        got, stderr = start_by_hand(relay, "--port", 0, "--repos-dir", free, *args)
        assert got == 2 and text in stderr, stderr
        assert stderr.count("\n") == 1
    env = {"SERVER_UPDATE_SLAVELIST": str(relay.slavelist), "PATH": str(free)}
    (relay.bin / "server-update").unlink()
    forget_bin(relay)
    got, stderr = start_by_hand(relay, "--port", 0, "--repos-dir", free, **env)
    assert (got, stderr) == (
        1,
        "slave.py: no server-update on PATH, beside slave.py or in /bin\n",
    )


# -- update-ended


def ended_hook(folder):
    """Notes its arguments, a line a call."""
    return '#!/bin/sh\necho "$@" >>"%s/ended"\n' % folder


def notes(folder):
    path = folder / "ended"
    return path.read_text().splitlines() if path.exists() else []


def test_update_ended_runs_after_each_update(start_slave, upstream, tmp_path):
    slave = start_slave()
    stand_in(slave)
    slave.wait_update()
    hook(slave, "update-ended", ended_hook(tmp_path))
    slave.wait_update()
    wait_until(lambda: len(notes(tmp_path)) == 1)
    stand_in(slave, text="#!/bin/sh\necho 'fatal: no such thing' >&2\nexit 1\n")
    slave.wait_update("other")
    wait_until(lambda: len(notes(tmp_path)) == 2)
    assert notes(tmp_path) == [
        "hanuman live - %s " % ONE,
        "other failed - - no such thing",
    ]
    wait_until(lambda: not record_file(slave, "other")["untold"])
    slave.stop()
    slave.start()
    slave.wait_update("third")
    wait_until(lambda: notes(tmp_path)[-1].startswith("third "))
    assert len(notes(tmp_path)) == 3, "once each, and none for what ended before there was a hook"


def test_update_ended_is_run_again_where_it_was_killed(start_slave, tmp_path):
    slave = start_slave()
    stand_in(slave)
    hook(slave, "update-ended", ended_hook(tmp_path) + "[ -e '%s/go' ] || sleep 1000\n" % tmp_path)
    slave.wait_update()
    wait_until(lambda: notes(tmp_path))
    assert slave.wait_update("other")["state"] == "live", "apart from the queue"
    kill_hard(slave)
    slave.start()
    wait_until(lambda: len(notes(tmp_path)) == 2)
    began = time.monotonic()
    assert slave.stop() == 0
    assert time.monotonic() - began < 30
    (tmp_path / "go").touch()
    slave.start()
    wait_until(lambda: len(notes(tmp_path)) == 4)
    assert sorted(notes(tmp_path)) == ["hanuman live - %s " % ONE] * 3 + ["other live - %s " % ONE]
    # Once it is noted on disk, it is not run again.
    wait_until(lambda: not record_file(slave)["untold"])
    wait_until(lambda: not record_file(slave, "other")["untold"])
    slave.stop()
    slave.start()
    slave.wait_update("third")
    wait_until(lambda: notes(tmp_path)[-1].startswith("third "))
    assert len(notes(tmp_path)) == 5


def test_what_is_wrong_with_update_ended_is_only_logged(start_slave):
    slave = start_slave()
    stand_in(slave)
    hook(slave, "update-ended", "#!/bin/sh\necho 'no mail' >&2\nexit 3\n")
    assert slave.wait_update()["message"] == ""
    wait_until(lambda: "hanuman: update-ended: failed with exit status 3" in slave.log())
    assert "hanuman: update-ended: no mail" in slave.log()
    hook(slave, "update-ended", "no script")
    assert slave.wait_update()["state"] == "live"
    wait_until(lambda: "hanuman: update-ended: can't run [Errno 8]" in slave.log())
    wait_until(lambda: not record_file(slave)["untold"])
