"""install.sh on bare Debian machines: from nothing to an update, an upgrade, and gone again."""

import re
import shutil
import subprocess
import time

import pytest
import roots
import version_1
from install_support import SCRIPTS
from pages import COMMANDS, find_block
from product import ROOT, SOURCES, copy_scripts
from upstream import Repo

CHECKOUT = "/root/a checkout"
SERVICE = "server-update-slave"
STARTED = re.compile(r"To start slave.py as (\w+), .*\n  (.*)\n")
START_TIMEOUT_S = 300
pytestmark = pytest.mark.slow


@pytest.fixture
def machine(tmp_path):
    """machine(SUITE, packages, booted) -> a Machine with the scripts in CHECKOUT."""
    if roots.why_not():
        pytest.skip(roots.why_not())
    machines = []

    def start(suite, packages=roots.BARE, booted=False, srv=None):
        folder = tmp_path / ("machine-%d" % len(machines))
        one = roots.Machine(roots.find_root(suite, packages), folder, booted, srv)
        machines.append(one)
        copy_scripts(SOURCES, one.path(CHECKOUT), *SCRIPTS)
        return one

    yield start
    for one in machines:
        one.close()


def make_upstream(machine, owner="root"):
    """/srv/up/hanuman.git of the machine with one commit."""
    (machine.srv / "up").mkdir()
    repo = Repo(machine.srv / "up/hanuman.git")
    repo.commit({"file": "one\n"})
    machine.check("chown", "-R", owner, "/srv/up")
    return repo


def put_busybox_first(machine):
    """Make busybox's ash /bin/sh, and its tools the first on PATH; the environment for that."""
    machine.path("/bb").mkdir()
    box = subprocess.check_output(["sh", "-c", "command -v busybox"]).decode().strip()
    with open(box, "rb") as program:
        machine.path("/bb/busybox").write_bytes(program.read())
    machine.path("/bb/busybox").chmod(0o755)
    for name in subprocess.check_output([box, "--list"]).decode().split():
        if name != "busybox":
            machine.path("/bb/" + name).symlink_to("busybox")
    machine.check("ln", "-sf", "/bb/busybox", "/bin/sh")
    assert "BusyBox" in machine.run("sh", "-c", "sh --help; ls --help").stdout
    return {"PATH": "/bb:" + roots.PATH}


def list_files(machine):
    """All files that a slave, a master or an install could have written, and where links go."""
    skipped = ["/proc", "/sys", "/dev", "/run", "/tmp", "/root/a checkout", "/srv/up"]
    words = " -o ".join("-path '%s'" % name for name in skipped)
    out = machine.check("sh", "-c", r"find / \( %s \) -prune -o ! -type d -print" % words)
    return set(out.splitlines())


def start_by_hand(machine, out, env, user="root"):
    """Run the command that install.sh printed, until slave.py listens."""
    who, command = STARTED.search(out).groups()
    assert who == user
    log = machine.path("/run/slave.log").open("wb")
    command = machine.command("sh", "-c", "echo $$ >/run/slave.pid; exec " + command, env=env)
    process = subprocess.Popen(command, stdout=log, stderr=log)
    end = time.monotonic() + START_TIMEOUT_S
    while b"listening on port 9999" not in machine.path("/run/slave.log").read_bytes():
        said = machine.path("/run/slave.log").read_text()
        assert process.poll() is None and time.monotonic() < end, said
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("suite, tools", [(s, "") for s in roots.SUITES] + [("trixie", "busybox")])
def test_from_a_bare_host_to_an_update_and_gone_again(machine, suite, tools):
    bare = machine(suite)
    env = put_busybox_first(bare) if tools else {}
    upstream = make_upstream(bare)

    def install(*args):
        return bare.check("./install.sh", *args, env=env, cwd=CHECKOUT)

    before = list_files(bare)
    out = install("slave", "--base-url", "/srv/up")
    assert "would" not in out and "Next, on the master: ./install.sh master " in out
    assert "Nothing had to be changed in /usr/local.\n" in install("slave")
    slave = start_by_hand(bare, out, env)
    out = install("master", "127.0.0.1")
    assert "'/usr/local/bin/server-update' NAME\n" in out
    out = bare.check("server-update", "hanuman", env=env)
    assert "127.0.0.1" in out and "live" in out and upstream.head()[:7] in out
    assert bare.path("/root/repos/hanuman/file").read_text() == "one\n"
    assert bare.check("slave-activate", "hanuman", env=env).splitlines()[-1] == "hanuman %s %s" % (
        upstream.head(),
        upstream.head(),
    )

    with bare.path("/etc/server-update/slave.conf").open("a") as conf:
        conf.write("TIMEOUT=60\n")
    with bare.path(CHECKOUT + "/slave.py").open("a") as script:
        script.write("# newer\n")
    out = install("slave")
    assert "replaced /usr/local/bin/slave.py\n" in out and "slave.conf\n" not in out
    assert bare.path("/usr/local/bin/slave.py").read_text().endswith("# newer\n")
    assert bare.path("/etc/server-update/slave.conf").read_text().endswith("TIMEOUT=60\n")
    assert "Nothing had to be changed" in install("slave")
    assert "Nothing had to be changed" in install("master", "127.0.0.1")

    bare.check("sh", "-c", "kill $(cat /run/slave.pid)")
    assert slave.wait(START_TIMEOUT_S) == 0
    assert install("uninstall").splitlines()[-1] == (
        "kept: the settings in /etc/server-update, the clones in /root/repos"
    )
    left = list_files(bare) - before
    assert {name for name in left if not name.startswith("/root/repos/")} == {
        "/etc/server-update/slave.conf",
        "/etc/server-update/slavelist.txt",
    }
    assert before <= list_files(bare)
    assert "Nothing had to be changed" in install("uninstall")


