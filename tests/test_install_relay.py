"""install.sh relay: a slave and its list in one command, with what a forge has to be told."""

import os
import re
import stat
import subprocess

import pytest
from install_support import files
from processes import wait_until
from product import ISOLATED, SHELLS

CONF = "etc/server-update/slave.conf"
LIST = "etc/server-update/slavelist.txt"
SECRET = "etc/server-update/secret"


def set_lines(installer):
    """The settings that slave.conf has."""
    return re.findall("(?m)^[A-Z_]+=.*", (installer.stage / CONF).read_text())


@pytest.mark.parametrize("shell", SHELLS)
def test_a_relay_is_a_master_and_a_slave(installer, shell):
    installer.check("relay", "web1", "web2", "--base-url", "/srv/up", shell=shell)
    assert set_lines(installer) == ["BASE_URL=/srv/up", "SLAVELIST=/" + LIST]
    assert (installer.stage / LIST).read_text().endswith("\nweb1\nweb2\n")
    secret = installer.stage / SECRET
    assert re.fullmatch(r"[0-9a-f]{64}\n", secret.read_text())
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    here = files(installer.stage)
    for name in ("slave.py", "slave-activate", "server-update"):
        assert here["usr/local/bin/" + name] == "755"
    before = secret.read_text()
    out = installer.check("relay", shell=shell)
    assert out == "kept %s\nNothing had to be changed in %s/usr/local.\n" % (
        secret,
        installer.stage,
    )
    assert secret.read_text() == before
    out = installer.check("relay", "web3", shell=shell)
    assert "added web3 to %s\n" % (installer.stage / LIST) in out


def test_a_relay_without_slaves_would_not_start(installer):
    assert installer.refused("relay") == (
        "install.sh: there is no slave in %s/%s: name those beneath, as in ./install.sh relay web1"
        % (installer.stage, LIST)
    )


@pytest.mark.parametrize("name", ["../x", "-x", "a b", "x.git", "x.lock", "é", "a;b"])
def test_a_bad_repository_is_told_before_anything_is_installed(installer, name):
    message = installer.refused("relay", "web1", "--repo=" + name)
    assert message.startswith("install.sh: bad repository '")


@pytest.mark.slow
def test_a_slave_conf_that_names_no_list_is_kept_and_told(installer):
    installer.check("slave")
    conf = installer.stage / CONF
    message = "install.sh: %s names no list: write SLAVELIST=/%s there first" % (conf, LIST)
    assert installer.refused("relay", "web1") == message
    with conf.open("a") as lines:
        lines.write("SLAVELIST=/%s\n" % LIST)
    assert "wrote %s/%s\n" % (installer.stage, LIST) in installer.check("relay", "web1")


@pytest.mark.slow
def test_another_list_and_secret_of_a_slave_conf_are_taken(installer):
    conf = installer.stage / CONF
    conf.parent.mkdir(parents=True)
    conf.write_text("SLAVELIST=/srv/list\nSECRET_FILE=/srv/secret\n")
    installer.check("relay", "web1")
    assert (installer.stage / "srv/list").read_text().endswith("\nweb1\n")
    assert (installer.stage / "srv/secret").exists()
    assert not (installer.stage / LIST).exists() and not (installer.stage / SECRET).exists()


@pytest.mark.slow
def test_an_option_that_a_kept_slave_conf_contradicts_stops_it(installer):
    installer.check("relay", "web1")
    conf = installer.stage / CONF
    assert installer.refused("relay", "--port", "81") == (
        "install.sh: %s says PORT=9999: change that, or leave out --port 81" % conf
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (["relay", "web1", "web2:80x"], "server-update: standard input:2: bad port '80x'"),
        (["relay", "web1", "--new-secret"], "install.sh: not for relay: --new-secret"),
        (["slave", "--repo", "hanuman"], "install.sh: not for slave: --repo"),
        (["relay", "web1", "--port", "80x"], "install.sh: bad PORT '80x'"),
    ],
)
def test_mistakes_touch_nothing(installer, args, message):
    assert installer.refused(*args) == message


# -- where it says what to enter at the forge


@pytest.fixture
def relay(installer, tmp_path, upstream):
    """run(*args): install.sh relay into a prefix of our own; what it said."""
    upstream.create("hanuman")
    if not os.getuid():
        command = ["unshare", "--user", "--map-user=65534", "--map-group=65534"]
        if subprocess.call([*command, "true"]):
            pytest.skip("being somebody else than root needs user namespaces here")
    else:
        command = []
    prefix = tmp_path / "own"
    options = ["--prefix", str(prefix), "--base-url", upstream.base_path, "--port", "0"]
    env = {"HOME": str(tmp_path)}

    def run(*args):
        return installer.check(
            "relay", *args, *options, staged=False, before=command, env=env
        )

    run.prefix, run.before, run.home = prefix, command, tmp_path
    return run


@pytest.mark.slow
def test_it_says_url_and_key_for_the_forge(relay):
    out = relay("127.0.0.1:1", "--repo", "hanuman")
    asked = "At the forge, a webhook for pushes, as JSON, to this URL, with this secret:\n"
    url, key = out.partition(asked)[2].splitlines()
    assert url == "  http://%s:0/hook?repo=hanuman" % os.uname().nodename
    program = [*ISOLATED, str(relay.prefix / "bin/slave.py"), "--hook-key", "hanuman"]
    told = subprocess.check_output([*relay.before, *program]).decode()
    assert re.fullmatch(r"[0-9a-f]{64}\n", told) and key.strip() == told.strip()
    out = relay()
    assert "/hook?repo=NAME\n" in out and "slave.py' --hook-key NAME prints\n" in out


def test_a_relay_that_was_just_installed_starts_and_tells_what_is_beneath(relay, tmp_path):
    out = relay("127.0.0.1:1")
    command = re.search(r"To start slave.py as .*\n  (.*)\n", out).group(1)
    log = tmp_path / "log"
    with log.open("wb") as handle:
        env = dict(os.environ, HOME=str(relay.home))
        start = [*relay.before, "sh", "-c", "exec " + command]
        slave = subprocess.Popen(start, env=env, stdout=handle, stderr=handle)
    try:
        wait_until(lambda: "listening on port" in log.read_text(), what="slave.py")
    finally:
        slave.terminate()
        assert slave.wait(60) == 0
