"""Engines that search over HTTP, against a server that fails: kinds of faults × engines × rates.

Each cell runs rollouts with one engine and one server. The server draws the requests that meet the
fault, answers all others with documents on the request's own query, and records which queries got
such an answer. The documents in the trajectories must agree with this record.
"""

import asyncio
import gzip
import json
import random
import re
import socket
import ssl
import struct
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import pytest

from zerosearch_jax.generate.generator import Generation
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.rollout.scheduler import Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.search.chat import ChatClient
from zerosearch_jax.search.engine import SearchEngine, SearchResult
from zerosearch_jax.search.http_client import JsonClient
from zerosearch_jax.search.retriever import RetrieverEngine
from zerosearch_jax.search.simulated import SimulatedEngine
from zerosearch_jax.search.web import WebEngine
from zerosearch_jax.text.tokenizer import encode

RATES = (0.01, 0.2, 1.0)
EPISODES = {0.01: 25, 0.2: 8, 1.0: 3}  # of each of two runs; an episode searches twice

ATTEMPTS = 2
BACKOFF_SECS = 0.01
# Timeout against faults that only the deadline ends; shorter where no healthy reply can be late.
STALL_SECS = {0.01: 2.0, 0.2: 2.0, 1.0: 0.2}
TIMEOUT_SECS = 20.0  # timeout otherwise, which a busy machine does not reach
SLACK_SECS = 4.0  # added to the budget of a batch, for busy machines
WATCHDOG_SECS = 180.0  # limit of one cell
MAX_REPLY_BYTES = 1_200_000
WORKERS = 8
TOPK = 3

KEY = "key-8c1f"
LEAK = "text-of-the-reply"  # in each faulty reply; a reason must not repeat it
ITEM = re.compile(r"item\d{5}")
FOREIGN = "item99999"  # no query asks for it


# --- the server -----------------------------------------------------------------------------------


class Wire:
    """One connection, as the server sees it."""

    def __init__(self, server: "FaultyServer", reader, writer):
        self.server, self.reader, self.writer = server, reader, writer

    async def read_request(self) -> str:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        body = await self.reader.readexactly(int(length[1])) if length else b""
        return (head + body).decode()

    async def send(self, *pieces: bytes, pause: float = 0.0) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(pause)

    def reset(self) -> None:
        on, no_seconds = 1, 0
        linger = struct.pack("ii", on, no_seconds)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


class FaultyServer:
    """HTTP server on a free local port that meets a share of the requests with one fault.

    The first request (or connection) always meets it. The others are drawn by a seeded hash.

    Attributes:
      answered: items that got a reply from which documents must be read.
      unsure: items that got a faulty reply from which documents may be read.
      tries: item -> number of requests.
      faults: number of requests or connections that met the fault.
      strays: paths of requests that no engine sends, for example after a redirect.
    """

    def __init__(
        self, fault: "Fault", reply: Callable[[list[str]], object], rate: float, seed: str
    ):
        self.fault, self.reply, self.rate, self.seed = fault, reply, rate, seed
        self.answered, self.unsure, self.tries = set(), set(), Counter()
        self.faults, self.strays = 0, []
        self.port, self._connections, self._tasks = 0, 0, set()
        self._lock = asyncio.Lock()  # of the listener

    async def start(self) -> None:
        while True:
            try:
                self._listener = await asyncio.start_server(
                    self._serve, "127.0.0.1", self.port, backlog=128
                )
                break
            except OSError:  # another process uses the port for a moment
                await asyncio.sleep(0.01)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def pause(self, secs: float) -> None:
        """Refuses connections for a while."""
        if self._lock.locked() or not self._listener.is_serving():
            return
        async with self._lock:
            await self._close()
            await asyncio.sleep(secs)
            await self.start()

    async def stop(self) -> None:
        async with self._lock:
            await self._close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # their sockets are closed

    async def _close(self) -> None:
        # asyncio loses a connection that it has accepted when the listener closes (CPython
        # gh-109564), so accepting ends first.
        for listener in self._listener.sockets:
            asyncio.get_running_loop().remove_reader(listener)
        await asyncio.sleep(0.05)
        self._listener.close()

    async def _serve(self, reader, writer) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            await self._connection(Wire(self, reader, writer))
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # the client left, or the cell ended
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _connection(self, wire: Wire) -> None:
        self._connections += 1
        open_ = True
        if self.fault.at_accept and self._meets_fault(self._connections):
            open_ = await self.fault.respond(wire, None)
        while open_:
            request = await wire.read_request()
            items = list(dict.fromkeys(ITEM.findall(request)))
            if not items:
                self.strays.append(request.split()[1])
                return
            self.tries.update(items)
            if not self.fault.at_accept and self._meets_fault((items[0], self.tries[items[0]])):
                if self.fault.answers:
                    self.answered.update(items)
                elif self.fault.answers is None:
                    self.unsure.update(items)
                open_ = await self.fault.respond(wire, self.reply(items))
            else:
                self.answered.update(items)
                await wire.send(http(self.reply(items)))

    def _meets_fault(self, what: object) -> bool:
        drawn = random.Random(f"{self.seed} {what}").random() < self.rate
        met = drawn or not self.faults
        self.faults += met
        return met


