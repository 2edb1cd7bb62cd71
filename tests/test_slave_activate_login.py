"""A user and a password in BASE_URL: upstream gets them, nobody else sees them."""

import base64
import os
import re
from shutil import which
from urllib.parse import quote

import pytest
from activate_support import Activate, finish, git
from processes import ProcessList, wait_until
from product import SHELLS, daily, need
from upstream import run_git

# Others may run the same test on this machine meanwhile.
USER = "us3r-%d" % os.getpid()
PASSWORD = "hunt-%d/er2@%%41 \\ 'x\":$(id)" % os.getpid()
IN_URL = "%s:%s@" % (USER, quote(PASSWORD, safe="\\'\"$()"))
IN_HEADER = base64.b64encode(("%s:%s" % (USER, PASSWORD)).encode()).decode()
# What would tell the login, in all its forms.
TOLD = [USER.encode(), b"hunt-%d" % os.getpid(), IN_HEADER.encode()]
SUBMODULES = (
    '[submodule "one"]\n\tpath = one\n\turl = ../one.git\n'
    '[submodule "two"]\n\tpath = two\n\turl = %s/two.git\n'
)


@pytest.fixture
def repo(upstream, http_upstream):
    """With two submodules: one relative, which has one itself, one with all of its URL."""
    one, two = (upstream.create(name, {"s": name}) for name in ("one", "two"))
    one.commit(
        {
            ".gitmodules": '[submodule "two"]\n\tpath = deep\n\turl = ../two.git\n',
            "deep": ("160000", two.head()),
        }
    )
    repo = upstream.create("r", {"f": "1"})
    repo.commit(
        {
            ".gitmodules": SUBMODULES % http_upstream.url,
            "one": ("160000", one.head()),
            "two": ("160000", two.head()),
        }
    )
    return repo


@pytest.fixture
def activate(tmp_path, http_upstream, repo):
    """With a login in its BASE_URL, without which upstream gives nothing."""
    http_upstream.login = "%s:%s" % (USER, PASSWORD)
    activate = Activate(tmp_path, http_upstream.url.replace("//", "//" + IN_URL))
    activate.settings["GIT_FROM"] = "127.0.0.1"
    activate.short_pauses()
    return activate


@pytest.fixture
def processes(http_upstream):
    """What arguments processes have, at each request for certain."""
    seen = ProcessList()
    http_upstream.before_request = lambda requests: seen.look()
    yield seen
    seen.stop()


def assert_untold(activate, result, arguments):
    """Nothing of the login is in what was printed, in arguments, or in any file."""
    told = {"output": (result.out + result.err).encode(), "arguments": arguments.encode()}
    for folder in (activate.home, activate.hooks):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                told[str(path)] = path.read_bytes()
    for where, text in told.items():
        for one in TOLD:
            found = [line for line in text.split(b"\n") if one in line]
            assert not found, where


@pytest.mark.parametrize("shell", SHELLS)
def test_nothing_tells_it(activate, repo, http_upstream, processes, shell):
    """First clone, a later one, submodules, mirror, a hook, and what an older version left."""
    activate.hook("pre-update", 'env >"$HOME/env"; git remote get-url origin >"$HOME/url"\n')
    env = {"GIT_TRACE": "1"}
    first = activate("r", prefix=shell.split(), env=env)
    assert first.status == 0, first
    assert_untold(activate, first, processes.arguments())
    live = activate.live()
    assert (live / "one/deep/s").read_text() == (live / "two/s").read_text() == "two"
    assert (activate.state / "r.git/packed-refs").exists()
    assert (activate.home / "url").read_text() == http_upstream.url + "/r.git\n"
    assert "SERVER_UPDATE_REPOS_DIR=" in (activate.home / "env").read_text()

    # Not by git, in whose arguments it would be seen.
    config = (live / ".git/config").read_text()
    assert http_upstream.url in config
    with_login = config.replace(http_upstream.url, activate.settings["BASE_URL"])
    (live / ".git/config").write_text(with_login)
    head = repo.commit({"f": "2"})
    http_upstream.bytes_sent = 0
    second = activate("r", prefix=shell.split(), env=env)
    assert (second.status, second.out.split()[1]) == (0, head), second
    assert_untold(activate, second, processes.stop())
    assert re.search(r"remote-http\0", processes.stop()), "the arguments of git were seen"


@pytest.mark.slow
def test_no_program_has_it_in_its_arguments(activate, tmp_path):
    """Of all that is started, however shortly it runs."""
    need("strace")
    log = tmp_path / "trace"
    strace = ["strace", "-f", "-qq", "-s", "9999", "-e", "trace=execve", "-o", str(log)]
    result = activate("r", prefix=strace)
    assert result.status == 0, result
    assert_untold(activate, result, log.read_text())
    assert '"fill"' in log.read_text()


FAULTS = [
    (None, "Authentication failed for "),
    ("403", "error: 403; give "),
    ("hang", "TIMEOUT (60 s) is over; upstream is slow"),
    ("401", "Authentication failed for "),
    ("404", "not found; see BASE_URL"),
    ("503", "error: 503; upstream is in trouble"),
    ("cut:10", ""),
]


