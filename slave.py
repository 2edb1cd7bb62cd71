#!/usr/bin/env python3
"""slave.py [FILE]: takes server-update's signals and has slave-activate put fresh clones live.

    slave.py                                     listen on port 9999
    slave.py ~/repos/site/index.html             the same, and serve that file at /
    GET /?repo=NAME[&ref=REF]                    start an update: 202 and its id, as JSON
    GET /status[?repo=NAME[&update=ID&wait=S]]   what is live, and how updates ended
    GET /healthz                                 200 once it serves

Settings: KEY=value lines in /etc/server-update/slave.conf, SERVER_UPDATE_KEY variables, options;
the last of these wins. SIGHUP reads the TLS certificate again. Exit status: 0 stopped by SIGTERM
or SIGINT, 1 could not start, 2 usage or settings.
"""

import argparse
import contextlib
import fcntl
import fnmatch
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
import ssl
import subprocess
import sys
import threading
import time
from collections import deque, namedtuple
from queue import Empty, SimpleQueue
from types import SimpleNamespace
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
HEADER_TIMEOUT_S = 10  # for a TLS handshake and a whole request header
SEND_TIMEOUT_S = 30  # for a peer to take anything
MAX_LINE_BYTES = 8192  # of a request, and of what slave-activate says
MAX_HEADER_BYTES = 16384
MAX_CONNECTIONS = 256
MAX_WAIT_S = 30
IDLE_S = 0.1  # a thread that has no connection to serve for so long ends
MAX_CLOCK_DIFFERENCE_S = 300
MAX_NONCES = 65536
RETRY_LATER = ("Retry-After", "2")
HASH_RE = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SIGNATURE_RE = re.compile(r"t=([0-9]{1,12}),n=([0-9a-f]{32}),s=([0-9a-f]{64})")
OUTPUT_KINDS = ("slave-activate: ", "fatal: ", "error: ", "")  # what tells most comes first

# One update: /status tells the first ten, times in seconds since 1970; clean stops are no tries.
Record = namedtuple("Record", "repo update ref state requested started finished commit previous "
                    "message tries", defaults=(None, None, None, None, "", 0))

# shared with server-update: keep identical
NAME_RE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
REF_BAD_RE = re.compile(r"[ ~^:?*\[\\]|\.\.|@\{|//|(^|/)\.|^[-/]|[/.]$|\.lock(/|$)|^@$")
MAX_REF_CHARS = 255
MIN_SECRET_BYTES = 16


def is_repo_name(text):
    """Whether `text` can name a repository: nothing that leads out of the repositories' folder."""
    return bool(NAME_RE.fullmatch(text) and ".." not in text
                and not text.endswith((".git", ".lock")))


def is_ref(text):
    """Whether `text` can be a branch, tag or commit: see git-check-ref-format(1), one level."""
    return 0 < len(text) <= MAX_REF_CHARS and text.isprintable() and not REF_BAD_RE.search(text)


def sign(secret, method, target, when, nonce):
    """The signature of a request, in hex; `secret` is bytes, all else the text as it is sent."""
    lines = "\n".join(("server-update-1", method, target, when, nonce))
    return hmac.new(secret, lines.encode("iso-8859-1"), "sha256").hexdigest()


def read_secrets(path):
    """The lines of a secret file: the first signs, any verifies. Raises ValueError or OSError."""
    with open(path, "rb") as handle:
        mode, lines = os.fstat(handle.fileno()).st_mode, handle.read(65536).splitlines()
    secrets = [line.strip() for line in lines if line.strip()]
    if mode & 0o077:
        raise ValueError("others can read secret file '%s'; do: chmod 600 %s" % (path, path))
    if not secrets or min(map(len, secrets)) < MIN_SECRET_BYTES:
        raise ValueError("secret file '%s' has %s; do: (umask 077; openssl rand -hex 32 >%s)" % (
            path, "a line of less than 16 bytes" if secrets else "no secret in it", path))
    return secrets
# end of shared block


class Refusal(Exception):
    """A request that gets an error for its answer: HTTP status, text, further headers."""

