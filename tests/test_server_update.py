"""The pure core of server-update: batches, requests, what replies mean, exit codes, the report."""

import argparse
import http.client
import io
import json
import re

import pytest
from farm import COMMIT, OTHER, PREVIOUS, REPO, UPDATE, record


def slaves(number):
    return list(range(number))


def sizes(batches):
    return [len(batch) for batch in batches]


@pytest.mark.parametrize(
    ("spec", "total", "expected"),
    [
        ("10", 25, [10, 10, 5]),
        ("100", 25, [25]),
        ("25%", 10, [3, 3, 3, 1]),  # 2.5 is rounded up
        ("1%", 3, [1, 1, 1]),  # at least one
        ("100%", 7, [7]),
        ("1,10,25%", 100, [1, 10, 25, 25, 25, 14]),
        ("1,10,25%", 5, [1, 4]),
        ("1,2", 7, [1, 2, 2, 2]),
    ],
)
def test_batches(server_update, spec, total, expected):
    batches = server_update.split_batches(slaves(total), server_update.read_amounts(spec))
    assert sizes(batches) == expected
    assert sum(batches, []) == slaves(total)


@pytest.mark.parametrize(
    "spec", ["", "x", "-1", "1,,2", "1,", "%", "1.5", "10%%", " 1", "1\n", "٣", "9999999999"]
)
def test_bad_sizes(server_update, spec):
    with pytest.raises(argparse.ArgumentTypeError, match="is not like 10, 25% or 1,10,25%"):
        server_update.read_amounts(spec)


@pytest.mark.parametrize(
    ("entry", "signal", "status"),
    [
        ("web1", "/?repo=hanuman", "/status?repo=hanuman&update=5&wait=25"),
        ("http://web1/get", "/get?repo=hanuman", "/status?repo=hanuman&update=5&wait=25"),
        ("http://web1/get/", "/get/?repo=hanuman", "/status?repo=hanuman&update=5&wait=25"),
        (
            "http://web1/a/get/?k=1&l",
            "/a/get/?k=1&l&repo=hanuman",
            "/a/status?k=1&l&repo=hanuman&update=5&wait=25",
        ),
        (
            "http://web1/widget/",
            "/widget/?repo=hanuman",
            "/widget/status?repo=hanuman&update=5&wait=25",
        ),
    ],
)
def test_what_is_asked(server_update, entry, signal, status):
    slave, asked = server_update.parse_slave(entry), {"repo": REPO, "update": 5}
    path = server_update.request_path
    assert path(slave, "", repo=REPO, ref=None) == signal
    assert path(slave, "status", **asked, wait=25) == status
    assert path(slave, "status", **asked, wait=None) == status.replace("&wait=25", "")


def test_what_is_asked_for_a_ref_and_for_the_status(server_update):
    slave = server_update.parse_slave("web1")
    path = server_update.request_path
    assert path(slave, "", repo=REPO, ref="fix/ü&x") == "/?repo=hanuman&ref=fix%2F%C3%BC%26x"
    assert path(slave, "status", repo=REPO) == "/status?repo=hanuman"
    assert path(slave, "status", repo=None) == "/status"


def reply(server_update, status=200, body=None, **more):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server_update.Reply(status, text=text, **more)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (202, {"update": 7}, ("follow", "", "", None)),
        (200, {"update": 7}, ("follow", "", "", None)),
        (200, b"updating hanuman", ("end", "signalled", "", None)),
        (200, b"", ("end", "signalled", "", None)),
        (204, b"", ("end", "signalled", "", None)),
        (200, b"<html>", ("end", "signalled", "", None)),
        (200, {"update": "7"}, ("end", "signalled", "", None)),
        (200, [1], ("end", "signalled", "", None)),
        (200, b"[" * 30000, ("end", "signalled", "", None)),
        (302, b"", ("end", "refused", "Found (HTTP 302, not followed)", None)),
        (400, {"error": "bad repo"}, ("end", "refused", "bad repo (HTTP 400)", None)),
        (401, {"error": 5}, ("end", "refused", "Unauthorized (HTTP 401)", None)),
        (404, b"<html>", ("end", "refused", "Not Found (HTTP 404)", None)),
        (499, b"", ("end", "refused", "error (HTTP 499)", None)),
        (
            500,
            {"error": "a\nb\x1b[2J\u202e"},
            ("end", "failed", r"a\nb\x1b[2J\u202e (HTTP 500)", None),
        ),
        (503, {"error": "stopping"}, ("retry", "failed", "stopping (HTTP 503)", "retries")),
    ],
)
def test_the_reply_to_a_signal(server_update, status, body, expected):
    step = server_update.judge_signal(reply(server_update, status, body, pause_s=5), True)
    assert (step.action, step.outcome, step.message, step.budget) == expected
    assert step.pause_s == (5 if status == 503 else 0)
    assert step.update == (7 if step.action == "follow" else None)


