"""Any number of clients in one thread: each sends a signal, reads the answer, and begins again.

Every signal has a connection of its own, as those of a master have. Clients use many addresses of
127.0.0.0/8, or the ports of one would run out.
"""
import selectors
import socket
import time

import measure

IP_BIND_ADDRESS_NO_PORT = 24
SOURCES = 200
GIVE_UP_S = 30


class Client:
    """One connection's life: connect, send, read to the end."""

    def __init__(self, port, source, request):
        self.request, self.answer = request, b""
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        self.socket.bind((source, 0))
        self.begun = time.perf_counter()
        self.socket.connect_ex(("127.0.0.1", port))

    def is_done(self):
        """Reads what has come; raises measure.Failed unless the whole of it is a 2xx."""
        part = self.socket.recv(65536)
        self.answer += part
        if part:
            return False
        if self.answer[9:10] != b"2":
            raise measure.Failed(f"the slave answered {self.answer[:200]!r}")
        return True


class Clients:
    """Keeps a number of signals in flight; how long each took comes to latencies, in seconds."""

    def __init__(self, port, path, number):
        self.port, self.number = port, number
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        self.request = head.encode()
        self.selector = selectors.DefaultSelector()
        self.latencies = []
        self.started = 0

    def start(self):
        source = f"127.0.1.{1 + self.started % SOURCES}"
        self.started += 1
        client = Client(self.port, source, self.request)
        self.selector.register(client.socket, selectors.EVENT_WRITE, client)

    def take(self, key):
        """One event of a connection; True where the signal is through."""
        client = key.data
        if key.events == selectors.EVENT_WRITE:
            client.socket.send(client.request)
            self.selector.modify(client.socket, selectors.EVENT_READ, client)
            return False
        if not client.is_done():
            return False
        self.latencies.append(time.perf_counter() - client.begun)
        self.selector.unregister(client.socket)
        client.socket.close()
        return True

    def run(self, seconds=None, signals=None):
        """Signals for so long, or so many; returns the seconds until the last was through."""
        begun = time.perf_counter()
        end = begun + (seconds or 3600)
        for _ in range(self.number):
            self.start()
        while self.selector.get_map():
            events = self.selector.select(GIVE_UP_S)
            if not events:
                raise measure.Failed(f"no answer for {GIVE_UP_S} s")
            for key, _ in events:
                if not self.take(key):
                    continue
                if time.perf_counter() < end and (not signals or self.started < signals):
                    self.start()
        return time.perf_counter() - begun
