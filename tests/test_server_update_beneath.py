"""Relays: what is beneath them is counted, named and judged, whatever a relay says of it."""

import json
import os
import pty
import subprocess

import pytest
from farm import COMMIT, error, hold, mute, updates
from processes import wait_until
from product import SERVER_UPDATE, daily

BAD = [
    {"slave": "web3", "outcome": "unreachable", "message": "connection refused"},
    {"slave": "web4", "outcome": "unreachable", "message": "connection refused"},
    {"slave": "relay2 > db1", "outcome": "failed", "message": "no space left"},
]
COUNTS = {"live": 298, "unreachable": 2, "failed": 1}
WORDS = "beneath: 298 live, 2 unreachable, 1 failed"


def relay(counts, bad=None, message="", **more):
    """A kind that has gone live, with these beneath."""
    return updates(beneath=counts, beneath_bad=bad, message=message, hook=None, **more)


def test_what_is_beneath_is_told_in_json_and_summed(farm, update):
    entries = [
        farm.add(relay(COUNTS, BAD, WORDS)),
        farm.add(relay({"live": 5})),
        farm.add(updates()),
    ]
    done = update(entries, "--json")
    assert done.returncode == 1
    assert done.outcomes == dict(zip(entries, ["beneath failed", "live", "live"]))
    first, second, third = [done.results[entry] for entry in entries]
    assert (first["beneath"], first["beneath_bad"], first["message"]) == (COUNTS, BAD, WORDS)
    assert second["beneath"] == {"live": 5}
    assert "beneath_bad" not in second
    assert "beneath" not in third
    assert done.summary["beneath"] == {"live": 303, "unreachable": 2, "failed": 1}
    assert done.summary["outcomes"] == {"beneath failed": 1, "live": 2}


def test_without_a_relay_nothing_is_said_of_any(farm, update):
    done = update([farm.add(updates())], "--json")
    assert "beneath" not in json.dumps(done.lines)


@pytest.mark.parametrize("many", [False, True])
def test_those_beneath_that_are_not_good_are_named(farm, update, many):
    """Where each slave has its line, and where they are summed up."""
    entry = farm.add(relay(COUNTS, BAD, WORDS))
    entries = [entry] + [farm.add(relay({"live": 1})) for _ in range(60 if many else 2)]
    done = update(entries)
    assert done.returncode == 1
    *causes, totals, beneath, _ = done.stdout.partition("\nto ")[0].strip().splitlines()
    causes = [line.strip() for line in causes if line][-6 if many else -4 :]
    assert totals.startswith("hanuman: %d live, 1 beneath failed of " % (len(entries) - 1))
    assert beneath == "beneath: %d live, 1 failed, 2 unreachable" % (298 + len(entries) - 1)
    if many:
        assert causes[:2] == ["1 beneath failed: " + WORDS, entry]
    assert causes[-4:] == [
        "1 failed: no space left",
        entry + " > relay2 > db1",
        "2 unreachable: connection refused",
        "%s > web[3-4]" % entry,
    ]


def test_the_status_names_them_too(farm, update):
    entry = farm.add(relay(COUNTS, BAD, WORDS))
    done = update([entry], "--status", "--json")
    assert done.results[entry]["beneath"] == COUNTS
    assert done.results[entry]["beneath_bad"] == BAD
    assert done.summary["beneath"] == COUNTS
    said = update([entry], "--status").stdout
    assert "    %s > web[3-4]\n" % entry in said


def test_an_update_that_failed_on_a_relay_failed(farm, update):
    """It says of all beneath it that they were not started."""
    entry = farm.add(relay({"not started": 7}, state="failed", message="no net"))
    done = update([entry], "--json")
    assert done.outcomes == {entry: "failed"}
    assert done.results[entry]["beneath"] == {"not started": 7}


def test_a_circle_is_refused(farm, update):
    entry = farm.add(error("409 Conflict", "a circle of relays: this one is beneath itself"))
    done = update([entry], "--json")
    assert done.outcomes == {entry: "refused"}
    message = "a circle of relays: this one is beneath itself (HTTP 409)"
    assert done.results[entry]["message"] == message
    assert farm.signals[entry.split(":")[0]] == 1


@pytest.mark.parametrize(
    ("counts", "outcome"),
    daily(
        4,
        [
            ({"live": 1, "of a later version": 1}, "beneath failed"),
            ({"live": 1, "of a later version": 0}, "live"),
            ({"\x1b[2J" * 999: 1}, "beneath failed"),
            ({"live": -1}, "failed"),  # it is asked again some times, like all that follow
            ({"live": True}, "failed"),
            ({"live": 1.5}, "failed"),
            ({"live": None}, "failed"),
            ({"live": 10**40}, "failed"),
            ("many", "failed"),
        ],
    ),
)
def test_counts_of_any_kind_are_counted_or_make_no_sense(farm, update, counts, outcome):
    entry = farm.add(relay(counts))
    # The pauses before it is asked again are shorter in this copy.
    done = update([entry], "--json", "--timeout=20", constants={"MAX_PAUSE_S": 0.2})
    assert done.outcomes == {entry: outcome}
    assert "2J" not in json.dumps(done.summary)


