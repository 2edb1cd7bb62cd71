"""Connections of slave.py: none leaves anything behind, whatever peers do or the host lacks."""

import json
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import time

import pytest
from processes import cpu_s, rss_kib, threads_of, wait_until
from slave_support import THREADS, runs, stand_in, wait_runs

RESETS = 1600
REQUESTS = int(os.environ.get("REQUESTS", 6000))  # of all kinds, a third of them spoilt
MAX_GROWTH_KIB = 2000
SLOW_S = 5  # longer than a header may take
REFUSALS = 1500
BUSY_CPU_S = 1  # of 2; who waits takes hardly any


def connect(port, timeout=300):
    return socket.create_connection(("127.0.0.1", port), timeout)


def reset(connection):
    """Closes it so that the other side gets a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_all(connection):
    """What comes until the other side closes, also by a reset."""
    got = b""
    try:
        while True:
            part = connection.recv(1 << 16)
            if not part:
                return got
            got += part
    except ConnectionError:
        return got


def ask(port, data):
    with connect(port) as connection:
        connection.sendall(data)
        return read_all(connection)


def open_files(slave):
    return len(os.listdir("/proc/%d/fd" % slave.process.pid))


# -- resets


def test_connections_that_are_reset_leave_nothing(start_slave):
    slave = start_slave()
    slave.get("/healthz")
    wait_until(lambda: threads_of(slave.process.pid) == THREADS, what="threads to end")
    before = open_files(slave)
    for _ in range(RESETS):
        connection = connect(slave.port)
        connection.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        reset(connection)
    wait_until(lambda: open_files(slave) <= before, what="descriptors as before")
    far = [connect(slave.port) for _ in range(10)]
    time.sleep(0.1)  # they are so far away
    for client in far:
        client.sendall(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n")
    for client in far:
        assert read_all(client).startswith(b"HTTP/1.1 200 OK\r\n")
        client.close()


def room_for_one(slave):
    """Whether one more is answered; another gives way for it, where there are too many."""
    return slave.get("/healthz")[0] == 200


@pytest.mark.parametrize("is_reset", [True, False], ids=["reset", "too many"])
def test_who_follows_an_update_leaves_nothing_either(start_slave, tmp_path, is_reset):
    slave = start_slave()
    stand_in(slave, 'until [ -e "%s" ]; do sleep 0.05; done' % (tmp_path / "go"))
    update = slave.signal()
    wait_runs(slave, 1)
    wait_until(lambda: threads_of(slave.process.pid) <= THREADS + 1, what="idle threads to end")
    before = open_files(slave)
    followers = []
    for _ in range(300):  # more than there is room for
        follower = connect(slave.port)
        follower.sendall(b"GET /status?repo=hanuman&update=%d&wait=30 HTTP/1.1\r\n\r\n" % update)
        if is_reset:
            reset(follower)
        else:
            followers.append(follower)
    if not is_reset:
        wait_until(lambda: room_for_one(slave) and open_files(slave) <= before + 260,
                   what="some to give way")
        for follower in followers:
            reset(follower)
    wait_until(lambda: open_files(slave) <= before, what="descriptors as before")
    half = connect(slave.port)
    half.sendall(b"GET /status?repo=hanuman&update=%d&wait=30 HTTP/1.0\r\n\r\n" % update)
    half.shutdown(socket.SHUT_WR)
    time.sleep(1.5)  # longer than between two looks at the peer
    (tmp_path / "go").touch()
    assert b'"live"' in read_all(half), "who has only nothing more to say still gets an answer"


def spoil(port, dice, request):
    """Sends a request that is reset, cut off or malformed."""
    with connect(port) as connection:
        kind = dice.randrange(4)
        if kind == 0:
            connection.sendall(request[:dice.randrange(len(request))])
        elif kind == 1:
            connection.sendall(request)
        elif kind == 2:
            at = dice.randrange(len(request))
            connection.sendall(request[:at] + dice.choice([b"\0", b"\r", b"\xff ", b":"])
                               + request[at + 1:])
            connection.shutdown(socket.SHUT_WR)
            read_all(connection)
        else:
            connection.sendall(request)
            connection.recv(dice.randrange(1, 40))
        if kind != 2:
            reset(connection)


@pytest.mark.slow
def test_a_long_day(start_slave, tmp_path):
    """Requests of all kinds; then there are as many files, threads and bytes as at the start."""
    page = tmp_path / "page.html"
    page.write_bytes(b"x" * 200000)
    slave = start_slave(args=[page])
    stand_in(slave)
    dice = random.Random(7)
    targets = [b"/", b"/healthz", b"/status", b"/status?repo=a", b"/status?repo=nothing",
               b"/?repo=a", b"/?repo=b&ref=x&note=why", b"/?repo=..", b"/nowhere",
               b"/status?repo=a&update=1", b"/status?repo=a&history=1", b"/get/?repo=c&by=me"]
    methods = [b"GET", b"GET", b"GET", b"HEAD", b"POST"]

    def send(count):
        for number in range(count):
            request = b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % (
                dice.choice(methods), dice.choice(targets))
            if number % 3 == 0:
                try:
                    spoil(slave.port, dice, request)
                except OSError:
                    pass  # reset by the slave first
            else:
                assert ask(slave.port, request).startswith(b"HTTP/1.1 ")

    def rest():
        wait_until(lambda: not any(one["state"] in ("queued", "running")
                                   for one in slave.json("/status")["repos"].values()))
        wait_until(lambda: threads_of(slave.process.pid) == THREADS, what="threads to end")
        return open_files(slave), rss_kib(slave.process.pid)

    send(1000)
    files, memory = rest()
    send(REQUESTS)
    files_after, memory_after = rest()
    assert files_after <= files
    assert memory_after - memory < MAX_GROWTH_KIB
    assert "Traceback" not in slave.log()


# -- headers

MALFORMED = [
    b"no colon",
    b": nameless",
    b" folded: x",
    b"\tfolded: x",
    b"a b: c",
    b"name : x",
    b"X: a\rY: b",
    b"X: \0",
    b"X: \x01",
    b"X: \x7f",
    b"\xe9: x",
    b"X: y\r",
    b"\r",
]


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_header_is_400_and_nothing_after_it_a_request(idle_slave, line):
    """http.client drops it with all that follow, so that the body would be a second request."""
    slave = idle_slave
    body = b"GET /?repo=smuggled HTTP/1.1\r\n\r\n"
    got = ask(slave.port, b"GET /healthz HTTP/1.1\r\n" + line
              + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert got.startswith(b"HTTP/1.1 400 ")
    assert got.count(b"HTTP/1.1 ") == 1
    assert json.loads(got.partition(b"\r\n\r\n")[2].decode()) == {"error": "malformed header"}
    assert not list(slave.state.glob("*.json"))


def test_a_header_of_any_kind_that_is_allowed_is_taken(idle_slave):
    slave = idle_slave
    for line in (b"X:", b"X:y", b"X: \t y \t", b"X: \xc3\xa9 a:b", b"!#$%&'*+.^_`|~-09aZ: x"):
        got = ask(slave.port, b"GET /healthz HTTP/1.1\r\n" + line
                  + b"\r\nConnection: close\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200 "), line


# -- what the host lacks


def test_closed_standard_files(start_slave):
    """The first connections would be 0, 1 and 2, and get the log."""
    slave = start_slave()
    slave.stop()
    slave.command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *slave.command]
    slave.start(wait=False)

    def is_up():
        try:
            return connect(slave.port)
        except ConnectionError:
            return None
    first = wait_until(is_up, what="slave.py to listen")
    others = [connect(slave.port) for _ in range(5)]
    for name in "012":
        assert os.readlink("/proc/%d/fd/%s" % (slave.process.pid, name)) == "/dev/null"
    refused = ask(slave.port, b"GET /nowhere HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 404 ")
    for client in [first, *others]:
        client.sendall(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 200 OK\r\n")
        client.close()
    assert slave.stop() == 0


def test_few_files_make_it_slow_but_not_busy(start_slave):
    slave = start_slave()
    slave.stop()
    slave.command = ["sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *slave.command]
    slave.start()
    stand_in(slave)
    silent = [connect(slave.port) for _ in range(120)]
    # What gives way to a flood is closed a moment later.
    wait_until(lambda: room_for_one(slave) and open_files(slave) <= 24)
    record = slave.wait_update()
    assert record["state"] == "live", "files are kept for updates: %s" % record
    before = cpu_s(slave.process.pid)
    time.sleep(2)
    assert cpu_s(slave.process.pid) - before < BUSY_CPU_S
    for client in silent:
        client.close()
    assert slave.get("/healthz")[0] == 200


def test_no_files_at_all_make_it_slow_but_not_busy(start_slave):
    """A limit that comes later than the start, as by prlimit, below what is open."""
    slave = start_slave()
    stand_in(slave)
    pid = slave.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files(slave), hard))
    waiting = [connect(slave.port) for _ in range(5)]
    before = cpu_s(slave.process.pid)
    time.sleep(2)
    assert cpu_s(slave.process.pid) - before < BUSY_CPU_S
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (1024, hard))
    for client in waiting:
        client.close()
    assert slave.wait_update()["state"] == "live"


def test_no_memory_ends_a_connection_and_no_more(start_slave):
    slave = start_slave()
    stand_in(slave)
    pid = slave.process.pid
    big = b"GET /healthz HTTP/1.1\r\n" + b"X: %s\r\n" % (b"y" * 8000) * 2 + b"\r\n"
    with open("/proc/%d/status" % pid) as status:
        size = int(re.search(r"VmSize:\s+(\d+)", status.read()).group(1)) * 1024
    for room in (0, 100000, 3 << 20, 5 << 20):
        resource.prlimit(pid, resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))
        for _ in range(40):
            with connect(slave.port) as client:
                client.sendall(big)
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        assert slave.process.poll() is None, slave.log()
        wait_until(lambda: slave.get("/healthz")[0] == 200)
    assert slave.wait_update()["state"] == "live"


def test_no_thread_for_an_update_delays_it(start_slave):
    slave = start_slave()
    stand_in(slave, 'until [ -e "$HOME/go" ]; do sleep 0.02; done')
    slave.signal("busy")
    wait_runs(slave, 1)
    pid = slave.process.pid
    with open("/proc/%d/status" % pid) as status:
        size = int(re.search(r"VmSize:\s+(\d+)", status.read()).group(1)) * 1024
    client = connect(slave.port)  # has a thread before there are no more
    client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
    client.recv(999)
    resource.prlimit(pid, resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
    client.sendall(b"GET /?repo=late HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert read_all(client).startswith(b"HTTP/1.1 202 ")
    client.close()
    (slave.home / "go").touch()
    resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    wait_until(lambda: {one["state"] for one in slave.json("/status")["repos"].values()}
               == {"live"}, what="both updates to be live")


# -- the log


def test_refusals_are_logged_ten_a_second_then_counted(start_slave):
    slave = start_slave()
    began = time.monotonic()
    for _ in range(REFUSALS):
        assert ask(slave.port, b"GET /?repo=.. HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    took = time.monotonic() - began

    def counted():
        left_out = sum(map(int, re.findall(r"(\d+) more like these were left out", slave.log())))
        told = slave.log().count("refused with 400") + left_out
        return REFUSALS - looks <= told <= REFUSALS
    looks = 2 * (took + 2)  # one may be lost where two threads meet, see Log
    wait_until(counted, what="all refusals, logged or counted")
    assert slave.log().count("refused with 400") <= 10 * (took + 2)
    assert slave.log().count("left out") <= 2 * (took + 2)


# -- the served file


def test_a_served_file_takes_as_long_as_its_reader(start_slave, tmp_path):
    page = tmp_path / "page"
    page.write_bytes(b"x" * 26_000_000)
    slave = start_slave(args=[page], constants={"HEADER_TIMEOUT_S": 2})
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    slow.settimeout(60)
    slow.connect(("127.0.0.1", slave.port))
    slow.sendall(b"GET / HTTP/1.1\r\n\r\n")
    got, began = 0, time.monotonic()
    while True:
        part = len(slow.recv(1 << 16))
        if not part:
            break
        got += part
        pause = began + got * SLOW_S / 26_000_000 - time.monotonic()
        if pause > 0:
            time.sleep(pause)
    assert got > 26_000_000, "all of it"
    assert time.monotonic() - began > SLOW_S - 1
    slow.close()


def test_no_more_of_a_file_that_grows_is_sent_than_was_announced(start_slave, tmp_path):
    page = tmp_path / "page"
    page.write_bytes(b"x" * 4_000_000)
    slave = start_slave(args=[page])
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.settimeout(30)
    slow.connect(("127.0.0.1", slave.port))
    slow.sendall(b"GET / HTTP/1.1\r\n\r\n")
    got = slow.recv(4096)
    with page.open("ab") as grows:
        grows.write(b"y" * 1_000_000)
    got += read_all(slow)
    slow.close()
    header, _, body = got.partition(b"\r\n\r\n")
    assert b"Content-Length: 4000000\r\n" in header
    assert (len(body), body.count(b"y")) == (4_000_000, 0)


def test_parameters_without_a_repository_are_a_mistake(start_slave, tmp_path):
    """A page may be asked for with any: others put them into links."""
    slave = start_slave()
    assert slave.json("/?ref=x", status=400) == {"error": "no 'repo'"}
    assert slave.json("/?ref=-x", status=400) == {"error": "bad 'ref'"}
    assert slave.get("/?x=1")[0] == 200
    page = tmp_path / "page"
    page.write_text("hello")
    assert start_slave(args=[page]).get("/?ref=x")[2] == b"hello"


SECRET = "nobody must see this"


@pytest.mark.parametrize("target, shown", [
    ("{secret}", False),
    ("../../secret", False),
    ("../.server-update/site.json", False),
    ("../other/page", False),
    ("/dev/stdin", False),
    ("/proc/self/environ", False),
    (".git/config", False),
    ("folder/inside", False),
    ("real.html", True),
    ("./folder/../real.html", True),
])
def test_no_link_of_a_clone_leads_out_of_it(start_slave, tmp_path, target, shown):
    slave = start_slave(args=["repos/site/index.html"])
    secret = slave.home / "secret"
    secret.write_text(SECRET)
    site, other = slave.repos / "site", slave.repos / "other"
    for folder in (site, other):
        folder.mkdir(parents=True)
    (site / "folder").mkdir()
    (site / ".git").mkdir()
    (site / ".git" / "config").write_text("url = https://user:%s@host/" % SECRET)
    (site / "folder" / "inside").symlink_to("../.git/config")
    (other / "page").write_text(SECRET)
    (site / "real.html").write_text("real")
    (site / "index.html").symlink_to(target.format(secret=secret))
    status, _, body = slave.get("/")
    if shown:
        assert (status, body) == (200, b"real")
    else:
        assert status == 404
        assert json.loads(body.decode()) == {"error": "the served file does not exist now"}
    assert SECRET.encode() not in body


def test_no_folder_of_a_clone_that_is_a_link_leads_out_of_it(start_slave, tmp_path):
    slave = start_slave(args=["repos/site/public/page"])
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "page").write_text(SECRET)
    (slave.repos / "site").mkdir()
    (slave.repos / "site" / "public").symlink_to(outside)
    assert slave.get("/")[0] == 404
    (slave.repos / "site" / "public").unlink()
    (slave.repos / "site" / "public").mkdir()
    (slave.repos / "site" / "public" / "page").write_text("fine")
    assert slave.get("/")[2] == b"fine"


def test_a_link_into_a_clone_is_followed_within_it(start_slave, tmp_path):
    """Also where the way into the clone is a link of the administrator's."""
    (tmp_path / "www").symlink_to(tmp_path / "slave-1" / "home" / "repos" / "site" / "public")
    slave = start_slave(args=[tmp_path / "www" / "page"])
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "page").write_text(SECRET)
    site = slave.repos / "site"
    (site / "public").mkdir(parents=True)
    (site / "public" / "page").write_text("fine")
    assert slave.get("/")[2] == b"fine"
    (site / "public" / "page").unlink()
    (site / "public" / "page").symlink_to(outside / "page")
    assert slave.get("/")[0] == 404
    (site / "public" / "page").unlink()
    (site / "public").rmdir()
    (site / "public").symlink_to(outside)
    assert slave.get("/")[0] == 404


