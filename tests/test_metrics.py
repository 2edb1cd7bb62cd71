"""/metrics: what Prometheus is told, in its own parser's view, after all kinds of updates."""

import json
import os
import re
import shutil
import subprocess

import pytest
from processes import wait_until
from product import load, shorten_pauses
from slave_support import ONE, SECRET, make_secret, signature, stand_in

slave = load("slave.py")
KIND = "text/plain; version=0.0.4; charset=utf-8"
SAMPLE_RE = re.compile(r'server_update_(\w+)\{((?:\w+="(?:[^"\\\n]|\\["\\n])*",?)+)\} (\S+)')


def check_with_promtool(text, *command):
    """What Prometheus's own tool says of it, on standard input; it must find nothing wrong."""
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run(
        [promtool, *(command or ("check", "metrics"))],
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, ""), text
    return text


def parse(text):
    """{metric: {labels as text: value}}, of a text in which every metric is told in one piece."""
    found, described = {}, []
    for line in filter(None, text.splitlines()):
        if line.startswith("#"):
            described.append(line.split()[1:3])
            continue
        metric, labels, value = SAMPLE_RE.fullmatch(line).groups()
        name = "server_update_" + metric
        assert described[-2:] == [["HELP", name], ["TYPE", name]], "in one piece"
        assert labels not in found.setdefault(metric, {}), "told twice"
        found[metric][labels] = float(value)
    return found


def scrape(one, **kwargs):
    status, headers, body = one.get("/metrics", **kwargs)
    assert (status, headers["Content-Type"]) == (200, KIND)
    return parse(check_with_promtool(body.decode("utf-8")))


def totals(metrics, repo="hanuman"):
    """{outcome: count} of a repository's updates."""
    found = {}
    for labels, value in metrics["updates_total"].items():
        name, outcome = re.fullmatch('repo="(.*)",outcome="(.*)"', labels).groups()
        if name == repo:
            found[outcome] = value
    return found


def counts(**changes):
    zeros = dict.fromkeys(("live", "hook failed", "beneath failed", "failed"), 0)
    return dict(zeros, **{key.replace("_", " "): value for key, value in changes.items()})


# -- of records alone


def ended(*changes):
    """Records after updates that ended so, one a second."""
    records = slave.Records()
    for number, change in enumerate(changes):
        records = records.accept("hanuman", None, 1000.0 + number, {})
        records = records.start(ONE, 1000.2 + number)
        changes = dict({"state": "live", "commit": ONE}, **change)
        records = records.finish(records.running.update, changes, 1000.5 + number)
    return records


def tell(records, **now):
    looked = records.newest()._replace(**now)
    return check_with_promtool(slave.format_metrics([slave.measure(looked, records)]) + "\n")


LIVE, FAILED, HOOK = {}, {"state": "failed"}, {"hook": 1}
BENEATH = {"beneath": {"live": 298, "unreachable": 2}}


@pytest.mark.parametrize(
    "changes, success, outcome",
    [
        (LIVE, 1, "live"),
        ({"beneath": {"live": 3}}, 1, "live"),
        (HOOK, 0, "hook failed"),
        (BENEATH, 0, "beneath failed"),
        ({"beneath": {"not started": 1}}, 0, "beneath failed"),
        (dict(BENEATH, hook=3), 0, "hook failed"),
        (FAILED, 0, "failed"),
        (dict(BENEATH, state="failed"), 0, "failed"),
    ],
)
def test_success_is_a_live_outcome_alone(changes, success, outcome):
    metrics = parse(tell(ended(LIVE, changes)))
    assert metrics["last_update_success"] == {'repo="hanuman"': success}
    expected = counts(live=1)
    expected[outcome] += 1
    assert totals(metrics) == expected, "an outcome that never was is told as 0"


