"""Small lies built into a copy of server-update, each of which says good in one place: all told.

A check holds for the program as it is, and not for one that has the lie.
"""

import json
import subprocess

import pytest
from farm import COMMIT, OTHER, at_once, error, http, raw, record, updates
from faults.mutations import break_python
from product import ISOLATED, ROOT


def answers(**body):
    """A kind that answers every question with this."""
    return lambda request: at_once(http("200 OK", json.dumps(body)))


def known(state="live", **fields):
    """A kind that tells a record of slaves that know of hooks and pins."""
    return updates(**dict({"state": state, "hook": None, "pin": None}, **fields))


def whole(**records):
    """A kind that tells the status of all repositories."""
    repos = {name: record(repo=name, **fields) for name, fields in records.items()}
    return answers(version="2", repos=repos)


GOOD = known()
CHECKS = {  # name: what the slaves do, options, what must be in the output or not, exit status
    "hook": ([known(hook=1)], ["-q"], ["  hook failed  ", "1 hook failed of 1"], 1),
    "hook of 1.0": ([updates(message="hook failed (1)")], [], ["  hook failed  "], 1),
    "canary": ([known(hook=1), GOOD], ["--batch=1"], ["1 not started of 2"], 1),
    "beneath": ([known(beneath={"live": 1, "failed": 1})], [], ["  beneath failed  "], 1),
    "no id": ([raw(http("200 OK", "It works!", "text/html"))], [], ["  signalled  "], 1),
    "timeout": ([updates(1000)], ["--timeout=4"], ["  timeout  "], 1),
    "refused": ([error("403 No"), GOOD], [], ["1 live, 1 refused of 2"], 1),
    "pin": ([known(pin=None)], ["--commit", COMMIT], ["a newer update put 1d5d931 live"], 1),
    "too old": ([updates()], ["--commit", COMMIT], ["too old for --commit"], 1),
    "commits": ([GOOD, known(commit=OTHER)], [], ["to make them equal"], 1),
    "status failed": ([known("failed")], ["--status"], ["exit status 1: 1 slave not good"], 1),
    "status gone": ([known(commit=None)], ["--status"], ["the tree is gone or empty"], 1),
    "status running": ([answers(**record("running"))], ["--status"], ["update running"], 1),
    "status commits": ([GOOD, known(commit=OTHER)], ["--status"], ["live at 2 commits"], 1),
    "status of all": (
        [whole(hanuman={}, b={"state": "failed", "commit": None})],
        ["--status", "--no-repo"],
        ["b  failed"],
        1,
    ),
    "history": ([error("403 No")], ["--history"], ["  refused  "], 1),
    "list of failed": (
        [known(hook=1), GOOD],
        ["--write-failed=/dev/stdout"],
        ["# hook failed"],
        1,
    ),
}
RETURN = "def broken(*_):\n    return %s"
ALSO_GOOD = """
def broken(outcome, *more):
    return outcome == "%s" or original(outcome, *more)"""
LIES = {  # name: the function, what takes its place, the check that finds it
    "a hook that failed is good": ("is_good", ALSO_GOOD % "hook failed", "canary"),
    "to be signalled is enough": (
        "is_good",
        """
def broken(outcome, *_):
    return original(outcome, False)""",
        "no id",
    ),
    "what takes too long is good": ("is_good", ALSO_GOOD % "timeout", "timeout"),
    "to be refused is good": ("is_good", ALSO_GOOD % "refused", "refused"),
    "no hook ever fails": ("has_failed_hook", RETURN % "False", "hook"),
    "hooks of 1.0 never fail": (
        "has_failed_hook",
        """
def broken(body):
    return body.get("hook") is not None""",
        "hook of 1.0",
    ),
    "nothing is beneath": ("read_beneath", RETURN % "{}", "beneath"),
    "any commit is the pin": ("why_other", RETURN % "''", "pin"),
    "1.0 knows of pins": (
        "why_other",
        """
def broken(record, *more):
    return "" if record.pin == UNTOLD else original(record, *more)""",
        "too old",
    ),
    "what failed before is no matter": (
        "judge_repository",
        """
def broken(record):
    record.state = "live"
    return original(record)""",
        "status failed",
    ),
    "a tree that is gone is live": (
        "judge_repository",
        """
def broken(record):
    return original(record)._replace(outcome="live")""",
        "status gone",
    ),
    "what is not known yet is live": (
        "judge_repository",
        """
def broken(record):
    return original(record)._replace(outcome="live")""",
        "status running",
    ),
    "what failed was never live": (
        "was_never_live",
        """
def broken(record):
    return record.state == "failed" """,
        "status of all",
    ),
    "commits are not compared": ("count_commits", RETURN % "{}", "commits"),
    "commits are not compared by --status": (
        "why_not_good",
        """
def broken(results):
    return "" if all(result.is_good for result in results) else "1 slave not good" """,
        "status commits",
    ),
    "the exit status is always 0": ("exit_code", RETURN % "0", "hook"),
    "-q is always silent": ("Report.write_line", RETURN % "None", "hook"),
    "the list of those that failed is empty": (
        "Report.save_failed",
        RETURN % "True",
        "list of failed",
    ),
    "the totals count all as live": (
        "list_counts",
        """
def broken(counts):
    return "%d live" % sum(counts.values())""",
        "refused",
    ),
    "a slave that does not answer has no history": (
        "judge_history",
        """
def broken(*_):
    return Step(END, "answered", updates=[])""",
        "history",
    ),
}


@pytest.fixture
def check(farm, tmp_path):
    """check(name, text): run this text of server-update as a check says; whether it holds."""

    def run(name, text):
        kinds, options, words, code = CHECKS[name]
        script = tmp_path / "server-update"
        script.write_text(text, encoding="utf-8")
        slavelist = tmp_path / "slavelist.txt"
        slavelist.write_text("".join(farm.add(kind) + "\n" for kind in kinds))
        repo = [] if "--no-repo" in options else ["hanuman"]
        options = [option for option in options if option != "--no-repo"]
        done = subprocess.run(
            [*ISOLATED, str(script), "--list", str(slavelist), "--retries=0", *options, *repo],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=300,
        )
        assert "Traceback" not in done.stderr
        return done.returncode == code and all(word in done.stdout for word in words)

    return run


TEXT = (ROOT / "server-update").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CHECKS)
def test_the_truth_passes(check, name):
    assert check(name, TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_found(check, name):
    function, code, found_by = LIES[name]
    assert not check(found_by, break_python(TEXT, function, code))


def test_lies_are_many():
    assert len(LIES) >= 15
    assert {found_by for _, _, found_by in LIES.values()} >= set(CHECKS) - {"canary"}
