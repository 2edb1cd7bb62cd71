"""install.sh: what it writes, says and refuses, into folders of its own (DESTDIR or --prefix)."""

import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys

import pytest
import version_1
from install_support import Installer, contents, files, folder_modes
from processes import wait_until
from product import PYTHON, SHELLS, SOURCES, daily, need

KILL_POINTS = 6  # at how many of its commands an install is killed
AT_ONCE = 6
MAX_EXPOSURE = 4.0
EXPOSURE_OF_CAP_KILL = 0.1  # by which a root slave may end what its hooks have become
SERVICE = "server-update-slave"
UNIT = "etc/systemd/system/%s.service" % SERVICE
OPENRC = "etc/init.d/" + SERVICE
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SLAVE_FILES = {
    "bin/slave-activate": "-> /usr/local/bin/slave-activate",
    "etc/server-update/slave.conf": "644",
    UNIT: "644",
    "usr/local/bin/slave-activate": "755",
    "usr/local/bin/slave.py": "755",
    "usr/local/share/man/man8/slave-activate.8": "644",
    "usr/local/share/man/man8/slave.py.8": "644",
}
MASTER_FILES = {
    "etc/server-update/slavelist.txt": "644",
    "usr/local/bin/server-update": "755",
    "usr/local/share/man/man1/server-update.1": "644",
}


@pytest.fixture
def as_user():
    """What makes a command run as somebody who is not root."""
    if os.getuid():
        return ()
    command = ("unshare", "--user", "--map-user=65534", "--map-group=65534")
    if not shutil.which("unshare") or subprocess.call([*command, "true"]):
        pytest.skip("being somebody else than root needs user namespaces here")
    return command


# --- what it writes ---


@pytest.mark.parametrize("shell", SHELLS)
def test_a_staged_slave_is_these_files(installer, as_user, shell):
    out = installer.check("slave", shell=shell, before=as_user)
    assert files(installer.stage) == SLAVE_FILES
    for name in ("slave.py", "slave-activate"):
        written = (installer.stage / "usr/local/bin" / name).read_bytes()
        assert written == (installer.folder / name).read_bytes()
    assert "service" not in out.replace(SERVICE + ".service", "")
    assert folder_modes(installer.stage) == {0o755}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_staged_master_is_these_files(installer, as_user, shell):
    installer.check("master", "web1", "[::1]:80", shell=shell, before=as_user)
    assert files(installer.stage) == MASTER_FILES
    text = (installer.stage / "etc/server-update/slavelist.txt").read_text()
    assert text.startswith((installer.folder / "slavelist.txt").read_text().rstrip("\n"))
    assert text.endswith("\nweb1\n[::1]:80\n")


@pytest.mark.slow
def test_a_second_run_changes_nothing_and_says_so(installer):
    for args in (["slave", "--serve", "/srv/a page"], ["master", "web1", "--new-secret"]):
        installer.check(*args)
        before = contents(installer.stage)
        out = installer.check(*args)
        assert out.endswith("Nothing had to be changed in %s/usr/local.\n" % installer.stage)
        assert "wrote" not in out and "replaced" not in out
        assert contents(installer.stage) == before


@pytest.mark.slow
def test_a_strict_umask_makes_no_difference(installer):
    installer.check("slave", before=("sh", "-c", 'umask 077; exec "$@"', "sh"))
    assert files(installer.stage) == SLAVE_FILES and folder_modes(installer.stage) == {0o755}


def test_an_upgrade_replaces_scripts_and_keeps_settings_user_and_served_file(installer):
    installer.check("slave", "--user", "nobody", "--serve", "/srv/a page", "--port", "80")
    conf = installer.stage / "etc/server-update/slave.conf"
    conf.write_text(conf.read_text() + "TIMEOUT=5\n")
    with (installer.folder / "slave-activate").open("a") as script:
        script.write("# newer\n")
    (installer.stage / "usr/local/bin/slave.py").chmod(0o700)
    out = installer.check("slave", "--port", "80")
    bin_folder = str(installer.stage / "usr/local/bin/")
    assert out.splitlines() == [
        "replaced %s/slave-activate" % bin_folder,
        "replaced %s/slave.py" % bin_folder,
    ]
    assert conf.read_text().endswith("TIMEOUT=5\n") and "\nPORT=80\n" in conf.read_text()
    unit = (installer.stage / UNIT).read_text()
    assert "\nUser=nobody\n" in unit
    assert "\nExecStart=\"/usr/local/bin/slave.py\" '/srv/a page'\n" in unit
    installer.check("slave", "--serve", "")
    assert '\nExecStart="/usr/local/bin/slave.py"\n' in (installer.stage / UNIT).read_text()