def test_all_that_is_told_of_a_relay():
    assert tell(ended(LIVE, BENEATH)).splitlines() == [
        "# HELP server_update_info The version that runs.",
        "# TYPE server_update_info gauge",
        'server_update_info{version="%s"} 1' % slave.VERSION,
        "# HELP server_update_updates_total Updates that have ended since the slave began.",
        "# TYPE server_update_updates_total counter",
        'server_update_updates_total{repo="hanuman",outcome="live"} 1',
        'server_update_updates_total{repo="hanuman",outcome="hook failed"} 0',
        'server_update_updates_total{repo="hanuman",outcome="beneath failed"} 1',
        'server_update_updates_total{repo="hanuman",outcome="failed"} 0',
        "# HELP server_update_updating Whether an update is queued or runs.",
        "# TYPE server_update_updating gauge",
        'server_update_updating{repo="hanuman"} 0',
        "# HELP server_update_last_update_success Whether it ended as live, also beneath.",
        "# TYPE server_update_last_update_success gauge",
        'server_update_last_update_success{repo="hanuman"} 0',
        "# HELP server_update_last_update_timestamp_seconds When the last update ended.",
        "# TYPE server_update_last_update_timestamp_seconds gauge",
        'server_update_last_update_timestamp_seconds{repo="hanuman"} 1001.5',
        "# HELP server_update_last_live_timestamp_seconds When an update went live last.",
        "# TYPE server_update_last_live_timestamp_seconds gauge",
        'server_update_last_live_timestamp_seconds{repo="hanuman"} 1001.5',
        "# HELP server_update_live_commit_info The commit that is live.",
        "# TYPE server_update_live_commit_info gauge",
        'server_update_live_commit_info{repo="hanuman",commit="%s"} 1' % ONE,
        "# HELP server_update_beneath Slaves beneath, by how the last update ended there.",
        "# TYPE server_update_beneath gauge",
        'server_update_beneath{repo="hanuman",outcome="live"} 298',
        'server_update_beneath{repo="hanuman",outcome="unreachable"} 2',
    ]


def test_when_something_went_live_last_outlives_any_number_of_failures():
    records = ended(LIVE, *[FAILED] * 25)
    assert len(records.all()) == slave.MAX_ENDED
    again = slave.decode_records("hanuman", records.encode())
    for one in (records, again):
        metrics = parse(tell(one))
        assert metrics["last_live_timestamp_seconds"] == {'repo="hanuman"': 1000.5}
        assert metrics["last_update_timestamp_seconds"] == {'repo="hanuman"': 1025.5}
    assert totals(parse(tell(records))) == counts(live=1, failed=25)
    assert totals(parse(tell(again))) == counts(), "a slave that starts has counted nothing"


def test_while_an_update_runs_the_one_before_it_counts():
    records = ended(HOOK).accept("hanuman", None, 2000.0, {})
    for one in (records, records.start(ONE, 2001.0)):
        metrics = parse(tell(one))
        assert metrics["updating"] == {'repo="hanuman"': 1}
        assert metrics["last_update_success"] == {'repo="hanuman"': 0}
    first = slave.Records().accept("hanuman", None, 1.0, {}).start(ONE, 2.0)
    metrics = parse(tell(first))
    assert metrics["last_update_success"] == {'repo="hanuman"': 0}, "nothing good is known"
    assert metrics["last_update_timestamp_seconds"] == {'repo="hanuman"': 0}
    assert metrics["last_live_timestamp_seconds"] == {'repo="hanuman"': 0}


def test_another_commit_by_hand_on_a_relay_is_not_good():
    records = ended({"beneath": {"live": 3}})
    looked = slave.found_live(records.newest(), "2" * 40)
    metrics = parse(slave.format_metrics([slave.measure(looked, records)]))
    assert metrics["last_update_success"] == {'repo="hanuman"': 0}
    assert metrics["beneath"] == {'repo="hanuman",outcome="not started"': 3}
    assert metrics["live_commit_info"] == {'repo="hanuman",commit="%s"' % ("2" * 40): 1}


# -- of a slave


def test_a_slave_that_is_new(start_slave):
    assert scrape(start_slave()) == {"info": {'version="%s"' % slave.VERSION: 1}}