@pytest.mark.parametrize(
    "bad",
    [
        "web3",
        {"slave": "web3"},
        [1, None, "web3", []],
        [{"slave": 7, "outcome": ["x"], "message": {"a": "b"}}],
        [{}] * 1000,
        [{"slave": "x\x1b[2J", "outcome": "of a later version", "message": "y" * 9000}],
    ],
)
def test_names_of_any_kind_harm_nobody(farm, update, bad):
    entry = farm.add(relay({"live": 1, "failed": 1}, bad))
    done = update([entry], "--json")
    assert done.outcomes == {entry: "beneath failed"}
    told = done.results[entry].get("beneath_bad", [])
    assert len(told) <= 100
    for one in told:
        assert set(one) == {"slave", "outcome", "message"}
        assert one["outcome"] == "failed"
        assert one["slave"].isprintable() and len(one["message"]) <= 300
    plain = update([entry])
    assert plain.returncode == 1
    assert "\x1b" not in plain.stdout
    assert "commits: %s on 1\n" % COMMIT[:7] in plain.stdout


def test_a_relay_above_reads_in_the_last_line_who_is_not_good(farm, update):
    above = farm.add(relay(COUNTS, BAD, WORDS))
    dead = farm.add(error("500 x"))
    done = update([above, farm.add(updates()), dead], "--json", env=VIA)
    assert sorted(map(repr, done.summary["bad"][:2])) == sorted(map(repr, [
        {"slave": above, "outcome": "beneath failed", "message": WORDS},
        {"slave": dead, "outcome": "failed", "message": "Internal Server Error (HTTP 500)"},
    ]))
    below = [dict(one, slave=above + " > " + one["slave"]) for one in BAD]
    assert done.summary["bad"][2:] == below
    assert "bad" not in update([farm.add(updates())], "--json", env=VIA).summary
    assert "bad" not in update([dead], "--json").summary, "nobody but a relay needs it"


@pytest.mark.parametrize("message, count", [("short", 100), ("x" * 400, 48)])
def test_to_a_relay_above_at_most_so_many_are_named(farm, update, message, count):
    bad = [dict(one, message=message) for one in BAD[:1] * 100]
    entries = [farm.add(relay(COUNTS, bad, "")) for _ in range(2)]
    named = update(entries, "--json", env=VIA).summary["bad"]
    assert {one["slave"] for one in named[:2]} == set(entries)
    assert len(named) == count or len(named) < count and len(json.dumps(named)) > 16000
    assert len(json.dumps(named)) <= 16384
    assert max(len(one["message"]) for one in named) <= 300


# A relay reads what the server-update that it has begun prints: once nobody does, it was killed.

VIA = {"SERVER_UPDATE_VIA": "0123456789abcdef"}


def begin(tmp_path, entries, *options, stdout, env=VIA, before=()):
    """server-update with this as its standard output, called by `before`."""
    slavelist = tmp_path / "slavelist.txt"
    slavelist.write_text("".join(entry + "\n" for entry in entries))
    command = [*before, *SERVER_UPDATE, "--list", str(slavelist), *options, "hanuman"]
    environ = dict(os.environ, **env)
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, env=environ)


def begin_unread(tmp_path, entries, *options, **kwargs):
    """The same with a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as stdout:
        return begin(tmp_path, entries, *options, stdout=stdout, **kwargs)


def finish(run):
    """Its exit status, and what it said on standard error."""
    try:
        _, said = run.communicate(timeout=300)
    finally:
        run.kill()
    return run.returncode, said.decode()


@pytest.mark.parametrize("option", ["--json", "--at-once=1"])
def test_without_its_relay_it_signals_nobody(farm, tmp_path, option):
    entries = [farm.add(updates()) for _ in range(3)]
    code, said = finish(begin_unread(tmp_path, entries, option))
    assert (code, farm.requests) == (130, [])
    assert said == "server-update: interrupted: 0 not good, 0 unfinished, 3 not started\n"


@pytest.mark.parametrize("kind", [mute, hold, updates(600)])
def test_it_ends_with_its_relay_while_all_are_waited_for(farm, tmp_path, kind):
    """Whether they hold back the answer to the signal, to a poll, or have no outcome yet."""
    entries = [farm.add(kind) for _ in range(3)]
    options = ("--parallel=2", "--at-once=2")
    run = begin(tmp_path, entries, *options, stdout=subprocess.PIPE)
    reader, run.stdout = run.stdout, None
    asked = farm.signals if kind is mute else farm.polls
    wait_until(lambda: len(asked) == 2)
    assert run.poll() is None
    reader.close()
    code, said = finish(run)
    assert code == 130
    assert said == "server-update: interrupted: 0 not good, 2 unfinished, 1 not started\n"
    assert len(farm.addresses_signalled()) == 2


def test_nobody_reads_it_and_no_relay_has_begun_it(farm, tmp_path):
    """`| head`, say: it goes on."""
    entries = [farm.add(updates()) for _ in range(3)]
    env = {"SERVER_UPDATE_VIA": ""}
    assert finish(begin_unread(tmp_path, entries, "--at-once=1", env=env)) == (0, "")
    assert len(farm.polls) == 3


@pytest.mark.parametrize("where", ["file", "null", "closed", "terminal", "hung up"])
def test_where_its_output_is_no_pipe_a_relays_run_goes_on(farm, tmp_path, where):
    main, terminal = pty.openpty()
    paths = {"file": str(tmp_path / "out"), "null": os.devnull}
    before = ["sh", "-c", 'exec "$@" >&-', "sh"] if where == "closed" else []
    with open(paths.get(where, os.ttyname(terminal)), "wb", buffering=0) as stdout:
        os.close(terminal)
        if where == "hung up":
            os.close(main)
        run = begin(tmp_path, [farm.add(updates(0.3))], stdout=stdout, before=before)
    assert finish(run) == (1 if where == "hung up" else 0, "")  # there its results are lost
    assert len(farm.polls) == 1
    if where != "hung up":
        os.close(main)
