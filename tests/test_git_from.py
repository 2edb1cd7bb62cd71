"""GIT_FROM: others clone and fetch from a slave, over /git/NAME.git; real git, real slaves."""

import contextlib
import gzip
import http.client
import random
import re
import socket
import ssl
import subprocess
import threading
import urllib.request
import zlib

import pytest
from processes import is_alive, processes_below, rss_kib, wait_until
from product import PYTHON
from slave_support import make_secret, signature
from upstream import run_git

FORMAT = "--format=%(refname) %(objectname) %(*objectname)"
LIST = "/git/hanuman.git/info/refs?service=git-upload-pack"
POST = "/git/hanuman.git/git-upload-pack"
REQUEST = {"Content-Type": "application/x-git-upload-pack-request"}
V2 = {"Git-Protocol": "version=2"}
LIST_REFS = b"0014command=ls-refs\n0000"
MIB = 1 << 20


@pytest.fixture
def repo(upstream):
    """The forge's repository hanuman: two branches and two tags."""
    repo = upstream.create("hanuman")
    repo.commit({"b": "1"}, branch="topic/one")
    repo.git("tag", "light", "topic/one")
    repo.git("tag", "-a", "-m", "one", "v1.0", "main")
    return repo


@pytest.fixture
def relay(start_slave, repo):
    """A slave with hanuman live, which may be cloned from 127.0.0.1."""
    slave = start_slave(GIT_FROM="127.0.0.1, ::1")
    assert slave.wait_update()["state"] == "live"
    return slave


def url(slave, name="hanuman"):
    return "%s/git/%s.git" % (slave.url, name)


def refs(path):
    return run_git("--git-dir", path, "for-each-ref", FORMAT)


def post(slave, body, headers=(), timeout=40):
    """One POST to upload-pack: (status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", slave.port, timeout=timeout)
    try:
        connection.request("POST", POST, body, dict(REQUEST, **dict(headers)))
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def send(slave, text):
    """What a connection answers to these bytes, to its end."""
    with socket.create_connection(("127.0.0.1", slave.port), 40) as connection:
        connection.sendall(text)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def big(repo, mib, seed=1):
    """A commit of so many MiB that can't be compressed."""
    dice = random.Random(seed)
    files = {
        "big/%d" % number: dice.getrandbits(8 * MIB).to_bytes(MIB, "big") for number in range(mib)
    }
    return repo.commit(files)


def count_runs(slave):
    """From now on each run of upload-pack on this slave is a line of the file that is returned."""
    log = slave.home / "runs"
    path = slave.bin / "git"
    path.write_text(
        '#!/bin/sh\ncase "$*" in *upload-pack*) echo "$*" >>"%s" ;; esac\n'
        'PATH=${PATH#*:} exec git "$@"\n' % log
    )
    path.chmod(0o755)
    return log


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


# -- what is served --------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["0", "1", "2"])
def test_a_clone_equals_one_from_the_forge(relay, repo, tmp_path, protocol):
    config = ["-c", "protocol.version=" + protocol]
    run_git(*config, "clone", "-q", "--mirror", url(relay), tmp_path / "mirror")
    assert refs(tmp_path / "mirror") == refs(repo.path)
    run_git(*config, "clone", "-q", url(relay), tmp_path / "tree")
    assert run_git("rev-parse", "HEAD", cwd=str(tmp_path / "tree")) == repo.head()
    assert run_git("fsck", "--full", cwd=str(tmp_path / "tree")) == ""
    # What comes later is fetched on top of it.
    new = repo.commit({"a": "2"})
    relay.wait_update()
    run_git(*config, "pull", "-q", "--ff-only", cwd=str(tmp_path / "tree"))
    assert run_git("rev-parse", "HEAD", cwd=str(tmp_path / "tree")) == new


