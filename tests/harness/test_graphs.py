"""The LLM's prefill as a graph: on a CPU the recorded function itself stands in for its recording."""

from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from harness.costs import cuda_graphs, latency, macs
from methods import registry
from methods.base import Pruner, Selection


@pytest.fixture(scope="module")
def inputs(backbone):
    return backbone.inputs([Image.radial_gradient("L").convert("RGB")], ["What color is it?"])


@dataclass
class Reader(Pruner):
    name = "reader"
    reads_text = True
    positions = "original"

    def select(self, image):
        return Selection(torch.arange(0, 32, 2, device=image.hidden.device))


METHODS = [registry.build(s, budget=16) for s in ("vanilla", "visionzip", "downsample")] + [Reader(budget=16)]


def replayed_and_eager(backbone, pruner, inputs, record):
    replay, logits = cuda_graphs.prefill(backbone, pruner, inputs, record)
    replay()
    with torch.inference_mode(), latency.put_on(pruner, backbone.model):
        return logits, macs.prefill(backbone.model, inputs)


@pytest.mark.parametrize("pruner", METHODS, ids=lambda p: p.name)
def test_what_is_recorded_is_the_llm_on_what_the_method_leaves(backbone, inputs, pruner):
    replayed, eager = replayed_and_eager(backbone, pruner, inputs, record=lambda run: run)
    torch.testing.assert_close(replayed, eager, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pruner", METHODS, ids=lambda p: p.name)
def test_replayed_graph_equals_the_eager_prefill(tiny_checkpoint, inputs, pruner):
    import backbones

    on_gpu = backbones.load(str(tiny_checkpoint), device="cuda")
    moved = {k: v.to("cuda") for k, v in inputs.items()}
    replayed, eager = replayed_and_eager(on_gpu, pruner, moved, record=None)
    torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_recorded_has_a_reason(backbone, inputs):
    pruners = [registry.build("fastv", budget=16), registry.build("vanilla")]

    def record(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    cut, failed = cuda_graphs.compare(backbone, pruners, inputs, repeats=2, record=record)
    assert not cut.milliseconds and "inside the LLM" in cut.reason
    assert failed.summary() == {
        "reason": "recording failed: operation not permitted when stream is capturing"
    }
    padded = backbone.inputs([Image.new("RGB", (80, 80))] * 2, ["What?", "Is there a red box in the image?"])
    (uneven,) = cuda_graphs.compare(backbone, [pruners[1]], padded, repeats=2, record=lambda run: run)
    assert "different length" in uneven.reason


def test_without_a_gpu_there_is_no_graph(backbone, inputs):
    (result,) = cuda_graphs.compare(backbone, [registry.build("vanilla")], inputs, repeats=3)
    assert result.summary() == {"reason": "there is no CUDA device"}


def test_replays_are_timed(backbone, inputs):
    pruners = [registry.build("vanilla"), registry.build("fastv", budget=16)]
    timed, left_out = cuda_graphs.compare(backbone, pruners, inputs, repeats=3, record=lambda run: run)
    assert len(timed.milliseconds) == 3 and not left_out.milliseconds
    assert 0 < timed.summary()["p10"] <= timed.summary()["median"]
