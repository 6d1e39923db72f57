"""Prune a model's visual tokens while it generates: `python examples/prune_a_model.py`.

Works the same on `llava-1.5-7b`, `qwen2.5-vl-7b` or a folder; `pocket-llava` is shipped and runs on a laptop.
"""

import backbones
from harness.drawings.scenes import render, sample_scene
from methods.fastv import FastV
from methods.visionzip import VisionZip


def main() -> None:
    backbone = backbones.load("pocket-llava")
    image = render(sample_scene("eval", seed=1, index=0))  # or any picture: PIL.Image.open("photo.jpg")
    prompt = "Is there a star in the image?\nAnswer the question using a single word or phrase."
    inputs = backbone.inputs([image], [prompt])
    for pruner in (FastV(budget=64), VisionZip(budget=64)):
        with pruner(backbone.model) as trace:
            ids = backbone.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        answer = backbone.processor.batch_decode(new, skip_special_tokens=True)[0]
        layers = trace.visual_tokens[0].tolist()
        print(f"{pruner.name:10} {answer!r}; visual tokens entering each layer: {layers}")


if __name__ == "__main__":
    main()