def escape(text):
    """`text` with all that could move a cursor or begin a line written as an escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
                   for char in text)

def log(text, *values):
    """Writes a line to stderr, in one write, so that the lines of threads never mix."""
    line = time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) + escape(text % values) + "\n"
    with contextlib.suppress(OSError):  # nobody reads the log: no reason to stop updating
        os.write(2, line.encode("utf-8", "backslashreplace"))

MAPPED_RE = re.compile(r"(?<![0-9a-f:.])::ffff:(?=[0-9]+\.)", re.I)  # IPv4 as IPv6: RFC 4291
PATH = "/.*"
PORT = "[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
parse_words = re.compile(r"[^\s,]+").findall
SETTINGS = {  # KEY: default, pattern and reader of a value, help
    "BASE_URL": ("https://github.com/aiegoo", r"/\S*|[^-:\s]\S*:\S+", lambda url: url.rstrip("/"),
                 "URL or path: clones are made of BASE_URL/NAME.git"),
    "REPOS_DIR": ("~/repos", PATH, str, "folder where the clones go live"),
    "HOOKS_DIR": ("/etc/server-update/hooks", PATH, str, "has pre-update and post-update"),
    "PORT": ("9999", PORT, int, "0 takes a free one"),
    "BIND": ("", ".+", ipaddress.ip_address, "address to listen on, else all"),
    "TIMEOUT": ("600", "[1-9][0-9]{0,5}", int, "seconds for an update"),
    "SUBMODULES": ("yes", "yes|no", str, "yes or no: clone them"),
    "SECRET_FILE": ("", PATH, str, "shared secret, else %s if it exists" % SECRET_FILE),
    "ALLOW_FROM": ("", r".*[^\s,].*", lambda text: [*map(ipaddress.ip_network, parse_words(
        MAPPED_RE.sub("", text)))], "addresses and networks that may ask, else all"),
    "ALLOW_REPOS": ("", r"(?=.*[^ ,])[]A-Za-z0-9._*?[!, -]+", parse_words,
                    "globs of repositories that may be updated, else all"),
    "TLS_CERT": ("", PATH, str, "certificate chain (PEM): serve https"),
    "TLS_KEY": ("", PATH, str, "its key, where that is not in TLS_CERT"),
}

def parse_setting(key, text, before, after):
    """A setting's value, its default where `text` is empty; `before` and `after` say where."""
    default, pattern, read, _ = SETTINGS[key]
    full = os.path.expanduser(text or default) if pattern == PATH else text or default
    try:
        if full and not (full.isprintable() and re.fullmatch(pattern, full)):
            raise ValueError
        return read(full) if full else None
    except ValueError:
        raise ValueError("%sbad %s '%s'%s" % (before, key, escape(text or default), after))

def read_settings(environ, options):
    """{KEY: value}: options win over SERVER_UPDATE_*, these over the file; ValueError, OSError."""
    found = dict.fromkeys(SETTINGS, ("", "", ""))  # a text, and what goes around a complaint
    path = environ.get("SERVER_UPDATE_CONF") or CONF_FILE
    if path != CONF_FILE or os.path.exists(path):
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(map(str.strip, lines), 1):
                where = "%s:%d: " % (path, number)
                key, equals, text = map(str.strip, line.partition("="))
                if line and line[0] != "#":  # text, which is never run
                    if not equals or key not in SETTINGS:
                        raise ValueError("%s%s '%s'" % (
                            where, "unknown setting" if equals else "no '=' in", escape(key)))
                    found[key] = (re.sub("^(['\"])(.*)\\1$", "\\2", text), where, "")
                    parse_setting(key, *found[key])
    for source, to_name in ((environ, "SERVER_UPDATE_{}".format), (options, option_name)):
        for key, name in ((key, to_name(key)) for key in SETTINGS if source.get(to_name(key))):
            found[key] = (source[name].strip(), "", " (set by %s)" % name)
    values = {key: parse_setting(key, *found[key]) for key in SETTINGS}
    if values["TLS_KEY"] and not values["TLS_CERT"]:
        raise ValueError("TLS_KEY is set, but TLS_CERT is not")
    return values

def option_name(key):
    return "--" + key.lower().replace("_", "-")

