"""What people see: terminals of 80 and 40 columns, pipes, colours, Ctrl-C, readers that leave."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from farm import (
    COMMIT,
    OTHER,
    PREVIOUS,
    error,
    hold,
    mute,
    raw,
    silent_port,
    told,
    updates,
    updates_when,
)
from processes import cpu_s, wait_until
from product import ISOLATED, PYTHON, SERVER_UPDATE, daily
from terminal import Run
from update_support import run_in_process

MANY = 10000
END_CPU_S = 10  # of the processor's time, to tell of so many; it takes 0.5
SCRIPT = SERVER_UPDATE[-1]
STOP_S = 15  # after Ctrl-C, on a busy machine; what it breaks off would take 25 s or more
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")


def seen(text):
    """What stays on the screen, with seconds, ports, commands and list files replaced."""
    text = re.sub("[^\n]*\r\x1b\\[K", "", text.replace("\r\n", "\n"))
    assert "\r" not in text
    text = re.sub(r" *\b\d+\.\d s\b", " S s", text)
    text = re.sub(r":\d{5}\b", ":PORT", text)
    text = re.sub(r"(?s)(go back|equal|again): \S*?\s*--", r"\1: server-update --", text)
    return re.sub(r"--list\s+\S+(\n +\S+)*?slavelist.txt", "--list L", text)


def in_order(text):
    """The same, with the slaves by address: they end in what order a busy machine lets them."""
    results, _, rest = text.partition("\n\n")
    return "".join(sorted(re.split(r"(?m)^(?=127\.77\.)", results + "\n"))) + "\n" + rest


def three(farm):
    """A slave that goes live, one that fails, one that is unchanged: entries."""
    return [
        farm.add(updates()),
        farm.add(
            updates(
                0.3,
                state="failed",
                message=MESSAGE,
                commit=PREVIOUS,
            )
        ),
        farm.add(updates(0.6, commit=COMMIT, previous=COMMIT)),
    ]


ONE = (
    """\
127.77.0.1:PORT  live         1d5d931  was 8c2f4e0 S s

hanuman: 1 live of 1, S s
commits: 1d5d931 on 1
to go back: server-update --ref %s --list L hanuman
"""
    % PREVIOUS
)
MESSAGE = "repository 'http://git.example/hanuman.git/' not found; check the name and BASE_URL"
THREE = (
    """\
127.77.0.1:PORT  live         1d5d931  was 8c2f4e0 S s
127.77.0.2:PORT  failed       8c2f4e0  still live S s  %s
127.77.0.3:PORT  live         1d5d931  unchanged S s