@pytest.mark.slow
def test_who_has_a_script_open_keeps_the_old_one_whole(installer):
    installer.check("slave")
    script = installer.stage / "usr/local/bin/slave-activate"
    old = script.read_bytes()
    with script.open("rb", buffering=0) as running:
        start = running.read(100)
        with (installer.folder / "slave-activate").open("a") as newer:
            newer.write("# newer\n")
        installer.check("slave")
        assert start + running.read() == old
    assert script.read_bytes() == old + b"# newer\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_slaves_are_added_to_a_list_that_is_there(installer, shell):
    installer.check("master", "web1", shell=shell)
    list_file = installer.stage / "etc/server-update/slavelist.txt"
    text = list_file.read_text() + "# ours\n[::1]:80   # the other"  # without an end of line
    list_file.write_text(text)
    list_file.chmod(0o640)
    before = contents(installer.stage)
    slaves = ["web1", "web2", "[::1]:80", "http://web3/?a=b"]
    out = installer.check("master", *slaves, "--dry-run", shell=shell)
    added = "add%%s web2 to %s\nadd%%s http://web3/?a=b to %s\n" % (list_file, list_file)
    assert out.startswith(added.replace("add%s", "would add"))
    assert contents(installer.stage) == before
    out = installer.check("master", *slaves, shell=shell)
    assert out.startswith(added % ("ed", "ed"))
    assert list_file.read_text() == text + "\nweb2\nhttp://web3/?a=b\n"
    assert stat.S_IMODE(list_file.stat().st_mode) == 0o640
    out = installer.check("master", *slaves, shell=shell)
    assert out.endswith("Nothing had to be changed in %s/usr/local.\n" % installer.stage)


def test_slaves_are_added_to_a_list_without_any(installer):
    installer.check("master")
    list_file = installer.stage / "etc/server-update/slavelist.txt"
    text = list_file.read_text()
    installer.check("master", "web1", "web2")
    assert list_file.read_text() == text + "web1\nweb2\n"


@pytest.mark.slow
def test_a_slave_that_is_no_good_is_not_added(installer):
    installer.check("master", "web1")
    assert installer.refused("master", "web2", "web3:80x") == (
        "server-update: standard input:2: bad port '80x'"
    )


@pytest.mark.slow
def test_the_settings_shown_are_the_defaults(installer, slave):
    installer.check("slave")
    conf = installer.stage / "etc/server-update/slave.conf"
    defaults = slave.read_settings({"SERVER_UPDATE_CONF": "/dev/null"}, {})
    assert slave.read_settings({"SERVER_UPDATE_CONF": str(conf)}, {}) == defaults
    shown = re.sub(r"(?m)^#([A-Z_]+=)", r"\1", conf.read_text())
    names = set(defaults) - {"CONFIG"}  # the folder of the settings themselves
    assert set(re.findall(r"(?m)^([A-Z_]+)=", shown)) == names
    conf.write_text(shown)
    assert slave.read_settings({"SERVER_UPDATE_CONF": str(conf)}, {}) == defaults


def test_uninstall_leaves_settings_and_what_is_not_ours(installer):
    (installer.stage / "usr/local/share/bash-completion").mkdir(parents=True)
    installer.check("slave", "--repos", "/srv/my clones")
    installer.check("master", "--new-secret")
    other = installer.stage / "usr/local/bin/other"
    other.write_text("not ours\n")
    ours = set(files(installer.stage)) - {
        "usr/local/bin/other",
        "etc/server-update/master-key",
        "etc/server-update/slave.conf",
        "etc/server-update/slavelist.txt",
    }
    completion = "usr/local/share/bash-completion/completions/server-update"
    assert ours == {*SLAVE_FILES, *MASTER_FILES, completion} - {
        "etc/server-update/slave.conf",
        "etc/server-update/slavelist.txt",
    }
    out = installer.check("uninstall")
    assert {line.split(" ", 1)[1] for line in out.splitlines()[:-1]} == {
        str(installer.stage / name) for name in ours
    }
    assert out.splitlines()[-1] == (
        "kept: the settings in %s/etc/server-update, the clones in /srv/my clones"
        % installer.stage
    )
    assert not ours & set(files(installer.stage)) and other.exists()
    assert "Nothing had to be changed" in installer.check("uninstall")


@pytest.mark.slow
@pytest.mark.parametrize("role", ["slave", "master", "uninstall"])
def test_a_dry_run_tells_every_action_and_does_none(installer, role):
    if role == "uninstall":
        installer.check("slave")
    args = [role] + ["--new-secret"] * (role == "master")
    before = contents(installer.stage)
    told = installer.check(*args, "--dry-run")
    assert contents(installer.stage) == before
    done = installer.check(*args)
    pairs = {"write": "wrote", "make": "made", "link": "linked", "remove": "removed"}
    would = re.findall(r"(?m)^would (\w+) (.*)", told)
    assert len(would) >= 3
    assert ["%s %s" % (pairs[verb], what) for verb, what in would] == re.findall(
        r"(?m)^(?:%s) .*" % "|".join(pairs.values()), done
    )


# --- somebody's own folder, with blanks everywhere ---


