"""slave.py on a hostile network, and in a real browser."""

import http.client
import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import rss_kib, threads_of, wait_until
from slave_support import LONG_POLLS, THREADS, stand_in

DRIPPERS = 300  # connections that send a header's byte a second
SILENT = 50  # connections that never send anything
BROKEN = int(os.environ.get("BROKEN", 20000))  # requests
FUZZERS = 4
KNOWN = (b"200", b"202", b"400", b"405", b"408", b"404", b"414", b"431", b"503", b"505")
LATEST_S = 30  # for a normal client's request meanwhile, on a busy machine
MAX_GROWTH_KIB = 20000


def connect(port):
    return socket.create_connection(("127.0.0.1", port), 60)


def exchange(port, data, half_close=True):
    """Sends raw bytes; all that comes back until the other side closes."""
    with connect(port) as connection:
        try:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            got = b""
            while len(got) < 1 << 20:
                more = connection.recv(1 << 16)
                if not more:
                    break
                got += more
        except socket.timeout:
            raise AssertionError("neither an answer nor an end: %r" % data[:200])
        except OSError:  # reset; ENOTCONN, where that comes before the shutdown
            return b""
        return got


class Crowd:
    """Drippers and silent ones, each taken up again when it is dropped."""

    def __init__(self, port):
        self.port, self.stopped, self.connections = port, threading.Event(), []
        self.drops = 0
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        head = b"GET /?repo=dripped HTTP/1.1\r\nX-Long: " + b"x" * 99999
        places = [None] * (DRIPPERS + SILENT)
        while not self.stopped.wait(1):
            for number, place in enumerate(places):
                try:
                    if place is None:
                        place = places[number] = [connect(self.port), 0]
                        place[0].setblocking(False)
                    if number < DRIPPERS:
                        place[0].send(head[place[1] : place[1] + 1])
                        place[1] += 1
                    elif place[0].recv(1) == b"":
                        raise ConnectionResetError()
                except BlockingIOError:
                    pass
                except OSError:
                    self.drops += 1
                    if place:
                        place[0].close()
                    places[number] = None
        for place in places:
            if place:
                place[0].close()

    def stop(self):
        self.stopped.set()
        self.thread.join()


def broken_requests(dice):
    """Requests that nobody should send, without end."""
    methods = [
        b"GET",
        b"HEAD",
        b"POST",
        b"PUT",
        b"DELETE",
        b"OPTIONS",
        b"CONNECT",
        b"get",
        b"G" * 99,
    ]
    paths = [
        b"/",
        b"/get/",
        b"/status",
        b"/healthz",
        b"//",
        b"/../../etc/passwd",
        b"*",
        b"/%2e%2e/",
        b"/get/../get/",
        b"http://evil.example/",
        b"HTTP://x/get/",
        b"evil.example:443",
    ]
    repos = [
        b"..%2f..%2fetc",
        b"%00",
        b"a%0ab",
        b"%ff%fe",
        b"%c0%ae%c0%ae",
        b"\xff\xfe",
        b"x" * 101,
        b"x" * 9000,
        b"a/b",
        b"%",
        b"%zz",
        b"%E2%80%AE",
        b"a;id",
        b"$(id)",
        b"-x",
        b".git",
        b"a\0b",
        b"",
        b"a&repo=b",
        b"a.git",
        b"hanuman&update=" + b"9" * 99,
        b"a&ref=-x",
        b"a&ref=%ff",
        b"a&ref=a..b",
        b"a&wait=1e9",
        b"a&wait=-1",
        b"a&ref=" + b"r" * 256,
    ]
    headers = [
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: " + b"9" * 99,
        b"Content-Length: -1",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b": nameless",
        b"no colon",
        b" folded",
        b"X: \0\x01",
        b"X: " + b"y" * 9000,
        b"\r\n".join(b"H%d: 1" % number for number in range(150)),
        b"\xff: \xff",
        b"Connection: keep-alive, close",
        b"X-Server-Update-Signature: t=1",
        b"Host:",
    ]
    short = [
        b"GET /?repo=..",
        b"GET",
        b"",
        b"GET  / HTTP/1.1",
        b"GET / HTTP/9.9",
        b"GET / HTTP/1.1 x",
    ]
    short = [line + b"\r\n\r\n" for line in short]
    kinds = [
        lambda: bytes(dice.randrange(256) for _ in range(dice.randrange(1, 300))) + b"\r\n\r\n",
        lambda: b"GET /" + b"a" * dice.randrange(8000, 70000) + b" HTTP/1.1\r\n\r\n",
        lambda: b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10000 + b"\r\n",
        lambda: dice.choice(short),
        lambda: (
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n" + b"z" * 999
        ),
        lambda: b"GET /?repo=.. HTTP/1.1\r\n\r\n" * dice.randrange(2, 20),
        lambda: b"GET /?repo=half HTTP/1.1\r\nHost: x",
    ]
    while True:
        if dice.random() < 0.3:
            yield dice.choice(kinds)()
        else:
            target = dice.choice(paths) + b"?repo=" + dice.choice(repos)
            chosen = dice.sample(headers, dice.randrange(3))
            line = b" ".join(
                [dice.choice(methods), target, b"HTTP/1." + dice.choice([b"0", b"1"])]
            )
            yield b"\r\n".join([line] + chosen) + b"\r\n\r\n" + b"body" * dice.randrange(3)