class Records(namedtuple("Records", "ended running queued", defaults=((), None, None))):
    """What is remembered of one repository's updates, oldest first; nothing here changes it."""

    def all(self):
        return self.ended + tuple(filter(None, (self.running, self.queued)))

    def find(self, update=0):
        """The record of an update, or of the newer one in its place; the newest where it is 0."""
        found = [record for record in self.all() if record.update >= update]
        return found[0 if update else -1] if found else None

    def accept(self, repo, ref, now):
        """An update is queued, in place of one that is. Ids are ms since 1970, and grow."""
        newest = self.find()
        update = max(int(now * 1000), newest.update + 1 if newest else 1)
        return self._replace(queued=Record(repo, update, ref, "queued", now,
                                           commit=newest and newest.commit))

    def start(self, live, now):
        begun = self.queued._replace(state="running", started=now, commit=live, previous=live,
                                     tries=self.queued.tries + 1)
        return self._replace(running=begun, queued=None)

    def finish(self, now, **changes):
        done = self.running._replace(finished=now, **changes)
        return self._replace(ended=(self.ended + (done,))[-MAX_ENDED:], running=None)

    def interrupt(self, is_clean, now):
        """The slave ends, or has ended, under the running update: it or a newer one is queued."""
        again = self.running
        if again.tries >= MAX_TRIES and not is_clean:
            return self.finish(now, state="failed", message="interrupted three times by the "
                               "slave's own end; signal again for another try")
        again = again._replace(state="queued", started=None, tries=again.tries - is_clean)
        return self._replace(queued=self.queued or again, running=None)

    def encode(self):
        *earlier, newest = [record._asdict() for record in self.all()]
        return json.dumps(dict(newest, earlier=earlier)).encode("ascii") + b"\n"

def decode_records(repo, data):
    """What Records.encode made; ValueError, TypeError or AttributeError for anything else."""
    newest, found = json.loads(data.decode("utf-8")), []
    for fields in newest.get("earlier", []) + [newest]:
        record = Record(**{key: fields[key] for key in Record._fields if key in fields})
        numbers = (record.requested, record.started or 0, record.finished or 0, record.update,
                   record.tries)
        states = ("live", "failed") if record.finished else ("queued", "running")
        commits = filter(None, (record.commit, record.previous))
        if (record.repo != repo or not is_repo_name(repo) or not is_ref(record.ref or "x")
                or record.state not in states or not isinstance(record.message, str)
                or not all(0 <= number < 1e15 for number in numbers)  # nor NaN
                or not all(map(HASH_RE.fullmatch, commits))):
            raise ValueError("not a record of an update")
        found.append(record._replace(update=int(record.update)))
    records = Records(tuple(record for record in found if record.finished),
                      **{record.state: record for record in found if not record.finished})
    if [one.update for one in records.all()] != sorted({one.update for one in found}):
        raise ValueError("updates out of order")
    return records

class Journal:
    """The records of all repositories, {repo: Records}, in memory and on disk."""

    def __init__(self, folder):
        """Reads the state folder and takes it for this process alone; OSError where it can't."""
        self.folder, self.beside, self.records = folder, os.path.join(folder, "record.tmp"), {}
        self.changes, self.writing = deque(), threading.Lock()
        self.changed = threading.Condition()  # told after each change
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self.folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self.folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError("another slave.py works in '%s'" % folder)
        open(self.beside, "wb").close()  # can it be written?
        os.unlink(self.beside)
        for repo in [name[:-5] for name in os.listdir(folder) if name.endswith(".json")]:
            path = os.path.join(folder, repo + ".json")
            try:
                with open(path, "rb") as handle:
                    self.records[repo] = decode_records(repo, handle.read())
            except Exception as error:  # whatever it is, it must not stop the others
                log("%s is broken, kept as %s.json.broken: %r", path, repo, error)
                os.rename(path, path + ".broken")

    def commit(self, repo, method, *args, must_keep=False, **kwargs):
        """Applies a method of Records; the result, once it is on disk, or OSError if it can't be.

        One thread writes, in one go, what all have come with."""
        change = SimpleNamespace(repo=repo, must_keep=must_keep, is_done=False)
        change.apply = lambda records: method(records, *args, **kwargs)
        self.changes.append(change)
        with self.writing:
            if not change.is_done:  # else who held the lock before has written it with its own
                self.write([self.changes.popleft() for _ in range(len(self.changes))])
        if change.error:
            raise change.error
        return change.result

    def write(self, changes):
        """Writes a batch of changes, each repository's file once."""
        after, failure = self.apply(changes), None
        try:
            for repo in after:
                self.save(repo, after[repo])
            os.fsync(self.folder_fd)
        except OSError as error:
            failure = error
            with contextlib.suppress(OSError):
                os.unlink(self.beside)
            log("can't write in %s: %s", self.folder, error.strerror)
            after = self.apply([change for change in changes if change.must_keep])
        self.records.update(after)
        for change in changes:
            change.is_done, change.error = True, None if change.must_keep else failure
        with self.changed:
            self.changed.notify_all()

    def apply(self, changes):
        after = {}
        for change in changes:
            before = after.get(change.repo) or self.records.get(change.repo) or Records()
            after[change.repo] = change.result = change.apply(before)
        return after

    def save(self, repo, records):
        """Puts one file in its place, whole or not at all; its folder is synced later."""
        with open(self.beside, "wb") as handle:
            handle.write(records.encode())
            handle.flush()
            os.fsync(handle.fileno())
        os.rename(self.beside, os.path.join(self.folder, repo + ".json"))

