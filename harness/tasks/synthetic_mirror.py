"""`python -m harness.tasks.synthetic_mirror DIR`: a mirror of the data sets, a handful of drawn documents
each.

Folders, cards, shards, column names and types are those of the hub's repositories as lmms-eval 0.7.3 names
them; so are the oddities: "nan" for a missing hint or option, no OCR tokens, images of every mode, extreme
shapes. `--tasks paper --data DIR` runs on it without a download. The scores mean nothing.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.tasks.sources import ORGANISATIONS

COLORS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
#: (mode, format, width, height) of the images, in turn
LOOKS = (
    ("RGB", "JPEG", 64, 48), ("L", "PNG", 48, 64), ("P", "PNG", 50, 50), ("RGBA", "PNG", 200, 40),
    ("CMYK", "JPEG", 30, 90), ("LA", "PNG", 33, 31), ("1", "PNG", 64, 64), ("RGB", "PNG", 5, 3),
)  # fmt: skip


def picture(i: int) -> dict:
    """The hub's image struct: an encoded image of a box on a ground, different for each i."""
    from PIL import Image, ImageDraw

    mode, kind, width, height = LOOKS[i % len(LOOKS)]
    image = Image.new("RGB", (width, height), COLORS[i % len(COLORS)])
    ImageDraw.Draw(image).rectangle([1 + i % 7, 1, width // 2 + i % 7, height // 2], outline="gray", width=2)
    data = io.BytesIO()
    image.convert(mode).save(data, kind)
    return {"bytes": data.getvalue(), "path": f"{i}.{kind.lower()}"}


def pope() -> list[dict]:
    return [
        dict(
            id=str(i), question_id=str(i), question=f"Is there a {COLORS[i]} box in the image?",
            answer="yes" if i % 2 else "no", image_source=f"COCO_val2014_{i // 2:012d}",
            image=picture(i // 2), category=("adversarial", "popular", "random")[i % 3],
        )
        for i in range(6)
    ]  # fmt: skip


def mme() -> list[dict]:
    return [
        dict(
            question_id=f"{category}/{k:04d}.png", image=picture(k), answer=answer, category=category,
            question=f"Is box {k} {'here' if answer == 'Yes' else 'gone'}? Please answer yes or no.",
        )
        for k, category in enumerate(("existence", "OCR", "code_reasoning"))
        for answer in ("Yes", "No")
    ]  # fmt: skip


def gqa() -> tuple[list[dict], list[dict]]:
    """(questions, images)"""
    images = [dict(id=f"n{i}", image=picture(i)) for i in range(3)]
    rows = [
        dict(
            id=f"2{i:06d}", imageId=f"n{i % 3}", question=f"What color is box {i}?", answer=COLORS[i],
            fullAnswer=f"It is {COLORS[i]}.", isBalanced=True, groups={"global": "color", "local": "x"},
            entailed="", equivalent="", types={"structural": "query", "semantic": "attr", "detailed": "x"},
            annotations={"question": [], "answer": [], "fullAnswer": []}, semantic=[], semanticStr="x",
        )
        for i in range(6)
    ]  # fmt: skip
    return rows, images


def textvqa() -> list[dict]:
    tokens = ([], None, ["RED", "0"], ["'", '"', "É", ""])
    return [
        dict(
            image_id=f"i{i}", question_id=34600 + i, question=f"what word is on box {i}?",
            question_tokens=["what", "word"], image=picture(i), image_width=64, image_height=48,
            flickr_original_url="", flickr_300k_url="",
            answers=[COLORS[i]] * (10, 3, 2, 1)[i] + [f"other{j}" for j in range(10 - (10, 3, 2, 1)[i])],
            image_classes=["Box"], set_name="val", ocr_tokens=tokens[i],
        )
        for i in range(4)
    ]  # fmt: skip


def vqav2() -> list[dict]:
    return [
        dict(
            question_type="what color", multiple_choice_answer=COLORS[i], image_id=i, answer_type="other",
            question_id=1000 + i, question=f"What color is box {i}?", image=picture(i),
            answers=[
                dict(answer=COLORS[i] if j < 9 - 3 * i else "", answer_confidence="maybe", answer_id=j + 1)
                for j in range(10)
            ],
        )
        for i in range(4)
    ]  # fmt: skip


def scienceqa() -> list[dict]:
    return [
        dict(
            image=picture(i), question=f"Which letter is for box {i}?",
            choices=["aa", "bb", "cc", "dd", "ee"][: 2 + i], answer=i % 2, hint="" if i % 2 else "A hint.",
            task="closed choice", grade="grade2", subject="natural science", topic="x", category="x",
            skill="x", lecture="", solution="",
        )
        for i in range(4)
    ]  # fmt: skip


def mmbench(chinese: bool = False) -> list[dict]:
    """Circular copies of three questions of four, three and two options: index, index + 1e6, ..."""
    rows = []
    for i, options in enumerate((["cat", "dog", "bird", "fish"], ["cat", "dog", "bird"], ["cat", "dog"])):
        for r in range(len(options)):
            turned = options[r:] + options[:r]
            shown = dict(zip("ABCD", [*turned, *["nan"] * (4 - len(turned))]))
            rows.append(
                {
                    "index": i + 1 + r * 1_000_000,
                    "question": ("图中是什么动物" if chinese else "What animal is shown") + f" {i}?",
                    "hint": "nan" if i % 2 else "Look at the box.", "answer": "ABCD"[turned.index("dog")],
                    **shown, "category": "identity_reasoning" if i else "object_localization",
                    "image": picture(i), "source": "synthetic", "L2-category": "x", "comment": "nan",
                    "split": "dev",
                }
            )  # fmt: skip
    return rows


def write(root: Path) -> Path:
    """Write all repositories below `root`."""
    from datasets import Image, Value

    text, whole, small = Value("string"), Value("int64"), Value("int32")
    pair = {"objectId": text, "value": text}
    questions, images = gqa()
    texts = {name: dict.fromkeys(rows[0], text) for name, rows in (("pope", pope()), ("mme", mme()))}
    sqa = dict.fromkeys(scienceqa()[0], text) | {"choices": [text], "answer": Value("int8")}
    bench = dict.fromkeys(mmbench()[0], text) | {"index": whole}
    reading = dict.fromkeys(textvqa()[0], text)
    reading |= {key: [text] for key in ("question_tokens", "answers", "image_classes", "ocr_tokens")}
    reading |= dict.fromkeys(("question_id", "image_width", "image_height"), small)
    seen = dict.fromkeys(vqav2()[0], text) | {"image_id": whole, "question_id": whole}
    seen["answers"] = [{"answer": text, "answer_confidence": text, "answer_id": whole}]
    scene = dict.fromkeys(questions[0], text) | {
        "isBalanced": Value("bool"),
        "groups": {"global": text, "local": text},
        "types": dict.fromkeys(("structural", "semantic", "detailed"), text),
        "annotations": {key: [pair] for key in ("question", "answer", "fullAnswer")},
        "semantic": [{"operation": text, "argument": text, "dependencies": [small]}],
    }
    image = {"image": Image()}
    repositories = {
        "POPE": {"default": ("test", pope(), texts["pope"] | image)},
        "MME": {"default": ("test", mme(), texts["mme"] | image)},
        "GQA": {
            "testdev_balanced_instructions": ("testdev", questions, scene),
            "testdev_balanced_images": ("testdev", images, {"id": text} | image),
        },
        "textvqa": {"default": ("validation", textvqa(), reading | image)},
        "VQAv2": {"default": ("validation", vqav2(), seen | image)},
        "ScienceQA": {"ScienceQA-IMG": ("test", scienceqa(), sqa | image)},
        "MMBench": {
            "en": ("dev", mmbench(), bench | image),
            "cn": ("dev", mmbench(chinese=True), bench | image),
        },
    }
    for name, configs in repositories.items():
        _write(Path(root) / ORGANISATIONS[0] / name, configs)
    return Path(root)


def _write(folder: Path, configs: dict[str, tuple[str, Sequence[dict], dict]]) -> None:
    """One repository: each configuration in two shards, and the card that names them."""
    import datasets

    card = ["---", "configs:"]
    for config, (split, rows, features) in configs.items():
        place = "data" if config == "default" else config
        (folder / place).mkdir(parents=True, exist_ok=True)
        card += [f"- config_name: {config}", "  data_files:"]
        card += [f"  - split: {split}", f"    path: {place}/{split}-*"]
        middle = (len(rows) + 1) // 2
        for i, part in enumerate((rows[:middle], rows[middle:])):
            table = datasets.Dataset.from_list(list(part), features=datasets.Features(features))
            table.to_parquet(folder / place / f"{split}-{i:05d}-of-00002.parquet")
    (folder / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for a wrong number of arguments."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print((__doc__ or "").strip())
        return 2
    write(Path(arguments[0]))
    print(
        f"written to {arguments[0]}; try: python run_all.py --tasks paper --data {arguments[0]} --budget 64"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