@pytest.mark.slow
def test_without_root_from_nothing_to_an_update(installer, as_user, upstream, tmp_path):
    commit = upstream.create("hanuman", files={"file": "one\n"}).head()
    home = tmp_path / "my home"
    home.mkdir()
    env = {"HOME": str(home)}
    prefix = ["--prefix", str(home / ".local")]
    args = ["--repos", str(home / "my repos"), "--base-url", upstream.base_path, "--port", "0"]
    out = installer.check("slave", *prefix, *args, staged=False, before=as_user, env=env)
    command = re.search(r"To start slave.py as .*\n  (.*)\n", out).group(1)
    log_file = tmp_path / "log"
    with log_file.open("wb") as log:
        command = ["sh", "-c", "exec env " + command]
        env.update(PATH=os.environ["PATH"])
        slave = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        listening = re.compile(r"listening on port (\d+)")
        found = wait_until(lambda: listening.search(log_file.read_text()), what="slave.py")
        port = found.group(1)
        out = installer.check(
            "master", "127.0.0.1:" + port, *prefix, staged=False, before=as_user, env=env
        )
        command = re.search(r"then here:\n  (.*) NAME\n", out).group(1)
        done = subprocess.check_output(["sh", "-c", command + " hanuman"]).decode()
        assert commit[:7] in done and "live" in done
    finally:
        slave.terminate()
        slave.wait()
    assert (home / "my repos/hanuman/file").read_text() == "one\n"
    out = installer.check(
        "master", "--new-secret", *prefix, staged=False, before=as_user, env=env
    )
    assert out.splitlines()[-1] == "  '%s/.local/bin/server-update' NAME" % home
    done = subprocess.check_output([*as_user, "sh", "-c", command + " --slave-key web1"])
    assert re.fullmatch(rb"[0-9a-f]{64}\n", done)
    out = installer.check("uninstall", *prefix, staged=False, before=as_user, env=env)
    assert out.endswith("the clones in %s/my repos\n" % home)
    assert set(files(home / ".local")) == {
        "etc/server-update/master-key",
        "etc/server-update/slave.conf",
        "etc/server-update/slavelist.txt",
    }


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_the_clones_folder_is_made_without_the_install_program(
    installer, as_user, tmp_path, shell
):
    env = dict(tools_without(tmp_path / "tools", "install"), HOME=str(tmp_path))
    args = ["slave", "--prefix", str(tmp_path / "own"), "--repos", str(tmp_path / "a/my repos")]
    out = installer.check(*args, staged=False, before=as_user, env=env, shell=shell)
    assert "\nmade %s/a/my repos\n" % tmp_path in out
    assert os.listdir(str(tmp_path / "a")) == ["my repos"]
    assert folder_modes(tmp_path / "a") == {0o755}
    out = installer.check(*args, staged=False, before=as_user, env=env, shell=shell)
    assert out.endswith("Nothing had to be changed in %s/own.\n" % tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_a_served_file_that_is_not_there_is_told(installer, as_user, tmp_path, shell):
    page = tmp_path / "a page"
    args = ["slave", "--prefix", str(tmp_path / "own"), "--serve", str(page)]
    told = "There is no file '%s' here: until there is, / of the slave is a 404.\n" % page
    run = {"staged": False, "before": as_user, "shell": shell, "env": {"HOME": str(tmp_path)}}
    assert installer.check(*args, **run).count(told) == 1
    page.write_text("here\n")
    assert "There is no" not in installer.check(*args, **run)
    assert "There is no" not in installer.check("slave", "--serve", "/no page", shell=shell)


def test_who_is_not_root_runs_it_as_himself(installer, as_user, tmp_path):
    args = ["slave", "--prefix", str(tmp_path / "own"), "--user", "daemon"]
    env = {"HOME": str(tmp_path)}
    assert installer.refused(*args, staged=False, before=as_user, env=env) == (
        "install.sh: --user daemon: only root can have slave.py run as somebody else"
    )


def test_who_has_no_name_is_told_so(installer, as_user, tmp_path):
    if not as_user:
        pytest.skip("being a user without a name needs root")
    before = ("unshare", "--user", "--map-user=54321")
    args = ["slave", "--prefix", str(tmp_path / "own")]
    env = {"HOME": str(tmp_path)}
    assert installer.refused(*args, staged=False, before=before, status=1, env=env) == (
        "install.sh: user 54321 has no name here: it needs a line in /etc/passwd"
    )


@pytest.mark.slow
def test_a_folder_beside_that_of_the_clones_is_left_alone(installer, as_user, tmp_path):
    (tmp_path / "repos.new").mkdir()
    (tmp_path / "repos.new/mine").write_text("mine\n")
    args = ["slave", "--prefix", str(tmp_path / "own"), "--repos", str(tmp_path / "repos")]
    installer.check(*args, staged=False, before=as_user, env={"HOME": str(tmp_path)})
    assert os.listdir(str(tmp_path / "repos")) == []
    assert os.listdir(str(tmp_path / "repos.new")) == ["mine"]


@pytest.mark.slow
def test_a_mistake_in_slave_conf_is_no_reason_not_to_uninstall(installer):
    installer.check("slave")
    (installer.stage / "etc/server-update/slave.conf").write_text("PORT=80x\n")
    out = installer.check("uninstall")
    assert out.count("removed ") == len(SLAVE_FILES) - 1
    assert out.endswith(
        "kept: the settings in %s/etc/server-update, of which slave.conf has a mistake, "
        "and the clones\n" % installer.stage
    )


@pytest.mark.slow
def test_uninstall_leaves_what_starts_the_slave_of_another_prefix(installer):
    installer.check("slave", "--prefix", "/opt/usr/local")
    (installer.stage / "usr/local/bin").mkdir(parents=True)
    half = installer.stage / "usr/local/bin/slave.py.new"
    half.write_text("somebody's own\n")
    installer.check("uninstall", "--prefix", "/usr/local")
    assert "/opt/usr/local/bin/slave.py" in (installer.stage / UNIT).read_text()
    assert half.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, entry", [([], "%s"), (["--port", "8000"], "%s:8000"), (["--port", "0"], "%s")]
)
def test_the_next_step_names_the_slave_as_the_list_has_to(
    installer, as_user, tmp_path, args, entry
):
    args = ["slave", "--prefix", str(tmp_path / "own"), *args]
    run = {"staged": False, "before": as_user}
    out = installer.check(*args, env={"HOME": str(tmp_path)}, **run)
    assert out.endswith("./install.sh master %s\n" % (entry % os.uname().nodename))