def read_live_commit(tree):
    """The commit that is checked out in a clone, or None where its plain files don't tell."""
    text = "ref: HEAD"
    with contextlib.suppress(OSError, ValueError):
        for _ in range(3):  # HEAD, the branch, or that by way of another
            if text.startswith("ref: "):
                with open(os.path.join(tree, ".git", text[len("ref: "):])) as handle:
                    text = handle.read().strip()
    return text if HASH_RE.fullmatch(text) else None

def log_stderr(repo, stream, said):
    """Logs what a run says; `said` gets the last line of each kind."""
    with stream:
        for line in iter(lambda: stream.readline(MAX_LINE_BYTES), b""):
            text = line.decode("utf-8", "replace").rstrip()
            log("%s: %s", repo, text)
            kind = next(kind for kind in OUTPUT_KINDS if text.startswith(kind))
            said[kind] = text[len(kind):] or said.get(kind, "")

def signal_group(run, number):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, number)

def wait_for(run, timeout_s, stop):
    """Blocks until a run has ended; its stdout, and "timeout" or "stop" if that was by force."""
    force_at, why = time.monotonic() + timeout_s, None
    while run.poll() is None:
        is_late = time.monotonic() >= force_at
        if is_late or (stop.is_set() and not why):
            signal_group(run, signal.SIGKILL if why else signal.SIGTERM)
            why = why or ("timeout" if is_late else "stop")
            force_at = time.monotonic() + KILL_AFTER_S
        time.sleep(POLL_S)
    os.set_blocking(run.stdout.fileno(), False)
    with run.stdout as stdout:
        return stdout.read() or b"", why

def judge(repo, status, stdout, said, late_after_s=None):
    """How a run of slave-activate ended, as changes to its record; `said` is log_stderr's."""
    match = re.fullmatch(r"%s ([0-9a-f]{40,64}|-) ([0-9a-f]{40,64}|-)\n" % re.escape(repo),
                         stdout.decode("ascii", "replace"))
    line = next((said[kind] for kind in OUTPUT_KINDS if kind in said), "")
    if late_after_s:
        line = "stopped as it took longer than %d s (TIMEOUT)%s" % (
            late_after_s, line and ", and had said: " + line)
    elif status == 0:
        line = "" if match else "slave-activate did not say which commit is live"
    message = escape(line or status and "slave-activate ended with exit status %d" % status or "")
    if not match or (status not in (0, 3) and not late_after_s):
        return {"state": "failed", "message": message[:300]}
    commit, previous = (None if text == "-" else text for text in match.groups())
    return {"state": "live", "message": message[:300], "commit": commit, "previous": previous}