@pytest.mark.parametrize("tools", ["", "busybox"])
def test_another_user_runs_it_where_there_is_no_service_manager(machine, tools):
    bare = machine("trixie")
    env = put_busybox_first(bare) if tools else {}
    upstream = make_upstream(bare, "nobody")

    def install(*args):
        return bare.check("./install.sh", *args, env=env, cwd=CHECKOUT)

    bare.path("/srv/page").write_text("a page\n")
    args = ["--repos", "/srv/clones", "--base-url", "/srv/up", "--serve", "/srv/page"]
    out = install("slave", "--user", "nobody", *args)
    command = "su -s /bin/sh nobody -c \"exec '/usr/local/bin/slave.py' '/srv/page'\""
    assert STARTED.search(out).groups() == ("nobody", command)
    out = install("slave")
    assert STARTED.search(out).groups() == ("nobody", command)
    assert "Nothing had to be changed" in out
    slave = start_by_hand(bare, out, env, "nobody")
    install("master", "127.0.0.1")
    assert upstream.head()[:7] in bare.check("server-update", "hanuman", env=env)
    assert bare.check("stat", "-c", "%U", "/srv/clones/hanuman") == "nobody\n"
    # su of util-linux waits for the slave; that of busybox becomes it
    children = "$(cat /proc/$pid/task/$pid/children)"
    bare.check("sh", "-c", "pid=$(cat /run/slave.pid); kill %s || kill $pid" % children)
    assert slave.wait(START_TIMEOUT_S) == 0
    start = "/usr/local/share/server-update/start-slave"
    start_by_hand(bare, "To start slave.py as nobody, here:\n  %s\n" % start, env, "nobody")
    assert upstream.head()[:7] in bare.check("server-update", "hanuman", env=env)
    assert "removed %s\n" % start in install("uninstall")


def test_a_host_without_services_keeps_no_user_of_version_1(machine):
    bare = machine("trixie")
    version_1.unpack(bare.path("/root/old"))
    bare.check("sh", "-c", "useradd -m alice; useradd -m bob")
    options = ["--user", "alice", "--base-url", "/srv/up"]
    bare.check("./install.sh", "slave", *options, cwd="/root/old")
    secret = bare.path("/etc/server-update/secret")
    secret.write_text("x" * 32)
    secret.chmod(0o600)
    bare.check("chown", "alice", "/etc/server-update/secret")

    def install(*args):
        env = {"SUDO_USER": "bob"}
        return STARTED.search(bare.check("./install.sh", *args, env=env, cwd=CHECKOUT)).group(1)

    # As CHANGELOG says: it is told once more, and from then on kept. A guess takes no secret away.
    assert install("slave") == "bob"
    bare.path("/usr/local/share/server-update/start-slave").unlink()
    assert bare.check("stat", "-c", "%U", "/etc/server-update/secret") == "alice\n"
    assert install("slave", "--user", "alice") == "alice"
    assert install("slave") == "alice"
    assert install("slave", "--user", "bob") == "bob"
    assert bare.check("stat", "-c", "%U", "/etc/server-update/secret") == "bob\n"


LACKING = {
    "https://git.example.org/team": ["install ca-certificates."],
    "git@git.example.org:team": ["install openssh-client."],
    "ssh://git.example.org/team": ["install openssh-client."],
    "/srv/up": [],
    "http://git.example.org/team": [],
}


def test_what_git_lacks_for_an_address_is_named(machine):
    bare = machine("trixie")
    for base_url, missing in LACKING.items():
        out = bare.check("./install.sh", "slave", "--base-url", base_url, cwd=CHECKOUT)
        assert re.findall("(?m)^There (?:is|are) no .* (install .*)$", out) == missing, base_url
        bare.path("/etc/server-update/slave.conf").unlink()


