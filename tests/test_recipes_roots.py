"""Recipes for what a host has beside a slave (a web server, cron, a container), on bare Debian."""

import subprocess

import pytest
import roots
from install_support import SCRIPTS
from pages import BLOCKS
from processes import wait_until
from product import SOURCES, copy_scripts
from upstream import Repo

CHECKOUT = "/root/checkout"
SUITE = "bookworm"  # into newer ones debootstrap can't put cron
PACKAGES = "python3,git,curl,nginx-light,cron"
CRON_S = 120  # it looks once a minute
UPSTREAM = "/srv/up/hanuman.git"
# sh SOURCE TARGET: SOURCE is at TARGET there, read only; its process is written down in /run.
CONTAINER = """
mount --bind "$1" "$2"
mount -o remount,bind,ro "$2"
echo $$ >"/run$2"
exec sleep 600
"""
pytestmark = pytest.mark.slow


@pytest.fixture
def host(tmp_path):
    """A Debian machine that is master and slave, the slave run by deploy; .upstream is its forge.
    """
    if roots.why_not():
        pytest.skip(roots.why_not())
    one = roots.Machine(roots.find_root(SUITE, PACKAGES), tmp_path / "machine")
    started = []
    try:
        copy_scripts(SOURCES, one.path(CHECKOUT), *SCRIPTS)
        one.check("useradd", "-m", "-s", "/bin/sh", "deploy")
        (one.srv / "up").mkdir()
        one.upstream = Repo(one.srv / "up/hanuman.git")
        push(one, "one\n")
        install = ["./install.sh", "slave", "--user", "deploy", "--base-url", "/srv/up"]
        one.check(*install, cwd=CHECKOUT)
        one.check("./install.sh", "master", "127.0.0.1", cwd=CHECKOUT)
        started.append(start(one, "su", "deploy", "-c", "slave.py"))
        wait_until(lambda: one.run("curl", "-s", "127.0.0.1:9999/healthz").stdout == "ok\n")
        one.check("server-update", "hanuman")
        one.start = lambda *command: started.append(start(one, *command))
        yield one
    finally:
        one.close()
        for process in started:
            process.wait()


def start(machine, *command):
    null = subprocess.DEVNULL
    return subprocess.Popen(machine.command(*command), stdin=null, stdout=null, stderr=null)


def push(machine, text):
    """A commit with this in index.html."""
    commit = machine.upstream.commit({"index.html": text, ".gitmodules": ""})
    machine.check("chown", "-R", "deploy:", "/srv/up")
    return commit


def find(start_of_text):
    """The text of the one block of recipes.md that begins so."""
    (text,) = [block.text for block in BLOCKS if block.begins("recipes.md", start_of_text)]
    return text


def test_nginx_serves_each_update_and_no_git(host):
    """The page's block as a site of Debian's nginx; /srv/www is as --repos would have it."""
    host.check("rm", "/etc/nginx/sites-enabled/default")
    host.check("chmod", "755", "/home/deploy")
    host.check("ln", "-s", "/home/deploy/repos", "/srv/www")
    host.path("/etc/nginx/sites-enabled/hanuman").write_text(find("server {"))
    host.check("nginx")
    get = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}"]
    for path in (".git/HEAD", ".git/config", ".git/", ".git", ".gitmodules", "a/../.git/HEAD"):
        assert host.check(*get, "--path-as-is", "http://127.0.0.1/" + path) == "404", path
    for text in ("one\n", "two\n"):
        push(host, text)
        host.check("server-update", "hanuman")
        assert host.check("curl", "-s", "http://127.0.0.1/index.html") == text


def test_cron_updates_and_says_nothing(host):
    """Debian's cron with the page's lines, once a minute; what it would mail goes to a file."""
    of_master = find("*/10 * * * * root")
    of_slave = find("*/10 * * * * deploy").replace("hanuman", "shop", 1)  # no master updates it
    shop = Repo(host.srv / "up/shop.git")
    shop.commit({"index.html": "by itself\n"})
    push(host, "by the master\n")
    host.path("/usr/sbin/sendmail").write_text("#!/bin/sh\ncat >>/srv/mail\n")
    host.path("/usr/sbin/sendmail").chmod(0o755)
    host.path("/etc/cron.d/hanuman").write_text((of_master + of_slave).replace("*/10", "*"))
    host.start("cron", "-f")
    updated = {"hanuman": "by the master\n", "shop": "by itself\n"}

    def are_live():
        paths = {name: host.path("/home/deploy/repos/%s/index.html" % name) for name in updated}
        return {name: path.read_text() for name, path in paths.items() if path.exists()} == updated

    wait_until(are_live, CRON_S, 0.2)
    assert not (host.srv / "mail").exists(), (host.srv / "mail").read_text()


def test_a_container_sees_each_update_through_the_folder_above(host):
    """Folders of the host in mount namespaces, as -v mounts them: the page's and the wrong one."""
    folders = {"/home/deploy/repos": "/srv", "/home/deploy/repos/hanuman": "/mnt"}
    for source, target in folders.items():
        host.start("unshare", "-m", "sh", "-ec", CONTAINER, "sh", source, target)

    def find_inside():
        paths = {target: host.path("/run" + target) for target in folders.values()}
        return {target: path.read_text() for target, path in paths.items() if path.exists()}

    wait_until(lambda: all(find_inside().get(target) for target in folders.values()))
    inside = {target: pid.strip() for target, pid in find_inside().items()}

    def read(target, path):
        return host.check("nsenter", "-m", "-r", "-t", inside[target], "cat", target + path)

    assert (read("/srv", "/hanuman/index.html"), read("/mnt", "/index.html")) == ("one\n",) * 2
    push(host, "two\n")
    host.check("server-update", "hanuman")
    assert read("/srv", "/hanuman/index.html") == "two\n"
    old = host.run("nsenter", "-m", "-r", "-t", inside["/mnt"], "cat", "/mnt/index.html")
    assert old.stdout != "two\n", "what the page says of it is no longer so"
