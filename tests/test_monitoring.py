"""The recipes for monitoring: each is run, with good and bad slaves; promtool judges the rest."""

import re
import shutil
import subprocess

import pytest
from product import PYTHON, ROOT
from slave_support import stand_in

A, B = "a" * 40, "b" * 40


def promtool(*command, text=None, cwd=None):
    found = shutil.which("promtool")
    if not found:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run(
        [found, *map(str, command)],
        input=text,
        cwd=cwd and str(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# -- on the master


@pytest.fixture
def master(start_slave, tmp_path):
    """Runs a recipe on a master with one slave, and any further entries of its list."""
    one = start_slave()
    stand_in(one)
    one.wait_update()
    work = tmp_path / "work"
    work.mkdir()
    (work / "docs").symlink_to(ROOT / "docs")
    slave_list = tmp_path / "list"
    program = one.bin / "server-update"
    script = '#!/bin/sh\nexec %s -I %s --list %s "$@"\n'
    program.write_text(script % (PYTHON, ROOT / "server-update", slave_list))
    program.chmod(0o755)

    def run(text, *entries):
        slave_list.write_text("".join("%s\n" % entry for entry in (one.url[7:], *entries)))
        return subprocess.run(
            ["sh", "-c", 'PATH=%s:$PATH; %s' % (one.bin, text)],
            cwd=str(work),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
        )

    run.slave, run.work = one, work
    return run


def recipe(beginning):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (found,) = re.findall("(?m)^%s.*$" % re.escape(beginning), text)
    return found


def test_the_nagios_plugin(master):
    check = recipe("docs/examples/check_server_update")
    done = master(check)
    assert (done.returncode, done.stdout) == (0, "OK: live on all slaves, at one commit\n")
    done = master(check + " --retries 0", "127.0.0.1:1")
    assert done.returncode == 2
    assert done.stdout.startswith("CRITICAL: exit status 1: 1 slave not good"), done.stdout
    assert "127.0.0.1:1 " in done.stdout, "the slave is named"
    done = master(check, "web1:80x")
    assert done.returncode == 3
    assert done.stdout.startswith("UNKNOWN: server-update: "), done.stdout
    assert "bad port '80x'" in done.stdout.splitlines()[0]
    assert master("rm %s; %s" % (master.slave.bin / "server-update", check)).returncode == 3


def test_the_textfile_for_node_exporter(master):
    command = recipe("server-update --status --json")
    file = master.work / "hanuman.prom"
    repo = 'repo="hanuman"'

    def told():
        text = re.sub("(time_seconds.*) [0-9]+", r"\1 0", file.read_text())
        return [line.replace("server_update_fleet_", "") for line in text.splitlines()]

    assert master(command).returncode == 0
    commit = master.slave.json("/status?repo=hanuman")["commit"]
    good = [
        "good{%s} 1" % repo,
        "time_seconds{%s} 0" % repo,
        'slaves{%s,outcome="live"} 1' % repo,
        'commits{%s,commit="%s"} 1' % (repo, commit),
    ]
    assert told() == good
    master(command.replace("--json", "--json --retries 0"), "127.0.0.1:1")
    assert told()[0] == "good{%s} 0" % repo
    assert 'slaves{%s,outcome="unreachable"} 1' % repo in told()
    master(command, "web1:80x")
    assert told()[0] == 'good{repo=""} 0', "who could not ask says nothing good"
    assert not file.with_name("hanuman.prom.new").exists()
    metadata = "".join(
        "# HELP server_update_fleet_%s Told.\n# TYPE server_update_fleet_%s gauge\n" % (name, name)
        for name in ("good", "time_seconds")
    )
    samples = "".join(file.read_text().splitlines(keepends=True)[:2])
    promtool("check", "metrics", text=metadata + samples)