def test_a_user_who_is_gone_keeps_nobody_from_uninstalling(machine):
    bare = machine("trixie")
    bare.check("useradd", "-m", "deploy")
    bare.check("./install.sh", "slave", "--user", "deploy", cwd=CHECKOUT)
    bare.check("userdel", "deploy")
    done = bare.run("./install.sh", "slave", cwd=CHECKOUT)
    assert (done.returncode, done.stdout) == (2, "install.sh: there is no user 'deploy' here\n")
    assert "wrote" in bare.check("./install.sh", "master", "web1", cwd=CHECKOUT)
    out = bare.check("./install.sh", "uninstall", cwd=CHECKOUT)
    assert "removed /usr/local/bin/slave.py\n" in out
    assert out.endswith("the clones of 'deploy', who is no user here any more\n")


# --- the README, word for word, on a master and three slaves ---

WEBS = ("web1", "web2", "web3")
CURL = """#!/usr/bin/python3
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1]).read().decode())
"""
# What the README takes for granted: a forge, and that root of the master may log in on the slaves.
GITCONFIG = '[url "/srv/up/"]\n  insteadOf = https://git.example.org/team/\n'
MAKE_KEY = "mkdir -p -m 700 /root/.ssh && ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519"


class Site:
    """A master and three slaves on one network, with a forge that all of them reach."""

    def __init__(self, machine, tmp_path, suite, tools, is_booted):
        self.is_booted, self.env = is_booted, {}
        packages = roots.BOOTED if is_booted else roots.BARE
        srv = tmp_path / "srv"
        self.machines = {
            name: machine(suite, packages, is_booted, srv) for name in ("master", *WEBS)
        }
        self.master = self.machines["master"]
        roots.connect(self.machines)
        for one in self.machines.values():
            one.path("/etc/gitconfig").write_text(GITCONFIG)
            for folder in ("tests", "docs"):
                shutil.copytree(str(ROOT / folder), str(one.path(CHECKOUT)) + "/" + folder)
            if tools:
                self.env = put_busybox_first(one)
        if is_booted:
            self.let_root_log_in()
        else:
            self.put(self.machines["web1"], "/usr/local/bin/curl", CURL)
        self.upstream = make_upstream(self.master)
        self.upstream.git("tag", "v1.4")

    def put(self, machine, name, text):
        machine.path(name).write_text(text)
        machine.path(name).chmod(0o755)

    def let_root_log_in(self):
        self.master.check("sh", "-c", MAKE_KEY)
        key = self.master.path("/root/.ssh/id_ed25519.pub").read_text()
        for name in WEBS:
            folder = self.machines[name].path("/root/.ssh")
            folder.mkdir(mode=0o700, exist_ok=True)
            (folder / "authorized_keys").write_text(key)
        known = self.master.check("ssh-keyscan", "-T", "60", "-t", "ed25519", *WEBS)
        lines = [line for line in known.splitlines() if line.startswith("web")]
        assert len(lines) == len(WEBS), known
        self.master.path("/root/.ssh/known_hosts").write_text("\n".join(lines) + "\n")

    def run(self, name, text, timeout=300, **kwargs):
        """What a user types on a machine; what it said."""
        return self.machines[name].check(
            "sh", "-ec", text, env=self.env, cwd=CHECKOUT, timeout=timeout, **kwargs
        )

    def run_over_ssh(self, command):
        """A printed `LOCAL | ssh root@HOST 'REMOTE'`; without an ssh there, in two halves."""
        if self.is_booted:
            self.run("master", command)
            return
        local, host, remote = re.fullmatch(
            r"(?s) *(.*) \|\n *ssh root@(\w+) '(.*)'\n", command
        ).groups()
        key = self.run("master", local)
        self.run(host, "printf '%%s' '%s' | { %s; }" % (key, remote))