def test_no_reply_to_a_signal(server_update):
    step = server_update.judge_signal(server_update.Reply(0, "connection refused"), True)
    assert step[:3] == ("retry", "unreachable", "connection refused")
    assert step.budget == "retries"
    local = server_update.Reply(0, "too many open files", True)
    step = server_update.judge_signal(local, True)  # not the slave's fault
    assert (step.action, step.budget) == ("retry", "shortages")


def test_broken_json_is_no_answer(server_update):
    broken = reply(server_update, 202, b'{"update": 1')
    step = server_update.judge_signal(broken, True)
    assert step[:3] == ("retry", "unreachable", "answered with broken JSON")
    assert step.budget == "retries"


def test_without_following_a_signal_is_enough(server_update):
    step = server_update.judge_signal(reply(server_update, 202, {"update": 7}), False)
    assert step == server_update.Step("end", "signalled")


def poll(server_update, ref=None, status=200, body=None):
    return server_update.judge_poll(reply(server_update, status, body), REPO, ref, UPDATE)


def test_the_outcome_of_an_update(server_update):
    live = poll(server_update, body=record(message="the post-update hook failed"))
    assert live == server_update.Step(
        "end", "live", "the post-update hook failed", COMMIT, PREVIOUS
    )
    failed = poll(server_update, body=record("failed", message="no such\x07 branch"))
    assert failed[:3] == ("end", "failed", r"no such\x07 branch")
    assert poll(server_update, body=record(update=UPDATE + 5)).outcome == "live"
    assert poll(server_update, body=record(commit="-", previous=None)).commit is None
    for state in ("queued", "running"):
        assert poll(server_update, body=record(state))[:3] == ("wait", "timeout", "")


@pytest.mark.parametrize(
    ("asked", "told", "message"),
    [
        (None, "v2", "a newer update put v2 live"),
        ("v1", "v2", "a newer update put v2 live"),
        ("v1", None, "a newer update put the default branch live"),
        ("v1", 7, "a newer update put the default branch live"),
    ],
)
def test_another_ref_than_the_one_asked_for_is_no_success(server_update, asked, told, message):
    step = poll(server_update, asked, body=record(ref=told))
    assert step[:3] == ("end", "failed", message)
    assert poll(server_update, "v1", body=record(ref="v1")).outcome == "live"
    assert poll(server_update, None, body=record(ref="")).outcome == "live"


def test_a_poll_without_an_answer_is_no_outcome(server_update):
    for status, body in ((0, b""), (500, b""), (502, b"<html>"), (503, {"error": "stopping"})):
        step = poll(server_update, status=status, body=body)
        assert step[:2] == ("wait", "timeout")


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"error": "no such update"}),
        (401, b""),
        (302, b""),
        (200, b""),
        (200, b"<html>"),
        (200, []),
        (200, {"repo": REPO}),
        (200, record(repo="sugriva")),
        (200, record(update=UPDATE - 1)),
        (200, record(update="1")),
        (200, record("done")),
        (200, record([])),
        (200, record(commit="x; reboot")),
        (200, record(commit=COMMIT.upper())),
        (200, record(commit=COMMIT + "\n")),
        (200, record(commit=7)),
        (200, record(previous=["x"])),
        (200, {key: value for key, value in record().items() if key != "commit"}),
    ],
)
def test_nonsense_is_asked_about_again_and_then_a_failure(server_update, status, body):
    step = poll(server_update, status=status, body=body)
    assert step[:2] == ("retry", "failed")
    assert step.budget == "doubts"
    assert 0 < server_update.DOUBTS_ALLOWED < 10


