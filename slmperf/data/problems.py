"""Worked sums in words: prompts and completions for where no text is given.

    Ann has 14 nuts. Ann finds 8. Ann eats 5. Ann doubles them. How many nuts?
     Now 14 + 8 = 22. Then 22 - 5 = 17. So 17 * 2 = 34. Answer: 34

A completion does one step after the other, so that a small model can follow it, and still has to
find each number in the prompt and to calculate. How a step opens (Now, Then, So) is drawn and tells
nothing: a share of the loss that no model gets rid of, as in any text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from slmperf.check import InputError

OPENINGS = ("Now", "Then", "So")
_PEOPLE = ("Ann", "Ben", "Eve", "Kim", "Leo", "Mia", "Sam", "Zoe")
_THINGS = ("nuts", "pens", "keys", "caps", "eggs", "figs", "toys", "cups")
_GAINS = ("finds", "buys", "gets")
_LOSSES = ("eats", "sells", "loses")
_LARGEST = 99  # of all numbers in a problem


class Problem(NamedTuple):
    """A question, its worked solution, and the number the solution ends with."""

    prompt: str
    completion: str
    answer: int


def problems(count: int, *, steps: tuple[int, int] = (2, 3), seed: int = 0) -> list[Problem]:
    """`count` different problems of steps[0] to steps[1] steps: a function of the arguments alone.

    No prompt is there twice, so that any cut into training and validation is disjoint. The first n
    of a longer list are the shorter list. InputError for numbers that cannot be met.
    """
    if count < 1:
        raise InputError(f"problems: count is {count}, expected at least 1")
    if not 1 <= steps[0] <= steps[1] <= 9:
        raise InputError(f"problems: steps is {list(steps)}, expected two numbers from 1 to 9")
    # About a quarter of the prompts there are: beyond, most draws would be of known ones.
    most = 20_000 * 30 ** (steps[1] - 1)
    if count > most:
        raise InputError(
            f"problems: count is {count}, expected at most {most} of {steps[0]} to {steps[1]} steps"
        )
    random = np.random.default_rng([seed, *steps])
    found: dict[str, Problem] = {}
    while len(found) < count:
        one = _problem(random, int(random.integers(steps[0], steps[1] + 1)))
        found.setdefault(one.prompt, one)
    return list(found.values())


def _problem(random: np.random.Generator, steps: int) -> Problem:
    def pick(words: tuple[str, ...]) -> str:
        return words[int(random.integers(len(words)))]

    person, thing = pick(_PEOPLE), pick(_THINGS)
    number = int(random.integers(1, 21))
    told, worked = [f"{person} has {number} {thing}."], []
    for _ in range(steps):
        before, kind = number, int(random.integers(5))
        if kind == 0 and 2 * number <= _LARGEST:
            number, told_step, worked_step = 2 * before, "doubles them", f"{before} * 2"
        elif kind <= 2 and number > 1:
            change = int(random.integers(1, min(number, 10)))
            number = before - change
            told_step, worked_step = f"{pick(_LOSSES)} {change}", f"{before} - {change}"
        else:
            change = int(random.integers(1, min(10, _LARGEST - number) + 1))
            number = before + change
            told_step, worked_step = f"{pick(_GAINS)} {change}", f"{before} + {change}"
        told.append(f"{person} {told_step}.")
        worked.append(f" {pick(OPENINGS)} {worked_step} = {number}.")
    prompt = " ".join([*told, f"How many {thing}?"])
    return Problem(prompt, "".join([*worked, f" Answer: {number}"]), number)