@pytest.mark.slow
def test_with_tls_the_next_step_names_a_url(installer, as_user, tmp_path):
    env = {"HOME": str(tmp_path), "SERVER_UPDATE_TLS_CERT": "/srv/cert.pem"}
    args = ["slave", "--prefix", str(tmp_path / "own")]
    out = installer.check(*args, staged=False, before=as_user, env=env)
    assert out.endswith("./install.sh master https://%s:9999/\n" % os.uname().nodename)


@pytest.mark.slow
def test_somebody_elses_link_stays(installer):
    link = installer.stage / "bin/slave-activate"
    link.parent.mkdir(parents=True)
    link.symlink_to("/opt/own/activate")
    assert OTHERS % link in installer.check("slave")
    assert os.readlink(str(link)) == "/opt/own/activate"
    link.unlink()
    link.symlink_to("/opt/old/bin/slave-activate")
    assert "kept" not in installer.check("slave")
    assert os.readlink(str(link)) == "/usr/local/bin/slave-activate"


OTHERS = "kept %s, which is not ours: who calls that does not get /usr/local/bin/slave-activate\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_somebody_elses_file_stays_and_is_told(installer, shell):
    own = installer.stage / "bin/slave-activate"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\n")
    for nothing in ("", "Nothing had to be changed in %s/usr/local.\n" % installer.stage):
        out = installer.check("slave", shell=shell)
        assert out.endswith(nothing) and OTHERS % own in out
        assert own.read_text() == "#!/bin/sh\n"
    installer.check("uninstall", shell=shell)
    assert own.exists()


@pytest.mark.slow
def test_where_bin_is_the_folder_of_the_programs_the_file_there_is_ours(installer):
    (installer.stage / "usr/bin").mkdir(parents=True)
    (installer.stage / "bin").symlink_to("usr/bin")
    for _ in range(2):
        assert "kept" not in installer.check("slave", "--prefix", "/usr")
    assert not (installer.stage / "bin/slave-activate").is_symlink()
    installer.check("uninstall", "--prefix", "/usr")
    assert not (installer.stage / "bin/slave-activate").exists()


@pytest.mark.slow
def test_a_script_that_does_not_work_is_told(installer):
    (installer.folder / "server-update").write_text("raise SystemExit(1)\n")
    done = installer.run("master")
    assert done.returncode == 1
    assert done.stderr == "install.sh: 'server-update --help' does not work\n"
    assert "man1" not in done.stdout


@pytest.mark.slow
def test_a_list_of_blanks_alone_has_no_slaves(installer):
    installer.check("master")
    list_file = installer.stage / "etc/server-update/slavelist.txt"
    list_file.write_text("\t\n \r\n# web1\n")
    assert "added web1" in installer.check("master", "web1")


# --- what it refuses ---

ROLES = "unknown role '%s': it is master, slave, relay or uninstall; see ./install.sh --help"
PATHS = "--prefix and --serve take absolute paths without quotes, \\, $ and %"


@pytest.mark.parametrize(
    "args, message",
    [
        ([], ROLES % ""),
        (["slaves"], ROLES % "slaves"),
        (["slave", "--frob"], "unknown option '--frob': see ./install.sh --help"),
        (["slave", "--port"], "--port needs a value"),
        (["slave", "--port", ""], "--port needs a value"),
        (["slave", "--serve"], "--serve needs a value"),
        (["slave", "--prefix="], "--prefix needs a value"),
        (["slave", "--dry-run=no"], "--dry-run takes no value"),
        (["master", "--new-secret=web1"], "--new-secret takes no value"),
        (["slave", "web1"], "slave takes no 'web1'"),
        (["slave", "--new-secret"], "not for slave: --new-secret"),
        (["master", "--port=80"], "not for master: --port"),
        (["uninstall", "--user", "x"], "not for uninstall: --user"),
        (["slave", "--port", "80x"], "bad PORT '80x'"),
        (["slave", "--port", "65536"], "bad PORT '65536'"),
        (["slave", "--base-url", "--upload-pack=x"], "bad BASE_URL '--upload-pack=x'"),
        (["slave", "--repos", "clones"], "bad REPOS_DIR 'clones'"),
        (["slave", "--repos", "~"], "bad REPOS_DIR '~'"),
        (["slave", "--repos", "~root/sites"], "bad REPOS_DIR '~root/sites'"),
        (["slave", "--user", "a b"], "bad user name 'a b'"),
        (["slave", "--prefix", "opt"], PATHS),
        (["slave", "--serve", "/a'b"], PATHS),
    ],
)
def test_mistakes_in_the_arguments(installer, args, message):
    assert installer.refused(*args) == "install.sh: " + message