def http(body: object, status: str = "200 OK", *headers: str, length: str = "") -> bytes:
    """Returns a whole reply; a body that is not bytes is sent as JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {length or len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# --- the faults -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
      respond: sends the fault, given the wire and the healthy reply. Then the connection closes,
        unless it returns true.
      kinds: kinds of failure that a client may report.
      answers: whether the client reads documents from it. None: it may read them or fail.
      tries: requests of a search that only meets this fault; 0 for any number.
      at_accept: the fault comes before the request is read, so it is drawn for connections.
      heavy: the fault sends much, so its cells run one by one and their memory is measured.
      engines: engines whose dialect can have this fault.
    """

    respond: Callable[[Wire, object], Awaitable[bool | None]]
    kinds: tuple[str, ...]
    answers: bool | None = False
    tries: int = 0
    at_accept: bool = False
    heavy: bool = False
    engines: tuple[str, ...] = ("chat", "search_r1", "zerosearch", "serper", "serpapi")

    @property
    def stalls(self) -> bool:
        """Whether only the client's deadline ends the fault."""
        return "timeout" in self.kinds


async def send(wire: Wire, reply: object, make: Callable[[object], bytes], keep=False) -> bool:
    """Sends bytes made from the healthy reply."""
    await wire.send(make(reply))
    return keep


async def reset(wire: Wire, reply: object, make: Callable[[object], bytes] = lambda _: b"") -> None:
    """Sends bytes, then resets the connection."""
    await wire.send(make(reply), pause=0.01)
    wire.reset()


async def refuse(wire: Wire, reply: object) -> None:
    """Closes the port for a while."""
    wire.reset()
    await wire.server.pause(0.03)


async def wait(wire: Wire, reply: object) -> bool:
    await asyncio.sleep(0.05)
    return True


async def stall(wire: Wire, reply: object, start: bytes) -> None:
    """Sends nothing after `start` until the client leaves."""
    await wire.send(start)
    await wire.reader.read()


async def drip(wire: Wire, reply: object, start: bytes, rest: bytes) -> None:
    """Sends the bytes of `rest` one by one, for longer than the deadline."""
    await wire.send(start)
    await wire.send(*(bytes([byte]) for byte in rest), pause=4.0 / len(rest))


async def endless(wire: Wire, reply: object, start: bytes, piece: bytes, pause=0.0) -> None:
    await wire.send(start)
    while True:
        await wire.send(piece, pause=pause)


async def send_two(wire: Wire, reply: object, pause: float) -> bool:
    """Sends the reply and a second one, which belongs to another query."""
    second = http(ITEM.sub(FOREIGN, json.dumps(reply)).encode())
    pieces = (http(reply), second) if pause else (http(reply) + second,)
    await wire.send(*pieces, pause=pause)
    return True


