#!/usr/bin/env python3
"""slave.py [FILE]: takes server-update's signals and has slave-activate put fresh clones live.

    slave.py                                     listen on port 9999
    slave.py ~/repos/site/index.html             the same, and serve that file at /
    GET /?repo=NAME[&ref=REF]                    start an update: 202 and its id, as JSON
    GET /status[?repo=NAME[&update=ID&wait=S]]   what is live, and how updates ended
    GET /healthz                                 200 once it serves

Settings are KEY=value lines in /etc/server-update/slave.conf, SERVER_UPDATE_KEY variables and
options; the last of these wins. SIGHUP reads the TLS certificate again. Exit status: 0 stopped
by SIGTERM or SIGINT, 1 could not start, 2 usage or settings.
"""

import argparse
import collections
import contextlib
import fcntl
import fnmatch
import functools
import hmac
import http.server
import io
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import types
from urllib.parse import unquote

VERSION = "1.0"
CONF_FILE = "/etc/server-update/slave.conf"
SECRET_FILE = "/etc/server-update/secret"
MAX_RUNNING = 4  # updates side by side
MAX_QUEUED = 100  # repositories with an update that waits
MAX_ENDED = 10  # ended updates that are remembered, a repository
MAX_TRIES = 3  # starts of one update; more only where the slave was stopped cleanly
KILL_AFTER_S = 10  # from TERM to KILL
LEFTOVER_S = 0.5  # the same, for what a run that has ended left in its process group
POLL_S = 0.02  # how often a run is asked whether it has ended
MAX_MESSAGE_CHARS = 300
HEADER_TIMEOUT_S = 10  # for a whole request header, and for a TLS handshake
SEND_TIMEOUT_S = 30  # for a peer to take anything
MAX_LINE_BYTES = 8192  # of a request, and of what slave-activate says
MAX_HEADER_BYTES = 16384
MAX_CONNECTIONS = 256
MAX_POLLS = 128  # held back at once; further ones are answered at once
MAX_WAIT_S = 30
MAX_CLOCK_DIFFERENCE_S = 300
MAX_NONCES = 65536
MAX_REFUSALS_LOGGED = 10  # a second
RETRY_LATER = ("Retry-After", "2")
HASH_RE = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
NUMBER_RE = re.compile("[0-9]{1,15}")
SIGNATURE_RE = re.compile(r"t=([0-9]{1,12}),n=([0-9a-f]{32}),s=([0-9a-f]{64})")
OUTPUT_KINDS = ("slave-activate: ", "fatal: ", "error: ", "")  # what tells most comes first

# One update: /status tells the first ten fields, times in seconds since 1970. `tries` are its
# starts but for those that ended in a clean stop, `signed` is the time in its signature.
Record = collections.namedtuple(
    "Record", "repo update ref state requested started finished commit previous message tries "
    "signed", defaults=(None, None, None, None, "", 0, 0))
# What is remembered of one repository's updates; their ids grow in this order.
Records = collections.namedtuple("Records", "ended running queued", defaults=((), None, None))

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


class Mistake(Exception):
    """What keeps the slave from starting: a text for a person, and the exit status."""


class Refusal(Exception):
    """A request that gets an error for its answer: HTTP status, text, further headers."""


def escape(text):
    """`text` with all that could move a cursor or begin a line written as an escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
                   for char in text)


def log(text):
    """Writes a line to stderr, in one write, so that the lines of threads never mix."""
    line = "%s %s\n" % (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), escape(text))
    with contextlib.suppress(OSError):  # nobody reads the log: no reason to stop updating
        os.write(2, line.encode("utf-8", "backslashreplace"))


# -- settings: each parser takes a text that is not empty, and raises ValueError ----------------

def parse_matching(pattern, text):
    if not re.fullmatch(pattern, text) or not text.isprintable():
        raise ValueError(text)
    return text


def parse_number(low, high, text):
    if not low <= int(parse_matching("[0-9]{1,7}", text)) <= high:
        raise ValueError(text)
    return int(text)


def parse_path(text):
    return parse_matching("/.*", os.path.expanduser(text) if text.startswith("~/") else text)


def parse_networks(text):
    text = text.replace("::ffff:", "").replace(",", " ")  # IPv4 may come in IPv6's clothes
    return [ipaddress.ip_network(part) for part in text.split()]


def parse_globs(text):
    return parse_matching(r"[A-Za-z0-9._*?\[\]!, -]+", text).replace(",", " ").split()


SETTINGS = {  # KEY: default, parser, help
    "BASE_URL": ("https://github.com/aiegoo",
                 lambda text: parse_matching(r"/\S*|[^-:\s]\S*:\S+", text).rstrip("/"),
                 "URL or path: clones are made of BASE_URL/NAME.git"),
    "REPOS_DIR": ("~/repos", parse_path, "folder where the clones go live"),
    "HOOKS_DIR": ("/etc/server-update/hooks", parse_path, "has pre-update and post-update"),
    "PORT": ("9999", functools.partial(parse_number, 0, 65535), "0 takes a free one"),
    "BIND": ("", lambda text: str(ipaddress.ip_address(text)), "address to listen on, else all"),
    "TIMEOUT": ("600", functools.partial(parse_number, 1, 10 ** 6), "seconds for an update"),
    "SUBMODULES": ("yes", functools.partial(parse_matching, "yes|no"), "yes or no: clone them"),
    "SECRET_FILE": ("", parse_path, "shared secret, else %s if it exists" % SECRET_FILE),
    "ALLOW_FROM": ("", parse_networks, "addresses and networks that may ask, else all"),
    "ALLOW_REPOS": ("", parse_globs, "globs of repositories that may be updated, else all"),
    "TLS_CERT": ("", parse_path, "certificate chain (PEM): serve https"),
    "TLS_KEY": ("", parse_path, "its key, where that is not in TLS_CERT"),
}


def parse_setting(key, text="", before="", after=""):
    """A setting's value, its default where `text` is empty; `before` and `after` say where."""
    default, parse, _ = SETTINGS[key]
    try:
        return parse(text or default) if text or default else None
    except ValueError:
        raise Mistake("%sbad %s '%s'%s" % (before, key, escape(text), after), 2)


