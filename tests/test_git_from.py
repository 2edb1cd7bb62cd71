"""GIT_FROM: others clone and fetch from a slave, over /git/NAME.git; real git, real slaves."""

import contextlib
import gzip
import http.client
import json
import os
import queue
import random
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
import zlib

import pytest
from pages import BLOCKS, find_block
from processes import is_alive, processes_below, rss_kib, wait_until
from product import PYTHON, daily
from slave_support import Slave, make_secret, signature, stop_for_good
from upstream import Upstream, run_git

FORMAT = "--format=%(refname) %(objectname) %(*objectname)"
LIST = "/git/hanuman.git/info/refs?service=git-upload-pack"
POST = "/git/hanuman.git/git-upload-pack"
REQUEST = {"Content-Type": "application/x-git-upload-pack-request"}
V2 = {"Git-Protocol": "version=2"}
LIST_REFS = b"0014command=ls-refs\n0000"
MIB = 1 << 20
GIT_FROM = "SERVER_UPDATE_GIT_FROM"
MANY = 300  # slaves that fetch at once: more than connections are served otherwise


def create_hanuman(forge):
    """The forge's repository hanuman: two branches and two tags."""
    repo = forge.create("hanuman")
    repo.commit({"b": "1"}, branch="topic/one")
    repo.git("tag", "light", "topic/one")
    repo.git("tag", "-a", "-m", "one", "v1.0", "main")
    return repo


@pytest.fixture
def repo(upstream):
    return create_hanuman(upstream)


@pytest.fixture
def relay(start_slave, repo):
    """A slave with hanuman live, which may be cloned from 127.0.0.1."""
    slave = start_slave(GIT_FROM="127.0.0.1, ::1")
    assert slave.wait_update()["state"] == "live"
    return slave


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """Such a slave that a file's tests share, those that change nothing; `repo` is the forge's."""
    folder = tmp_path_factory.mktemp("still")
    forge = Upstream(folder / "upstream")
    repo = create_hanuman(forge)
    (folder / "slave").mkdir()
    slave = Slave(folder / "slave", {"BASE_URL": forge.base_path, "GIT_FROM": "127.0.0.1"})
    slave.repo = repo
    assert slave.start().wait_update()["state"] == "live"
    yield slave
    stop_for_good(slave)


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


def read_all(connection):
    return b"".join(iter(lambda: connection.recv(65536), b""))


def send(slave, text):
    """What a connection answers to these bytes, to its end."""
    with socket.create_connection(("127.0.0.1", slave.port), 40) as connection:
        connection.sendall(text)
        return read_all(connection)


def commit_much(repo, mib, seed=1):
    """A commit of so many MiB that can't be compressed."""
    dice = random.Random(seed)
    files = {
        "big/%d" % number: dice.getrandbits(8 * MIB).to_bytes(MIB, "big") for number in range(mib)
    }
    return repo.commit(files)


def stand_in_for_git(slave, text):
    """From now on this slave's git does this where it is to serve somebody; "$@" is git's own."""
    path = slave.bin / "git"
    path.write_text(
        "#!/bin/sh\nPATH=${PATH#*:}\n"
        'case "$*" in *http-backend*|*upload-pack*)\n%s\n;; esac\nexec git "$@"\n' % text
    )
    path.chmod(0o755)


def count_runs(slave):
    """From now on each time this slave's git serves is a line of the file that is returned."""
    log = slave.home / "runs"
    stand_in_for_git(slave, 'echo "$REQUEST_METHOD $*" >>"%s"' % log)
    return log


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


# -- what is served --------------------------------------------------------------


@pytest.mark.parametrize("protocol", daily(1, ["2", "1", "0"]))
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


@pytest.mark.slow
def test_two_tiers_give_all_branches_and_tags(relay, repo, start_slave, tmp_path):
    middle = start_slave(BASE_URL=relay.url + "/git", GIT_FROM="127.0.0.1")
    leaf = start_slave(BASE_URL=middle.url + "/git")
    for number in range(2):
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


