"""Time to first token, latency and throughput of an OpenAI-compatible server that takes images, by
concurrency.

The server prunes or does not: two servers, started by their user with and without pruning, are given as two
URLs and asked the same questions. At each concurrency so many requests are kept in flight; an answer is read
as it streams. What is measured is what a client sees: queueing, the image's decoding and the network are in
it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from methods.errors import UserError

log = logging.getLogger("harness")
PROMPT = "Describe the image in one sentence."


@dataclass(frozen=True)
class ServeOptions:
    """What is asked, of whom, how often.

    Attributes:
        urls: base URLs, such as http://127.0.0.1:8000/v1; ratios refer to the first.
        model: name that the server knows; "": the first that it lists.
        concurrency: requests in flight, one measurement each.
        requests: at each concurrency; at least twice the concurrency are sent.
        max_tokens: of an answer.
        prompt: text behind the image.
        images: files; none: drawn scenes, each another one, so that a server's image cache does not help.
        timeout: seconds for one answer.
    """

    urls: tuple[str, ...]
    model: str = ""
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    requests: int = 16
    max_tokens: int = 16
    prompt: str = PROMPT
    images: tuple[Path, ...] = ()
    timeout: float = 120.0


@dataclass(frozen=True)
class Reply:
    """One answer: seconds to the first token and to the last; tokens as the server counts them, else its
    pieces."""

    first: float
    whole: float
    tokens: int


@dataclass(frozen=True)
class Level:
    """One server at one concurrency. Times in ms, of the answers that came; failed: requests without an
    answer."""

    url: str
    concurrency: int
    answered: int
    failed: int
    first_median: float | None
    first_p90: float | None
    latency_median: float | None
    latency_p90: float | None
    requests_per_second: float
    tokens_per_second: float


async def measure(options: ServeOptions) -> list[Level]:
    """All servers at all concurrencies, the servers in turn at each, so that a warming machine hits all
    alike. Raises UserError if one cannot be reached or lists no model."""
    import aiohttp

    most = max(options.concurrency)
    pictures = _pictures(options, max(options.requests, 2 * most))
    limit = aiohttp.TCPConnector(limit=most)
    async with aiohttp.ClientSession(
        connector=limit, timeout=aiohttp.ClientTimeout(total=options.timeout)
    ) as session:
        models = {url: options.model or await _model(session, url) for url in options.urls}
        for url in options.urls:  # the first answer compiles, allocates, warms caches
            await _ask(session, url, models[url], pictures[0], options)
        levels = []
        for width in options.concurrency:
            for url in options.urls:
                levels.append(await _level(session, url, models[url], pictures, width, options))
                log.info(_line(levels[-1]))
        return levels


async def _level(
    session, url: str, model: str, pictures: Sequence[str], width: int, options: ServeOptions
) -> Level:
    waiting = iter(pictures[: max(options.requests, 2 * width)])
    replies: list[Reply] = []
    failed = 0

    async def client() -> None:
        nonlocal failed
        for picture in waiting:
            try:
                replies.append(await _ask(session, url, model, picture, options))
            except (UserError, asyncio.TimeoutError):
                failed += 1

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(width)))
    seconds = time.perf_counter() - start
    first, whole = ([1e3 * getattr(r, part) for r in replies] for part in ("first", "whole"))
    return Level(
        url,
        width,
        len(replies),
        failed,
        *(value for times in (first, whole) for value in (_quantile(times, 50), _quantile(times, 90))),
        len(replies) / seconds,
        sum(r.tokens for r in replies) / seconds,
    )


def _quantile(times: Sequence[float], percent: int) -> float | None:
    if len(times) < 2:
        return times[0] if times else None
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


async def _model(session, url: str) -> str:
    import aiohttp

    try:
        async with session.get(f"{url.rstrip('/')}/models") as answer:
            names = [entry["id"] for entry in (await answer.json())["data"]]
    except (aiohttp.ClientError, asyncio.TimeoutError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--url {url}: no OpenAI-compatible server answers there ({type(error).__name__})"
        ) from error
    if not names:
        raise UserError(f"--url {url}: the server lists no model; name one with --model")
    return names[0]


async def _ask(session, url: str, model: str, picture: str, options: ServeOptions) -> Reply:
    """One streamed answer. Raises UserError if the server refuses or breaks off."""
    import aiohttp

    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": options.prompt}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": options.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, pieces, counted = time.perf_counter(), None, 0, None
    try:
        async with session.post(f"{url.rstrip('/')}/chat/completions", json=body) as answer:
            if answer.status != 200:
                raise UserError(
                    f"{url} refuses a question with an image: {answer.status} {(await answer.text())[:200]}"
                )
            async for line in answer.content:
                text = line.decode(errors="replace").strip()
                if not text.startswith("data:") or text == "data: [DONE]":
                    continue
                event = json.loads(text[5:])
                if any((c.get("delta") or {}).get("content") for c in event.get("choices") or []):
                    first = first or time.perf_counter()
                    pieces += 1
                counted = (event.get("usage") or {}).get("completion_tokens", counted)
    except (aiohttp.ClientError, ValueError) as error:
        raise UserError(f"{url} broke off ({type(error).__name__}: {error})") from error
    end = time.perf_counter()
    if first is None:
        raise UserError(f"{url} gave an empty answer")
    return Reply(first - start, end - start, counted or pieces)


def _pictures(options: ServeOptions, number: int) -> list[str]:
    """Data URIs; files are used in turn."""
    from backbones.images import BadImage, upright

    if options.images:
        found = []
        for path in options.images:
            try:
                found.append(_uri(upright(path)))
            except BadImage as error:
                raise UserError(f"--images {path}: no readable image ({error})") from error
        return [found[i % len(found)] for i in range(number)]
    from harness.drawings.scenes import render, sample_scene

    return [_uri(render(sample_scene("eval", 7, i))) for i in range(number)]


def _uri(image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _shown(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _line(level: Level) -> str:
    broken = f", {level.failed} FAILED" if level.failed else ""
    return (
        f"{level.url} at {level.concurrency}: first token {_shown(level.first_median)} ms, "
        f"{level.requests_per_second:.2f} answers/s{broken}"
    )


def table(levels: Sequence[Level]) -> str:
    """Markdown, one row per concurrency and server; ratios to the first server at the same concurrency."""
    from tabulate import tabulate

    base = {level.concurrency: level for level in levels if level.url == levels[0].url}
    rows = []
    for level in levels:
        first = base[level.concurrency]
        ratio = level.requests_per_second / first.requests_per_second if first.requests_per_second else None
        rows.append(
            {
                "in flight": level.concurrency,
                "server": level.url,
                "first token ms (p90)": f"{_shown(level.first_median)} ({_shown(level.first_p90)})",
                "answer ms (p90)": f"{_shown(level.latency_median)} ({_shown(level.latency_p90)})",
                "answers/s (ratio)": f"{level.requests_per_second:.2f} ({_shown(ratio, 2)}x)",
                "tokens/s": f"{level.tokens_per_second:.1f}",
                "failed": str(level.failed),
            }
        )
    align = ("right", "left", *["right"] * 5)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True, colalign=align)


def run(options: ServeOptions, report: Path | None = None) -> int:
    """Measure, print the table, write `report` (JSON). Exit code 1 if a request failed. Raises UserError for
    bad input."""
    if not options.urls or any(not url.startswith(("http://", "https://")) for url in options.urls):
        raise UserError("--url: give the server's base URL, such as http://127.0.0.1:8000/v1")
    levels = asyncio.run(measure(options))
    print(table(levels))
    if report is not None:
        from harness.store import records

        body = {"kind": "serve_bench", "prompt": options.prompt, "max_tokens": options.max_tokens}
        records.write(report, body | {"levels": [asdict(level) for level in levels]})
        print(f"\n{report}")
    return 1 if any(level.failed for level in levels) else 0