def test_a_wrong_slave_is_refused_with_the_words_of_server_update(installer):
    assert installer.refused("master", "web1", "web2:80x") == (
        "server-update: standard input:2: bad port '80x'"
    )


@pytest.mark.slow
def test_mistakes_in_settings_that_are_there_stop_an_upgrade(installer):
    installer.check("master")
    installer.check("slave")
    list_file = installer.stage / "etc/server-update/slavelist.txt"
    list_file.write_text("web1\nweb2:80x\n")
    assert installer.refused("master") == "server-update: %s:2: bad port '80x'" % list_file
    conf = installer.stage / "etc/server-update/slave.conf"
    conf.write_text("PORT=80\nFOO=1\n")
    assert installer.refused("slave") == "install.sh: %s:2: unknown setting 'FOO'" % conf


@pytest.mark.slow
def test_an_option_that_a_kept_slave_conf_contradicts_is_a_mistake(installer):
    installer.check("slave", "--port", "80", "--repos", "/srv/my clones")
    with (installer.folder / "slave.py").open("a") as script:
        script.write("# newer\n")
    conf = installer.stage / "etc/server-update/slave.conf"
    for option, value, told in (
        ("--port", "81", "PORT=80"),
        ("--port", "9999", "PORT=80"),
        ("--base-url", "/srv/other", "BASE_URL=https://github.com/aiegoo"),
        ("--repos", "/srv/other", "REPOS_DIR=/srv/my clones"),
    ):
        assert installer.refused("slave", option, value) == (
            "install.sh: %s says %s: change that, or leave out %s %s"
            % (conf, told, option, value)
        )


def test_an_option_that_a_kept_slave_conf_agrees_with_is_none(installer):
    installer.check("slave", "--port", "80")
    same = ["--port", "80", "--base-url", "https://github.com/aiegoo/", "--repos", "~/repos"]
    assert "Nothing had to be changed" in installer.check("slave", *same)


@pytest.mark.slow
def test_a_bad_option_is_a_mistake_also_beside_a_slave_conf(installer):
    installer.check("slave")
    assert installer.refused("slave", "--port", "80x") == "install.sh: bad PORT '80x'"


@pytest.mark.slow
def test_a_slave_conf_that_cannot_be_read_is_told(installer):
    conf = installer.stage / "etc/server-update/slave.conf"
    conf.mkdir(parents=True)
    message = "install.sh: cannot read %s: Is a directory" % conf
    assert installer.refused("slave") == message


@pytest.mark.parametrize("shell", SHELLS)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(installer, shell):
    folder = installer.stage / "etc/server-update"
    folder.mkdir(parents=True)
    for name, role in (("slave.conf", "slave"), ("slavelist.txt", "master")):
        os.mkfifo(str(folder / name))
        told = "install.sh: cannot read %s: it is a pipe, and no file" % (folder / name)
        assert installer.refused(role, shell=shell) == told
    assert "of which slave.conf has a mistake" in installer.check("uninstall", shell=shell)


def test_settings_of_the_environment_go_into_a_new_slave_conf(installer):
    env = {"SERVER_UPDATE_TIMEOUT": "5", "SERVER_UPDATE_PORT": "80"}
    installer.check("slave", "--port", "81", env=env)
    text = (installer.stage / "etc/server-update/slave.conf").read_text()
    assert re.findall("(?m)^[A-Z_]+=.*", text) == ["PORT=81", "TIMEOUT=5"]


PASSWORD = "s3cr3t"
WITH_PASSWORD = "https://u:%s@127.0.0.1/x" % PASSWORD


@pytest.mark.parametrize("form", daily(1, ["option", "environment"]))
def test_a_slave_conf_with_a_password_is_not_for_others_to_read(installer, form):
    if form == "option":
        out = installer.check("slave", "--base-url", WITH_PASSWORD)
    else:
        out = installer.check("slave", env={"SERVER_UPDATE_BASE_URL": WITH_PASSWORD})
    conf = installer.stage / "etc/server-update/slave.conf"
    assert "\nBASE_URL=%s\n" % WITH_PASSWORD in conf.read_text()
    assert stat.S_IMODE(conf.stat().st_mode) == 0o640
    assert PASSWORD not in out
    # nor is it told in a complaint, nor changed later, but for good advice
    told = installer.refused("slave", "--base-url", "https://u:%s@other/x" % PASSWORD)
    assert "says BASE_URL=https://127.0.0.1/x: change that" in told
    assert PASSWORD not in told
    assert "Others can read" not in installer.check("slave")
    conf.chmod(0o644)
    out = installer.check("slave")
    advice = "  chgrp \"$(id -g root)\" '%s' && chmod 640 '%s'" % (conf, conf)
    assert "Others can read the password in %s; do:\n%s\n" % (conf, advice) in out
    assert stat.S_IMODE(conf.stat().st_mode) == 0o644


def test_not_roots_slave_conf_with_a_password_is_his(installer, as_user, tmp_path):
    prefix = tmp_path / "prefix"
    prefix.mkdir(mode=0o777)
    prefix.chmod(0o777)
    options = ["--prefix", str(prefix), "--base-url", WITH_PASSWORD]
    assert PASSWORD not in installer.check("slave", *options, staged=False, before=as_user)
    conf = prefix / "etc/server-update/slave.conf"
    assert stat.S_IMODE(conf.stat().st_mode) == 0o640


