"""The scripts of version 1.0, out of the history of the checkout."""

import subprocess

import pytest
from install_support import SCRIPTS
from product import ROOT

COMMIT = "b432c3bee1f46837b29c5e44e925227e0ab4ddc8"


def unpack(folder):
    """Put the scripts of 1.0 into a folder; it. Without history the test is left out, loudly."""
    folder.mkdir(parents=True)
    for name in SCRIPTS:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "show", "%s:%s" % (COMMIT, name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if done.returncode:
            pytest.skip("VERSION 1.0 IS NOT IN THIS CHECKOUT'S HISTORY (a shallow clone?)")
        (folder / name).write_bytes(done.stdout)
        (folder / name).chmod(0o755)
    return folder