def test_two_tiers_give_all_branches_and_tags(relay, repo, start_slave, tmp_path):
    middle = start_slave(BASE_URL=relay.url + "/git", GIT_FROM="127.0.0.1")
    leaf = start_slave(BASE_URL=middle.url + "/git")
    for number in range(3):
        repo.commit({"a": str(number)}, branch="topic/%d" % number)
        repo.git("tag", "-a", "-m", "x", "t%d" % number, "topic/%d" % number)
        if number:
            repo.git("branch", "-D", "topic/%d" % (number - 1))
        relay.wait_update()
        middle.wait_update()
        assert leaf.wait_update()["commit"] == repo.head()
        clone = tmp_path / ("clone-%d" % number)
        run_git("clone", "-q", "--mirror", url(middle), clone)
        assert refs(clone) == refs(repo.path)
        assert refs(middle.state / "hanuman.git") == refs(repo.path)


def test_a_slave_beneath_takes_no_more_than_is_new(relay, repo, start_slave):
    big(repo, 3)
    relay.wait_update()
    leaf = start_slave(BASE_URL=relay.url + "/git")
    leaf.wait_update()
    log = count_runs(relay)
    repo.commit({"a": "2"})
    relay.wait_update()
    assert leaf.wait_update()["commit"] == repo.head()
    assert len(lines(log)) <= 3
    packs = (leaf.repos / "hanuman" / ".git" / "objects" / "pack").glob("*.pack")
    assert min(pack.stat().st_size for pack in packs) < 10000


def test_an_option_and_a_variable_set_it_too(start_slave, repo):
    for settings in ({"args": ["--git-from", "127.0.0.1"]}, {"env": {GIT_FROM: "127.0.0.1"}}):
        slave = start_slave(**settings)
        slave.wait_update()
        assert repo.head() in run_git("ls-remote", url(slave))


GIT_FROM = "SERVER_UPDATE_GIT_FROM"


def test_ls_remote_and_head(relay, repo):
    got = run_git("ls-remote", "--symref", url(relay), "HEAD")
    assert got == "ref: refs/heads/main\tHEAD\n%s\tHEAD" % repo.head()
    status, headers, body = relay.get(LIST, method="HEAD")
    assert (status, body) == (200, b"")
    assert headers["Content-Type"] == "application/x-git-upload-pack-advertisement"
    assert headers["Cache-Control"] == "no-cache"


def test_a_shallow_clone(relay, repo, tmp_path):
    run_git("clone", "-q", "--depth", "1", url(relay), tmp_path / "tree")
    assert run_git("rev-parse", "HEAD", cwd=str(tmp_path / "tree")) == repo.head()


def test_what_somebody_was_told_of_is_sent_after_a_force_push(relay, repo, tmp_path):
    old = repo.head()
    repo.commit({"a": "another history"}, parent="")
    relay.wait_update()
    run_git("init", "-q", tmp_path / "tree")
    run_git("fetch", "-q", url(relay), old, cwd=str(tmp_path / "tree"))
    assert run_git("cat-file", "-t", old, cwd=str(tmp_path / "tree")) == "commit"


def test_over_tls(start_slave, repo, authority, tmp_path):
    slave = start_slave(GIT_FROM="127.0.0.1", TLS_CERT=authority.issue("relay"), wait=False)
    wait_until(lambda: "listening on port" in slave.log(), what="a slave that listens")
    port = re.search(r"listening on port (\d+)", slave.log()).group(1)
    ca = ["-c", "http.sslCAInfo=%s" % authority.cert]
    context = ssl.create_default_context(cafile=str(authority.cert))
    origin = "https://127.0.0.1:%s" % port
    urllib.request.urlopen(origin + "/?repo=hanuman", context=context).close()
    wait_until(lambda: (slave.state / "hanuman.git" / "HEAD").exists(), what="the mirror")
    run_git(*ca, "clone", "-q", "--mirror", origin + "/git/hanuman.git", tmp_path / "mirror")
    assert refs(tmp_path / "mirror") == refs(repo.path)


