"""The recipes for monitoring: each is run, with good and bad slaves; promtool judges the rest."""

import json
import re
import shutil
import subprocess

import pytest
from product import PYTHON, ROOT
from slave_support import stand_in

EXAMPLES = ROOT / "docs" / "examples"
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
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# -- Prometheus


def test_the_scrape_and_the_two_alerts_are_valid():
    assert "2 rules found" in promtool("check", "config", EXAMPLES / "prometheus.yml")
    assert "2 rules found" in promtool("check", "rules", EXAMPLES / "prometheus-rules.yml")


def series(name, labels, values):
    return {"series": "%s{%s}" % (name, labels), "values": values}


def alerts(name, *labels, at="20m", values=()):
    """What must be firing at that time: for each its labels."""
    found = []
    for label in labels:
        found.append({"exp_labels": dict(label), "exp_annotations": label.annotations})
    return {"alertname": name, "eval_time": at, "exp_alerts": found}


class Fires(dict):
    """The labels of an alert that fires, and what its annotations say."""

    def __init__(self, annotations, **labels):
        super().__init__(**labels)
        self.annotations = annotations


def not_good(instance, repo="hanuman"):
    words = {
        "summary": "%s is not good on %s" % (repo, instance),
        "description": "http://%s/status says why" % instance,
    }
    return Fires(words, instance=instance, repo=repo, job="su", severity="critical")


def run_rules(tmp_path, inputs, *expected, queries=()):
    shutil.copy(str(EXAMPLES / "prometheus-rules.yml"), str(tmp_path / "rules.yml"))
    test = {
        "interval": "1m",
        "input_series": inputs,
        "alert_rule_test": list(expected),
        "promql_expr_test": list(queries),
    }
    path = tmp_path / "test.yml"
    # JSON is YAML.
    path.write_text(json.dumps({"rule_files": ["rules.yml"], "tests": [test]}))
    promtool("test", "rules", path, cwd=tmp_path)


def test_what_fires_and_what_does_not(tmp_path):
    def of(instance, success, commit=A, up="1x30"):
        who = 'job="su",instance="%s"' % instance
        return [
            series("up", who, up),
            series("server_update_last_update_success", who + ',repo="hanuman"', success),
            series(
                "server_update_live_commit_info",
                '%s,repo="hanuman",commit="%s"' % (who, commit),
                "1x30",
            ),
        ]

    inputs = [
        *of("good", "1x30"),
        *of("bad", "1x5 0x25"),
        *of("short", "1x18 0 1x10"),  # one update that ran for a minute
        *of("gone", "1x5 stale"),
        *of("down", "1x5 stale", up="1x5 0x25"),  # another alert's business
        *of("mended", "0x5 1x25"),
    ]
    run_rules(
        tmp_path,
        inputs,
        alerts("ServerUpdateNotGood", not_good("bad"), not_good("gone")),
        alerts("ServerUpdateNotGood", not_good("mended"), at="4m"),
        alerts("ServerUpdateCommitsDiffer"),
    )


def test_commits_that_differ_and_the_query_for_them(tmp_path):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (query,) = re.findall("(?s)```promql\n(.*?)\n```", text)
    labels = 'instance="%s",repo="x",commit="%s"'
    inputs = [
        series("server_update_live_commit_info", labels % pair, "1x30")
        for pair in (("web1", A), ("web2", A), ("web3", B))
    ]
    words = {"summary": "x is live at 2 commits"}
    run_rules(
        tmp_path,
        inputs,
        alerts("ServerUpdateCommitsDiffer", at="14m"),
        alerts("ServerUpdateCommitsDiffer", Fires(words, repo="x", severity="warning")),
        queries=[
            {
                "expr": query,
                "eval_time": "5m",
                "exp_samples": [
                    {"labels": '{repo="x",commit="%s"}' % A, "value": 2},
                    {"labels": '{repo="x",commit="%s"}' % B, "value": 1},
                ],
            }
        ],
    )


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
            timeout=300,
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