class Guard:
    """Who may ask for what: by signature, address and repository. All checks raise Refusal."""

    def __init__(self, settings):
        self.settings, self.path = settings, settings["SECRET_FILE"] or SECRET_FILE
        self.lock, self.nonces, self.secrets = threading.Lock(), {}, []  # {nonce: its time}
        if settings["SECRET_FILE"] or os.path.exists(self.path):
            self.secrets = read_secrets(self.path)

    def check_signature(self, values, method, target, now):
        """Only who knows the secret is told what is wrong with `values`, those of its header."""
        with contextlib.suppress(OSError, ValueError):  # a secret never goes away by accident
            self.secrets = read_secrets(self.path)
        if not self.secrets and not os.path.exists(self.path):  # one that is no good: nobody may
            return
        match = SIGNATURE_RE.fullmatch(values[0]) if len(values) == 1 else None
        when, nonce, mac = match.groups() if match else ("0", "", "")
        if not any(hmac.compare_digest(sign(secret, method, target, when, nonce), mac)
                   for secret in self.secrets):
            raise Refusal(401, "signature missing or wrong")
        if abs(now - int(when)) > MAX_CLOCK_DIFFERENCE_S:
            raise Refusal(401, "the clocks are %d s apart" % abs(now - int(when)))
        with self.lock:  # a nonce is remembered for as long as its time is near enough
            if len(self.nonces) >= MAX_NONCES:
                self.nonces = {key: self.nonces[key] for key in self.nonces
                               if self.nonces[key] >= now - MAX_CLOCK_DIFFERENCE_S}
            if len(self.nonces) >= MAX_NONCES:
                raise Refusal(503, "too many signed requests", RETRY_LATER)
            if bytes.fromhex(nonce) in self.nonces:
                raise Refusal(401, "signature missing or wrong")
            self.nonces[bytes.fromhex(nonce)] = int(when)

    def check_address(self, text):
        networks, address = self.settings["ALLOW_FROM"], ipaddress.ip_address(text.split("%")[0])
        if networks and not any(address in network for network in networks):
            raise Refusal(403, "not from this address")

    def check_repo(self, repo):
        globs = self.settings["ALLOW_REPOS"] or ["*"]
        if not any(fnmatch.fnmatchcase(repo, glob) for glob in globs):
            raise Refusal(403, "not an allowed repository")

class Slave:
    """Takes signals, runs the updates that they ask for, and knows how these ended."""

    def __init__(self, settings, command):
        """What was queued or running when the slave ended is queued again; OSError: can't."""
        self.settings, self.command, self.stopping = settings, command, threading.Event()
        self.lock, self.queued, self.running = threading.Lock(), {}, {}
        self.repos = settings["REPOS_DIR"]
        self.journal = Journal(os.path.join(self.repos, ".server-update"))
        self.environ = dict(os.environ, **{"SERVER_UPDATE_" + key: settings[key] for key in (
            "BASE_URL", "REPOS_DIR", "HOOKS_DIR", "SUBMODULES")})
        for repo, records in sorted(self.journal.records.items()):
            if records.running:
                records = self.record(repo, Records.interrupt, False)
            if records.queued:
                log("%s: update %d is taken up again", repo, records.queued.update)
                self.queued[repo] = True

    def record(self, repo, method, *args, **kwargs):
        return self.journal.commit(repo, method, *args, time.time(), must_keep=True, **kwargs)

    def take_signal(self, repo, ref, peer):
        """Queues an update; its record, which is on disk then, or a Refusal."""
        if self.stopping.is_set():
            raise Refusal(503, "this slave is stopping", RETRY_LATER)
        if repo not in self.queued and len(self.queued) >= MAX_QUEUED:
            raise Refusal(503, "too many updates are queued", RETRY_LATER)
        try:
            record = self.journal.commit(repo, Records.accept, repo, ref, time.time()).queued
        except OSError as error:
            raise Refusal(503, "can't record the update: %s" % error.strerror, RETRY_LATER)
        log("%s: update %d was asked for by %s", repo, record.update, peer)
        with self.lock:
            self.queued[repo] = True
        self.start_queued()
        return record

    def start_queued(self):
        """Starts what has waited longest, as far as there is room; the rest stays queued."""
        with self.lock:
            for repo in [repo for repo in self.queued if repo not in self.running]:
                if len(self.running) < MAX_RUNNING and not self.stopping.is_set():
                    thread = threading.Thread(target=self.run_update, args=(repo,), daemon=True)
                    with contextlib.suppress(RuntimeError):  # no thread: service_actions comes
                        thread.start()
                        self.running[repo] = thread
                        del self.queued[repo]

    def run_update(self, repo):
        try:
            if self.journal.records[repo].queued:
                live = read_live_commit(os.path.join(self.repos, repo))
                self.activate(repo, self.record(repo, Records.start, live).running)
        finally:
            with self.lock:
                del self.running[repo]
            self.start_queued()

    def activate(self, repo, record):
        """Runs slave-activate; how it ended is recorded before what it left is ended."""
        log("%s: update %d starts, ref %s", repo, record.update, record.ref or "not given")
        try:
            run = subprocess.Popen(
                [self.command, repo] + ([record.ref] if record.ref else []), env=self.environ,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True)
        except OSError as error:
            self.end_update(repo, state="failed", message="can't run %s" % error)
            return
        said = {}
        reader = threading.Thread(target=log_stderr, args=(repo, run.stderr, said), daemon=True)
        reader.start()
        stdout, why = wait_for(run, self.settings["TIMEOUT"], self.stopping)
        signal_group(run, signal.SIGTERM)  # what it left
        reader.join(LEFTOVER_S)
        if why == "stop" and run.returncode != 0:
            self.record(repo, Records.interrupt, True)
            log("%s: update %d stopped, to be taken up again", repo, record.update)
        else:
            self.end_update(repo, **judge(repo, run.returncode, stdout, said,
                                          why == "timeout" and self.settings["TIMEOUT"]))
        signal_group(run, signal.SIGKILL)

    def end_update(self, repo, **changes):
        if changes["state"] == "failed":
            changes["commit"] = read_live_commit(os.path.join(self.repos, repo))
        done = self.record(repo, Records.finish, **changes).ended[-1]
        log("%s: update %d %s after %.1f s, live is %s%s", repo, done.update, done.state,
            done.finished - done.started, done.commit, done.message and ": " + done.message)

    def stop(self):
        """Blocks until no update runs: those that did are stopped and queued again."""
        self.stopping.set()
        with self.journal.changed:
            self.journal.changed.notify_all()
        for thread in list(self.running.values()):
            thread.join()

    def status(self, repo, update=0, wait_s=0):
        """What /status tells of an update, or None; waits `wait_s` at most until it has ended."""
        def look():
            return self.journal.records.get(repo, Records()).find(update)
        with self.journal.changed:
            self.journal.changed.wait_for(
                lambda: not look() or look().finished or self.stopping.is_set(), wait_s)
        record, tree = look(), os.path.join(self.repos, repo)
        if record and record is self.journal.records[repo].find():
            live = read_live_commit(tree)  # somebody may have put it live by hand
            record = record._replace(commit=live) if live or not os.path.exists(tree) else record
        return record and dict(zip(Record._fields[:10], record))