hanuman: 2 live, 1 failed of 3, S s
commits: 1d5d931 on 2, 8c2f4e0 on 1
to try again: server-update --limit 127.77.0.2:PORT --list L hanuman
"""
    % MESSAGE
)


def test_a_pipe_has_lines_and_nothing_else(farm, tmp_path):
    run = Run(tmp_path, [farm.add(updates())])
    assert seen(run.wait()) == ONE
    assert (run.code, run.errors) == (0, "")
    run = Run(tmp_path, three(farm))
    text = seen(run.wait()).replace("0.3:", "0.2:")
    assert text.splitlines()[4:] == THREE.splitlines()[4:]
    assert (run.code, run.errors) == (1, "")


def test_three_slaves_in_a_pipe(farm, tmp_path):
    run = Run(tmp_path, three(farm))
    assert in_order(seen(run.wait())) == THREE
    assert "\x1b" not in run.text


def test_one_slave_on_a_terminal(farm, tmp_path):
    is_drawn = threading.Event()
    run = Run(tmp_path, [farm.add(updates_when(is_drawn.is_set))], columns=80)
    run.wait_for(r"hanuman  0 of 1  0:\d\d  \[ {9}\]  127\.77\.0\.1:\d+\r")
    is_drawn.set()
    text = run.wait()
    assert "reading the slave list\r\x1b[K" in text
    colored = ONE.replace("live ", "\x1b[32mlive\x1b[0m ", 1)
    assert seen(text) == colored.replace("1 live", "\x1b[32m1 live\x1b[0m", 1)
    assert re.search(r"\nto go back: \S+ --ref %s --list \S+ hanuman\r\n" % PREVIOUS, text)


@pytest.mark.parametrize("columns", [1, 2])
def test_a_terminal_with_no_room_breaks_nothing_off(farm, tmp_path, columns):
    run = Run(tmp_path, [farm.add(updates(0.3))], columns=columns)
    assert "Traceback" not in run.wait()
    assert run.code == 0


@pytest.mark.parametrize("columns", [80, 40])
def test_three_slaves_on_a_terminal(farm, tmp_path, columns):
    run = Run(tmp_path, three(farm), columns=columns)
    screen = run.wait()
    assert run.code == 1
    plain = re.sub("\x1b\\[[0-9]*[mK]", "", screen.replace("\r\n", "\n"))
    plain = re.sub("\nto try again: .*", "", plain)  # to be pasted
    assert max(len(part) for line in plain.split("\n") for part in line.split("\r")) <= columns
    text = in_order(seen(re.sub("\x1b\\[[0-9]+m", "", screen)))
    assert " ".join(text.split()) == " ".join(THREE.split())  # the same words, wrapped
    assert all(
        line.startswith(("127.77.0.", "    ", "hanuman", "commits", "to try again")) or not line
        for line in text.split("\n")
    )
    for outcome, color in (("live", 32), ("failed", 31), ("2 live", 32), ("1 failed", 31)):
        assert "\x1b[%dm%s\x1b[0m" % (color, outcome) in screen


@pytest.mark.parametrize(("count", "listed"), [(50, True), (51, False)])
def test_up_to_50_slaves_have_a_line_each(farm, tmp_path, count, listed):
    entries = [farm.add(updates()) for _ in range(count - 2)] + [
        farm.add(error("403 No", "no"))
    ] * 1
    entries += [farm.add(raw(b"oops"))]
    run = Run(tmp_path, entries, "--retries", "0")
    text = seen(run.wait())
    lines = text.split("\n")
    if listed:
        assert {line.split()[0] for line in lines[:count]} == {
            entry.replace(str(farm.port), "PORT") for entry in entries
        }
        assert lines[count] == ""
    else:
        assert lines[:5] == [
            "1 refused: no (HTTP 403)",
            "    127.77.0.50:PORT",
            "1 unreachable: does not answer in HTTP",
            "    127.77.0.51:PORT",
            "",
        ]
    assert lines[-5:-3] == [
        "hanuman: %d live, 1 refused, 1 unreachable of %d, S s" % (count - 2, count),
        "commits: 1d5d931 on %d" % (count - 2),
    ]


def test_verbose_and_quiet(farm, tmp_path):
    entries = [farm.add(updates()) for _ in range(51)]
    text = Run(tmp_path, entries, "-v").wait()
    assert text.count("  live  ") == 51
    run = Run(tmp_path, entries, "--quiet", "--batch", "50%", columns=80)
    assert (run.wait(), run.code) == ("", 0)
    run = Run(tmp_path, entries[:2] + [farm.add(error("403 No", "no"))], "-q")
    lines = seen(run.wait()).split("\n")
    assert lines[0] == "127.77.0.52:PORT  refused      -        - S s  no (HTTP 403)"
    assert lines[1:3] == ["", "hanuman: 2 live, 1 refused of 3, S s"]


@pytest.mark.slow
def test_ten_thousand_slaves_on_a_terminal(farm, tmp_path):
    """One line that is redrawn, then the sum."""
    entries = [farm.add(updates()) for _ in range(MANY)]
    run = Run(tmp_path, entries, "--no-wait", columns=40)
    text = run.wait()
    assert run.code == 0
    _, *totals = text.replace("\r\n", "\n").split("\n")
    plain = re.sub("\x1b\\[[0-9]*[mK]", "", text)
    assert max(map(len, re.split("[\r\n]", plain))) < 41
    assert 3 < text.count("\r") < 20 + 20 * run.chunks[-1][0]
    words = "hanuman: 10000 signalled of 10000, [0-9]+[.][0-9] s"  # too long where it took 10 s
    plain = re.sub("\x1b\\[[0-9]+m", "", "\n".join(totals))
    assert re.fullmatch(words, " ".join(plain.split()))


def test_something_is_seen_at_once(farm, tmp_path):
    """Before the list is read: here it is a pipe, into which nobody has written yet."""
    slavelist = tmp_path / "slavelist.txt"
    os.mkfifo(str(slavelist))
    run = Run(tmp_path, None, columns=80)
    run.wait_for("reading the slave list")
    assert not farm.requests
    slavelist.write_text(farm.add(updates()) + "\n")
    assert "hanuman: \x1b[32m1 live\x1b[0m of 1" in run.wait()


@pytest.mark.parametrize(
    ("env", "options", "colored", "redrawn"),
    [
        ({}, [], True, True),
        ({"NO_COLOR": "1"}, [], False, True),
        ({"NO_COLOR": ""}, [], True, True),
        ({"NO_COLOR": "1"}, ["--color=always"], True, True),
        ({}, ["--color", "never"], False, True),
        ({"TERM": "dumb"}, [], False, False),
        ({"TERM": "dumb"}, ["--color=always"], True, False),
    ],
)
def test_colours_and_redrawing_on_a_terminal(farm, tmp_path, env, options, colored, redrawn):
    text = Run(tmp_path, [farm.add(updates())], *options, columns=80, env=env).wait()
    assert ("\x1b[32m" in text) == colored
    assert ("\x1b[K" in text) == redrawn


@pytest.mark.parametrize(("options", "colored"), [([], False), (["--color=always"], True)])
def test_colours_in_a_pipe(farm, tmp_path, options, colored):
    run = Run(tmp_path, [farm.add(updates())], *options)
    assert ("\x1b[32mlive\x1b[0m" in run.wait()) == colored
    assert run.errors == ""


def test_results_in_a_pipe_and_progress_on_the_terminal(farm, tmp_path):
    run = Run(tmp_path, [farm.add(updates(0.3))], columns=80, both=False)
    out = run.process.stdout.read().decode()
    run.process.stdout.close()
    run.process.wait(60)
    run.thread.join(60)
    assert seen(out) == ONE
    assert "hanuman  0 of 1  " in run.text and "live  " not in run.text


def test_progress_fits_the_terminal_that_it_is_on(farm, tmp_path):
    """Also where the results go elsewhere; three columns stay free for an echoed '^C'."""
    is_drawn = threading.Event()
    run = Run(tmp_path, [farm.add(updates_when(is_drawn.is_set))], columns=40, both=False)
    # what is cut has a sign of it
    run.wait_for(r"\x1b\[Khanuman  0 of 1  0:\d\d  127\.77\.0\.1:\.\.\.\r")
    is_drawn.set()
    run.process.stdout.read()
    run.process.stdout.close()
    run.process.wait(60)
    run.thread.join(60)
    drawn = re.split("\r\x1b\\[K", run.text)
    assert len(drawn) > 2 and max(map(len, drawn)) <= 37


@pytest.mark.parametrize("locale", daily(1, ["C", "C.UTF-8", "en_US.ISO-8859-1"]))
def test_any_locale(farm, tmp_path, locale):
    entries = [
        farm.add(updates(state="failed", message="gr\u00fc\u00dfe \u4f8b")),
        "b\u00fccher.invalid",
    ]
    env = {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0"}
    run = Run(tmp_path, entries, "--retries", "0", columns=80, env=env)
    run.wait()
    assert run.code == 1
    encoding = {"PYTHONIOENCODING": "ascii"}
    slavelist = str(tmp_path / "slavelist.txt")
    done = subprocess.run(
        [PYTHON, SCRIPT, "--list", slavelist, "--retries", "0", "hanuman"],
        env=dict(os.environ, **encoding),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert rb"gr\xfc\xdfe \u4f8b" in done.stdout and rb"b\xfccher.invalid" in done.stdout


EVIL = "\x1b[2J\x1b]0;owned\x07\r\n\x9b1A\u202eevil\u2028\x00\x7f\u200b" + "x" * 400


@pytest.mark.parametrize("count", [3, 51])
def test_untrusted_text_cannot_move_the_cursor(farm, tmp_path, count):
    kinds = [
        updates(state="failed", message=EVIL),
        updates(ref=EVIL),
        error("400 " + "No", EVIL),
        error("403 No" + "\x1b[2J".replace("\n", ""), EVIL),
    ]
    entries = [farm.add(kinds[n % len(kinds)]) for n in range(count)]
    for options in ([], ["--json"], ["--status"]):
        text = Run(tmp_path, entries, *options).wait()
        assert not CONTROL.search(text), options
        assert "evil" in text or options == ["--status"]
    text = Run(tmp_path, entries, columns=80).wait()
    assert not CONTROL.search(re.sub("\x1b\\[(K|[0-9]+m)|\r", "", text))


def test_json_has_valid_lines_as_they_come_and_a_summary(farm, tmp_path):
    is_due = threading.Event()
    later = updates_when(is_due.is_set, commit=OTHER)
    entries = [farm.add(updates()), farm.add(later), farm.add(error("500 x"))]
    run = Run(tmp_path, entries, "--json")
    run.wait_for('(?s)"live".*"failed"|"failed".*"live"')  # not kept until the end
    is_due.set()
    text = run.wait()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0] == {"type": "start", "repo": "hanuman", "ref": None, "slaves": 3}
    by_slave = {line["slave"]: line for line in lines[1:-1]}
    live = by_slave[entries[0]]
    assert 0 <= live.pop("seconds") < 60
    assert live == {
        "type": "result",
        "slave": entries[0],
        "outcome": "live",
        "commit": COMMIT,
        "previous": PREVIOUS,
        "message": "",
    }
    summary = lines[-1]
    assert 0 < summary.pop("seconds") < 60
    assert summary == {
        "type": "summary",
        "repo": "hanuman",
        "exit": 1,
        "outcomes": {"live": 2, "failed": 1},
        "commits": {COMMIT: 1, OTHER: 1},
    }


PHASES = {
    "signals": mute,
    "following": hold,
    "retries": error("503 Later", "x", "Retry-After: 30\r\n"),
}


@pytest.mark.parametrize("number", daily(1, [signal.SIGINT, signal.SIGTERM]))
@pytest.mark.parametrize("phase", sorted(PHASES))
def test_interrupted_it_tells_the_outcome_so_far(farm, tmp_path, phase, number):
    entries = [farm.add(updates()), farm.add(PHASES[phase])]
    run = Run(tmp_path, entries + [farm.add(updates())], "--json", "--batch", "2,1")
    address = entries[1].split(":")[0]
    wait_until(lambda: farm.polls[address] if phase == "following" else farm.signals[address])
    run.wait_for('"outcome": "live"')
    begun = time.monotonic()
    run.process.send_signal(number)
    text = run.wait()
    assert time.monotonic() - begun < STOP_S
    assert run.code == 130
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["type"] for line in lines] == ["start", "result", "result", "result", "summary"]
    assert lines[-1]["exit"] == 130
    assert lines[-1]["outcomes"] == {"live": 1, "interrupted": 1, "not started": 1}
    unfinished = [line for line in lines if line.get("outcome") == "interrupted"][0]
    assert unfinished["slave"] == entries[1]
    assert unfinished["message"] == (
        "it carries on by itself" if phase == "following" else "its signal has no answer yet"
    )
    assert "server-update: interrupted: 0 not good, 1 unfinished, 1 not started\n" in run.errors


@pytest.mark.parametrize("batches", ["1", "2"])
def test_interrupted_while_it_connects(farm, tmp_path, batches):
    silent, keep = silent_port()
    entries = ["127.78.0.1:%d" % silent, farm.add(updates())]
    run = Run(tmp_path, entries, "--json", "--batch", batches, "--connect-timeout", "60")
    connecting = "01004E7F:%04X 02 " % silent  # a SYN to that address is sent
    wait_until(lambda: connecting in Path("/proc/net/tcp").read_text(), what="a SYN")
    if batches == "2":
        run.wait_for('"outcome": "live"')
    begun = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    text = run.wait()
    assert time.monotonic() - begun < STOP_S
    assert run.code == 130
    summary = json.loads(text.splitlines()[-1])
    last = {"live": 1} if batches == "2" else {"not started": 1}
    assert summary["outcomes"] == dict(last, interrupted=1)
    del keep


def test_interrupted_on_a_terminal_with_many(farm, tmp_path):
    entries = [farm.add(hold if n % 2 else updates()) for n in range(60)]
    failed = tmp_path / "failed"
    run = Run(tmp_path, entries, "--write-failed", str(failed), columns=80)
    run.wait_for("30 of 60")
    begun = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    text = re.sub("\x1b\\[[0-9]+m", "", seen(run.wait()))
    assert time.monotonic() - begun < STOP_S
    assert run.code == 130
    assert "\n30 interrupted: it carries on by itself\n    127.77.0.[2,4,6,8," in text
    assert "\nhanuman: 30 live, 30 interrupted of 60, S s\ncommits: 1d5d931 on 30\n" in text
    assert "\nto try again: server-update --list " in text
    assert {line.split()[0] for line in failed.read_text().splitlines()} == set(entries[1::2])


def test_interrupted_few_are_named_once_folded(farm, tmp_path):
    """Not a line for each, up to 50 slaves either, unless -v asks for them."""
    entries = [farm.add(hold if n else updates()) for n in range(9)]
    for options in ([], ["-v"], ["-q"]):
        run = Run(tmp_path, entries, *options)
        wait_until(lambda: all(farm.polls[entry.split(":")[0]] for entry in entries[1:]))
        if "-q" not in options:
            run.wait_for("live")
        else:
            time.sleep(3)  # nothing is said of the live one
        run.process.send_signal(signal.SIGINT)
        text = seen(run.wait())
        farm.polls.clear()
        assert text.count("it carries on by itself") == (8 if "-v" in options else 1)
        folded = "\n8 interrupted: it carries on by itself\n    127.77.0.[2-9]:PORT\n"
        assert (folded in "\n" + text) == ("-v" not in options)
        assert "hanuman: 1 live, 8 interrupted of 9, S s\n" in text


@pytest.mark.slow
@pytest.mark.parametrize(("options", "columns"), [(["--json"], None), (["-v"], 80), ([], 80)])
def test_interrupted_with_ten_thousand(farm, tmp_path, options, columns):
    entries = [farm.add(updates(1000)) for _ in range(MANY)]
    run = Run(tmp_path, entries, *options, columns=columns)
    wait_until(lambda: len(farm.signals) > 300)
    before = cpu_s(run.process.pid)
    run.process.send_signal(signal.SIGINT)
    os.waitid(os.P_PID, run.process.pid, os.WEXITED | os.WNOWAIT)
    assert cpu_s(run.process.pid) - before < END_CPU_S
    text = run.wait()
    assert run.code == 130
    if columns is None:
        assert text.count("\n") == MANY + 2
        assert sum(json.loads(text.splitlines()[-1])["outcomes"].values()) == MANY
    else:
        totals = r"\nhanuman: (\d+) interrupted, (\d+) not\s+started of %d, " % MANY
        found = re.search(totals, re.sub("\x1b\\[[0-9]+m", "", seen(text)))
        assert sum(map(int, found.groups())) == MANY
        assert (seen(text).count("127.77.") == MANY) == (options == ["-v"])


def test_interrupted_while_python_imports_its_library(tmp_path):
    """An argparse that never ends its import stands in for a slow disk."""
    begun = tmp_path / "begun"
    (tmp_path / "argparse.py").write_text(
        "import time\nopen(%r, 'w').close()\ntime.sleep(60)\n" % str(begun)
    )
    process = subprocess.Popen(
        [PYTHON, SCRIPT, "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=str(tmp_path)),
    )
    wait_until(begun.exists)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=300) + (process.returncode,) == (b"", b"", 130)


def test_interrupted_while_the_list_is_read(tmp_path):
    slavelist = tmp_path / "slavelist.txt"
    os.mkfifo(str(slavelist))
    process = subprocess.Popen(
        [*SERVER_UPDATE, "--list", str(slavelist), "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with slavelist.open("w"):  # waits until somebody reads
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err


def test_a_second_interrupt_ends_at_once(farm, tmp_path):
    """Even where nobody takes the output of the first."""
    entries = [farm.add(updates()) for _ in range(2000)]
    slavelist = tmp_path / "slavelist.txt"
    slavelist.write_text("\n".join(entries))
    read, write = os.pipe()
    fcntl.fcntl(write, 1031, 4096)  # F_SETPIPE_SZ: a small pipe, that nobody reads
    process = subprocess.Popen(
        [*SERVER_UPDATE, "--list", str(slavelist), "--json", "hanuman"],
        stdout=write,
    )
    os.close(write)
    try:
        wait_until(lambda: len(farm.signals) > 50)
        wait_until(lambda: select.select([read], [], [], 0)[0])
        time.sleep(0.2)  # it stands in its write
        for _ in range(3):  # a process group may get one signal twice: within a second it is one
            process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        assert process.poll() is None

        def has_ended():
            process.send_signal(signal.SIGINT)
            return process.poll() is not None

        wait_until(has_ended, every=1.2, what="its end")
        assert process.returncode == 130
    finally:
        os.close(read)


def run_by_shell(script, *arguments):
    """A finished run of a shell script, where "$@" is server-update with these arguments."""
    command = ["sh", "-c", script, "sh", *SERVER_UPDATE, *arguments]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=300,
    )


def test_a_reader_that_goes_away_stops_the_printing_but_not_the_updates(farm, tmp_path):
    entries = [farm.add(updates(0.02 * n)) for n in range(30)] + [farm.add(error("500 x"))]
    slavelist = tmp_path / "slavelist.txt"
    slavelist.write_text("\n".join(entries))
    done = run_by_shell(
        '{ "$@"; echo "exit $?" >&2; } | head -n 1', "--list", str(slavelist), "hanuman"
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == "exit 1\n"
    assert len(farm.signals) == 31


def test_help_into_a_reader_that_goes_away():
    done = run_by_shell('{ "$@" --help; echo "exit $?" >&2; } | :')
    assert done.stderr == "exit 0\n"


def test_a_list_on_a_closed_standard_input():
    done = run_by_shell('"$@" hanuman <&-', "--list", "-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "server-update: standard input: no slave in the list\n"


@pytest.mark.parametrize("redirect", daily(2, [">&-", "2>/dev/full", "2>&-", ">&- 2>&-"]))
def test_closed_outputs(farm, tmp_path, redirect):
    slavelist = tmp_path / "slavelist.txt"
    slavelist.write_text(farm.add(updates()))
    done = run_by_shell('"$@" ' + redirect, "--list", str(slavelist), "hanuman")
    assert done.returncode == 0
    assert len(farm.signals) == 1


def test_results_that_cannot_be_kept_are_no_success(farm, tmp_path):
    slavelist = tmp_path / "slavelist.txt"
    slavelist.write_text(farm.add(updates()))
    command = [*SERVER_UPDATE, "--list", str(slavelist), "hanuman"]
    with open("/dev/full", "w") as full:
        for more in ([], ["--dry-run"], ["--no-wait"]):
            assert subprocess.run(command + more, stdout=full, timeout=300).returncode == 1
        batch = [*command, "--batch", "1"]  # says something on standard error, which is no result
        done = subprocess.run(batch, stdout=subprocess.DEVNULL, stderr=full, timeout=300)
        assert done.returncode == 0
    read, write = os.pipe()
    fcntl.fcntl(write, 1031, 4096)  # F_SETPIPE_SZ
    os.set_blocking(write, False)
    os.write(write, b"x" * 4096)
    try:
        assert subprocess.run(command, stdout=write, timeout=300).returncode == 1
    finally:
        os.close(read)
        os.close(write)
    done = subprocess.run(
        command + ["--write-failed", "/dev/full"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    assert done.returncode == 0  # an empty list fits
    slavelist.write_text(farm.add(error("500 x")))
    done = subprocess.run(
        command + ["--write-failed", "/dev/full"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (
        1,
        b"server-update: /dev/full: No space left on device\n",
    )


def test_a_terminal_is_left_clean(farm, tmp_path):
    """What was drawn is removed before anything else is printed, mistakes too."""
    run = Run(tmp_path, ["web1:80x"], columns=80)
    text = run.wait()
    assert run.code == 2
    assert re.fullmatch(
        "\r?reading the slave list\r\x1b\\[Kserver-update: .*bad port '80x'\n",
        " ".join(text.replace("\r\n", "\n").split(" ")),
        re.S,
    )
    assert told  # the farm's own words are those of slave.py, see test_contract


# Who is waited for.


def test_off_a_terminal_a_line_says_who_is_waited_for(server_update, monkeypatch, farm, capsys):
    """And since when one that has taken the signal does not answer; not with -q."""
    monkeypatch.setattr(server_update, "WORD_EVERY_S", 2)
    monkeypatch.setattr(server_update, "LONG_POLL_S", 0)
    monkeypatch.setattr(server_update, "ANSWER_TIMEOUT_S", 1)
    entries = [farm.add(updates(hook=None))] + [farm.add(hold) for _ in range(3)]
    arguments = ["--connect-timeout=1", "--json"]
    assert run_in_process(server_update, monkeypatch, entries, "--timeout=5.5", *arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    waiting = [line for line in lines if "waiting" in line]
    assert 1 <= len(waiting) <= 3
    assert re.fullmatch(
        r"server-update: waiting for 127\.77\.0\.\[2-4\]:\d+: 1 of 4 ended after 0:0\d", waiting[0]
    )
    silent = [line for line in lines if line not in waiting]
    assert silent
    for line in silent:
        assert re.fullmatch(
            r"server-update: no answer from 127\.77\.0\.[2-4]:\d+ since \d\d:\d\d:\d\dZ", line
        )
    arguments += ["--timeout=2.5", "-q"]
    assert run_in_process(server_update, monkeypatch, entries, *arguments) == 1
    assert capsys.readouterr().err == ""


def run_with_two_that_hang(farm, tmp_path):
    """A run on a terminal once its line has named both; one of them doesn't answer any more."""
    entries = [farm.add(updates(hook=None)), farm.add(hold), farm.add(updates(1000))]
    run = Run(tmp_path, entries, "--timeout=60", "--connect-timeout=0.1", columns=120)
    run.wait_for(r"hanuman  1 of 3  .*1 live  127\.77\.0\.[23]:\d+, 127\.77\.0\.[23]:\d+\r")
    return run