def parse_settings_file(lines, path):
    """{KEY: value} from KEY=value lines, which are text and never run."""
    values = {}
    for number, line in enumerate(lines, 1):
        line, where = line.strip(), "%s:%d: " % (path, number)
        key, equals, text = (part.strip() for part in line.partition("="))
        if not line or line.startswith("#"):
            continue
        if not equals:
            raise Mistake("%sno '=' in '%s'" % (where, escape(line)), 2)
        if key not in SETTINGS:
            raise Mistake("%sunknown setting '%s'" % (where, escape(key)), 2)
        if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
            text = text[1:-1]
        values[key] = parse_setting(key, text, before=where)
    return values


def read_settings(environ, options):
    """{KEY: value}: options win over SERVER_UPDATE_* variables, these over the file."""
    values = {key: parse_setting(key) for key in SETTINGS}
    path = environ.get("SERVER_UPDATE_CONF") or CONF_FILE
    try:
        if path != CONF_FILE or os.path.exists(path):
            with open(path, encoding="utf-8", errors="surrogateescape") as lines:
                values.update(parse_settings_file(lines, path))
    except OSError as error:
        raise Mistake("can't read settings file '%s': %s" % (path, error.strerror), 2)
    for source, to_name in ((environ, "SERVER_UPDATE_{}".format), (options, option_name)):
        for key in (key for key in SETTINGS if source.get(to_name(key))):
            name = to_name(key)
            values[key] = parse_setting(key, source[name].strip(), "", " (set by %s)" % name)
    if values["TLS_KEY"] and not values["TLS_CERT"]:
        raise Mistake("TLS_KEY is set, but TLS_CERT is not", 2)
    return values


def option_name(key):
    return "--" + key.lower().replace("_", "-")


# -- the records of a repository: pure functions, for the journal to apply ----------------------

def list_all(records):
    return records.ended + tuple(filter(None, (records.running, records.queued)))


def find(records, update=0):
    """The record of an update, or of the newer one in its place; the newest where it is 0."""
    found = [record for record in list_all(records) if record.update >= update]
    return found[0 if update else -1] if found else None


def accept(records, repo, ref, signed, now):
    """A signal: an update is queued, in place of one that is. Ids are ms since 1970, and grow."""
    newest = find(records)
    update = max(int(now * 1000), newest.update + 1 if newest else 1)
    return records._replace(queued=Record(repo, update, ref, "queued", now, signed=signed,
                                          commit=newest and newest.commit))


def start(records, live, now):
    """The queued update begins, while commit `live` is live."""
    begun = records.queued._replace(state="running", started=now, commit=live, previous=live,
                                    tries=records.queued.tries + 1)
    return records._replace(running=begun, queued=None)


def finish(records, now, **changes):
    """The running update has ended; `changes` are its state, message and commits."""
    done = records.running._replace(finished=now, **changes)
    return records._replace(ended=(records.ended + (done,))[-MAX_ENDED:], running=None)


def interrupt(records, is_clean, now):
    """The slave ends, or has ended, under the running update: it, or a newer one, is queued."""
    again = records.running
    if again.tries >= MAX_TRIES and not is_clean:
        return finish(records, now, state="failed", message="interrupted three times by the "
                      "slave's own end; signal again for another try")
    again = again._replace(state="queued", started=None, tries=again.tries - is_clean)
    return records._replace(queued=records.queued or again, running=None)


def encode_records(records):
    """The file: the newest record's fields, and the others as "earlier"."""
    *earlier, newest = [record._asdict() for record in list_all(records)]
    return json.dumps(dict(newest, earlier=earlier)).encode("ascii") + b"\n"