def test_the_forge_sees_one_clone_whatever_is_beneath(
    start_slave, http_upstream, tmp_path, upstream
):
    """From one signal: the relay has the commit from the forge, all beneath it from the relay."""
    repo = create_hanuman(upstream)
    relay = start_slave(BASE_URL=http_upstream.url, GIT_FROM="127.0.0.1")
    leaves = [start_slave(BASE_URL=relay.url + "/git") for _ in range(3)]
    slavelist = tmp_path / "beneath"
    slavelist.write_text("".join(leaf.url + "\n" for leaf in leaves))
    relay.stop()
    relay.settings["SLAVELIST"] = slavelist
    relay.start()
    for number in range(2):
        commit = repo.commit({"a": str(number)})
        del http_upstream.requests[:]
        record = relay.wait_update()
        assert (record["commit"], record["beneath"]) == (commit, {"live": 3})
        asked = [one for one in http_upstream.requests if "/info/refs" in one]
        assert asked == ["GET /hanuman.git/info/refs?service=git-upload-pack"]
        assert {leaf.json("/status?repo=hanuman")["commit"] for leaf in leaves} == {commit}


@pytest.mark.slow
def test_a_slave_beneath_takes_no_more_than_is_new(relay, repo, start_slave):
    commit_much(repo, 3)
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


@pytest.mark.slow
def test_a_submodule_by_a_relative_url_comes_from_the_relay_that_has_it(
    start_slave, upstream, repo
):
    library = upstream.create("library", {"lib": "1"})
    link = ("160000", library.head())
    modules = '[submodule "lib"]\n\tpath = lib\n\turl = ../library.git\n'
    repo.commit({".gitmodules": modules, "lib": link})
    # By a path git takes no submodules: those of the relay are not what is tried here.
    relay = start_slave(GIT_FROM="127.0.0.1", SUBMODULES="no")
    leaf = start_slave(BASE_URL=relay.url + "/git")
    relay.wait_update()
    record = leaf.wait_update()
    assert record["state"] == "failed" and "library.git" in record["message"]
    relay.wait_update("library")
    assert leaf.wait_update()["state"] == "live"
    assert (leaf.repos / "hanuman" / "lib" / "lib").read_text() == "1"


@pytest.mark.parametrize("way", [{"args": ["--git-from", "127.0.0.1"]},
                                 {"env": {GIT_FROM: "127.0.0.1"}}], ids=["option", "variable"])
def test_an_option_and_a_variable_set_it_too(start_slave, repo, way):
    slave = start_slave(**way)
    slave.wait_update()
    assert repo.head() in run_git("ls-remote", url(slave))


def test_ls_remote_and_head(still):
    head = still.repo.head()
    got = run_git("ls-remote", "--symref", url(still), "HEAD")
    assert got == "ref: refs/heads/main\tHEAD\n%s\tHEAD" % head
    status, headers, body = still.get(LIST, method="HEAD")
    assert (status, body) == (200, b"")
    assert headers["Content-Type"] == "application/x-git-upload-pack-advertisement"
    assert "no-cache" in headers["Cache-Control"]


def test_a_shallow_clone(still, tmp_path):
    run_git("clone", "-q", "--depth", "1", url(still), tmp_path / "tree")
    assert run_git("rev-parse", "HEAD", cwd=str(tmp_path / "tree")) == still.repo.head()


def test_what_somebody_was_told_of_is_sent_after_a_force_push(relay, repo, tmp_path):
    old = repo.head()
    repo.commit({"a": "another history"}, parent="")
    relay.wait_update()
    run_git("init", "-q", tmp_path / "tree")
    run_git("fetch", "-q", url(relay), old, cwd=str(tmp_path / "tree"))
    assert run_git("cat-file", "-t", old, cwd=str(tmp_path / "tree")) == "commit"


def settings_of_page(beginning, *pairs):
    """The settings that a block of the page has, with paths and names of ours."""
    (text,) = [one.text for one in BLOCKS if one.begins("scale.md", beginning)]
    for shown, here in pairs:
        assert shown in text
        text = text.replace(shown, str(here))
    return dict(line.split("=", 1) for line in text.splitlines())


