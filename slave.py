#!/usr/bin/env python3
"""slave.py [FILE]: takes server-update's signals and has slave-activate put fresh clones live.

    slave.py                                     listen on port 9999
    slave.py ~/repos/site/index.html             the same, and serve that file at /
    GET /?repo=NAME[&ref=REF]                    start an update: 202 and its id, as JSON
    GET /status[?repo=NAME[&update=ID&wait=S]]   what is live, and how updates ended
    GET /metrics                                 the same in Prometheus's text format
    GET /healthz                                 200 once it serves

Settings: KEY=value lines in /etc/server-update/slave.conf (or the file SERVER_UPDATE_CONF),
SERVER_UPDATE_KEY variables, options; the last of these wins. KEY.NAME=value in the file holds for
the repository NAME alone. PREFIX/bin/slave.py has its settings in PREFIX/etc/server-update, where
that folder exists. SIGHUP reads the TLS certificate again. Exit status: 0 stopped by SIGTERM
or SIGINT, 1 could not start, 2 usage or settings.
"""

import os
from signal import SIG_IGN, SIGHUP, SIGINT, SIGKILL, SIGTERM, signal

if __name__ == "__main__":  # there is nothing to be stopped yet, nor a certificate to be read
    for number in (SIGTERM, SIGINT):
        signal(number, lambda *_: os._exit(0))
    signal(SIGHUP, SIG_IGN)

import _thread
import argparse
import base64
import errno
import fcntl
import fnmatch
import hashlib
import hmac
import html
import io
import json
import re
import select
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor, wait as wait_for
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from os import environ
from os.path import (
    abspath, dirname, expanduser, isdir, isfile, islink, join, lexists, normpath, realpath,
    relpath, samestat)
from queue import SimpleQueue
from selectors import EVENT_READ, PollSelector
from socketserver import TCPServer
from subprocess import DEVNULL, PIPE, Popen, SubprocessError
from threading import Condition, Lock, stack_size
from time import gmtime, monotonic, sleep, strftime, time
from urllib.parse import unquote, unquote_to_bytes

VERSION = "2.0"

# Updates
MAX_RUNNING = 4  # side by side
MAX_QUEUED = 100  # repositories with an update that waits; those with a tree may be more
MAX_ENDED = 10  # ended updates that are remembered, a repository
MAX_ENCODED = 1024  # that are remembered as JSON, too, some 600 KB
MAX_WITHOUT_TREE = 1000  # repositories that are remembered although nothing is live
INTERRUPTED = "interrupted three times by the slave's own end; signal again for another try"
MAX_TRIES = 3  # of one update that a kill of the slave cuts off; a clean stop is none
BACKSTOP_S = 10  # beyond TIMEOUT, by which slave-activate itself should have ended
# A stop takes up to the sum of the next four and a second, which a service manager must have
# patience for.
KILL_AFTER_S = 10  # from TERM to KILL of a run; above slave-activate's GRACE_S
GIVE_UP_AFTER_S = 1  # from KILL to the insight that it can't be killed
GIT_TIMEOUT_S = 2  # to say what is live
LEFTOVER_S = 0.5  # for what a run that has ended left in its process group
POLL_S = 0.02  # how often a run is asked whether it has ended
NEVER_S = float("inf")  # for what has no time of its own to end in
MAX_MESSAGE_CHARS = 300
MAX_PRINTED_BYTES = 49152  # of what a program prints
# What tells most comes first.
OUTPUT_KINDS = ("slave-activate: ", "server-update: ", "fatal: ", "error: ", "")
OUTPUT_RE = re.compile(f"^({'|'.join(OUTPUT_KINDS)})(.{{1,{MAX_MESSAGE_CHARS}}})")
# As slave-activate's run_hook, run_post_update and clean_up say it.
HOOK_PATTERN = r"live, but post-update hook failed \(([0-9]{1,3})\)"
# What is worth a word although all went well: of the old tree, of a push
WORTH_PATTERN = "can(not|'t) remove |[0-9a-f]{7} is not there yet"

# Slaves beneath
NOT_FOR_RELAYS_RE = re.compile(
    "--(no-wait|status|history|dry-run|list|limit|json|ref|commit|slave-key|version|help)(=.*)?"
    "|-[qv]*h.*")
LIST_TIMEOUT_S = 30  # to read a list of a million
MAX_NAMES = 10  # of those that are not good, for update-ended
UPDATE_ENDED_TIMEOUT_S = 60

# User and password of a URL, also where a / or so in them should have been percent-encoded.
USER_RE = re.compile(r"(?<=://)(?:[^/]*|[^\s']*)@")

# Connections
HEADER_TIMEOUT_S = 10  # for a TLS handshake and a whole header: see Server.service_actions
ANSWER_TIMEOUT_S = 60  # for a whole answer, of which it may wait for MAX_WAIT_S
SEND_TIMEOUT_S = 30  # for a peer to take a part of a file
CLOSE_TIMEOUT_S = 1  # for a peer to see the end of an answer
LAST_ANSWERS_S = 0.3  # at the end, for those who still wait
MAX_LINE_BYTES = 8192  # of a request, and of the log
MAX_HEADER_BYTES = 24576  # with the first line
HEADER_BUFFER_BYTES = 512  # small, as there may be so many connections:
MAX_CONNECTIONS = 256  # fewer where files are short, as these are kept for all else:
RESERVED_FILES = 36
CLOSING_S = 0.005  # for the thread of a connection that is dropped to close it
SHORTAGE_PAUSE_S = 0.1
MAX_REFUSALS_LOGGED = 5  # in TEND_S, which makes ten a second
MAX_WAIT_S = 30
MAX_STATUS_BYTES = 1000000  # server-update reads a little more
VIA_RE = re.compile("[0-9a-f]{16}(,[0-9a-f]{16}){0,7}")  # ids of at most 8 relays
TEND_S = 0.5  # how often late connections are dropped, and peers that have gone noticed
LOG_PATIENCE_S = 1  # for the log's reader to take a line
RETRY_LATER = ("Retry-After", 2)

# A header's line, or its end: RFC 9110
HEADER_LINE_PATTERN = rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*)?\r?\n"
ORIGIN_PATTERN = "(?i)^https?://[^/?]*/?"  # of a target as proxies send it

# Bodies
BODY_TIMEOUT_S = 30  # in all
MAX_BODY_BYTES = 25 << 20  # as much as a forge sends
MAX_READ_BODY_BYTES = 256 << 10  # those that are larger are only proved
MAX_LARGE_BODIES = 4  # at once

# Clones from here
MAX_GIT_CONNECTIONS = 1024  # in all, where somebody may clone
MAX_GIT_RUNS = 8  # whose output is taken at the same time
GIT_RUN_TIMEOUT_S = 3600
MAX_ANSWERS = 40  # that are kept, a file each
KEEP_ANSWER_S = 60  # for those who ask the same a little later
MORE_EVERY_S = 0.1  # how often more of an answer is looked for that is being made
# What git asks for: the one by POST, the other by GET or HEAD.
GIT_PATTERN = ("(POST)?(?:GET|HEAD)? /git/([^/&]+)[.]git/"
               "(?(1)git-upload-pack[?]|info/refs[?]service=git-upload-pack)")
CHUNK_PATTERN = rb"([0-9A-Fa-f]{1,7})[ \t]*(;.*)?\r?\n"  # RFC 9112

# Signatures
SIGNATURE_PATTERN = r"t=([0-9]{1,12}),n=([0-9a-f]{32}),s=([0-9a-f]{64})"
MAX_CLOCK_DIFFERENCE_S = 300
MAX_NONCES = 65536  # of a key
FLOOR_STEP_S = 5  # by which the newest signal's time is rounded up, to be written less often

# shared with server-update: keep identical
NAME_PATTERN = r"(?!.*(\.\.|\.git$|\.lock$))[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
REF_BAD_PATTERN = r"^$|[ ~^:?*\[\\]|\.\.|@\{|//|(^|/)\.|^[-/]|[/.]$|\.lock(/|$)|^@$"
HASH_RE = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
MAX_REF_BYTES = 255  # in UTF-8
MAX_NOTE_CHARS = 200
MIN_SECRET_BYTES = 16
CONFIG_FOLDER = "/etc/server-update"  # of scripts under these:
USUAL_PREFIXES = ("/", "/usr", "/usr/local")


def is_repo_name(text):
    """Whether `text` can name a repository: nothing that leads out of the repositories' folder."""
    return re.fullmatch(NAME_PATTERN, text) is not None


def is_ref(text):
    """Whether `text` can be a branch, tag or commit: see git-check-ref-format(1), one level."""
    # Half a surrogate pair is not printable, so what comes as far as that can be encoded.
    return (text.isprintable() and len(text.encode()) <= MAX_REF_BYTES
            and not re.search(REF_BAD_PATTERN, text))


def is_note(text):
    """Whether `text` can say who asked for an update, or why."""
    return len(text) <= MAX_NOTE_CHARS and text.isprintable()


def is_absent(path):
    """Whether there certainly is nothing at `path`, not even a link that leads nowhere.

    Raises OSError where that can't be known: what can't be looked at is not absent."""
    try:
        os.stat(dirname(path) or ".")
        os.lstat(path)
    except FileNotFoundError as error:
        # Its folder is absent, too, or a link that leads nowhere.
        if error.filename != path and not is_absent(error.filename):
            raise
        return True
    return False


def config_folder(script):
    """The folder of settings and keys for the script at this path.

    One at PREFIX/bin/NAME has PREFIX/etc/server-update, where there is one. OSError where that
    can't be known, ValueError where others may write there."""
    prefix, bin_folder = os.path.split(dirname(realpath(script)))
    folder = f"{prefix}/etc/server-update"
    if bin_folder != "bin" or prefix in USUAL_PREFIXES or is_absent(folder):
        return CONFIG_FOLDER
    status = os.stat(folder)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise ValueError(f"others than root and its user may write in '{folder}'; do: "
                         f"chown root {folder} && chmod go-w {folder}")
    return folder


def open_at_once(path, flags):
    """Opens without waiting for the other end of a FIFO, or for a device: an opener of open()."""
    return os.open(path, flags | os.O_NONBLOCK)


def check_regular(handle):
    """The mode of what is open; OSError unless that is a regular file."""
    mode = os.fstat(handle.fileno()).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", handle.name)
    return mode


def sign(secret, method, target, when, nonce):
    """The signature of a request, in hex; `secret` is bytes, all else the text as it is sent."""
    lines = f"server-update-1\n{method}\n{target}\n{when}\n{nonce}"
    return hmac.digest(secret, lines.encode("iso-8859-1"), "sha256").hex()


def read_secrets(path):
    """The lines of a secret file: the first signs, any verifies. Raises ValueError or OSError."""
    with open(path, "rb", opener=open_at_once) as handle:
        mode = check_regular(handle)
        # One a line that is not empty, without the blanks around it.
        secrets = re.findall(rb"\S(?:[^\r\n]*\S)?", handle.read(65536))
    if mode & 0o077:
        raise ValueError(f"others can read secret file '{path}'; do: chmod 600 {path}")
    advice = f"do: (umask 077; openssl rand -hex 32 >{path})"
    if not secrets:
        raise ValueError(f"secret file '{path}' has no secret in it; {advice}")
    if min(map(len, secrets)) < MIN_SECRET_BYTES:
        raise ValueError(f"secret file '{path}' has a line of less than 16 bytes; {advice}")
    return secrets
# end of shared block


class Refusal(Exception):
    """A request that gets an error for its answer: HTTP status, text, further headers."""

    more = {}  # further fields of the answer


class Stopped(Refusal):
    """What was under way has been ended, as this slave is to stop."""


def not_now(text):
    """The Refusal of what may be asked again in a moment."""
    return Refusal(503, text, RETRY_LATER)


def escape(text):
    """`text` with all that could move a cursor or begin a line written as an escape."""
    for char in set(text):
        if not char.isprintable():
            text = text.replace(char, char.encode("unicode_escape").decode())
    return text


class Log:
    """The log on stderr, whose reader may stop reading: what it doesn't take in time is lost.

    No lock: where threads meet a line more or less is counted or waited for, and no harm is done.
    """

    patience_s = LOG_PATIENCE_S
    refusals = 0  # since the last tell_left_out()

    def __call__(self, text):
        """Writes a line, in one write, so that the lines of threads never mix.

        What is too long for that is cut: a pipe that is ready takes PIPE_BUF bytes."""
        now = strftime("%Y-%m-%dT%H:%M:%SZ ", gmtime())
        with suppress(OSError):  # nobody reads the log: no reason to stop updating
            if "JOURNAL_STREAM" in environ:
                here = os.fstat(2)
                # Where that is journald's each line has a time without ours: systemd.exec(5).
                if environ["JOURNAL_STREAM"] == f"{here.st_dev}:{here.st_ino}":
                    now = ""
            line = f"{now}{escape(USER_RE.sub('', text))}".encode()
            if not select.select([], [2], [], self.patience_s)[1]:
                self.patience_s = 0  # once it is stuck, nobody waits for it again
                return
            self.patience_s = LOG_PATIENCE_S
            os.write(2, line[:select.PIPE_BUF - 1] + b"\n")

    def tell_refusal(self, text):
        """Writes a line about what strangers cause; of too many they are only counted."""
        self.refusals += 1
        if self.refusals <= MAX_REFUSALS_LOGGED:
            self(text)

    def tell_left_out(self):
        """Says how many refusals were left out, if any, and begins anew."""
        left_out = self.refusals - MAX_REFUSALS_LOGGED
        self.refusals = 0
        if left_out > 0:
            self(f"{left_out} more like these were left out")