async def status(wire: Wire, reply: object, line: str, header: str = "X-Other: 1") -> bool:
    header = header.format(port=wire.server.port)
    await wire.send(http({"error": LEAK}, f"{line} {LEAK}", f"X-Note: {LEAK}", header))
    return True


async def send_json(wire: Wire, reply: object, change: Callable[[str], str | bytes]) -> bool:
    """Sends the healthy reply's JSON after a change."""
    body = change(json.dumps(reply))
    await wire.send(http(body if isinstance(body, bytes) else body.encode()))
    return True


@cache
def bomb(times: int) -> bytes:
    """Returns 256 MiB of spaces, compressed `times` times."""
    packer = zlib.compressobj(1, wbits=zlib.MAX_WBITS | 16)
    pieces = [packer.compress(b" " * 2**20) for _ in range(256)]
    packed = b"".join([*pieces, packer.flush()])
    return packed if times == 1 else gzip.compress(packed)


def gzipped(body: bytes, encoding: str = "gzip") -> bytes:
    return http(body, "200 OK", f"Content-Encoding: {encoding}")


def compressed(reply: object) -> bytes:
    return gzip.compress(json.dumps(reply).encode())


def replace_documents(text: str, value: str) -> str:
    return re.sub(r'"[^"]*Document [^"]*"', value, text)


def add_key(text: str, key_and_value: str) -> str:
    """Adds a key to the last object of a JSON text."""
    end = text.rindex("}")
    return f"{text[:end]}, {key_and_value}{text[end:]}"


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
NESTED = "[" * 100_000 + "]" * 100_000

FAULTS = {
    "connection refused": Fault(refuse, ("connection",), at_accept=True),
    "reset at accept": Fault(reset, ("connection",), at_accept=True),
    "slow accept": Fault(wait, (), answers=True, at_accept=True),
}
# The connection breaks; the client tries again.
for name, respond in {
    "reset after the request": reset,
    "reset in the headers": partial(reset, make=lambda reply: http(reply)[:20]),
    "reset in the body": partial(reset, make=lambda reply: http(reply)[:-10]),
    "closed without a reply": partial(send, make=lambda reply: b""),
    "closed in the headers": partial(send, make=lambda reply: http(reply)[:20]),
    "closed in the body": partial(send, make=lambda reply: http(reply)[:-10]),
    "closed between chunks": partial(send, make=lambda reply: CHUNKED + b"5\r\n[1, 2\r\n"),
}.items():
    FAULTS[name] = Fault(respond, ("connection",), tries=ATTEMPTS)
# Only the deadline ends the wait; the client tries again.
for name, respond in {
    "silence": partial(stall, start=b""),
    "silence after the headers": partial(stall, start=OK + b"Content-Length: 5\r\n\r\n"),
    "HTTP/0.9 that is kept open": partial(stall, start=b'{"result": ['),
    "silence in the body": partial(stall, start=OK + b"Content-Length: 5\r\n\r\n[1"),
    "huge length": partial(stall, start=OK + b"Content-Length: 1000000000000000\r\n\r\n[1"),
    "status line drips": partial(drip, start=b"HTTP/1.1 200 ", rest=b"O" * 100),
    "headers drip": partial(drip, start=OK, rest=b"X-A: 1\r\n" * 20),
    "chunk sizes drip": partial(drip, start=CHUNKED, rest=b"1\r\n \r\n" * 30),
    "body drips": partial(drip, start=OK + b"Content-Length: 200\r\n\r\n", rest=b" " * 200),
    "100 Continue for ever": partial(
        endless, start=b"", piece=b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.01
    ),
}.items():
    FAULTS[name] = Fault(respond, ("timeout",), tries=ATTEMPTS)
