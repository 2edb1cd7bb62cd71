"""Break a copy of a script on purpose: a definition is appended that takes another's place.

The source stays free to change: only names count, and one that is no longer there is an error.
"""
import ast
import re
import subprocess

from product import ROOT, copy_scripts

SCRIPTS = ("server-update", "slave.py", "slave-activate")
GUARD = '\nif __name__ == "__main__":\n'


class NothingToBreak(Exception):
    """The script has no such name, or no place where something can be appended."""


def defined_in(text):
    """The names of a Python program's functions, and of its classes' as Class.method."""
    found = set()
    for node in ast.parse(text).body:
        found.add(getattr(node, "name", None))
        for inner in getattr(node, "body", []):
            found.add("%s.%s" % (getattr(node, "name", None), getattr(inner, "name", None)))
    return found


def break_python(text, name, code):
    """`code` defines `broken`, which takes the place of function or Class.method `name`.

    It may call the one that it replaces as `original`.
    """
    if name not in defined_in(text):
        raise NothingToBreak("there is no function '%s'" % name)
    if text.count(GUARD) != 1:
        raise NothingToBreak("nothing can be put before its guard")
    added = "\n\noriginal = {0}\n\n\n{1}\n\n\n{0} = broken\n".format(name, code.strip())
    broken = text.replace(GUARD, added + GUARD)
    compile(broken, name, "exec")
    return broken


def break_embedded(text, variable, name, code):
    """`code` defines function `name` of the Python program in a shell variable anew."""
    program = re.search(r"(?ms)^%s='\n(.*?)^'\n" % variable, text)
    if not program or name not in defined_in(program.group(1)):
        raise NothingToBreak("there is no function '%s' in %s" % (name, variable))
    added = "%s=$%s'\n\n%s\n'" % (variable, variable, code.strip())
    return append_to_shell(text, added)


def break_shell(text, name, code):
    """`code` defines the function `name`; it may call the one that it replaces as `original`."""
    function = re.search(r"(?ms)^%s\(\) \{\n.*?^\}\n" % name, text)
    if not function:
        raise NothingToBreak("there is no function '%s'" % name)
    original = function.group(0).replace(name, "original", 1)
    return append_to_shell(text, original + "\n" + code.strip())


def append_to_shell(text, added):
    """The script with `added` before its last line, which calls main."""
    body, last = text.rstrip("\n").rsplit("\n", 1)
    if not last.startswith('main "$@"'):
        raise NothingToBreak("its last line doesn't call main")
    broken = "%s\n%s\n\n%s\n" % (body, added, last)
    checked = subprocess.run(["sh", "-n"], input=broken.encode(), stderr=subprocess.PIPE)
    if checked.returncode:
        raise NothingToBreak(checked.stderr.decode())
    return broken


def break_copy(folder, script, name, code):
    """Copies of all scripts in `folder`, where `script` is broken; the folder.

    name: of a function, of a Class.method, or in a shell script also VARIABLE/FUNCTION.
    """
    path = copy_scripts(ROOT, folder, *SCRIPTS) / script
    text = path.read_text(encoding="utf-8")
    if not text.startswith("#!/bin/sh"):
        broken = break_python(text, name, code)
    elif "/" in name:
        broken = break_embedded(text, *name.split("/"), code)
    else:
        broken = break_shell(text, name, code)
    path.write_text(broken, encoding="utf-8")
    return folder