@pytest.mark.parametrize("target, shown", [
    ("../other/page", False),
    ("{outside}", False),
    (".git/config", False),
    ("folder/real", True),
])
def test_no_link_of_a_clone_elsewhere_leads_out_of_it(start_slave, tmp_path, target, shown):
    """A clone that isn't in REPOS_DIR, within another one, by a link of the administrator's."""
    site = tmp_path / "srv" / "site"
    for folder in (site / ".git", site / "folder", tmp_path / "srv" / "other"):
        folder.mkdir(parents=True)
    (tmp_path / "srv" / ".git").write_text("gitdir: elsewhere")
    (site / ".git" / "config").write_text(SECRET)
    (tmp_path / "srv" / "other" / "page").write_text(SECRET)
    (tmp_path / "outside").write_text(SECRET)
    (site / "folder" / "real").write_text("real")
    (site / "page").symlink_to(target.format(outside=tmp_path / "outside"))
    (tmp_path / "www").symlink_to(site)
    slave = start_slave(args=[tmp_path / "www" / "page"])
    status, _, body = slave.get("/")
    if shown:
        assert (status, body) == (200, b"real")
    else:
        assert (status, SECRET.encode() in body) == (404, False)


def test_a_link_in_a_clone_leads_into_a_clone_within_it_and_not_out_of_that(start_slave, tmp_path):
    """As where a folder of other clones is a clone itself, with a link of the administrator's."""
    outer = tmp_path / "srv"
    inner, beside = outer / "site", outer / "site2"
    for folder in (outer, inner, beside):
        (folder / ".git").mkdir(parents=True)
    (outer / "key").write_text(SECRET)
    (beside / "page").write_text(SECRET)
    (outer / "www").symlink_to("site")
    slave = start_slave(args=[outer / "www" / "page"])
    for target in ("../key", "../site2/page"):
        (inner / "page").symlink_to(target)
        assert slave.get("/")[0] == 404
        (inner / "page").unlink()
    (inner / "page").write_text("fine")
    assert slave.get("/")[2] == b"fine"