@pytest.mark.slow
def test_over_tls_as_the_page_has_it(start_slave, repo, authority, tmp_path):
    """All beneath, whose git is told of the authority, have the commit from the relay."""
    page_list, page_host = "/etc/server-update/slavelist.txt", "relay.example.org:9999"
    leaf = start_slave()
    slavelist = tmp_path / "slavelist.txt"
    slavelist.write_text(leaf.url + "\n")
    cert = authority.issue("relay")
    relay = start_slave(
        **settings_of_page(
            "GIT_FROM=",
            (page_list, slavelist),
            ("/etc/server-update/relay.pem", cert),
            ("/etc/server-update/relay.key", cert),
            ("10.0.0.0/8", "127.0.0.0/8"),
        )
    )
    here = "127.0.0.1:%d" % relay.port
    leaf.stop()
    leaf.settings.update(settings_of_page("BASE_URL=https://relay", (page_host, here)))
    leaf.start()

    def update():
        """What the relay tells of one update."""
        origin = "https://%s" % here
        context = ssl.create_default_context(cafile=str(authority.cert))
        with urllib.request.urlopen(origin + "/?repo=hanuman", context=context) as answer:
            path = "/status?repo=hanuman&wait=30&update=%d" % json.load(answer)["update"]
        while True:
            with urllib.request.urlopen(origin + path, context=context) as answer:
                record = json.load(answer)
            if record["finished"]:
                return record

    assert update()["beneath"] == {"failed": 1}, "nobody knows the authority"
    command = find_block("scale.md", "git config --global http.https://relay")
    for shown, ours in (
        (page_host, here),
        ("/etc/server-update/authority.pem", str(authority.cert)),
    ):
        assert shown in command
        command = command.replace(shown, ours)
    subprocess.check_call(["sh", "-ec", command], env=dict(os.environ, HOME=str(leaf.home)))
    assert update()["beneath"] == {"live": 1}
    assert leaf.json("/status?repo=hanuman")["commit"] == repo.head()


# -- who may, and what not ---------------------------------------------------------


def error(slave, path, status, method="GET", headers=None):
    got, _, body = slave.get(path, method=method, headers=headers)
    assert got == status, body
    assert body.startswith(b'{"error": "')
    return body


@pytest.mark.parametrize("addresses", ["", "192.0.2.0/24, 2001:db8::/32"])
def test_nobody_else_may_clone(start_slave, repo, addresses):
    slave = start_slave(GIT_FROM=addresses)
    slave.wait_update()
    assert b"GIT_FROM" in error(slave, LIST, 403)
    error(slave, POST, 403, method="POST")
    assert run_git("ls-remote", url(slave), check=False) == ""
    assert (slave.state / "hanuman.git").exists() == bool(addresses)


def test_allow_from_and_allow_repos_hold(start_slave, repo, upstream):
    upstream.create("other")
    slave = start_slave(GIT_FROM="127.0.0.0/8", ALLOW_REPOS="hanu*")
    slave.wait_update()
    shutil.copytree(str(slave.state / "hanuman.git"), str(slave.state / "other.git"))
    error(slave, LIST.replace("hanuman", "other"), 403)
    error(slave, POST.replace("hanuman", "other"), 403, method="POST")
    refused = start_slave(GIT_FROM="127.0.0.0/8", ALLOW_FROM="192.0.2.1")
    error(refused, LIST, 403)


def test_a_secret_is_not_asked_for(start_slave, repo, tmp_path):
    secret = make_secret(tmp_path / "secret", "a secret that nobody knows")
    slave = start_slave(GIT_FROM="127.0.0.1", SECRET_FILE=secret)
    error(slave, "/?repo=hanuman", 401)
    target = "/?repo=hanuman"
    slave.json(target, 202, headers=signature(target))
    wait_until(lambda: (slave.state / "hanuman.git" / "HEAD").exists(), what="the mirror")
    assert repo.head() in run_git("ls-remote", url(slave))
    error(slave, "/status", 401)


def test_it_is_read_only(still, tmp_path):
    run_git("clone", "-q", url(still), tmp_path / "tree")
    failed = subprocess.run(
        ["git", "push", url(still), "main:new"],
        cwd=str(tmp_path / "tree"),
        stderr=subprocess.PIPE,
        check=False,
    )
    assert failed.returncode != 0 and b"not found" in failed.stderr
    error(still, LIST.replace("upload", "receive"), 404)
    error(still, POST.replace("upload", "receive"), 405, method="POST")
    assert refs(still.state / "hanuman.git") == refs(still.repo.path)


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
        ("/git/..git/info/refs?service=git-upload-pack", "GET", 400),
        ("/git/%2e%2e.git/info/refs?service=git-upload-pack", "GET", 400),
        ("/git/%2e%2e%2fx.git/info/refs?service=git-upload-pack", "GET", 400),
        ("/git/hanuman.git/info/refs?service=git-upload-archive", "GET", 404),
        ("/git/hanuman.git/info/refs?service=git-upload-pack&x=1", "GET", 404),
        ("/git/", "GET", 404),
        ("/git/hanuman.git/info/refs?service=git-upload-pack", "POST", 405),
        (POST, "GET", 404),
        (POST, "PUT", 405),
    ],
)
def test_other_paths_and_methods(still, path, method, status):
    error(still, path, status, method=method)


