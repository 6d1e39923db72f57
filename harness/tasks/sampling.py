"""A fixed slice of a benchmark: `--limit N`.

The rule: documents are gathered into the groups that are scored together (the two questions of an MME image,
the rotations of an MMBench question, else one document each). Groups are put in a fixed pseudo-random order
(the digest of benchmark, file order and group key), spread evenly over the benchmark's strata (the categories
of MME, POPE, MMBench) by taking one group of each stratum in turn. Groups are taken until there are at least
N documents, so groups are never cut and the slice may hold a few documents more than N. If the benchmark's
score needs documents of several parts (POPE's F1: a yes and a no of each category), the first group of each
part that is still missing is taken too, however small N is. Slices are nested: `--limit 20` contains
`--limit 10`. The documents are evaluated in file order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence


def take(
    keys: Sequence[Hashable],
    strata: Sequence[Hashable],
    limit: int | None,
    salt: str = "",
    parts: Sequence[Hashable] | None = None,
) -> list[int]:
    """Row numbers of the slice, ascending.

    keys: the group of each row; strata: the stratum of each row (a group lies in the stratum of its first
    row). limit: least number of rows, or None for all. salt: names the benchmark, so that slices of different
    ones are independent. parts: the part of each row; every part that there is will be in the slice.
    """
    if len(keys) != len(strata) or (parts is not None and len(parts) != len(keys)):
        raise ValueError("one key, one stratum and one part per row")
    if limit is None or limit >= len(keys):
        return list(range(len(keys)))
    rows: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        rows.setdefault(key, []).append(number)
    queues: dict[Hashable, list[Hashable]] = {}
    for key in sorted(rows, key=lambda k: _digest(salt, k)):
        queues.setdefault(strata[rows[key][0]], []).append(key)
    order = sorted(queues, key=lambda s: _digest(salt, s))
    chosen: list[int] = []
    missing = set(parts or ())
    for depth in range(max(map(len, queues.values()))):
        if len(chosen) >= limit and not missing:
            break
        for stratum in order:
            own = rows[queues[stratum][depth]] if depth < len(queues[stratum]) else []
            if own and (len(chosen) < limit or missing.intersection(parts[n] for n in own if parts)):
                chosen += own
                missing.difference_update(parts[n] for n in own if parts)
    return sorted(chosen)


def sample(rows: Mapping[str, Sequence[int]], number: int) -> list[tuple[str, int]]:
    """Which questions the page's explorer shows: (task, row) by digest, the tasks in turn, so that a larger
    sample contains a smaller one.

    Args:
        rows: by task, the rows that were asked.
        number: of questions at most.
    """
    queues = {
        task: sorted(own, key=lambda row: _digest("explorer", (task, row))) for task, own in rows.items()
    }
    depth = max((len(q) for q in queues.values()), default=0)
    turns = [(task, queue[i]) for i in range(depth) for task, queue in queues.items() if i < len(queue)]
    return turns[:number]


def _digest(salt: str, value: Hashable) -> str:
    return hashlib.sha256(f"{salt}\x1f{value!r}".encode()).hexdigest()