def fuzz(port, seed, count):
    """Sends broken requests; the answers that were not such as they must be."""
    requests, wrong = broken_requests(random.Random(seed)), []
    for _ in range(count):
        data = next(requests)
        got = exchange(port, data)
        for status, body in re.findall(rb"HTTP/1\.1 (\d+) .*?\r\n\r\n([^\r]*)", got, re.DOTALL):
            if status not in KNOWN or b"Traceback" in body or re.search(rb"[^ -~\n]", body):
                wrong.append((data[:200], got[:300]))
        if got and not got.startswith(b"HTTP/1.1 "):
            wrong.append((data[:200], got[:300]))
    return wrong


@pytest.mark.slow
def test_a_hostile_network(start_slave, tmp_path):
    slave = start_slave()
    stand_in(slave)
    slave.wait_update()
    before, memory, slowest = set(tmp_path.rglob("*")), rss_kib(slave.process.pid), 0
    crowd = Crowd(slave.port)
    try:
        wait_until(lambda: crowd.drops > 20, what="a full house")
        with ThreadPoolExecutor(FUZZERS) as pool:
            fuzzers = [
                pool.submit(fuzz, slave.port, seed, BROKEN // FUZZERS) for seed in range(FUZZERS)
            ]
            while not all(fuzzer.done() for fuzzer in fuzzers):
                began = time.monotonic()
                assert slave.get("/?repo=hanuman")[0] == 202
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.2)
            wrong = [one for fuzzer in fuzzers for one in fuzzer.result()]
    finally:
        crowd.stop()
    assert slowest < LATEST_S
    assert rss_kib(slave.process.pid) - memory < MAX_GROWTH_KIB
    assert not wrong, wrong[:3]
    assert slave.wait_update()["state"] == "live"
    new = {str(path) for path in set(tmp_path.rglob("*")) - before}
    assert not [path for path in new if str(slave.home / "repos") not in path], (
        "only clones, records"
    )
    wait_until(
        lambda: {path.name for path in slave.state.iterdir()} <= {"hanuman.json", "a.json"},
        what="records alone, once all is done",
    )
    log = slave.log()
    assert "Traceback" not in log and "connection of" not in log
    assert all(line.isprintable() for line in log.splitlines())
    wait_until(lambda: threads_of(slave.process.pid) <= 4, what="all connections to end")


