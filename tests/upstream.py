"""Real git repositories for the tests, by path and over HTTP through git http-backend."""

import base64
import http.server
import os
import socket
import subprocess
import threading
from pathlib import Path

FIRST_COMMIT_S = 1700000000  # commits are a second apart, so that every one has a hash of its own
COPY_BYTES = 64 * 1024


def run_git(*args, cwd=None, text=None, check=True):
    """Run git with `text` (str or bytes) as its stdin; its stdout without the last newline."""
    if isinstance(text, str):
        text = text.encode()
    done = subprocess.run(
        ["git", *map(str, args)],
        cwd=cwd,
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if check and done.returncode:
        raise AssertionError(
            "git %s: %s" % (" ".join(map(str, args)), done.stderr.decode("utf-8", "replace"))
        )
    return done.stdout.decode("utf-8", "replace").rstrip("\n")


class Repo:
    """A bare repository NAME.git; git fast-import makes its commits, without a work tree."""

    def __init__(self, path, branch="main"):
        self.path = Path(path)
        self.commits_made = 0
        run_git("init", "-q", "--bare", self.path)
        self.git("symbolic-ref", "HEAD", "refs/heads/" + branch)

    def git(self, *args, **kwargs):
        """Run git in the bare repository; its stdout."""
        return run_git("--git-dir", self.path, *args, **kwargs)

    def head(self, rev="HEAD"):
        """The full hash that `rev` names."""
        return self.git("rev-parse", "--verify", rev + "^{commit}")

    def commit(self, files=None, message="change", branch=None, parent=None):
        """Commit `files` on `branch` (HEAD's), or on `parent` as a force-push would; its hash.

        files: {path: contents}, contents being str, bytes, None to remove it, or (mode, contents)
        with mode "100755", "120000" (a symlink's target) or "160000" (a submodule's hash);
        parent: a hash, or "" for a commit without one.
        """
        ref = "refs/heads/" + branch if branch else self.git("symbolic-ref", "HEAD")
        if parent is None:
            parent = self.git("rev-parse", "-q", "--verify", ref, check=False)
        lines = self._commit_lines(ref, files, message, parent) + [b"get-mark :1", b""]
        return self.git("fast-import", "--quiet", "--force", text=b"\n".join(lines))

    def commit_ahead(self, changes):
        """A commit for each of `changes`, {path: contents}, on a branch that is shown to nobody.

        All at once, as it is the processes that take time; their hashes, for show().
        """
        ref = "refs/ahead/main"
        lines, parent = [], self.head()
        for files in changes:
            lines += self._commit_lines(ref, files, "change", parent) + [b"get-mark :1"]
            parent = ":1"
        text = b"\n".join([*lines, b""])
        return self.git("fast-import", "--quiet", "--force", text=text).split("\n")

    def show(self, commit):
        """Put the default branch at a commit, as a push of it would."""
        (self.path / "refs" / "heads" / "main").write_text(commit + "\n")

    def _commit_lines(self, ref, files, message, parent):
        """The lines of fast-import for a commit, which it then knows as :1."""
        self.commits_made += 1
        when = b"%d +0000" % (FIRST_COMMIT_S + self.commits_made)
        lines = [
            b"commit " + ref.encode(),
            b"mark :1",
            b"author A U Thor <author@example.com> " + when,
            b"committer C O Mitter <committer@example.com> " + when,
            _data(message),
            b"from " + (parent.encode() if parent else b"0" * 40),
        ]
        for path, contents in (files or {}).items():
            lines += _file_change(path, contents)
        return [*lines, b""]


def _data(contents):
    contents = contents.encode() if isinstance(contents, str) else contents
    return b"data %d\n%s" % (len(contents), contents)


def _file_change(path, contents):
    """The fast-import lines that set one file (see Repo.commit)."""
    path = os.fsencode(path)
    if contents is None:
        return [b"D " + path]
    mode, contents = contents if isinstance(contents, tuple) else ("100644", contents)
    if mode == "160000":
        return [b"M 160000 " + contents.encode() + b" " + path]
    return [b"M " + mode.encode() + b" inline " + path, _data(contents)]


class Upstream:
    """A folder of repositories; `base_path` is the BASE_URL of slaves that reach it by path."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base_path = str(self.folder)

    def create(self, name, files=None, branch="main"):
        """A new repository with one commit of `files` ({} for an empty repository)."""
        repo = Repo(self.folder / (name + ".git"), branch)
        if files is None:
            files = {"README.md": "# %s\n" % name, "index.html": "<title>%s</title>\n" % name}
        if files:
            repo.commit(files, "First")
        return repo


class CountingFile:
    """A binary file that adds what passes through it to one of the server's counters."""

    def __init__(self, raw, server, counter):
        self.raw, self.server, self.counter = raw, server, counter

    def write(self, chunk):
        self.server.count(self.counter, len(chunk))
        return self.raw.write(chunk)

    def read(self, size=-1):
        chunk = self.raw.read(size)
        self.server.count(self.counter, len(chunk))
        return chunk

    def readline(self, size=-1):
        chunk = self.raw.readline(size)
        self.server.count(self.counter, len(chunk))
        return chunk

    def __getattr__(self, name):
        return getattr(self.raw, name)


class GitHandler(http.server.BaseHTTPRequestHandler):
    """Runs `git http-backend` for a request, streaming both ways; see HttpUpstream.fault."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_version = "GitUpstream"

    def setup(self):
        super().setup()
        self.rfile = CountingFile(self.rfile, self.server, "bytes_received")
        self.wfile = CountingFile(self.wfile, self.server, "bytes_sent")

    def log_message(self, *args):
        """Say nothing."""

    def do_GET(self):
        """Serve one request, or misbehave as told."""
        self.server.requests.append("%s %s" % (self.command, self.path))
        self.server.before_request(self.server.requests)
        self.number = len(self.server.requests)
        if not self._misbehave() and self._may_enter():
            self._run_backend()

    do_POST = do_GET

    def _may_enter(self):
        """Whether it has the login that is demanded, if any; else it is answered with 401."""
        login = self.server.login
        if login is None:
            return True
        given = base64.b64encode(login.encode("utf-8")).decode()
        if self.headers.get("Authorization") == "Basic " + given:
            return True
        self._refuse("401")
        return False

    def _fault(self):
        return self.server.faults_at.get(self.number, self.server.fault) or ""

    def _misbehave(self):
        """Do what the fault says; True when that was the whole answer."""
        released = self.server.released  # before the look: the fault may go meanwhile
        fault = self._fault()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif fault == "hang":
            released.wait(60)
        elif fault == "garbage":
            self.wfile.write(b"\x00\xff these are not the packs you are looking for\r\n" * 20)
        elif fault.isdigit():
            self._refuse(fault)
        else:
            return False
        self.close_connection = True
        return True

    def _refuse(self, status):
        """Answer with that status, and end the connection."""
        body = "no\n"
        self.wfile.write(
            (
                "HTTP/1.1 %s No\r\nWWW-Authenticate: Basic realm=x\r\nContent-Length: %d\r\n"
                "Connection: close\r\n\r\n%s" % (status, len(body), body)
            ).encode()
        )
        self.close_connection = True

    def _run_backend(self):
        path, _, query = self.path.partition("?")
        env = dict(
            os.environ,
            GIT_PROJECT_ROOT=self.server.upstream.base_path,
            GIT_HTTP_EXPORT_ALL="1",
            REQUEST_METHOD=self.command,
            PATH_INFO=path,
            QUERY_STRING=query,
            REMOTE_ADDR="127.0.0.1",
            CONTENT_TYPE=self.headers.get("Content-Type", ""),
            GIT_PROTOCOL=self.headers.get("Git-Protocol", ""),
            HTTP_CONTENT_ENCODING=self.headers.get("Content-Encoding", ""),
        )
        if self.headers.get("Content-Length"):
            env["CONTENT_LENGTH"] = self.headers["Content-Length"]
        backend = subprocess.Popen(
            ["git", "http-backend"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        feeder = threading.Thread(target=self._feed, args=(backend.stdin,), daemon=True)
        feeder.start()
        try:
            self._relay(backend.stdout)
        except OSError:
            self.close_connection = True
        finally:
            backend.stdout.close()
            backend.kill()
            backend.wait()
            feeder.join(10)

    def _feed(self, stdin):
        """Copy the request's body (by length or chunked) to the backend."""
        try:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                while True:
                    size = int(self.rfile.readline(), 16)
                    stdin.write(self.rfile.read(size))
                    self.rfile.readline()
                    if not size:
                        break
            else:
                left = int(self.headers.get("Content-Length") or 0)
                while left:
                    chunk = self.rfile.read(min(left, COPY_BYTES))
                    if not chunk:
                        break
                    stdin.write(chunk)
                    left -= len(chunk)
        except (OSError, ValueError):
            self.close_connection = True
        finally:
            try:
                stdin.close()
            except OSError:
                pass

    def _relay(self, stdout):
        """Turn the CGI answer into an HTTP one with a chunked body."""
        status, head = "200 OK", []
        for line in iter(stdout.readline, b""):
            line = line.rstrip(b"\r\n")
            if not line:
                break
            if line.lower().startswith(b"status:"):
                status = line[7:].strip().decode()
            else:
                head.append(line.decode("latin-1"))
        head = ["HTTP/1.1 " + status] + head + ["Transfer-Encoding: chunked", "", ""]
        self.wfile.write("\r\n".join(head).encode("latin-1"))
        sent = 0
        for chunk in iter(lambda: stdout.read1(COPY_BYTES), b""):
            sent = self._send_chunk(chunk, sent)
            if self.close_connection:
                return
        self.wfile.write(b"0\r\n\r\n")

    def _send_chunk(self, chunk, sent):
        """Send a chunk after `sent` bytes of body, slowed or cut as told; the new sum."""
        kind, _, number = self._fault().partition(":")
        if kind == "cut" and self.command == "POST" and sent + len(chunk) > int(number):
            chunk = chunk[: max(0, int(number) - sent)]
            self.close_connection = True
        if kind == "slow":
            self.server.released.wait(len(chunk) / float(number))
        self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk) if chunk else b"")
        return sent + len(chunk)