@pytest.mark.parametrize(
    "suite, tools, is_booted",
    [
        ("bullseye", "", False),
        ("bookworm", "", False),
        ("trixie", "busybox", False),
        ("trixie", "", True),
    ],
)
def test_the_readme_is_followed_to_the_letter(machine, tmp_path, suite, tools, is_booted):
    site = Site(machine, tmp_path, suite, tools, is_booted)
    tried, slave, master, secret, update, use, habits = [
        block.text for block in COMMANDS if block.page == "README.md"
    ]

    assert tried == "sh tests/demo\nsh tests/run\n"  # the second of which is what runs this
    assert "3 live of 3" in site.run("master", "sh tests/demo")
    started = []
    for name in WEBS:
        out = site.run(name, slave)
        if is_booted:
            assert "started the service" in out
        else:
            started.append(start_by_hand(site.machines[name], out, site.env))
    site.run("master", master)

    # The old habits, before there is a secret.
    curl, serve, by_hand = habits.splitlines()
    assert '"update"' in site.run("web1", curl)
    site.run("web1", by_hand)
    assert site.machines["web1"].path("/root/repos/hanuman/file").read_text() == "one\n"

    out = site.run("master", secret)
    commands = re.findall(r"(?m)^  .* \|\n    ssh .*\n", out)
    assert len(commands) == len(WEBS)
    for command in commands:
        site.run_over_ssh(command)
    refused = site.machines["web1"].run("sh", "-c", curl + " 2>&1", env=site.env)
    assert "signature" in refused.stdout or "401" in refused.stdout, refused.stdout

    first = site.upstream.head()
    second = site.upstream.commit({"file": "two\n"})
    site.master.check("chown", "-R", "root", "/srv/up")
    out = site.run("master", update)
    assert "3 live of 3" in out and "commits: %s on 3" % second[:7] in out
    for name in WEBS:
        assert site.machines[name].path("/root/repos/hanuman/file").read_text() == "two\n"
    (back,) = re.findall("(?m)^to go back: (.*)$", out)
    assert "commits: %s on 3" % first[:7] in site.run("master", back)
    for command in use.splitlines():
        site.run("master", command)
    assert "3 live of 3" in site.run("master", "server-update --status hanuman")

    # slave.py by hand, where the service isn't
    if is_booted:
        site.run("web3", "systemctl stop " + SERVICE)
    else:
        site.machines["web3"].check("sh", "-c", "kill $(cat /run/slave.pid)")
        started[-1].wait(START_TIMEOUT_S)
    site.upstream.commit({"index.html": "a page\n"})
    site.run("web3", "slave-activate hanuman")
    path = "PATH=/usr/local/bin:$PATH; cd /usr/local/bin; "  # where slave.py is
    start_by_hand(
        site.machines["web3"],
        "To start slave.py as root, here:\n  sh -c '%s%s'\n" % (path, serve),
        site.env,
    )
    ask = "import urllib.request; print(urllib.request.urlopen('http://web3:9999/').read())"
    assert "a page" in site.run("master", 'python3 -c "%s"' % ask)


# --- with OpenRC, or what its commands do for us ---

OPENRC = {
    "/sbin/openrc-run": """#!/bin/sh
pidfile=/run/${1##*/}.pid
need() { :; }
use() { :; }
checkpath() { touch "$6"; }
. "$1"
started=/run/openrc/started/${1##*/}
case $2 in
  start)
    start_pre
    eval "set -- $command $command_args"
    "$@" </dev/null >/dev/null 2>>"$error_log" &
    echo $! >"$pidfile"
    mkdir -p "${started%/*}"
    ln -sfn "$1" "$started" ;;
  stop) kill "$(cat "$pidfile")"; while "$0" "$1" status; do sleep 0.1; done ;;
  restart) "$0" "$1" stop; exec "$0" "$1" start ;;
  status) read -r pid 2>/dev/null <"$pidfile" && grep -q '^State:.[^Z]' "/proc/$pid/status" ;;
esac 2>/dev/null
""",
    "/sbin/rc-service": '#!/bin/sh\nexec "/etc/init.d/$2" "$3"\n',
    "/sbin/rc-update": """#!/bin/sh
mkdir -p "/etc/runlevels/$4"
case $2 in
  add) ln -s "/etc/init.d/$3" "/etc/runlevels/$4/$3" ;;
  delete) rm "/etc/runlevels/$4/$3" ;;
esac
""",
}


def put_openrc(machine):
    for name, text in OPENRC.items():
        machine.path(name).write_text(text)
        machine.path(name).chmod(0o755)


def see_a_changed_slave_conf_taken(machine, find_pid, install):
    """What runs has the settings that are told, also where nothing of ours was replaced."""
    conf, first = "/etc/server-update/slave.conf", find_pid()
    changed = "%s has been changed since slave.py started" % conf
    text = machine.path(conf).read_text() + "REPOS_DIR=/srv/other\nSLAVELIST=%s\n"
    # As a copy that keeps its time: what makes it new is that it came here.
    machine.path(conf + ".copy").write_text(text % "/etc/server-update/slavelist.txt")
    machine.check("touch", "-d", "2020-01-01", conf + ".copy")
    machine.check("mv", conf + ".copy", conf)
    out = install("slave", "--dry-run")
    assert changed + "\nwould" in out and "would restart the service" in out
    out = install("slave", "--no-start")
    assert "left as it was.\n%s: restart it.\n" % changed in out
    assert find_pid() == first
    out = install("relay", "web1", "--repo", "hanuman")
    assert changed + "\n" in out and "restarted the service %s\n" % SERVICE in out
    assert "with its clones in /srv/other;" in out
    second = find_pid()
    assert second not in (first, "0")
    assert "changed since" not in install("slave")
    assert "Nothing had to be changed" in install("slave")
    machine.check("touch", conf)
    assert "restarted the service %s\n" % SERVICE in install("slave")
    assert find_pid() not in (first, second)
    machine.check("touch", "-d", "2100-01-01", conf)
    install("slave")
    assert "Nothing had to be changed" in install("slave")


