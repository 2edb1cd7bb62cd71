"""TCP proxies between master and slaves that delay, cut, drop and double what passes.

They also note every update that a slave accepted (its 202), whether or not the master got to hear
of it: the checker's own list of promises given.
"""
import asyncio
import re
import threading
import time

ACCEPTED = re.compile(rb'^HTTP/1\.[01] 202 .*?"update": ?(\d+)', re.DOTALL)
LENGTH = re.compile(rb"\r\nContent-Length: ?(\d+)\r\n", re.IGNORECASE)
MAX_REQUEST_BYTES = 64 * 1024
BLACKHOLE_S = 30


class ProxyLoop:
    """One thread that runs all proxies of a fleet."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coroutine):
        """Run it in the thread and wait for its value."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def close(self):
        """Stop the thread, and with it every connection."""
        async def cancel_all():
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()
            await asyncio.sleep(0)
        self.run(cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


class Proxy:
    """A way to one slave's port. mode, for connections that begin from now on:

      None           as if it weren't there
      "reset"        reset at once
      "blackhole"    never an answer
      "delay:S"      S seconds late
      "cut:N"        ends after N bytes of the answer
      "double"       the slave gets the request twice
    """

    def __init__(self, loop, slave_port):
        self.loop, self.slave_port, self.mode = loop, slave_port, None
        self.accepted = []  # (when it was asked, update id)
        self.server = loop.run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]
        self.entry = "127.0.0.1:%d" % self.port

    def close(self):
        """Take no more connections."""
        self.loop.loop.call_soon_threadsafe(self.server.close)

    async def _serve(self, reader, writer):
        kind, _, number = (self.mode or "").partition(":")
        try:
            if kind == "reset":
                writer.transport.abort()
                return
            request = await self._read_request(reader)
            if kind == "blackhole":
                await asyncio.wait_for(reader.read(), BLACKHOLE_S)
                return
            if kind == "delay":
                await asyncio.sleep(float(number))
            limit = int(number) if kind == "cut" else None
            asks = [self._ask(request, reader, writer, limit)]
            if kind == "double":
                asks.append(self._ask(request, reader, None, None))
            await asyncio.gather(*asks)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError):
            writer.transport.abort()
        finally:
            writer.close()

    async def _read_request(self, reader):
        request = b""
        while b"\r\n\r\n" not in request and len(request) < MAX_REQUEST_BYTES:
            chunk = await reader.read(4096)
            if not chunk:
                raise EOFError
            request += chunk
        head, _, body = request.partition(b"\r\n\r\n")
        length = LENGTH.search(head + b"\r\n")
        if length:
            request += await reader.readexactly(max(0, int(length.group(1)) - len(body)))
        return request

    async def _ask(self, request, reader, writer, limit):
        """Pass the request to the slave and its answer, or `limit` bytes of it, to the writer."""
        slave_reader, slave_writer = await asyncio.open_connection("127.0.0.1", self.slave_port)
        gone = asyncio.ensure_future(reader.read(1)) if writer else None
        try:
            asked, answer = time.time(), b""
            slave_writer.write(request)
            while True:
                chunk = asyncio.ensure_future(slave_reader.read(65536))
                either = [chunk, gone] if gone else [chunk]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                new = chunk.result() if chunk.done() else b""
                if not new:
                    chunk.cancel()
                    break
                left = len(new) if limit is None else max(0, limit - len(answer))
                answer += new
                self._note(asked, answer, len(new))
                if writer:
                    writer.write(new[:left])
                    await writer.drain()
        finally:
            if gone:
                gone.cancel()
            slave_writer.close()

    def _note(self, asked, answer, new_bytes):
        """Note an acceptance once, when the piece that completes it has come."""
        found = ACCEPTED.match(answer)
        if found and found.end() > len(answer) - new_bytes:
            self.accepted.append((asked, int(found.group(1))))
