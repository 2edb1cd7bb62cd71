#!/usr/bin/env python3
"""Makes the repositories that the benchmark clones, adds commits to them, and serves them.

    upstream.py make KIND DIR      a bare repository, KIND one of those in KINDS
    upstream.py serve DIR          all of DIR over HTTP on 127.0.0.1, by git http-backend

The server prints its address as its only line; GET /bytes answers how many bytes it has sent, and
GET /clones how many clones and fetches have begun.
Every commit rewrites the first and the last file of the tree (FIRST, LAST) with the same text, so
that a reader can tell a tree that is half one commit and half another.
"""

import http.server
import os
import random
import subprocess
import sys
import threading
import urllib.request

import measure

FIRST = "aaa/version"
LAST = "zzz/version"
COPY_BYTES = 256 * 1024
LINES = 4000

# files in the tree, commits of history, files changed by each, lines in a file
KINDS = {
    "tiny": (40, 20, 1, 40),
    "files-500": (500, 20, 3, 80),
    "files-5000": (5000, 1, 3, 80),
    "middle": (5000, 14500, 3, 80),
    "files-50000": (50000, 1, 3, 10),
    "smoke": (30, 5, 2, 5),
}
EVERY_UPDATE = ("tiny", "middle", "files-50000")


class Pool:
    """Text that compresses about as source code does (3 : 1), made without making it slowly."""

    def __init__(self, seed=20261123):
        self.random = random.Random(seed)
        words = [
            "".join(self.random.choices("abcdefghijklmnopqrstuvwxyz_", k=length))
            for length in self.random.choices(range(2, 12), k=3000)
        ]
        self.lines = [" ".join(self.random.choices(words, k=9)) for _ in range(LINES)]

    def text(self, lines):
        return self.random.choices(self.lines, k=lines)

    def edit(self, lines):
        """A changed copy: a third of the lines, in one place, are new."""
        size = max(1, len(lines) // 3)
        at = self.random.randrange(len(lines))
        fresh = [f"{line} {self.random.getrandbits(64):x}" for line in self.text(size)]
        return lines[:at] + fresh + lines[at + size :]


def run_git(repo, *args, data=None):
    """git's output, as text; CalledProcessError with git's own words on stderr where it fails."""
    done = subprocess.run(
        ("git", "-C", str(repo), *args), input=data, stdout=subprocess.PIPE, check=True
    )
    return done.stdout.decode().strip()


def file_name(number):
    return f"src/d{number // 500:03}/e{number // 50 % 10}/file{number}.c"


def write_blob(out, mark, lines):
    text = "\n".join(lines).encode() + b"\n"
    out.write(b"blob\nmark :%d\ndata %d\n%s\n" % (mark, len(text), text))


def write_commit(out, number, parent, changes):
    """One commit: the two version files, and changes (a list of name, mark)."""
    when = 1600000000 + number * 600
    text = f"commit {number}\n".encode()
    out.write(
        b"commit refs/heads/main\ncommitter bench <bench@localhost> %d +0000\ndata %d\n%s\n"
        % (when, len(text), text)
    )
    if parent:
        out.write(b"from %s\n" % parent)
    for name in (FIRST, LAST):
        out.write(b"M 644 inline %s\ndata %d\n%s\n" % (name.encode(), len(text), text))
    for name, mark in changes:
        out.write(b"M 644 :%d %s\n" % (mark, name.encode()))


def write_history(out, files, commits, changed, lines):
    """The stream for git fast-import.

    All versions of a file follow each other, the newest first, so that fast-import stores that one
    whole and the older ones as deltas, as a server's repack would; that repack itself would take
    most of the benchmark's time. A blob too short for a delta keeps files apart.
    """
    pool = Pool()
    by_commit = [[] for _ in range(commits + 1)]
    versions = [[0] for _ in range(files)]
    for number in range(1, commits + 1):
        start = pool.random.randrange(files)
        for step in range(changed):
            versions[(start // 50 * 50 + (start + step) % 50) % files].append(number)
    mark = 0
    for number, numbers in enumerate(versions):
        texts = [pool.text(lines)]
        for _ in numbers[1:]:
            texts.append(pool.edit(texts[-1]))
        write_blob(out, mark + 1, [str(number)])
        mark += 1
        for commit, text in zip(reversed(numbers), reversed(texts)):
            mark += 1
            write_blob(out, mark, text)
            by_commit[commit].append((file_name(number), mark))
    for number, changes in enumerate(by_commit):
        write_commit(out, number, None, changes)


def make(kind, repo):
    """A bare repository at repo, packed and with a bitmap, as a hosting service would keep it."""
    subprocess.run(("git", "init", "-q", "--bare", "--initial-branch=main", str(repo)), check=True)
    run_git(repo, "config", "core.compression", "1")
    importer = subprocess.Popen(
        ("git", "-C", str(repo), "fast-import", "--quiet", "--depth=40"), stdin=subprocess.PIPE
    )
    with importer.stdin as out:
        write_history(out, *KINDS[kind])
    if importer.wait():
        raise SystemExit("upstream.py: git fast-import failed")
    run_git(repo, "-c", "pack.window=0", "repack", "-a", "-d", "-b", "-q")
    run_git(repo, "config", "http.receivepack", "false")


def adopt(source, repo):
    """A copy of somebody's bare repository, objects hard-linked, with the two version files."""
    subprocess.run(("git", "clone", "-q", "--bare", str(source), str(repo)), check=True)
    head = run_git(repo, "rev-parse", "HEAD")
    run_git(repo, "update-ref", "refs/heads/main", head)
    run_git(repo, "symbolic-ref", "HEAD", "refs/heads/main")
    for name in os.listdir(os.path.join(str(repo), "objects", "pack")):
        if name.endswith(".promisor"):
            os.unlink(os.path.join(str(repo), "objects", "pack", name))
    subprocess.run(
        ("git", "-C", str(repo), "multi-pack-index", "write", "--bitmap", "--no-progress"),
        check=False,
    )
    commit(repo, 1)


def commit(repo, changed):
    """Adds one commit that changes that many files and the two version files; returns its hash."""
    names = run_git(repo, "ls-tree", "-r", "--name-only", "main").splitlines()
    names = [name for name in names if name not in (FIRST, LAST) and not name.startswith('"')]
    count = int(run_git(repo, "rev-list", "--count", "main"))
    pool = Pool(count)
    picked = pool.random.sample(names, min(changed, len(names)))
    importer = subprocess.Popen(
        ("git", "-C", str(repo), "fast-import", "--quiet"), stdin=subprocess.PIPE
    )
    with importer.stdin as out:
        for mark, _ in enumerate(picked, 1):
            write_blob(out, mark, pool.edit(pool.text(20)))
        write_commit(
            out, count + 10**6, b"refs/heads/main^0", list(zip(picked, range(1, len(picked) + 1)))
        )
    if importer.wait():
        raise SystemExit("upstream.py: git fast-import failed")
    return run_git(repo, "rev-parse", "main")


class Handler(http.server.BaseHTTPRequestHandler):
    """CGI for git http-backend, no more of it than a fetch needs."""

    base = "."
    sent = 0
    clones = 0
    lock = threading.Lock()

    def log_message(self, *args):
        pass

    def count(self, number):
        with Handler.lock:
            Handler.sent += number

    def do_GET(self):
        counts = {"/bytes": Handler.sent, "/clones": Handler.clones}
        if self.path in counts:
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n%d" % counts[self.path])
            return
        with Handler.lock:
            Handler.clones += 1  # each begins with its only GET
        self.run_backend()

    def do_POST(self):
        self.run_backend()

    def run_backend(self):
        """Hands the request to git http-backend and copies its answer, counting."""
        path, _, query = self.path.partition("?")
        env = dict(
            os.environ,
            GIT_PROJECT_ROOT=self.base,
            GIT_HTTP_EXPORT_ALL="1",
            PATH_INFO=path,
            QUERY_STRING=query,
            REQUEST_METHOD=self.command,
            REMOTE_ADDR="127.0.0.1",
            CONTENT_TYPE=self.headers.get("Content-Type", ""),
            HTTP_CONTENT_ENCODING=self.headers.get("Content-Encoding", ""),
            GIT_PROTOCOL=self.headers.get("Git-Protocol", ""),
        )
        backend = subprocess.Popen(
            ("git", "http-backend"),
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        with backend.stdin as out:
            for part in self.body():
                out.write(part)
        with backend.stdout as answer:
            part = answer.read(COPY_BYTES)
            status = part.partition(b"\r\n")[0][8:] if part.startswith(b"Status: ") else b"200 OK"
            part = b"HTTP/1.0 " + status + b"\r\n" + part
            while part:
                self.count(len(part))
                self.wfile.write(part)
                part = answer.read(COPY_BYTES)
        backend.wait()

    def body(self):
        """The request's body in parts, whichever of its two encodings git chose."""
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        size = int(self.rfile.readline(), 16)
        while size:
            yield self.rfile.read(size)
            self.rfile.readline()
            size = int(self.rfile.readline(), 16)


class Server:
    """The server in a process of its own, so that it takes no time from what is measured."""

    def __init__(self, base):
        self.process = subprocess.Popen(
            (sys.executable, os.path.abspath(__file__), "serve", str(base)), stdout=subprocess.PIPE
        )
        self.url = self.process.stdout.readline().decode().strip()
        if not self.url:
            raise SystemExit("upstream.py: the server did not start")

    def ask(self, path):
        with urllib.request.urlopen(self.url + path) as answer:
            return int(answer.read())

    def sent(self):
        """Bytes sent so far; asking is not counted."""
        return self.ask("/bytes")

    def clones(self):
        """Clones and fetches that have begun so far."""
        return self.ask("/clones")

    def stop(self):
        measure.stop(self.process)


def serve(base):
    Handler.base = os.path.abspath(base)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


def main(argv):
    if len(argv) == 3 and argv[0] == "make" and argv[1] in KINDS:
        make(argv[1], argv[2])
    elif len(argv) == 2 and argv[0] == "serve":
        serve(argv[1])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
