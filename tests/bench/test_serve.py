"""`python -m harness serve-bench` against a small server of our own tiny model, on loopback."""

import asyncio
import base64
import io
import json
import threading

import pytest
import torch
from aiohttp import web
from PIL import Image

from harness.bench import serve
from methods.errors import UserError
from methods.uniform import Uniform


class Server:
    """The tiny backbone behind /v1/models and /v1/chat/completions, one answer at a time, pruned or not."""

    def __init__(self, backbone, pruner=None, broken: bool = False):
        self.backbone, self.pruner, self.broken, self.asked = backbone, pruner, broken, 0
        self.lock = asyncio.Lock()

    async def models(self, request):
        return web.json_response({"data": [{"id": "tiny"}]})

    async def complete(self, request):
        self.asked += 1
        if self.broken and self.asked > 1:
            return web.json_response({"error": "out of memory"}, status=500)
        body = await request.json()
        picture, text = (part for part in body["messages"][0]["content"])
        image = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].split(",")[1])))
        async with self.lock:
            words = await asyncio.to_thread(self.answer, image, text["text"], body["max_tokens"])
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for word in words:
            await answer.write(
                f"data: {json.dumps({'choices': [{'delta': {'content': word}}]})}\n\n".encode()
            )
        usage = {"choices": [], "usage": {"completion_tokens": len(words)}}
        await answer.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        return answer

    def answer(self, image, text: str, tokens: int) -> list[str]:
        from contextlib import nullcontext

        inputs = self.backbone.inputs([image], [text])
        with torch.inference_mode(), self.pruner(self.backbone.model) if self.pruner else nullcontext():
            ids = self.backbone.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return [f"{i} " for i in ids[0, inputs["input_ids"].shape[1] :].tolist()]


@pytest.fixture
def start(backbone):
    """start(pruner=...) -> (url, server); all are stopped behind the test."""
    running = []

    def begin(**settings):
        ready, loop = threading.Event(), asyncio.new_event_loop()
        found = {}

        def work():
            asyncio.set_event_loop(loop)

            async def up():
                found["server"] = Server(backbone, **settings)
                app = web.Application(client_max_size=8 << 20)
                app.router.add_get("/v1/models", found["server"].models)
                app.router.add_post("/v1/chat/completions", found["server"].complete)
                found["runner"] = web.AppRunner(app)
                await found["runner"].setup()
                site = web.TCPSite(found["runner"], "127.0.0.1", 0)
                await site.start()
                found["port"] = site._server.sockets[0].getsockname()[1]
                ready.set()

            loop.run_until_complete(up())
            loop.run_forever()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert ready.wait(20)
        running.append((loop, found["runner"], thread))
        return f"http://127.0.0.1:{found['port']}/v1", found["server"]

    yield begin
    for loop, runner, thread in running:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)


def options(*urls, **more):
    return serve.ServeOptions(urls, concurrency=(1, 2), requests=3, max_tokens=3, timeout=60, **more)


def test_two_servers_are_measured_side_by_side(start, tmp_path, capsys):
    plain, first = start()
    pruned, second = start(pruner=Uniform(budget=8))
    assert serve.run(options(plain, pruned), tmp_path / "report.json") == 0
    levels = json.loads((tmp_path / "report.json").read_text())["levels"]
    assert [(v["url"], v["concurrency"], v["answered"]) for v in levels] == [
        (plain, 1, 3), (pruned, 1, 3), (plain, 2, 4), (pruned, 2, 4),
    ]  # fmt: skip
    assert first.asked == second.asked == 1 + 3 + 4  # bounded: one to warm up, then what was said
    for level in levels:
        assert 0 < level["first_median"] <= level["latency_median"] <= level["latency_p90"]
        assert level["tokens_per_second"] == pytest.approx(3 * level["requests_per_second"])
    assert "(1.00x)" in capsys.readouterr().out


def test_requests_that_fail_are_counted(start, capsys):
    url, _ = start(broken=True)
    assert serve.run(options(url)) == 1
    assert "failed" in capsys.readouterr().out


def test_bad_input_is_one_line(start, tmp_path):
    with pytest.raises(UserError, match="base URL"):
        serve.run(options("127.0.0.1"))
    with pytest.raises(UserError, match="no OpenAI-compatible server answers"):
        serve.run(options("http://127.0.0.1:9/v1"))
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(UserError, match=r"no\.png: no readable image"):
        serve.run(options(start()[0], images=(tmp_path / "no.png",)))