def test_a_link_in_a_clone_leads_into_none_beside_it(start_slave, tmp_path):
    """Not even where the name of the one begins as that of the other."""
    site, beside = tmp_path / "srv" / "site", tmp_path / "srv" / "site2"
    for folder in (site, beside):
        (folder / ".git").mkdir(parents=True)
    (beside / "page").write_text(SECRET)
    (site / "page").symlink_to("../site2/page")
    assert start_slave(args=[site / "page"]).get("/")[0] == 404


def test_a_clone_in_repos_dir_is_the_one_whatever_is_around_it(start_slave):
    """As where a home is a clone, too, of settings."""
    slave = start_slave(args=["www/page"])
    (slave.home / ".git").mkdir()
    (slave.home / "key").write_text(SECRET)
    site = slave.repos / "site"
    site.mkdir()
    (slave.home / "www").symlink_to("repos/site")
    (site / "page").symlink_to("../../key")
    assert slave.get("/")[0] == 404
    (site / "page").unlink()
    (site / "page").write_text("fine")
    assert slave.get("/")[2] == b"fine"


def test_two_slashes_on_the_way_into_a_clone_change_nothing(start_slave, tmp_path):
    """With `current//page` the rest of the way begins with a slash, once `current` is a link."""
    (tmp_path / "page").symlink_to(str(tmp_path / "current") + "//page")
    slave = start_slave(args=[tmp_path / "page"])
    (slave.home / "key").write_text(SECRET)
    site = slave.repos / "site"
    site.mkdir()
    (tmp_path / "current").symlink_to(site)
    (site / "page").symlink_to(slave.home / "key")
    assert slave.get("/")[0] == 404
    (site / "page").unlink()
    (site / "page").write_text("fine")
    assert slave.get("/")[2] == b"fine"


