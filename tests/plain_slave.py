"""A stand-in for a slave: a plain HTTP server that answers as it is told."""

import http.server
import json
import socket
import threading


class PlainHandler(http.server.BaseHTTPRequestHandler):
    """Gives the first of the server's `answers` whose key the path begins with."""

    def do_GET(self):
        """Answer once."""
        self.server.requests.append(self.path)
        fitting = [key for key in self.server.answers if self.path.startswith(key)]
        status, body = self.server.answers[fitting[0]] if fitting else (404, "no such path")
        if not isinstance(body, bytes):
            body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


class PlainSlave(http.server.ThreadingHTTPServer):
    """PlainSlave({"/?repo": (202, {...})}): listens on 127.0.0.1; .entry is its line in a list."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answers):
        self.answers, self.requests = answers, []
        super().__init__(("127.0.0.1", 0), PlainHandler)
        self.port = self.server_address[1]
        self.entry = "127.0.0.1:%d" % self.port
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def server_bind(self):
        """Bind without looking up this host's name."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def close(self):
        """Stop listening."""
        self.shutdown()
        self.server_close()


def refusing_entry():
    """A list entry whose port nobody listens on (kept bound, so that nobody else takes it)."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    return "127.0.0.1:%d" % holder.getsockname()[1], holder