def test_the_openrc_service_starts_and_restarts_only_on_change(machine):
    bare = machine("bookworm")
    env = put_busybox_first(bare)
    put_openrc(bare)
    upstream = make_upstream(bare)
    before = list_files(bare)

    def install(*args):
        return bare.check("./install.sh", *args, env=env, cwd=CHECKOUT)

    out = install("slave", "--base-url", "/srv/up", "--prefix", "/opt/my tools")
    assert "enabled the service %s\nstarted the service %s\n" % (SERVICE, SERVICE) in out
    install("master", "127.0.0.1")
    assert upstream.head()[:7] in bare.check("server-update", "hanuman", env=env)
    log = "/var/log/%s.log" % SERVICE
    assert "listening on port 9999" in bare.path(log).read_text()
    first = bare.path("/run/%s.pid" % SERVICE).read_text()
    assert "Nothing had to be changed" in install("slave", "--prefix", "/opt/my tools")
    assert bare.path("/run/%s.pid" % SERVICE).read_text() == first
    with bare.path(CHECKOUT + "/slave.py").open("a") as script:
        script.write("# newer\n")
    assert "restarted the service" in install("slave", "--prefix", "/opt/my tools")
    assert bare.path("/run/%s.pid" % SERVICE).read_text() != first
    assert "stopped" not in install("uninstall")  # that was the master, in /usr/local
    out = install("uninstall", "--prefix", "/opt/my tools")
    assert "stopped %s\ndisabled %s\n" % (SERVICE, SERVICE) in out
    left = {name for name in list_files(bare) - before if not name.startswith("/root/repos/")}
    assert left == {log, "/etc/server-update/slave.conf", "/etc/server-update/slavelist.txt"}


def test_the_openrc_service_has_the_settings_of_a_slave_conf_that_was_edited(machine):
    bare = machine("bookworm")
    env = put_busybox_first(bare)
    put_openrc(bare)

    def install(*args):
        return bare.check("./install.sh", *args, env=env, cwd=CHECKOUT)

    def find_pid():
        return bare.path("/run/%s.pid" % SERVICE).read_text().strip()

    install("slave", "--base-url", "/srv/up")
    see_a_changed_slave_conf_taken(bare, find_pid, install)


# --- with systemd ---


@pytest.fixture
def booted(machine):
    """A machine run by systemd, with a user alice who may be reached by ssh."""
    one = machine("trixie", roots.BOOTED, booted=True)
    one.check("useradd", "-m", "-s", "/bin/sh", "alice")
    return one


def show(machine, name):
    """A property of the service, as systemd has it."""
    return machine.check("systemctl", "show", "-P", name, SERVICE).strip()


def test_the_service_starts_restarts_only_on_change_and_comes_back(booted):
    def install(*args):
        return booted.check("./install.sh", *args, cwd=CHECKOUT)

    upstream = make_upstream(booted, "alice")
    out = install("slave", "--user", "alice", "--base-url", "/srv/up", "--port", "80")
    started = "enabled the service %s\nreloaded units\nstarted the service %s\n"
    assert started % (SERVICE, SERVICE) in out
    assert "slave.py runs as alice on port 80, with its clones in /home/alice/repos;" in out
    install("master", "127.0.0.1:80")
    assert upstream.head()[:7] in booted.check("server-update", "hanuman")
    assert booted.check("stat", "-c", "%U", "/home/alice/repos/hanuman") == "alice\n"

    first = show(booted, "MainPID")
    out = install("slave")
    assert "started" not in out and "Nothing had to be changed" in out
    assert show(booted, "MainPID") == first and show(booted, "User") == "alice"
    assert "would restart the service" not in install("slave", "--dry-run")
    with booted.path(CHECKOUT + "/slave.py").open("a") as script:
        script.write("# newer\n")
    out = install("slave", "--dry-run")
    assert "would replace /usr/local/bin/slave.py\n" in out
    assert "would restart the service %s\n" % SERVICE in out
    assert show(booted, "MainPID") == first
    assert "The service %s is left as it was." % SERVICE in install("slave", "--no-start")
    assert show(booted, "MainPID") == first
    assert "restarted the service" in install("slave")  # what the last run left to do
    second = show(booted, "MainPID")
    assert second not in (first, "0")
    with booted.path(CHECKOUT + "/slave-activate").open("a") as script:
        script.write("# newer\n")
    assert "restarted" not in install("slave")  # slave-activate is read anew by each update

    own = booted.path("/etc/systemd/system/%s.service.d" % SERVICE)
    own.mkdir()
    (own / "own.conf").write_text("[Service]\nRestartSec=100ms\n")
    booted.check("systemctl", "daemon-reload")
    booted.check("systemctl", "kill", "-s", "KILL", "--kill-whom=main", SERVICE)
    end = time.monotonic() + START_TIMEOUT_S
    while show(booted, "MainPID") in (second, "0"):
        assert time.monotonic() < end
        time.sleep(0.1)
    out = install("uninstall")
    assert "stopped %s\ndisabled %s\n" % (SERVICE, SERVICE) in out
    assert out.endswith("the clones in /home/alice/repos\n")
    assert booted.run("systemctl", "cat", SERVICE).returncode == 1