def decode_records(repo, data):
    """What encode_records made; ValueError, TypeError or AttributeError for anything else."""
    newest = json.loads(data.decode("utf-8"))
    found = tuple(decode_record(repo, fields) for fields in newest.get("earlier", []) + [newest])
    records = Records(tuple(record for record in found if record.finished),
                      **{record.state: record for record in found if not record.finished})
    ids = [record.update for record in found]
    if list_all(records) != found or ids != sorted(set(ids)):
        raise ValueError("updates out of order")
    return records


def decode_record(repo, fields):
    """A Record; errors as above. What is missing and not always there has its default."""
    record = Record(**{key: fields[key] for key in Record._fields if key in fields})
    numbers = [record.requested, record.started or 0, record.finished or 0, record.update,
               record.tries, record.signed]
    states = ("live", "failed") if record.finished else ("queued", "running")
    hashes = filter(None, (record.commit, record.previous))
    if (record.repo != repo or record.state not in states or not is_ref(record.ref or "x")
            or not all(0 <= number < 1e15 for number in numbers)  # nor NaN
            or not all(map(HASH_RE.fullmatch, hashes)) or not isinstance(record.message, str)):
        raise ValueError("not a record of an update")
    return record._replace(update=int(record.update))


class Journal:
    """The records of all repositories, {repo: Records}, in memory and on disk.

    One thread at a time writes: what all others have come with in the meantime in one go.
    """

    def __init__(self, repos_dir):
        """Takes the state folder for this process alone; Mistake where that can't be."""
        self.folder, self.records = os.path.join(repos_dir, ".server-update"), {}
        self.changes, self.writing = collections.deque(), threading.Lock()
        self.ended = threading.Condition()  # told after each change that must be kept
        try:
            os.makedirs(repos_dir, exist_ok=True)
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            self.folder_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self.folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(os.path.join(self.folder, "start.tmp"), "wb") as handle:
                os.unlink(handle.name)
        except BlockingIOError:
            raise Mistake("another slave.py works in REPOS_DIR '%s'" % repos_dir, 1)
        except OSError as error:
            raise Mistake("can't write in '%s': %s" % (self.folder, error.strerror), 1)

    def load(self):
        """Reads all records; a broken one is told of, kept aside, and stops nothing."""
        for name in sorted(os.listdir(self.folder)):
            path, repo = os.path.join(self.folder, name), name[:-len(".json")]
            if name.endswith(".json.tmp"):
                os.unlink(path)
            elif name.endswith(".json") and is_repo_name(repo):
                try:
                    with open(path, "rb") as handle:
                        self.records[repo] = decode_records(repo, handle.read())
                except Exception as error:  # whatever it is, it must not stop the others
                    log("%s is broken, kept as %s.json.broken: %r" % (path, repo, error))
                    os.rename(path, path + ".broken")

    def commit(self, repo, function, *args, must_keep=False, **kwargs):
        """Applies function(Records, ...) -> Records; returns the result once it is on disk.

        Where the disk does not take it: OSError, and nothing has changed. With `must_keep`, for
        what has happened in any case, it holds all the same and is written with the next change.
        """
        change = types.SimpleNamespace(
            repo=repo, apply=lambda records: function(records, *args, **kwargs),
            must_keep=must_keep, result=None, error=None, is_done=False)
        self.changes.append(change)
        with self.writing:
            if not change.is_done:  # else who held the lock before has written it with its own
                self.write([self.changes.popleft() for _ in range(len(self.changes))])
        if change.error:
            raise change.error
        return change.result

    def write(self, changes):
        """Writes a batch of changes, each repository's file once."""
        after = self.apply(changes)
        try:
            for repo in after:
                self.save(repo, after[repo])
            os.fsync(self.folder_fd)
        except OSError as error:
            log("can't write in %s: %s" % (self.folder, error.strerror))
            for change in changes:
                change.error = None if change.must_keep else error
            after = self.apply([change for change in changes if change.must_keep])
        self.records.update(after)
        for change in changes:
            change.is_done = True
        if any(change.must_keep for change in changes):
            with self.ended:
                self.ended.notify_all()

    def apply(self, changes):
        """{repo: its Records after the changes} for each repository that they change."""
        after = {}
        for change in changes:
            before = after.get(change.repo) or self.records.get(change.repo) or Records()
            after[change.repo] = change.result = change.apply(before)
        return after

    def save(self, repo, records):
        """Puts one file in its place, whole or not at all; the folder is not yet synced."""
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


# -- slave-activate -----------------------------------------------------------------------------

def read_live_commit(tree):
    """The commit that is checked out in a clone, or None where its files do not say (reftable)."""
    def read(name):
        with open(os.path.join(tree, ".git", name), encoding="utf-8") as handle:
            return handle.read().strip()

    try:
        commit = read("HEAD")
        if commit.startswith("ref: "):
            ref = commit[len("ref: "):]
            commit = read(ref) if os.path.exists(os.path.join(tree, ".git", ref)) else "".join(
                re.findall("^(.*) %s$" % re.escape(ref), read("packed-refs"), re.MULTILINE))
    except (OSError, ValueError):
        return None
    return commit if HASH_RE.fullmatch(commit) else None


