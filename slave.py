#!/usr/bin/env python3
"""slave.py [FILE]: takes server-update's signals and has slave-activate put fresh clones live.

    slave.py                          listen on port 9999
    slave.py ~/repos/site/index.html  the same, and serve that file at /

    GET /?repo=NAME[&ref=REF]                    start an update: 202 and its id, as JSON
    GET /status[?repo=NAME[&update=ID&wait=S]]   what is live, and how updates ended
    GET /healthz                                 200 once it serves

Settings are KEY=value lines in /etc/server-update/slave.conf, SERVER_UPDATE_KEY variables or
options, the last one winning. Exit status: 0 stopped by SIGTERM or SIGINT, 1 could not start,
2 usage or settings. SIGHUP reads the TLS certificate again.
"""

import argparse
import email.utils
import errno
import fcntl
import fnmatch
import functools
import hmac
import http
import http.server
import ipaddress
import json
import math
import mimetypes
import os
import queue
import re
import resource
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple, Optional, Tuple
from urllib.parse import unquote_to_bytes

VERSION = "1.0"
CONF_FILE = "/etc/server-update/slave.conf"
SECRET_FILE = "/etc/server-update/secret"
MAX_RUNNING = 4  # updates side by side
MAX_QUEUED = 100  # repositories with an update that waits
MAX_ENDED = 10  # ended updates that are kept, a repository
MAX_TRIES = 3  # starts of one update that the slave's own end may interrupt
KILL_AFTER_S = 10  # from TERM to KILL
LEFTOVER_S = 1  # the same for what an ended run left in its group
POLL_S = 0.02  # how often a run is asked whether it has ended
MAX_OUTPUT_LINE_BYTES = 4096
MAX_MESSAGE_CHARS = 300
MAX_RECORD_FILE_BYTES = 1 << 20
HEADER_TIMEOUT_S = 10  # for a whole request header, or a TLS handshake and the header
SEND_TIMEOUT_S = 30  # for CHUNK_BYTES of an answer
CHUNK_BYTES = 65536
MAX_LINE_BYTES = 8192
MAX_HEADER_BYTES = 16384
MAX_HEADERS = 100
MAX_CONNECTIONS = 256
MAX_POLLS = 128  # long polls at once; further ones are answered at once
MAX_WAIT_S = 30
MAX_CLOCK_DIFFERENCE_S = 300
MAX_NONCES = 65536
MAX_REFUSALS_LOGGED = 10  # a second
RETRY_AFTER = (("Retry-After", "2"),)

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

STATES = ("queued", "running", "live", "failed")
HASH_RE = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
END_OF_HEAD_RE = re.compile(rb"\r?\n\r?\n")
REQUEST_LINE_RE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~]+) HTTP/1\.([0-9])")
HEADER_RE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*")
ESCAPES_RE = re.compile(r"(?:[^%]|%[0-9A-Fa-f]{2})*")
SIGNATURE_RE = re.compile(r"t=([0-9]{1,12}),n=([0-9a-f]{32}),s=([0-9a-f]{64})")
OUTPUT_KINDS = ("slave-activate: ", "fatal: ", "error: ")


class Mistake(Exception):
    """What keeps the slave from starting, for a person to mend; `status` is the exit status."""

    def __init__(self, text, status=2):
        super().__init__(text)
        self.status = status


class Refusal(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status, text, headers=()):
        super().__init__(text)
        self.status, self.headers = status, headers


# --- settings -----------------------------------------------------------------------------------

def parse_number(low, high, text):
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ValueError(text)
    return int(text)


def parse_base_url(text):
    if not text.isprintable() or " " in text or not re.match(r"[A-Za-z0-9/\[][^/]*[:/@]|/", text):
        raise ValueError(text)
    return text.rstrip("/") or "/"


def parse_path(text):
    path = os.path.expanduser(text) if text.startswith("~/") else text
    if not path.startswith("/") or not path.isprintable():
        raise ValueError(text)
    return path


def parse_yes_no(text):
    if text not in ("yes", "no"):
        raise ValueError(text)
    return text


def parse_networks(text):
    """Addresses and networks, separated by commas or blanks; IPv4 also in its IPv6 clothes."""
    networks = [ipaddress.ip_network(part) for part in text.replace(",", " ").split()]
    return [ipaddress.ip_network((plain_address(str(net.network_address)), net.prefixlen - 96))
            if net.version == 6 and net.network_address.ipv4_mapped and net.prefixlen >= 96
            else net for net in networks]


def parse_globs(text):
    globs = text.replace(",", " ").split()
    if not all(re.fullmatch(r"[A-Za-z0-9._*?\[\]!-]+", glob) for glob in globs):
        raise ValueError(text)
    return globs


def plain_address(text):
    """A peer's address as ipaddress has it: without a zone, and IPv4 where IPv6 only wraps it."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


class Setting(NamedTuple):
    """How a setting is read: its default, as text, and a function that raises ValueError."""
    default: str
    parse: Any
    help: str


SETTINGS = {
    "BASE_URL": Setting("https://github.com/aiegoo", parse_base_url,
                        "clone BASE_URL/NAME.git: a URL, or a path"),
    "REPOS_DIR": Setting("~/repos", parse_path, "where the clones go live"),
    "HOOKS_DIR": Setting("/etc/server-update/hooks", parse_path, "pre-update and post-update"),
    "PORT": Setting("9999", functools.partial(parse_number, 0, 65535), "0 takes a free one"),
    "BIND": Setting("", lambda text: str(ipaddress.ip_address(text)),
                    "listen on this address only (default: all)"),
    "TIMEOUT": Setting("600", functools.partial(parse_number, 1, 10 ** 6),
                       "seconds an update may take"),
    "SUBMODULES": Setting("yes", parse_yes_no, "yes or no: check out submodules too"),
    "SECRET_FILE": Setting("", parse_path, "shared secret (default: %s where it exists)"
                           % SECRET_FILE),
    "ALLOW_FROM": Setting("", parse_networks, "take requests from these addresses and networks"),
    "ALLOW_REPOS": Setting("", parse_globs, "update only repositories that match these globs"),
    "TLS_CERT": Setting("", parse_path, "serve https with this certificate chain (PEM)"),
    "TLS_KEY": Setting("", parse_path, "its key, where it is not in TLS_CERT"),
}


def parse_setting(key, text, where):
    """The value of a setting, None where it is empty; `where` is put around the complaint."""
    try:
        return SETTINGS[key].parse(text) if text else None
    except ValueError:
        raise Mistake(where % ("bad %s '%s'" % (key, escape(text))))


def parse_settings_file(lines, path):
    """{KEY: value} from KEY=value lines, which are read as text and never run."""
    values = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = "%s:%d: %%s" % (path.replace("%", "%%"), number)
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            raise Mistake(where % ("no '=' in '%s'" % escape(line)))
        if key not in SETTINGS:
            raise Mistake(where % ("unknown setting '%s'" % escape(key)))
        if len(value) >= 2 and value[0] in "'\"" and value[-1] == value[0]:
            value = value[1:-1]
        values[key] = parse_setting(key, value, where)
    return values


def read_settings(environ, options):
    """All settings: options win over SERVER_UPDATE_* variables, these over the file."""
    path = environ.get("SERVER_UPDATE_CONF")
    try:
        with open(path or CONF_FILE, encoding="utf-8", errors="surrogateescape") as handle:
            values = parse_settings_file(handle, path or CONF_FILE)
    except FileNotFoundError:
        if path:
            raise Mistake("%s: no such file (set by SERVER_UPDATE_CONF)" % path)
        values = {}
    except OSError as error:
        raise Mistake("%s: %s" % (path or CONF_FILE, error.strerror))
    for key, setting in SETTINGS.items():
        variable, option = "SERVER_UPDATE_" + key, "--" + key.lower().replace("_", "-")
        for text, source in ((environ.get(variable), variable), (options.get(key), option)):
            if text:
                values[key] = parse_setting(key, text.strip(), "%%s (set by %s)" % source)
        if values.get(key) is None:
            values[key] = setting.parse(setting.default) if setting.default else None
    if values["TLS_KEY"] and not values["TLS_CERT"]:
        raise Mistake("TLS_KEY is set, but TLS_CERT is not")
    return values


# --- the log ------------------------------------------------------------------------------------

def escape(text):
    """`text` with everything that could move a cursor or begin a line written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
                   for char in text)