class HttpUpstream(http.server.ThreadingHTTPServer):
    """The repositories of an Upstream on 127.0.0.1, with what passed counted.

    fault, for the requests that begin from now on:
      None            none
      "reset"         the connection is reset without an answer
      "hang"          no answer until the fault is changed or 60 s have passed
      "garbage"       bytes that aren't HTTP
      "401", "503"... that status
      "cut:N"         an answer to a POST (the packs) ends after N bytes of body
      "slow:N"        at most about N bytes a second
    faults_at: {3: "503"}, faults that only the third request meets, and so on; `requests` counts.
    login: "user:password" that each request must have by basic authentication, or None.
    before_request: is called with `requests`, in the thread that answers the last of them.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, upstream):
        self.upstream = upstream
        self.create = upstream.create
        self.bytes_sent = self.bytes_received = 0
        self.requests = []
        self.faults_at = {}
        self.login = None
        self.before_request = lambda requests: None
        self.released = threading.Event()
        self._fault = None
        self._counting = threading.Lock()
        super().__init__(("127.0.0.1", 0), GitHandler)
        self.url = "http://127.0.0.1:%d" % self.server_port
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def server_bind(self):
        """Bind without looking up this host's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request, client_address):
        """A client that went away is no news."""

    @property
    def fault(self):
        """The fault in force."""
        return self._fault

    @fault.setter
    def fault(self, fault):
        self._fault = fault
        self.released.set()
        self.released = threading.Event()

    def count(self, counter, size):
        """Add `size` to a counter."""
        with self._counting:
            setattr(self, counter, getattr(self, counter) + size)

    def close(self):
        """Stop serving."""
        self.released.set()
        self.shutdown()
        self.server_close()