# The client stops reading by its limit of bytes.
for name, (kind, respond) in {
    "endless headers": (
        "connection",
        partial(endless, start=OK, piece=b"X-A: 1\r\n" * 1000),
    ),
    "endless header line": (
        "connection",
        partial(endless, start=OK + b"X-A: ", piece=b"a" * 10_000),
    ),
    "endless body": ("too_large", partial(endless, start=OK + b"\r\n", piece=b" " * 50_000)),
    "endless chunks": (
        "too_large",
        partial(endless, start=CHUNKED, piece=b"1000\r\n" + b" " * 4096 + b"\r\n"),
    ),
    "endless chunk extension": (
        "connection",
        partial(endless, start=CHUNKED + b"1;", piece=b"a" * 10_000),
    ),
    "endless trailers": (
        "connection",
        partial(endless, start=CHUNKED + b"0\r\n", piece=b"X-A: 1\r\n" * 1000),
    ),
    "gzip bomb": ("too_large", partial(send, make=lambda reply: gzipped(bomb(1)))),
    "gzip bomb in gzip": (
        "not_json",
        partial(send, make=lambda reply: gzipped(bomb(2), "gzip, gzip")),
    ),
}.items():
    FAULTS[name] = Fault(respond, (kind,), heavy=True)
# Bytes that are not HTTP.
for name, make in {
    "negative length": lambda reply: http(reply, length="-1"),
    "two lengths": lambda reply: http(reply, "200 OK", "Content-Length: 5"),
    "length of 5,000 digits": lambda reply: http(reply, length="9" * 5000),
    "chunk sizes that are not numbers": lambda reply: CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    "unknown transfer encoding": lambda reply: OK + b"Transfer-Encoding: zip\r\n\r\n\x01\x02",
    "HTTP/0.9": lambda reply: json.dumps(reply).encode() + b"\r\n\r\n",
    "HTTP/2 preface": lambda reply: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "TLS alert": lambda reply: b"\x15\x03\x01\x00\x02\x02\x46",
    "101 Switching Protocols": lambda reply: b"HTTP/1.1 101 S\r\nUpgrade: h2c\r\n\r\n\0\0",
}.items():
    FAULTS[name] = Fault(partial(send, make=make, keep=True), ("connection",), tries=ATTEMPTS)
# Bodies that are cut or compressed otherwise than the headers say.
for name, make in {
    "length too short": lambda reply: http(reply, length=str(len(json.dumps(reply)) - 10)),
    "damaged gzip": lambda reply: gzipped(compressed(reply).replace(b"\x8b", b"\x8b\xff")),
    "damaged gzip data": lambda reply: gzipped(compressed(reply)[:15] + b"\xff" * 50),
    "truncated gzip": lambda reply: gzipped(compressed(reply)[:-20]),
    "gzip that is not": lambda reply: gzipped(json.dumps(reply).encode()),
    "unknown content encoding": lambda reply: gzipped(b"\x1b\x02" * 40, "zz9"),
    "204 No Content": lambda reply: b"HTTP/1.1 204 No Content\r\n\r\n",
}.items():
    FAULTS[name] = Fault(partial(send, make=make, keep=True), ("not_json",))
# Replies that are followed by something else. Only the reply may be read.
FAULTS |= {
    "two replies at once": Fault(partial(send_two, pause=0.0), (), answers=True),
    "two replies": Fault(partial(send_two, pause=0.005), (), answers=True),
    "closed while idle": Fault(partial(send, make=http), (), answers=True),
    "100 Continue, then a reply": Fault(
        partial(send, make=lambda r: b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + http(r), keep=True),
        (),
        answers=True,
    ),
}
for line in ("400", "401", "402", "403", "404", "405", "422"):
    FAULTS[f"status {line}"] = Fault(partial(status, line=line), ("http_4xx",), tries=1)
for line in ("500", "502", "503", "504"):
    FAULTS[f"status {line}"] = Fault(partial(status, line=line), ("http_5xx",), tries=ATTEMPTS)