@pytest.mark.parametrize("path", ["/git", "/git?repo=hanuman", "/git?repo=hanuman&wait=1"])
def test_a_path_that_is_none_of_gits(still, path):
    error(still, path, 404)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_body_that_nobody_reads_is_no_request(still, method):
    smuggled = "GET /?repo=smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    head = "%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    answer = send(still, (head % (method, LIST, len(smuggled)) + smuggled).encode())
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1") == 1
    assert "smuggled" not in still.json("/status")["repos"]


def test_two_posts_on_one_connection(still):
    connection = http.client.HTTPConnection("127.0.0.1", still.port, timeout=40)
    for _ in range(2):
        connection.request("POST", POST, LIST_REFS, dict(REQUEST, **V2))
        assert still.repo.head().encode() in connection.getresponse().read()
        assert connection.sock, "the slave has closed it"
    connection.close()


@pytest.mark.parametrize("more", ["&wait=1", "&commit=" + 40 * "1"])
def test_a_name_brings_no_other_parameter(still, more):
    error(still, LIST.replace("hanuman", "hanuman" + more), 404)


def test_before_the_first_update_that_is_said(still):
    text = error(still, LIST.replace("hanuman", "never"), 404)
    assert b"an update makes one" in text


def test_protocols_that_nobody_knows_are_the_oldest(still):
    line = b"001e# service=git-upload-pack\n0000"
    for value in ("version=3", "version=2\tx", "2", ""):
        body = still.get(LIST, headers={"Git-Protocol": value})[2]
        assert body.startswith(line) and still.repo.head().encode() in body
    assert b"version 2" in still.get(LIST, headers=V2)[2]
    assert b"version 1" in still.get(LIST, headers={"Git-Protocol": "version=1"})[2]


