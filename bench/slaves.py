#!/usr/bin/env python3
"""A hundred thousand slaves in one process: any address of 127.0.0.0/8, as fast as one thread can.

    slaves.py DELAY_S UPDATE_S [DEAD_ADDRESS...]

Prints its port. A signal is answered after DELAY_S, its update is live UPDATE_S later. A dead
address is one whose packets are dropped: a listening socket with its queue full. Only the loopback
device is listened on.
"""
import heapq
import json
import re
import resource
import select
import socket
import sys
import time

COMMIT = "1d5d931" + "0" * 33
RECORD = {
    "repo": "hanuman",
    "update": 1,
    "ref": "",
    "requested": 0.0,
    "started": 0.0,
    "finished": 0.0,
    "commit": COMMIT,
    "previous": "0" * 40,
    "message": "",
}


def answer(status, body):
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\nConnection: close\r\n\r\n" + data


ACCEPTED = answer("202 Accepted", {"repo": "hanuman", "update": 1, "state": "queued", "ref": ""})
RUNNING = answer("200 OK", dict(RECORD, state="running", finished=None))
LIVE = answer("200 OK", dict(RECORD, state="live"))


def address(number):
    """The address of slave number 0, 1, 2 ..."""
    return f"127.{1 + number // 62500}.{number // 250 % 250}.{1 + number % 250}"


def listen(host, port, backlog):
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # any address beside one of them
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    server.bind((host, port))
    server.listen(backlog)
    return server


def play_dead(host, port):
    """The sockets that make an address silent; they have to be kept."""
    server = listen(host, port, 0)
    filler = socket.create_connection((host, port))
    return server, filler


class Slaves:
    """One thread around epoll; answers are due at times kept in a heap."""

    def __init__(self, delay_s, update_s, dead):
        self.delay_s, self.update_s = delay_s, update_s
        self.server = listen("0.0.0.0", 0, 4096)
        self.server.setblocking(False)
        self.port = self.server.getsockname()[1]
        self.dead = [play_dead(host, self.port) for host in dead]
        self.epoll = select.epoll()
        self.epoll.register(self.server, select.EPOLLIN)
        self.connections = {}
        self.due = []
        self.signalled = {}

    def accept(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            self.connections[connection.fileno()] = connection
            self.epoll.register(connection, select.EPOLLIN)

    def close(self, fd):
        connection = self.connections.pop(fd, None)
        if connection:
            connection.close()

    def read(self, fd, now):
        """Reads a request (they come in one piece) and notes when its answer is due."""
        connection = self.connections[fd]
        try:
            request = connection.recv(65536)
        except OSError:
            request = b""
        if not request:
            self.close(fd)
            return
        host = connection.getsockname()[0]
        if request.startswith(b"GET /status"):
            wait = re.search(rb"[?&]wait=([0-9.]+)", request)
            live = self.signalled.get(host, 0) + self.update_s
            due = min(live, now + float(wait.group(1)) if wait else now)
        else:
            self.signalled[host] = now + self.delay_s
            due = now + self.delay_s
        heapq.heappush(self.due, (due, fd, host if request.startswith(b"GET /status") else ""))

    def send_due(self, now):
        while self.due and self.due[0][0] <= now:
            _, fd, asks = heapq.heappop(self.due)
            text = ACCEPTED
            if asks:
                is_live = self.signalled.get(asks, 0) + self.update_s <= now
                text = LIVE if is_live else RUNNING
            try:
                self.connections[fd].send(text)
            except (OSError, KeyError):
                pass
            self.close(fd)

    def serve(self):
        while True:
            wait = max(0.0, self.due[0][0] - time.monotonic()) if self.due else -1
            events = self.epoll.poll(wait if wait < 0 else wait + 0.0005)
            now = time.monotonic()
            for fd, _ in events:
                if fd == self.server.fileno():
                    self.accept()
                elif fd in self.connections:
                    self.read(fd, now)
            self.send_due(time.monotonic())


def main(argv):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    slaves = Slaves(float(argv[0]), float(argv[1]), argv[2:])
    print(slaves.port, flush=True)
    slaves.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