for line in ("301", "302", "307"):
    FAULTS[f"status {line} to elsewhere"] = Fault(
        partial(status, line=line, header="Location: http://127.0.0.1:{port}/elsewhere"),
        ("http_3xx",),
        tries=1,
    )
FAULTS |= {
    "status 408": Fault(partial(status, line="408"), ("http_4xx",), tries=ATTEMPTS),
    # Search-R1's client repeats a batch that is too long, query by query.
    "status 413": Fault(partial(status, line="413"), ("too_long",)),
    "status 414": Fault(partial(status, line="414"), ("too_long",)),
    "status 429": Fault(partial(status, line="429"), ("http_429",), tries=ATTEMPTS),
    "status 999": Fault(partial(status, line="999"), ("other",)),
}
for value in ("1", "1e9", "1000000000", "9" * 5000, "-5", "nan", "Fri, 31 Dec 2049 23:59:59 GMT"):
    FAULTS[f"status 429, Retry-After: {value[:30]}"] = Fault(
        partial(status, line="429", header=f"Retry-After: {value}"),
        ("http_429",),
    )
# Bodies without documents. A second try would bring the same.
for name, change in {
    "HTML": lambda text: f"<html><body>{LEAK}</body></html>",
    "empty body": lambda text: "",
    "JSON without its end": lambda text: text[:-3],
    "JSON null": lambda text: "null",
    "JSON number": lambda text: "7",
    "JSON text": lambda text: json.dumps(LEAK),
    "JSON object": lambda text: json.dumps({"error": LEAK}),
    "JSON in a list": lambda text: f"[[{text}]]",
    "texts are null": lambda text: replace_documents(text, "null"),
    "texts are lists": lambda text: replace_documents(text, "[7, {}]"),
    "other keys": lambda text: re.sub(r'"(\w+)":', r'"other \1":', text),
    "deep nesting": lambda text: NESTED,
    "deep nesting without an end": lambda text: '{"a":' * 100_000,
    "invalid UTF-8": lambda text: text.encode().replace(b"Document", b"\xff\xfe"),
}.items():
    FAULTS[name] = Fault(partial(send_json, change=change), ("not_json", "wrong_shape"), tries=1)
# Bodies with odd documents. A client may read them or fail, but must not break.
for name, change in {
    "lone surrogates": lambda text: text.replace("Document", r"\udc80 Document \ud800"),
    "encoded surrogates": lambda text: text.encode().replace(b"Doc", b"\xed\xa0\x80 Doc"),
    "control characters": lambda text: text.replace("Document", r"\u0000\u001b[2J\u2028"),
    "texts are numbers": lambda text: replace_documents(text, "7"),
    "5,000-digit integer": lambda text: add_key(text, '"extra": ' + "9" * 5000),
    "NaN": lambda text: add_key(text, '"extra": NaN'),
    "infinite number": lambda text: add_key(text, '"extra": 1e999'),
    "nesting in a key": lambda text: add_key(text, '"extra": ' + NESTED),
    "key twice": lambda text: add_key(text, '"text": 7, "text": 8'),
    "UTF-16": lambda text: text.encode("utf-16"),
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "results twice": lambda text: re.sub(r"\[(\{.*\})\]", r"[\1, \1]", text),
    "300 KB document": lambda text: text.replace("Document 1", "Document 1 " + "word " * 60_000),
}.items():
    FAULTS[name] = Fault(
        partial(send_json, change=change), ("not_json", "wrong_shape"), answers=None
    )
for name, times in (("too few results", 0), ("too many results", 2)):
    FAULTS[name] = Fault(
        partial(send, make=lambda reply, times=times: http({"result": reply["result"] * times})),
        ("wrong_shape",),
        tries=1,
        engines=("search_r1",),
    )


# --- the engines ----------------------------------------------------------------------------------


def _documents(item: str) -> list[str]:
    return [f"Document {rank} on {item}." for rank in range(1, TOPK + 1)]