@pytest.mark.parametrize("fault, words", daily(3, FAULTS))
def test_a_failure_says_what_it_said_and_tells_nothing(
    activate, http_upstream, processes, tmp_path, fault, words
):
    http_upstream.fault = fault
    if fault is None:
        http_upstream.login = "another:login"
    if fault == "hang":
        activate.make_late_by(tmp_path / "late")
    process = activate.start("r")
    wait_until(lambda: http_upstream.requests)
    (tmp_path / "late").touch()
    result = finish(process, 300)
    assert (result.status, activate.leftovers()) == (1, []), result
    assert words in result.last
    assert_untold(activate, result, processes.stop())
    assert re.search(r"remote-http\0", processes.stop())


@pytest.mark.parametrize("user, password", [("t0ken", ""), ("a b", "~é:x")])
@pytest.mark.parametrize("form", daily(1, ["%s/{repo}.git", "%s"]))
def test_other_logins(activate, repo, http_upstream, user, password, form):
    http_upstream.login = "%s:%s" % (user, password)
    in_url = "//%s:%s@" % (quote(user), quote(password))
    activate.settings["BASE_URL"] = form % http_upstream.url.replace("//", in_url)
    assert activate("r").status == 0
    assert activate.head() == repo.head()


def test_the_users_own_git_settings_change_nothing(activate, own_home, http_upstream):
    """And the user's own helper is not told what BASE_URL has."""
    kept = own_home / "kept"
    (own_home / ".gitconfig").write_text(
        '[credential]\n\thelper = "store --file=%s"\n\tuseHttpPath = true\n'
        '[credential "%s"]\n\tusername = somebody\n' % (kept, http_upstream.url)
    )
    result = activate("r")
    assert result.status == 0, result
    assert not kept.exists()


@pytest.mark.parametrize("in_url", ["", USER + "@"])
def test_without_a_password_the_users_own_helper_is_asked(
    activate, own_home, repo, http_upstream, in_url
):
    kept = own_home / "kept"
    kept.write_text(http_upstream.url.replace("//", "//" + IN_URL) + "\n")
    helper = '[credential]\n\thelper = "store --file=%s"\n' % kept
    (own_home / ".gitconfig").write_text(helper)
    activate.settings["BASE_URL"] = http_upstream.url.replace("//", "//" + in_url)
    result = activate("r")
    assert result.status == 0, result
    url = git(activate.live(), "remote", "get-url", "origin")
    assert url == "%s/r.git" % activate.settings["BASE_URL"]


def test_a_password_is_told_to_its_own_host_alone(activate, upstream, repo, http_upstream):
    """A submodule from elsewhere, which demands a login too, gets nothing."""
    elsewhere = http_upstream.url.replace("127.0.0.1", "localhost")
    repo.commit({".gitmodules": SUBMODULES % elsewhere})
    result = activate("r")
    assert result.status == 1, result
    assert "could not read Username for '%s'" % elsewhere in result.err


@pytest.mark.parametrize(
    "in_url", ["u:1/2s3cr3t@", "u:s3cr3t/x@", "u:s3@cr3t@", "u:s3cr3t#@", "u:s3cr3t?@", "u@x:s3@"]
)
def test_a_login_that_is_not_encoded_is_refused(activate, tmp_path, in_url):
    url = "http://%s127.0.0.1:1/x" % in_url
    words = "in user and password write / ? # @ as %2F %3F %23 %40"
    result = activate("r", env={"SERVER_UPDATE_BASE_URL": url})
    assert (result.status, result.err) == (
        2,
        "slave-activate: bad BASE_URL: %s (set by SERVER_UPDATE_BASE_URL)\n" % words,
    )
    conf = tmp_path / "slave.conf"
    conf.write_text("BASE_URL.r=%s\n" % url)
    del activate.settings["BASE_URL"]
    result = activate("r", env={"SERVER_UPDATE_CONF": str(conf)})
    assert (result.status, result.err) == (
        2,
        "slave-activate: %s:1: bad BASE_URL.r: %s\n" % (conf, words),
    )


@pytest.mark.parametrize(
    "base", ["ssh://git@x/y", "git@x:y", "ssh://git@x:22/@y", "https://x/@y", "https://u@x/a@b:c"]
)
def test_what_is_no_password_stays_in_the_url(activate, tmp_path, base):
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "git").write_text(
        "#!/bin/sh\ncase $* in *clone*) ;; *) exec %s \"$@\" ;; esac\n"
        'echo "$*" >%s/seen\necho "fatal: not found" >&2\nexit 1\n' % (which("git"), tmp_path)
    )
    (fake / "git").chmod(0o755)
    env = {"SERVER_UPDATE_BASE_URL": base, "PATH": "%s:%s" % (fake, os.environ["PATH"])}
    assert activate("r", env=env).status == 1
    arguments = (tmp_path / "seen").read_text()
    assert "-- %s/r.git " % base in arguments
    assert "credential" not in arguments


def test_a_login_that_upstream_does_not_ask_for(activate, http_upstream):
    http_upstream.login = None
    assert activate("r").status == 0
    assert run_git("config", "remote.origin.url", cwd=str(activate.live())) == (
        http_upstream.url + "/r.git"
    )
