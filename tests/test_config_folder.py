"""Where settings, keys and hooks are: PREFIX/etc/server-update, KEY.NAME for one repository."""

import os
import shutil
import subprocess

import pytest
from product import ISOLATED, SHELLS, SOURCES, VERSION, copy_scripts, load
from slave_support import SECRET, make_secret, runs, stand_in, start_by_hand

NOBODY = 65534
COMPLAINT = ("others than root and its user may write in '{0}'; "
             "do: chown root {0} && chmod go-w {0}")
SPOILT = [
    lambda etc: etc.chmod(0o775),
    lambda etc: etc.chmod(0o757),
    pytest.param(
        lambda etc: os.chown(str(etc), NOBODY, NOBODY),
        marks=pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away"),
    ),
]


def make_etc(prefix):
    etc = prefix / "etc" / "server-update"
    etc.mkdir(parents=True, exist_ok=True)
    return etc


@pytest.fixture
def slave(start_slave):
    """A slave whose scripts are PREFIX/bin/NAME, and which is not told of any settings file."""
    one = start_slave()
    one.stop()
    one.env.update(SERVER_UPDATE_CONF="", SERVER_UPDATE_REPOS_DIR=str(one.repos))
    (one.etc / "slave.conf").write_text(
        "PORT=0\nBIND=127.0.0.1\nBASE_URL=%s\n" % one.settings["BASE_URL"])
    return one


# -- slave.py


def test_settings_secret_and_hooks_of_a_prefix(slave, upstream):
    make_secret(slave.etc / "secret", SECRET)
    hooks = slave.etc / "hooks"
    slave.start()
    first = slave.log().splitlines()
    assert any(line.endswith("slave.py %s, settings and keys in %s" % (VERSION, slave.etc))
               for line in first)
    assert slave.get("/?repo=a")[0] == 401
    upstream.create("hanuman", {"f": "1"})
    record = slave.wait_update(secret=SECRET)
    assert record["state"] == "live", "there need be no folder of hooks"
    hooks.mkdir()
    (hooks / "pre-update").write_text("#!/bin/sh\necho no >&2\nexit 1\n")
    (hooks / "pre-update").chmod(0o755)
    record = slave.wait_update(secret=SECRET)
    assert (record["state"], "pre-update" in record["message"]) == ("failed", True)


def test_a_link_to_a_script_has_the_folder_of_the_script(slave, tmp_path):
    slave.env["SERVER_UPDATE_BASE_URL"] = str(tmp_path / "nothing")
    link = tmp_path / "linked.py"
    link.symlink_to(slave.bin / "slave.py")
    slave.command[-1] = str(link)
    slave.start()
    assert "settings and keys in %s\n" % slave.etc in slave.log()


def test_without_such_a_folder_it_is_that_of_the_machine(start_slave, tmp_path):
    assert load("slave.py").CONFIG_FOLDER == "/etc/server-update"
    machine = tmp_path / "machine"
    slave = start_slave(constants={"CONFIG_FOLDER": str(machine)})
    slave.stop()
    shutil.rmtree(str(slave.etc))
    slave.start()
    assert "settings and keys in %s\n" % machine in slave.log()


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_folder_where_others_may_write_is_an_error(slave, spoil):
    spoil(slave.etc)
    status, stderr = start_by_hand(slave, "--port", 0)
    assert (status, stderr) == (2, "slave.py: %s\n" % COMPLAINT.format(slave.etc))


def test_a_folder_that_leads_nowhere_is_an_error(slave):
    shutil.rmtree(str(slave.etc))
    slave.etc.symlink_to("nowhere")
    status, stderr = start_by_hand(slave, "--port", 0)
    assert (status, stderr) == (
        1, "slave.py: can't use '%s': No such file or directory\n" % slave.etc)


# -- slave-activate