def _chat_reply(items: list[str]) -> object:
    lines = [f"Doc {i}: {document}" for i, document in enumerate(_documents(items[0]), 1)]
    return {"choices": [{"message": {"content": "\n".join(lines)}}]}


def _search_r1_reply(items: list[str]) -> object:
    return {
        "result": [
            [{"document": {"contents": f'"Title"\n{text}'}, "score": 0.5} for text in documents]
            for documents in map(_documents, items)
        ]
    }


def _zerosearch_reply(items: list[str]) -> object:
    return [{"text": text} for text in _documents(items[0])]


def _web_reply(items: list[str], key: str) -> object:
    return {
        key: [
            {"title": "Title", "snippet": text, "link": f"https://example.org/{rank}"}
            for rank, text in enumerate(_documents(items[0]))
        ]
    }


def _chat(client: JsonClient) -> SearchEngine:
    generate = ChatClient(client, model="simulator", temperature=0.8, top_p=1.0, max_tokens=100,
                          workers=WORKERS, seed=0)  # fmt: skip
    return SimulatedEngine(generate, form="finetuned", topk=TOPK)


def _retriever(client: JsonClient, dialect: str) -> SearchEngine:
    return RetrieverEngine(client, topk=TOPK, dialect=dialect, workers=WORKERS)


def _web(client: JsonClient, provider: str) -> SearchEngine:
    return WebEngine(client, provider=provider, api_key=KEY, topk=TOPK, blocked_domains=(),
                     workers=WORKERS)  # fmt: skip


WEB = ("serper", "serpapi")
# Engine -> (engine of a client, healthy reply to queries, searches in one batch).
ENGINES = {
    "chat": (_chat, _chat_reply, 8),
    "search_r1": (partial(_retriever, dialect="search_r1"), _search_r1_reply, 3),
    "zerosearch": (partial(_retriever, dialect="zerosearch"), _zerosearch_reply, 8),
    "serper": (partial(_web, provider="serper"), partial(_web_reply, key="organic"), 8),
    "serpapi": (partial(_web, provider="serpapi"), partial(_web_reply, key="organic_results"), 8),
}


# --- the rollouts ---------------------------------------------------------------------------------


class ScriptedPolicy:
    """A generator whose episodes have scripted turns: episode number -> texts."""

    replicas = 1

    def __init__(self, tokenizer, script: dict[int, list[str]], slots: int):
        self.slots = slots
        self._tokenizer, self._script = tokenizer, script
        self._turns, self._decoding = Counter(), {}

    def replica_of(self, slot):
        return 0

    def free_tokens(self, slot):
        return 10_000

    def start(self, slots, token_rows):
        pass

    extend = start

    def start_decoding(self, slots, *, streams, max_new_tokens):
        self._decoding |= {slot: number for slot, (number, _) in zip(slots, streams, strict=True)}

    def decode_chunk(self, *, key, sampling):
        decoding, self._decoding = self._decoding, {}
        generations = {}
        for slot, number in decoding.items():
            tokens = encode(self._tokenizer, self._script[number][self._turns[number]])
            self._turns[number] += 1
            generations[slot] = Generation(tokens, [0.0] * len(tokens), "stop")
        return generations

    def decode_until(self, *, key, sampling, min_finished_fraction):
        return self.decode_chunk(key=key, sampling=sampling)


class TimedEngine:
    """An engine whose longest batch is known."""

    def __init__(self, engine: SearchEngine):
        self.name, self._engine, self.longest_secs = engine.name, engine, 0.0

    def search(self, requests):
        began = time.monotonic()
        try:
            return self._engine.search(requests)
        finally:
            self.longest_secs = max(self.longest_secs, time.monotonic() - began)