def test_the_header_of_an_answer(server_update):
    """As http.client asks for it: 3.15 also says how many fields it would have."""
    stream = io.BytesIO(b"Content-LENGTH: 2\r\ncontent-length:3\r\nA: b:c \r\n\r\n{}")
    found = server_update.parse_headers(stream, _max_headers=None)
    assert found == {"content-length": "2", "a": "b:c"}
    assert stream.read() == b"{}"


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (b"", http.client.IncompleteRead),
        (b"Content-Length: 2\r\n", http.client.IncompleteRead),
        (b"A: b\r\n" * 101 + b"\r\n", http.client.HTTPException),
    ],
)
def test_a_header_without_an_end(server_update, header, error):
    with pytest.raises(error) as caught:
        server_update.parse_headers(io.BytesIO(header))
    assert caught.type is error


def test_the_status_of_a_repository(server_update):
    def status(body, repo=REPO, code=200):
        return server_update.judge_status(reply(server_update, code, body), repo)

    assert status(record(finished=0.0)) == [
        server_update.Step("end", "live", "since 1970-01-01 00:00:00Z", commit=COMMIT)
    ]
    assert status(record("failed", message="no net"))[0][1:3] == ("live", "update failed no net")
    assert status(record("running"))[0][1:3] == ("live", "update running")
    assert status(record("failed", commit=None, message="no net"))[0][1:3] == (
        "failed",
        "update failed no net",
    )
    assert status(record("running", commit=None))[0][1:3] == ("timeout", "update running")
    assert status({"error": "never asked for"}, code=404)[0].outcome == "refused"
    assert status(b"<html>")[0].outcome == "failed"
    for finished in (None, "x", 1e300, float("nan"), -1, True):
        assert status(record(finished=finished))[0].outcome == "live"
    both = status(
        {"version": "1", "repos": {REPO: record(), "b": record(repo="b", commit=OTHER)}}, None
    )
    assert [(step.repo, step.commit) for step in both] == [(REPO, COMMIT), ("b", OTHER)]
    assert status({"repos": {}}, None)[0][1:3] == ("live", "no repository yet")
    for body in (
        {},
        {"repos": []},
        {"repos": {"a": 1}},
        {"repos": {"\x1b[2J": record(repo="\x1b[2J")}},
        {"repos": {"a": record(repo="b")}},
        [],
    ):
        assert status(body, None)[0].outcome == "failed", body


def result(
    server_update,
    slave="web1",
    outcome="live",
    commit=COMMIT,
    previous=PREVIOUS,
    seconds=1.234,
    message="",
    repo=None,
):
    return server_update.Result(slave, outcome, commit, previous, seconds, message, repo)


def test_exit_code(server_update):
    def code(*results):
        return server_update.exit_code([result(server_update, **fields) for fields in results])

    live, old = {}, {"outcome": "signalled", "commit": None}
    assert code(live, live, old) == 0
    for outcome in ("failed", "refused", "unreachable", "timeout", "not started"):
        assert code(live, {"outcome": outcome, "commit": None}) == 1
    assert code(live, {"commit": OTHER}) == 1
    assert code(live, {"commit": None}) == 1  # an empty repository is another commit
    assert code({"repo": "a"}, {"repo": "b", "commit": OTHER}) == 0
    assert code({"repo": "a"}, {"repo": "a", "commit": OTHER}) == 1