class Activation:
    """One run of slave-activate, in a process group of its own; what it says is logged."""

    def __init__(self, command, environ, repo, ref):
        self.repo, self.said = repo, {}  # {kind: the last line of that kind on stderr}
        self.stopped = None  # why it was made to end: "timeout" or "stop"
        self.process = subprocess.Popen(
            [command, repo] + ([ref] if ref else []), env=environ, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self.reader = threading.Thread(target=self.log_stderr, daemon=True)
        self.reader.start()

    def log_stderr(self):
        with self.process.stderr as lines:
            for line in iter(functools.partial(lines.readline, MAX_LINE_BYTES), b""):
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    log("%s: %s" % (self.repo, text))
                    kind = next(kind for kind in OUTPUT_KINDS if text.startswith(kind))
                    self.said[kind] = text[len(kind):]

    def wait(self, timeout_s, stop):
        """Blocks until it has ended, by itself or, after `timeout_s` or event `stop`, by force.

        Its own end counts, not that of its pipes, which a grandchild may hold open. Returns what
        it said on stdout; no more than a pipe takes, as nobody reads it before.
        """
        force_at = time.monotonic() + timeout_s
        while self.process.poll() is None:
            is_late = time.monotonic() >= force_at
            if is_late or (stop.is_set() and not self.stopped):
                self.signal_group(signal.SIGKILL if self.stopped else signal.SIGTERM)
                self.stopped = self.stopped or ("timeout" if is_late else "stop")
                force_at = time.monotonic() + KILL_AFTER_S
            time.sleep(POLL_S)
        self.reader.join(LEFTOVER_S)
        self.signal_group(signal.SIGTERM)
        os.set_blocking(self.process.stdout.fileno(), False)
        with self.process.stdout as stdout:
            return stdout.read() or b""

    def signal_group(self, number):
        """Whether there was anything in the group to take the signal."""
        try:
            os.killpg(self.process.pid, number)
            return True
        except ProcessLookupError:
            return False

    def clear_up(self):
        """Ends what the run left in its group, which has been told to go."""
        if self.signal_group(0):
            time.sleep(LEFTOVER_S)
            self.signal_group(signal.SIGKILL)


def judge(repo, status, stdout, said, late_after_s=None):
    """How a run of slave-activate ended, as changes to its record.

    `said` has the last line of each kind; `late_after_s` is TIMEOUT where the run took longer.
    """
    match = re.fullmatch(r"%s ([0-9a-f]{40,64}|-) ([0-9a-f]{40,64}|-)\n" % re.escape(repo),
                         stdout.decode("ascii", "replace"))
    line = next((said[kind] for kind in OUTPUT_KINDS if kind in said), "")
    if late_after_s:
        line = "stopped as it took longer than %d s (TIMEOUT)%s" % (
            late_after_s, ", and had said: " + line if line else "")
    elif status == 0:
        line = "" if match else "slave-activate did not say which commit is live"
    elif not line:
        line = "slave-activate ended with exit status %d" % status
    message = escape(line)[:MAX_MESSAGE_CHARS]
    if not match or (status not in (0, 3) and not late_after_s):
        return {"state": "failed", "message": message}
    commit, previous = (None if text == "-" else text for text in match.groups())
    return {"state": "live", "message": message, "commit": commit, "previous": previous}


# -- who may ------------------------------------------------------------------------------------

class Guard:
    """Who may ask for what: by signature, address and repository. All checks raise Refusal."""

    def __init__(self, settings):
        """Mistake where the secret file is no good, or where one is set and not there."""
        self.settings, self.path = settings, settings["SECRET_FILE"] or SECRET_FILE
        self.lock, self.nonces, self.secrets = threading.Lock(), {}, []  # {nonce: its time}
        try:
            if settings["SECRET_FILE"] or os.path.exists(self.path):
                self.secrets = read_secrets(self.path)
        except ValueError as error:
            raise Mistake(str(error), 2)
        except OSError as error:
            raise Mistake("can't read secret file '%s': %s" % (self.path, error.strerror), 2)

    def check_signature(self, values, method, target, now):
        """The time in a request's signature, 0 where there is no secret.

        `values` are those of the header that signs. Whatever is wrong, the answer is the same;
        only who knows the secret is told of the clock.
        """
        try:
            self.secrets = read_secrets(self.path)
        except (OSError, ValueError):
            pass  # the secret that was good still is: it must never go away by accident
        if not self.secrets:
            return 0
        match = SIGNATURE_RE.fullmatch(values[0]) if len(values) == 1 else None
        when, nonce, mac = match.groups() if match else ("0", "", "")
        if not any(hmac.compare_digest(sign(secret, method, target, when, nonce), mac)
                   for secret in self.secrets):
            raise Refusal(401, "signature missing or wrong")
        if abs(now - int(when)) > MAX_CLOCK_DIFFERENCE_S:
            raise Refusal(401, "the clocks are %d s apart" % abs(now - int(when)))
        self.take_nonce(bytes.fromhex(nonce), int(when), now)
        return int(when)

    def take_nonce(self, nonce, when, now):
        """Remembers a nonce, as long as its signature is not too old; none is taken twice."""
        with self.lock:
            if len(self.nonces) >= MAX_NONCES:
                self.nonces = {key: self.nonces[key] for key in self.nonces
                               if self.nonces[key] >= now - MAX_CLOCK_DIFFERENCE_S}
            if len(self.nonces) >= MAX_NONCES:
                raise Refusal(503, "too many signed requests", RETRY_LATER)
            if nonce in self.nonces:
                raise Refusal(401, "signature missing or wrong")
            self.nonces[nonce] = when

    def check_address(self, text):
        networks, address = self.settings["ALLOW_FROM"], ipaddress.ip_address(text.split("%")[0])
        if networks and not any(address in network for network in networks):
            raise Refusal(403, "not from this address")

    def check_repo(self, repo):
        globs = self.settings["ALLOW_REPOS"]
        if globs and not any(fnmatch.fnmatchcase(repo, glob) for glob in globs):
            raise Refusal(403, "not an allowed repository")


# -- the slave ----------------------------------------------------------------------------------

class Slave:
    """Takes signals, runs the updates that they ask for, and knows how these ended."""

    def __init__(self, settings, command):
        self.settings, self.command = settings, command
        self.journal = Journal(settings["REPOS_DIR"])
        self.lock, self.queued, self.running = threading.Lock(), {}, {}
        self.polls, self.stopping = threading.BoundedSemaphore(MAX_POLLS), threading.Event()
        self.signed_floor = 0  # what was signed up to then could be a replay
        self.environ = dict(os.environ, **{"SERVER_UPDATE_" + key: settings[key] for key in (
            "BASE_URL", "REPOS_DIR", "HOOKS_DIR", "SUBMODULES")})

    def resume(self):
        """After a start: what was queued or running when the slave ended is queued again."""
        self.journal.load()
        for repo, records in sorted(self.journal.records.items()):
            signed = [record.signed for record in list_all(records)]
            self.signed_floor = max(signed + [self.signed_floor])
            if records.running:
                records = self.journal.commit(repo, interrupt, False, time.time(), must_keep=True)
            if records.queued:
                log("%s: update %d is taken up again" % (repo, records.queued.update))
                self.queued[repo] = True
        self.start_queued()

    def take_signal(self, repo, ref, signed, peer):
        """Queues an update; its record, which is on disk then, or a Refusal."""
        if self.stopping.is_set():
            raise Refusal(503, "this slave is stopping", RETRY_LATER)
        if signed and signed <= self.signed_floor:
            raise Refusal(503, "signed before this slave's last start: sign again", RETRY_LATER)
        if repo not in self.queued and len(self.queued) >= MAX_QUEUED:
            raise Refusal(503, "too many updates are queued", RETRY_LATER)
        try:
            record = self.journal.commit(repo, accept, repo, ref, signed, time.time()).queued
        except OSError as error:
            raise Refusal(503, "can't record the update: %s" % error.strerror, RETRY_LATER)
        log("%s: update %d was asked for by %s" % (repo, record.update, peer))
        with self.lock:
            self.queued[repo] = True
        self.start_queued()
        return record

    def start_queued(self):
        """Starts what has waited longest, as far as there is room; the rest stays queued."""
        with self.lock:
            for repo in [repo for repo in self.queued if repo not in self.running]:
                if len(self.running) >= MAX_RUNNING or self.stopping.is_set():
                    return
                thread = threading.Thread(target=self.run_update, args=(repo,), daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return  # no room for a thread now; service_actions tries again
                self.running[repo] = thread
                del self.queued[repo]

    def run_update(self, repo):
        """Runs the queued update of a repository to its end; in a thread of its own."""
        try:
            if self.journal.records[repo].queued:
                live = read_live_commit(self.tree(repo))
                records = self.journal.commit(repo, start, live, time.time(), must_keep=True)
                self.activate(repo, records.running)
        finally:
            with self.lock:
                del self.running[repo]
            self.start_queued()

    def activate(self, repo, record):
        """Runs slave-activate; how it ended is recorded before what it left is cleared up."""
        log("%s: update %d starts, ref %s" % (repo, record.update, record.ref or "not given"))
        try:
            run = Activation(self.command, self.environ, repo, record.ref)
        except OSError as error:
            self.end_update(repo, {"state": "failed", "message": "can't run %s" % error})
            return
        timeout_s = self.settings["TIMEOUT"]
        stdout = run.wait(timeout_s, self.stopping)
        status, late_after_s = run.process.returncode, timeout_s * (run.stopped == "timeout")
        if run.stopped == "stop" and status != 0:
            self.journal.commit(repo, interrupt, True, time.time(), must_keep=True)
            log("%s: update %d stopped, to be taken up again" % (repo, record.update))
        else:
            self.end_update(repo, judge(repo, status, stdout, run.said, late_after_s))
        run.clear_up()

    def end_update(self, repo, changes):
        if changes["state"] == "failed":
            changes["commit"] = read_live_commit(self.tree(repo))
        done = self.journal.commit(repo, finish, time.time(), must_keep=True, **changes).ended[-1]
        log("%s: update %d %s after %.1f s, live is %s%s" % (
            repo, done.update, done.state, done.finished - done.started, done.commit or "nothing",
            ": " + done.message if done.message else ""))

    def stop(self):
        """Blocks until no update runs: those that did are stopped and queued again."""
        self.stopping.set()
        with self.journal.ended:
            self.journal.ended.notify_all()
        with self.lock:
            threads = list(self.running.values())
        for thread in threads:
            thread.join()

    def tree(self, repo):
        return os.path.join(self.settings["REPOS_DIR"], repo)

    def status(self, repo, update=0, wait_s=0):
        """What /status tells of an update, or None; waits `wait_s` at most until it has ended."""
        def is_over():
            record = find(self.journal.records.get(repo, Records()), update)
            return not record or record.finished or self.stopping.is_set()

        if wait_s and not is_over() and self.polls.acquire(blocking=False):
            with self.journal.ended:
                self.journal.ended.wait_for(is_over, wait_s)
            self.polls.release()
        records, tree = self.journal.records.get(repo, Records()), self.tree(repo)
        record, live = find(records, update), read_live_commit(tree)
        if record is find(records) and (live or not os.path.exists(tree)):
            record = record and record._replace(commit=live)  # it may have been put live by hand
        return record and dict(zip(Record._fields[:10], record))


# -- connections --------------------------------------------------------------------------------

def parse_query(query):
    """{name: value} of the parameters that mean something here; Refusal where they can't be."""
    checks, values = {"repo": is_repo_name, "ref": is_ref}, {}
    for name, _, text in (part.partition("=") for part in query.split("&")):
        if name not in ("repo", "ref", "update", "wait"):
            continue  # a URL in the master's list may have a query of its own
        if name in values:
            raise Refusal(400, "'%s' is given twice" % name)
        values[name] = unquote(text, errors="replace")  # U+FFFD is printable, hence:
        if "\ufffd" in values[name] or not checks.get(name, NUMBER_RE.fullmatch)(values[name]):
            raise Refusal(400, "bad '%s'" % name)
    return values


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves one connection in a thread of its own; Server ends it when its peer is too slow."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # a request without a version gets a whole answer too
    server_version, sys_version = "server-update", VERSION
    timeout = SEND_TIMEOUT_S
    disable_nagle_algorithm = True
    rbufsize, wbufsize = 512, 2048  # one write an answer; small, as there may be 256 of them

    def setup(self):
        self.accepted = self.request
        if self.server.tls:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True,
                                                       do_handshake_on_connect=False)
            self.note_waiting()
            self.request.settimeout(HEADER_TIMEOUT_S)
            self.request.do_handshake()
        super().setup()
        self.input = self.rfile

    def note_waiting(self, is_waiting=True):
        self.server.note(self.accepted, self.request, is_waiting)

    def handle_one_request(self):
        """Reads one request and answers it."""
        self.close_connection = has_more = True
        self.requestline = self.request_version = self.command = ""
        self.note_waiting()
        try:
            if not self.read_head() or not self.parse_request():
                return
            self.note_waiting(False)
            has_more = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
            self.close_connection |= (has_more or self.request_version == "HTTP/1.0"
                                      or self.server.slave.stopping.is_set())
            self.answer()
        except Refusal as refusal:
            status, text, *headers = refusal.args
            self.close_connection |= has_more
            self.server.log_refusal("refused with %d from %s: %s: %s" % (
                status, self.client_address[0], text, self.requestline[:200]))
            self.send(status, {"error": text}, *headers)
        self.wfile.flush()
        if has_more:
            self.drop_rest()

    def read_head(self):
        """Reads a whole header, for parse_request; False where the peer leaves before its end."""
        lines, left = [], MAX_LINE_BYTES + MAX_HEADER_BYTES
        while not lines or lines[-1].strip(b"\r\n"):
            lines.append(self.input.readline(MAX_LINE_BYTES + 1))
            left -= len(lines[-1])
            if len(lines[-1]) > MAX_LINE_BYTES or left < 0:
                raise Refusal(414 if len(lines) == 1 else 431, "request line or header too long")
        self.raw_requestline, self.rfile = lines[0], io.BytesIO(b"".join(lines[1:]))
        return lines[-1] != b""

    def drop_rest(self):
        """Reads some of what nobody wants, as closing at once could take back the answer."""
        self.note_waiting()
        socket.socket.shutdown(self.request, socket.SHUT_WR)
        self.request.settimeout(1)
        self.input.read(MAX_HEADER_BYTES)

    def send_error(self, code, message=None, explain=None):
        """What http.server itself refuses; its messages quote the request, so they go nowhere."""
        raise Refusal(code, http.HTTPStatus(code).phrase.lower())

    def handle_expect_100(self):
        return True  # go on without a word: a body is not wanted

    def log_message(self, *args):
        pass  # see log()

    def answer(self):
        """Answers the request that parse_request has read; Refusal where there is no answer."""
        guard = self.server.guard
        guard.check_address(self.client_address[0])
        if self.command not in ("GET", "HEAD"):
            raise Refusal(405, "only GET and HEAD", ("Allow", "GET, HEAD"))
        target = self.requestline.split()[1]  # as it was sent and signed
        path, _, query = re.sub("^https?://[^/?]*", "", target, flags=re.I).partition("?")
        if path == "/healthz":
            self.send(200, "ok")
        elif path in ("", "/") and not re.search("(^|&)repo(=|&|$)", query):
            self.answer_front()
        else:
            signatures = self.headers.get_all("X-Server-Update-Signature", [])
            signed = guard.check_signature(signatures, self.command, target, time.time())
            values = parse_query(query)
            if "repo" in values:
                guard.check_repo(values["repo"])
            if path in ("", "/", "/get", "/get/"):
                self.answer_signal(signed, **values)
            elif path == "/status":
                self.answer_status(**values)
            else:
                raise Refusal(404, "no such path")

    def answer_signal(self, signed, repo=None, ref=None, **_):
        if self.command != "GET":
            raise Refusal(405, "only GET starts an update", ("Allow", "GET"))
        if repo is None:
            raise Refusal(400, "no 'repo'")
        record = self.server.slave.take_signal(repo, ref, signed, self.client_address[0])
        location = "/status?repo=%s&update=%d" % (repo, record.update)
        self.send(202, {"repo": repo, "update": record.update, "state": record.state, "ref": ref},
                  ("Location", location))

    def answer_status(self, repo=None, update=0, wait=0, **_):
        slave = self.server.slave
        if repo is None:
            repos = {name: slave.status(name) for name in sorted(slave.journal.records.copy())}
            self.send(200, {"version": VERSION, "repos": repos})
            return
        told = slave.status(repo, int(update), min(int(wait), MAX_WAIT_S))
        if not told:
            raise Refusal(404, "no such update was asked for here")
        self.send(200, told)

    def answer_front(self):
        """Sends the served file, as it is now."""
        path = self.server.served_file
        if not path:
            self.send(200, "a server-update slave: /?repo=NAME starts an update, /status tells "
                      "what is live")
            return
        if not os.path.isfile(path):
            raise Refusal(404, "the served file does not exist now")
        if not os.access(path, os.R_OK):
            raise Refusal(403, "the served file may not be read by the slave's user")
        self.close_connection = True  # should the file grow, what is too much is not read
        self.note_waiting()
        handle = self.send_head()
        if handle:
            with handle:
                if self.command == "GET":
                    shutil.copyfileobj(handle, self.wfile)

    def translate_path(self, path):
        return self.server.served_file

    def send(self, status, value, *headers):
        """Sends a text, or anything else as JSON."""
        is_text = isinstance(value, str)
        body = (value if is_text else json.dumps(value)).encode("ascii") + b"\n"
        self.send_response(status)
        for name, text in (("Content-Type", "text/plain" if is_text else "application/json"),
                           ("Content-Length", str(len(body)))) + headers:
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self):
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        super().end_headers()


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections; of too many the one that has waited longest for its peer gives way."""

    daemon_threads = True
    allow_reuse_port = False  # a second slave on the same port is a mistake
    request_queue_size = 1024
    server_bind = socketserver.TCPServer.server_bind  # HTTPServer's looks up a name

    def __init__(self, slave, guard, served_file):
        """Listens as the settings say; Mistake where it can't."""
        self.slave, self.guard, self.served_file = slave, guard, served_file
        self.connections = {}  # {accepted socket: (the socket now in use, waits since or None)}
        self.lock, self.second, self.refusals = threading.Lock(), 0, 0
        self.read_certificate()
        bind, port = slave.settings["BIND"], slave.settings["PORT"]
        address = bind or ("::" if os.path.exists("/proc/net/if_inet6") else "0.0.0.0")
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            super().__init__((address, port), functools.partial(Handler, directory="/"))
        except OSError as error:
            raise Mistake("can't listen on port %d of %s: %s (see PORT and BIND)" % (
                port, bind or "any address", error.strerror), 1)

    def read_certificate(self):
        """Makes ready for TLS, where there is a certificate; Mistake where that is no good."""
        cert, key = self.slave.settings["TLS_CERT"], self.slave.settings["TLS_KEY"]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            if cert:
                context.load_cert_chain(cert, key, password=lambda: "")  # it must never ask
        except (OSError, ValueError) as error:
            raise Mistake("bad TLS_CERT '%s' or TLS_KEY '%s': %s" % (cert, key or cert, error), 2)
        self.tls = context if cert else None

    def service_actions(self):
        """Called twice a second at least: ends connections that are late, starts what waits."""
        late = time.monotonic() - HEADER_TIMEOUT_S
        with self.lock:
            for accepted, (_, since) in list(self.connections.items()):
                if since and since < late:
                    self.drop(accepted)
        self.slave.start_queued()

    def process_request(self, request, client_address):
        """Has a new connection served in a thread of its own; where need be another one ends."""
        with self.lock:
            if len(self.connections) >= MAX_CONNECTIONS:
                waiting = {accepted: since for accepted, (_, since) in self.connections.items()
                           if since}
                if waiting:
                    self.drop(min(waiting, key=waiting.get))
            self.connections[request] = (request, time.monotonic())
        peer = client_address[0].replace("::ffff:", "")  # IPv4 in IPv6's clothes
        super().process_request(request, (peer, client_address[1]))

    def note(self, accepted, current, is_waiting):
        """A connection waits for its peer from now on, by way of socket `current`, or does not."""
        with self.lock:
            if accepted in self.connections:
                self.connections[accepted] = (current, time.monotonic() if is_waiting else None)

    def drop(self, accepted):
        """Ends a connection; its thread finds no more to read, or that it can't write."""
        current, _ = self.connections.pop(accepted)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(current, socket.SHUT_RDWR)  # ssl's own is not for two threads

    def shutdown_request(self, request):
        with self.lock:
            self.connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """What a connection ended with: mostly its peer's doing, which is nobody's concern."""
        error = sys.exc_info()[1]
        if isinstance(error, ssl.SSLError):
            self.log_refusal("no TLS with %s: %s" % (client_address[0], error))
        elif not isinstance(error, OSError):
            log("internal error, in a request by %s: %r" % (client_address[0], error))

    def log_refusal(self, text):
        """Logs MAX_REFUSALS_LOGGED lines a second, then only how many more there were."""
        with self.lock:
            if self.second != int(time.time()):
                if self.refusals > MAX_REFUSALS_LOGGED:
                    log("%d more requests refused" % (self.refusals - MAX_REFUSALS_LOGGED))
                self.second, self.refusals = int(time.time()), 0
            self.refusals += 1
            if self.refusals <= MAX_REFUSALS_LOGGED:
                log(text)