def _rollouts(tokenizer, engine: SearchEngine, count: int, slots: int) -> Iterator[Trajectory]:
    """Runs `count` episodes without concurrent searches, then as many with them."""
    for run, concurrent_searches in enumerate((0, 2)):
        numbers = range(run * count, (run + 1) * count)
        script = {
            number: [
                f"<search> {_item(number, 0)} </search>",
                f"<search> {_item(number, 1)} </search>",
                "<answer> gold </answer>",
            ]
            for number in numbers
        }
        rollouts = Rollouts(
            ScriptedPolicy(tokenizer, script, slots),
            engine,
            tokenizer,
            limits=Limits(max_turns=3, response_tokens=100, observation_tokens=200),
            sampling=Sampling(),
            concurrent_searches=concurrent_searches,
        )
        episodes = [Episode(number, f"Question {number}?", ("gold",)) for number in numbers]
        yield from rollouts.run(episodes, None)


def _item(number: int, turn: int) -> str:
    return f"item{2 * number + turn:05}"


class Cell:
    """One kind of fault, one engine and one rate.

    Attributes:
      searches: number of searches that ran.
      problems: one line per broken rule.
    """

    def __init__(self, kind: str, engine: str, rate: float):
        self.kind, self.engine, self.rate = kind, engine, rate
        self.fault = FAULTS[kind]
        self.searches, self.problems = 0, []

    def __str__(self):
        return f"{self.kind}, {self.engine}, {self.rate:.0%}"

    def run(self, tokenizer, loop: asyncio.AbstractEventLoop) -> None:
        """Runs the rollouts against a new server, and checks them."""
        make_engine, reply, slots = ENGINES[self.engine]
        self._server = FaultyServer(self.fault, reply, self.rate, str(self))
        asyncio.run_coroutine_threadsafe(self._server.start(), loop).result(10)
        client = JsonClient(
            f"http://127.0.0.1:{self._server.port}",
            timeout_secs=STALL_SECS[self.rate] if self.fault.stalls else TIMEOUT_SECS,
            attempts=ATTEMPTS,
            backoff_secs=BACKOFF_SECS,
            headers={"Authorization": f"Bearer {KEY}"},
            max_reply_bytes=MAX_REPLY_BYTES,
        )
        engine = TimedEngine(make_engine(client))
        runs = Future()

        def run_all():
            try:
                runs.set_result(list(_rollouts(tokenizer, engine, EPISODES[self.rate], slots)))
            except BaseException as error:
                runs.set_exception(error)

        # A daemon, so that a hang fails this cell and not the suite.
        threading.Thread(target=run_all, daemon=True).start()
        try:
            for trajectory in runs.result(WATCHDOG_SECS):
                self._check(trajectory, tokenizer)
        except TimeoutError:
            self.problems.append(f"hangs for more than {WATCHDOG_SECS:g} s")
        except Exception as error:
            self.problems.append(f"raises {type(error).__name__}: {str(error)[:80]}")
        finally:
            client.close()
            asyncio.run_coroutine_threadsafe(self._server.stop(), loop).result(10)
        if engine.longest_secs > client.budget_secs + SLACK_SECS:
            self.problems.append(
                f"a batch takes {engine.longest_secs:.1f} s of {client.budget_secs:.1f} s"
            )
        if self._server.strays:
            self.problems.append(f"the client requests {self._server.strays[0]}")
        tries = max(self._server.tries.values(), default=0)
        if self.rate == 1 and self.fault.tries not in (0, tries):
            self.problems.append(f"{tries} tries instead of {self.fault.tries}")
        if not self._server.faults:
            self.problems.append("no request met the fault")

    def _check(self, trajectory: Trajectory, tokenizer) -> None:
        """Compares each search of an episode, and the text inserted after it, with its query."""
        number = trajectory.episode.number
        items = [_item(number, turn) for turn in (0, 1)]
        texts = [text for text, by_policy in trajectory.segments(tokenizer) if not by_policy]
        blocks = texts[1:]
        queries = [request.query for request, _ in trajectory.searches]
        if trajectory.finish != "answer" or queries != items or len(blocks) != len(items):
            self.problems.append(f"episode {number}: {queries}, finish {trajectory.finish!r}")
            return
        for item, (request, result), block in zip(items, trajectory.searches, blocks, strict=True):
            self.searches += 1
            problems = list(self._problems(item, result, block))
            if request.key != result.key:
                problems.append(f"has the result of {result.key}")
            self.problems += [f"{item} {problem}" for problem in problems]

    def _problems(self, item: str, result: SearchResult, block: str) -> Iterator[str]:
        found = " ".join(result.documents)
        if set(ITEM.findall(found + block)) - {item}:
            yield "has documents of another query"
        if result.failure and result.documents:
            yield "has documents and a failure"
        if result.failure and result.failure not in block:
            yield f"shows {block} instead of {result.failure}"
        if any(secret in result.failure for secret in (KEY, LEAK, "127.0.0.1")):
            yield f"has a secret in its reason: {result.failure}"
        if any("\ud800" <= character <= "\udfff" for character in found):
            yield "has a document with a lone surrogate"
        if result.failure and result.failure_kind not in self.fault.kinds:
            yield f"failed with {result.failure_kind}: {result.failure}"
        if item in self._server.unsure:
            return
        if item in self._server.answered:
            if len(result.documents) != TOPK or not all(item in d for d in result.documents):
                yield f"lost its documents: {result.failure or 'nothing found'}"
        elif found:
            yield "has documents, but no healthy reply"
        # The web engines drop results without a title, a snippet or a link.
        elif not result.failure and not (self.engine in WEB and "wrong_shape" in self.fault.kinds):
            yield "failed without a reason"