def test_a_link_outside_of_all_clones_is_the_administrators(start_slave, tmp_path):
    (tmp_path / "real").write_text("fine")
    (tmp_path / "link").symlink_to("real")
    slave = start_slave(args=[tmp_path / "link"])
    assert slave.get("/")[2] == b"fine"


# -- parameters


def test_a_plus_is_a_plus_and_a_space_is_percent_20(start_slave):
    slave = start_slave()
    stand_in(slave)
    update = slave.json("/?repo=a&ref=c++&by=me%20too&note=1+1%20is%202", status=202)["update"]
    record = slave.wait_update("a", update)
    assert (record["ref"], record["by"], record["note"]) == ("c++", "me too", "1+1 is 2")
    assert runs(slave)[0].startswith("a begins c++ ")


def test_a_ref_is_counted_in_bytes(start_slave, upstream):
    repo = upstream.create("hanuman", files={"a": "1"})
    longest = "%C3%A9" * 127
    repo.git("branch", "é" * 120)
    slave = start_slave()
    assert slave.json("/?repo=hanuman&ref=" + "%C3%A9" * 128, status=400) == {"error": "bad 'ref'"}
    record = slave.wait_update(update=slave.signal(ref=longest))
    assert record["state"] == "failed" and "too long" not in record["message"]
    record = slave.wait_update(update=slave.signal(ref="%C3%A9" * 120))
    assert (record["state"], record["commit"]) == ("live", repo.head())


