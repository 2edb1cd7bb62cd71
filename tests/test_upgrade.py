"""From version 1.0 to this one: records, settings and secrets; the one beside the other."""

import json
import os
import subprocess

import pytest
import version_1
from processes import wait_until
from product import ISOLATED, SOURCES, copy_scripts
from slave_support import SECRET, Slave, make_secret, signature, stop_for_good

HELD = """#!/bin/sh
touch "$HOME/begun"
until [ -e "$HOME/go" ]; do sleep 0.05; done
"""
TIMEOUT_S = 300


class Upgrade:
    """The scripts of both versions, a slave that begins with those of 1.0, masters of both."""

    def __init__(self, tmp_path, upstream):
        self.folder = tmp_path
        self.old = version_1.unpack(tmp_path / "version 1")
        self.upstream = upstream.create("hanuman")
        self.secret = make_secret(tmp_path / "secret", SECRET)
        settings = {
            "BASE_URL": upstream.base_path,
            "SECRET_FILE": self.secret,
            "TIMEOUT": 60,
            "ALLOW_REPOS": "hanuman site-*",
        }
        (tmp_path / "slave").mkdir()
        self.slave = Slave(tmp_path / "slave", settings, sources=self.old)

    def upgrade_slave(self):
        """Stop it, have the scripts of now in its place, and start it."""
        assert self.slave.stop() == 0
        copy_scripts(SOURCES, self.slave.bin, "slave.py", "slave-activate")
        self.slave.start()

    def update(self, sources, *options, status=0):
        """A whole update by the server-update of one of the versions; what it printed."""
        slaves = self.folder / "slavelist.txt"
        slaves.write_text("127.0.0.1:%d\n" % self.slave.port)
        command = [*ISOLATED, str(sources / "server-update"), "--list", str(slaves)]
        command += ["--secret-file", str(self.secret), *options, "hanuman"]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def ask(self, target):
        """The JSON that the slave answers to a signed question."""
        return self.slave.json(target, headers=signature(target))

    def live(self):
        return (self.slave.repos / "hanuman/file").read_text()


@pytest.fixture
def upgrade(tmp_path, upstream):
    one = Upgrade(tmp_path, upstream)
    one.slave.start()
    yield one
    stop_for_good(one.slave)


def test_records_settings_and_secrets_are_kept(upgrade):
    first = upgrade.upstream.commit({"file": "one\n"})
    upgrade.update(upgrade.old)
    second = upgrade.upstream.commit({"file": "two\n"})
    upgrade.update(upgrade.old)
    before = upgrade.ask("/status?repo=hanuman")
    assert (before["commit"], before["previous"]) == (second, first)

    upgrade.upgrade_slave()
    after = upgrade.ask("/status?repo=hanuman")
    assert {key: after[key] for key in before} == before
    assert upgrade.live() == "two\n"
    assert upgrade.slave.get("/status?repo=hanuman")[0] == 401
    for repo, status in (("site-1", 404), ("other", 403)):
        target = "/status?repo=" + repo
        assert upgrade.slave.get(target, headers=signature(target))[0] == status

    upgrade.upstream.commit({"file": "three\n"})
    assert "1 live of 1" in upgrade.update(SOURCES)
    record = upgrade.ask("/status?repo=hanuman")
    assert record["update"] > before["update"] and record["previous"] == second
    assert upgrade.live() == "three\n"
    assert "live" in upgrade.update(SOURCES, "--ref", first)
    assert upgrade.live() == "one\n"


def test_an_update_that_the_upgrade_interrupts_is_done_by_the_new_version(upgrade):
    hook = upgrade.slave.hooks / "pre-update"
    hook.write_text(HELD)
    hook.chmod(0o755)
    upgrade.upstream.commit({"file": "one\n"})
    upgrade.update(upgrade.old, "--no-wait")
    wait_until(lambda: (upgrade.slave.home / "begun").exists(), what="the hook")
    upgrade.upgrade_slave()
    (upgrade.slave.home / "go").touch()
    update = upgrade.ask("/status?repo=hanuman")["update"]
    assert upgrade.slave.wait_update(update=update, secret=SECRET)["state"] == "live"
    assert upgrade.live() == "one\n"


@pytest.mark.slow
@pytest.mark.parametrize("master, slave", [("1.0", "now"), ("now", "1.0")])
def test_one_version_beside_the_other(upgrade, master, slave):
    if slave == "now":
        upgrade.upgrade_slave()
    sources = upgrade.old if master == "1.0" else SOURCES
    first = upgrade.upstream.commit({"file": "one\n"})
    assert "1 live of 1" in upgrade.update(sources)
    upgrade.upstream.commit({"file": "two\n"})
    out = upgrade.update(sources, "--json")
    assert json.loads(out.splitlines()[-1])["outcomes"] == {"live": 1}
    assert upgrade.live() == "two\n"
    assert "live" in upgrade.update(sources, "--status")
    upgrade.update(sources, "--batch", "1", "--ref", first)
    assert upgrade.live() == "one\n"
    out = upgrade.update(sources, "--ref", "no-such-branch", status=1)
    assert "no-such-branch" in out and upgrade.live() == "one\n"


def test_a_slave_of_1_0_that_cannot_know_is_no_success(upgrade):
    first = upgrade.upstream.commit({"file": "one\n"})
    upgrade.upstream.commit({"file": "two\n"})
    out = upgrade.update(SOURCES, "--commit", first, status=1)
    assert "too old for --commit" in out


def test_the_state_of_1_0_has_nothing_that_stays_for_ever(upgrade):
    upgrade.upstream.commit({"file": "one\n"})
    upgrade.update(upgrade.old)
    upgrade.upgrade_slave()
    upgrade.upstream.commit({"file": "two\n"})
    upgrade.update(SOURCES)
    left = {name for name in os.listdir(str(upgrade.slave.state)) if "hanuman" in name}
    assert left == {"hanuman.json", "hanuman.lock"}