def test_result_lines(server_update):
    def line(width=6, **fields):
        return server_update.format_result(result(server_update, **fields), width)

    assert line() == "web1    live         1d5d931  was 8c2f4e0    1.2 s"
    assert line(previous=COMMIT) == "web1    live         1d5d931  unchanged      1.2 s"
    assert line(previous=None) == "web1    live         1d5d931  -              1.2 s"
    assert line(outcome="failed", message="no net") == (
        "web1    failed       1d5d931  still live     1.2 s  no net"
    )
    assert line(outcome="unreachable", commit=None, previous=None, message="x") == (
        "web1    unreachable  -        -              1.2 s  x"
    )
    assert line(repo="hanuman", previous=None) == (
        "web1 hanuman  live         1d5d931  -              1.2 s"
    )


def test_causes_are_folded_with_the_worst_first_and_names_are_limited(server_update):
    results = [
        result(server_update, "web%d" % n, "unreachable", message="refused") for n in range(250)
    ]
    results += [
        result(server_update, "db1", "failed", message="b"),
        result(server_update, "db2", "failed", message="a"),
        result(server_update, "db3", "failed", message="a"),
        result(server_update, "ok", message=""),
        result(server_update, "hooked", message="the hook failed"),
        result(server_update, "asked", message="since 2026"),
    ]
    lines = server_update.format_causes(results)
    assert lines[:6] == [
        "1 live: the hook failed",
        "    hooked",
        "2 failed: a",
        "    db2, db3",
        "1 failed: b",
        "    db1",
    ]
    assert lines[6] == "250 unreachable: refused"
    assert lines[7].startswith("    web0, web1, ") and lines[7].endswith(", web199, and 50 more")
    many = [result(server_update, "web%d" % n, "failed", message=str(n)) for n in range(1000)]
    *lines, last = server_update.format_causes(many)
    assert len(lines) == 100
    assert last == "950 more, each for a reason of its own: -v names them"


def test_totals_by_outcome_and_by_commit(server_update):
    counts = {"live": 2, "unreachable": 1, "failed": 0}
    results = [
        result(server_update),
        result(server_update),
        result(server_update, outcome="unreachable", commit=None, previous=None),
    ]
    lines = server_update.format_totals(
        results, server_update.Counter(counts), "hanuman", 12.34
    )
    assert lines == ["hanuman: 2 live, 1 unreachable of 3, 12.3 s", "commits: 1d5d931 on 2"]


def advice(server_update, argv, *pairs):
    results = [
        result(server_update, commit=commit, previous=previous) for commit, previous in pairs
    ]
    return server_update.format_advice(results, argv)


def test_the_way_back_is_told_where_there_is_one(server_update, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["/opt/su/server-update"])
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    argv = ["--limit", "web *", "--ref=x", "--write-failed", "f", "hanuman"]
    assert advice(server_update, argv, (COMMIT, PREVIOUS), (COMMIT, PREVIOUS), (COMMIT, None)) == [
        "to go back: /opt/su/server-update --ref %s --limit 'web *' hanuman" % PREVIOUS
    ]
    for pairs in (
        [(COMMIT, COMMIT)],
        [(COMMIT, None)],
        [(COMMIT, PREVIOUS), (COMMIT, OTHER)],
        [(COMMIT, PREVIOUS), (COMMIT, COMMIT)],
        [(None, None)],
    ):
        assert advice(server_update, ["hanuman"], *pairs) == []


def test_slaves_at_different_commits_are_told_how_to_be_made_equal(
    server_update, monkeypatch, tmp_path
):
    monkeypatch.setattr("sys.argv", ["/opt/su/server-update"])
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    lines = advice(server_update, ["hanuman"], (COMMIT, PREVIOUS), (OTHER, PREVIOUS))
    assert lines == [
        "to make them equal: /opt/su/server-update --ref %s hanuman" % OTHER,
        "to go back: /opt/su/server-update --ref %s hanuman" % PREVIOUS,
    ]


def test_the_program_is_named_as_it_can_be_called(server_update, monkeypatch, tmp_path):
    program = tmp_path / "server-update"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert server_update.command_again(["x"], "v1") == "server-update --ref v1 x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ü 例", "plain ü 例"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\x1b]0;x\x07", r"\x1b]0;x\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202e\u200b", r"\u202e\u200b"),
        ("\ud800", r"\ud800"),
        ("x" * 500, "x" * 300),
        (None, ""),
        (7, ""),
        ([], ""),
    ],
)
def test_untrusted_text_is_one_short_harmless_line(server_update, text, expected):
    assert server_update.printable(text) == expected