def test_a_ref_that_the_locale_cannot_encode(start_slave, upstream):
    repo = upstream.create("hanuman", files={"a": "1"})
    repo.git("branch", "zürich")
    slave = start_slave(env={"LC_ALL": "C"}, wait=False)
    slave.stop()
    slave.command[1:1] = ["-X", "utf8=0"]
    slave.start()
    record = slave.wait_update(update=slave.signal(ref="z%C3%BCrich"))
    assert (record["state"], record["commit"]) == ("live", repo.head())


# -- addresses


def test_ipv4_is_served_whatever_bindv6only_says(start_slave, tmp_path):
    if os.getuid() or subprocess.call(["unshare", "-n", "true"]):
        pytest.skip("a network of its own needs root")
    if not os.path.exists("/proc/sys/net/ipv6/bindv6only"):
        pytest.skip("no IPv6 on this machine")
    slave = start_slave(BIND="")
    slave.stop()
    script = 'ip link set lo up; echo 1 >/proc/sys/net/ipv6/bindv6only; exec "$@"'
    slave.command = ["unshare", "-n", "sh", "-c", script, "sh", *slave.command]
    slave.start()
    code = ("import socket\nfor host in ('127.0.0.1', '::1'):\n"
            "    with socket.create_connection((host, %d), 5) as one:\n"
            "        one.sendall(b'GET /healthz HTTP/1.0\\r\\n\\r\\n')\n"
            "        print(one.recv(12).decode())\n" % slave.port)
    done = subprocess.run(["nsenter", "-t", str(slave.process.pid), "-n", "python3", "-c", code],
                          stdout=subprocess.PIPE, universal_newlines=True)
    assert done.stdout == "HTTP/1.1 200\nHTTP/1.1 200\n"