@pytest.fixture
def loop():
    """An event loop in its own thread, for the servers."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def _run_heavy(cells: list[Cell], tokenizer, loop) -> None:
    """Runs the cells one by one and measures their memory, the server's included."""
    limit = 4 * WORKERS * MAX_REPLY_BYTES
    bomb(1), bomb(2)
    tracemalloc.start()
    try:
        for cell in cells:
            tracemalloc.reset_peak()
            cell.run(tokenizer, loop)
            peak = tracemalloc.get_traced_memory()[1]
            if peak > limit:
                cell.problems.append(f"{peak >> 20} MiB of memory, limit {limit >> 20} MiB")
    finally:
        tracemalloc.stop()


SAMPLE = {
    "reset in the body": (0.2,),
    "headers drip": (1.0,),
    "two replies at once": (0.2,),
    "deep nesting": (0.2,),
}


@pytest.mark.parametrize(
    "rates",
    [
        pytest.param(SAMPLE, id="sample"),
        *(
            pytest.param(
                dict.fromkeys(list(FAULTS)[part::4], RATES),
                id=f"part {part + 1} of 4",
                marks=pytest.mark.slow,
            )
            for part in range(4)
        ),
    ],
)
def test_a_faulty_server_neither_hangs_nor_mispairs_nor_hides_failures(
    rates, tiny_tokenizer, loop, tally, monkeypatch
):
    # No cell uses TLS, but each client would load the certificates, which takes 50 ms.
    monkeypatch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
    cells = [
        Cell(kind, engine, rate)
        for kind in rates
        for rate in rates[kind]
        for engine in FAULTS[kind].engines
    ]
    with ThreadPoolExecutor(8) as pool:
        light = [cell for cell in cells if not cell.fault.heavy]
        list(pool.map(lambda cell: cell.run(tiny_tokenizer, loop), light))
    _run_heavy([cell for cell in cells if cell.fault.heavy], tiny_tokenizer, loop)
    for cell in cells:
        tally(
            f"search fault: {cell.engine}, {cell.rate:.0%} of requests",
            cell.searches,
            len(cell.problems),
        )
    failed = [
        f"{cell}: {len(cell.problems)} problems, first: {cell.problems[0]}"
        for cell in cells
        if cell.problems
    ]
    assert not failed, f"{len(failed)} of {len(cells)} cells fail:\n" + "\n".join(failed)