def test_the_service_has_the_settings_of_a_slave_conf_that_was_edited(booted):
    def install(*args):
        return booted.check("./install.sh", *args, cwd=CHECKOUT)

    install("slave", "--user", "alice", "--base-url", "/srv/up")
    see_a_changed_slave_conf_taken(booted, lambda: show(booted, "MainPID"), install)


def test_another_user_gets_what_he_has_to_read(booted):
    def install(*args):
        return booted.check("./install.sh", *args, cwd=CHECKOUT)

    secret, conf = "/etc/server-update/secret", "/etc/server-update/slave.conf"
    booted.check("useradd", "-m", "joe")
    install("slave", "--user", "alice", "--base-url", "https://u:s3cr3t@127.0.0.1/x")
    make = "umask 077; openssl rand -hex 32 >%s; chown alice %s" % (secret, secret)
    booted.check("sh", "-c", make)
    assert booted.check("stat", "-c", "%U:%G %a", conf) == "root:alice 640\n"
    told = ["give %s to joe" % secret, "give %s to the group joe" % conf]
    out = install("slave", "--user", "joe", "--dry-run")
    assert ["would " + line for line in told] == re.findall("(?m)^would give .*", out)
    assert booted.check("stat", "-c", "%U", secret) == "alice\n"
    out = install("slave", "--user", "joe")
    assert [line.replace("give", "gave") for line in told] == re.findall("(?m)^gave .*", out)
    assert show(booted, "User") == "joe" and show(booted, "ActiveState") == "active"
    assert booted.check("stat", "-c", "%U:%G %a", secret) == "joe:root 600\n"
    assert "gave" not in install("slave")
    assert booted.check("stat", "-c", "%U:%G %a", conf) == "root:joe 640\n"
    # Who is in its group can read it.
    booted.check("sh", "-c", "groupadd www; usermod -aG www joe; chgrp www %s" % conf)
    assert "gave" not in install("slave")
    # Root can read all, and takes it from nobody: a master of this machine may be run by joe.
    assert "gave" not in install("slave", "--user", "root")
    assert show(booted, "User") == "root"


def test_an_upgrade_from_version_1_keeps_all_that_it_set_up(booted):
    version_1.unpack(booted.path("/root/old"))
    upstream = make_upstream(booted, "alice")
    page = "/home/alice/repos/hanuman/file"
    options = ["--user", "alice", "--base-url", "/srv/up", "--port", "80", "--serve", page]
    booted.check("./install.sh", "slave", *options, cwd="/root/old")
    booted.check("./install.sh", "master", "127.0.0.1:80", "--new-secret", cwd="/root/old")
    booted.check("chown", "alice", "/etc/server-update/secret")
    booted.check("server-update", "hanuman")
    kept = ("/etc/server-update/slave.conf", "/etc/server-update/slavelist.txt")
    kept += ("/etc/server-update/secret", "/home/alice/repos/.server-update/hanuman.json")
    before = [booted.path(name).read_text() for name in kept]
    first = show(booted, "MainPID")

    out = booted.check("./install.sh", "slave", cwd=CHECKOUT)
    assert "restarted the service" in out
    assert "slave.py runs as alice on port 80, with its clones in /home/alice/repos;" in out
    booted.check("./install.sh", "master", cwd=CHECKOUT)
    assert show(booted, "MainPID") not in (first, "0")
    assert [booted.path(name).read_text() for name in kept] == before
    assert upstream.head()[:7] in booted.check("server-update", "--status", "hanuman")
    commit = upstream.commit({"file": "two\n"})
    assert commit[:7] in booted.check("server-update", "hanuman")
    ask = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1/').read())"
    assert "two" in booted.check("python3", "-c", ask)
    assert "Nothing had to be changed" in booted.check("./install.sh", "slave", cwd=CHECKOUT)

    # And from the shared secret of 1.0 to keys, by what it prints.
    out = booted.check("./install.sh", "master", "--new-secret", cwd=CHECKOUT)
    assert "1. Each slave takes its key beside the shared secret, where alice runs" in out
    assert "  rm '" not in out  # this machine is a slave, too


MAKE_CERTIFICATE = """
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 \
  -keyout /etc/key.pem -out /etc/cert.pem 2>/dev/null
chown alice /etc/key.pem
"""


def wait_for_log(machine, text, times=1):
    """Wait until the service has logged a text so often."""
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        log = machine.run("journalctl", "-u", SERVICE, "-o", "cat").stdout
        if log.count(text) >= times:
            return
        assert time.monotonic() < end, log
        time.sleep(0.1)


