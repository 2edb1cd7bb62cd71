"""A checkout with install.sh in it, runs of that, and all that such a run could change."""

import os
import stat
import subprocess

from product import SOURCES, copy_scripts

SCRIPTS = ("install.sh", "server-update", "slave.py", "slave-activate", "slavelist.txt")


class Installer:
    """A checkout, in a path with a blank, and runs of its install.sh."""

    def __init__(self, folder, scripts=None):
        self.folder = scripts or copy_scripts(SOURCES, folder / "a checkout", *SCRIPTS)
        self.stage = folder / "a stage"

    def run(self, *args, shell="sh", staged=True, before=(), env=None):
        """Run it, into the stage unless told otherwise; a CompletedProcess."""
        env = dict(os.environ, **(env or {}))
        if staged:
            env["DESTDIR"] = str(self.stage)
        command = [*before, *shell.split(), str(self.folder / "install.sh"), *args]
        return subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=300,
        )

    def check(self, *args, **kwargs):
        """The same for what must succeed; what it said."""
        done = self.run(*args, **kwargs)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def refused(self, *args, status=2, **kwargs):
        """The same for what must fail, in one line, and touch nothing; that line."""
        before = contents(self.stage)
        done = self.run(*args, **kwargs)
        assert (done.returncode, done.stdout) == (status, ""), done
        assert contents(self.stage) == before
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr.rstrip("\n")


def files(folder):
    """{path: mode, or where a link goes}"""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = "-> " + os.readlink(str(path))
        elif path.is_file():
            found[name] = "%o" % stat.S_IMODE(path.stat().st_mode)
    return found


def folder_modes(folder):
    folders = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    return {stat.S_IMODE(path.stat().st_mode) for path in folders}


def contents(folder):
    """All that a run could change below a folder: names, modes, contents, times."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))] if folder.exists() else []:
        info = path.lstat()
        text = path.read_bytes() if stat.S_ISREG(info.st_mode) else None
        time = info.st_mtime_ns if text is not None else None
        found[str(path)] = (info.st_mode, time, text)
    return found