def test_live_failed_and_hook_failed(start_slave, upstream):
    commit = upstream.create("hanuman", files={"a": "1"}).head()
    one = start_slave()
    shorten_pauses(one.bin)
    record = one.wait_update()
    metrics = scrape(one)
    assert totals(metrics) == counts(live=1)
    assert metrics["live_commit_info"] == {'repo="hanuman",commit="%s"' % commit: 1}
    assert metrics["last_update_success"] == {'repo="hanuman"': 1}
    finished = {'repo="hanuman"': record["finished"]}
    assert metrics["last_update_timestamp_seconds"] == finished
    assert metrics["last_live_timestamp_seconds"] == finished

    hook = one.hooks / "post-update"
    hook.write_text("#!/bin/sh\nexit 7\n")
    hook.chmod(0o755)
    live = one.wait_update()
    assert live["hook"] == 7
    metrics = scrape(one)
    assert totals(metrics) == counts(live=1, hook_failed=1)
    assert metrics["last_update_success"] == {'repo="hanuman"': 0}

    one.wait_update(update=one.signal(ref="no-such-branch"))
    metrics = scrape(one)
    assert totals(metrics) == counts(live=1, hook_failed=1, failed=1)
    assert metrics["last_update_success"] == {'repo="hanuman"': 0}
    assert metrics["last_live_timestamp_seconds"] == {'repo="hanuman"': live["finished"]}

    # What was never live, or is gone, has none.
    one.wait_update("nothing-of-the-kind")
    assert "nothing" not in str(scrape(one))
    shutil.rmtree(str(one.repos / "hanuman"))
    assert list(scrape(one)) == ["info"]


def test_while_it_is_updating(start_slave):
    one = start_slave()
    stand_in(one)
    one.wait_update()
    stand_in(one, "until [ -e $HOME/go ]; do sleep 0.05; done")
    update = one.signal()
    wait_until(lambda: scrape(one)["updating"] == {'repo="hanuman"': 1})
    (one.home / "go").touch()
    one.wait_update(update=update)
    assert scrape(one)["updating"] == {'repo="hanuman"': 0}


def test_a_record_that_cant_be_read_is_not_good(start_slave):
    one = start_slave()
    stand_in(one)
    one.wait_update()
    one.stop()
    (one.state / "hanuman.json").rename(one.state / "kept")
    os.mkfifo(str(one.state / "hanuman.json"))
    one.start()
    metrics = scrape(one)
    assert metrics["last_update_success"] == {'repo="hanuman"': 0}
    assert metrics["live_commit_info"] == {'repo="hanuman",commit="%s"' % ONE: 1}
    told = one.json("/status")["repos"]["hanuman"]
    assert (told["state"], told["commit"]) == ("failed", ONE)
    assert told["message"] == "its record can't be read; the log says why"
    (one.state / "kept").rename(one.state / "hanuman.json")
    wait_until(lambda: scrape(one)["last_update_success"] == {'repo="hanuman"': 1})


def test_head_and_other_methods(start_slave):
    one = start_slave()
    status, headers, body = one.get("/metrics", method="HEAD")
    assert (status, headers["Content-Type"], body) == (200, KIND, b"")
    assert int(headers["Content-Length"]) > 50
    status, headers, _ = one.get("/metrics", method="POST")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


# -- who may


@pytest.mark.parametrize("path", ["/metrics", "/status", "/status?repo=hanuman"])
def test_view_from_opens_what_is_seen_and_nothing_else(start_slave, tmp_path, path):
    secret = make_secret(tmp_path / "secret", SECRET)
    closed = start_slave(SECRET_FILE=secret)
    assert closed.get(path)[0] == 401
    elsewhere = start_slave(SECRET_FILE=secret, VIEW_FROM="192.0.2.0/24")
    assert elsewhere.get(path)[0] == 401
    assert elsewhere.get(path, headers=signature(path))[0] in (200, 404)
    one = start_slave(SECRET_FILE=secret, VIEW_FROM="192.0.2.1, 127.0.0.0/8")
    assert one.get(path)[0] == (404 if "repo" in path else 200)
    for closed in ("/?repo=hanuman", "/get/?repo=hanuman", "/status/", "/metrics/"):
        assert one.get(closed)[0] == 401, closed
    assert json.loads(one.get("/?repo=hanuman")[2].decode()) == {
        "error": "signature missing or wrong"
    }


def test_allow_from_comes_before_view_from(start_slave, tmp_path):
    secret = make_secret(tmp_path / "secret", SECRET)
    one = start_slave(SECRET_FILE=secret, VIEW_FROM="127.0.0.1", ALLOW_FROM="192.0.2.1")
    for path in ("/metrics", "/status"):
        assert one.get(path)[0] == 403