# -- the start ----------------------------------------------------------------------------------

def serve(server):
    """Serves until SIGTERM or SIGINT, and then until no update runs."""
    settings, (signals, wakeup) = server.slave.settings, os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)  # wakes main whichever thread the kernel gives the signal to
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None)
    server.slave.resume()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    log("slave.py %s puts clones live in %s, with %s" % (
        VERSION, settings["REPOS_DIR"], server.slave.command))
    log("listening on port %d (%s%s)" % (server.server_address[1], settings["BIND"] or
                                         "all addresses", ", TLS" if server.tls else ""))
    while os.read(signals, 1)[0] == signal.SIGHUP:
        try:
            server.read_certificate()
            log("the TLS certificate is read again (SIGHUP)")
        except Mistake as mistake:
            log("the TLS certificate stays as it was (SIGHUP): %s" % mistake.args[0])
    log("stopping")
    server.slave.stop()
    server.shutdown()
    log("stopped")


def run(options):
    """Starts all parts and blocks until the slave is to end; Mistake where it can't start."""
    settings = read_settings(os.environ, options)
    guard, served_file = Guard(settings), options["FILE"] and os.path.abspath(options["FILE"])
    if served_file and os.path.isdir(served_file):
        raise Mistake("'%s' is a folder, not a file to serve" % served_file, 2)
    beside = os.path.dirname(os.path.abspath(__file__))
    command = shutil.which("slave-activate", path=os.pathsep.join(
        [os.environ.get("PATH", os.defpath), beside, "/bin"]))
    if not command:
        raise Mistake("no slave-activate on PATH, in '%s' or in /bin" % beside, 1)
    threading.stack_size(2 << 20)  # glibc keeps 40 MB of used stacks: better a few large ones
    server = Server(Slave(settings, command), guard, served_file)
    if not guard.secrets:
        log("no secret: who can reach the port can have repositories of %s updated here; to "
            "change that, put one into %s" % (settings["BASE_URL"], guard.path))
    serve(server)


def parse_args(argv):
    """{option or "FILE": text or None}."""
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="slave.py", usage="slave.py [options] [FILE]", allow_abbrev=False,
        description=about.partition(": ")[2], epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("FILE", nargs="?", help="serve this file at /")
    for key, (default, _, text) in SETTINGS.items():
        name = option_name(key)
        parser.add_argument(name, dest=name, metavar=key,
                            help=text + (" (%s)" % default if default else ""))
    parser.add_argument("--version", action="version", version="slave.py " + VERSION)
    return vars(parser.parse_args(argv))


def main(argv=None):
    try:
        run(parse_args(argv))
    except Mistake as mistake:
        print("slave.py: %s" % mistake.args[0], file=sys.stderr)
        return mistake.args[1]
    return 0


if __name__ == "__main__":
    sys.exit(main())