def test_no_config_and_no_variable_leads_elsewhere(start_slave, repo, tmp_path):
    evil = tmp_path / "evil"
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\ntouch '%s'\nexec \"$@\"\n" % evil)
    hook.chmod(0o755)
    led = ("GIT_DIR", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE", "GIT_PROJECT_ROOT", "GIT_EXEC_PATH")
    env = dict(dict.fromkeys(led, "/nowhere"), GIT_PROTOCOL="version=1")
    slave = start_slave(GIT_FROM="127.0.0.1", env=env)
    slave.wait_update()
    config = slave.state / "hanuman.git" / "config"
    with config.open("a") as file:
        file.write("[uploadpack]\n\tpackObjectsHook = %s\n" % hook)
        file.write("[core]\n\thooksPath = %s\n" % tmp_path)
    run_git("clone", "-q", url(slave), tmp_path / "tree")
    assert not evil.exists()
    assert b"version 1" not in slave.get(LIST)[2]


# -- bodies --------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "gzip"}], ids=["plain", "gzip"])
def test_bodies_as_they_are_by_gzip_and_in_chunks(still, headers):
    want = still.repo.head().encode()
    body = gzip.compress(LIST_REFS) if headers else LIST_REFS
    assert want in post(still, body, dict(V2, **headers))[2]
    assert want in post(still, iter([body[:5], body[5:]]), dict(V2, **headers))[2]


def head_of_post(*lines):
    return "\r\n".join(
        ["POST %s HTTP/1.1" % POST, "Host: x", "Git-Protocol: version=2", "Connection: close",
         "Content-Type: " + REQUEST["Content-Type"], *lines, "", ""]
    ).encode()


def test_expect_100_continue(still):
    text = head_of_post("Content-Length: %d" % len(LIST_REFS), "Expect: 100-continue")
    with socket.create_connection(("127.0.0.1", still.port), 40) as connection:
        connection.sendall(text)
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(LIST_REFS)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200 ") and still.repo.head().encode() in answer


def test_http_1_0_ends_with_the_connection(still):
    answer = send(still, b"GET " + LIST.encode() + b" HTTP/1.0\r\n\r\n")
    assert b"chunked" not in answer and answer.endswith(b"0000")


@pytest.mark.parametrize(
    "lines, body, status",
    [
        (["Transfer-Encoding: chunked"], b"zz\r\n", 400),
        (["Transfer-Encoding: chunked"], b"-1\r\n", 400),
        ([], b"", 411),
        (["Content-Length: 99999999"], b"", 413),
        (["Content-Length: 1x"], b"", 400),
    ],
)
def test_bad_bodies(still, lines, body, status):
    assert send(still, head_of_post(*lines) + body).startswith(b"HTTP/1.1 %d " % status)


BROKEN = (http.client.HTTPException, OSError)


@pytest.mark.parametrize("headers", [V2, {"Content-Encoding": "gzip"}], ids=["plain", "gzip"])
def test_nonsense_ends_in_a_broken_answer(still, headers):
    """Never in one that looks whole."""
    with pytest.raises(BROKEN):
        post(still, b"what is this?", headers)
    assert still.get("/healthz")[0] == 200


@pytest.mark.parametrize("missing", [12, 4])
def test_what_comes_by_gzip_is_looked_at_to_its_end(still, missing):
    body = gzip.compress(body_for_all(still.repo.head()))[:-missing]
    with pytest.raises(BROKEN):
        post(still, body, dict(V2, **{"Content-Encoding": "gzip"}))


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP"])
def test_gzip_by_all_of_its_names(still, coding):
    body = gzip.compress(body_for_all(still.repo.head()))
    assert b"PACK" in post(still, body, dict(V2, **{"Content-Encoding": coding}))[2]


def test_a_body_in_chunks_is_bounded_too(still):
    head = head_of_post("Transfer-Encoding: chunked")
    piece = b"fffff\r\n" + b"x" * 0xFFFFF + b"\r\n"
    with socket.create_connection(("127.0.0.1", still.port), 40) as connection:
        connection.sendall(head)
        with contextlib.suppress(OSError):
            for _ in range(30):
                connection.sendall(piece)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_zip_bomb_is_not_unpacked_in_memory(relay, is_chunked):
    before = rss_kib(relay.process.pid)
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    have = b"0032have " + b"1" * 40 + b"\n"
    body = b"".join(bomb.compress(have * 20000) for _ in range(60)) + bomb.flush()
    assert len(body) < MIB
    sent = iter([body]) if is_chunked else body
    with contextlib.suppress(*BROKEN):
        post(relay, sent, dict(V2, **{"Content-Encoding": "gzip"}))
    assert rss_kib(relay.process.pid) - before < 40 * 1024


def test_a_body_that_is_cut_off_starts_nothing(relay):
    log = count_runs(relay)
    with socket.create_connection(("127.0.0.1", relay.port), 40) as connection:
        connection.sendall(head_of_post("Content-Length: 1000") + LIST_REFS)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert lines(log) == []


@pytest.mark.parametrize("protocol", daily(1, ["2", "0"]))
@pytest.mark.parametrize("cut", ["*advertise*", "*--stateless-rpc /*"])
def test_what_is_cut_off_is_no_success(relay, tmp_path, protocol, cut):
    """It never looks whole, wherever it ends."""
    for size in (0, 40, 100):
        stand_in_for_git(
            relay, 'case "$*" in %s) git "$@" | head -c %d; exit 1 ;; esac' % (cut, size)
        )
        command = ["git", "-c", "protocol.version=" + protocol, "clone", "-q", "--bare"]
        done = subprocess.run([*command, url(relay), str(tmp_path / "x")], stderr=subprocess.PIPE)
        assert done.returncode != 0 and not (tmp_path / "x").exists()
        relay.stop()
        relay.start()


OLDEST = ("-c", "protocol.version=0")  # which tells all commits that there are


@pytest.mark.slow
def test_a_request_of_many_commits(still, tmp_path):
    """git sends more than 1 MiB in chunks, and more than 1 KiB by gzip."""
    run_git("init", "-q", tmp_path / "tree")
    tree = str(tmp_path / "tree")
    stream = b"".join(
        b"commit refs/heads/b%d\ncommitter x <x@x> %d +0000\ndata 1\nx\n"
        % (number, 10**9 + number)
        for number in range(6000)
    )
    run_git("fast-import", "--quiet", cwd=tree, text=stream)
    run_git(*OLDEST, "-c", "http.postBuffer=70000", "fetch", "-q", url(still), cwd=tree)
    assert run_git("rev-parse", "FETCH_HEAD", cwd=tree) == still.repo.head()


# -- many at once ------------------------------------------------------------------


def clone_all(slave, number, tmp_path):
    """Clones side by side; all must go well."""
    command = ["git", "clone", "-q", "--bare", url(slave)]
    running = [
        subprocess.Popen([*command, str(tmp_path / ("clone-%d" % one))], stderr=subprocess.PIPE)
        for one in range(number)
    ]
    assert [one.communicate()[1] for one in running] == [b""] * number
    assert [one.returncode for one in running] == [0] * number


def test_what_many_ask_alike_is_made_once(relay, repo, tmp_path):
    log = count_runs(relay)
    clone_all(relay, 20, tmp_path)
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


READER = r"""
import sys, http.client, urllib.parse
url = urllib.parse.urlparse(sys.argv[1])
want = b"want %s\n" % sys.argv[2].encode()
def line(text):
    return b"%04x%s" % (len(text) + 4, text)
options = line(b"no-progress") + line(want) + line(b"done\n")
body = line(b"command=fetch") + b"0001" + options + b"0000"
connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)
headers = {"Git-Protocol": "version=2", "Content-Type": "application/x-git-upload-pack-request"}
connection.request("POST", url.path + "/git-upload-pack", body, headers)
answer = connection.getresponse()
size = 0
while True:
    part = answer.read(65536)
    if not part:
        break
    size += len(part)
print(size)
"""


def read_at_once(slave, commit, number):
    """How much each of so many that ask for all of that commit at once has got."""
    reader = [PYTHON, "-c", READER, url(slave), commit]
    readers = [subprocess.Popen(reader, stdout=subprocess.PIPE) for _ in range(number)]
    return [int(one.communicate()[0]) for one in readers]


@pytest.mark.slow
def test_clones_of_much_keep_little_in_memory(relay, repo):
    commit_much(repo, 100)
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
    told = read_at_once(relay, repo.head(), 60)
    done.set()
    thread.join()
    assert len(set(told)) == 1 and told[0] > 100 * MIB
    assert max(most) - before < 40 * 1024


def fetching(slave):
    """The processes that serve somebody, or what waits in their place."""
    found = []
    for pid in processes_below(slave.home.parent):
        with contextlib.suppress(OSError), open("/proc/%d/cmdline" % pid, "rb") as file:
            if re.search(rb"http-backend|upload-pack", file.read()):
                found.append(pid)
    return found


def wait_for_git(slave):
    """The process that serves, once it is there."""
    return wait_until(lambda: fetching(slave), what="a git that waits")[0]


def slow_git(slave):
    """From now on this slave's git answers a POST once the file is there that is returned."""
    go = slave.home / "go"
    stand_in_for_git(
        slave,
        'case "$REQUEST_METHOD $*" in GET*|*advertise*) ;; *)\n'
        'until [ -e "%s" ]; do sleep 0.05; done ;; esac' % go,
    )
    return go


def ask(slave, body=LIST_REFS):
    """A connection that has asked, and whose answer is not read."""
    connection = socket.create_connection(("127.0.0.1", slave.port), 40)
    connection.sendall(head_of_post("Content-Length: %d" % len(body)) + body)
    return connection


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def packet(text):
    return b"%04x%s" % (len(text) + 4, text)


def body_for_all(commit):
    """What asks for all that a commit has, in protocol 2."""
    options = packet(b"want " + commit.encode()) + packet(b"done")
    return packet(b"command=fetch") + b"0001" + options + b"0000"


def test_a_first_clone_comes_while_it_is_made(relay, repo):
    """To all who ask alike, also to who asks when half of it is there."""
    commit_much(repo, 3)
    relay.wait_update()
    go = relay.home / "go"
    stand_in_for_git(
        relay,
        'git "$@" | { head -c %d; until [ -e "%s" ]; do sleep 0.05; done; cat; }; exit'
        % (MIB, go),
    )
    connections = [http.client.HTTPConnection("127.0.0.1", relay.port, timeout=40)
                   for _ in range(2)]
    answers, begun = [], []
    for connection in connections:
        connection.request("POST", POST, body_for_all(repo.head()), dict(REQUEST, **V2))
        answers.append(connection.getresponse())
        begun.append(answers[-1].read(MIB // 2))
    assert {len(part) for part in begun} == {MIB // 2}
    go.touch()
    first, other = (part + answer.read() for part, answer in zip(begun, answers))
    assert len(first) > 3 * MIB and first == other
    for connection in connections:
        connection.close()


def test_who_goes_away_takes_the_answer_from_nobody(relay, repo):
    go = slow_git(relay)
    one = ask(relay)
    other = ask(relay)
    wait_for_git(relay)
    reset(one)
    go.touch()
    assert repo.head().encode() in read_all(other)


def test_half_sent_bodies_keep_nobody_from_being_served(start_slave, repo):
    """They wait for their peer, and give way as others that do."""
    slave = start_slave(GIT_FROM="127.0.0.1", constants={"MAX_GIT_CONNECTIONS": 10})
    slave.wait_update()
    with contextlib.ExitStack() as stack:

        def connect():
            return stack.enter_context(socket.create_connection(("127.0.0.1", slave.port), 40))

        def send_half():
            connect().sendall(head_of_post("Content-Length: 4"))
            time.sleep(0.1)  # until its thread is at the body

        for _ in range(12):
            send_half()
        for _ in range(3):
            waiting = connect()
            time.sleep(0.1)
            send_half()
            send_half()
            waiting.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert read_all(waiting).endswith(b"ok\n")


@pytest.mark.slow
def test_many_different_requests_leave_files_for_an_update(start_slave, repo):
    slave = start_slave(GIT_FROM="127.0.0.1")
    slave.stop()
    slave.command = ["sh", "-c", 'ulimit -n 300; exec "$@"', "sh", *slave.command]
    slave.start()
    slave.wait_update()
    for number in range(500):
        with contextlib.suppress(*BROKEN):
            post(slave, b"%04x" % number, V2)
    assert slave.wait_update()["state"] == "live"


@pytest.mark.slow
def test_a_full_disk_breaks_answers_and_is_forgotten_with_it(start_slave, repo, small_disk):
    """Never a part that looks whole, nor a failure that is told again once there is room."""
    for number in range(300):
        repo.git("branch", "a-branch-of-many-%d" % number, "main")

    def is_whole(body):
        return body.endswith(b"0000") and body.count(b"a-branch-of-many") == 300

    disk = small_disk(4 * MIB)
    slave = start_slave(GIT_FROM="127.0.0.1", REPOS_DIR=disk / "repos")
    slave.wait_update()
    filler = disk / "filler"
    for room in (16, 4, 0):
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        os.truncate(str(filler), filler.stat().st_size - room * 1024)
        # Something else may have made room meanwhile.
        with contextlib.suppress(*BROKEN):
            status, _, body = slave.get(LIST)
            assert status != 200 or is_whole(body)
        filler.unlink()
        status, _, body = slave.get(LIST)
        assert status == 200 and is_whole(body)
        slave.stop()
        slave.start()


def test_a_stop_ends_git(relay):
    slow_git(relay)
    with ask(relay):
        pid = wait_for_git(relay)
        assert relay.stop() == 0
        assert not is_alive(pid)


def test_a_slave_that_fetches_pushes_none_out(relay, repo):
    """So many at once wait for the same answer; and the slave takes signals meanwhile."""
    go = slow_git(relay)
    asked = [ask(relay) for _ in range(MANY)]
    wait_for_git(relay)
    assert relay.json("/?repo=hanuman", 202)["state"] == "queued"
    go.touch()
    answers = [read_all(one) for one in asked]
    assert [answer for answer in answers if repo.head().encode() not in answer] == []


# -- while it is updated -----------------------------------------------------------


class Client:
    """Fetches into a mirror of its own, again and again, and looks at what it got."""

    def __init__(self, relay, path):
        self.relay, self.path = relay, str(path)
        self.faults = []
        self.fetches = 0

    def git(self, *args):
        """What git says, on both streams, as bytes; its fault is noted."""
        options = ["-c", "protocol.version=%d" % (self.fetches % 3)]
        done = subprocess.run(
            ["git", *options, "--git-dir", self.path, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode:
            self.faults.append((args, done.stdout))
        return done.stdout

    def fetch(self):
        """Every fifth is a whole clone."""
        if self.fetches % 5 == 0:
            shutil.rmtree(self.path, ignore_errors=True)
            self.git("clone", "-q", "--mirror", url(self.relay), self.path)
        else:
            self.git("fetch", "-q", "--prune")
        self.fetches += 1

    def check(self):
        """It must be whole, and of one moment: all refs that move do so in one push."""
        said = self.git("fsck", "--full", "--no-dangling", "--no-progress")
        told = self.git("log", "--no-walk", "--format=%s", "main", "other", "tag").split(b"\n")
        if said or len(set(told)) != 2:
            self.faults.append((said, told))

    def run(self, turns):
        while turns.get() is not None:
            self.fetch()
            self.check()


@contextlib.contextmanager
def clients_of(relay, tmp_path, number):
    """Clients at work, and a queue, of which each entry is a fetch; it is full if they lag."""
    clients = [Client(relay, tmp_path / ("client-%d" % one)) for one in range(number)]
    turns = queue.Queue(number)
    threads = [threading.Thread(target=client.run, args=(turns,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield clients, turns
    finally:
        for _ in threads:
            turns.put(None)
        for thread in threads:
            thread.join()


def push(repo, number):
    """Moves a branch and a tag with main, in one push; every fifth rewrites what there was."""
    parent = "" if number % 5 == 4 else None
    commit = repo.commit({"a": str(number)}, message="update %d" % number, parent=parent)
    repo.git(
        "update-ref",
        "--stdin",
        text="update refs/heads/other %s\nupdate refs/tags/tag %s\n" % (commit, commit),
    )
    return commit


@pytest.mark.parametrize(
    "updates, fetches", [(8, 3), pytest.param(100, 5, marks=pytest.mark.slow)]
)
def test_no_fetch_fails_or_mixes_while_the_relay_is_updated(
    relay, repo, start_slave, tmp_path, updates, fetches
):
    """500 fetches during 100 updates; and what comes through two relays equals the forge's."""
    below = start_slave(BASE_URL=relay.url + "/git", GIT_FROM="127.0.0.1")
    push(repo, 0)
    relay.wait_update()
    with clients_of(relay, tmp_path, 4) as (clients, turns):
        for number in range(1, updates + 1):
            commit = push(repo, number)
            for _ in range(fetches):
                turns.put("fetch")
            assert relay.wait_update()["commit"] == commit
            if number % 20 == 5:
                assert below.wait_update()["commit"] == commit
    assert [client.faults for client in clients] == [[]] * 4
    assert sum(client.fetches for client in clients) == updates * fetches
    below.wait_update()
    run_git("clone", "-q", "--mirror", url(below), tmp_path / "through-two")
    assert refs(tmp_path / "through-two") == refs(repo.path)
    for path in (tmp_path / "through-two", below.state / "hanuman.git",
                 relay.state / "hanuman.git"):
        assert run_git("--git-dir", path, "fsck", "--full", "--no-dangling") == ""


@pytest.mark.slow
def test_slaves_beneath_follow_while_the_relay_is_updated(relay, repo, start_slave):
    leaves = [start_slave(BASE_URL=relay.url + "/git") for _ in range(3)]
    for number in range(3):
        repo.commit({"a": str(number)})
        relay.wait_update()
        asked = [(leaf, leaf.signal()) for leaf in leaves]
        repo.commit({"a": "meanwhile %d" % number})
        relay.signal()
        for leaf, update in asked:
            assert leaf.wait_update(update=update)["state"] == "live"


# -- when the mirror is at fault ------------------------------------------------------


def test_a_mirror_that_is_not_up_to_date_is_no_success(start_slave, repo, tmp_path):
    """Nothing beneath is started: it would get what was there before, or nothing."""
    leaf = start_slave()
    slavelist = tmp_path / "beneath"
    slavelist.write_text(leaf.url + "\n")
    slave = start_slave(GIT_FROM="127.0.0.1", SLAVELIST=slavelist)
    leaf.stop()
    leaf.settings["BASE_URL"] = slave.url + "/git"
    leaf.start()
    script = slave.bin / "slave-activate"
    text = script.read_text()
    write = '    with open(path + ".new", "wb") as file:\n'
    broken = text.replace(write, '    raise OSError(28, "No space left", path)\n' + write)
    assert broken != text
    script.write_text(broken)
    record = slave.wait_update()
    assert (record["state"], record["commit"], record["hook"]) == ("live", repo.head(), 1)
    assert record["beneath"] == {"not started": 1}
    assert record["message"].startswith(
        "live, but the mirror for GIT_FROM could not be brought up"
    )
    assert leaf.json("/status")["repos"] == {}
    script.write_text(text)
    record = slave.wait_update()
    assert record["beneath"] == {"live": 1}
    assert leaf.json("/status?repo=hanuman")["commit"] == repo.head()


def test_a_damaged_mirror_breaks_the_answer_and_heals(relay, tmp_path):
    for path in (relay.state / "hanuman.git" / "objects" / "pack").glob("*.pack"):
        text = path.read_bytes()
        path.unlink()
        path.write_bytes(text[:40] + b"damaged" + text[47:])
    with pytest.raises(AssertionError):
        run_git("clone", "-q", "--bare", url(relay), tmp_path / "broken")
    relay.wait_update()
    run_git("clone", "-q", "--bare", url(relay), tmp_path / "whole")


@pytest.mark.slow
def test_without_git_from_the_mirror_goes_with_the_next_update(relay):
    relay.stop()
    del relay.settings["GIT_FROM"]
    relay.start()
    error(relay, LIST, 403)
    relay.wait_update()
    assert not (relay.state / "hanuman.git").exists()