def test_on_a_terminal_the_progress_line_names_who_is_waited_for(farm, tmp_path):
    """Those that began first come first."""
    run = run_with_two_that_hang(farm, tmp_path)
    run.process.send_signal(signal.SIGINT)
    run.wait()
    assert run.code == 130


@pytest.mark.slow
def test_on_a_terminal_the_progress_line_tells_since_when_one_is_silent(farm, tmp_path):
    run = run_with_two_that_hang(farm, tmp_path)
    run.wait_for(r"127\.77\.0\.2:\d+ \(no answer for 0:[3-5]\d\)", timeout=300)
    run.process.send_signal(signal.SIGINT)
    run.wait()
    assert run.code == 130


def test_a_terminal_that_goes_away_does_not_end_the_rollout(farm, tmp_path):
    """As with setsid or disown, and a window that is closed: each slave is told all the same."""
    entries = [farm.add(updates(0.5, hook=None)) for _ in range(3)]
    slavelist = tmp_path / "slavelist.txt"
    slavelist.write_text("\n".join(entries))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*SERVER_UPDATE, "--list", str(slavelist), "--json", "hanuman"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    assert os.read(ours, 1)
    os.close(ours)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert json.loads(out.decode().splitlines()[-1])["outcomes"] == {"live": 3}


def test_a_mistake_of_ours_ends_it_all_the_same(farm, tmp_path):
    """A traceback, and not a command that hangs in cron for ever."""
    slavelist = tmp_path / "slavelist.txt"
    slavelist.write_text("%s\n%s\n" % (farm.add(mute), farm.add(updates())))
    script = tmp_path / "broken"
    guard = '\nif __name__ == "__main__":\n    http_client'
    text = Path(SCRIPT).read_text(encoding="utf-8")
    assert text.count(guard) == 1
    broken = "\ndef judge_poll(*_):\n    raise LookupError('lost')\n\n"
    script.write_text(text.replace(guard, broken + guard), encoding="utf-8")
    done = subprocess.run(
        [*ISOLATED, str(script), "--list", str(slavelist), "hanuman"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    assert done.returncode == 1
    assert b"LookupError: lost" in done.stderr