def test_what_comes_after_a_request_cuts_no_answer_short(start_slave, tmp_path):
    """Unread input at the close of a socket makes the kernel drop what is still to be sent."""
    page = tmp_path / "page"
    page.write_bytes(b"x" * 6000000)
    slave = start_slave(args=[page])
    request = b"GET / HTTP/1.1\r\nX: " + b"x" * 900 + b"\r\n\r\n"
    with connect(slave.port) as connection:
        connection.sendall(2 * request)
        time.sleep(0.2)
        got = 0
        while True:
            part = len(connection.recv(1 << 16))
            got += part
            if not part:
                break
    assert got > 6000000


def test_who_waits_for_an_end_is_not_pushed_out_by_bodies(start_slave):
    slave = start_slave(constants=LONG_POLLS)
    stand_in(slave, 'while [ ! -e "$HOME/go" ]; do sleep 0.05; done')
    path = "/status?repo=hanuman&update=%d&wait=240" % slave.signal()
    with ThreadPoolExecutor(5) as pool:
        polls = [pool.submit(slave.json, path, timeout=300) for _ in range(5)]
        time.sleep(0.3)
        rude = []
        for _ in range(400):
            rude.append(connect(slave.port))
            rude[-1].sendall(b"GET /healthz HTTP/1.1\r\nContent-Length: 5\r\n\r\n")
            wait_until(lambda: rude[-1].recv(9), what="an answer")
        (slave.home / "go").touch()
        assert [poll.result()["state"] for poll in polls] == ["live"] * 5
    for connection in rude:
        connection.close()


def test_a_shortage_of_threads_passes(start_slave):
    slave = start_slave()
    with open("/proc/%d/status" % slave.process.pid) as status:
        size = int(re.search(r"VmSize:\s+(\d+)", status.read()).group(1)) * 1024
    room_for_a_few = size + 20 * 1024 * 1024
    resource.prlimit(slave.process.pid, resource.RLIMIT_AS, (room_for_a_few, room_for_a_few))
    # More than enough, as glibc may have set aside address space that it gives back.
    idle = [connect(slave.port) for _ in range(250)]
    wait_until(lambda: "can't start new thread" in slave.log(), what="the shortage")
    for connection in idle:
        connection.close()
    wait_until(lambda: threads_of(slave.process.pid) == THREADS, what="threads to end")
    for _ in range(8):
        assert slave.get("/healthz")[0] == 200


def test_a_header_has_ten_seconds_in_all(start_slave):
    """Fewer in this copy; ten by test_how_long_it_waits_is_as_promised."""
    slave = start_slave(constants={"HEADER_TIMEOUT_S": 4})
    began = time.monotonic()
    with connect(slave.port) as slow, connect(slave.port) as silent, connect(slave.port) as idle:
        idle.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert idle.recv(999).startswith(b"HTTP/1.1 200 ")
        for connection in (slow, silent, idle):
            connection.settimeout(0.2)
        open_ones = {slow: 0, silent: 0, idle: 0}
        while not all(open_ones.values()) and time.monotonic() < began + 40:
            for connection in [one for one, ended in open_ones.items() if not ended]:
                try:
                    if connection is slow:
                        slow.send(b"x")
                    if connection.recv(99) == b"":
                        open_ones[connection] = time.monotonic() - began
                except socket.timeout:
                    pass
                except ConnectionError:
                    open_ones[connection] = time.monotonic() - began
        assert all(3 < ended < 35 for ended in open_ones.values()), open_ones.values()


