"""The scripts under test: where they are, loaded as a module, copied as by an installer."""

import importlib.util
import os
import re
import shutil
import sys
from functools import lru_cache
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(
    os.environ.get("SERVER_UPDATE_SOURCES", str(ROOT))
)  # broken copies, see tests/faults
VERSION = re.search(
    '(?m)^VERSION = "(.+)"', (SOURCES / "slave.py").read_text(encoding="utf-8")
).group(1)
PYTHON = os.path.realpath(sys.executable)  # the scripts run under the Python that runs the tests
# For a script by itself: what is installed beside Python has no part in it, and may take longer at
# each start than all of the script.
ISOLATED = [PYTHON, "-I", "-S"]
SERVER_UPDATE = [*ISOLATED, str(SOURCES / "server-update")]


def daily(count, cases):
    """Cases of a test for pytest to run, of which all but the first `count` are marked slow."""
    cases = list(cases)
    rest = [case if isinstance(case, tuple) else (case,) for case in cases[count:]]
    return cases[:count] + [pytest.param(*case, marks=pytest.mark.slow) for case in rest]


SHELLS = daily(1, ["dash", "busybox ash", "bash"])


@lru_cache(maxsize=None)
def compile_script(path):
    """The code of a script: compiling it takes longer than most tests of what is in it."""
    return compile(Path(path).read_bytes(), path, "exec")


class ScriptLoader(SourceFileLoader):
    """Runs a script as a module, as often as it is asked to; compiles it once."""

    def get_code(self, fullname):
        return compile_script(self.path)


def load(name):
    """The script `name` of the checkout as a module, fresh each time, whatever its extension."""
    loader = ScriptLoader(re.sub(r"\W", "_", name.replace(".py", "")), str(SOURCES / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def make_bare_python(folder):
    """A venv without a package in it, as Python is on a bare server: the folder of its python3."""
    settings = "home = %s\ninclude-system-site-packages = false\n" % os.path.dirname(PYTHON)
    (folder / "pyvenv.cfg").write_text(settings)
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").symlink_to(PYTHON)
    return str(folder / "bin")


def copy_scripts(root, folder, *names):
    """Copy scripts into `folder` (made if missing), as an installer would; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(str(root / name), str(folder / name))
        (folder / name).chmod(0o755)
    return folder


def set_constants(script, constants):
    """Give constants of a copy of a script other values: {NAME: value}."""
    if not constants:
        return
    text = script.read_text(encoding="utf-8")
    for name, value in constants.items():
        text, count = re.subn("(?m)^%s = [^ #\n]+" % name, "%s = %r" % (name, value), text)
        assert count == 1, name
    script.write_text(text, encoding="utf-8")


def shorten_pauses(folder, pauses="*.???"):
    """A `sleep` in `folder` that is over at once where slave-activate pauses between two tries.

    "[124]": where it waits for a push that upstream does not show yet.
    """
    path = folder / "sleep"
    script = '#!/bin/sh\ncase $1 in %s) exit ;; esac\nexec %s "$@"\n'
    path.write_text(script % (pauses, shutil.which("sleep")))
    path.chmod(0o755)


def need(tool):
    """Leave this test out, with that reason, where there is no such command."""
    if not shutil.which(tool):
        pytest.skip("no %s here" % tool)


def with_no_rights():
    """What a command begins with that may do no more than its user may, root or not."""
    return [] if os.getuid() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