# -- the log's reader, addresses, signals at the start


def test_a_log_that_nobody_reads_stops_nothing(start_slave):
    reader, writer = os.pipe()
    slave = start_slave()
    slave.stop()
    stand_in(slave, "yes x | head -n 100000 >&2")
    environ = dict(os.environ, HOME=str(slave.home), SERVER_UPDATE_CONF=str(slave.conf),
                   SERVER_UPDATE_PORT=str(slave.port),
                   PATH=str(slave.bin) + os.pathsep + os.environ["PATH"])
    slave.process = process = subprocess.Popen(
        slave.command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=writer)
    try:
        def is_up():
            try:
                return slave.get("/healthz")[0] == 200
            except OSError:
                return False
        wait_until(is_up, what="it to listen")
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, b"x" * 512)
        except BlockingIOError:
            pass  # full, and its reader lives
        os.set_blocking(writer, True)
        assert slave.wait_update()["state"] == "live"
        assert slave.get("/nope")[0] == 404
        process.terminate()
        assert process.wait(60) == 0
    finally:
        os.close(reader)
        os.close(writer)


def test_allow_from_keeps_nobody_from_healthz(start_slave):
    slave = start_slave(ALLOW_FROM="10.0.0.0/8")
    assert slave.get("/healthz")[0] == 200
    assert slave.get("http://x/healthz?a", method="HEAD")[0] == 200
    for path in ("/", "/status", "/?repo=hanuman", "/healthz/", "/healthzz", "/x?/healthz"):
        assert slave.get(path)[0] == 403, path
    assert slave.get("/healthz", method="POST")[0] == 403


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_at_the_start_is_no_traceback(start_slave, number):
    # What nohup has left ignored would look as if the slave had done so already.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        slave = start_slave(wait=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    # The last of the three that it sets; before that it is Python that starts, not yet this.
    wait_until(lambda: heeds(slave.process.pid, signal.SIGHUP), what="it to heed signals")
    slave.process.send_signal(number)
    if number == signal.SIGHUP:
        wait_until(lambda: "listening on port" in slave.log(), what="it to go on")
        assert slave.stop() == 0
    else:
        assert slave.process.wait(60) == 0
    assert "Traceback" not in slave.log()


