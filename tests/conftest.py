"""Fixtures for all tests: the scripts as modules, real upstreams, real slaves in processes."""

import os
import re
import shutil
import subprocess
import sys
from signal import SIGINT, default_int_handler, signal

sys.dont_write_bytecode = True  # before anything of ours is loaded: no __pycache__ in the checkout

import pytest  # noqa: E402
from activate_support import Activate  # noqa: E402
from certificates import Authority  # noqa: E402
from farm import Farm  # noqa: E402
from install_support import Installer  # noqa: E402
from product import (  # noqa: E402
    ISOLATED,
    SOURCES,
    copy_scripts,
    load,
    make_bare_python,
    set_constants,
)
from slave_support import Slave, stop_for_good  # noqa: E402
from update_support import Update  # noqa: E402
from upstream import HttpUpstream, Upstream  # noqa: E402

FORGET = re.compile(
    r"(GIT|SERVER_UPDATE|XDG|SSH)_.*|.*_proxy|NO_COLOR|CLICOLOR.*|FORCE_COLOR|CDPATH|ENV|"
    r"COLUMNS|LINES|PYTHON.*|DESTDIR",
    re.IGNORECASE,
)
# Reasons for which a test may be left out even in CI (anything else fails the run there).
MAY_SKIP_IN_CI = ("no IPv6 on this machine", "this git has no SHA-256 repositories")


# -- the environment -------------------------------------------------------


def pytest_configure(config):
    """Forget what would change a run: git's variables, ours, proxies, colours; obey SIGINT."""
    if config:  # none where the soak test calls this
        config.addinivalue_line("markers", "slow: not for every day, see tests/run")
    signal(SIGINT, default_int_handler)  # a shell's background job ignores it, and what it starts
    for name in [name for name in os.environ if FORGET.fullmatch(name)]:
        del os.environ[name]
    who = {"NAME": "A U Thor", "EMAIL": "author@example.com"}
    os.environ.update(
        {
            "GIT_%s_%s" % (role, key): value
            for role in ("AUTHOR", "COMMITTER")
            for key, value in who.items()
        }
    )
    os.environ["GIT_CONFIG_NOSYSTEM"] = "1"


@pytest.fixture(scope="session")
def python_on_path(tmp_path_factory):
    """A folder whose `python3` is the Python under test, for the scripts that call it by name."""
    return make_bare_python(tmp_path_factory.mktemp("python"))


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch, python_on_path):
    """Each test has a home of its own."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", python_on_path + os.pathsep + os.environ["PATH"])
    return home


# -- nothing is left out quietly -------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """A run that tested nothing fails; in CI, also one that left a test out for no good reason."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly or exitstatus:
        return
    tested = sum(
        len(reporter.stats.get(kind, ())) for kind in ("passed", "failed", "xfailed", "xpassed")
    )
    left_out = [
        report
        for report in reporter.stats.get("skipped", ())
        if not any(reason in str(report.longrepr) for reason in MAY_SKIP_IN_CI)
    ]
    if not tested:
        session.exitstatus = 5
    elif left_out and os.environ.get("CI"):
        session.exitstatus = 1
        for report in left_out:
            print(
                "\nCI leaves nothing out: %s: %s" % (report.nodeid, report.longrepr),
                file=sys.stderr,
            )


# -- the scripts -----------------------------------------------------------


@pytest.fixture
def server_update():
    """server-update as a module."""
    return load("server-update")


@pytest.fixture
def slave():
    """slave.py as a module."""
    return load("slave.py")


@pytest.fixture
def run_script(tmp_path):
    """run_script(NAME, *args, env={}, shell=None, ...): run a copy of a script, alone in a folder.

    A Python script runs under `python3 -I`, a shell script by its #! line or under `shell`
    ("busybox ash"). Returns the CompletedProcess, its output as text.
    """

    def run(name, *args, env=None, shell=None, timeout=300, stdin=subprocess.DEVNULL, **kwargs):
        script = copy_scripts(SOURCES, tmp_path / "alone" / name, name) / name
        if "input" not in kwargs:
            kwargs["stdin"] = stdin
        command = (
            ISOLATED if "python" in script.read_text(encoding="utf-8").split("\n")[0] else []
        )
        command = (shell.split() if shell else command) + [str(script), *map(str, args)]
        return subprocess.run(
            command,
            env=dict(os.environ, **(env or {})),
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            encoding="utf-8",
            errors="surrogateescape",
            **kwargs,
        )

    return run


# -- upstreams -------------------------------------------------------------


