"""slave-activate in a home of its own, for the tests of that script."""

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile

import pytest
from product import PYTHON, SOURCES, copy_scripts, shorten_pauses
from upstream import run_git

TIMEOUT_S = 300  # to tell what hangs; a busy machine may need long for a million files


class Result:
    """How a run ended: status, out, err (text), and the last line of err."""

    def __init__(self, status, out, err):
        self.status = status
        self.out, self.err = (text.decode("utf-8", "replace") for text in (out, err))
        self.last = self.err.rstrip("\n").split("\n")[-1]

    def __repr__(self):
        return "<exit %s, stdout %r, stderr %s>" % (self.status, self.out, self.err)


# What keeps the time sleeps for some seconds, over and over; here until a file is there.
SLEEP = """#!/bin/sh
case $1 in
[1-9]) until [ -e "%s" ]; do "%s" 0.02; done ;;
*) exec "%s" "$@" ;;
esac
"""


class Activate:
    """Runs a copy of slave-activate that stands alone in a folder; call it as activate("r").

    `base` is BASE_URL; `prefix` goes before the script in argv (a shell, strace).
    """

    def __init__(self, folder, base, repos=None):
        self.bin = copy_scripts(SOURCES, folder / "activate", "slave-activate")
        self.script = self.bin / "slave-activate"
        self.home = folder / "home"
        self.repos = repos or self.home / "repos"
        self.state = self.repos / ".server-update"
        self.hooks = folder / "hooks"
        self.hooks.mkdir(exist_ok=True)
        self.path = None  # PATH, where it is not the tests'
        self.settings = {
            "CONF": "/dev/null",
            "BASE_URL": str(base),
            "REPOS_DIR": str(self.repos),
            "HOOKS_DIR": str(self.hooks),
        }

    def environment(self, extra=None):
        """The environment of a run."""
        ours = {"SERVER_UPDATE_" + key: value for key, value in self.settings.items()}
        if self.path:
            ours["PATH"] = self.path
        return dict(os.environ, **dict(ours, **(extra or {})))

    def start(self, *args, prefix=(), env=None, **kwargs):
        """Start it in a process group of its own, as slave.py does; the Popen."""
        kwargs.setdefault("stdout", subprocess.PIPE)
        kwargs.setdefault("stderr", subprocess.PIPE)
        return subprocess.Popen(
            [*prefix, str(self.script), *args],
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **kwargs,
        )

    def __call__(self, *args, timeout=TIMEOUT_S, **kwargs):
        """Run it to its end."""
        return finish(self.start(*args, **kwargs), timeout)

    def good(self, *args, **kwargs):
        """Run it; it must end live and leave nothing. (new commit, old commit)."""
        result = self(*args, **kwargs)
        assert result.status == 0, result
        name, new, old = result.out.split(" ")
        assert (name in args, old[-1]) == (True, "\n"), result
        assert self.leftovers() == [], result
        return new, old[:-1]

    def live(self, repo="r"):
        """The live tree's path."""
        return self.repos / repo

    def head(self, repo="r"):
        """The commit that is live."""
        return run_git("rev-parse", "HEAD", cwd=str(self.live(repo)))

    def leftovers(self):
        """What is in the state folder and should not be there between runs."""
        return sorted(name for name in os.listdir(str(self.state)) if not name.endswith(".lock"))

    def packs(self, repo="r"):
        """The names of the live clone's packs."""
        return sorted(path.name for path in self.live(repo).glob(".git/objects/pack/*.pack"))

    def short_pauses(self):
        """From now on the pauses between two tries take no time: the script's sleep is a fake."""
        folder = self.bin / "short-pauses"
        folder.mkdir()
        shorten_pauses(folder)
        self.path = "%s:%s" % (folder, os.environ["PATH"])

    def make_late_by(self, now):
        """From now on its TIMEOUT, of a minute, is over once there is a file `now`.

        What keeps its time goes on at once then. So it does not matter how long a busy machine
        takes.
        """
        self.settings["TIMEOUT"] = "60"
        folder, real = self.bin / "clock", shutil.which("sleep")
        folder.mkdir()
        (folder / "sleep").write_text(SLEEP % (now, real, real))
        (folder / "sleep").chmod(0o755)
        self.path = "%s:%s" % (folder, os.environ["PATH"])

    def hook(self, name, text, mode=0o755):
        """Write a hook."""
        path = self.hooks / name
        path.write_text("#!/bin/sh\n" + text, encoding="utf-8")
        path.chmod(mode)
        return path