# -- who may, and what not ---------------------------------------------------------


def error(slave, path, status, method="GET", headers=None):
    got, _, body = slave.get(path, method=method, headers=headers)
    assert got == status, body
    return body


@pytest.mark.parametrize("addresses", ["", "192.0.2.0/24, 2001:db8::/32"])
def test_nobody_else_may_clone(start_slave, repo, addresses):
    slave = start_slave(GIT_FROM=addresses)
    slave.wait_update()
    assert b"no clones from this address; see GIT_FROM" in error(slave, LIST, 403)
    assert b"no clones" in error(slave, POST, 403, method="POST")
    assert run_git("ls-remote", url(slave), check=False) == ""
    assert (slave.state / "hanuman.git").exists() == bool(addresses)


def test_allow_from_and_allow_repos_hold(start_slave, repo, upstream):
    upstream.create("other")
    slave = start_slave(GIT_FROM="127.0.0.0/8", ALLOW_REPOS="hanu*")
    slave.wait_update()
    (slave.state / "hanuman.git").rename(slave.state / "other.git")
    assert b"not an allowed repository" in error(slave, LIST.replace("hanuman", "other"), 403)
    refused = start_slave(GIT_FROM="127.0.0.0/8", ALLOW_FROM="192.0.2.1")
    assert b"not from this address" in error(refused, LIST, 403)


def test_a_secret_is_not_asked_for(start_slave, repo, tmp_path):
    secret = make_secret(tmp_path / "secret", "a secret that nobody knows")
    slave = start_slave(GIT_FROM="127.0.0.1", SECRET_FILE=secret)
    error(slave, "/?repo=hanuman", 401)
    target = "/?repo=hanuman"
    slave.json(target, 202, headers=signature(target))
    wait_until(lambda: (slave.state / "hanuman.git" / "HEAD").exists(), what="the mirror")
    assert repo.head() in run_git("ls-remote", url(slave))


def test_it_is_read_only(relay, repo, tmp_path):
    run_git("clone", "-q", url(relay), tmp_path / "tree")
    failed = subprocess.run(
        ["git", "push", url(relay), "main:new"],
        cwd=str(tmp_path / "tree"),
        stderr=subprocess.PIPE,
        check=False,
    )
    assert failed.returncode != 0 and b"403" in failed.stderr
    error(relay, LIST.replace("upload", "receive"), 403)
    error(relay, POST.replace("upload", "receive"), 403, method="POST")
    assert refs(relay.state / "hanuman.git") == refs(repo.path)


@pytest.mark.parametrize(
    "path, method, status",
    [
        ("/git/hanuman.git/info/refs", "GET", 404),
        ("/git/hanuman.git/HEAD", "GET", 404),
        ("/git/hanuman.git/objects/info/packs", "GET", 404),
        ("/git/hanuman.git/config", "GET", 404),
        ("/git/hanuman/info/refs?service=git-upload-pack", "GET", 404),
        ("/git/none.git/info/refs?service=git-upload-pack", "GET", 404),
        ("/git/../hanuman.git/info/refs?service=git-upload-pack", "GET", 404),
        ("/git/..git/info/refs?service=git-upload-pack", "GET", 404),
        ("/git/%2e%2e.git/info/refs?service=git-upload-pack", "GET", 404),
        ("/git/hanuman.git/info/refs?service=git-upload-archive", "GET", 404),
        ("/git/hanuman.git/info/refs?service=git-upload-pack&x=1", "GET", 404),
        ("/git/", "GET", 404),
        ("/git/hanuman.git/info/refs?service=git-upload-pack", "POST", 405),
        (POST, "GET", 405),
        (POST, "PUT", 405),
    ],
)
def test_other_paths_and_methods(relay, path, method, status):
    body = error(relay, path, status, method=method)
    assert body.startswith(b'{"error": "')