@pytest.fixture
def upstream(tmp_path):
    """upstream.create("hanuman", files={...}) makes a real repository; see tests/upstream.py."""
    return Upstream(tmp_path / "upstream")


@pytest.fixture
def repo(upstream):
    """A small repository `r` of `upstream`."""
    return upstream.create("r", {"f": "1"})


@pytest.fixture
def http_upstream(upstream):
    """The repositories of `upstream` over HTTP: .url, .bytes_sent, .requests, .fault, .create."""
    server = HttpUpstream(upstream)
    yield server
    server.close()


# -- slaves ----------------------------------------------------------------


@pytest.fixture
def activate(tmp_path, upstream):
    """slave-activate on the repositories of `upstream`; see tests/activate_support.py."""
    return Activate(tmp_path, upstream.base_path)


@pytest.fixture
def start_slave(tmp_path, upstream):
    """start_slave(BASE_URL=..., TIMEOUT=..., args=[], env={}) -> Slave, listening on 127.0.0.1.

    constants: {NAME: value} of slave.py that are others in this copy, so that nobody waits long.
    """
    slaves = []

    def start(args=(), env=None, wait=True, constants=None, **settings):
        folder = tmp_path / ("slave-%d" % (len(slaves) + 1))
        folder.mkdir()
        settings = {key if "." in key else key.upper(): value for key, value in settings.items()}
        settings.setdefault("BASE_URL", upstream.base_path)
        one = Slave(folder, settings, args, env)
        set_constants(one.bin / "slave.py", constants or {})
        slaves.append(one)
        return one.start(wait)

    yield start
    stop_for_good(*slaves)


@pytest.fixture(scope="module")
def idle_slave(tmp_path_factory):
    """A slave that a file's tests share, those that start nothing at it: they are refused, say."""
    folder = tmp_path_factory.mktemp("idle-slave")
    one = Slave(folder, {"BASE_URL": folder / "upstream"})
    yield one.start()
    stop_for_good(one)


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """A certificate authority that nobody trusts by itself."""
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture
def installer(tmp_path):
    """A checkout and runs of its install.sh; see tests/install_support.py."""
    return Installer(tmp_path)


# -- masters ---------------------------------------------------------------


@pytest.fixture
def farm():
    """A fake fleet: farm.add(kind) gives an entry for a slave list; see tests/farm.py."""
    one = Farm()
    yield one
    one.close()


@pytest.fixture
def start_update(tmp_path):
    """start_update(entries or slaves, *options, repo=, env=, constants=) -> Update, which runs."""
    started = []

    def start(entries, *options, **kwargs):
        started.append(Update(tmp_path, entries, *options, **kwargs))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.fixture
def update(start_update):
    """The same, run to its end."""
    return lambda *args, **kwargs: start_update(*args, **kwargs).finish()


# -- folders ---------------------------------------------------------------


# Makes its file immutable for as long as its standard input is open: who started it may be killed.
# By ioctl(2), as the file may get another name meanwhile (FS_IOC_GETFLAGS, FS_IMMUTABLE_FL).
KEEP_IMMUTABLE = """
import array, fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDONLY)
flags = array.array("l", [0])
fcntl.ioctl(handle, 0x80086601, flags)
fcntl.ioctl(handle, 0x40086602, array.array("l", [flags[0] | 0x10]))
print("immutable", flush=True)
sys.stdin.read()
fcntl.ioctl(handle, 0x40086602, flags)
"""


@pytest.fixture
def make_immutable():
    """make_immutable(PATH): like chattr +i, until the test ends or what this returns is called."""
    keepers = []

    def release(keeper):
        keeper.communicate()
        assert keeper.returncode == 0

    def make(path):
        keeper = subprocess.Popen(
            [*ISOLATED, "-c", KEEP_IMMUTABLE, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # and not killed with the tests
        )
        if not keeper.stdout.readline():
            _, error = keeper.communicate()
            pytest.skip(
                "immutable files need root and a filesystem that has them: %s" % error.decode()
            )
        keepers.append(keeper)
        return lambda: release(keepers.pop(keepers.index(keeper)))

    yield make
    for keeper in keepers:
        release(keeper)


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(BYTES) -> a folder that is a filesystem of that size; needs root."""
    mounted = []

    def mount(size):
        folder = tmp_path / ("disk-%d" % (len(mounted) + 1))
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", "size=%d" % size, "tmpfs", str(folder)]
        if os.getuid() or not shutil.which("mount") or subprocess.call(["mount"] + options):
            pytest.skip("a small filesystem needs root and the right to mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.call(["umount", "-l", str(folder)])
