"""Small synthetic parquet files in the eight schemas, laid out as `harness.tasks.suites` expects them."""

from __future__ import annotations

import io
from pathlib import Path

COLORS = ["red", "green", "blue", "yellow", "black", "white", "orange", "purple"]


def picture(i: int) -> dict:
    """The hub's image struct: PNG bytes of a uniform picture with a box."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (64, 48), COLORS[i % len(COLORS)])
    ImageDraw.Draw(image).rectangle([4 + i % 20, 4, 28 + i % 20, 28], outline="gray", width=2)
    data = io.BytesIO()
    image.save(data, "PNG")
    return {"bytes": data.getvalue(), "path": f"{i}.png"}


def pope() -> list[dict]:
    categories = ["adversarial", "popular", "random"]
    return [
        dict(
            id=str(i), question_id=str(i), question=f"Is there a {COLORS[i % 8]} box in the image?",
            answer="yes" if i % 2 == 0 else "no", image_source=f"s{i // 2}", image=picture(i // 2),
            category=categories[i % 3],
        )
        for i in range(12)
    ]  # fmt: skip


def mme() -> list[dict]:
    rows = []
    for k, category in enumerate(["existence", "color", "OCR", "existence", "code_reasoning"]):
        for answer in ("Yes", "No"):
            rows.append(
                dict(
                    question_id=f"{category}/{k}.png", image=picture(k), category=category, answer=answer,
                    question=f"Is box {k} {'here' if answer == 'Yes' else 'gone'}? Please answer yes or no.",
                )
            )  # fmt: skip
    return rows


def gqa() -> tuple[list[dict], list[dict]]:
    images = [dict(id=f"n{i}", image=picture(i)) for i in range(5)]
    rows = [
        dict(
            id=str(i), imageId=f"n{i % 5}", question=f"What color is box {i}?", answer=COLORS[i % 5],
            fullAnswer=COLORS[i % 5], isBalanced=True,
        )
        for i in range(10)
    ]  # fmt: skip
    return rows, images


def textvqa() -> list[dict]:
    rows = []
    for i in range(8):
        agreeing = [10, 3, 2, 1][i % 4]
        answers = [COLORS[i]] * agreeing + [f"other{j}" for j in range(10 - agreeing)]
        rows.append(
            dict(
                image_id=f"i{i}", question_id=i, question=f"what word is on box {i}?", image=picture(i),
                answers=answers, ocr_tokens=[COLORS[i].upper()],
            )
        )  # fmt: skip
    return rows


def vqav2() -> list[dict]:
    return [
        dict(
            question_id=r["question_id"], question=f"What color is box {i}?", image=r["image"], image_id=i,
            answers=[
                dict(answer=a, answer_confidence="yes", answer_id=j + 1) for j, a in enumerate(r["answers"])
            ],
        )
        for i, r in enumerate(textvqa())
    ]  # fmt: skip


def scienceqa() -> list[dict]:
    return [
        dict(
            image=picture(i), question=f"Which letter is for box {i}?",
            choices=["aa", "bb", "cc"][: 2 + i % 2],
            answer=i % 2, hint="" if i % 2 else "A hint.",
        )
        for i in range(8)
    ]  # fmt: skip


def mmbench(chinese: bool = False) -> list[dict]:
    rows = []
    for i in range(4):
        options = ["cat", "dog", "bird", "fish"]
        for r in range(4):
            turned = options[r:] + options[:r]
            rows.append(
                {
                    "index": i + 1 + r * 1_000_000,
                    "question": ("图中是什么动物" if chinese else "What animal is shown") + f" {i}?",
                    "hint": "nan" if i % 2 else "Look at the box.",
                    "answer": "ABCD"[turned.index("dog")],
                    **dict(zip("ABCD", turned)),
                    "category": "identity" if i % 2 else "location",
                    "image": picture(i), "source": "synthetic", "L2-category": "x", "comment": "nan",
                    "split": "dev",
                }
            )  # fmt: skip
    return rows


def write(root: Path, split: str = "eval") -> Path:
    """Write all eight below `root`."""
    import datasets

    questions, images = gqa()
    files = {
        f"gqa/{split}_instructions": questions, f"gqa/{split}_images": images, f"mme/{split}": mme(),
        f"pope/{split}": pope(), f"textvqa/{split}": textvqa(), f"vqav2/{split}": vqav2(),
        f"scienceqa/{split}": scienceqa(), f"mmbench_en/{split}": mmbench(),
        f"mmbench_cn/{split}": mmbench(True),
    }  # fmt: skip
    for name, rows in files.items():
        path = Path(root) / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows)
        if "image" in table.column_names:
            table = table.cast_column("image", datasets.Image())
        table.to_parquet(path)
    return Path(root)
