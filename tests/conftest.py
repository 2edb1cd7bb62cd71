"""Fixtures for all tests: the scripts as modules, real upstreams, real slaves in processes."""

import http.client
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGTERM, default_int_handler, signal

sys.dont_write_bytecode = True  # before anything of ours is loaded: no __pycache__ in the checkout

import pytest  # noqa: E402
from upstream import HttpUpstream, Upstream, copy_scripts, wait_until  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(
    os.environ.get("SERVER_UPDATE_SOURCES", str(ROOT))
)  # broken copies, see tests/faults
PYTHON = os.path.realpath(sys.executable)  # the scripts run under the Python that runs the tests
FORGET = re.compile(
    r"(GIT|SERVER_UPDATE|XDG|SSH)_.*|.*_proxy|NO_COLOR|CLICOLOR.*|FORCE_COLOR|CDPATH|ENV|"
    r"COLUMNS|LINES|PYTHON.*|DESTDIR",
    re.IGNORECASE,
)
# Reasons for which a test may be left out even in CI (anything else fails the run there).
MAY_SKIP_IN_CI = ("no IPv6 on this machine", "this git has no SHA-256 repositories")
START_TIMEOUT_S = 15


def load(name):
    """The script `name` of the checkout as a module, fresh each time, whatever its extension."""
    loader = SourceFileLoader(re.sub(r"\W", "_", name.replace(".py", "")), str(SOURCES / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


# -- the environment -------------------------------------------------------


def pytest_configure(config):
    """Forget what would change a run: git's variables, ours, proxies, colours; obey SIGINT."""
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
    folder = tmp_path_factory.mktemp("python")
    (folder / "python3").symlink_to(PYTHON)
    return str(folder)


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

    def run(name, *args, env=None, shell=None, timeout=60, stdin=subprocess.DEVNULL, **kwargs):
        script = copy_scripts(SOURCES, tmp_path / "alone" / name, name) / name
        if "input" not in kwargs:
            kwargs["stdin"] = stdin
        command = (
            [PYTHON, "-I"] if "python" in script.read_text(encoding="utf-8").split("\n")[0] else []
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
def http_upstream(upstream):
    """The repositories of `upstream` over HTTP: .url, .bytes_sent, .requests, .fault, .create."""
    server = HttpUpstream(upstream)
    yield server
    server.close()


# -- slaves ----------------------------------------------------------------


class Slave:
    """The real slave.py beside the real slave-activate, with a process and a home of its own."""

    def __init__(self, folder, settings, args=(), env=None, sources=SOURCES):
        self.bin = copy_scripts(sources, folder / "bin", "slave.py", "slave-activate")
        self.command = [PYTHON, "-I", str(self.bin / "slave.py")]
        self.args, self.env = list(map(str, args)), dict(env or {})
        self.home, self.hooks = folder / "home", folder / "hooks"
        self.home.mkdir()
        self.hooks.mkdir()
        self.conf, self.log_file = folder / "slave.conf", folder / "log"
        self.settings = dict({"PORT": 0, "BIND": "127.0.0.1", "HOOKS_DIR": self.hooks}, **settings)
        self.repos = Path(self.settings.get("REPOS_DIR") or self.home / "repos")
        self.state = self.repos / ".server-update"
        self.process = self.port = None

    def start(self, wait=True):
        """Start it (again, then on the port that it had); with `wait`, until it listens."""
        self.conf.write_text(
            "".join("%s=%s\n" % item for item in self.settings.items()), encoding="utf-8"
        )
        before = len(self.log())
        env = dict(
            os.environ,
            HOME=str(self.home),
            SERVER_UPDATE_CONF=str(self.conf),
            PATH=str(self.bin) + os.pathsep + os.environ["PATH"],
        )
        env.update(self.env)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command + self.args,
                env=env,
                cwd=str(self.home),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.port = int(
                wait_until(
                    lambda: self._listening(before), START_TIMEOUT_S, what="slave.py listening"
                ).group(1)
            )
            self.settings["PORT"] = self.port
        return self

    def _listening(self, before):
        new = self.log()[before:]
        if self.process.poll() is not None:
            raise AssertionError("slave.py ended with %s:\n%s" % (self.process.returncode, new))
        return re.search(r"listening on port (\d+)", new)

    @property
    def url(self):
        """http://127.0.0.1:PORT"""
        return "http://127.0.0.1:%d" % self.port

    def log(self):
        """All that it has logged so far, over its restarts."""
        return (
            self.log_file.read_text(encoding="utf-8", errors="replace")
            if self.log_file.exists()
            else ""
        )

    def get(self, path, headers=None, method="GET", timeout=40):
        """One request on a connection of its own: (status, headers, body as bytes)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def json(self, path, status=200, **kwargs):
        """The JSON answer, which must have that status."""
        got, _, body = self.get(path, **kwargs)
        assert got == status, "%s: %d %r" % (path, got, body)
        return json.loads(body.decode("utf-8"))

    def signal(self, repo="hanuman", ref=None):
        """Ask for an update, which must be accepted; its id."""
        return self.json("/?repo=%s%s" % (repo, "&ref=" + ref if ref else ""), status=202)[
            "update"
        ]

    def wait_update(self, repo="hanuman", update=None, timeout=60):
        """Signal if no update id is given; wait for its end; the record."""
        update = self.signal(repo) if update is None else update
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            record = self.json("/status?repo=%s&update=%s&wait=20" % (repo, update))
            if record["state"] in ("live", "failed"):
                return record
        raise AssertionError("update %s of %s did not end: %s" % (update, repo, record))

    def kill(self):
        """kill -9 of slave.py alone; what it started lives on."""
        self.process.kill()
        self.process.wait()

    def stop(self, signum=SIGTERM, timeout=20):
        """Stop it cleanly; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(timeout)


@pytest.fixture
def start_slave(tmp_path, upstream):
    """start_slave(BASE_URL=..., TIMEOUT=..., args=[], env={}) -> Slave, listening on 127.0.0.1."""
    slaves = []

    def start(args=(), env=None, wait=True, **settings):
        folder = tmp_path / ("slave-%d" % (len(slaves) + 1))
        folder.mkdir()
        settings = {key.upper(): value for key, value in settings.items()}
        settings.setdefault("BASE_URL", upstream.base_path)
        one = Slave(folder, settings, args, env)
        slaves.append(one)
        return one.start(wait)

    yield start
    stop_for_good(*slaves)


def stop_for_good(*slaves):
    """End slaves and whatever they have started, however a test left them; all at a time."""
    running = [slave for slave in slaves if slave.process and slave.process.poll() is None]
    for number in (SIGCONT, SIGTERM):
        for slave in running:
            slave.process.send_signal(number)
    for slave in running:
        try:
            slave.process.wait(15)
        except subprocess.TimeoutExpired:
            slave.kill()
    for slave in slaves:
        kill_all_below(slave.bin.parent)


def processes_below(folder):
    """The processes whose environment has a HOME below `folder`: a slave's descendants."""
    found, mark = [], os.fsencode(str(folder)) + b"/"
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open("/proc/%s/environ" % entry, "rb") as environ:
                    if b"HOME=" + mark in environ.read():
                        found.append(int(entry))
            except OSError:
                pass  # gone, or somebody else's
    return found


def kill_all_below(folder):
    """kill -9 of what processes_below finds."""
    for pid in processes_below(folder):
        try:
            os.kill(pid, SIGKILL)
        except OSError:
            pass


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