def test_before_the_first_update_that_is_said(start_slave, repo):
    slave = start_slave(GIT_FROM="127.0.0.1")
    assert b"no mirror here; where GIT_FROM is set, an update makes one" in error(slave, LIST, 404)


def test_protocols_that_nobody_knows_are_the_oldest(relay, repo):
    line = b"001e# service=git-upload-pack\n0000"
    for value in ("version=3", "version=2\tx", "2", ""):
        body = relay.get(LIST, headers={"Git-Protocol": value})[2]
        assert body.startswith(line) and repo.head().encode() in body
    assert b"version 2" in relay.get(LIST, headers=V2)[2]
    assert relay.get(LIST, headers={"Git-Protocol": "version=1"})[2].startswith(line)


def test_no_config_and_no_variable_leads_elsewhere(start_slave, repo, tmp_path):
    evil = tmp_path / "evil"
    hook = "#!/bin/sh\ntouch '%s'\nexec \"$@\"\n" % evil
    path = tmp_path / "hook"
    path.write_text(hook)
    path.chmod(0o755)
    slave = start_slave(
        GIT_FROM="127.0.0.1",
        env={
            "GIT_DIR": "/nowhere",
            "GIT_OBJECT_DIRECTORY": "/nowhere",
            "GIT_NAMESPACE": "x",
            "GIT_PROTOCOL": "version=1",
        },
    )
    slave.wait_update()
    config = slave.state / "hanuman.git" / "config"
    config.write_text(
        config.read_text()
        + "[uploadpack]\n\tpackObjectsHook = %s\n[core]\n\thooksPath=%s\n" % (path, tmp_path)
    )
    run_git("clone", "-q", url(slave), tmp_path / "tree")
    assert not evil.exists()
    assert relay_body_is_v0(slave)


def relay_body_is_v0(slave):
    return b"version 1" not in slave.get(LIST)[2]


# -- bodies --------------------------------------------------------------------------


def test_bodies_as_they_are_by_gzip_and_in_chunks(relay, repo):
    want = repo.head().encode()
    headers = dict(V2)
    assert want in post(relay, LIST_REFS, headers)[2]
    packed = dict(headers, **{"Content-Encoding": "gzip"})
    assert want in post(relay, gzip.compress(LIST_REFS), packed)[2]
    assert want in post(relay, iter([LIST_REFS[:7], LIST_REFS[7:]]), headers)[2]
    zipped = gzip.compress(LIST_REFS)
    assert want in post(relay, iter([zipped[:5], zipped[5:]]), packed)[2]


def head_of_post(*lines):
    return "\r\n".join(
        ["POST %s HTTP/1.1" % POST, "Host: x", "Git-Protocol: version=2", *lines, "", ""]
    ).encode()


def test_expect_100_continue(relay, repo):
    text = head_of_post("Content-Length: %d" % len(LIST_REFS), "Expect: 100-continue")
    with socket.create_connection(("127.0.0.1", relay.port), 40) as connection:
        connection.sendall(text)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(LIST_REFS)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ") and repo.head().encode() in answer


def test_http_1_0_ends_with_the_connection(relay, repo):
    answer = send(relay, b"GET " + LIST.encode() + b" HTTP/1.0\r\n\r\n")
    assert b"chunked" not in answer and answer.endswith(b"0000")


@pytest.mark.parametrize(
    "lines, body, status",
    [
        (["Content-Length: 10", "Content-Encoding: gzip"], b"no gzip at", 400),
        (["Transfer-Encoding: chunked"], b"zz\r\n", 400),
        (["Transfer-Encoding: chunked"], b"-1\r\n", 400),
        ([], b"", 411),
        (["Content-Length: 99999999"], b"", 413),
        (["Content-Length: 1x"], b"", 400),
    ],
)
def test_bad_bodies(relay, lines, body, status):
    assert send(relay, head_of_post(*lines) + body).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_zip_bomb_is_refused(relay, is_chunked):
    before = rss_kib(relay.process.pid)
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    have = b"0032have " + b"1" * 40 + b"\n"
    body = b"".join(bomb.compress(have * 20000) for _ in range(60)) + bomb.flush()
    assert len(body) < MIB
    sent = iter([body]) if is_chunked else body
    status, _, text = post(relay, sent, dict(V2, **{"Content-Encoding": "gzip"}))
    assert (status, b"more than 16777216 bytes" in text) == (413, True)
    assert rss_kib(relay.process.pid) - before < 40 * 1024


