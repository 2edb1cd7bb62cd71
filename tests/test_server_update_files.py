"""What server-update reads and writes: lists, secrets, --write-failed; mistakes send nothing."""

import json
import os
import re
import subprocess
import time

import pytest
from farm import error, http, raw, updates
from product import SERVER_UPDATE
from slave_support import make_secret

SECRET = "correct horse battery staple"


def test_the_list_on_standard_input(farm, run_script):
    entry = farm.add(updates())
    done = run_script("server-update", "--list", "-", "hanuman", input="\ufeff%s\r\n" % entry)
    assert done.returncode == 0
    done = run_script("server-update", "--list", "-", "hanuman", input="%s\nx:y\n" % entry)
    assert (done.returncode, done.stderr) == (2, "server-update: standard input:2: bad port 'y'\n")


def test_dry_run_sends_nothing_and_prints_a_list(farm, update, tmp_path):
    entries = [farm.add(updates()) for _ in range(60)]
    failed = tmp_path / "failed"
    done = update(
        entries,
        "--dry-run",
        "--limit",
        "127.77.0.?:*",
        "--batch",
        "2",
        "--write-failed",
        str(failed),
    )
    assert done.returncode == 0
    assert done.stdout.splitlines() == entries[:9]
    assert not farm.requests and not failed.exists()


def test_a_pipe_without_a_writer_is_no_list_and_one_with_is(tmp_path):
    """What a shell makes of <(command) is a list; a writer that never comes is given up."""
    pipe = tmp_path / "list"
    os.mkfifo(str(pipe))
    command = [*SERVER_UPDATE, "--dry-run", "x", "--list"]
    done = subprocess.run(
        command + [str(pipe)], stderr=subprocess.PIPE, universal_newlines=True, timeout=300
    )
    mistake = "server-update: %s: no slave in the list\n" % pipe
    assert (done.returncode, done.stderr) == (2, mistake)
    source, sink = os.pipe()
    listed = subprocess.Popen(
        command + ["/dev/fd/%d" % source], pass_fds=[source], stdout=subprocess.PIPE
    )
    os.close(source)
    time.sleep(0.2)  # so that it reads before there is anything
    os.write(sink, b"web1\n")
    os.close(sink)
    assert (listed.communicate()[0], listed.returncode) == (b"web1\n", 0)


def test_dry_run_as_json(tmp_path):
    (tmp_path / "list").write_text("web[1-2]\n")
    command = [*SERVER_UPDATE, "--list", str(tmp_path / "list"), "--dry-run", "--json", "x"]
    told = [json.loads(line) for line in subprocess.check_output(command).splitlines()]
    assert told == [{"type": "slave", "slave": "web1"}, {"type": "slave", "slave": "web2"}]


def test_write_failed_is_a_list_of_exactly_those_not_live(farm, update, tmp_path):
    good = [farm.add(updates()), farm.add(updates(hook=None, message="a tree is set aside"))]
    bad = [
        farm.add(updates(state="failed", message="no # such\nthing")),
        farm.add(error("403 No")),
        farm.add(updates(hook=1)),
        farm.add(updates(beneath={"failed": 1})),
        farm.add(raw(http("200 OK", "ok", "text/plain"))),
    ]
    failed = tmp_path / "failed"
    failed.write_text("old\n")
    assert update(good + bad, "--write-failed", str(failed)).returncode == 1
    assert {line.split()[0] for line in failed.read_text().splitlines()} == set(bad)
    again = subprocess.run(
        [*SERVER_UPDATE, "--list", str(failed), "--dry-run", "x"],
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )
    assert (again.returncode, set(again.stdout.splitlines())) == (0, set(bad))
    assert update(good, "--write-failed", str(failed)).returncode == 0
    assert failed.read_text() == ""


def test_what_is_pasted_cannot_read_standard_input_again(farm, run_script):
    """No command is offered that would wait for a list that nobody types."""
    entries = "%s\n%s\n" % (farm.add(updates()), farm.add(error("403 No")))
    done = run_script("server-update", "--list", "-", "hanuman", input=entries)
    assert done.returncode == 1
    assert "\nto " not in done.stdout


def test_a_mistake_in_the_list_sends_nothing(farm, update):
    done = update([farm.add(updates()), "web2:80x", "a b"])
    assert (done.returncode, done.stdout, farm.requests) == (2, "", [])
    assert re.fullmatch(
        r"server-update: \S+/slavelist.txt:2: bad port '80x'\n"
        r"server-update: \S+/slavelist.txt:3: bad host 'a b'\n",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--list", "{}/none/l"], "{}/none/l: No such file or directory"),
        (["--list="], "'': No such file or directory"),
        (["--write-failed", "{}/none/f"], "{}/none/f: No such file or directory"),
        (["--secret-file", "{}/none/s"], "{}/none/s: No such file or directory"),
        (["--cafile", "{}/none/c"], "{}/none/c: No such file or directory"),
        (["--cafile", "/dev/null"], "/dev/null: .*"),
        (["--limit", "db*"], r"no slave in \S+ matches --limit db\*"),
    ],
)
def test_a_mistake_in_the_files_sends_nothing(farm, update, tmp_path, options, message):
    done = update([farm.add(updates())], *(option.format(tmp_path) for option in options))
    assert (done.returncode, done.stdout, farm.requests) == (2, "", [])
    assert re.fullmatch("server-update: %s\n" % message.format(tmp_path), done.stderr)


def test_each_request_is_signed_with_the_first_line(farm, update, tmp_path, server_update):
    entries = [farm.add(updates(0.1)) for _ in range(3)] + [
        "http://%s/get/?k=1" % farm.add(updates())
    ]
    path = make_secret(tmp_path / "secret", SECRET, "another secret, for the change")
    assert update(entries, "--secret-file", str(path)).returncode == 0
    nonces = set()
    for request in farm.requests:
        field = request.headers["X-Server-Update-Signature"]
        when, nonce, signature = re.fullmatch(
            "t=([0-9]+),n=([0-9a-f]{32}),s=([0-9a-f]{64})", field
        ).groups()
        assert abs(int(when) - time.time()) < 60
        assert signature == server_update.sign(SECRET.encode(), "GET", request.path, when, nonce)
        nonces.add(nonce)
    assert len(nonces) == len(farm.requests) >= 8


def test_without_a_secret_nothing_is_signed(farm, update):
    assert update([farm.add(updates())]).returncode == 0
    assert all("X-Server-Update-Signature" not in request.headers for request in farm.requests)


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (SECRET, 0o644, "others can read secret file '.*'; do: chmod 600 .*"),
        (SECRET, 0o640, "others can read secret file '.*'; do: chmod 600 .*"),
        ("", 0o600, "secret file '.*' has no secret in it; do: .*"),
        ("short\n", 0o600, "secret file '.*' has a line of less than 16 bytes; do: .*"),
    ],
)
def test_a_secret_that_is_no_good_sends_nothing(farm, update, tmp_path, text, mode, message):
    path = make_secret(tmp_path / "secret", *text.splitlines(), mode=mode)
    done = update([farm.add(updates())], "--secret-file", str(path))
    assert (done.returncode, farm.requests) == (2, [])
    assert re.fullmatch("server-update: %s\n" % message, done.stderr)
    assert not text or text.strip() not in done.stderr