def parse_query(query):
    """{name: value} of the parameters that mean something here; Refusal where they are bad."""
    whole, values = re.compile("[0-9]{1,15}").fullmatch, {}
    checks = {"repo": is_repo_name, "ref": is_ref, "update": whole,
              "wait": re.compile(r"[0-9]{1,15}(\.[0-9]+)?").fullmatch}
    for name, _, text in (part.partition("=") for part in query.split("&")):
        if name in values:
            raise Refusal(400, "'%s' is given twice" % name)
        if name in checks:  # a URL in the master's list may have a query of its own
            values[name] = unquote(text, errors="replace")  # U+FFFD is printable, hence:
            if "\ufffd" in values[name] or not checks[name](values[name]):
                raise Refusal(400, "bad '%s'" % name)
    return values

class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves one connection in a thread of its own; Server drops it when its peer is too slow."""
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # a request without a version gets a whole answer too
    server_version, sys_version = "server-update", VERSION
    timeout = SEND_TIMEOUT_S
    disable_nagle_algorithm = True
    rbufsize, wbufsize = 512, 2048  # one write an answer; small, as there may be 256 of them

    def setup(self):
        if self.server.tls:  # the handshake is part of the first read
            self.request = self.server.tls.wrap_socket(self.request, server_side=True,
                                                       do_handshake_on_connect=False)
        super().setup()
        self.input, self.waits_since = self.rfile, time.monotonic()  # None: it is our turn
        self.server.handlers.add(self)

    def finish(self):
        """Closes the connection; what its peer still sends comes first: else it gets no answer."""
        super().finish()
        self.waits_since = time.monotonic()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.request, socket.SHUT_WR)
            self.request.settimeout(1)
            self.request.recv(MAX_HEADER_BYTES)
        self.drop()
        self.request.close()

    def drop(self):
        self.server.handlers.discard(self)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.request, socket.SHUT_RDWR)  # not ssl's: another thread

    def handle_one_request(self):
        """Reads one request and answers it."""
        self.close_connection = True
        self.requestline = self.request_version = self.command = ""
        self.waits_since = time.monotonic()
        try:
            if not self.read_head() or not self.parse_request():
                return
            self.waits_since = None
            has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
            self.close_connection |= has_body or self.request_version == "HTTP/1.0"
            self.answer(self.requestline.split()[1])
        except Refusal as refusal:
            status, text, *headers = refusal.args
            log("refused with %d from %s: %s: %s", status, self.client_address[0], text,
                self.requestline[:200])
            self.send(status, {"error": text}, *headers)
        self.wfile.flush()

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

    def send_error(self, code, message=None, explain=None):
        """What http.server itself refuses; its messages quote the request, so they go nowhere."""
        raise Refusal(code, http.HTTPStatus(code).phrase.lower())

    def log_message(self, *args):
        return True  # see log()
    handle_expect_100 = log_message  # go on without a word: a body is not wanted

    def answer(self, target):
        """Answers the request for `target`, as it was sent; Refusal where there is no answer."""
        self.server.guard.check_address(self.client_address[0])
        if self.command not in ("GET", "HEAD"):
            raise Refusal(405, "only GET and HEAD", ("Allow", "GET, HEAD"))
        path, _, query = re.sub("^https?://[^/?]*", "", target, flags=re.I).partition("?")
        if path == "/healthz":
            self.send(200, "ok")
        elif path in ("", "/") and not re.search("(^|&)repo(=|&|$)", query):
            self.answer_front(self.server.served_file)
        else:
            signatures = self.headers.get_all("X-Server-Update-Signature", [])
            self.server.guard.check_signature(signatures, self.command, target, int(time.time()))
            values = parse_query(query)
            if "repo" in values:
                self.server.guard.check_repo(values["repo"])
            if path == "/status":
                self.answer_status(**values)
            elif path in ("", "/", "/get", "/get/"):
                self.answer_signal(**values)
            else:
                raise Refusal(404, "no such path")

    def answer_signal(self, repo=None, ref=None, **_):
        if self.command != "GET":
            raise Refusal(405, "only GET starts an update", ("Allow", "GET"))
        if repo is None:
            raise Refusal(400, "no 'repo'")
        record = self.server.slave.take_signal(repo, ref, self.client_address[0])
        self.send(202, {"repo": repo, "update": record.update, "state": record.state, "ref": ref},
                  ("Location", "/status?repo=%s&update=%d" % (repo, record.update)))

    def answer_status(self, repo=None, update=0, wait=0, **_):
        slave, wait_s = self.server.slave, min(float(wait), MAX_WAIT_S)
        if repo is None:
            told = {"version": VERSION, "repos": {
                name: slave.status(name) for name in sorted(slave.journal.records.copy())}}
        else:
            self.waits_since = time.monotonic() + wait_s  # it gives way to others, the last
            told = slave.status(repo, int(update), wait_s)
        if not told:
            raise Refusal(404, "no such update was asked for here")
        self.send(200, told)

    def answer_front(self, path):
        if not path:
            self.send(200, "a server-update slave: /?repo=NAME starts an update")
            return
        if not os.path.isfile(path):
            raise Refusal(404, "the served file does not exist now")
        if not os.access(path, os.R_OK):
            raise Refusal(403, "the served file may not be read by the slave's user")
        self.close_connection = True  # should the file grow, what is too much is not read
        self.waits_since = time.monotonic()
        with self.send_head() or io.BytesIO() as file:
            shutil.copyfileobj(file if self.command == "GET" else io.BytesIO(), self.wfile)

    def translate_path(self, path):
        return self.server.served_file

    def send(self, status, value, *headers):
        is_text = isinstance(value, str)
        body = (value if is_text else json.dumps(value)).encode("ascii") + b"\n"
        self.send_response(status)
        for header in (("Content-Type", "text/plain" if is_text else "application/json"),
                       ("Content-Length", str(len(body)))) + headers:
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self):
        if self.close_connection:
            self.send_header("Connection", "close")
        super().end_headers()

class Server(http.server.ThreadingHTTPServer):
    """Accepts connections; of too many the one that has waited longest for its peer gives way."""
    daemon_threads = True
    allow_reuse_port = False  # a second slave on the same port is a mistake
    request_queue_size = 1024
    server_bind = http.server.socketserver.TCPServer.server_bind  # HTTPServer's looks up a name

    def __init__(self, slave, guard, served_file):
        self.slave, self.guard, self.served_file, self.tls = slave, guard, served_file, None
        self.accepted, self.idle, self.handlers = SimpleQueue(), threading.Semaphore(0), set()
        self.read_certificate()
        address = str(slave.settings["BIND"] or (
            "::" if os.path.exists("/proc/net/if_inet6") else "0.0.0.0"))
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            super().__init__((address, slave.settings["PORT"]), Handler)
        except OSError as error:
            raise OSError("can't listen on port %d of %s: %s (see PORT and BIND)" % (
                slave.settings["PORT"], address, error.strerror))

    def read_certificate(self, *_):
        """Makes ready for TLS, where a certificate is set; the old one stays if it is no good."""
        cert, key = self.slave.settings["TLS_CERT"], self.slave.settings["TLS_KEY"]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            if cert:
                context.load_cert_chain(cert, key, password=lambda: "")  # it must never ask
                self.tls = context
                log("the TLS certificate is read from %s", cert)
        except (OSError, ValueError) as error:
            text = "bad TLS_CERT '%s' or TLS_KEY '%s': %s" % (cert, key or cert, error)
            if not self.tls:
                raise ValueError(text)
            log("the certificate stays what it was: %s", text)

    def service_actions(self):
        """Called twice a second at least: drops connections that are late, starts what waits."""
        late = time.monotonic() - HEADER_TIMEOUT_S
        for handler in list(self.handlers):
            if (handler.waits_since or late) < late:
                handler.drop()
        self.slave.start_queued()

    def process_request(self, request, client_address):
        """Has a thread serve a new connection; where there are too many another one ends."""
        if len(self.handlers) >= MAX_CONNECTIONS:
            waiting = {one: one.waits_since for one in list(self.handlers)}
            min(waiting, key=lambda one: waiting[one] or float("inf")).drop()
        if not self.idle.acquire(blocking=False):  # to start a thread costs half an answer
            threading.Thread(target=self.serve_accepted, daemon=True).start()
        self.accepted.put((request, (MAPPED_RE.sub("", client_address[0]), client_address[1])))

    def serve_accepted(self):
        while True:
            with contextlib.suppress(Empty):
                self.process_request_thread(*self.accepted.get(timeout=IDLE_S))
                if len(self.handlers) > MAX_CONNECTIONS // 8:  # so many would keep much memory
                    return
                self.idle.release()
                continue
            if self.idle.acquire(blocking=False):  # else there is something by now
                return

    def handle_error(self, request, client_address):
        """What a connection ended with: mostly its peer's doing, which is nobody's concern."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) or isinstance(error, ssl.SSLError):
            log("connection of %s: %r", client_address[0], error)

