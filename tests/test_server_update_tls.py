"""server-update and the real slave.py over TLS and with a secret, as they meet in the field."""

import re
import socket

import pytest
from processes import sockets_of, wait_until

SECRET, NEXT_SECRET = "correct horse battery staple", "a new secret of enough bytes"


@pytest.fixture(autouse=True)
def trust_nobody(tmp_path, monkeypatch):
    """No authorities but those of --cafile."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "no-authorities"))


@pytest.fixture
def repo(upstream):
    return upstream.create("hanuman", files={"a": "1"})


def test_https_slaves_are_followed_to_the_end_and_bad_certificates_told(
    start_slave, authority, repo, update
):
    day = {"start": "20200101000000Z", "end": "20200102000000Z"}
    slaves = {
        "right": start_slave(TLS_CERT=authority.issue("right")),
        "other": start_slave(TLS_CERT=authority.issue("other", host="DNS:other.example")),
        "expired": start_slave(TLS_CERT=authority.issue("expired", **day)),
    }
    entries = {name: "https://127.0.0.1:%d/" % slave.port for name, slave in slaves.items()}
    plain = "127.0.0.1:%d" % slaves["right"].port
    done = update(
        [*entries.values(), plain], "--json", "--cafile", str(authority.cert), "--retries=0"
    )
    assert done.returncode == 1
    right = done.results[entries["right"]]
    assert (right["outcome"], right["commit"]) == ("live", repo.head())
    for name, why in (
        ("other", "certificate verify failed: IP address mismatch"),
        ("expired", "certificate verify failed: certificate has expired"),
    ):
        assert done.results[entries[name]]["outcome"] == "unreachable"
        assert why in done.results[entries[name]]["message"]
        assert not (slaves[name].repos / "hanuman").exists()
    assert done.results[plain]["outcome"] == "unreachable"  # plain HTTP to a TLS port


def test_an_unknown_authority_is_not_trusted(start_slave, authority, repo, update):
    slave = start_slave(TLS_CERT=authority.issue("unknown"))
    entry = "https://127.0.0.1:%d" % slave.port
    done = update([entry], "--retries=0", "--json")
    assert (done.returncode, done.results[entry]["outcome"]) == (1, "unreachable")
    assert re.search("certificate verify failed: (unable|self)", done.results[entry]["message"])
    assert not (slave.repos / "hanuman").exists()


def test_a_handshake_that_never_ends_is_given_up(authority, update):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        entry = "https://127.0.0.1:%d" % listener.getsockname()[1]
        done = update([entry], "--timeout=1.5", "--cafile", str(authority.cert), "--json")
        assert (done.returncode, done.results[entry]["outcome"]) == (1, "unreachable")


def test_a_secret_is_changed_without_a_gap(start_slave, repo, tmp_path, update):
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
        done = update([entry], "--secret-file", str(on_master), "--json")
        assert done.returncode == expected, (lines, signs, done.results)
    assert done.results[entry]["outcome"] == "refused"
    assert "(HTTP 401)" in done.results[entry]["message"]
    done = update([entry], "--json")
    assert done.results[entry]["outcome"] == "refused"  # not signed at all


@pytest.mark.slow
@pytest.mark.parametrize("kept, outcomes", [(True, {"live"}), (False, {"live", "refused"})])
def test_the_secret_changes_while_a_fleet_is_being_updated(
    start_slave, repo, tmp_path, start_update, update, kept, outcomes
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
    rollout = start_update(entries, "--json", "--batch", "2", *signed)
    trees = [slave.state / "hanuman.new" for slave in slaves]
    wait_until(lambda: all((tree / "started").exists() for tree in trees[:2]), what="hooks")
    # Each holds back its answer to what the rollout asked with the old one.
    wait_until(lambda: all(sockets_of(slave.process.pid) for slave in slaves[:2]), what="polls")
    for path in on_slaves:
        path.write_text("".join(one + "\n" for one in [SECRET] * kept + [NEXT_SECRET]))
    on_master.write_text(NEXT_SECRET + "\n")
    done = update(entries[:3], "--status", *signed, "--json")
    states = [done.results[entry]["message"].split()[:2] for entry in entries[:3]]
    assert states == [["update", "running"]] * 2 + [["no", "such"]]
    assert not trees[2].exists() and rollout.process.poll() is None
    gate.touch()
    done = rollout.finish()
    assert {result["outcome"] for result in done.results.values()} == outcomes
    assert (done.returncode, len(done.results)) == (0 if kept else 1, 4)
    for path in on_slaves:
        path.write_text(NEXT_SECRET + "\n")
    done = update(entries, *signed, "--json")
    commits = {one["commit"] for one in done.results.values()}
    assert (done.returncode, commits) == (0, {repo.head()})


def test_a_signed_status_of_the_fleet(start_slave, repo, tmp_path, update):
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text(SECRET + "\n")
    slave = start_slave(SECRET_FILE=secret)
    entry = "http://127.0.0.1:%d/get/?key=%%20a" % slave.port
    signed = ("--secret-file", str(secret))
    assert update([entry], *signed).returncode == 0
    done = update([entry], "--status", *signed, "--json")
    assert (done.returncode, done.results[entry]["commit"]) == (0, repo.head())
