#!/usr/bin/env python3
"""slave.py [FILE]: the daemon that takes server-update's signals and runs slave-activate."""

import hmac
import os
import re

# shared with server-update: keep identical
NAME_RE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
REF_BAD_RE = re.compile(r"[ ~^:?*\[\\]|\.\.|@\{|//|(^|/)\.|^[-/]|[/.]$|\.lock(/|$)|^@$")
MAX_REF_CHARS = 255
MIN_SECRET_BYTES = 16
MAX_SECRET_FILE_BYTES = 65536


def is_repo_name(text):
    """Whether `text` can name a repository: nothing that leads out of the repositories' folder."""
    return bool(NAME_RE.fullmatch(text) and ".." not in text
                and not text.endswith((".git", ".lock")))


def is_ref(text):
    """Whether `text` can be a branch, tag or commit: see git-check-ref-format(1), one level."""
    return (0 < len(text) <= MAX_REF_CHARS and text.isprintable()
            and not REF_BAD_RE.search(text))


def sign(secret, method, target, when, nonce):
    """The signature of a request, in hex; `secret` is bytes, all else the text as it is sent."""
    lines = "\n".join(("server-update-1", method, target, when, nonce))
    return hmac.new(secret, lines.encode("iso-8859-1"), "sha256").hexdigest()


def read_secrets(path):
    """The lines of a secret file, as bytes: the first one signs, any of them verifies.

    Raises ValueError, with the remedy, for a file that is no good, OSError where there is none.
    """
    with open(path, "rb") as handle:
        mode = os.fstat(handle.fileno()).st_mode
        lines = [line.strip() for line in handle.read(MAX_SECRET_FILE_BYTES).split(b"\n")]
    secrets = [line for line in lines if line]
    if mode & 0o077:
        raise ValueError("others can read secret file '%s'; do: chmod 600 %s" % (path, path))
    if not secrets or min(map(len, secrets)) < MIN_SECRET_BYTES:
        what = "a line of less than %d bytes" % MIN_SECRET_BYTES if secrets else "no secret in it"
        raise ValueError("secret file '%s' has %s; do: (umask 077; openssl rand -hex 32 >%s)"
                         % (path, what, path))
    return secrets
# end of shared block