def run(options):
    """Serves until SIGTERM or SIGINT; OSError or ValueError where it can't start."""
    settings = read_settings(os.environ, options)
    guard, served_file = Guard(settings), options["FILE"] and os.path.abspath(options["FILE"])
    if served_file and os.path.isdir(served_file):
        raise ValueError("'%s' is a folder, not a file to serve" % served_file)
    command = shutil.which("slave-activate", path=os.pathsep.join(
        [os.environ.get("PATH", os.defpath), os.path.dirname(os.path.abspath(__file__)), "/bin"]))
    if not command:
        raise OSError("no slave-activate on PATH, beside slave.py or in /bin")
    threading.stack_size(2 << 20)  # glibc keeps 40 MB of used stacks: better a few large ones
    server = Server(Slave(settings, command), guard, served_file)
    if not guard.secrets:
        log("no secret: who can reach the port can have repositories of %s updated here; to "
            "change that, put one into %s", settings["BASE_URL"], guard.path)
    def stop():
        log("stopping")
        server.slave.stop()
        server.shutdown()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=stop).start())
    signal.signal(signal.SIGHUP, server.read_certificate)
    log("clones go live in %s, by %s", settings["REPOS_DIR"], command)
    log("listening on port %d (%s%s)", server.server_address[1],
        settings["BIND"] or "all addresses", ", TLS" if server.tls else "")
    server.serve_forever()

def main(argv=None):
    """Does what the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(
        "slave.py", "slave.py [options] [FILE]", __doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("FILE", nargs="?", help="serve this file at /")
    for key, (default, _, _, text) in SETTINGS.items():
        parser.add_argument(option_name(key), dest=option_name(key), metavar=key,
                            help=text + (" (%s)" % default if default else ""))
    parser.add_argument("--version", action="version", version="slave.py " + VERSION)
    try:
        run(vars(parser.parse_args(argv)))
    except (OSError, ValueError) as error:
        name = getattr(error, "filename", None)
        error_line = "can't use '%s': %s" % (name, error.strerror) if name else error
        print("slave.py: %s" % error_line, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0

if __name__ == "__main__":
    sys.exit(main())