@pytest.fixture
def by_hand(tmp_path, upstream):
    """by_hand(SCRIPT, ...) runs a slave-activate that is PREFIX/bin/slave-activate."""
    prefix = tmp_path / "prefix"
    copy_scripts(SOURCES, prefix / "bin", "slave-activate")
    etc = make_etc(prefix)
    upstream.create("r", {"f": "1"})
    (etc / "slave.conf").write_text("BASE_URL=%s\n" % upstream.base_path)

    def run(script=prefix / "bin" / "slave-activate", shell="sh", **env):
        return subprocess.run(
            [*shell.split(), str(script), "r"], env=dict(os.environ, **env),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    run.etc = etc
    return run


@pytest.mark.parametrize("shell", SHELLS)
def test_slave_activate_has_that_of_its_prefix_too(by_hand, tmp_path, own_home, shell):
    hooks = by_hand.etc / "hooks"
    hooks.mkdir()
    (hooks / "post-update").write_text("#!/bin/sh\ntouch ran\n")
    (hooks / "post-update").chmod(0o755)
    done = by_hand(shell=shell)
    assert done.returncode == 0, done.stderr
    assert (own_home / "repos" / "r" / "ran").exists()
    (tmp_path / "linked").symlink_to(tmp_path / "prefix" / "bin" / "slave-activate")
    assert by_hand(tmp_path / "linked", shell=shell).returncode == 0
    elsewhere = copy_scripts(SOURCES, tmp_path / "elsewhere", "slave-activate")
    env = {"SERVER_UPDATE_BASE_URL": str(tmp_path / "nothing")}
    done = by_hand(elsewhere / "slave-activate", shell=shell, **env)
    assert done.returncode == 1, "it is in no bin: the folder is that of the machine"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("spoil", SPOILT)
def test_slave_activate_wants_it_to_be_roots_too(by_hand, own_home, spoil, shell):
    spoil(by_hand.etc)
    done = by_hand(shell=shell)
    assert (done.returncode, done.stderr) == (
        2, "slave-activate: %s\n" % COMPLAINT.format(by_hand.etc))
    assert not (own_home / "repos").exists()


# -- server-update


@pytest.fixture
def master(tmp_path):
    """master(...) runs a server-update that is PREFIX/bin/server-update; its list is .etc's."""
    prefix = tmp_path / "prefix"
    script = copy_scripts(SOURCES, prefix / "bin", "server-update") / "server-update"
    etc = make_etc(prefix)
    (etc / "slavelist.txt").write_text("web1\nweb2\n")

    def run(*args):
        return subprocess.run(
            [*ISOLATED, str(script), *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    run.etc = etc
    return run


def test_server_update_has_that_of_its_prefix_too(master):
    done = master("--dry-run", "hanuman")
    assert (done.returncode, done.stdout.split()) == (0, ["web1", "web2"]), done
    # what can't be looked at is not absent
    (master.etc / "master-key").symlink_to("nowhere")
    done = master("--slave-key", "web1")
    assert (done.returncode, done.stderr) == (
        2, "server-update: %s/master-key: No such file or directory\n" % master.etc)


@pytest.mark.parametrize("spoil", SPOILT)
def test_server_update_wants_it_to_be_roots_too(master, spoil):
    make_secret(master.etc / "master-key", SECRET)
    spoil(master.etc)
    for args in (["--dry-run", "hanuman"], ["--slave-key", "web1"]):
        done = master(*args)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "server-update: %s\n" % COMPLAINT.format(master.etc)


# -- one repository


ASKED = """#!/bin/sh
echo "$1 $SERVER_UPDATE_BASE_URL $SERVER_UPDATE_SUBMODULES $SERVER_UPDATE_TIMEOUT" \\
    "$SERVER_UPDATE_HOOKS_DIR" >>"$HOME/runs"
exit 1
"""


def test_a_setting_of_one_repository(start_slave, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    own = {"BASE_URL.site.b": "/own/", "SUBMODULES.site.b": "no", "TIMEOUT.site.b": 7,
           "HOOKS_DIR.site.b": other}
    slave = start_slave(BASE_URL="/all", **own)
    stand_in(slave, text=ASKED)
    slave.wait_update("site.b")
    slave.wait_update("site")
    assert runs(slave) == ["site.b /own no 7 %s" % other, "site /all yes 600 %s" % slave.hooks]
    (other / "pre-update").write_text("#!/bin/sh\n")
    slave.wait_update("site.b")
    (other / "pre-update").unlink()
    assert slave.get("/?repo=site.b")[0] == 503, "the hook of this one is gone"
    slave.wait_update("site")
    slave.stop()
    slave.env.update(SERVER_UPDATE_BASE_URL="/environment")
    slave.args = ["--timeout", "9"]
    slave.start()
    slave.wait_update("site.b")
    assert runs(slave)[-1] == "site.b /environment no 9 %s" % other


def test_the_time_of_one_repository(start_slave):
    slave = start_slave(constants={"BACKSTOP_S": 0.1}, **{"TIMEOUT.slow": 1})
    stand_in(slave, "sleep 1000")
    record = slave.wait_update("slow")
    assert record["message"] == "stopped as it took longer than 1 s (TIMEOUT)"


@pytest.mark.parametrize("line, text", [
    ("BASE_URL.=/x", "unknown setting 'BASE_URL.'"),
    ("BASE_URL.a/b=/x", "unknown setting 'BASE_URL.a/b'"),
    ("PORT.a=1", "unknown setting 'PORT.a'"),
    ("REPOS_DIR.a=/x", "unknown setting 'REPOS_DIR.a'"),
    ("TIMEOUT.a=x", "bad TIMEOUT.a 'x'"),
    ("HOOKS_DIR.a=x", "bad HOOKS_DIR.a 'x'"),
])
def test_a_mistake_in_a_setting_of_one_repository(start_slave, line, text):
    slave = start_slave()
    slave.conf.write_text(line + "\n")
    status, stderr = start_by_hand(slave, SERVER_UPDATE_CONF=str(slave.conf))
    assert (status, stderr) == (2, "slave.py: %s:1: %s\n" % (slave.conf, text))


def test_a_hooks_folder_of_one_repository_must_exist(start_slave, tmp_path):
    slave = start_slave()
    nothing = tmp_path / "nothing"
    slave.conf.write_text("HOOKS_DIR.a=%s\n" % nothing)
    status, stderr = start_by_hand(slave, "--port", 0, "--repos-dir", tmp_path / "free",
                                   SERVER_UPDATE_CONF=str(slave.conf))
    assert (status, stderr) == (
        1, "slave.py: can't use '%s': No such file or directory\n" % nothing)