def test_a_body_that_is_cut_off_starts_nothing(relay):
    log = count_runs(relay)
    with socket.create_connection(("127.0.0.1", relay.port), 40) as connection:
        connection.sendall(head_of_post("Content-Length: 1000") + LIST_REFS)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert lines(log) == []


def test_nonsense_ends_in_a_broken_answer(relay):
    """Never in one that looks whole."""
    with pytest.raises((http.client.HTTPException, OSError)):
        post(relay, b"what is this?", V2)
    assert relay.get("/healthz")[0] == 200


OLDEST = ("-c", "protocol.version=0")  # which tells all commits that there are


def test_a_request_of_many_commits(relay, repo, start_slave, tmp_path):
    """git sends more than 1 MiB in chunks, and more than 1 KiB by gzip."""
    run_git("init", "-q", tmp_path / "tree")
    tree = str(tmp_path / "tree")
    stream = b"".join(
        b"commit refs/heads/b%d\ncommitter x <x@x> %d +0000\ndata 1\nx\n"
        % (number, 10**9 + number)
        for number in range(6000)
    )
    run_git("fast-import", "--quiet", cwd=tree, text=stream)
    run_git(*OLDEST, "-c", "http.postBuffer=70000", "fetch", "-q", url(relay), cwd=tree)
    assert run_git("rev-parse", "FETCH_HEAD", cwd=tree) == repo.head()


# -- many at once ------------------------------------------------------------------


def clone_all(urls, tmp_path, options=()):
    """Clones side by side; all must go well."""
    running = [
        subprocess.Popen(
            ["git", "clone", "-q", "--bare", *options, one, str(tmp_path / ("clone-%d" % number))],
            stderr=subprocess.PIPE,
        )
        for number, one in enumerate(urls)
    ]
    failed = [text for text in (one.communicate()[1] for one in running) if text]
    assert failed == []


def test_what_many_ask_alike_is_made_once(relay, repo, tmp_path):
    log = count_runs(relay)
    clone_all([url(relay)] * 20, tmp_path)
    assert len(lines(log)) == 3, "what it can, the refs, the objects"
    for number in range(20):
        assert refs(tmp_path / ("clone-%d" % number)) == refs(repo.path)


def test_what_has_changed_is_made_anew(relay, repo):
    log = count_runs(relay)
    for number in range(3):
        repo.commit({"a": str(number)})
        relay.wait_update()
        assert repo.head() in run_git("ls-remote", url(relay))
    assert len(lines(log)) == 6


