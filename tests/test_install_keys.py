"""install.sh master --new-secret: a master key, and a key of its own for each slave."""

import getpass
import os
import re
import stat
import subprocess

import pytest
from product import PYTHON, SHELLS, SOURCES
from slave_support import make_secret

OLD = "the secret that all have shared"
# Logs in on the slave whose address it is, where a folder stands for /etc/server-update.
SSH = """#!/bin/sh
exec sh -c "$(printf '%%s' "$2" | sed 's,/etc/server-update,%s/'"${1#root@},")"
"""
# As if the staged settings were in /etc.
SERVER_UPDATE = """#!/bin/sh
cd '%s'
case " $* " in
  *master-key-file*) ;;
  *)
    if [ -e master-key ]; then set -- --master-key-file master-key "$@"; fi
    if [ -e secret ]; then set -- --secret-file secret "$@"; fi
    ;;
esac
exec '%s' -I '%s/server-update' "$@"
"""


def settings_of(installer):
    return installer.stage / "etc/server-update"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_master_key_is_for_its_owner_only_and_kept(installer, shell):
    out = installer.check("master", "web1", "--new-secret", shell=shell)
    key = settings_of(installer) / "master-key"
    text = key.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}\n", text)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not (settings_of(installer) / "secret").exists()
    out += installer.check("master", "web1", "--new-secret", shell=shell)
    assert text.strip() not in out and "kept %s\n" % key in out
    assert key.read_text() == text


HOSTS = {
    "web1": "web1",
    "web2:80": "web2",
    "[2001:db8::7]": "2001:db8::7",
    "[2001:db8::8]:80": "2001:db8::8",
    "https://web3.example.org:80/update?site=3": "web3.example.org",
    "https://[::1]/a:80": "::1",
}


def test_a_line_for_each_slave_names_its_host(installer):
    out = installer.check("master", *HOSTS, "--new-secret")
    command = r"  '/usr/local/bin/server-update' --slave-key '(.*)' \|\n    ssh root@(\S+) '"
    assert re.findall(command, out) == list(HOSTS.items())


def test_without_a_slave_the_line_says_where_one_goes(installer):
    out = installer.check("master", "--new-secret")
    assert "--slave-key 'SLAVE' |\n    ssh root@SLAVE '" in out


def test_a_dry_run_makes_no_key_and_gives_no_lines(installer):
    out = installer.check("master", "web1", "--new-secret", "--dry-run")
    key = settings_of(installer) / "master-key"
    assert "would write %s\n" % key in out and "ssh" not in out
    assert not key.exists()


# -- the lines, run against real slaves


class Fleet:
    """Two slaves on loopback addresses of their own, and a master that is staged."""

    def __init__(self, installer, start_slave, upstream, tmp_path):
        self.installer, self.upstream = installer, upstream.create("hanuman")
        self.etc, self.slaves = tmp_path / "slaves", {}
        for address in ("127.0.0.1", "127.0.0.2"):
            folder = self.etc / address
            folder.mkdir(parents=True)
            slave = start_slave(BIND=address, SECRET_FILE=make_secret(folder / "secret", OLD))
            self.slaves[address] = slave
        self.entries = ["%s:%d" % (address, one.port) for address, one in self.slaves.items()]
        installer.check("master", *self.entries)
        self.bin = tmp_path / "tools"
        self.bin.mkdir()
        for name, text in (
            ("ssh", SSH % self.etc),
            ("server-update", SERVER_UPDATE % (settings_of(installer), PYTHON, SOURCES)),
        ):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def ask_for_steps(self):
        """Run install.sh for a new secret: {number, or 0 where that is all: its commands}."""
        out = self.installer.check(
            "master", "--new-secret", "--user", getpass.getuser()
        )
        steps = {}
        number = 0
        for line in out.splitlines():
            found = re.match(r"(\d)\. ", line)
            number = int(found.group(1)) if found else number
            if line.startswith("  ") and " NAME" not in line:
                steps[number] = steps.get(number, "") + line + "\n"
        return steps

    def run(self, text):
        text = text.replace("/usr/local/bin/", str(self.bin) + "/")
        env = dict(os.environ, PATH=str(self.bin) + os.pathsep + os.environ["PATH"])
        subprocess.run(["sh", "-ec", text], env=env, check=True, timeout=300)

    def update(self):
        """A whole update with the keys that the master has; what it printed."""
        self.upstream.commit({"file": str(self.upstream.commits_made)})
        done = subprocess.run(
            [str(self.bin / "server-update"), "--list", "slavelist.txt", "hanuman"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            timeout=300,
        )
        assert "2 live of 2" in done.stdout and done.returncode == 0, done.stdout
        return done.stdout

    def secret_lines(self):
        """The lines of each slave's secret file, which nobody else may read."""
        files = [self.etc / address / "secret" for address in self.slaves]
        assert {stat.S_IMODE(one.stat().st_mode) for one in files} == {0o600}
        return [[line for line in one.read_text().splitlines() if line] for one in files]


@pytest.fixture
def fleet(installer, start_slave, upstream, tmp_path):
    return Fleet(installer, start_slave, upstream, tmp_path)


@pytest.mark.slow
def test_a_shared_secret_is_left_without_a_gap(fleet):
    etc = settings_of(fleet.installer)
    make_secret(etc / "secret", OLD)
    fleet.update()
    steps = fleet.ask_for_steps()
    assert sorted(steps) == [1, 2, 3]
    assert not (etc / "master-key").exists()

    for command in re.findall(r".*\|\n.*\n", steps[1]):
        fleet.run(command)
        fleet.update()
    assert [lines[0] for lines in fleet.secret_lines()] == [OLD, OLD]
    assert fleet.ask_for_steps() == steps  # in the middle it says the same again
    fleet.run(steps[2])
    fleet.update()
    assert sorted(fleet.ask_for_steps()) == [3]  # and what is left to do
    for command in re.findall(r".*\|\n.*\n", steps[3]):
        fleet.run(command)
        fleet.update()
    fleet.run(steps[3].splitlines()[-1])
    fleet.update()

    one, other = fleet.secret_lines()
    assert len(one) == len(other) == 1 and one != other
    assert sorted(os.listdir(str(etc))) == ["master-key", "slavelist.txt"]
    for address in fleet.slaves:
        assert os.listdir(str(fleet.etc / address)) == ["secret"]


@pytest.mark.slow
def test_a_key_that_could_not_be_made_changes_nothing(fleet):
    before = fleet.secret_lines()
    steps = fleet.ask_for_steps()
    (settings_of(fleet.installer) / "master-key").unlink()
    command = re.search(r".*\|\n.*\n", steps[0]).group()
    with pytest.raises(subprocess.CalledProcessError):
        fleet.run(command)
    assert fleet.secret_lines() == before