def test_progress(server_update):
    counts = server_update.Counter({"live": 5, "failed": 1})
    assert server_update.format_progress("hanuman", 12, counts, 61.9) == (
        "hanuman  6 of 12  1:01  [##########          ]  5 live, 1 failed"
    )


SECONDS = "--timeout, --connect-timeout: above 0 and below 1e9 seconds"
MISTAKES = [
    ([], "which repository?"),
    (["../x"], "bad repository name '../x'"),
    (["x.git"], "bad repository name 'x.git'"),
    (["x\n"], r"bad repository name 'x\n'"),
    (["--ref", "a..b", "x"], "bad ref 'a..b'"),
    (["--ref=-x", "x"], "bad ref '-x'"),
    (["--ref", "", "x"], "bad ref ''"),
    (["--parallel", "0", "x"], "--parallel: 1 to 10000; --retries: 0 to 9999"),
    (["--parallel", "many", "x"], "argument --parallel: invalid int value: 'many'"),
    (["--retries", "-1", "x"], "--parallel: 1 to 10000; --retries: 0 to 9999"),
    (["--timeout", "0", "x"], SECONDS),
    (["--timeout", "nan", "x"], SECONDS),
    (["--timeout", "-5", "--connect-timeout", "-1", "x"], SECONDS),
    (["--connect-timeout", "inf", "x"], SECONDS),
    (["--batch", "0", "x"], "--batch: sizes from 1, percentages to 100%"),
    (["--batch", "1,0%", "x"], "--batch: sizes from 1, percentages to 100%"),
    (["--batch", "1,101%", "x"], "--batch: sizes from 1, percentages to 100%"),
    (["--max-fail", "1", "x"], "--max-fail: one number, with --batch"),
    (["--batch", "1", "--max-fail", "1,2", "x"], "--max-fail: one number, with --batch"),
    (["--status", "--ref", "v1", "x"], "--status takes no --ref, --batch, --dry-run or --no-wait"),
    (["--status", "--batch", "1"], "--status takes no --ref, --batch, --dry-run or --no-wait"),
    (["--secret-file=", "x"], "a file option is empty"),
    (["--write-failed=", "x"], "a file option is empty"),
    (["--nonsense", "x"], "unrecognized arguments: --nonsense"),
    (["x", "y"], "unrecognized arguments: y"),
    (["--stat", "x"], "unrecognized arguments: --stat"),
    (["--color", "blue", "x"], "argument --color: invalid choice: 'blue'"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_mistakes_in_the_arguments(server_update, capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        server_update.main(argv)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("usage: server-update [options] REPO\n")
    assert "server-update: error: " + message in err


def test_help_is_the_same_everywhere_and_fits_80_columns(server_update, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert server_update.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text == server_update.__doc__
    assert max(map(len, text.split("\n"))) <= 80
    assert server_update.main(["-h", "../x", "--ref", ".."]) == 0


def test_help_names_every_option_and_its_default(server_update, monkeypatch):
    names, defaults = [], {}
    add = argparse.ArgumentParser.add_argument

    def spy(self, *flags, **kwargs):
        names.extend(flag for flag in flags if flag.startswith("-"))
        if kwargs.get("default"):
            defaults[flags[0]] = kwargs["default"]
        return add(self, *flags, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", spy)
    server_update.parse_args(["x"])
    for name in names:
        assert re.search(r"\n  (-., )?%s[ ,]" % name, server_update.__doc__), name
    assert len(names) == 24
    for name, default in defaults.items():
        entry = server_update.__doc__.partition("\n  %s " % name)[2].partition("\n  -")[0]
        assert "(%s)" % (default if isinstance(default, str) else "%g" % default) in entry, name


def test_version(server_update, capsys):
    assert server_update.main(["--version"]) == 0
    assert capsys.readouterr().out == "server-update %s\n" % server_update.VERSION