@pytest.mark.parametrize(
    "data, status",
    [
        (b"GET /" + b"a" * 8200 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 8200 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + (b"X: " + b"a" * 5000 + b"\r\n") * 5 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 150 + b"\r\n", 431),
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/x\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"POST /?repo=a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"BREW / HTTP/1.1\r\n\r\n", 405),
        (b"get / HTTP/1.1\r\n\r\n", 405),
        (b"GET http://x/healthz HTTP/1.1\r\n\r\n", 200),
        (b"GET http://x HTTP/1.1\r\n\r\n", 200),
        (b"GET /healthz\r\n\r\n", 200),
        (b"GET /?repo=\xc3\xa9 HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\nHost: x\n\n", 200),
        (b"GET /?repo=a HTTP/1.1\r\nHost: x\r\n", None),
        (b"GET /?repo=a HTTP/1.1", None),
    ],
)
def test_odd_requests(idle_slave, data, status):
    slave = idle_slave
    answer = exchange(slave.port, data)
    if status is None:
        assert answer == b"", "a request that was cut off is none"
    else:
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        if status >= 400:
            body = json.loads(answer.partition(b"\r\n\r\n")[2].decode())
            assert list(body) == ["error"]
        if status == 405:
            assert b"\r\nAllow: GET, HEAD\r\n" in answer
    assert not list(slave.state.iterdir())


def test_pipelined_requests_and_one_write_an_answer(start_slave):
    slave = start_slave()
    connection = http.client.HTTPConnection("127.0.0.1", slave.port, timeout=300)
    connection.connect()
    times = []
    for _ in range(50):
        began = time.monotonic()
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"
        times.append(time.monotonic() - began)
    assert min(times[20:]) < 0.03, "a Nagle delay of 40 ms each, once the first have gone"
    connection.close()
    answers = exchange(slave.port, b"GET /healthz HTTP/1.1\r\n\r\n" * 5)
    assert answers.count(b"HTTP/1.1 200 OK") == 5


def test_a_large_body_gets_its_answer(start_slave):
    """And the connection ends after HEADER_TIMEOUT_S, which is shorter in this copy."""
    slave = start_slave(constants={"HEADER_TIMEOUT_S": 2})
    for length in (10, 60000):
        status, headers, _ = slave.get("/", method="POST", headers={"Content-Length": str(length)})
        assert (status, headers["Connection"]) == (405, "close")
    with connect(slave.port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n")
        began = time.monotonic()
        assert connection.recv(999).startswith(b"HTTP/1.1 405 ")
        try:
            while time.monotonic() < began + 60:
                connection.sendall(b"x" * 65536)
                time.sleep(0.001)  # so much is enough, and leaves others the processor
        except ConnectionError:
            pass
        assert time.monotonic() - began < 50, "bodies are never read without bound"


def test_a_reader_that_stops_reading_holds_up_nobody(start_slave, tmp_path):
    page = tmp_path / "page"
    page.write_bytes(b"x" * 30_000_000)
    slave = start_slave(args=[page])
    readers = []
    for _ in range(260):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", slave.port))
        reader.sendall(b"GET / HTTP/1.1\r\n\r\n")
        readers.append(reader)
    assert slave.get("/healthz")[0] == 200  # from here on the kernel's buffers are full
    for _ in range(5):
        began = time.monotonic()
        assert slave.get("/healthz")[0] == 200
        assert time.monotonic() - began < LATEST_S
    for reader in readers:
        reader.close()


@pytest.mark.slow
def test_a_real_browser_shows_the_served_file(start_slave, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    page = tmp_path / "page.html"
    page.write_text(
        "<!DOCTYPE html><meta charset=utf-8><title>Hanuman lives</title>"
        "<h1 id=seen></h1><script>document.getElementById('seen').textContent ="
        " 'title: ' + document.title + ' \\u2713'</script>",
        encoding="utf-8",
    )
    slave = start_slave(args=[page])
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--user-data-dir=%s" % (tmp_path / "profile"),
        "--virtual-time-budget=2000",
        "--dump-dom",
        slave.url + "/",
    ]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    shown = done.stdout.decode("utf-8")
    assert "<title>Hanuman lives</title>" in shown, done.stderr.decode()[-2000:]
    assert '<h1 id="seen">title: Hanuman lives \u2713</h1>' in shown