log = Log()


def start_thread(function, *args):
    """Has a thread call a function; RuntimeError or MemoryError where there can't be one.

    Thread.start() waits for ever where there is no memory for the new thread's first steps."""
    _thread.start_new_thread(function, args)


# -- settings --------------------------------------------------------------

# A setting is text in the file, the environment or an option, all of which is like `pattern`;
# `parse` makes its value of it, or raises ValueError where it is bad.
Setting = namedtuple("Setting", "default pattern parse help")
MAPPED_RE = re.compile(r"(?<![0-9a-f:.])::ffff:(?=[0-9]+\.)", re.I)  # IPv4 as IPv6: RFC 4291
WORD_RE = re.compile(r"[^\s,]+")


def parse_base_url(text):
    return text.rstrip("/") or "/"


def parse_path(text):
    path = expanduser(text)
    if not path.startswith("/"):  # HOME is of no use
        raise ValueError(text)
    return path


def parse_port(text):
    port = int(text)
    if port > 65535:
        raise ValueError(text)
    return port


def parse_networks(text):
    """Addresses and networks; those of IPv4 may be written as IPv6."""
    return [ip_network(word) for word in WORD_RE.findall(MAPPED_RE.sub("", text))]


def parse_relay_options(text):
    words = shlex.split(text)
    if any(map(NOT_FOR_RELAYS_RE.fullmatch, words)):
        raise ValueError(text)
    return words


# The kinds of settings. A url is a path, a URL, or ssh's host:path; a path is as slave-activate
# reads it, which knows no other user's home; int() takes blanks, signs, all of Unicode's digits.
PATTERN_TABLE = r"""
url    /\S*|[^-:\s]\S*:\S+
path   ~?/.*
port   0*[0-9]{1,5}
time   0*[1-9][0-9]{0,5}
ip     .+
yesno  yes|no
nets   .+
globs  []A-Za-z0-9._*?[!, -]+
words  .+
"""
PATTERNS = dict(re.findall("(?m)^([a-z]+) +(.+)", PATTERN_TABLE))
PARSERS = {
    "url": parse_base_url,
    "path": parse_path,
    "port": parse_port,
    "time": int,
    "ip": ip_address,
    "yesno": str,
    "nets": parse_networks,
    "globs": WORD_RE.findall,
    "words": parse_relay_options,
}
# What the file, the environment and the options can set: its kind, what it holds and, in brackets,
# what it is without.
SETTINGS_TABLE = """
BASE_URL      url   URL or path: clones are made of BASE_URL/NAME.git (https://github.com/aiegoo)
REPOS_DIR     path  folder where the clones go live (~/repos)
HOOKS_DIR     path  has pre-update, post-update and update-ended (/etc/server-update/hooks)
PORT          port  0 takes a free one (9999)
BIND          ip    address to listen on, else all
TIMEOUT       time  seconds for an update (600)
SUBMODULES    yesno yes or no: clone them (yes)
SECRET_FILE   path  keys, a line each, else /etc/server-update/secret if it exists
ALLOW_FROM    nets  addresses and networks that may ask, else all
GIT_FROM      nets  addresses and networks that may clone from here
VIEW_FROM     nets  addresses and networks that may read /status and /metrics unsigned
ALLOW_REPOS   globs globs of repositories that may be updated, else all
SLAVELIST     path  slaves beneath: they follow each update of this one
RELAY_OPTIONS words options of server-update for them
TLS_CERT      path  certificate chain (PEM): serve https
TLS_KEY       path  its key, where that is not in TLS_CERT
"""
SETTINGS = {
    key: Setting(default, PATTERNS[kind], PARSERS[kind], text)
    for key, kind, text, default in re.findall(
        r"(?m)^(\w+) +(\w+) +(.*?(?: \((\S+)\))?)$", SETTINGS_TABLE)
}

# What KEY.NAME may set for the repository NAME alone; what slave-activate is told: of GIT_FROM it
# wants to know whether it is set.
OWN_SETTINGS = ("BASE_URL", "HOOKS_DIR", "SUBMODULES", "TIMEOUT")
ACTIVATE_SETTINGS = ("REPOS_DIR", "GIT_FROM", *OWN_SETTINGS)


def option_name(key):
    return "--" + key.lower().replace("_", "-")


def parse_setting(key, text, before="", after=""):
    """A setting's value; None where there is no text. The two others tell where it is from."""
    if not text:
        return None
    setting = SETTINGS[key.partition(".")[0]]
    with suppress(ValueError):
        if re.fullmatch(setting.pattern, text):
            value = setting.parse(text)
            if value != [] and f"{text}{value}".isprintable():
                return value
    raise ValueError(f"{before}bad {key} '{escape(text)}'{after}")


def read_conf(path):
    """{KEY: value} of the lines KEY=value of a file, which are text and never run."""
    values = {}
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line or line.startswith("#"):
                continue
            where = f"{path}:{number}: "
            key, equals, text = map(str.strip, line.partition("="))
            if not equals:
                raise ValueError(f"{where}no '=' in '{escape(key)}'")
            # KEY may be that of all repositories, or KEY.NAME.
            name, _, repo = key.partition(".")
            if key not in SETTINGS and not (name in OWN_SETTINGS and is_repo_name(repo)):
                raise ValueError(f"{where}unknown setting '{escape(key)}'")
            # Without the quotes around it that sh would take away as well.
            text = re.sub("^(['\"])(.*)\\1$", r"\2", text)
            # A bad value is a mistake even where the environment or an option has a better one.
            if text:
                values[key] = parse_setting(key, text, before=where)
    return values


def read_settings(environ, options, folder=CONFIG_FOLDER):
    """{KEY: value}, {KEY.NAME: value} too; options win over SERVER_UPDATE_*, these over the file.

    `folder` has what no setting names, and is itself the value of CONFIG. ValueError, OSError."""
    values = {key: parse_setting(key, setting.default) for key, setting in SETTINGS.items()}
    values["HOOKS_DIR"] = f"{folder}/hooks"
    path = f"{folder}/slave.conf"
    named = environ.get("SERVER_UPDATE_CONF")
    if named or not is_absent(path):
        values.update(read_conf(named or path))
    given = {**environ, **options}
    # A value for one repository gives way to one of the environment or an option, too.
    for key in values:
        general = key.partition(".")[0]
        for name in (f"SERVER_UPDATE_{general}", option_name(general)):
            text = given.get(name)
            if text:
                values[key] = parse_setting(general, text.strip(), after=f" (set by {name})")
    values["CONFIG"] = folder
    # A certificate may have its key in the same file; a key alone certifies nothing.
    if values["TLS_KEY"] and not values["TLS_CERT"]:
        raise ValueError("TLS_KEY is set, but TLS_CERT is not")
    return values


# -- records: what is remembered of updates; pure ---------------------------

# One update. /status tells the fields of TOLD; times are seconds since 1970; `first` is the oldest
# update in whose place this one is, or itself; `untold` is the path of the hook update-ended until
# that has run; `lived` is when an update went live last, this one or one before it; `tries` are
# those that a kill of the slave cut off.
class Record(namedtuple(
        "Record", "repo update ref state requested started finished commit previous message pin "
        "hook beneath beneath_bad by note via expect first untold lived tries",
        defaults=[None] * 4 + [""] + [None] * 11 + [0])):
    __hash__ = object.__hash__  # so that encode_record knows one again, whatever is in it


TOLD = Record._fields[:16]


@lru_cache(MAX_ENCODED)
def encode_record(record):
    """A record as JSON; with a signal or a start most of a file's are as they were before."""
    return json.dumps(record._asdict())


def told(record):
    """What /status tells of a record."""
    return dict(zip(TOLD, record))


def outcome(record):
    """How an update has ended, in server-update's words."""
    if record.state != "live":
        return record.state
    if record.hook is not None:
        return "hook failed"
    if set(record.beneath or ()) - {"live"}:
        return "beneath failed"
    return "live"


class Records(namedtuple("Records", "ended running queued counts",
                         defaults=((), None, None, Counter()))):
    """What is remembered of one repository's updates, oldest first; nothing here changes it.

    `counts` is how many have ended with which outcome since the slave began."""

    def all(self):
        return [*self.ended, *filter(None, (self.running, self.queued))]

    def newest(self):
        return next(reversed(self.all()), None)

    def find(self, update):
        """The record of an update, or of the newer one in its place, or None.

        Of no update in particular it is the newest one."""
        if update is None:
            return self.newest()
        for record in self.all():
            if (record.first or record.update) <= update <= record.update:
                return record
        return None

    def accept(self, repo, ref, now, asked):
        """An update is queued, in place of one that is; `asked` are further fields of it."""
        newest = self.newest()
        update = int(now * 1000)
        if newest:
            update = max(update, newest.update + 1)
            # Until it starts, what is live is what the update before it left.
            asked = dict(asked, commit=newest.commit)
        return self._replace(queued=Record(
            repo, update, ref, "queued", requested=now,
            first=self.queued.first if self.queued else update, **asked))

    def start(self, live, now):
        """The queued update runs; `live` is the commit that is live before it."""
        # What was live before this update, also where an earlier try has put something else live.
        previous = self.queued.previous or live
        return self._replace(queued=None, running=self.queued._replace(
            state="running", started=now, commit=live, previous=previous))

    def finish(self, update, changes, now):
        """An update has ended, unless it had before; `changes` are to fields of its record."""
        record = self.find(update)
        if not record or record.finished:
            return self
        # What could not even begin ends all the same.
        begun = self if self.running else self.start(record.commit, now)
        running = begun.running
        # When something went live last is known however many updates have failed since.
        lived = self.ended[-1].lived if self.ended else None
        if changes["state"] == "live":
            lived = now
        done = running._replace(finished=now, lived=lived, **changes)
        # What slave-activate found live may be an earlier try's doing, of which it knows nothing.
        if running.previous != running.commit:
            done = done._replace(previous=running.previous)
        # Who is bad beneath is told of the newest alone.
        before = [record._replace(beneath_bad=None) for record in self.ended]
        ended = (*before, done)[-MAX_ENDED:]
        return begun._replace(
            ended=ended, running=None, counts=self.counts + Counter([outcome(done)]))

    def tell(self, update):
        """The hook update-ended has run for an update."""
        return self._replace(ended=tuple(
            record._replace(untold=None) if record.update == update else record
            for record in self.ended))

    def resume(self):
        """The slave has begun: what it ended under is queued again, unless that was too often."""
        # It may be this very update that ends the slave, each time.
        if not self.running or self.running.tries >= MAX_TRIES - 1:
            return self
        return self.requeue(tries=self.running.tries + 1)

    def requeue(self, **changes):
        """What runs is queued again, with these changes, or what is queued takes its place."""
        again = self.queued or self.running._replace(
            state="queued", started=None, **changes)
        return self._replace(queued=again._replace(first=self.running.first), running=None)

    def forget(self):
        return self if self.running or self.queued else Records()

    def encode(self):
        """The text of a record file: the newest one's fields, and the others as `earlier`."""
        *earlier, newest = map(encode_record, self.all())
        return f'{newest[:-1]}, "earlier": [{", ".join(earlier)}]}}\n'.encode()


def is_number(value):
    """Whether a value of JSON can be a time, an id or a count; NaN can't. Or TypeError."""
    return 0 <= value < 1e15


# What must hold for what a signal says and a record keeps.
ASKED_RULES = {
    "repo": is_repo_name,
    "ref": is_ref,
    "by": is_note,
    "note": is_note,
    "via": VIA_RE.fullmatch,
}
# What must hold for the fields of a record; all but those of REQUIRED may be None as well.
RULES = (
    ("update requested started finished hook first lived tries", is_number),
    ("commit previous pin expect", HASH_RE.fullmatch),
    ("message untold", str.isprintable),
    *ASKED_RULES.items(),
    ("beneath", lambda counts: all(map(is_number, counts.values()))),
    ("beneath_bad", lambda value: isinstance(value, list)),
)
REQUIRED = {"requested", "message", "tries"}  # for repo, state and update see decode_record


def decode_record(repo, fields):
    """The Record of an update of `repo` that these fields of JSON are; else ValueError, TypeError
    or AttributeError."""
    # Fields that a newer version has added are passed over; those that an older one did not know
    # have their defaults, mostly None.
    known = {key: fields[key] for key in Record._fields if key in fields}
    record = Record(**known)
    for keys, is_right in RULES:
        for key in keys.split():
            value = getattr(record, key)
            if (value is not None or key in REQUIRED) and not is_right(value):
                raise ValueError(f"not a record of an update: bad {key}")
    if record.repo != repo:
        raise ValueError("a record of another repository")
    has_ended = record.state in ("live", "failed")
    if has_ended != bool(record.finished):
        raise ValueError("not a record of an update: bad state")
    # A newer version may be at more than this one knows: what it was at is begun again.
    if not has_ended and record.state != "queued":
        record = record._replace(state="running")
    return record._replace(update=int(record.update))


