"""ScienceQA (arXiv 2209.09513): multiple choice, the questions with an image."""

from harness.drawings import facts
from harness.drawings.drawing import Drawing
from harness.drawings.wording import HINTS, LETTER_ANSWER, LETTERS, first_fact, options_of, pick
from harness.tasks.benchmark import IMAGE, INT, TEXT, TEXTS, Benchmark, Row, rows_in
from harness.tasks.scoring import EXACT_MATCH


def _answer_problem(row: Row) -> str:
    inside = 0 <= row["answer"] < len(row["choices"])
    return "" if inside else f"answer {row['answer']} of {len(row['choices'])} choices"


def _row(fact, choices, rng) -> dict:
    return dict(
        question=fact.question,
        choices=choices,
        answer=choices.index(fact.answer),
        hint=pick(rng, HINTS),
        topic=fact.topic,
    )


def _rows(scene, rng, number) -> list[dict]:
    words = (facts.category, facts.category, facts.read_word, facts.read_digit)
    fact = first_fact(scene, rng, (*words, facts.count, facts.shape, facts.texture))
    return [] if fact is None else [_row(fact, options_of(fact, rng), rng)]


def _asked(interview, task, category) -> list[tuple]:
    """The right letters in turn."""
    fact = interview.fact(task, ("meaning", "read", "count", "twins", "lookup"))
    if fact is None:
        return []
    choices = [o for o in options_of(fact, interview.rng) if o != fact.answer]
    letters = range(len(choices) + 1)
    place = interview.even(task, f"letter of {len(letters)}", among=letters)
    choices.insert(place, fact.answer)
    return [(_row(fact, choices, interview.rng), fact)]


def _prompt(row: Row) -> str:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"]))
    return f"{context}{row['question']}\n{choices}{LETTER_ANSWER}"


_DRAWING = Drawing(
    questions=240,
    per_regime=80,
    rows=_rows,
    asked=_asked,
    extra=lambda scene: dict(
        task="closed choice",
        grade="grade2",
        subject="natural science",
        category="scenes",
        skill="look",
        lecture="",
        solution="",
    ),
    prompt=_prompt,
    target=lambda row: LETTERS[int(row["answer"])],
    chance=lambda row, fact: 1 / len(row["choices"]),
)


BENCHMARKS = (
    Benchmark(
        name="scienceqa",
        title="SQA",
        place=6,
        yaml="scienceqa/scienceqa_img.yaml",
        files=rows_in("scienceqa"),
        columns={
            "rows": {"question": TEXT, "choices": TEXTS, "answer": INT, "hint": TEXT, "image": IMAGE},
        },
        scoring=EXACT_MATCH,
        documents=2_017,
        comparable=True,
        why="image subset, accuracy",
        upstream_split="test",
        repository="ScienceQA",
        configs={"rows": "ScienceQA-IMG"},
        answer_problem=_answer_problem,
        drawing=_DRAWING,
    ),
)
