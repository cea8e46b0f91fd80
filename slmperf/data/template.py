"""The one place that says what a prompt looks like.

    <s>Will the member rate this at least 8 of 10?
    Member 58
    The Matrix (1999) | Action | Sci-Fi [item +0.9] [item 85%] [member -0.2] [member 58%] -> Yes
    Alien (1979) | Horror | Sci-Fi [item +0.5] [item 75%] [member -0.1] [member 66%] ->

Preamble (instruction, member), the history in order with the action taken, then the candidate; the
answer is the next token. A template word (WORDS) is always one token and never part of another:
the tokenizer takes them out of a text before anything else. Free text cannot imitate them, because
`clean` breaks every template word found in it. At FIELDS a new token begins, so that a year, a
creator or a kind is the same token behind every title.
"""

from __future__ import annotations

import re

from slmperf.data.facts import FACT_WORDS

BEGIN, END, PADDING = "<s>", "</s>", "<pad>"
LINE = "\n"
ARROW = " ->"
# The line break belongs to the answer: one token less a row.
NO, YES = " No\n", " Yes\n"
CONTROL_WORDS = (PADDING, BEGIN, END)
WORDS = (LINE, ARROW, NO, YES, *FACT_WORDS)
KIND = " | "
CREATOR = " by "
FIELDS = (KIND, CREATOR, " (")

_BREAKS = re.compile("|".join(re.escape(word.strip()) for word in (*CONTROL_WORDS, ARROW)))
_FACT = re.compile(r"\[(?=(?:item|member) [+-]?\d)")
_SPACE = re.compile(r"[\s\x00-\x1f\x7f]+")


def clean(text: str) -> str:
    """Free text as one line: runs of white space become one space, template words are broken."""
    text = _SPACE.sub(" ", text).strip()
    text = _BREAKS.sub(lambda found: found[0][0] + " " + found[0][1:], text)
    return _FACT.sub("[ ", text)


def item_text(title: str, *, creator: str = "", kinds: tuple[str, ...] = ()) -> str:
    """One item in one line: title, creator, kinds; what is empty is left out."""
    text = title
    if creator:
        text += CREATOR + creator
    return clean(KIND.join((text, *kinds)))


def member_line(name: str) -> str:
    """The line of the preamble that names the member."""
    return f"Member {clean(name)}"