def log(text):
    """Writes one line to stderr; in one write, so that threads and a dying process mix nothing."""
    line = "%s %s\n" % (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), escape(text))
    try:
        os.write(2, line.encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # nobody reads the log: no reason to stop updating


class RefusalLog:
    """Logs refused requests, MAX_REFUSALS_LOGGED a second; of the others it tells the number."""

    def __init__(self):
        self.lock, self.second, self.count = threading.Lock(), 0, 0

    def add(self, text):
        self.flush()
        with self.lock:
            self.count += 1
            if self.count > MAX_REFUSALS_LOGGED:
                return
        log(text)

    def flush(self):
        """Called now and then: once the second is over, what was left out is told."""
        with self.lock:
            if int(time.time()) == self.second:
                return
            left_out = self.count - MAX_REFUSALS_LOGGED
            self.second, self.count = int(time.time()), 0
        if left_out > 0:
            log("%d more requests refused" % left_out)


# --- the records of a repository: pure functions on a tuple, oldest first -----------------------

class Record(NamedTuple):
    """One update; the first ten fields are what /status tells, times are seconds since 1970."""
    repo: str
    update: int
    ref: Optional[str] = None
    state: str = "queued"
    requested: float = 0.0
    started: Optional[float] = None
    finished: Optional[float] = None
    commit: Optional[str] = None
    previous: Optional[str] = None
    message: str = ""
    tries: int = 0  # starts that did not end because the slave did
    signed: int = 0  # the time in its signature, 0 where there was none


PUBLIC_FIELDS = Record._fields[:10]


def public(record):
    """What /status tells of a record."""
    return dict(zip(PUBLIC_FIELDS, record))


def has_ended(record):
    return record.state in ("live", "failed")


def next_update(records, now):
    """The id of the next update: milliseconds since 1970, or one more than the last id."""
    return max(int(now * 1000), records[-1].update + 1 if records else 0)


def accept(repo, ref, signed, now, records):
    """A signal: one more queued update, in place of one that is queued already."""
    record = Record(repo, next_update(records, now), ref, requested=now, signed=signed,
                    commit=records[-1].commit if records else None)
    return tuple(old for old in records if old.state != "queued") + (record,), record


def start(now, live, records):
    """The queued update begins while commit `live` is live; no record where none is queued."""
    for record in records:
        if record.state == "queued":
            begun = record._replace(state="running", started=now, commit=live, previous=live,
                                    tries=record.tries + 1)
            return replace(records, record, begun), begun
    return records, None


def finish(now, changes, records):
    """The running update has ended; `changes` are its state, message, commit and previous."""
    for record in records:
        if record.state == "running":
            done = record._replace(finished=now, tries=0, **changes)
            records = replace(records, record, done)
            ended = [old for old in records if has_ended(old)]
            forgotten = ended[:-MAX_ENDED]
            return tuple(old for old in records if old not in forgotten), done
    return records, None


def interrupt(now, is_clean, records):
    """The slave ends, or has ended, under the running update: it is queued again.

    A newer queued one takes its place. A clean stop does not count as a try.
    """
    for record in records:
        if record.state != "running":
            continue
        if any(other.state == "queued" for other in records):
            return tuple(other for other in records if other is not record), None
        if record.tries >= MAX_TRIES and not is_clean:
            return finish(now, {"state": "failed", "message": "interrupted three times, each time "
                                "the slave itself ended; signal again to try again"}, records)
        again = record._replace(state="queued", started=None, tries=record.tries - is_clean)
        return replace(records, record, again), again
    return records, None


def replace(records, old, new):
    return tuple(new if record is old else record for record in records)


def find(records, update=None):
    """The newest record, or that of an update or of the newer one that took its place, or None."""
    if update is None:
        return records[-1] if records else None
    return next((record for record in records if record.update >= update), None)


def encode_records(records):
    """The file: the newest record's fields, and below "earlier" the others."""
    newest = dict(records[-1]._asdict(), earlier=[old._asdict() for old in records[:-1]])
    return json.dumps(newest, indent=1).encode("ascii") + b"\n"


def decode_records(repo, data):
    """The records in a file; ValueError where it is not what encode_records wrote."""
    def reject(text):
        raise ValueError("the number %s" % text)

    top = json.loads(data.decode("utf-8"), parse_constant=reject)
    if not isinstance(top, dict) or not isinstance(top.get("earlier", []), list):
        raise ValueError("not a record")
    records = tuple(decode_record(repo, fields) for fields in top.get("earlier", []) + [top])
    states = [record.state for record in records]
    if any(one.update >= two.update for one, two in zip(records, records[1:])):
        raise ValueError("ids that do not grow")
    if states.count("running") > 1 or "queued" in states[:-1]:
        raise ValueError("more than one running or queued update")
    return records


def decode_record(repo, fields):
    """A Record from a JSON object; ValueError where a field is missing or of the wrong kind."""
    def is_time(value):
        return type(value) in (int, float) and math.isfinite(value) and value >= 0

    def is_hash(value):
        return isinstance(value, str) and HASH_RE.fullmatch(value)

    checks = {
        "repo": lambda value: value == repo,
        "update": lambda value: type(value) is int and 0 < value < 1 << 62,
        "ref": lambda value: value is None or isinstance(value, str) and is_ref(value),
        "state": lambda value: value in STATES,
        "requested": is_time,
        "started": lambda value: value is None or is_time(value),
        "finished": lambda value: value is None or is_time(value),
        "commit": lambda value: value is None or is_hash(value),
        "previous": lambda value: value is None or is_hash(value),
        "message": lambda value: isinstance(value, str),
        "tries": lambda value: type(value) is int and value >= 0,
        "signed": lambda value: type(value) is int and value >= 0,
    }
    if not isinstance(fields, dict):
        raise ValueError("not a record")
    known = {key: fields[key] for key in checks if key in fields}
    for key in PUBLIC_FIELDS + tuple(known):
        if key not in known or not checks[key](known[key]):
            raise ValueError("no good value for '%s'" % key)
    return Record(**known)


# --- the records on disk ------------------------------------------------------------------------

class Change:
    """A change to a repository's records that waits to be written, or has been."""

    def __init__(self, repo, function, must_keep):
        self.repo, self.function, self.must_keep = repo, function, must_keep
        self.result, self.error, self.done = None, None, threading.Event()


class Journal:
    """The records of all repositories. One thread writes: what came meanwhile, in one go.

    `records` is {repo: tuple of Records}; only the writer puts anything there, so that everybody
    may read it without a lock.
    """

    def __init__(self, folder):
        """Takes the folder for this process alone; OSError where that can't be."""
        self.folder, self.records, self.changes = folder, {}, queue.SimpleQueue()
        self.ended = threading.Condition()  # told after each change that must be kept
        self.folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self.folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with open(os.path.join(folder, "start.tmp"), "wb"):
            os.unlink(os.path.join(folder, "start.tmp"))

    def load(self):
        """Reads all records; a broken one is told, kept aside and does not stop anything."""
        for file_name in sorted(os.listdir(self.folder)):
            path, repo = os.path.join(self.folder, file_name), file_name[:-len(".json")]
            if file_name.endswith(".json.tmp"):
                os.unlink(path)
            if not file_name.endswith(".json") or not is_repo_name(repo):
                continue
            try:
                with open(path, "rb") as handle:
                    data = handle.read(MAX_RECORD_FILE_BYTES)
                self.records[repo] = decode_records(repo, data)
            except (OSError, ValueError, RecursionError) as error:
                log("broken record kept aside as %s.broken: %s" % (path, error))
                os.rename(path, path + ".broken")

    def commit(self, repo, function, must_keep=False):
        """Applies `function` (records -> records, result); returns the result once it is on disk.

        Where the disk does not take it, OSError, and nothing has changed; but with `must_keep`,
        for what has happened in any case, the change holds and is written with the next one.
        """
        change = Change(repo, function, must_keep)
        self.changes.put(change)
        change.done.wait()
        if change.error:
            raise change.error
        return change.result

    def write_forever(self):
        while True:
            changes = [self.changes.get()]
            while not self.changes.empty():
                changes.append(self.changes.get())
            self.write(changes)

    def write(self, changes):
        """Writes a batch of changes, each repository's file once, and tells who waits for them."""
        after = apply(self.records, changes)
        try:
            for repo in after:
                self.save(repo, after[repo])
            os.fsync(self.folder_fd)
        except OSError as error:
            log("can't write the records: %s" % error)
            for change in changes:
                change.error = None if change.must_keep else error
            after = apply(self.records, [change for change in changes if change.must_keep])
        self.records.update(after)
        for change in changes:
            change.done.set()
        if any(change.must_keep for change in changes):
            with self.ended:
                self.ended.notify_all()

    def save(self, repo, records):
        """Puts one file in its place, whole or not at all."""
        path = os.path.join(self.folder, repo + ".json")
        try:
            with open(path + ".tmp", "wb") as handle:
                handle.write(encode_records(records))
                handle.flush()
                os.fsync(handle.fileno())
            os.rename(path + ".tmp", path)
        except OSError:
            if os.path.exists(path + ".tmp"):
                os.unlink(path + ".tmp")
            raise


def apply(before, changes):
    """{repo: its records after the changes} for the repositories that are changed."""
    after = {}
    for change in changes:
        records = after.get(change.repo, before.get(change.repo, ()))
        after[change.repo], change.result = change.function(records)
    return after


# --- slave-activate -----------------------------------------------------------------------------

def read_live_commit(tree):
    """The commit that is checked out in a clone, or None: read from its files, at no great cost."""
    git = os.path.join(tree, ".git")
    try:
        if os.path.isdir(os.path.join(git, "reftable")):
            return ask_git_for_commit(git)
        head = read_line(os.path.join(git, "HEAD"))
        if not head.startswith("ref: "):
            return head if HASH_RE.fullmatch(head) else None
        name = head[len("ref: "):]
        try:
            commit = read_line(os.path.join(git, name))
        except OSError:
            commit = find_packed_ref(os.path.join(git, "packed-refs"), name)
        return commit if HASH_RE.fullmatch(commit) else None
    except (OSError, ValueError):
        return None


def read_line(path):
    with open(path, encoding="utf-8", errors="replace") as handle:
        return handle.readline(MAX_LINE_BYTES).rstrip("\n")


def find_packed_ref(path, name):
    with open(path, encoding="utf-8", errors="replace") as handle:
        for line in handle:
            if line.endswith(" %s\n" % name):
                return line.split(" ")[0]
    return ""


def ask_git_for_commit(git):
    """For clones whose refs only git can read (reftable, git 2.45)."""
    run = subprocess.run(["git", "--git-dir=" + git, "rev-parse", "-q", "--verify", "HEAD"],
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, timeout=10)
    commit = run.stdout.decode("ascii", "replace").strip()
    return commit if HASH_RE.fullmatch(commit) else None


class Activation:
    """One run of slave-activate in a process group of its own; what it says goes to the log."""

    def __init__(self, command, environ, repo, ref):
        self.repo = repo
        self.stdout, self.partial, self.said = b"", b"", {}
        self.stopped = None  # why it was made to end: "timeout" or "stop"
        self.status = None  # exit status, or minus the signal that ended it
        self.process = subprocess.Popen(
            [command, repo] + ([ref] if ref else []), env=environ, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self.selector = selectors.DefaultSelector()
        for pipe, take in ((self.process.stdout, self.take_stdout),
                           (self.process.stderr, self.take_stderr)):
            self.selector.register(pipe.fileno(), selectors.EVENT_READ, take)

    def wait(self, timeout_s, stop):
        """Blocks until it has ended, by itself or after `timeout_s` or event `stop` by force.

        Its end counts, not that of its pipes: a grandchild may hold those open for ever.
        """
        force_at = time.monotonic() + timeout_s
        while not self.has_ended():
            self.read_output(POLL_S if self.selector.get_map() else POLL_S / 4)
            is_late = time.monotonic() >= force_at
            if is_late or (stop.is_set() and not self.stopped):
                self.signal_group(signal.SIGKILL if self.stopped else signal.SIGTERM)
                self.stopped = self.stopped or ("timeout" if is_late else "stop")
                force_at = time.monotonic() + KILL_AFTER_S
        for _ in range(16):
            if not self.read_output(0):
                break
        self.take_stderr(b"\n")

    def has_ended(self):
        """Whether the process has ended; it stays a zombie, and so its group's number is ours."""
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended:
            is_exit = ended.si_code == os.CLD_EXITED
            self.status = ended.si_status if is_exit else -ended.si_status
        return bool(ended)

    def read_output(self, timeout_s):
        """Takes what there is to read, waiting for it up to `timeout_s`; how many bytes it was."""
        total = 0
        for key, _ in self.selector.select(timeout_s):
            data = os.read(key.fd, CHUNK_BYTES)
            if not data:
                self.selector.unregister(key.fd)
            key.data(data)
            total += len(data)
        return total

    def take_stdout(self, data):
        self.stdout = (self.stdout + data)[:MAX_OUTPUT_LINE_BYTES]

    def take_stderr(self, data):
        """Logs whole lines; of each kind it remembers the last one."""
        lines = (self.partial + data).split(b"\n")
        self.partial = lines.pop()
        if len(self.partial) > MAX_OUTPUT_LINE_BYTES:
            lines.append(self.partial)
            self.partial = b""
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()[:MAX_OUTPUT_LINE_BYTES]
            if text:
                log("%s: %s" % (self.repo, text))
                kind = next((kind for kind in OUTPUT_KINDS if text.startswith(kind)), "")
                self.said[kind] = text[len(kind):]

    def signal_group(self, number):
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def clear_up(self):
        """Ends what the run left behind in its group, and reaps it; blocks 2 x LEFTOVER_S at most."""
        self.signal_group(signal.SIGTERM)
        self.process.wait()
        for number in (signal.SIGKILL, 0):
            give_up_at = time.monotonic() + LEFTOVER_S
            while self.signal_group(0):
                if time.monotonic() > give_up_at:
                    self.signal_group(number)
                    break
                time.sleep(POLL_S)
        self.selector.close()
        self.process.stdout.close()
        self.process.stderr.close()


def judge(repo, status, stdout, said, stopped_after_s=None):
    """How a run of slave-activate ended, as changes to its record.

    `said` has the last line of each kind in its stderr; `stopped_after_s` is set where TIMEOUT was.
    """
    match = re.fullmatch("%s ([0-9a-f]{40,64}|-) ([0-9a-f]{40,64}|-)\n" % re.escape(repo),
                         stdout.decode("ascii", "replace"))
    line = next((said[kind] for kind in OUTPUT_KINDS + ("",) if kind in said), "")
    if stopped_after_s:
        line = "not done after %d s and stopped (TIMEOUT)%s" % (
            stopped_after_s, "; it last said: " + line if line else "")
    elif status == 0:
        line = "" if match else "slave-activate did not say what is live now"
    elif not line:
        line = ("slave-activate ended with exit status %d" % status if status >= 0
                else "slave-activate was ended by signal %d" % -status)
    message = escape(line)[:MAX_MESSAGE_CHARS]
    if match and (status in (0, 3) or stopped_after_s):
        commit, previous = (None if text == "-" else text for text in match.groups())
        return {"state": "live", "message": message, "commit": commit, "previous": previous}
    return {"state": "failed", "message": message}


# --- who may ------------------------------------------------------------------------------------

class Secrets:
    """The shared secrets as their file has them now; once there are any, they never go away."""

    def __init__(self, path):
        """Mistake where the file is no good, or where a `path` was set and there is none."""
        self.path, self.lines, self.seen = path or SECRET_FILE, [], None
        try:
            self.read()
        except FileNotFoundError as error:
            if path:
                raise Mistake("secret file '%s': %s" % (path, error.strerror))
        except OSError as error:
            raise Mistake("secret file '%s': %s" % (self.path, error.strerror))
        except ValueError as error:
            raise Mistake(str(error))

    def read(self):
        """Reads the file where it has changed."""
        found = os.stat(self.path)
        seen = (found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size)
        if seen != self.seen:
            self.seen = seen
            self.lines = read_secrets(self.path)

    def current(self):
        try:
            self.read()
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log("%s; the secret from before still holds" % error)
        return self.lines


class Nonces:
    """The nonces that were taken, as long as they could be replayed; MAX_NONCES at most."""

    def __init__(self):
        self.lock, self.taken = threading.Lock(), {}  # {time // MAX_CLOCK_DIFFERENCE_S: set}

    def take(self, nonce, when, now):
        """False where it was taken before; Refusal where no more can be remembered."""
        with self.lock:
            oldest = int(now - MAX_CLOCK_DIFFERENCE_S) // MAX_CLOCK_DIFFERENCE_S
            for period in [period for period in self.taken if period < oldest]:
                del self.taken[period]
            if sum(map(len, self.taken.values())) >= MAX_NONCES:
                raise Refusal(503, "too many signed requests", RETRY_AFTER)
            taken = self.taken.setdefault(when // MAX_CLOCK_DIFFERENCE_S, set())
            is_new = nonce not in taken
            taken.add(nonce)
            return is_new


def check_signature(values, secrets, method, target, now):
    """The (time, nonce) of a signed request; `values` are those of the header that signs.

    Whatever is wrong, the answer is the same; only who knows the secret hears of the clock.
    """
    match = SIGNATURE_RE.fullmatch(values[0]) if len(values) == 1 else None
    when, nonce, mac = match.groups() if match else ("0", "", "")
    is_right = False
    for secret in secrets:
        is_right |= hmac.compare_digest(sign(secret, method, target, when, nonce), mac)
    if not is_right:
        raise_unsigned()
    if abs(now - int(when)) > MAX_CLOCK_DIFFERENCE_S:
        raise Refusal(401, "the clocks of master and slave differ by %d s, %d are allowed"
                      % (abs(now - int(when)), MAX_CLOCK_DIFFERENCE_S))
    return int(when), bytes.fromhex(nonce)


def raise_unsigned():
    raise Refusal(401, "signature missing or wrong")


def make_tls_context(cert, key):
    """A TLS context (1.2 or newer), or None where no certificate is set; Mistake if it is no good."""
    if not cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # never ask
    except (OSError, ValueError) as error:
        raise Mistake("TLS_CERT '%s'%s: %s" % (cert, " with TLS_KEY '%s'" % key if key else "",
                                               error.strerror or error))
    return context


# --- requests and answers -----------------------------------------------------------------------

class Request(NamedTuple):
    method: str
    target: str  # as sent
    path: str
    query: str
    headers: Tuple[Tuple[str, str], ...]  # names in lower case
    has_body: bool
    is_kept_alive: bool

    def values(self, name):
        return [value for header, value in self.headers if header == name]


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Tuple[Tuple[str, str], ...] = ()
    file: Any = None  # an open file in place of the body
    length: int = 0  # and how much of it


def split_head(data):
    """A request's header and what comes after it, or (None, data) while it is unfinished."""
    match = END_OF_HEAD_RE.search(data)
    head = data[:match.start()] if match else data
    line = head.partition(b"\n")[0]
    if len(line) > MAX_LINE_BYTES:
        raise Refusal(414, "request line too long")
    if len(head) - len(line) > MAX_HEADER_BYTES:
        raise Refusal(431, "request header too long")
    return (head, data[match.end():]) if match else (None, data)


def parse_head(head):
    """A Request from a header's bytes; Refusal for anything that is not plain HTTP/1."""
    lines = [line.rstrip("\r") for line in head.decode("iso-8859-1").split("\n")]
    match = REQUEST_LINE_RE.fullmatch(lines[0])
    if not match:
        raise Refusal(400, "not an HTTP/1 request line")
    if len(lines) > MAX_HEADERS:
        raise Refusal(431, "too many header lines")
    headers = []
    for line in lines[1:]:
        header = HEADER_RE.fullmatch(line)
        if not header:
            raise Refusal(400, "bad header line")
        headers.append((header.group(1).lower(), header.group(2)))
    method, target, minor = match.groups()
    path, _, query = re.sub(r"^https?://[^/?]*", "", target, flags=re.I).partition("?")
    names = [name for name, _ in headers]
    tokens = ",".join(value for name, value in headers if name == "connection").lower()
    has_body = "content-length" in names or "transfer-encoding" in names
    is_kept_alive = minor != "0" and "close" not in tokens and not has_body
    return Request(method, target, path or "/", query, tuple(headers), has_body, is_kept_alive)


def is_public(request):
    """Whether it is for the served file, which needs no signature."""
    names = [part.partition("=")[0] for part in request.query.split("&")]
    return request.path == "/" and not any(name == "repo" or "%" in name for name in names)


def parse_query(query):
    """{name: value} for the parameters that mean something here; a list's URL may have others."""
    values = {}
    for part in query.split("&"):
        name, _, text = part.partition("=")
        name = decode_percent(name)
        if name in values:
            raise Refusal(400, "'%s' is given twice" % name)
        if name in ("repo", "ref", "update", "wait"):
            values[name] = decode_percent(text)
    if not is_repo_name(values.get("repo", "x")):
        raise Refusal(400, "bad repository name")
    if not is_ref(values.get("ref", "x")):
        raise Refusal(400, "bad ref")
    for name, pattern, kind in (("update", "[0-9]{1,18}", int),
                                ("wait", r"[0-9]{1,9}(\.[0-9]{1,9})?", float)):
        if not re.fullmatch(pattern, values.get(name, "0")):
            raise Refusal(400, "'%s' is not a number" % name)
        if name in values:
            values[name] = kind(values[name])
    return values


def decode_percent(text):
    """Decodes %XX, strictly; "+" stays what it is, as it may be part of a ref."""
    try:
        if not ESCAPES_RE.fullmatch(text):
            raise ValueError(text)
        return unquote_to_bytes(text).decode("utf-8")
    except ValueError:
        raise Refusal(400, "bad percent-encoding")


def json_answer(status, value, headers=()):
    return Answer(status, json.dumps(value).encode("ascii") + b"\n", headers=headers)


def refusal_answer(refusal):
    headers = tuple(refusal.headers)
    if refusal.status == 401:
        headers += (("WWW-Authenticate", "server-update-1"),)
    return json_answer(refusal.status, {"error": str(refusal)}, headers)


def format_head(answer, is_kept_alive):
    """The bytes of an answer before its body."""
    fields = (
        ("Server", "server-update/" + VERSION),
        ("Date", email.utils.formatdate(usegmt=True)),
        ("Content-Type", answer.content_type),
        ("Content-Length", str(answer.length if answer.file else len(answer.body))),
        ("Cache-Control", "no-cache" if answer.file else "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Connection", "keep-alive" if is_kept_alive else "close"),
    ) + answer.headers
    if answer.status == 304:
        fields = tuple(field for field in fields if field[0] != "Content-Length")
    lines = ["HTTP/1.1 %d %s" % (answer.status, http.HTTPStatus(answer.status).phrase)]
    lines += ["%s: %s" % field for field in fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("iso-8859-1")


def open_served_file(path):
    """The file and its os.stat_result; Refusal where there is none to read."""
    for is_last in (False, True):
        try:
            # a FIFO must not hold us up
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except PermissionError:
            raise Refusal(403, "the served file may not be read by this slave's user")
        except OSError as error:
            # once more: its repository may have been exchanged during the look-up
            if is_last:
                raise Refusal(404, "the served file can't be opened: %s" % error.strerror)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise Refusal(404, "the served path is not a file")
    return os.fdopen(fd, "rb"), found


def serve_file(path, request):
    """The answer that has the file as it is now, or 304 where the client has it already."""
    handle, found = open_served_file(path)
    tag = '"%x-%x-%x"' % (found.st_ino, found.st_size, found.st_mtime_ns)
    headers = (("Last-Modified", email.utils.formatdate(int(found.st_mtime), usegmt=True)),
               ("ETag", tag))
    kind, encoding = mimetypes.MimeTypes().guess_type(path)
    kind = "application/octet-stream" if encoding or not kind else kind
    if kind.startswith("text/"):
        kind += "; charset=utf-8"
    if is_unchanged(request, tag, found.st_mtime):
        handle.close()
        return Answer(304, content_type=kind, headers=headers)
    return Answer(200, content_type=kind, headers=headers, file=handle, length=found.st_size)


def is_unchanged(request, tag, mtime):
    """Whether the client's conditions say that it has the file already (RFC 7232, section 6)."""
    tags = request.values("if-none-match")
    if tags:
        return tag in tags[0] or tags[0] == "*"
    for text in request.values("if-modified-since"):
        try:
            since = email.utils.parsedate_to_datetime(text).timestamp()
        except (TypeError, ValueError, IndexError, OverflowError):
            return False
        return int(mtime) <= since
    return False


# --- the slave ----------------------------------------------------------------------------------

class Slave:
    """Takes requests, and runs the updates that they ask for."""

    def __init__(self, settings, command, journal, secrets, served_file):
        self.settings, self.command, self.journal = settings, command, journal
        self.secrets, self.served_file = secrets, served_file
        self.nonces, self.polls = Nonces(), threading.BoundedSemaphore(MAX_POLLS)
        self.lock, self.queued, self.running = threading.Lock(), {}, {}
        self.stopping = threading.Event()
        self.environ = dict(os.environ)
        for key in ("BASE_URL", "REPOS_DIR", "HOOKS_DIR", "SUBMODULES"):
            self.environ["SERVER_UPDATE_" + key] = settings[key]
        self.signed_floor = 0

    def resume(self):
        """After a start: what was queued or running when the slave ended is queued again."""
        for repo, records in list(self.journal.records.items()):
            self.signed_floor = max([self.signed_floor] + [one.signed for one in records])
            if any(record.state == "running" for record in records):
                change = functools.partial(interrupt, time.time(), False)
                self.journal.commit(repo, change, must_keep=True)
            newest = self.journal.records[repo][-1]
            if newest.state == "queued":
                log("%s: update %d is taken up again" % (repo, newest.update))
                self.queued[repo] = newest.update
        self.start_queued()

    def start_queued(self):
        """Starts what waits longest, as far as there is room; what can't start now stays queued."""
        with self.lock:
            for repo in list(self.queued):
                if len(self.running) >= MAX_RUNNING or self.stopping.is_set():
                    return
                if repo in self.running:
                    continue
                thread = threading.Thread(target=self.run_update, args=(repo,), daemon=True)
                self.running[repo] = thread
                try:
                    thread.start()
                except RuntimeError as error:
                    del self.running[repo]
                    log("%s: waits, as it can't start: %s" % (repo, error))
                    return
                del self.queued[repo]

    def run_update(self, repo):
        """Runs the queued update of a repository to its end; in a thread of its own."""
        try:
            live = read_live_commit(self.tree(repo))
            record = self.journal.commit(repo, functools.partial(start, time.time(), live), True)
            if record:
                log("%s: update %d starts%s" % (repo, record.update,
                                                " at ref '%s'" % record.ref if record.ref else ""))
                self.activate(repo, record)
        finally:
            with self.lock:
                self.running.pop(repo)
            self.start_queued()

    def activate(self, repo, record):
        """Runs slave-activate and records how it ended, before clearing up after it."""
        try:
            run = Activation(self.command, self.environ, repo, record.ref)
        except OSError as error:
            self.end_update(repo, {"state": "failed",
                                   "message": "can't run slave-activate: %s" % error})
            return
        try:
            run.wait(self.settings["TIMEOUT"], self.stopping)
            if run.stopped == "stop" and run.status != 0:
                change = functools.partial(interrupt, time.time(), True)
                self.journal.commit(repo, change, must_keep=True)
                log("%s: update %d stopped, to be taken up again" % (repo, record.update))
            else:
                late = self.settings["TIMEOUT"] if run.stopped == "timeout" else None
                self.end_update(repo, judge(repo, run.status, run.stdout, run.said, late))
        finally:
            run.clear_up()

    def end_update(self, repo, changes):
        if changes["state"] == "failed":
            changes = dict(changes, commit=read_live_commit(self.tree(repo)))
        done = self.journal.commit(repo, functools.partial(finish, time.time(), changes), True)
        log("%s: update %d %s after %.1f s%s%s" % (
            repo, done.update, done.state, done.finished - done.started,
            ": " + done.commit if done.state == "live" and done.commit else "",
            ": " + done.message if done.message else ""))

    def stop(self):
        """No new updates; those that run are ended and queued again. Blocks until they have."""
        self.stopping.set()
        with self.journal.ended:
            self.journal.ended.notify_all()
        with self.lock:
            threads = list(self.running.values())
        for thread in threads:
            thread.join()

    def tree(self, repo):
        return os.path.join(self.settings["REPOS_DIR"], repo)

    def answer(self, request, peer):
        """The Answer to a request; Refusal where there is none. Blocks for a long poll only."""
        allowed = self.settings["ALLOW_FROM"]
        if allowed is not None and not any(plain_address(peer) in network for network in allowed):
            raise Refusal(403, "not from this address")
        if request.method not in ("GET", "HEAD"):
            raise Refusal(405, "GET and HEAD only", (("Allow", "GET, HEAD"),))
        if request.path == "/healthz":
            return Answer(200, b"ok\n", "text/plain")
        signed = 0 if is_public(request) else self.check_signed(request)
        values = parse_query(request.query)
        if "repo" in values and not self.is_allowed(values["repo"]):
            raise Refusal(403, "not an allowed repository")
        if request.path == "/status":
            return self.answer_status(values)
        if request.path in ("/get", "/get/") or (request.path == "/" and "repo" in values):
            return self.answer_signal(request, values, signed, peer)
        if request.path == "/":
            return self.answer_front(request)
        raise Refusal(404, "no such path")

    def check_signed(self, request):
        """The time in a request's signature, 0 where no secret is set; Refusal if it is no good."""
        secrets = self.secrets.current()
        if not secrets:
            return 0
        now = time.time()
        when, nonce = check_signature(request.values("x-server-update-signature"), secrets,
                                      request.method, request.target, now)
        if not self.nonces.take(nonce, when, now):
            raise_unsigned()
        return when

    def is_allowed(self, repo):
        globs = self.settings["ALLOW_REPOS"]
        return globs is None or any(fnmatch.fnmatchcase(repo, glob) for glob in globs)

    def answer_signal(self, request, values, signed, peer):
        """Takes a signal: its record is on disk before the answer leaves."""
        repo, ref = values.get("repo"), values.get("ref")
        if repo is None:
            raise Refusal(400, "'repo' is missing")
        if request.method != "GET":
            raise Refusal(405, "only GET starts an update", (("Allow", "GET"),))
        if self.stopping.is_set():
            raise Refusal(503, "this slave is stopping", RETRY_AFTER)
        if signed and signed <= self.signed_floor:
            raise Refusal(503, "signed before this slave's start; sign again", RETRY_AFTER)
        if repo not in self.queued and len(self.queued) >= MAX_QUEUED:
            raise Refusal(503, "too many updates are queued", RETRY_AFTER)
        change = functools.partial(accept, repo, ref, signed, time.time())
        try:
            record = self.journal.commit(repo, change)
        except OSError as error:
            raise Refusal(503, "can't record the update: %s" % error.strerror, RETRY_AFTER)
        log("%s: update %d is asked for by %s" % (repo, record.update, peer))
        with self.lock:
            self.queued.setdefault(repo, record.update)
        self.start_queued()
        told = {"repo": repo, "update": record.update, "state": record.state, "ref": ref}
        location = "/status?repo=%s&update=%d" % (repo, record.update)
        return json_answer(202, told, (("Location", location),))

    def answer_status(self, values):
        if "repo" not in values:
            if "update" in values:
                raise Refusal(400, "'repo' is missing")
            newest = [records[-1] for _, records in sorted(self.journal.records.copy().items())]
            return json_answer(200, {"version": VERSION, "repos": {
                record.repo: self.tell(record) for record in newest}})
        update, wait_s = values.get("update"), min(values.get("wait", 0), MAX_WAIT_S)
        record = self.wait_ended(values["repo"], update, wait_s)
        if record is None:
            raise Refusal(404, "no such update" if update else "no update was ever asked for")
        return json_answer(200, self.tell(record))

    def wait_ended(self, repo, update, wait_s):
        """The record that answers for an update, once that has ended or `wait_s` are over."""
        def look():
            return find(self.journal.records.get(repo, ()), update)

        def is_over():
            record = look()
            return record is None or has_ended(record) or self.stopping.is_set()

        if wait_s and not is_over() and self.polls.acquire(blocking=False):
            try:
                with self.journal.ended:
                    self.journal.ended.wait_for(is_over, wait_s)
            finally:
                self.polls.release()
        return look()

    def tell(self, record):
        """What /status says; the newest record has what is live now, whoever made it so."""
        if record is find(self.journal.records[record.repo]):
            record = record._replace(commit=read_live_commit(self.tree(record.repo)))
        return public(record)

    def answer_front(self, request):
        if self.served_file:
            return serve_file(self.served_file, request)
        return Answer(200, b"server-update slave: /?repo=NAME starts an update, /status tells what "
                      b"is live\n", "text/plain")


# --- connections --------------------------------------------------------------------------------

class Connection(socketserver.BaseRequestHandler):
    """Serves one connection, in a thread of its own; each request's header has a deadline."""

    def handle(self):
        self.accepted, self.data = self.request, b""
        deadline = time.monotonic() + HEADER_TIMEOUT_S
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.server.tls:
                self.begin_tls()
            while self.serve_request(deadline):
                deadline = time.monotonic() + HEADER_TIMEOUT_S
                self.server.note_waiting(self.accepted, self.request)
        except OSError:
            pass  # the peer is gone or too slow
        finally:
            self.request.close()

    def begin_tls(self):
        self.request = self.server.tls.wrap_socket(self.request, server_side=True,
                                                   do_handshake_on_connect=False)
        self.server.note_waiting(self.accepted, self.request)
        self.request.settimeout(HEADER_TIMEOUT_S)
        try:
            self.request.do_handshake()
        except OSError as error:
            self.server.refusals.add("no TLS with %s: %s" % (self.client_address[0], error))
            raise

    def serve_request(self, deadline):
        """Answers one request; whether another one may follow."""
        request = None
        try:
            head = self.read_head(deadline)
            if head is None:
                return False
            request = parse_head(head)
            answer = self.server.slave.answer(request, self.client_address[0])
        except Refusal as refusal:
            answer = refusal_answer(refusal)
            self.server.refusals.add("refused with %d from %s: %s%s" % (
                refusal.status, self.client_address[0], refusal,
                ": %s %s" % (request.method, request.target[:200]) if request else ""))
        is_kept_alive = (request is not None and request.is_kept_alive
                         and not self.server.slave.stopping.is_set())
        self.send(answer, request is not None and request.method == "HEAD", is_kept_alive)
        if request is None or request.has_body:
            self.read_on()
        return is_kept_alive

    def read_head(self, deadline):
        """The next request's header, or None where the peer has gone; Refusal when it is late."""
        while True:
            head, self.data = split_head(self.data)
            if head is not None:
                self.server.note_working(self.accepted)
                return head
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    raise socket.timeout()
                self.request.settimeout(left)
                data = self.request.recv(CHUNK_BYTES)
            except socket.timeout:
                if not self.data:
                    return None
                raise Refusal(408, "no whole request header within %d s" % HEADER_TIMEOUT_S)
            if not data:
                return None
            self.data = (self.data + data).lstrip(b"\r\n") if not self.data else self.data + data

    def send(self, answer, is_head, is_kept_alive):
        """Sends a short answer in one piece; a long file piece by piece, each under a deadline."""
        data, left = format_head(answer, is_kept_alive), 0 if is_head else answer.length
        self.request.settimeout(SEND_TIMEOUT_S)
        if answer.file is None:
            self.request.sendall(data if is_head else data + answer.body)
            return
        self.server.note_waiting(self.accepted, self.request)
        with answer.file:
            while data or left:
                chunk = answer.file.read(min(left, CHUNK_BYTES))
                if left and not chunk:
                    raise OSError("the served file became shorter")
                self.request.sendall(data + chunk)
                data, left = b"", left - len(chunk)

    def read_on(self):
        """Reads a little of what nobody wants, as closing at once could take back the answer."""
        give_up_at, left = time.monotonic() + 1, CHUNK_BYTES
        socket.socket.shutdown(self.request, socket.SHUT_WR)
        while left > 0 and time.monotonic() < give_up_at:
            self.request.settimeout(max(0.001, give_up_at - time.monotonic()))
            data = self.request.recv(left)
            if not data:
                break
            left -= len(data)


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, MAX_CONNECTIONS at once at most.

    When there are more, the one that has waited longest for its peer gives way. No part of this
    looks up a name.
    """

    daemon_threads = True
    allow_reuse_port = False  # a second slave on the port is a mistake
    request_queue_size = 1024

    def __init__(self, slave, tls, bind, port, max_connections):
        self.slave, self.tls, self.max_connections = slave, tls, max_connections
        self.refusals = RefusalLog()
        self.lock, self.open, self.waiting = threading.Lock(), set(), {}
        self.is_dual = not bind
        self.address_family = socket.AF_INET6 if ":" in (bind or "::") else socket.AF_INET
        try:
            super().__init__((bind or "::", port), Connection)
        except OSError as error:
            if bind or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            self.is_dual, self.address_family = False, socket.AF_INET
            super().__init__(("0.0.0.0", port), Connection)

    def server_bind(self):
        if self.is_dual:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up the host's name

    def service_actions(self):
        self.slave.start_queued()
        self.refusals.flush()

    def process_request(self, request, client_address):
        """Makes room for a connection and has it served in a thread of its own."""
        with self.lock:
            has_room = len(self.open) < self.max_connections or self.drop_oldest()
            if has_room:
                self.open.add(request)
                self.waiting[request] = request
        if has_room:
            super().process_request(request, client_address)
        else:
            self.refuse_busy(request)

    def drop_oldest(self):
        """Ends the connection that has waited longest for its peer; False where none waits."""
        for request, current in list(self.waiting.items()):
            del self.waiting[request]
            self.open.discard(request)
            try:
                socket.socket.shutdown(current, socket.SHUT_RDWR)  # not ssl's: its thread reads
            except OSError:
                pass
            return True
        return False

    def refuse_busy(self, request):
        refusal = Refusal(503, "too many connections", RETRY_AFTER)
        answer = refusal_answer(refusal)
        self.refusals.add("refused with 503: %s" % refusal)
        try:
            request.settimeout(0)
            if not self.tls:
                request.send(format_head(answer, False) + answer.body)
        except OSError:
            pass
        self.shutdown_request(request)

    def note_waiting(self, request, current):
        """The connection accepted as `request` waits for its peer, by way of socket `current`."""
        with self.lock:
            if request in self.open:
                self.waiting.pop(request, None)
                self.waiting[request] = current

    def note_working(self, request):
        with self.lock:
            self.waiting.pop(request, None)

    def shutdown_request(self, request):
        with self.lock:
            self.open.discard(request)
            self.waiting.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        log("internal error in line %d, with %s: %r" % (frame.tb_lineno, client_address[0], error))


# --- the start ----------------------------------------------------------------------------------

def find_slave_activate():
    """The path of slave-activate: on PATH, beside this file, or in /bin."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "slave-activate")
    found = [shutil.which("slave-activate"), shutil.which(beside),
             shutil.which("/bin/slave-activate")]
    if not any(found):
        raise Mistake("no slave-activate on PATH, beside %s or in /bin; install it there"
                      % os.path.abspath(__file__), 1)
    return next(path for path in found if path)


def open_journal(repos_dir):
    folder = os.path.join(repos_dir, ".server-update")
    try:
        os.makedirs(repos_dir, exist_ok=True)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        return Journal(folder)
    except BlockingIOError:
        raise Mistake("another slave.py works in %s (REPOS_DIR)" % repos_dir, 1)
    except OSError as error:
        raise Mistake("can't write to %s: %s (REPOS_DIR)" % (folder, error.strerror), 1)


def open_server(slave, settings):
    """A Server that listens; Mistake where it can't."""
    tls = make_tls_context(settings["TLS_CERT"], settings["TLS_KEY"])
    bind, port = settings["BIND"], settings["PORT"]
    try:
        return Server(slave, tls, bind, port, raise_file_limit())
    except OSError as error:
        raise Mistake("can't listen on port %d%s: %s (PORT, BIND)" % (
            port, " of " + bind if bind else "", error.strerror), 1)


def raise_file_limit():
    """Makes room for open files; returns how many connections there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 128
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_CONNECTIONS
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(8, limit - 128)


def check_served_file(path):
    """The absolute path of the file to serve; one that is not there yet may still come."""
    if path is None:
        return None
    path = os.path.abspath(path)
    if os.path.isdir(path):
        raise Mistake("'%s' is a folder; name the file in it that is to be served" % path)
    if not os.path.exists(path):
        log("'%s' does not exist yet: / answers 404 until it does" % path)
    return path


def run(options):
    """Starts all parts and blocks until SIGTERM or SIGINT; Mistake where it can't start."""
    settings = read_settings(os.environ, options)
    secrets = Secrets(settings["SECRET_FILE"])
    served_file = check_served_file(options["FILE"])
    command = find_slave_activate()
    if not secrets.lines:
        log("no secret: who can reach the port can have repositories of %s updated here; "
            "to change that put a secret into %s" % (settings["BASE_URL"], secrets.path))
    threading.stack_size(512 * 1024)
    journal = open_journal(settings["REPOS_DIR"])
    slave = Slave(settings, command, journal, secrets, served_file)
    server = open_server(slave, settings)
    journal.load()
    threading.Thread(target=journal.write_forever, daemon=True).start()
    serve(server, slave)


def serve(server, slave):
    """Serves until SIGTERM or SIGINT; SIGHUP reads the certificate again."""
    events, settings = queue.SimpleQueue(), slave.settings
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: events.put(number))
    slave.resume()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    log("slave.py %s: %s puts clones live in %s" % (VERSION, slave.command, settings["REPOS_DIR"]))
    log("listening on port %d (%s%s)" % (server.server_address[1],
                                         settings["BIND"] or "all addresses",
                                         ", TLS" if server.tls else ""))
    while events.get() == signal.SIGHUP:
        try:
            server.tls = make_tls_context(settings["TLS_CERT"], settings["TLS_KEY"])
            log("SIGHUP: the TLS certificate is read again")
        except Mistake as mistake:
            log("SIGHUP: %s; the certificate from before still serves" % mistake)
    log("stopping")
    slave.stop()
    server.shutdown()
    log("stopped")


def parse_args(argv):
    """{setting or FILE: text or None}."""
    intro, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="slave.py", usage="slave.py [options] [FILE]",
                                     description=intro.partition(": ")[2], epilog=rest,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("FILE", nargs="?", help="serve this file at /")
    for key, setting in SETTINGS.items():
        default = " (%s)" % setting.default if setting.default else ""
        parser.add_argument("--" + key.lower().replace("_", "-"), dest=key, metavar="X",
                            help=setting.help.replace("%", "%%") + default)
    parser.add_argument("--version", action="version", version="slave.py " + VERSION)
    return vars(parser.parse_args(argv))


def main(argv=None):
    try:
        run(parse_args(argv))
    except Mistake as mistake:
        print("slave.py: %s" % mistake, file=sys.stderr)
        return mistake.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