def test_not_root_and_no_prefix_is_told_what_to_do(installer, as_user):
    assert installer.refused("slave", staged=False, before=as_user, status=1) == (
        'install.sh: not root: use sudo, or --prefix "$HOME/.local"'
    )


def tools_without(folder, *missing):
    """A PATH that has all tools but these."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for name in os.listdir(place) if os.path.isdir(place) else []:
            target = folder / name
            if name not in missing:
                if target.is_symlink():
                    target.unlink()
                target.symlink_to(os.path.join(place, name))
    return {"PATH": str(folder)}


@pytest.mark.slow
def test_a_missing_tool_is_named(installer, tmp_path):
    no_git = tools_without(tmp_path / "no-git", "git")
    assert installer.refused("slave", env=no_git, status=1) == (
        "install.sh: no git: install it first"
    )
    assert "wrote" in installer.check("master", env=no_git)
    no_python = tools_without(tmp_path / "no-python", "python3")
    for role in ("slave", "master"):
        assert installer.refused(role, env=no_python, status=1) == (
            "install.sh: no python3: install it first"
        )


NEEDED = (("slave", "slave-activate"), ("slave", "slave.py"), ("master", "slavelist.txt"))


@pytest.mark.slow
def test_a_missing_script_is_named(installer):
    for role, name in NEEDED:
        (installer.folder / name).rename(installer.folder / "away")
        message = "install.sh: no %s beside install.sh" % name
        assert installer.refused(role, status=1) == message
        (installer.folder / "away").rename(installer.folder / name)


FAKE_PYTHON = """#!/bin/sh
[ "$1" = -c ] || exec %s "$@"
exec %s -c 'import sys; %s; exec(sys.argv[1])' "$2"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ("sys.version_info = (3, 6, 9)", "python3 is 3.6 here, and must be 3.7 or newer"),
        (
            "sys.modules['ctypes'] = None",
            "ModuleNotFoundError: import of ctypes halted; None in sys.modules",
        ),
    ],
)
def test_a_python_that_is_too_old_or_incomplete_is_told(installer, tmp_path, change, message):
    folder = tmp_path / "tools"
    folder.mkdir()
    change = change.replace("'", "'\\''")
    (folder / "python3").write_text(FAKE_PYTHON % (PYTHON, PYTHON, change))
    (folder / "python3").chmod(0o755)
    env = {"PATH": str(folder) + os.pathsep + os.environ["PATH"]}
    for role in ("slave", "master"):
        assert installer.refused(role, env=env, status=1) == "install.sh: " + message


@pytest.mark.slow
def test_a_target_that_cannot_be_written_is_told(installer, as_user):
    installer.stage.mkdir(mode=0o555)
    assert installer.refused("slave", before=as_user, status=1) == (
        "install.sh: cannot write %s/usr/local/bin/slave-activate: Permission denied"
        % installer.stage
    )
    installer.stage.chmod(0o755)
    (installer.stage / "usr/local/bin/slave.py").mkdir(parents=True)
    done = installer.run("slave")
    assert done.returncode == 1 and done.stderr == (
        "install.sh: %s/usr/local/bin/slave.py is a folder, and should be a file: "
        "move it away first\n" % installer.stage
    )


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_a_full_and_a_read_only_disk_are_told(installer, small_disk, shell):
    installer.stage = small_disk(8 * 4096)
    done = installer.run("slave", shell=shell)
    assert done.returncode == 1
    assert re.fullmatch(
        r"install.sh: cannot write %s/\S+: No space left on device\n"
        % re.escape(str(installer.stage)),
        done.stderr,
    )
    assert not [name for name in files(installer.stage) if name.endswith("-new")]
    subprocess.check_call(["mount", "-o", "remount,ro", str(installer.stage)])
    done = installer.run("slave", shell=shell)
    assert done.returncode == 1 and done.stderr.endswith(": Read-only file system\n")
    assert done.stderr.count("\n") == 1


def test_help_names_every_option(installer):
    out = installer.check("--help")
    text = (installer.folder / "install.sh").read_text()
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+(?= [|)]|\))", text)) - {"--help"}:
        assert "  %s" % option in out
    assert out.startswith("install.sh master [SLAVE...]") and "set -eu" not in out


# --- killed, and two at once ---


@pytest.mark.slow
@pytest.mark.parametrize("role", ["slave", "uninstall"])
def test_what_a_killed_run_left_beside_a_file_is_removed(installer, role):
    installer.check("slave")
    half = installer.stage / "usr/local/bin/slave.py.server-update-new"
    half.write_text("half a scr")
    installer.check(role)
    assert not half.exists()


WRAPPER = """#!/bin/sh
# Counts its calls; the one whose number is KILL_AT (or a later one, in a pipe) kills the install
# in place of doing its work.
echo >>"$COUNT"
if [ "$(%(wc)s -l <"$COUNT")" -ge "$KILL_AT" ]; then
  kill -KILL "$(%(cat)s "$COUNT.pid")" "$PPID"
  exit 137
fi
exec %(tool)s "$@"
"""
TOOLS = "cat chmod cmp dirname find grep id ln mkdir mv python3 readlink rm sed sh tail touch tr"