def finish(process, timeout):
    """What a process that was started in a session of its own ends with: a Result.

    Fails after `timeout` seconds, with a list of what in the session still runs, and kills it.
    """
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        ps = ["ps", "-ww", "-o", "pid,ppid,stat,wchan:32,args", "--sid", str(process.pid)]
        listing = subprocess.run(ps, stdout=subprocess.PIPE, check=False).stdout
        running = listing.decode("utf-8", "replace")
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError("not ended after %s s:\n%s%r" % (timeout, running, err)) from None
    return Result(process.returncode, out or b"", err or b"")


def snapshot(tree):
    """A hash of a whole tree: names, kinds, modes, owners, times and contents."""
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(str(tree)):
        folders.sort()
        for name in sorted(folders + files) + ["."]:
            path = os.path.join(folder, name)
            info = os.lstat(path)
            fields = (path, info.st_mode, info.st_uid, info.st_mtime_ns, info.st_size)
            digest.update(repr(fields).encode("utf-8", "surrogateescape"))
            if stat.S_ISLNK(info.st_mode):
                digest.update(os.fsencode(os.readlink(path)))
            elif stat.S_ISREG(info.st_mode):
                with open(path, "rb") as handle:
                    digest.update(handle.read())
    return digest.hexdigest()


def git(tree, *args, **kwargs):
    """git in a work tree; its stdout."""
    return run_git(*args, cwd=str(tree), **kwargs)


def clone_facts(tree):
    """What makes two clones of the same upstream equal, apart from where they are."""
    config = git(tree, "config", "--local", "--list").split("\n")
    return {
        "head": git(tree, "symbolic-ref", "-q", "HEAD", check=False),
        "commit": git(tree, "rev-parse", "-q", "--verify", "HEAD", check=False),
        "refs": git(tree, "for-each-ref", "--format=%(refname) %(objectname) %(symref)"),
        "config": sorted(config),
        "status": git(tree, "status", "--porcelain", "--ignored"),
        "files": git(tree, "ls-files", "-s"),
        "shallow": (tree / ".git/shallow").exists(),
        "alternates": sorted(str(path) for path in (tree / ".git").rglob("alternates")),
    }


def assert_fresh(activate, url, folder, *options, repo="r"):
    """The live tree equals what `git clone` gives (into `folder`), and is sound by itself."""
    run_git("clone", "-q", *options, url, folder)
    assert clone_facts(activate.live(repo)) == clone_facts(folder)
    fsck = subprocess.run(
        ["git", "fsck", "--full", "--no-dangling"],
        cwd=str(activate.live(repo)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (fsck.returncode, b"error" in fsck.stdout) == (0, False), fsck.stdout


ANOTHER_USER = 12345


def as_another_user(activate, *upstreams):
    """A prefix that runs as a user who owns `activate`'s home; needs root and setpriv."""
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("another user needs root and setpriv (util-linux)")
    for path in [activate.home, *activate.home.parents][:5]:
        if str(path).startswith(tempfile.gettempdir() + "/"):
            path.chmod(0o755)
    os.chown(str(activate.home), ANOTHER_USER, ANOTHER_USER)
    (activate.home / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")
    user = str(ANOTHER_USER)
    return ["setpriv", "--reuid=" + user, "--regid=" + user, "--clear-groups"]


def in_mounts(command):
    """A prefix: `command` (for sh, with set -e) first, in a mount namespace of its own."""
    if os.getuid() or subprocess.call(["unshare", "-m", "true"]):
        pytest.skip("mounts need root and unshare (util-linux)")
    return ["unshare", "-m", "sh", "-ec", command + '\nexec "$@"', "sh"]


# A python3 that runs all of the script's programs, but one only where a file is taken away.
HANGS = """#!/bin/sh
case $4 in *"%s"*) : >"%s"; while [ -e "%s" ]; do sleep 0.1; done ;; esac
exec "%s" "$@"
"""


def hang_in(program, began, folder):
    """Put a python3 into `folder`, made for PATH, that hangs where it is to run a program.

    That is one with the text `program` in it; it hangs while there is the file `began`."""
    folder.mkdir()
    (folder / "python3").write_text(HANGS % (program, began, began, PYTHON))
    (folder / "python3").chmod(0o755)