def test_a_reload_reads_the_certificate_again(booted):
    booted.check("sh", "-c", MAKE_CERTIFICATE)
    booted.path("/etc/server-update").mkdir()
    conf = "TLS_CERT=/etc/cert.pem\nTLS_KEY=/etc/key.pem\n"
    booted.path("/etc/server-update/slave.conf").write_text(conf)
    booted.check("./install.sh", "slave", "--user", "alice", cwd=CHECKOUT)
    read = "the TLS certificate is read from /etc/cert.pem"
    wait_for_log(booted, read)
    before = show(booted, "MainPID")
    assert show(booted, "Type") == "notify" and show(booted, "ActiveState") == "active"
    booted.check("systemctl", "reload", SERVICE)
    wait_for_log(booted, read, times=2)
    assert show(booted, "MainPID") == before


HOOK_OF_ANOTHER_USER = """#!/bin/sh
touch /srv/up/begun
setpriv --reuid=alice --clear-groups sleep 1000
"""


def test_a_hook_that_became_another_user_can_be_stopped(booted):
    make_upstream(booted)
    hook = booted.path("/etc/server-update/hooks/post-update")
    hook.parent.mkdir(parents=True)
    hook.write_text(HOOK_OF_ANOTHER_USER)
    hook.chmod(0o755)
    booted.check("./install.sh", "slave", "--base-url", "/srv/up", cwd=CHECKOUT)
    with booted.path("/etc/server-update/slave.conf").open("a") as conf:
        conf.write("TIMEOUT=20\n")  # it is to be live before
    booted.check("systemctl", "restart", SERVICE)
    booted.check("./install.sh", "master", "127.0.0.1", cwd=CHECKOUT)
    out = booted.run("server-update", "hanuman").stdout
    assert "post-update hook failed (143): TIMEOUT is over" in out, out
    assert not find_sleeping(booted)


def find_sleeping(machine):
    """The processes of the machine that sleep for 1000 s."""
    program = "for one in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$one; echo; done 2>/dev/null"
    return re.findall("(?m)^sleep 1000 $", machine.run("sh", "-c", program).stdout)


COUNTED_SERVICE = """[Service]
ExecStart=/bin/sh -c 'echo >>/run/starts; exec sleep 1000'
"""


def test_a_hook_of_a_user_has_a_service_restarted(booted):
    booted.check("useradd", "-m", "deploy")
    make_upstream(booted, "deploy")
    booted.path("/etc/systemd/system/hanuman.service").write_text(COUNTED_SERVICE)
    booted.check("systemctl", "start", "hanuman")
    shutil.copytree(str(ROOT / "docs"), str(booted.path(CHECKOUT)) + "/docs")
    install = ["./install.sh", "slave", "--user", "deploy", "--base-url", "/srv/up"]
    booted.check(*install, cwd=CHECKOUT)
    text = find_block("recipes.md", "install -d -o deploy")
    booted.check("sh", "-ec", text, cwd=CHECKOUT)
    booted.check("./install.sh", "master", "127.0.0.1", cwd=CHECKOUT)
    for starts in (2, 3):
        booted.check("server-update", "hanuman")
        line = "until [ $(wc -l </run/starts) = %d ]; do sleep 0.1; done" % starts
        booted.check("sh", "-c", line, timeout=START_TIMEOUT_S)
    booted.check("sh", "-c", "until systemctl is-active hanuman; do sleep 0.1; done")


def test_a_slave_that_cannot_start_is_told(booted):
    booted.path("/etc/server-update").mkdir()
    booted.path("/etc/server-update/slave.conf").write_text("PORT=22\nBASE_URL=/srv/up\n")
    done = booted.run("./install.sh", "slave", cwd=CHECKOUT)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        "install.sh: cannot start the service %s: see journalctl -u %s" % (SERVICE, SERVICE)
    )
    booted.path("/etc/server-update/slave.conf").write_text("PORT=9999\nBASE_URL=/srv/up\n")
    assert "started the service" in booted.run("./install.sh", "slave", cwd=CHECKOUT).stdout


ROOTS_HOOK = """#!/bin/sh
set -eux
chown alice file
test "$(setpriv --reuid=alice --clear-groups id -un)" = alice
install -d -o alice -m 700 /srv/site
touch /srv/site/live
"""


def test_hooks_of_a_slave_run_by_root_may_act_for_others(booted):
    upstream = make_upstream(booted)
    hook = booted.path("/etc/server-update/hooks/post-update")
    hook.parent.mkdir(parents=True)
    hook.write_text(ROOTS_HOOK)
    hook.chmod(0o755)
    booted.check("./install.sh", "slave", "--base-url", "/srv/up", cwd=CHECKOUT)
    booted.check("./install.sh", "master", "127.0.0.1", cwd=CHECKOUT)
    out = booted.check("server-update", "hanuman")
    assert upstream.head()[:7] in out and "hook" not in out, booted.run("journalctl").stdout
    assert booted.check("stat", "-c", "%U", "/root/repos/hanuman/file") == "alice\n"


HOOK = """#!/bin/sh
set -eux
test "$(id -un) $HOME" = "alice /home/alice"
python3 -c 'import mmap; mmap.mmap(-1, 4096, prot=7)' # writes code into memory, as node does
echo "$3" >/srv/site/live
touch /tmp/private
! touch /etc/hacked
! unshare -U true
"""