def make_wrappers(folder):
    folder.mkdir()
    places = {name: shutil.which(name) for name in TOOLS.split() + ["wc"]}
    for name in TOOLS.split():
        text = WRAPPER % {"tool": places[name], "wc": places["wc"], "cat": places["cat"]}
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return str(folder) + os.pathsep + os.environ["PATH"]


@pytest.mark.slow
def test_killed_at_any_command_the_next_run_completes(installer, tmp_path):
    path, count = make_wrappers(tmp_path / "tools"), tmp_path / "count"
    wanted = Installer(tmp_path / "reference")
    wanted.check("slave", "--port", "80")

    def run_killed_at(number):
        """Run it in a fresh stage; how many commands it ran."""
        count.write_text("")
        shutil.rmtree(str(installer.stage), ignore_errors=True)
        note_pid = ("/bin/sh", "-c", 'echo $$ >"$COUNT.pid"; exec "$@"', "sh")
        env = {"PATH": path, "COUNT": str(count), "KILL_AT": str(number or 10**6)}
        done = installer.run("slave", "--port", "80", env=env, before=note_pid, shell="/bin/sh")
        assert done.returncode == (-signal.SIGKILL if number else 0), done
        return count.read_text().count("\n")

    total = run_killed_at(0)
    assert total > KILL_POINTS
    for point in range(KILL_POINTS):
        run_killed_at(1 + point * (total - 1) // (KILL_POINTS - 1))
        installer.check("slave", "--port", "80")
        assert files(installer.stage) == files(wanted.stage)
        for name, mode in SLAVE_FILES.items():
            if not mode.startswith("->"):
                assert (installer.stage / name).read_bytes() == (wanted.stage / name).read_bytes()


@pytest.mark.slow
def test_many_at_once_end_in_one_whole_install(installer, tmp_path):
    newer = Installer(tmp_path / "newer")
    newer.stage = installer.stage
    for name in ("slave.py", "slave-activate"):
        with (newer.folder / name).open("a") as script:
            script.write("# newer\n")
    env = dict(os.environ, DESTDIR=str(installer.stage))
    running = [
        subprocess.Popen(
            ["sh", str(one.folder / "install.sh"), "slave"],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for one in [installer, newer] * (AT_ONCE // 2)
    ]
    for process in running:
        assert (process.communicate()[1], process.returncode) == (b"", 0)
    assert files(installer.stage) == SLAVE_FILES
    for name in ("slave.py", "slave-activate"):
        written = (installer.stage / "usr/local/bin" / name).read_bytes()
        assert written in [(one.folder / name).read_bytes() for one in (installer, newer)]


@pytest.mark.slow
def test_who_waits_for_another_run_says_so(installer):
    folder = os.open(str(installer.stage.parent), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        env = dict(os.environ, DESTDIR=str(installer.stage))
        command = ["sh", str(installer.folder / "install.sh"), "slave", "--user", "nobody"]
        waiting = subprocess.Popen(command, env=env, stdout=subprocess.PIPE)
        assert waiting.stdout.readline() == b"waiting for another install.sh\n"
        assert contents(installer.stage) == {}
    finally:
        os.close(folder)
    assert b"wrote" in waiting.communicate()[0]
    assert waiting.returncode == 0


# --- services ---


def staged_unit(installer, *args):
    """The unit, made to name the staged slave.py, for tools that look for it."""
    installer.check("slave", *args)
    unit = installer.stage.parent / (SERVICE + ".service")
    text = (installer.stage / UNIT).read_text()
    unit.write_text(text.replace('ExecStart="/', 'ExecStart="%s/' % installer.stage))
    return unit


def test_the_unit_is_sound_and_well_closed(installer):
    need("systemd-analyze")
    for args in ([], ["--prefix", "/opt/my tools", "--serve", "/srv/a page", "--user", "alice"]):
        unit = staged_unit(installer, *args)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        ours = [line for line in done.stdout.decode().splitlines() if SERVICE in line]
        assert (done.returncode, ours) == (0, [])
        assert exposure(unit) <= MAX_EXPOSURE


def exposure(unit):
    """How open systemd finds a unit, from 0 (closed) to 10."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    out = subprocess.check_output(command).decode()
    return float(re.search(r"Overall exposure level for .*: ([\d.]+)", out).group(1))


@pytest.mark.parametrize("user", daily(1, ["root", "nobody"]))
def test_the_unit_is_as_closed_as_that_of_version_1(installer, tmp_path, user):
    need("systemd-analyze")
    old = Installer(tmp_path / "old", version_1.unpack(tmp_path / "version 1"))
    before = exposure(staged_unit(old, "--user", user))
    now = exposure(staged_unit(installer, "--user", user))
    assert round(now - before, 1) <= EXPOSURE_OF_CAP_KILL, (before, now)


def test_the_unit_says_why_beside_each_line_that_is_open(installer):
    unit = staged_unit(installer).read_text()
    for line in (
        "RestrictAddressFamilies=",
        "ProtectSystem=full",
        "UMask=0022",
        "MemoryDenyWriteExecute=no",
    ):
        assert re.search(r"(?m)^# Open: .+\n%s" % re.escape(line), unit), line
    assert re.search(r"(?m)^# Open: .+\n# .+\nCapabilityBoundingSet=", unit)
    for line in (
        "After=network-online.target\nWants=network-online.target",
        "Restart=on-failure",
        "TimeoutStopSec=20",
        "KillMode=mixed",
    ):
        assert "\n%s\n" % line in unit


STUB_OPENRC_RUN = """#!/bin/sh
# does what openrc-run and supervise-daemon.sh do with a service script, and prints it all
need() { echo "need $*"; }
use() { echo "use $*"; }
checkpath() { echo "checkpath $*"; }
supervise_daemon() { for word in "$@"; do echo "<$word>"; done; }
. "$1"
depend
start_pre
eval supervise_daemon ${command_user+--user} $command_user ${error_log+--stderr} $error_log \
  --retry $retry --respawn-delay $respawn_delay --respawn-max $respawn_max \
  $command -- $command_args $command_args_foreground
echo "supervisor $supervisor, PATH $PATH"
"""


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["busybox ash", "dash"])
def test_the_openrc_script_starts_the_slave(installer, tmp_path, shell):
    (installer.stage / "sbin").mkdir(parents=True)
    (installer.stage / "sbin/openrc-run").write_text("")
    installer.check(
        "slave", "--prefix", "/opt/my tools", "--serve", "/srv/a page", "--user", "nobody"
    )
    assert files(installer.stage)[OPENRC] == "755" and UNIT not in files(installer.stage)
    stub = tmp_path / "openrc-run"
    stub.write_text(STUB_OPENRC_RUN)
    script = installer.stage / OPENRC
    assert script.read_text().startswith("#!/sbin/openrc-run\n")
    assert subprocess.call([*shell.split(), "-n", str(script)]) == 0
    out = subprocess.check_output([*shell.split(), str(stub), str(script)]).decode()
    assert out.splitlines() == [
        "need net",
        "use dns",
        "checkpath --file --owner nobody --mode 0640 /var/log/server-update-slave.log",
        *["<--user>", "<nobody>", "<--stderr>", "</var/log/server-update-slave.log>"],
        *["<--retry>", "<TERM/20/KILL/5>", "<--respawn-delay>", "<5>", "<--respawn-max>", "<0>"],
        *["</opt/my tools/bin/slave.py>", "<-->", "</srv/a page>"],
        "supervisor supervise-daemon, PATH /opt/my tools/bin:" + SYSTEM_PATH,
    ]
    before = contents(installer.stage)
    installer.check("slave", "--prefix", "/opt/my tools")
    assert contents(installer.stage) == before  # user and served file are kept


# --- man pages and completion ---


@pytest.mark.parametrize(
    "name, section", [("server-update", 1), ("slave.py", 8), ("slave-activate", 8)]
)
def test_a_man_page_is_the_help(installer, name, section):
    installer.check("master" if section == 1 else "slave")
    page = installer.stage / ("usr/local/share/man/man%d/%s.%d" % (section, name, section))
    text = page.read_text()
    head, _, body = text.partition(".SH DESCRIPTION\n.nf\n")
    assert re.search(r"\n\.TH %s %d\n\.SH NAME\n%s \\- \w.*\n$" % (name, section, name), head)
    assert not re.search(r"(?m)^[.']|(?<!\\)-", body)
    plain = re.sub(r"\\(-|e|&)", lambda m: {"-": "-", "e": "\\", "&": ""}[m.group(1)], body)
    interpreter = "sh" if name == "slave-activate" else "python3"
    env = dict(os.environ, COLUMNS="80", NO_COLOR="1")
    script = str(installer.folder / name)
    assert plain == subprocess.check_output([interpreter, script, "--help"], env=env).decode()


COMPLETE = r"""
set -o history
history -s 'server-update --status'
history -s 'cd /; server-update --ref v1 hanuman'
history -s 'echo server-update-this'
history -s 'sudo server-update site'
. "$1"; shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_server_update
printf '%s\n' "${COMPREPLY[@]}"
complete -p server-update
"""


@pytest.fixture
def complete(installer):
    need("bash")
    (installer.stage / "usr/share/bash-completion").mkdir(parents=True)
    installer.check("master")
    script = installer.stage / "usr/local/share/bash-completion/completions/server-update"

    def run(*words):
        """What bash offers after these words, the last of which is being typed."""
        out = subprocess.check_output(["bash", "-c", COMPLETE, "bash", str(script), *words])
        *offered, binding = out.decode().splitlines()
        assert binding == "complete -o default -F _server_update server-update"
        return [word for word in offered if word]

    return run


def test_completion_offers_options_and_names_of_earlier_updates(complete, server_update):
    assert complete("server-update", "") == ["hanuman", "site"]
    assert complete("server-update", "--ref", "v1", "ha") == ["hanuman"]
    assert complete("server-update", "--li") == ["--list", "--limit"]
    assert complete("server-update", "--list", "") == []  # bash offers files itself
    offered = complete("server-update", "--")
    done = subprocess.check_output([sys.executable, str(SOURCES / "server-update"), "--help"])
    assert set(offered) == set(re.findall(r"(?m)^  (?:-\w, )?(--[a-z-]+)", done.decode()))
    assert {"--list", "--quiet", "--json", "--status", "--help"} <= set(offered)
