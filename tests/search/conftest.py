"""A real HTTP server on a free local port, for tests of the engines that use one."""

import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

import pytest


@dataclass(frozen=True)
class Call:
    """One request as the server received it."""

    method: str
    path: str
    params: dict[str, str]
    headers: dict[str, str]  # names in lower case
    payload: object


@pytest.fixture
def serve():
    """`serve(reply) -> (url, calls)`: starts a server that answers each call with `reply(call)`.

    `reply` returns a status and a JSON body; a body of bytes is sent unchanged. The list `calls`
    receives each call.
    """
    servers = []

    def start(reply):
        calls = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections alive

            def _answer(self):
                length = int(self.headers.get("Content-Length", 0))
                sent = self.rfile.read(length)
                url = urlsplit(self.path)
                call = Call(
                    self.command,
                    url.path,
                    dict(parse_qsl(url.query)),
                    {name.lower(): value for name, value in self.headers.items()},
                    json.loads(sent) if sent else None,
                )
                calls.append(call)
                status, body = reply(call)
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = _answer

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # a shorter queue resets some connections of a burst

        server = Server(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}", calls

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()
