"""Many slaves in one thread, each on a loopback address of its own and as bad as it is told to be.

A kind is a function of the request that returns an Answer; "none" accepts and says nothing. The
farm counts what it is asked, so that a test can say who was signalled and how often.
"""

import json
import select
import socket
import threading
import time
from collections import Counter, namedtuple
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

COMMIT, OTHER, PREVIOUS = "1d5d931" + "a" * 33, "77aa120" + "c" * 33, "8c2f4e0" + "b" * 33
REPO, UPDATE = "hanuman", 1700000000000

# What to send and when: (seconds from the request, bytes) pairs; then the end, or a reset, or
# nothing at all (the connection stays open).
Answer = namedtuple("Answer", "parts ends")
Request = namedtuple("Request", "slave path headers count begun")


def http(status, body, kind="application/json", headers="", length=None):
    """An HTTP answer as bytes."""
    data = body if isinstance(body, bytes) else body.encode()
    head = (
        "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n%s\r\n"
        % (status, kind, len(data) if length is None else length, headers)
    )
    return head.encode() + data


def at_once(data):
    return Answer(((0.0, data),), "close")


def record(state="live", commit=COMMIT, previous=PREVIOUS, message="", ref=None, **more):
    """A record as slave.py tells it."""
    now = time.time()
    return dict(
        {
            "repo": REPO,
            "update": UPDATE,
            "ref": ref,
            "state": state,
            "requested": now,
            "started": now,
            "finished": now if state in ("live", "failed") else None,
            "commit": commit,
            "previous": previous,
            "message": message,
        },
        **more,
    )


def accepted():
    return at_once(
        http(
            "202 Accepted",
            json.dumps({"repo": REPO, "update": UPDATE, "state": "queued", "ref": None}),
        )
    )


def told(**fields):
    return at_once(http("200 OK", json.dumps(record(**fields))))


def error(status, message=None, headers=""):
    """A kind that answers each signal with an error."""
    body = json.dumps({"error": message}) if message else "<html>broken</html>"
    return lambda request: at_once(http(status, body, headers=headers))


def updates(delay_s=0.0, **fields):
    """A kind that takes the signal and has its outcome `delay_s` later."""

    def kind(request):
        if not request.path.startswith("/status"):
            return accepted()
        left = max(0, request.begun + delay_s - time.monotonic())
        wait = int((parse_qs(urlsplit(request.path).query).get("wait") or "0")[0])
        if left > wait:
            return Answer(((wait, http("200 OK", json.dumps(record("running")))),), "close")
        return Answer(((left, http("200 OK", json.dumps(record(**fields)))),), "close")

    return kind


def after(delay_s, kind):
    """A kind that answers as another, but later."""

    def later(request):
        answer = kind(request)
        return Answer(tuple((when + delay_s, data) for when, data in answer.parts), answer.ends)

    return later


def raw(data, ends="close"):
    """A kind that answers the signal with these bytes."""
    return lambda request: Answer(((0.0, data),), ends)


def drip(data, pause_s):
    """A kind that answers a byte at a time."""
    return lambda request: Answer(
        tuple((n * pause_s, data[n : n + 1]) for n in range(len(data))), "close"
    )


def mute(request):
    """Takes the connection and says nothing."""
    return Answer((), "stays")


def hold(request):
    """Takes the signal; its status is held back for ever."""
    return mute(request) if request.path.startswith("/status") else accepted()


def forgetful(request):
    """Takes the signal and no longer knows of it."""
    if request.path.startswith("/status"):
        return at_once(http("404 Not Found", '{"error": "no such update"}'))
    return accepted()


def updates_when(is_due, **fields):
    """A kind that takes the signal and has its outcome once is_due() says so."""

    def kind(request):
        if not request.path.startswith("/status"):
            return accepted()
        if is_due():
            return told(**fields)
        return Answer(((0.1, http("200 OK", json.dumps(record("running")))),), "close")

    return kind


def answering(answers):
    """A kind that answers as {beginning of a path: (status, text, bytes or what becomes JSON)}.

    The first that fits is taken; where none does, it is a 404.
    """

    def kind(request):
        fitting = [answers[start] for start in answers if request.path.startswith(start)]
        status, body = fitting[0] if fitting else (404, "no such path")
        if not isinstance(body, (str, bytes)):
            body = json.dumps(body)
        return at_once(http("%d %s" % (status, HTTPStatus(status).phrase), body))

    return kind