def decode_records(repo, data):
    """What Records.encode made; ValueError, TypeError or AttributeError for anything else.

    Of what a newer version has written that stays which this one understands."""
    newest = json.loads(data)
    found = []
    for fields in newest.get("earlier", []) + [newest]:
        try:
            found.append(decode_record(repo, fields))
        except (ValueError, TypeError, AttributeError) as error:
            wrong = error
    # A file in which nothing is understood is broken, not newer.
    if not found:
        raise wrong
    # What has ended has a time for it; at most one runs and one is queued.
    ended = tuple(record for record in found if record.finished)
    unfinished = {record.state: record for record in found if not record.finished}
    records = Records(ended, **unfinished)
    updates = [record.update for record in records.all()]
    if updates != sorted({record.update for record in found}):
        raise ValueError("updates out of order")
    return records


# -- journal: the records of all repositories, in memory and on disk ---------

def read_file(path):
    """What is in a file; OSError where it is none. It never waits for a FIFO or a device."""
    with open(path, "rb", opener=open_at_once) as handle:
        check_regular(handle)
        return handle.read()


def lock_folder(path, flags=os.O_RDONLY):
    """Locks a folder for this process alone; the descriptor that holds the lock, until it ends."""
    fd = os.open(path, flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EBADF:
            raise
    # NFS locks only what is open for writing, which a folder can't be.
    return lock_folder(f"{path}/.lock", os.O_RDWR | os.O_CREAT)


def write_synced(path, content):
    """Puts a file in its place, whole or not at all: a loss of power leaves the old one or this.

    This one for certain once its folder is synced, too."""
    beside = f"{dirname(path)}/record.tmp"
    # With a buffer of its own nobody asks whether it is a terminal.
    with open(beside, "wb", 65536) as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.rename(beside, path)


class Journal:
    """The records of all repositories, {repo: Records}; one thread alone changes and writes them,
    but for load().

    What comes while it writes is written in one go afterwards: each file once, the folder once."""

    def __init__(self, folder):
        """Reads the state folder and takes it for this process alone; OSError where it can't."""
        self.folder = folder
        self.records = {}
        self.unread = set()  # repositories whose record is there, but can't be read now
        self.unsaved = set()  # whose last change could not be written; the next one writes it, too
        self.changes = SimpleQueue()  # of what commit() asks for
        self.changed = Condition()  # told after each change
        self.fds = []  # that hold the locks, and a third one: the state folder, to be synced
        self.take()
        self.floor = Floor(f"{folder}/signed")  # see guard
        # A disk that is full or read-only is told now, not at the first signal.
        write_synced(f"{folder}/test", b"")
        os.unlink(f"{folder}/test")
        for name in os.listdir(folder):
            repo, _, kind = name.rpartition(".")
            if kind == "json":
                self.load(repo)
        start_thread(self.write_changes)
        # A thread whose first steps find no memory ends, and without this one no signal would ever
        # get an answer. So it is asked for what is no change, and answers by a TypeError.
        with suppress(TypeError):
            self.commit("", None)

    def take(self):
        """Makes the state folder, where it is gone, and takes it for this process alone.

        So is REPOS_DIR, which is still there where somebody removes the state folder."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        # Those of a folder that is gone are worth nothing; REPOS_DIR is taken again at once.
        while self.fds:
            os.close(self.fds.pop())
        for path in (self.folder, dirname(self.folder)):
            try:
                self.fds.append(lock_folder(path))
            except BlockingIOError:
                raise OSError(f"another slave.py works in '{path}'")
        self.fds.append(os.open(self.folder, os.O_RDONLY))

    def is_taken(self):
        """Whether the state folder still is the one that was taken."""
        try:
            return samestat(os.stat(self.folder), os.fstat(self.fds[2]))
        except (OSError, IndexError):  # IndexError: it couldn't be taken again
            return False

    def path(self, repo):
        return f"{self.folder}/{repo}.json"

    def load(self, repo):
        """Reads a record; one that can't be read now stays where it is, a broken one does not."""
        path = self.path(repo)
        try:
            self.records[repo] = decode_records(repo, read_file(path)).resume()
        except FileNotFoundError:
            pass  # removed, since it could not be read
        except (OSError, MemoryError) as error:
            if repo not in self.unread:
                log(f"{path} can't be read now and is left as it is: {error}")
            self.unread.add(repo)
            return
        except Exception as error:  # whatever it is, it must not stop the others
            with suppress(OSError):
                os.rename(path, f"{path}.broken")
            log(f"{path} is broken, kept as {repo}.json.broken: {error!r}")
        self.unread.discard(repo)

    def commit(self, repo, method, *args):
        """Applies a method of Records; what it returns, once that is on disk.

        Where it can't be: what went wrong, for accept; all else holds in memory, and is written
        with the next change. OSError also where the record can't be read now."""
        if repo in self.unread:
            raise OSError("its record can't be read")
        answer = SimpleQueue()
        self.changes.put((answer, repo, method, args))
        outcome = answer.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def write_changes(self):
        """The journal's thread: writes whatever has come, and begins again.

        Changes that came while the last ones were written share one fsync of the folder: with 16
        clients that is a third more signals a second than a lock that each takes in turn."""
        while True:
            batch = []
            try:
                while not batch or not self.changes.empty():
                    batch.append(self.changes.get())
                outcomes = self.write(batch)
            except Exception as error:  # no memory, say; the next ones may have some
                outcomes = [error] * len(batch)
            with suppress(MemoryError):
                for (answer, *_), outcome in zip(batch, outcomes):
                    answer.put(outcome)
                with self.changed:
                    self.changed.notify_all()

    def write(self, batch):
        """Makes a batch of changes, on disk first; if that fails, all but new signals in memory.

        Returns the outcome of each."""
        after, outcomes = self.make(batch)
        self.unsaved.update(after)
        try:
            if not self.is_taken():
                log(f"{self.folder} is gone, and is made anew")
                self.take()
                self.unsaved.update(self.records)
            # First: of a record that is on disk the signal may not be taken again.
            self.floor.save()
            # With those that could not be written before, as they may be written now.
            for repo in self.unsaved:
                self.save(repo, after.get(repo) or self.recall(repo))
            self.sync()
            self.unsaved.clear()
        except Exception as error:
            log(f"can't write in {self.folder}: {getattr(error, 'strerror', None) or error}")
            with suppress(OSError):
                os.unlink(f"{self.folder}/record.tmp")
            after, outcomes = self.make(batch, error)
        for repo, records in after.items():
            self.records[repo] = records
            # A repository of which nothing is remembered needs no memory.
            if not records.all():
                del self.records[repo]
        return outcomes

    def make(self, batch, failure=None):
        """{repo: Records} after these changes, one after the other, and the outcome of each.

        With a failure only after what has happened anyway, such as the start or end of a run."""
        after = {}
        outcomes = []
        for _, repo, method, args in batch:
            try:
                if failure and method == Records.accept:
                    raise failure
                before = after.get(repo) or self.recall(repo)
                after[repo] = method(before, *args)
                outcomes.append(after[repo])
            except Exception as error:
                outcomes.append(error)
        return after, outcomes

    def recall(self, repo):
        """The Records of a repository; one that says so, where they can't be read now."""
        if repo in self.unread:
            failed_now = Record(repo, 0, None, "failed", 0, finished=time(),
                                message="its record can't be read; the log says why")
            return Records((failed_now,))
        return self.records.get(repo, Records())

    def save(self, repo, records):
        """Puts one file in its place, whole or not at all; its folder is synced later."""
        if records.all():
            write_synced(self.path(repo), records.encode())
            return
        for kind in ("json", "lock"):
            with suppress(FileNotFoundError):
                os.unlink(f"{self.folder}/{repo}.{kind}")

    def sync(self):
        os.fsync(self.fds[2])


# -- run: what is live, and a program that changes it -------------------------

def is_emptied(tree):
    """Whether a folder has nothing in it, or a clone none of the files that its index names."""
    names = os.listdir(tree)
    # A commit without files is no reason to say that nothing is live, hence the index.
    if names != [".git"]:
        return not names
    with suppress(OSError):
        # The number of its entries: gitformat-index(5)
        return read_file(f"{tree}/.git/index")[8:12] > bytes(4)
    return False


def read_head(tree):
    """The commit of HEAD in a clone as plain files tell it; anything else where they don't."""
    text = "ref: HEAD"
    with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        for _ in range(3):  # HEAD, the branch, or that by way of another
            if text.startswith("ref: "):
                text = os.fsdecode(read_file(f"{tree}/.git/{text[5:]}")).strip()
    return text


# Without what may lead git to another repository.
ASK_GIT = """
exec env -i PATH="$PATH" HOME="$HOME" git --git-dir="$0" rev-parse --verify "HEAD^{commit}"
"""


def ask_git(tree):
    """The commit of HEAD as git tells it, however refs are kept; nothing where there is none."""
    done = subprocess.run(["sh", "-c", ASK_GIT, f"{tree}/.git"],
                          timeout=GIT_TIMEOUT_S, capture_output=True)
    return done.stdout.decode().strip()


def read_live_commit(tree):
    """The commit that is checked out in a clone; None: there is none. It never waits for long."""
    try:
        if is_emptied(tree):
            return None
        commit = read_head(tree)
        if HASH_RE.fullmatch(commit):
            return commit
        return ask_git(tree) or None
    except (OSError, ValueError, SubprocessError):  # ValueError: a path with a NUL
        return None


def find_command(name):
    """The path of a program: on PATH, beside this script, or in /bin."""
    beside = dirname(abspath(__file__))
    path = environ.get("PATH", os.defpath)
    command = shutil.which(name, path=f"{path}:{beside}:/bin")
    if not command:
        raise OSError(f"no {name} on PATH, beside slave.py or in /bin")
    return command


class Run:
    """One run of a program, in a process group of its own: its start, its end, what it said.

    Until close() the process stays a zombie, so that its number can't be another group's."""

    is_stopping = False  # set once, for all: those that are under way are ended, none begins
    unfinished = b""  # a line on stderr
    stdout = b""  # the end of it
    status = None  # as subprocess's returncode; None where it could not be ended

    def __init__(self, name, command, environ, stdin=DEVNULL):
        """Starts it; OSError where it can't, Stopped where none may start any more.

        Its stderr is logged, each line after `name`."""
        if Run.is_stopping:
            raise Stopped(503, "this slave is stopping", RETRY_LATER)
        self.name = name
        self.said = {}  # {kind of line: the last one}, see OUTPUT_KINDS
        # A session of its own is a group of its own, too: signals reach all that it starts.
        self.process = Popen(
            command, env=environ, stdin=stdin, stdout=PIPE,
            stderr=PIPE, start_new_session=True)
        # What it leaves behind may hold the pipes open: nothing waits for their end.
        self.pipes = PollSelector()
        self.pipes.register(self.process.stdout, EVENT_READ, self.take_stdout)
        self.pipes.register(self.process.stderr, EVENT_READ, self.take_stderr)

    def finish(self, timeout_s):
        """Blocks until it has ended, with all that it started, or been given up.

        Returns whether it was ended by force, as the time was up. Raises Stopped where the slave
        is to stop meanwhile, unless it ends well all the same."""
        try:
            # From here on it is by force, whether it obeys or not.
            is_late = not self.listen_until(
                lambda: self.has_ended() or Run.is_stopping, timeout_s)
            for number, patience_s in ((SIGTERM, KILL_AFTER_S), (SIGKILL, GIVE_UP_AFTER_S)):
                if not self.has_ended():
                    self.signal(number)
                    self.listen_until(self.has_ended, patience_s)
            # What it left gets a moment to say something: it may be what tells most.
            self.signal(SIGTERM)
            self.listen_until(lambda: not self.pipes.get_map(), LEFTOVER_S)
        finally:
            self.close()
        # None, as if it had not been ended, where what it said could not be kept.
        self.status = self.process.returncode
        # It may have been told to stop together with this slave, and have obeyed at once.
        if Run.is_stopping and self.status != 0:
            raise Stopped
        return is_late

    def listen_until(self, is_over, timeout_s):
        """Takes what it says until `is_over`, or the time is up; whether it is over then."""
        deadline = monotonic() + timeout_s
        while not is_over() and monotonic() < deadline:
            # Output wakes what waits for it; where there is none it looks again and again.
            for key, _ in self.pipes.select(POLL_S):
                part = os.read(key.fd, 65536)
                key.data(part)
                if not part:
                    self.pipes.unregister(key.fileobj)
        return is_over()

    def has_ended(self):
        """How it has ended, if it has."""
        # WNOWAIT leaves the zombie, which keeps its number: see the class.
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def take_stdout(self, part):
        self.stdout = (self.stdout + part)[-MAX_PRINTED_BYTES:]

    def take_stderr(self, part):
        """Logs the lines that are whole by now; at the end, which is b"", the rest."""
        *lines, rest = (self.unfinished + part).split(b"\n")
        # Of a line without end no more than this is kept.
        self.unfinished = rest[:MAX_LINE_BYTES]
        if rest and not part:
            lines.append(rest)
        for line in lines:
            text = escape(USER_RE.sub(
                "", line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip().replace("\t", " ")))
            log(f"{self.name}: {text}")
            self.said.update(OUTPUT_RE.findall(text))

    def last_words(self):
        """The last line of the kind that tells most, or an empty text."""
        for kind in OUTPUT_KINDS:
            if kind in self.said:
                return self.said[kind]
        return ""

    def close(self):
        """Kills what is still there of it, and forgets it; what can't be killed is only told."""
        self.signal(SIGKILL)
        self.process.stdout.close()
        self.process.stderr.close()
        self.process.poll()
        # A hook may have become another user, and this may be a service without CAP_KILL.
        if not self.signal(0):
            log(f"{self.name}: what runs in process group {self.process.pid} as another user "
                "can't be ended, and is left")

    def signal(self, number):
        """Signals all of its group that may be signalled; False where nothing that is left may."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            return False
        return True


def say_status(program, status):
    if status is None:
        return f"{program} could not be ended"
    if status < 0:
        return f"{program} was killed by signal {-status}"
    return f"{program} ended with exit status {status}"


# What slave-activate prints, after the name of the repository as it should be.
OUTCOME_PATTERN = (rf"(\S+) \1 (?:(?P<commit>{HASH_RE.pattern})|-) "
                   rf"(?:(?P<previous>{HASH_RE.pattern})|-)\n?")


def judge(repo, status, stdout, words, late_after_s):
    """How a run of slave-activate ended, as changes to its record; `words` are its last ones."""
    # The one line of stdout says which commit is live; without it nothing is.
    live = re.fullmatch(OUTCOME_PATTERN, f"{repo} {stdout.decode('ascii', 'replace')}")
    message = words or say_status("slave-activate", status)
    if late_after_s:
        message = (f"stopped as it took longer than {late_after_s} s (TIMEOUT)"
                   f"{words and ', and had said: '}{words}")
    elif status == 0:
        if not live:
            message = "slave-activate did not say which commit is live"
        # Of an update that went well only what it left behind is worth a word.
        elif not re.match(WORTH_PATTERN, words):
            message = ""
    message = message[:MAX_MESSAGE_CHARS]
    # What had gone live before the time was up is live; 3 is a post-update hook that failed,
    # or the mirror, which counts as one.
    if not live or not (late_after_s or status in (0, 3)):
        return failed(message)
    return dict(live.groupdict(), state="live", message=message, hook=judge_hook(status, words))


def judge_hook(status, words):
    """The exit status of a post-update hook that failed, 1 for the mirror; None: all is well."""
    if status == 0:
        return None
    # slave-activate says it, unless it was ended together with the hook.
    match = re.match(HOOK_PATTERN, words)
    if match:
        return int(match[1])
    if status == 3:
        return 1
    return 128 - (status or -SIGKILL)


def failed(message):
    """How an update has ended that failed, as changes to its record."""
    return {"state": "failed", "message": message}


# -- forges: what a forge proves, and what it says of a push; pure ---------------

PROOFS = ("X-Hub-Signature-256", "X-Hub-Signature", "X-Gitlab-Token")
# Of GitHub, Gitea and Forgejo; of GitLab; of Bitbucket. Azure DevOps says it in the body.
EVENTS = ("X-GitHub-Event", "X-Gitlab-Event", "X-Event-Key")
PUSH_PATTERN = "push|(Tag )?Push Hook|System Hook|repo:push|git.push"
REF_FOLDERS = {"branch": "refs/heads/", "tag": "refs/tags/"}


class Ignored(Exception):
    """An event that means nothing to a hook; its text says why."""


def make_hook_key(secret, repo, ref):
    """The key, in hex, by which a forge proves pushes to the hook of `repo` and `ref`, if any."""
    text = f"server-update-hook-1\n{repo}\n{ref or ''}"
    return hmac.new(secret, text.encode(), "sha256").hexdigest().encode()


def read_password(authorization):
    """The password of basic authentication; an empty text where there is none."""
    try:
        return base64.b64decode(authorization[len("Basic "):]).partition(b":")[2]
    except ValueError:
        return b""


def read_proofs(headers):
    """What a request gives as proofs that its sender has a key, each of which must be right."""
    given = [text.encode() for name in PROOFS for text in headers.get_all(name, [])
             # GitHub and Gitea still send one by SHA-1 as well, which is none by now.
             if not text.startswith("sha1=")]
    # Beside a proof a password would be for a proxy on the way.
    return given or list(map(read_password, headers.get_all("Authorization", [])))


def check_proofs(given, keys, macs):
    """Refusal unless all that is given is a key, or a signature by one; in constant time."""
    right = keys + [f"sha256={mac.hexdigest()}".encode() for mac in macs]
    for proof in given:
        if not any(hmac.compare_digest(proof, one) for one in right):
            raise Refusal(401, "proof missing or wrong")


def find_payload(body):
    """The JSON of a body, which may be a form."""
    if body.startswith(b"payload="):
        return unquote_to_bytes(body[len(b"payload="):].replace(b"+", b" "))
    return body


def read_changes(told):
    """(ref, commit) of each change of a push; where the ref is gone, zeros."""
    if "push" in told:  # Bitbucket
        for change in told["push"]["changes"]:
            ref = change["new"] or change["old"]
            commit = ref["target"]["hash"] if change["new"] else "0"
            yield REF_FOLDERS[ref["type"]] + ref["name"], commit
    elif "resource" in told:  # Azure DevOps
        for change in told["resource"]["refUpdates"]:
            yield change["name"], change["newObjectId"]
    else:
        yield told["ref"], told["after"]


def is_meant(name, wanted):
    """Whether the ref `name` is `wanted`, or any branch where nothing is."""
    kind, _, short = name[len("refs/"):].partition("/")
    return wanted in (name, short) if wanted else kind == "heads"


def check_event(event):
    if not re.fullmatch(PUSH_PATTERN, event):
        raise Ignored("no push")


def choose_commit(told, ref):
    """Where a push has put `ref`, or the default branch; Ignored where it did something else.

    Any other error says that it is not told as forges do."""
    check_event(told.get("eventType", "git.push"))
    # GitLab's, that of GitHub, Gitea and Forgejo, or Azure's; Bitbucket's has no such branch.
    place = told.get("project") or told.get("repository") or told["resource"]["repository"]
    wanted = ref or place.get("default_branch") or place.get("defaultBranch")
    commits = [commit for name, commit in read_changes(told) if is_meant(name, wanted)]
    if not commits:
        raise Ignored("another branch or tag")
    there = [commit for commit in commits if set(commit) != {"0"}]
    if not there:
        raise Ignored("a deletion")
    return HASH_RE.fullmatch(there[-1]).group()


def find_pushed_commit(text, ref):
    """The commit that `ref`, or the default branch, is at now; None where that is not certain."""
    try:
        # As float: to read an int of 100,000 digits takes a second.
        return choose_commit(json.loads(text, parse_int=float), ref)
    except Ignored:
        raise
    except Exception:  # in doubt it is an update
        return None


# -- beneath: what server-update tells of the slaves beneath a relay; pure -----

def read_summary(stdout):
    """What server-update's last line says of all slaves together, as changes to a record.

    Any error says that it is no summary."""
    summary = json.loads(stdout.splitlines()[-1])
    counts = Counter(summary["outcomes"]) + Counter(summary.get("beneath"))
    return {"beneath": dict(counts.most_common()), "beneath_bad": summary.get("bad", [])}


def found_live(record, commit):
    """A record where that commit is live by now: by hand, perhaps."""
    if record.state == "live" and record.beneath and commit != record.commit:
        record = record._replace(
            message="what is live here was changed by hand, and not beneath",
            beneath={"not started": sum(record.beneath.values())})
    return record._replace(commit=commit)


def say_counts(counts):
    """How many there are of each, as '298 live, 2 unreachable'."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def add_beneath(changes, beneath):
    """The changes to a record with those of what is beneath, which the message says in words."""
    words = [changes["message"], f"beneath: {say_counts(beneath['beneath'])}"]
    # Where nothing was begun somebody has to know why.
    if list(beneath["beneath"]) == ["not started"] and not changes["message"]:
        words.append(beneath["beneath_bad"][0]["message"])
    return dict(changes, message=": ".join(filter(None, words)), **beneath)


# -- views: what is seen from outside; pure ----------------------------------

def measure(now, records):
    """What Prometheus is told of a repository, each metric by itself, in its text format.

    `now` is the newest record as it looks now. All words are ours, and need no escapes."""
    last = now if now.finished or not records.ended else records.ended[-1]  # that has ended
    sums = records.counts  # by outcome
    beneath = "\n".join(f'server_update_beneath{{repo="{now.repo}",outcome="{name}"}} {count}'
                        for name, count in (last.beneath or {}).items())
    return f"""\
# HELP server_update_updates_total Updates that have ended since the slave began.
# TYPE server_update_updates_total counter
server_update_updates_total{{repo="{now.repo}",outcome="live"}} {sums["live"]}
server_update_updates_total{{repo="{now.repo}",outcome="hook failed"}} {sums["hook failed"]}
server_update_updates_total{{repo="{now.repo}",outcome="beneath failed"}} {sums["beneath failed"]}
server_update_updates_total{{repo="{now.repo}",outcome="failed"}} {sums["failed"]}

# HELP server_update_updating Whether an update is queued or runs.
# TYPE server_update_updating gauge
server_update_updating{{repo="{now.repo}"}} {int(not now.finished)}

# HELP server_update_last_update_success Whether it ended as live, also beneath.
# TYPE server_update_last_update_success gauge
server_update_last_update_success{{repo="{now.repo}"}} {int(outcome(last) == "live")}

# HELP server_update_last_update_timestamp_seconds When the last update ended.
# TYPE server_update_last_update_timestamp_seconds gauge
server_update_last_update_timestamp_seconds{{repo="{now.repo}"}} {last.finished or 0}

# HELP server_update_last_live_timestamp_seconds When an update went live last.
# TYPE server_update_last_live_timestamp_seconds gauge
server_update_last_live_timestamp_seconds{{repo="{now.repo}"}} {last.lived or 0}

# HELP server_update_live_commit_info The commit that is live.
# TYPE server_update_live_commit_info gauge
server_update_live_commit_info{{repo="{now.repo}",commit="{now.commit}"}} 1

# HELP server_update_beneath Slaves beneath, by how the last update ended there.
# TYPE server_update_beneath gauge
{beneath}""".split("\n\n")


def format_metrics(measured):
    """All that Prometheus is told, of what measure() says of each repository."""
    lines = [f"""\
# HELP server_update_info The version that runs.
# TYPE server_update_info gauge
server_update_info{{version="{VERSION}"}} 1"""]
    for family in zip(*measured):
        lines += "\n".join(family).splitlines()
    # What describes a metric comes once, before all samples of it.
    return "\n".join(dict.fromkeys(lines))


# How it can stand with a repository, the worst first, and what the page says is to be done then.
ADVICE_TABLE = """
failed: What was live before still is. Once that is mended:
beneath failed: It is live here. To try those beneath again:
hook failed: It is live, but its hook has not done all. Once that is mended:
not there: Nothing is live. If the name is right, have it made:
running:
queued:
live:
"""
ADVICE = dict(re.findall("(?m)^([a-z ]+): ?(.*)", ADVICE_TABLE))
MAX_UNFOLDED = 3  # slaves beneath
# The only style that a browser takes is the page's own, by its hash; scripts it takes none.
PAGE_POLICY = ("default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
               "style-src 'sha256-QvANIGNvS/orPOIvQACxOMF1wQL/FlX7MT+52u8nAQI='")
PAGE_HEADERS = re.findall("(.+): (.+)", f"""
Content-Security-Policy: {PAGE_POLICY}
X-Content-Type-Options: nosniff
Vary: Accept
""")
STYLE = """
:root {
  --paper: #fff; --ink: #1c2024; --soft: #60646c; --line: #e2e4e9; --link: #0b5cad;
  --bad: #b3261e; --bad-paper: #fdf0ee; --busy: #8a5a00; --good: #1a7f37;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e6e8eb; --soft: #a3a9b0; --line: #2c3136; --link: #7ab7ff;
    --bad: #ff9a8f; --bad-paper: #2b1b1a; --busy: #f0c060; --good: #6fd08c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem; max-width: 100rem; background: var(--paper);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { margin: 0; font-size: 1.35rem; }
p { margin: .2rem 0 1.2rem; }
p, i, em, th { color: var(--soft); font-style: normal; }
td > i, em { display: block; }
a { color: var(--link); }
code { font: .93em ui-monospace, monospace; }
table { width: 100%; table-layout: fixed; border-collapse: collapse; }
th { text-align: left; font-size: .85rem; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th.name { width: 15%; }
th.state { width: 9.6rem; }
th.commit { width: 6rem; }
th.ref { width: 11%; }
th.since { width: 6.8rem; }
th.by { width: 17%; }
td.name, td.state { font-weight: 600; }
.failed .state, .not .state { color: var(--bad); }
.running .state, .queued .state { color: var(--busy); }
.live .state { color: var(--good); }
.failed td, .not td { background: var(--bad-paper); }
.live em, .running em, .queued em, .bad-0 { display: none; }
ul { margin: .2rem 0; padding-left: 1.1rem; }
@media (max-width: 60rem) {
  body { padding: 1rem .75rem; }
  thead, td:empty { display: none; }
  table, tbody { display: block; }
  tr { display: grid; grid-template-columns: 1fr auto; margin-bottom: .8rem; padding: .4rem 0;
    border: 1px solid var(--line); }
  .failed, .not { border-color: var(--bad); background: var(--bad-paper); }
  td { grid-column: 1 / -1; padding: .1rem .75rem; border: 0; }
  td::before { content: attr(data-label); margin-right: .5rem; color: var(--soft); }
  .name { grid-column: 1; }
  .state { grid-column: 2; text-align: right; }
  .name::before, .state::before, .message::before { content: none; }
}
"""


def standing(now):
    """Which of ADVICE a repository gets; `now` is its newest record as it looks now."""
    if now.finished and not now.commit:
        return "not there"
    return outcome(now)


def mark_up(value):
    """Anything as HTML in which nothing is markup, nor moves or hides what is beside it."""
    return html.escape(escape(str(value or "")))


def format_bad(slave):
    """A slave beneath in the page's list of those that are not good."""
    return f"""
<li><b>{mark_up(slave["slave"])}</b> {mark_up(slave["outcome"])}
<i>{mark_up(slave["message"])}</i>"""


def format_again(now):
    """The command that asks for the same update again."""
    ref = f"--ref {shlex.quote(now.ref)} " if now.ref else ""
    pin = f"--commit {now.pin} " if now.pin else ""
    return f"server-update {ref}{pin}{now.repo}"


def format_row(now, is_alone):
    """The row of a repository in the page's table; in a page of its own nothing is folded."""
    state = standing(now)
    bad = now.beneath_bad or ()
    beneath = Counter(now.beneath)
    return f"""\
<tr class="{state}">
<td class="name" data-label="Repository"><a href="?repo={now.repo}">{now.repo}</a></td>
<td class="state" data-label="State">{state}</td>
<td class="commit" data-label="Commit" title="{mark_up(now.commit)}">\
<code>{mark_up(now.commit)[:7]}</code></td>
<td class="ref" data-label="Ref">{mark_up(now.ref)}</td>
<td class="since" data-label="Since">\
{strftime("%Y-%m-%d %H:%M:%S", gmtime(now.finished or now.started or now.requested))}</td>
<td class="by" data-label="By">{mark_up(now.by)}<i>{mark_up(now.note)}</i></td>
<td class="message">{mark_up(now.message)}
<em>{ADVICE[state]} <code>{mark_up(format_again(now))}</code></em>
<details class="bad-{len(bad)}" {"" if len(bad) > MAX_UNFOLDED and not is_alone else "open"}>
<summary>Not good, by name: {len(bad)} of {sum(beneath.values()) - beneath["live"]}</summary>
<ul>{"".join(map(format_bad, bad))}</ul></details></td></tr>
"""


def format_page(records, host, is_alone):
    """The page of these repositories, each its newest record as it looks now; or of one alone."""
    records.sort(key=lambda now: list(ADVICE).index(standing(now)))
    summary = say_counts(Counter(map(standing, records)))
    return f"""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="refresh" content="30">
<title>{summary or "no repository yet"} \u2013 {mark_up(host)}</title>
<style>{STYLE}</style>
<h1>{summary or "no repository yet"}</h1>
<p>{mark_up(host)} \u00b7 server-update {VERSION} \u00b7 <a href="?">all</a></p>
<table>
<thead><tr><th class="name">Repository<th class="state">State<th class="commit">Commit
<th class="ref">Ref<th class="since">Since (UTC)<th class="by">By<th class="message">Message
<tbody>
{"".join(format_row(now, is_alone) for now in records)}</table>"""


def tell_all(records):
    """What is told of all repositories; in short of those with nothing live, if it is much."""
    # Who is bad beneath is told of one repository at a time.
    repos = {record.repo: told(record._replace(beneath_bad=None)) for record in records}
    # Strangers may have asked for a thousand names, each with a long note.
    if len(json.dumps(repos)) > MAX_STATUS_BYTES:
        for fields in repos.values():
            if not fields["commit"]:
                fields.update(message="", by=None, note=None)
    return {"version": VERSION, "repos": repos}


# -- clones from here: by git's own upload-pack -------------------------------

# Answers a request of this kind, protocol and encoding, of which there may be None. What somebody
# has just been told of is sent even if no ref leads to it any more; what is unpacked is bounded,
# at what 300,000 commits take that somebody has. See gitprotocol-http(5).
UPLOAD_PACK = r"""
mirror=$0 kind=$1 protocol=$2 encoding=$3

upload_pack() {
  env -i PATH="$PATH" HOME="$HOME" GIT_PROTOCOL="$protocol" \
    git -c uploadpack.allowAnySHA1InWant=true \
    upload-pack --strict --stateless-rpc "$@" "$mirror"
}

case $kind,$encoding in
  advertisement,*)
    printf '001e# service=git-upload-pack\n0000'
    upload_pack --advertise-refs
    ;;
  *[Gg][Zz][Ii][Pp]*)
    # What can't be unpacked ends all of it, as no whole answer.
    { gzip -dc || kill -s TERM 0; } | head -c 16777216 | upload_pack
    ;;
  *)
    upload_pack
    ;;
esac
"""
open_unnamed = tempfile.TemporaryFile  # a file that goes with the last who has it open


class Answer(Run):
    """A run of UPLOAD_PACK, whose output all who ask the same read from a file while it grows."""

    def take_stdout(self, part):
        self.file.write(part)
        self.file.flush()


class Answers(dict):
    """{what was asked, of which state of a mirror: the Answer}, so that it is made once."""

    lock = Lock()
    takers = ThreadPoolExecutor(MAX_GIT_RUNS)

    def find(self, mirror, body, *asked):
        """The Answer to a body in a file, which may still grow; Refusal: there is no mirror."""
        try:
            refs = os.stat(f"{mirror}/packed-refs")
        except OSError:
            raise Refusal(404, "no mirror here; where GIT_FROM is set, an update makes one")
        # A new file is there before the old one goes, so no two states have both in common.
        key = (mirror, refs.st_ino, refs.st_mtime_ns, *asked)
        with self.lock:
            answer = self.get(key)
            # One that has failed is not told again.
            if not answer or answer.end.done() and answer.status != 0:
                with can("ask git"):
                    answer = Answer(
                        mirror, ["sh", "-c", UPLOAD_PACK, mirror, *asked], environ, body)
                    answer.file = open_unnamed()
                answer.end = self.takers.submit(answer.finish, GIT_RUN_TIMEOUT_S)
            answer.asked = monotonic()
            self[key] = answer
        return answer

    def forget_before(self, when):
        """Forgets what nobody has asked for since then, and the first of too many; who reads it
        still has it."""
        for key, answer in list(self.items()):
            if answer.asked < when or len(self) > MAX_ANSWERS:
                del self[key]


# -- guard: who may ask for what ---------------------------------------------

def check_time(when, floor):
    """Refuses what was signed at `when`, if that was not after `floor`: it may be a replay."""
    wait_s = floor + 1 - when
    if wait_s > 0:
        refusal = Refusal(
            503, f"signed too long ago to be told from a replay; sign again in {wait_s} s",
            ("Retry-After", wait_s))
        refusal.more = {"floor": floor}
        raise refusal


class Floor:
    """The newest time of any signed signal that was taken: after a start none is from before that.

    So no signal is taken twice, although its nonce is forgotten by then. That its file is there
    also tells that this slave has had a secret."""

    def __init__(self, path):
        """OSError where the file can't be looked at."""
        self.path = path
        self.lock = Lock()
        self.at_start = self.read()
        self.newest = self.at_start  # rounded up

    def read(self):
        """What is in the file; 0 where there is none."""
        if is_absent(self.path):
            return 0
        try:
            return int(read_file(self.path))
        except ValueError:  # it is broken: nothing is taken that may have been signed by now
            return int(time()) + MAX_CLOCK_DIFFERENCE_S

    def take(self, when):
        """Takes a signal that was signed at `when`, or a Refusal."""
        check_time(when, self.at_start)
        with self.lock:
            if when > self.newest:
                self.newest = when + FLOOR_STEP_S

    def save(self):
        """Writes the file where it is behind or gone; its folder is to be synced."""
        with suppress(OSError):
            if not self.newest or self.newest == self.read():
                return
        write_synced(self.path, b"%d\n" % self.newest)


class Nonces:
    """The nonces of the requests that one key has signed, each of which is taken once."""

    floor = 0  # those signed by then are forgotten; for a start there is Floor

    def __init__(self):
        self.lock = Lock()
        self.taken = {}  # {nonce: when it was signed}

    def take(self, nonce, when):
        """Refusal where it was taken before, or may have been."""
        with self.lock:
            if len(self.taken) >= MAX_NONCES:
                self.floor = max(self.taken.values())
                self.taken.clear()
            check_time(when, self.floor)
            if nonce in self.taken:
                raise Refusal(401, "signature missing or wrong")
            self.taken[nonce] = when


@contextmanager
def can(what):
    """Refuses for now where an OSError keeps this slave from doing something."""
    try:
        yield
    except OSError as error:
        raise not_now(f"can't {what}: {error.strerror or error}")


class Guard:
    """Who may ask for what: by signature, address and repository. All checks raise Refusal."""

    complaint = ""  # of a secret file that is no good by now

    def __init__(self, settings):
        """OSError or ValueError where something that says who may can't be looked at."""
        self.settings = settings
        self.path = settings["SECRET_FILE"] or f"{settings['CONFIG']}/secret"
        self.secrets = []
        # One key's flood takes nothing from another key.
        self.nonces = {}  # {secret: its Nonces}
        if settings["SECRET_FILE"] or not is_absent(self.path):
            self.secrets = read_secrets(self.path)

    def needs_signature(self):
        """Reads the secrets afresh, for a change without a gap; whether there are any."""
        with can("read the secret"):
            if not self.secrets and is_absent(self.path):
                return False
            try:
                self.secrets = read_secrets(self.path)
            except ValueError as error:
                # Those from before hold; where there were none, nobody has one that is right.
                complaint = f"the secret stays what it was: {error}"
                if complaint != self.complaint:
                    log(complaint)
                self.complaint = complaint
            return True

    def check_signature(self, values, method, target, now):
        """When it was signed; None where none is needed. `values` are those of its header.

        Only who knows the secret is told what is wrong with them."""
        if not self.needs_signature():
            return None
        # Two signatures are as good as none: which of them would be meant?
        match = re.fullmatch(SIGNATURE_PATTERN, ",".join(values))
        right = []
        if match:
            when, nonce, mac = match.groups()
            right = [one for one in self.secrets
                     if hmac.compare_digest(sign(one, method, target, when, nonce), mac)]
        if not right:
            raise Refusal(401, "signature missing or wrong")
        # The difference of the clocks tells nothing to who has no key.
        when = int(when)
        difference = abs(now - when)
        if difference > MAX_CLOCK_DIFFERENCE_S:
            raise Refusal(401, f"the clocks are {difference} s apart")
        self.nonces.setdefault(right[0], Nonces()).take(nonce, when)
        return when

    def is_from(self, key, text):
        """Whether an address is in one of the networks of a setting."""
        address = ip_address(text.partition("%")[0])
        return any(address in network for network in self.settings[key] or ())

    def check_address(self, text):
        if self.settings["ALLOW_FROM"] and not self.is_from("ALLOW_FROM", text):
            raise Refusal(403, "not from this address")

    def check_repo(self, repo):
        globs = self.settings["ALLOW_REPOS"] or ["*"]
        if not any(fnmatch.fnmatchcase(repo, glob) for glob in globs):
            raise Refusal(403, "not an allowed repository")


def check_secret(guard, floor):
    """Marks that this slave has a secret; ValueError where it has none now, but had one once."""
    if guard.secrets:
        floor.newest = floor.newest or 1
        floor.save()
    elif floor.at_start:
        raise ValueError(f"there was a secret here, and there is none in '{guard.path}'; bring it "
                         f"back or, to serve without one, remove {floor.path}")


def find_pre_updates(settings):
    """The folders of settings that have a pre-update hook.

    OSError where one can't be looked at; what a setting names must exist."""
    having = set()
    for key, folder in settings.items():
        if key.startswith("HOOKS_DIR"):
            if folder != f"{settings['CONFIG']}/hooks" or not is_absent(folder):
                os.stat(folder)
            check_pre_update(folder, having)
    return having


def check_pre_update(folder, having):
    """Refusal where the hook is gone: once there is one, no update goes without it.

    OSError where that can't be known. `having` are the folders that have had one."""
    # One look, as each lets another thread go first: slave-activate looks more closely.
    try:
        os.lstat(f"{folder}/pre-update")
        having.add(folder)
    except FileNotFoundError:
        if folder in having:
            # Who removes it on purpose has to say so, by a restart.
            raise not_now("the pre-update hook is gone; if that is meant, restart the slave")


# -- updater ------------------------------------------------------------------

class Relay:
    """The slaves beneath: server-update puts live there what has gone live here."""

    def __init__(self, settings, folder):
        """OSError or ValueError where the list or the options are no good."""
        self.slavelist = settings["SLAVELIST"]
        self.options = settings["RELAY_OPTIONS"] or []
        if settings["SECRET_FILE"]:
            # One in RELAY_OPTIONS comes after it, and wins.
            self.options = ["--secret-file", settings["SECRET_FILE"], *self.options]
        # Its id is made once.
        path = f"{folder}/relay-id"
        if is_absent(path):
            write_synced(path, os.urandom(8).hex().encode())
        self.id = read_file(path).decode()
        log(f"{self.count()} slaves beneath, of {self.slavelist}")

    def command(self, kind, repo, *pins):
        return [find_command("server-update"), kind, "--list", self.slavelist,
                *pins, *self.options, repo]

    def count(self):
        """How many slaves are in the list; ValueError says why that can't be known."""
        done = subprocess.run(self.command("--dry-run", "any"), capture_output=True,
                              timeout=LIST_TIMEOUT_S)
        if done.returncode:
            words = done.stderr.decode("utf-8", "replace").split("server-update: ")
            raise ValueError(f"SLAVELIST or RELAY_OPTIONS: {words[-1].strip()}")
        return done.stdout.count(b"\n")

    def not_started(self, why):
        """The changes to a record where nothing was begun beneath."""
        listed = 1
        with suppress(OSError, ValueError, SubprocessError):
            listed = self.count()
        bad = {"slave": self.slavelist, "outcome": "not started", "message": why}
        return {"beneath": {"not started": listed}, "beneath_bad": [bad]}

    def update(self, record, commit):
        """Brings all to a commit: changes to a record, or Stopped."""
        pins = ["--commit", commit]
        if record.ref:
            pins = ["--ref", record.ref.encode(), *pins]
        # Who asked, why, and by way of whom goes on to those beneath.
        variables = dict(environ, SERVER_UPDATE_BY=(record.by or "").encode(),
                         SERVER_UPDATE_NOTE=(record.note or "").encode(),
                         SERVER_UPDATE_VIA=f"{record.via or ''},{self.id}".lstrip(","))
        try:
            run = Run(f"{record.repo}: beneath", self.command("--json", record.repo, *pins),
                      variables)
        except OSError as error:
            return self.not_started(f"can't run {error}")
        run.finish(NEVER_S)
        try:
            return read_summary(run.stdout)
        except Exception:  # it has not come as far as that
            return self.not_started(
                run.last_words() if run.status == 2 else say_status("server-update", run.status))


class Updater:
    """Takes signals and runs the updates that they ask for: one of a repository at a time."""

    def __init__(self, settings, guard):
        """What was queued or running when the slave ended is queued again; OSError: can't.

        ValueError where a secret is missing."""
        self.settings = settings
        self.command = find_command("slave-activate")
        self.hooks = find_pre_updates(settings)  # folders
        self.journal = Journal(f"{settings['REPOS_DIR']}/.server-update")
        self.commit = self.journal.commit
        tempfile.tempdir = self.journal.folder
        check_secret(guard, self.journal.floor)  # before the journal has anything to write
        self.journal.sync()
        # Each change of these is one step, so that only run_next(), which makes two, needs a lock.
        self.waiting = {}  # {repo: True}, who has waited longest first
        self.running = {}  # {repo: whether it takes a place}
        self.lock = Lock()
        # Runs update-ended, one at a time. Its thread is there from now on, and the end of Python
        # waits for it.
        self.teller = ThreadPoolExecutor(1)
        self.teller.submit(time).result()
        self.relay = settings["SLAVELIST"] and Relay(settings, self.journal.folder)
        for repo in sorted(self.journal.records):
            self.take_up(repo)

    def setting(self, key, repo):
        """The value that holds for a repository: that of KEY.NAME, or else of KEY."""
        return self.settings.get(f"{key}.{repo}", self.settings[key])

    def check_hook(self, repo):
        with can("look at the pre-update hook"):
            check_pre_update(self.setting("HOOKS_DIR", repo), self.hooks)

    def tree(self, repo):
        """Where a repository's clone is, or would be."""
        return f"{self.settings['REPOS_DIR']}/{repo}"

    def take_up(self, repo):
        """Queues what was queued or running when the slave ended."""
        records = self.journal.recall(repo)
        if records.running:
            self.end_update(records.running, failed(INTERRUPTED))
        for record in records.ended:
            self.teller.submit(self.run_update_ended, record)
        if records.queued:
            log(f"{repo}: update {records.queued.update} is taken up again")
            self.waiting[repo] = True

    def take_signal(self, repo, ref, asked, peer):
        """Queues an update; its record, which is on disk then, or a Refusal."""
        if Run.is_stopping:
            raise not_now("this slave is stopping")
        is_full = repo not in self.waiting and len(self.waiting) >= MAX_QUEUED
        # Strangers can make up any number of names, but no tree.
        if is_full and not lexists(self.tree(repo)):
            raise not_now("too many updates are queued")
        self.check_hook(repo)
        if self.relay and self.relay.id in (asked.get("via") or ""):
            raise Refusal(409, "a circle of relays: this one is beneath itself")
        with can("record the update"):
            record = self.commit(repo, Records.accept, repo, ref, time(), asked).queued
        why = ", ".join(filter(None, (peer, record.by, record.note)))
        log(f"{repo}: update {record.update} was asked for by {why}")
        self.waiting[repo] = True
        self.start_queued()
        return record

    def ready(self):
        """The repositories that can start now."""
        places = MAX_RUNNING - list(self.running.values()).count(True)
        return [repo for repo in list(self.waiting) if repo not in self.running][:places]

    def start_queued(self):
        """Starts threads for what can start now; where there are none, tend() comes again."""
        with suppress(RuntimeError, MemoryError):
            for _ in self.ready():
                start_thread(self.run_next)

    def run_next(self):
        """A thread: runs an update to its end, whatever goes wrong, if one can start."""
        with self.lock:
            ready = self.ready()
            # Another thread may have taken what this one was started for.
            if Run.is_stopping or not ready:
                return
            repo = ready[0]
            del self.waiting[repo]
            self.running[repo] = True
        # Nothing is, where the run before took it along: it was on disk, but not yet queued here.
        queued = self.journal.recall(repo).queued
        try:
            if queued:
                self.update(repo)
        except Stopped:
            self.commit(repo, Records.requeue)
            log(f"{repo}: update {queued.update} stopped, to be taken up again")
        except Exception as error:
            # Whatever it is, who waits must hear of an end.
            message = f"the update can't go on: {error!r}"
            if isinstance(error, Refusal):
                message = error.args[1]
            self.end_update(queued, failed(message))
        finally:
            del self.running[repo]
            self.start_queued()

    def update(self, repo):
        """Runs the queued update of a repository, and records how it ended; or Stopped."""
        record = self.commit(
            repo, Records.start, read_live_commit(self.tree(repo)), time()).running
        log(f"{repo}: update {record.update} starts, ref {record.ref or 'not given'}")
        # It may have vanished while this update was queued.
        self.check_hook(repo)
        changes = self.activate(record)
        if changes["state"] == "live" and self.relay:
            changes = self.update_beneath(record, changes)
        self.end_update(record, changes)

    def update_beneath(self, record, changes):
        """How it ended here and beneath, as changes to the record; or Stopped."""
        if changes["hook"] is not None or not changes["commit"]:
            beneath = self.relay.not_started(changes["message"] or "no commit is live here")
        else:
            # All that is left is done elsewhere: another may start here.
            self.running[record.repo] = False
            self.start_queued()
            beneath = self.relay.update(record, changes["commit"])
        return add_beneath(changes, beneath)

    def activate(self, record):
        """Runs slave-activate; how it ended, as changes to the record; or Stopped."""
        command = [self.command]
        if record.pin:
            command += ["--commit", record.pin]
        command += [record.repo]
        if record.ref:
            command += [record.ref.encode()]  # whatever the locale can encode
        # A forge may tell of a push before it can be fetched.
        variables = dict(environ, SERVER_UPDATE_EXPECT=record.expect or "")
        for key in ACTIVATE_SETTINGS:
            variables[f"SERVER_UPDATE_{key}"] = str(self.setting(key, record.repo) or "")
        try:
            run = Run(record.repo, command, variables)
        except OSError as error:
            return failed(f"can't run {error}")
        timeout_s = self.setting("TIMEOUT", record.repo)
        is_late = run.finish(timeout_s + BACKSTOP_S)
        return judge(record.repo, run.status, run.stdout,
                     run.last_words(), is_late and timeout_s)

    def end_update(self, record, changes):
        """Records how an update has ended, unless it had before, and logs it."""
        if changes["state"] == "failed":
            # Whatever goes wrong here, who waits must hear of an end.
            with suppress(Exception):
                changes["commit"] = read_live_commit(self.tree(record.repo))
            if self.relay:
                changes.update(self.relay.not_started(changes["message"]))
        hook = f"{self.setting('HOOKS_DIR', record.repo)}/update-ended"
        if lexists(hook):
            changes["untold"] = hook
        done = self.commit(
            record.repo, Records.finish, record.update, changes, time()).find(record.update)
        self.teller.submit(self.run_update_ended, done)
        message = done.message and f": {done.message}"
        log(f"{record.repo}: update {record.update} {outcome(done)} after "
            f"{done.finished - done.started:.1f} s, live is {done.commit or 'nothing'}{message}")
        if done.state == "failed":
            self.forget_oldest()

    def run_update_ended(self, record):
        """Runs update-ended, unless it has run; what a stop cuts off is for the next start."""
        if not record.untold:
            return
        message = record.message
        if record.beneath_bad:
            # With the names of the first of them.
            names = ", ".join(bad["slave"] for bad in record.beneath_bad[:MAX_NAMES])
            message = f"{message} ({names})"
        command = [record.untold, record.repo, outcome(record),
                   record.previous or "-", record.commit or "-", message.encode()]
        name = f"{record.repo}: update-ended"
        try:
            run = Run(name, command, environ)
            run.finish(UPDATE_ENDED_TIMEOUT_S)
            if run.status != 0:
                log(f"{name}: failed with exit status {run.status}")
        except OSError as error:
            log(f"{name}: can't run {error}")
        self.commit(record.repo, Records.tell, record.update)

    def forget_oldest(self):
        """Forgets the oldest of too many repositories that have no tree: any name makes one."""
        records = self.journal.records.copy()
        without = [repo for repo in records if not lexists(self.tree(repo))]
        # The newest ones stay: somebody may still ask how they ended.
        without.sort(key=lambda repo: records[repo].newest().requested)
        for repo in without[:-MAX_WITHOUT_TREE]:
            self.commit(repo, Records.forget)

    def tend(self):
        """Called twice a second: starts what could not be started before, or sees to the end."""
        for repo in self.journal.unread.copy():
            self.journal.load(repo)
            self.take_up(repo)
        self.start_queued()
        with self.journal.changed:
            self.journal.changed.notify_all()  # who waits for an end looks whether its peer does

    def wait_for_end(self, repo, update, wait_s, check_peer):
        """Blocks until an update has ended or the slave stops, `wait_s` at most.

        Calls `check_peer`, which raises where nobody waits for the answer any more, now and then.
        """
        def is_over():
            check_peer()
            record = self.journal.recall(repo).find(update)
            return not record or record.finished or Run.is_stopping
        with self.journal.changed:
            self.journal.changed.wait_for(is_over, wait_s)

    def status(self, repo, update=None):
        """The record of an update, or the newest one as it looks now; None where there is none."""
        # What somebody has removed, tree and record, is forgotten.
        is_there = lexists(self.journal.path(repo)) or lexists(self.tree(repo))
        if repo in self.journal.records and not is_there:
            self.commit(repo, Records.forget)
        records = self.journal.recall(repo)
        record = records.find(update)
        if not record or record != records.newest():
            return record
        # Somebody may have put another commit live by hand, or removed the tree.
        return found_live(record, read_live_commit(self.tree(repo)))

    def look_at_all(self):
        """The newest record of each repository as it looks now."""
        # A copy, made in one step, as the journal goes on meanwhile.
        names = self.journal.unread.union(self.journal.records)
        return [record for record in map(self.status, sorted(names)) if record]


# -- served file ------------------------------------------------------------------

# What is not shown, as a path from its clone: itself, what is outside, and in git's own folder.
HIDDEN_RE = re.compile(r"(^|/)(\.|\.\.|\.git)(/|$)", re.I)


def find_clone(path, repos, known="/"):
    """The clone that a path leads into, by links too; / if into none.

    That is one in `repos`, or the innermost folder with a .git in it; but only one within `known`
    once a link in that clone has been followed, which may lead to any."""
    clone = known
    here = "/"
    while path:
        # Step by step, as a link in the clone itself must not be followed unseen.
        step, _, path = path.partition("/")
        here = normpath(join(here, step))
        if dirname(here) == repos != here:  # / is in itself
            return here
        if islink(here):
            target = join(dirname(here), f"{os.readlink(here)}/{path}")
            return find_clone(target, repos, clone)
        if here.startswith(known) and lexists(f"{here}/.git"):
            clone = f"{here}/"  # of /srv/site, /srv/site2 is no part
    return clone


class ServedFile:
    """The file of the command line, opened freshly each time."""

    def __init__(self, path, repos):
        """ValueError where it can't be one."""
        self.path = abspath(path)
        self.repos = realpath(repos)
        if isdir(self.path):
            raise ValueError(f"'{self.path}' is a folder, not a file to serve")

    def open(self):
        """The open file; Refusal where there is none, or none that may be shown.

        Where it lies in a clone, no link of that clone leads out of it."""
        try:
            for _ in range(3):
                # Opened so, nothing happens to a device or a FIFO, and nothing is waited for;
                # it fails for links that go round in a circle.
                handle = os.open(self.path, os.O_PATH)
                try:
                    clone = realpath(find_clone(self.path, self.repos))
                    name = f"/proc/self/fd/{handle}"
                    # Nothing of git's own folder either, which knows passwords of URLs.
                    is_hidden = HIDDEN_RE.search(relpath(os.readlink(name), clone))
                    if isfile(name) and not is_hidden:
                        return open(name, "rb")
                finally:
                    os.close(handle)
                # It may be of the old clone, which has just been exchanged for a new one.
        except PermissionError:
            raise Refusal(403, "the served file may not be read by the slave's user")
        except OSError:
            pass
        raise Refusal(404, "the served file does not exist now")


# -- handler: one connection ----------------------------------------------------

# What a connection is at: who waits for its peer gives way to a new one before all others. Those
# that are being answered mostly follow an update, and may come again.
WAITING, RECEIVING_MUCH, ANSWERING, DROPPED = range(4)
Stage = namedtuple("Stage", "rank since deadline")  # times of monotonic()


class HeaderReader(io.BufferedReader):
    """Reads headers line by line, as http.server asks for them, within bounds.

    `left` is how much may still come of a header: MAX_HEADER_BYTES of one that begins."""

    def readline(self, _limit):
        """The next line; ConnectionError where the peer leaves in the middle of a header."""
        is_first = self.left == MAX_HEADER_BYTES
        # One byte more than is allowed tells a line that is too long from one that just fits.
        line = super().readline(MAX_LINE_BYTES + 1)
        self.left -= len(line)
        if len(line) > MAX_LINE_BYTES or self.left < 0:
            raise Refusal(414 if is_first else 431, "request line or header too long")
        if not line.endswith(b"\n") and (line or not is_first):
            raise ConnectionAbortedError("cut off in the middle of a header")
        # http.client would drop it with all that follow, and so take a body for a request.
        if not is_first and not re.fullmatch(HEADER_LINE_PATTERN, line):
            raise Refusal(400, "malformed header")
        return line


# What must hold for the parameters of a request, each of which may be missing.
PARAMETERS = {
    **ASKED_RULES,
    "commit": re.compile(f"(?i){HASH_RE.pattern}").fullmatch,
    "update": re.compile("[0-9]{1,15}").fullmatch,
    "wait": re.compile(r"[0-9]{1,15}(\.[0-9]+)?").fullmatch,
    "history": re.compile("[01]").fullmatch,
}


def parse_query(query):
    """{name: value} of the parameters that mean something here; Refusal where they are bad."""
    values = {}
    for name, text in re.findall("([^&=]*)=?([^&]*)", query):
        # A URL in the master's list may have a query of its own.
        if name not in PARAMETERS:
            continue
        if name in values:
            raise Refusal(400, f"'{name}' is given twice")
        # What is no UTF-8 becomes U+FFFD, which is printable.
        value = unquote(text, errors="replace")
        if "\ufffd" in value or not PARAMETERS[name](value):
            raise Refusal(400, f"bad '{name}'")
        values[name] = value
    return values


class Connection(SimpleHTTPRequestHandler):
    """One connection in a thread of its own: its deadlines, its end, one answer a request."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # a request without a version gets a whole answer too
    server_version = "server-update"
    sys_version = VERSION
    disable_nagle_algorithm = True
    rbufsize = 0  # as HeaderReader has a buffer of its own
    wbufsize = 2048  # one write an answer, mostly
    has_rest = True  # whether more than what is answered may have come

    def setup(self):
        if self.server.tls:
            # The handshake is part of the first read, in this thread and under its deadline.
            self.request = self.server.tls.wrap_socket(self.request, server_side=True,
                                                       do_handshake_on_connect=False)
        super().setup()
        self.rfile = HeaderReader(self.rfile, HEADER_BUFFER_BYTES)

    def enter(self, rank, may_last_s=NEVER_S):
        """Begins a stage; once that has lasted too long the server drops the connection."""
        now = monotonic()
        self.stage = Stage(rank, now, now + may_last_s)

    def finish(self):
        """Closes the connection; what its peer still sends comes first: else it gets no answer."""
        # It waits for its peer once more, and gives way as others that do.
        self.enter(WAITING, HEADER_TIMEOUT_S)
        try:
            # What is left in the buffer goes out here, or raises where the peer has gone.
            super().finish()
            # Not to wait where there is nothing to wait for is 6 % more signals a second.
            if not self.has_rest:
                return
            # Input that is unread at the close makes the kernel drop what is still to be sent.
            self.request.shutdown(socket.SHUT_WR)
            self.request.settimeout(CLOSE_TIMEOUT_S)
            # What a peer sends goes on coming after drop() as well.
            while self.stage.rank == WAITING and self.request.recv(MAX_HEADER_BYTES):
                pass
        except OSError:
            pass  # the peer has gone
        finally:
            self.server.handlers.discard(self)
            self.request.close()

    def check_peer(self):
        """ConnectionError where the connection was reset, or dropped; one that is half closed by
        its peer still wants an answer."""
        gone = select.poll()
        gone.register(self.request, 0)  # POLLERR and POLLHUP are always told
        if gone.poll(0):
            raise ConnectionAbortedError("its peer has gone")

    def drop(self):
        """Ends the connection, from any thread."""
        self.enter(DROPPED)
        with suppress(OSError):
            socket.socket.shutdown(self.request, socket.SHUT_RDWR)  # not ssl's: another thread

    def handle_one_request(self):
        """Reads one request and answers it, an error too."""
        self.requestline = self.request_version = self.command = ""
        self.enter(WAITING, HEADER_TIMEOUT_S)
        self.server.handlers.add(self)
        self.rfile.left = MAX_HEADER_BYTES
        try:
            super().handle_one_request()
        except Refusal as refusal:
            # It is the last answer of a connection: what comes next may be no request.
            self.close_connection = self.has_rest = True
            status, text, *headers = refusal.args
            log.tell_refusal(f"refused with {status} from {self.client_address}: {text}: "
                             f"{self.requestline[:200]}")
            self.send(status, dict(refusal.more, error=text), *headers)

    def parse_request(self):
        """As in http.server; whoever may not ask, or not like this, is refused."""
        if not super().parse_request():
            return False
        self.enter(ANSWERING, ANSWER_TIMEOUT_S)
        self.route, _, self.query = re.sub(
            ORIGIN_PATTERN, "/", self.requestline.split()[1]).partition("?")
        # A body is the last of a connection: what nobody reads is never taken for a request. Nor
        # is that of a POST without a length, which is refused: see body_length.
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.has_rest = has_body or not self.close_connection
        if has_body or self.request_version == "HTTP/1.0":
            self.close_connection = True
        methods = "POST" if self.route == "/hook" else "GET, HEAD"
        match = re.fullmatch(GIT_PATTERN, f"{self.command} {self.route}?{self.query}")
        if match:
            methods = self.command
            self.route = "/git?"  # no other path has this
            self.query = f"repo={match[2]}"
        is_right = self.command in methods.split(", ")
        if self.route != "/healthz" or not is_right:
            self.server.guard.check_address(self.client_address)
        if not is_right:
            raise Refusal(405, f"only {methods}", ("Allow", methods))
        return True

    def send_error(self, code, *_):
        """What http.server itself refuses, by an HTTPStatus; its messages quote the request, so
        they go nowhere."""
        raise Refusal(code, code.phrase.lower())

    def log_message(self, *args):
        """Nothing: see log()."""

    def handle_expect_100(self):
        return True  # go on without a word: see read_body

    def body_length(self):
        """How many bytes the body has; Refusal where that is not said, or they are too many."""
        text = ",".join(self.headers.get_all("Content-Length", []))
        if not text or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "no Content-Length")
        if not re.fullmatch("[0-9]{1,15}", text):
            raise Refusal(400, "bad Content-Length")
        if int(text) > MAX_BODY_BYTES:
            raise Refusal(413, f"a body of more than {MAX_BODY_BYTES} bytes")
        return int(text)

    def read_body(self, macs):
        """The body, or nothing of a large one; all of it is part of what these MACs are of."""
        length = self.body_length()
        is_large = length > MAX_READ_BODY_BYTES
        self.enter(RECEIVING_MUCH if is_large else WAITING, BODY_TIMEOUT_S)
        ranks = [one.stage.rank for one in list(self.server.handlers)]
        if ranks.count(RECEIVING_MUCH) > MAX_LARGE_BODIES and is_large:
            raise not_now("too many large bodies")
        body = b""
        # All of a body that is read, or one part after the other of what is only proved.
        for body in self.receive([length]):
            for mac in macs:
                mac.update(body)
        if is_large:
            return b""
        return body

    def receive(self, sizes):
        """Yields what comes of a body, in parts, one piece of these sizes after the other."""
        if "Expect" in self.headers and self.request_version != "HTTP/1.0":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
        for left in sizes:
            while left:
                part = self.rfile.read(min(left, MAX_READ_BODY_BYTES))
                if not part:
                    raise ConnectionAbortedError("cut off in the middle of a body")
                left -= len(part)
                yield part
        self.enter(ANSWERING, ANSWER_TIMEOUT_S)

    def body_sizes(self):
        """Yields the size of the body, or of each chunk that it comes in."""
        if "Transfer-Encoding" not in self.headers:
            yield self.body_length()
            return
        size = 1
        while size:
            self.rfile.left = MAX_HEADER_BYTES
            match = re.fullmatch(CHUNK_PATTERN, self.rfile.readline(0))
            if not match:
                raise Refusal(400, "bad chunk")
            size = int(match[1], 16)
            yield size
            self.rfile.readline(0)

    def send(self, status, value, *headers, kind="text/plain"):
        """Sends a whole answer: a text of that kind, or anything else as JSON."""
        if not isinstance(value, str):
            kind = "application/json"
            value = json.dumps(value)
        body = value.encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", len(body))
        for header in headers:
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self):
        if self.close_connection:
            self.send_header("Connection", "close")
        super().end_headers()


VIEWS = ("/status", "/metrics")  # which who may look needs no signature for
ROUTES_TABLE = """
/        answer_signal
/get     answer_signal
/get/    answer_signal
/hook    answer_hook
/git?    answer_git
/status  answer_status
/metrics answer_metrics
"""
ROUTES = dict(re.findall("(/.*?) +(.+)", ROUTES_TABLE))


class Handler(Connection):
    """What is asked, and what is answered, by http.server's flow: do_GET and its kin."""

    def do_GET(self):
        # These two never need a signature; everything else is checked before it is parsed.
        if self.route == "/healthz":
            self.send(200, "ok")
        elif self.route == "/" and not re.search("(^|&)repo(=|&|$)", self.query):
            self.answer_front()
        else:
            self.check_signature()
            asked = parse_query(self.query)
            if self.route not in ROUTES:
                raise Refusal(404, "no such path")
            if "repo" in asked:
                self.server.guard.check_repo(asked["repo"])
            elif self.route not in VIEWS:
                raise Refusal(400, "no 'repo'")
            getattr(self, ROUTES[self.route])(**asked)

    do_HEAD = do_GET
    do_POST = do_GET

    def check_signature(self):
        """Refusal unless the request is signed, where it has to be; or a hook's has a proof."""
        guard = self.server.guard
        if self.route == "/git?":
            return  # see answer_git
        if self.route == "/hook":
            # Whether a forge's proof is right is known after its body: see answer_hook.
            if not guard.needs_signature():
                raise Refusal(403, "no hooks without a secret")
            if not read_proofs(self.headers):
                raise Refusal(401, "proof missing or wrong")
            return
        if self.route in VIEWS and guard.is_from("VIEW_FROM", self.client_address):
            return
        signatures = self.headers.get_all("X-Server-Update-Signature", [])
        # What is signed is the target as it was sent.
        self.signed_at = guard.check_signature(
            signatures, self.command, self.requestline.split()[1], int(time()))

    def answer_signal(self, repo, ref=None, commit=None, by=None, note=None, via=None, **_):
        """Starts an update."""
        if self.command != "GET":
            raise Refusal(405, "only GET starts an update", ("Allow", "GET"))
        # A web page may not start anything, not even one that somebody on this network reads.
        # Browsers say none where somebody has typed the address.
        sites = self.headers.get_all("Sec-Fetch-Site", ["none"])
        if "Origin" in self.headers or sites != ["none"]:
            raise Refusal(403, "a web page may not start an update")
        if self.signed_at:
            self.server.updater.journal.floor.take(self.signed_at)
        self.start(repo, ref, pin=commit and commit.lower(), by=by, note=note, via=via)

    def start(self, repo, ref, **asked):
        """Queues an update, and tells its id."""
        record = self.server.updater.take_signal(repo, ref, asked, self.client_address)
        self.send(
            202, {"repo": repo, "update": record.update, "state": record.state, "ref": ref},
            ("Location", f"/status?repo={repo}&update={record.update}"))

    def answer_hook(self, repo, ref=None, **_):
        """Starts an update where a forge proves a push that means one; all others get a reason."""
        keys = [make_hook_key(secret, repo, ref) for secret in self.server.guard.secrets]
        macs = [hmac.new(key, digestmod="sha256") for key in keys]
        text = find_payload(self.read_body(macs))
        # Gitea signs the JSON in a form, GitHub the form.
        macs += [hmac.new(key, text, "sha256") for key in keys]
        check_proofs(read_proofs(self.headers), keys, macs)
        try:
            for name in EVENTS:
                check_event(self.headers.get(name, "push"))
            self.start(repo, ref, expect=find_pushed_commit(text, ref), by="a forge")
        except Ignored as ignored:
            self.send(200, {"repo": repo, "ignored": str(ignored)})

    def answer_git(self, repo):
        """Sends who may clone from here what git answers, as it comes."""
        if not self.server.guard.is_from("GIT_FROM", self.client_address):
            raise Refusal(403, "no clones from this address; see GIT_FROM")
        kind = "advertisement"
        digest = ""
        with tempfile.SpooledTemporaryFile(MAX_READ_BODY_BYTES) as body:
            if self.command == "POST":
                kind = "result"
                digest = self.keep_body(body)
            answer = self.server.answers.find(
                f"{tempfile.tempdir}/{repo}.git", body, kind, f"{self.headers['Git-Protocol']}",
                f"{self.headers['Content-Encoding']}", digest)
        self.send_response(200)
        self.send_header("Content-Type", f"application/x-git-upload-pack-{kind}")
        self.send_header("Cache-Control", "no-cache")
        is_chunked = self.request_version != "HTTP/1.0"
        if is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
            # A body that was read to its end is not the last of a connection: see parse_request.
            # After chunks there may be more than that, and a peer may want it to be.
            if digest:
                self.close_connection = (
                    "Transfer-Encoding" in self.headers or "Connection" in self.headers)
        self.end_headers()
        if self.command != "HEAD":
            self.send_answer(answer, is_chunked)

    def keep_body(self, file):
        """Writes the body of a request of git's into a file, for git to read; its digest."""
        self.enter(WAITING, ANSWER_TIMEOUT_S)
        digest = hashlib.sha256()
        for part in self.receive(self.body_sizes()):
            digest.update(part)
            file.write(part)
            if file.tell() > MAX_BODY_BYTES:
                raise Refusal(413, "too large a body")
        file.seek(0)
        return digest.hexdigest()

    def send_answer(self, answer, is_chunked):
        """Sends an Answer as it grows; ConnectionError where it has failed, as it must not seem
        whole."""
        sent = 0
        while True:
            has_ended = answer.end.done()
            part = b"?"
            while part:
                part = os.pread(answer.file.fileno(), 65536, sent)
                sent += len(part)
                self.enter(ANSWERING, SEND_TIMEOUT_S)
                if is_chunked and part:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                else:
                    self.wfile.write(part)
            if has_ended:
                break
            self.wfile.flush()
            self.check_peer()
            wait_for([answer.end], MORE_EVERY_S)
        if answer.status != 0:
            raise ConnectionAbortedError("git upload-pack has failed")
        if is_chunked:
            self.wfile.write(b"0\r\n\r\n")

    def answer_status(self, repo=None, update=None, wait="0", history="0", **_):
        """One repository's record, once it has ended or `wait` seconds are over; or all."""
        updater = self.server.updater
        if repo is None:
            looked = updater.look_at_all()
            answer = tell_all(looked)
        else:
            if repo in updater.journal.unread:
                raise not_now("its record can't be read")
            if update:
                update = int(update)
            updater.wait_for_end(repo, update, min(float(wait), MAX_WAIT_S), self.check_peer)
            record = updater.status(repo, update)
            if not record:
                raise Refusal(404, "no such update was asked for here")
            looked = [record]
            answer = told(record)
        if repo and history == "1":
            answer = {"repo": repo, "updates": [
                told(one) for one in reversed(updater.journal.recall(repo).all())]}
        # What is liked best comes first, as all clients have it.
        elif "text/html" in self.headers.get(
                "Accept", "").lower().partition("application/json")[0]:
            answer = format_page(looked, self.headers["Host"], repo)
        self.send(200, answer, *PAGE_HEADERS, kind="text/html; charset=utf-8")

    def answer_metrics(self, **_):
        updater = self.server.updater
        self.send(200, format_metrics([
            measure(now, updater.journal.recall(now.repo))
            for now in updater.look_at_all() if now.commit
        ]), kind="text/plain; version=0.0.4; charset=utf-8")

    def answer_front(self):
        """The served file, or where there is none a word about what this is."""
        served = self.server.served_file
        if not served:
            if parse_query(self.query):
                raise Refusal(400, "no 'repo'")
            self.send(200, "a server-update slave: /?repo=NAME starts an update")
            return
        with served.open() as file:
            # Should the file change meanwhile, what comes is no answer to the next request.
            self.close_connection = True
            # http.server answers for this very file, whatever its name leads to by now.
            self.path = f"/proc/self/fd/{file.fileno()}"
            getattr(super(), f"do_{self.command}")()

    def copyfile(self, source, outputfile):
        """Sends a file at any speed its peer has, as long as it takes something now and then."""
        # Not for ever, should it grow meanwhile.
        size = os.path.getsize(self.path)
        for start in range(0, size, 65536):
            self.enter(WAITING, SEND_TIMEOUT_S)
            outputfile.write(source.read(min(65536, size - start)))

    def guess_type(self, path):
        return super().guess_type(self.server.served_file.path)


# -- server: all connections -----------------------------------------------------

class Server(ThreadingHTTPServer):
    """Accepts connections, and drops those that are late or too many."""

    shutdown_request = TCPServer.close_request  # see Connection.finish
    allow_reuse_port = False  # a second slave on the same port is a mistake
    request_queue_size = 1024
    tls = None  # where connections are to be wrapped
    tended = 0  # when late connections were last looked for

    def __init__(self, updater, guard, served_file):
        """Listens; OSError or ValueError where it can't, or where the certificate is no good."""
        self.updater = updater
        self.guard = guard
        self.served_file = served_file
        self.handlers = set()
        self.answers = Answers()
        self.idle = []  # queues in which threads wait for another connection
        self.read_certificate()
        port = updater.settings["PORT"]
        # With :: comes all of IPv4.
        everywhere = "::" if lexists("/proc/net/if_inet6") else "0.0.0.0"
        address = str(updater.settings["BIND"] or everywhere)
        if ":" in address:
            self.address_family = socket.AF_INET6
        try:
            # The folder that Handler's paths begin in: see answer_front.
            super().__init__((address, port), partial(Handler, directory="/"))
        except OSError as error:
            raise OSError(f"can't listen on port {port} of {address}: {error.strerror} "
                          "(see PORT and BIND)")

    def server_bind(self):
        """Binds for IPv4, too, whatever the host's bindv6only; HTTPServer's looks up a name."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)

    def read_certificate(self, *_):
        """Makes ready for TLS, where a certificate is set; the old one stays if it is no good."""
        cert = self.updater.settings["TLS_CERT"]
        key = self.updater.settings["TLS_KEY"]
        if not cert:
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(cert, key, password=lambda: "")  # it must never ask
        except (OSError, ValueError) as error:
            text = f"bad TLS_CERT '{cert}' or TLS_KEY '{key or cert}': {error}"
            if not self.tls:
                raise ValueError(text)
            log(f"the certificate stays what it was: {text}")
            return
        self.tls = context
        log(f"the TLS certificate is read from {cert}")

    def service_actions(self):
        """Called by serve_forever after each connection, and twice a second at least."""
        now = monotonic()
        if now < self.tended + TEND_S:
            return
        self.tended = now
        for handler in list(self.handlers):
            if handler.stage.deadline < now:
                handler.drop()
        log.tell_left_out()
        self.answers.forget_before(now - KEEP_ANSWER_S)
        # Nobody else takes one out, as connections are accepted in this thread, too.
        while self.idle:
            self.idle.pop().put(None)
        self.updater.tend()
        if Run.is_stopping and not self.updater.running:
            raise Stopped  # by shutdown() this thread would wait for itself

    def get_request(self):
        """Accepts a connection: its socket, and its peer's address as text alone.

        Where the host is short of something it is one less, and later."""
        try:
            request, address = super().get_request()
            # A socket for both families says ::ffff:192.0.2.1 for an address of IPv4.
            return request, MAPPED_RE.sub("", address[0])
        except (OSError, MemoryError) as error:
            self.make_room(error)
            raise OSError

    def process_request(self, *accepted):
        """Has a thread serve a new connection; RuntimeError, MemoryError where there is none."""
        # There is always room for a new one, or silent ones could shut everybody out. The limit
        # of files may be changed from outside at any time.
        most = MAX_GIT_CONNECTIONS if self.guard.settings["GIT_FROM"] else MAX_CONNECTIONS
        if len(self.handlers) >= min(most, os.sysconf("SC_OPEN_MAX") - RESERVED_FILES):
            self.drop_one()
            sleep(CLOSING_S)
        try:
            self.hand_over(accepted)
        except (RuntimeError, MemoryError) as error:
            # Another's thread comes free.
            self.make_room(error)
            self.hand_over(accepted)

    def hand_over(self, accepted):
        """Has an idle thread serve a connection, or a new one: it costs a fifth of an answer."""
        try:
            self.idle.pop().put(accepted)
        except IndexError:
            start_thread(self.serve_connections, accepted)

    def make_room(self, error):
        """The host is short of files, memory or threads: one connection less, and a pause."""
        log.tell_refusal(f"no room for a connection: {error!r}")
        self.drop_one()
        sleep(SHORTAGE_PAUSE_S)

    def drop_one(self):
        """Ends the connection that can best be spared: who has waited longest for its peer."""
        handlers = list(self.handlers)
        if handlers:
            min(handlers, key=lambda handler: handler.stage).drop()

    def serve_connections(self, accepted):
        """A thread: serves one connection after the other, until there is none for a while."""
        with suppress(Exception):  # no memory, not even to say so
            more = SimpleQueue()
            while accepted:
                self.process_request_thread(*accepted)
                self.idle.append(more)
                accepted = more.get()

    def handle_error(self, request, client_address):
        """What a connection ended with: mostly its peer's doing, which is nobody's concern."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) or isinstance(error, ssl.SSLError):
            log.tell_refusal(f"connection of {client_address}: {error!r}")


# -- main --------------------------------------------------------------------------

def tell_ready(address):
    """Tells the service manager at $NOTIFY_SOCKET, if there is one: sd_notify(3)."""
    # Nobody listens at "".
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(1)
        manager.sendto(b"READY=1", re.sub("^@", "\0", address))


def stop(*_):
    """A signal's handler: it may come in the midst of another, so that it may take no lock."""
    log("stopping")
    Run.is_stopping = True


def serve(guard, options):
    """Serves until SIGTERM or SIGINT; OSError or ValueError where it can't start."""
    manager = environ.pop("NOTIFY_SOCKET", "")  # not what this one starts is to be asked
    settings = guard.settings
    served_file = options["FILE"] and ServedFile(options["FILE"], settings["REPOS_DIR"])
    # glibc keeps 40 MB of stacks that were used: better a few large ones.
    stack_size(2 << 20)
    # glibc loads now what threads end with: later, without memory, it aborts (bpo-44434).
    start_thread(time)
    # What was queued starts once it listens.
    updater = Updater(settings, guard)
    server = Server(updater, guard, served_file)
    log(f"slave.py {VERSION}, settings and keys in {settings['CONFIG']}")
    if not guard.secrets:
        log(f"no secret: who can reach the port can have repositories of {settings['BASE_URL']} "
            f"updated here; to change that, put one into {guard.path}")
    signal(SIGTERM, stop)
    signal(SIGINT, stop)
    signal(SIGHUP, server.read_certificate)
    log(f"clones go live in {settings['REPOS_DIR']}, by {updater.command}")
    log(f"listening on port {server.server_address[1]} "
        f"({settings['BIND'] or 'all addresses'}{', TLS' if server.tls else ''})")
    tell_ready(manager)
    serve_until_stopped(server)


def print_hook_key(guard, options):
    """Prints the key to be entered at a forge; ValueError where there is none."""
    repo = options["hook_key"]
    ref = options["FILE"]
    if not is_repo_name(repo) or ref and not is_ref(ref):
        raise ValueError(f"bad name {repo!r} or ref {ref!r}")
    if not guard.secrets:
        raise ValueError(f"no secret; do: (umask 077; openssl rand -hex 32 >{guard.path})")
    print(make_hook_key(guard.secrets[0], repo, ref).decode())


def serve_until_stopped(server):
    """Serves until service_actions says that no update runs any more, whatever happens."""
    while True:
        try:
            server.serve_forever()
        except Stopped:
            sleep(LAST_ANSWERS_S)
            return
        except Exception as error:  # no memory, say: for one connection, not for all
            log.tell_refusal(f"the loop begins again after {error!r}")
            sleep(SHORTAGE_PAUSE_S)


def be_process_1(child):
    """As process 1 of a container: passes signals on to the child, and reaps what it inherits.

    Returns the child's exit status. Nothing else may wait for just any process."""
    # A signal that comes before this ends process 1, and all of the container with it.
    for number in (SIGTERM, SIGINT, SIGHUP):
        signal(number, lambda number, _: os.kill(child, number))
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def make_parser():
    """The command line: an option for each setting, and FILE."""
    parser = argparse.ArgumentParser(
        "slave.py", "slave.py [options] [FILE]", __doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("FILE", nargs="?", help="serve this file at /")
    for key, setting in SETTINGS.items():
        name = option_name(key)
        parser.add_argument(name, dest=name, metavar=key, help=setting.help)
    parser.add_argument("--hook-key", metavar="NAME [REF]", help="print a forge's key, no more")
    parser.add_argument("--version", action="version", version=f"slave.py {VERSION}")
    return parser


def main(argv=None):
    """Serves or prints a key, or says why it can't; returns the exit status."""
    # Standard files that are closed, lest a connection become what the log is written to.
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass  # the first that is free; one more stays open
    options = vars(make_parser().parse_args(argv))
    if os.getpid() == 1:
        child = os.fork()
        if child:
            return be_process_1(child)
    try:
        guard = Guard(read_settings(environ, options, config_folder(__file__)))
        if options["hook_key"]:
            print_hook_key(guard, options)
        else:
            serve(guard, options)
    except (OSError, ValueError) as error:
        name = getattr(error, "filename", None)
        text = f"can't use '{name}': {error.strerror}" if name else str(error)
        print(f"slave.py: {USER_RE.sub('', text)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) or options["hook_key"] else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
