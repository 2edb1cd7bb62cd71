"""server-update and the real slave.py over TLS and with a secret, as they meet in the field."""

import json
import os
import re
import socket
import subprocess
import time

import pytest
from conftest import PYTHON, ROOT, wait_until
from test_slave_security import Authority

SECRET, NEXT_SECRET = "correct horse battery staple", "a new secret of enough bytes"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture
def repo(upstream):
    return upstream.create("hanuman", files={"a": "1"})


def start_update(slavelist, entries, *options):
    """Start server-update on these entries."""
    slavelist.write_text("".join(entry + "\n" for entry in entries))
    return subprocess.Popen(
        [PYTHON, "-I", str(ROOT / "server-update"), "--list", str(slavelist), "--json"]
        + [*options, "hanuman"],
        env=dict(os.environ, SSL_CERT_FILE="/nonexistent"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )


def update(*arguments):
    """Run server-update on these entries: (exit code, {slave: result}, standard error)."""
    return finish(start_update(*arguments))


def finish(process):
    out, err = process.communicate(timeout=60)
    lines = [json.loads(line) for line in out.splitlines()]
    results = {line["slave"]: line for line in lines if line["type"] == "result"}
    return process.returncode, results, err


def test_https_slaves_are_followed_to_the_end_and_bad_certificates_told(
    start_slave, authority, repo, tmp_path
):
    day = {"start": "20200101000000Z", "end": "20200102000000Z"}
    slaves = {
        "right": start_slave(TLS_CERT=authority.issue("right")),
        "other": start_slave(TLS_CERT=authority.issue("other", host="DNS:other.example")),
        "expired": start_slave(TLS_CERT=authority.issue("expired", **day)),
    }
    entries = {name: "https://127.0.0.1:%d/" % slave.port for name, slave in slaves.items()}
    plain = "127.0.0.1:%d" % slaves["right"].port
    code, results, _ = update(
        tmp_path / "l", [*entries.values(), plain], "--cafile", str(authority.cert), "--retries=0"
    )
    assert code == 1
    right = results[entries["right"]]
    assert (right["outcome"], right["commit"]) == ("live", repo.head())
    for name, why in (
        ("other", "certificate verify failed: IP address mismatch"),
        ("expired", "certificate verify failed: certificate has expired"),
    ):
        assert results[entries[name]]["outcome"] == "unreachable"
        assert why in results[entries[name]]["message"]
        assert not (slaves[name].repos / "hanuman").exists()
    assert results[plain]["outcome"] == "unreachable"  # plain HTTP to a TLS port


def test_an_unknown_authority_is_not_trusted(start_slave, authority, repo, tmp_path):
    slave = start_slave(TLS_CERT=authority.issue("unknown"))
    entry = "https://127.0.0.1:%d" % slave.port
    code, results, _ = update(tmp_path / "l", [entry], "--retries=0")
    assert (code, results[entry]["outcome"]) == (1, "unreachable")
    assert re.search("certificate verify failed: (unable|self)", results[entry]["message"])
    assert not (slave.repos / "hanuman").exists()


def test_a_handshake_that_never_ends_is_given_up(authority, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        entry = "https://127.0.0.1:%d" % listener.getsockname()[1]
        begun = time.monotonic()
        code, results, _ = update(
            tmp_path / "l", [entry], "--timeout=1.5", "--cafile", str(authority.cert)
        )
        assert time.monotonic() - begun < 1.5 + 2
        assert (code, results[entry]["outcome"]) == (1, "unreachable")


def test_a_secret_is_changed_without_a_gap(start_slave, repo, tmp_path):
    """Two lines on the slaves while masters still sign with the old one, then with the new."""
    on_slave, on_master = tmp_path / "slave-secret", tmp_path / "master-secret"
    for path in (on_slave, on_master):
        path.touch(mode=0o600)
    slave = None
    for lines, signs, expected in (
        ([SECRET], SECRET, 0),
        ([SECRET, NEXT_SECRET], SECRET, 0),
        ([SECRET, NEXT_SECRET], NEXT_SECRET, 0),
        ([NEXT_SECRET], NEXT_SECRET, 0),
        ([NEXT_SECRET], SECRET, 1),
    ):
        on_slave.write_text("\n".join(lines) + "\n")
        on_master.write_text(signs + "\n")
        slave = slave or start_slave(SECRET_FILE=on_slave)
        entry = "127.0.0.1:%d" % slave.port
        code, results, _ = update(tmp_path / "l", [entry], "--secret-file", str(on_master))
        assert code == expected, (lines, signs, results)
    assert results[entry]["outcome"] == "refused"
    assert "(HTTP 401)" in results[entry]["message"]
    code, results, _ = update(tmp_path / "l", [entry])
    assert results[entry]["outcome"] == "refused"  # not signed at all


@pytest.mark.parametrize("kept, outcomes", [(True, {"live"}), (False, {"live", "refused"})])
def test_the_secret_changes_while_a_fleet_is_being_updated(
    start_slave, repo, tmp_path, kept, outcomes
):
    """A rollout that began with the old one goes on with it while other masters sign with the new.

    Without the old line the slaves of its second batch refuse it.
    """
    on_master, gate, slaves = tmp_path / "master-secret", tmp_path / "gate", []
    on_slaves = [tmp_path / ("secret-%d" % number) for number in range(4)]
    for path in (on_master, *on_slaves):
        path.touch(mode=0o600)
        path.write_text(SECRET + "\n")
    for path in on_slaves:
        slaves.append(start_slave(SECRET_FILE=path))
        hook = slaves[-1].hooks / "pre-update"
        hook.write_text("#!/bin/sh\n: >started; until [ -e '%s' ]; do sleep 0.05; done\n" % gate)
        hook.chmod(0o755)
    entries = ["127.0.0.1:%d" % slave.port for slave in slaves]
    signed = ("--secret-file", str(on_master))
    process = start_update(tmp_path / "l", entries, "--batch", "2", *signed)
    trees = [slave.state / "hanuman.new" for slave in slaves]
    wait_until(lambda: all((tree / "started").exists() for tree in trees[:2]), 30, what="hooks")
    for path in on_slaves:
        path.write_text("".join(one + "\n" for one in [SECRET] * kept + [NEXT_SECRET]))
    on_master.write_text(NEXT_SECRET + "\n")
    _, results, _ = update(tmp_path / "l2", entries[:3], "--status", *signed)
    states = [results[entry]["message"].split()[:2] for entry in entries[:3]]
    assert states == [["update", "running"]] * 2 + [["no", "such"]]
    assert not trees[2].exists() and process.poll() is None
    gate.touch()
    code, results, _ = finish(process)
    assert {result["outcome"] for result in results.values()} == outcomes
    assert (code, len(results)) == (0 if kept else 1, 4)
    for path in on_slaves:
        path.write_text(NEXT_SECRET + "\n")
    code, results, _ = update(tmp_path / "l", entries, *signed)
    assert (code, {one["commit"] for one in results.values()}) == (0, {repo.head()})


def test_a_signed_status_of_the_fleet(start_slave, repo, tmp_path):
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text(SECRET + "\n")
    slave = start_slave(SECRET_FILE=secret)
    entry = "http://127.0.0.1:%d/get/?key=%%20a" % slave.port
    signed = ("--secret-file", str(secret))
    assert update(tmp_path / "l", [entry], *signed)[0] == 0
    code, results, _ = update(tmp_path / "l", [entry], "--status", *signed)
    assert (code, results[entry]["commit"]) == (0, repo.head())