class Farm:
    """The slaves of a test: .add(kind) gives an entry for a slave list."""

    def __init__(self):
        self.listener = self._listen()
        self.port = self.listener.getsockname()[1]
        self.kinds, self.signals, self.polls, self.requests = {}, Counter(), Counter(), []
        self.begun, self.order, self.addresses = {}, [], 0
        self.open = {}
        self.most_open = 0
        self.is_stopping = False
        self.wake, waker = socket.socketpair()
        self.waker = waker
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    @staticmethod
    def _listen():
        listener = socket.socket()
        listener.bind(("0.0.0.0", 0))
        listener.listen(4096)
        listener.setblocking(False)
        return listener

    def add(self, kind):
        """A slave of that kind; its entry."""
        self.addresses += 1
        address = "127.77.%d.%d" % (self.addresses >> 8, self.addresses & 255)
        self.kinds[address] = kind
        return "%s:%d" % (address, self.port)

    def addresses_signalled(self):
        """The addresses in the order of their first signal."""
        return list(self.order)

    def addresses_open(self):
        """The addresses of the slaves that have a connection now."""
        return {state["slave"] for state in list(self.open.values()) if "slave" in state}

    def close(self):
        self.is_stopping = True
        self.waker.send(b"x")
        self.thread.join(5)
        for sock in [self.listener, self.wake, self.waker, *self.open]:
            sock.close()

    def _serve(self):
        poll = select.epoll()
        poll.register(self.listener, select.EPOLLIN)
        poll.register(self.wake, select.EPOLLIN)
        numbers = {}
        while not self.is_stopping:
            now = time.monotonic()
            for sock in list(self.open):
                self._send(sock, now)
            waits = [state["parts"][0][0] - now for state in self.open.values() if state["parts"]]
            for number, _ in poll.poll(max(0, min(waits + [0.1]))):
                if number == self.listener.fileno():
                    self._accept(poll, numbers)
                elif number in numbers:
                    self._read(numbers.pop(number), poll)

    def _accept(self, poll, numbers):
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            self.open[sock] = {"parts": [], "ends": None}
            self.most_open = max(self.most_open, len(self.open))
            numbers[sock.fileno()] = sock
            poll.register(sock, select.EPOLLIN)

    def _read(self, sock, poll):
        poll.unregister(sock)
        try:
            text = sock.recv(65536).decode("latin-1")
        except OSError:
            text = ""
        if not text.startswith("GET "):
            if text:
                sock.send(http("400 Bad Request", "what is this?"))
            self._end(sock, "close")
            return
        now, slave = time.monotonic(), sock.getsockname()[0]
        lines = text.split("\r\n")
        path = lines[0].split(" ")[1]
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        counter = self.polls if path.split("?")[0].endswith("/status") else self.signals
        counter[slave] += 1
        if counter is self.signals:
            self.begun[slave] = now
            if slave not in self.order:
                self.order.append(slave)
        request = Request(slave, path, headers, counter[slave], self.begun.get(slave, now))
        self.requests.append(request)
        answer = self.kinds[slave](request)
        now = time.monotonic()  # nothing is told before its time
        self.open[sock] = {
            "slave": slave,
            "parts": [(now + after, data) for after, data in answer.parts],
            "ends": answer.ends,
        }
        self._send(sock, now)

    def _send(self, sock, now):
        state = self.open[sock]
        if state["ends"] is None:
            return
        try:
            while state["parts"] and state["parts"][0][0] <= now:
                when, data = state["parts"].pop(0)
                sent = sock.send(data)
                if sent < len(data):
                    state["parts"].insert(0, (when, data[sent:]))
        except BlockingIOError:
            state["parts"].insert(0, (now + 0.01, data))
        except OSError:
            state.update(parts=[], ends="close")
        if self._is_gone(sock) or not state["parts"] and state["ends"] != "stays":
            self._end(sock, state["ends"])

    @staticmethod
    def _is_gone(sock):
        try:
            return not sock.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _end(self, sock, how):
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.open.pop(sock)
        sock.close()


def silent_port():
    """(port, what to keep): a port whose queue is full, where the kernel drops what comes."""
    listener = socket.socket()
    listener.bind(("0.0.0.0", 0))
    listener.listen(0)
    port = listener.getsockname()[1]
    fillers = [socket.create_connection(("127.0.0.1", port))]
    for _ in range(3):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", port))
        fillers.append(filler)
    return port, [listener, *fillers]


def refusing_entry():
    """(entry, what to keep): a port where nobody listens, bound so that nobody else can."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return "127.0.0.1:%d" % sock.getsockname()[1], sock