def heeds(pid, number):
    """Whether a process catches or ignores a signal: proc(5)."""
    with open("/proc/%d/status" % pid) as lines:
        masks = [line.split()[1] for line in lines if line.startswith(("SigIgn:", "SigCgt:"))]
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def test_too_few_threads_make_it_slow(start_slave):
    """A connection gets the thread of another one, which has waited longest with its header.

    Which that has to be done with in 0.1 s; here in what a busy machine needs for it."""
    slave = start_slave(constants={"SHORTAGE_PAUSE_S": 1, "HEADER_TIMEOUT_S": 300})
    unfinished = []

    def ask_and_begin_another():
        """Has a request answered; its connection keeps a thread, which has all that it needs."""
        unfinished.append(connect(slave.port))
        unfinished[-1].sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert unfinished[-1].recv(9999).startswith(b"HTTP/1.1 200 OK\r\n")
        unfinished[-1].sendall(b"GET /heal")
    for _ in range(8):
        ask_and_begin_another()
    pid = slave.process.pid
    with open("/proc/%d/status" % pid) as status:
        size = int(re.search(r"VmSize:\s+(\d+)", status.read()).group(1)) * 1024
    # There is no room for the stack of one more thread, but for all else.
    resource.prlimit(pid, resource.RLIMIT_AS, (size + (4 << 20), resource.RLIM_INFINITY))
    for _ in range(4):  # the first may have the stack of one that has ended before
        ask_and_begin_another()
    assert "can't start new thread" in slave.log()
    for connection in unfinished:
        connection.close()