@pytest.mark.slow
def test_clones_of_much_keep_little_in_memory(relay, repo, tmp_path):
    big(repo, 100)
    relay.wait_update()
    run_git("ls-remote", url(relay))
    before = rss_kib(relay.process.pid)
    most = []
    done = threading.Event()

    def watch():
        while not done.wait(0.02):
            most.append(rss_kib(relay.process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    reader = [PYTHON, "-c", READER, url(relay), repo.head()]
    readers = [subprocess.Popen(reader, stdout=subprocess.PIPE) for _ in range(60)]
    told = [one.communicate()[0] for one in readers]
    done.set()
    thread.join()
    assert {int(size) > 100 * MIB for size in told} == {True}
    assert len({int(size) for size in told}) == 1
    assert max(most) - before < 40 * 1024


READER = r"""
import sys, http.client, urllib.parse
url = urllib.parse.urlparse(sys.argv[1])
want = b"want %s\n" % sys.argv[2].encode()
def line(text):
    return b"%04x%s" % (len(text) + 4, text)
options = line(b"no-progress") + line(want) + line(b"done\n")
body = line(b"command=fetch") + b"0001" + options + b"0000"
connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)
connection.request("POST", url.path + "/git-upload-pack", body, {"Git-Protocol": "version=2"})
answer = connection.getresponse()
size = 0
while True:
    part = answer.read(65536)
    if not part:
        break
    size += len(part)
print(size)
"""


def fetching(slave):
    """The processes of git's upload-pack, but for what waits in its place."""
    found = []
    for pid in processes_below(slave.home.parent):
        with contextlib.suppress(OSError), open("/proc/%d/cmdline" % pid, "rb") as file:
            if b"upload-pack" in file.read():
                found.append(pid)
    return found


def slow_git(slave):
    """From now on this slave's upload-pack waits for the file that is returned."""
    go = slave.home / "go"
    path = slave.bin / "git"
    path.write_text(
        '#!/bin/sh\nPATH=${PATH#*:}\ncase "$*" in *advertise*) ;; *upload-pack*)\n'
        "while [ ! -e '%s' ]; do sleep 0.05; done ;; esac\nexec git \"$@\"\n" % go
    )
    path.chmod(0o755)
    return go


def ask(slave, body=LIST_REFS):
    """A connection that has asked, and whose answer is not read."""
    connection = socket.create_connection(("127.0.0.1", slave.port), 40)
    connection.sendall(head_of_post("Content-Length: %d" % len(body)) + body)
    return connection


def test_who_goes_away_ends_the_work_unless_another_wants_it(relay, repo):
    go = slow_git(relay)
    one = ask(relay)
    other = ask(relay)
    wait_until(lambda: len(fetching(relay)) == 1, what="a git that waits")
    (pid,) = fetching(relay)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    one.close()
    go.touch()
    answer = b"".join(iter(lambda: other.recv(65536), b""))
    assert repo.head().encode() in answer
    go.unlink()
    repo.commit({"a": "2"})
    relay.wait_update()
    last = ask(relay)
    wait_until(lambda: len(fetching(relay)) == 1, what="a git that waits")
    (pid,) = fetching(relay)
    last.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    last.close()
    wait_until(lambda: not is_alive(pid), what="the end of what nobody wants")


def test_a_stop_ends_git(relay, repo):
    slow_git(relay)
    with ask(relay):
        wait_until(lambda: len(fetching(relay)) == 1, what="a git that waits")
        (pid,) = fetching(relay)
        assert relay.stop() == 0
        assert not is_alive(pid)


def test_timeout_ends_git(start_slave, repo):
    relay = start_slave(GIT_FROM="127.0.0.1", TIMEOUT=20)
    relay.wait_update()
    relay.stop()
    relay.settings["TIMEOUT"] = 1
    relay.start()
    slow_git(relay)
    with ask(relay) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b"0\r\n\r\n" not in answer, "it must not look whole"


def test_a_slave_that_fetches_pushes_none_out(relay, repo):
    """300 at once wait for the same answer; and the slave takes signals meanwhile."""
    go = slow_git(relay)
    asked = [ask(relay) for _ in range(300)]
    wait_until(lambda: len(fetching(relay)) == 1, what="a git that waits")
    assert relay.json("/?repo=hanuman", 202)["state"] == "queued"
    go.touch()
    answers = [b"".join(iter(lambda one=one: one.recv(65536), b"")) for one in asked]
    assert [answer for answer in answers if repo.head().encode() not in answer] == []


# -- while it is updated -----------------------------------------------------------


def fetch_during_updates(relay, repo, tmp_path, updates, clients):
    """Clones over and over while the relay is updated; each must be whole, and of one moment."""
    ended = threading.Event()
    faults = []
    counts = []

    def clone(number):
        count = 0
        while not ended.is_set():
            count += 1
            path = tmp_path / ("%d-%d" % (number, count))
            options = ["-c", "protocol.version=%d" % (count % 3)]
            done = subprocess.run(
                ["git", *options, "clone", "-q", "--mirror", url(relay), str(path)],
                stderr=subprocess.PIPE,
            )
            if done.returncode:
                faults.append(done.stderr)
                continue
            fsck = subprocess.run(
                ["git", "--git-dir", str(path), "fsck", "--full"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            told = {
                run_git("--git-dir", path, "log", "-1", "--format=%s", ref)
                for ref in ("main", "other", "tag")
            }
            if fsck.returncode or fsck.stdout or len(told) != 1:
                faults.append((fsck.stdout, told))
        counts.append(count)

    threads = [threading.Thread(target=clone, args=(number,)) for number in range(clients)]
    for number in range(updates):
        commit = repo.commit({"a": str(number)}, message="update %d" % number, branch="main")
        # All three move in one push.
        text = "update refs/heads/other %s\nupdate refs/tags/tag %s\n" % (commit, commit)
        repo.git("update-ref", "--stdin", text=text)
        assert relay.wait_update()["commit"] == commit
        if not number:
            for thread in threads:
                thread.start()
    ended.set()
    for thread in threads:
        thread.join()
    assert faults == []
    return sum(counts)


def test_no_fetch_fails_or_mixes_while_the_relay_is_updated(relay, repo, tmp_path):
    assert fetch_during_updates(relay, repo, tmp_path, updates=8, clients=3) >= 8


@pytest.mark.slow
def test_none_of_500_fetches_fails_during_100_updates(relay, repo, tmp_path):
    assert fetch_during_updates(relay, repo, tmp_path, updates=100, clients=8) >= 500


def test_slaves_beneath_follow_while_the_relay_is_updated(relay, repo, start_slave):
    leaves = [start_slave(BASE_URL=relay.url + "/git") for _ in range(3)]
    for number in range(5):
        repo.commit({"a": str(number)})
        relay.wait_update()
        asked = [(leaf, leaf.signal()) for leaf in leaves]
        repo.commit({"a": "meanwhile %d" % number})
        relay.signal()
        for leaf, update in asked:
            assert leaf.wait_update(update=update)["state"] == "live"


# -- when the mirror is at fault ------------------------------------------------------


def test_a_mirror_that_is_not_up_to_date_is_no_success(start_slave, repo):
    slave = start_slave(GIT_FROM="127.0.0.1")
    script = slave.bin / "slave-activate"
    text = script.read_text()
    broken = text.replace(
        "def write_beside(path, content):\n",
        "def write_beside(path, content):\n    raise OSError(28, 'No space left', path)\n".replace(
            "'", '"'
        ),
    )
    assert broken != text
    script.write_text(broken)
    record = slave.wait_update()
    assert (record["state"], record["commit"], record["hook"]) == ("live", repo.head(), 1)
    assert record["message"].startswith(
        "live, but the mirror for GIT_FROM could not be brought up"
    )
    script.write_text(text)
    assert slave.wait_update()["message"] == ""
    assert repo.head() in run_git("ls-remote", url(slave))


def test_a_damaged_mirror_breaks_the_answer_and_heals(relay, repo, tmp_path):
    for path in (relay.state / "hanuman.git" / "objects" / "pack").glob("*.pack"):
        text = path.read_bytes()
        path.unlink()
        path.write_bytes(text[:40] + b"damaged" + text[47:])
    with pytest.raises(AssertionError):
        run_git("clone", "-q", "--bare", url(relay), tmp_path / "broken")
    relay.wait_update()
    run_git("clone", "-q", "--bare", url(relay), tmp_path / "whole")


def test_without_git_from_the_mirror_goes_with_the_next_update(relay, repo):
    relay.stop()
    del relay.settings["GIT_FROM"]
    relay.start()
    error(relay, LIST, 403)
    relay.wait_update()
    assert not (relay.state / "hanuman.git").exists()
