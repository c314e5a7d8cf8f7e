"""Draws sorting-choices.jsonl and sorting-examples.jsonl, which evaluation sweeps use; needs Python alone."""

import json
import pathlib
import random

HERE = pathlib.Path(__file__).parent.parent
random.seed(5)


def line(n):
    return [random.randint(0, 9) for _ in range(n)]


def show(digits):
    return " ".join(map(str, digits))


with open(HERE / "sorting-choices.jsonl", "w") as f:
    for _ in range(60):
        digits = line(random.randint(4, 6))
        right = sorted(digits)
        swapped = right[:]
        place = random.randrange(len(swapped) - 1)
        swapped[place] = (swapped[place] + 1) % 10
        wrong = [sorted(digits, reverse=True), swapped, right + [9]]
        choices = [show(c) for c in [right] + [w for w in wrong if w != right]]
        random.shuffle(choices)
        row = {"prompt": "Sort: " + show(digits), "choices": choices, "answer": choices.index(show(right))}
        f.write(json.dumps(row) + "\n")
with open(HERE / "sorting-examples.jsonl", "w") as f:
    for _ in range(10):
        digits = line(5)
        f.write(json.dumps({"prompt": "Sort: " + show(digits), "answer": show(sorted(digits))}) + "\n")