HTTPS_SERVER = """
import functools, http.server, ssl
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="/srv/up")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8443), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/home/alice/cert.pem", "/home/alice/key.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""

PREPARE = """
set -eu
cd /home/alice
mkdir -m 700 .ssh
ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519
cp .ssh/id_ed25519.pub .ssh/authorized_keys
ssh-keyscan -T 60 -t ed25519 127.0.0.1 >.ssh/known_hosts 2>/dev/null
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 \
  -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem 2>/dev/null
git config -f .gitconfig http.sslCAInfo /home/alice/cert.pem
git --git-dir=/srv/up/hanuman.git update-server-info
chown -R alice: . /srv/up
install -d -o alice /srv/site
"""


def test_a_deploy_key(booted):
    upstream = make_upstream(booted, "alice")
    booted.path("/etc/hosts").write_text("127.0.0.1 localhost git.example.org\n")
    booted.check("useradd", "-m", "deploy")
    text = find_block("recipes.md", "ssh-keygen").replace("ssh-keyscan ", "ssh-keyscan -T 60 ")
    out = booted.check("su", "-s", "/bin/sh", "deploy", "-c", "set -e\n" + text)
    key = re.search("(?m)^ssh-ed25519 .*$", out).group()
    booted.path("/home/alice/.ssh").mkdir(mode=0o700)
    booted.path("/home/alice/.ssh/authorized_keys").write_text(key + "\n")
    booted.check("chown", "-R", "alice:", "/home/alice/.ssh")
    base_url = "alice@git.example.org:/srv/up"
    install = ["./install.sh", "slave", "--user", "deploy", "--base-url", base_url]
    booted.check(*install, cwd=CHECKOUT)
    booted.check("./install.sh", "master", "127.0.0.1", cwd=CHECKOUT)
    assert upstream.head()[:7] in booted.check("server-update", "hanuman")


def test_updates_by_ssh_and_https_and_hooks_work_inside_the_restrictions(booted):
    upstream = make_upstream(booted, "alice")
    booted.check("sh", "-c", PREPARE)
    hooks = booted.path("/etc/server-update/hooks")
    hooks.mkdir(parents=True)
    (hooks / "post-update").write_text(HOOK)
    (hooks / "post-update").chmod(0o755)
    conf = booted.path("/etc/server-update/slave.conf")
    server = subprocess.Popen(booted.command("python3", "-c", HTTPS_SERVER))
    for base_url in ("alice@127.0.0.1:/srv/up", "https://127.0.0.1:8443"):
        conf.write_text("BASE_URL=%s\n" % base_url)
        booted.check("./install.sh", "slave", "--user", "alice", cwd=CHECKOUT)
        booted.check("systemctl", "restart", SERVICE)
        booted.check("./install.sh", "master", "127.0.0.1", cwd=CHECKOUT)
        done = booted.run("server-update", "hanuman")
        log = booted.run("journalctl", "-u", SERVICE, "-o", "cat").stdout
        assert done.returncode == 0 and upstream.head()[:7] in done.stdout, done.stdout + log
        live = booted.path("/srv/site/live").read_text()
        assert live == upstream.head() + "\n"
        upstream.commit({"file": base_url})
        upstream.git("update-server-info")
        booted.check("chown", "-R", "alice:", "/srv/up")
    server.kill()
    server.wait()


def test_stopping_the_service_stops_a_running_update_cleanly(booted):
    make_upstream(booted, "alice")
    booted.path("/etc/server-update/hooks").mkdir(parents=True)
    hook = booted.path("/etc/server-update/hooks/pre-update")
    hook.write_text("#!/bin/sh\ntouch /srv/up/begun\nexec sleep 1000\n")
    hook.chmod(0o755)
    install = ["./install.sh", "slave", "--user", "alice", "--base-url", "/srv/up"]
    booted.check(*install, cwd=CHECKOUT)
    booted.check("./install.sh", "master", "127.0.0.1", cwd=CHECKOUT)
    booted.check("server-update", "--no-wait", "hanuman")
    booted.check("sh", "-c", "until [ -e /srv/up/begun ]; do sleep 0.1; done")
    before = time.monotonic()
    booted.check("systemctl", "stop", SERVICE)
    assert time.monotonic() - before < 60  # systemd's own limit is 90 s
    assert show(booted, "Result") == "success"
    left = booted.check("ls", "-A", "/home/alice/repos", "/home/alice/repos/.server-update")
    assert ".new" not in left and "hanuman.json" in left
    assert '"queued"' in booted.path("/home/alice/repos/.server-update/hanuman.json").read_text()


def test_the_checkout_names_no_mirror():
    if roots.why_not():
        pytest.skip(roots.why_not())
    host = roots.find_mirror().split("/")[2].encode()
    for path in ROOT.rglob("*"):
        if path.is_file() and ".git" not in path.relative_to(ROOT).parts:
            assert host not in path.read_bytes(), path
