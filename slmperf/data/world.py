"""A small made-up world of members, items and ratings, for when no data is given.

It is made so that scale pays: what decides a rating is stated nowhere and takes data to learn.

- There are eight themes. A member leans towards or away from each of them.
- An item's text is four words: title, maker, mood and genre. Each word belongs to a theme, one in
  ten to another than the item's, and has a small character of its own. An item's factors are the
  mean of its words' factors: a function of the words of its text, the same for every item.
- rating = leaning . factors + worth of the item's words + generosity of the member + noise, cut
  into 1..10 at fixed shares of all rows: 45% reach 8 (task "like"), 15% reach 10 (task "top").
- Members rate what they lean towards more often, so a history speaks through what is in it as well
  as through its answers.

The noise is as large as the rest: one answer says little, a model must see many members before it
knows the words, and a teacher's probabilities say more than the answers they were learned from.
Means per item and member (slmperf.data.facts, the floors of slmperf.evaluate) know nothing of a
member's taste in the item's theme and stay far behind a model that does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from slmperf.check import InputError
from slmperf.data.interactions import Interactions
from slmperf.data.template import item_text

# Eight themes: genres; moods; titles.
_THEMES = (
    (
        "saga voyage",
        "salty misty tidal drifting stormy coral briny pelagic",
        "Harbor Anchor Lagoon Lighthouse Reef Gull Tide Mast"
        " Estuary Driftwood Pilot Shoal Ferry Kelp Buoy",
    ),
    (
        "noir mystery",
        "smoky crooked hushed velvet guilty nocturnal shady veiled",
        "Alley Ledger Alibi Cipher Informer Ransom Motel Witness"
        " Blackmail Dagger Locket Verdict Curtain Pawnshop Fedora",
    ),
    (
        "space robots",
        "orbital stellar cryogenic lunar metallic galactic weightless ionic",
        "Comet Airlock Nebula Reactor Colony Satellite Android Probe"
        " Quasar Capsule Meteor Antenna Hangar Vacuum Beacon",
    ),
    (
        "romance comedy",
        "tender giddy rosy clumsy flirty sunny wistful bubbly",
        "Bouquet Waltz Picnic Honeymoon Sonnet Balcony Bakery Valentine"
        " Ballroom Postcard Ribbon Serenade Umbrella Confetti Lilac",
    ),
    (
        "horror ghosts",
        "eerie rotten howling cursed gaunt ashen feral bloodless",
        "Crypt Asylum Marrow Coffin Seance Gallows Cellar Raven"
        " Scarecrow Phantom Mausoleum Hex Ritual Attic Moth",
    ),
    (
        "western frontier",
        "dusty parched lonesome rugged scorched leathery restless barren",
        "Saddle Canyon Outlaw Stagecoach Mustang Saloon Lasso Prairie"
        " Sheriff Coyote Mesa Gulch Ranch Spur Wagon",
    ),
    (
        "palace history",
        "gilded regal courtly ancient scheming ornate banished dynastic",
        "Throne Regent Cathedral Tapestry Heir Chalice Duchess Siege"
        " Scepter Abbey Herald Coronation Moat Minstrel Treaty",
    ),
    (
        "jungle survival",
        "lush humid tangled venomous teeming mossy untamed emerald",
        "Canopy Panther Orchid Machete Rapids Temple Vine Jaguar"
        " Mangrove Expedition Toucan Swamp Idol Quicksand Fern",
    ),
)
_FIRST = "Bal Cor Dar Fer Gor Hal Kel Lor Mar Nor Sel Tor".split()
_LAST = "an ek ini ova ro sen ta wick".split()

# Strengths are standard deviations of their part of a rating, before it is cut to 1..10.
_LEANING, _WORTH, _GENEROSITY, _NOISE = 1.5, 0.5, 0.5, 1.0
_CHARACTER = 0.25  # size of a word's own factors beside its theme's
_STRAY = 0.1  # share of words from another theme than the item's
_DRAWN = 1.0  # how much more often a member rates what it leans towards: exp(this * leaning)
_POPULARITY = 0.6  # exponent of the items' popularity by rank
_SHARES = (0.02, 0.04, 0.07, 0.12, 0.20, 0.32, 0.55, 0.72, 0.85)  # of rows rated below 2, 3, ... 10
_FEWEST_ROWS = 10  # rows of a member, where there are enough
_BEGIN, _DAYS = 1_500_000_000, 1000  # seconds since 1970 of the first possible row, days covered
_CHUNK = 1 << 22  # member-item pairs looked at at once


class _Words(NamedTuple):
    """n words of one kind, those of a theme side by side; factors (n, themes), worth (n,)."""

    texts: list[str]
    factors: np.ndarray
    worth: np.ndarray


def world(*, members: int, items: int, rows: int, seed: int = 0) -> Interactions:
    """`rows` ratings of 1..10 by `members` members of `items` items; the same for the same numbers.

    Nobody rates an item twice. Members have at least 10 rows each where rows allows it, and some
    have several times as many as others. InputError for numbers that cannot be: fewer rows than
    members, more than half of all items for one member, more items than a hundredth of the texts
    there are.
    """
    if min(members, items) < 1:
        raise InputError(f"world: members {members}, items {items}, expected at least 1 of each")
    if rows < members:
        raise InputError(f"world: rows is {rows}, expected at least one per member, {members}")
    random = np.random.default_rng([seed, members, items, rows])
    words = _words(random)
    combinations = int(np.prod([len(kind.texts) for kind in words]))
    if items > combinations // 100:
        raise InputError(f"world: items is {items}, expected at most {combinations // 100}")
    count = _row_counts(random, members, rows)
    if count.max() > items // 2:
        raise InputError(
            f"world: one member has {count.max()} rows, expected at most half of the {items} items"
        )
    theme, parts = _items(random, words, items)
    pairs = list(zip(words, parts.T, strict=True))
    factors = sum(kind.factors[part] for kind, part in pairs) / len(words)
    worth = sum(kind.worth[part] for kind, part in pairs) / np.sqrt(len(words))
    themes = words[0].factors.shape[1]
    leaning = random.normal(size=(members, themes))
    generosity = random.normal(size=members)

    member = np.repeat(np.arange(members), count)
    popularity = (np.arange(items) + 20.0) ** -_POPULARITY
    item = _choices(random, np.exp(_DRAWN * leaning), theme, popularity, count)
    merit = (
        _LEANING * np.einsum("nk,nk->n", leaning[member], factors[item])
        + _WORTH * worth[item]
        + _GENEROSITY * generosity[member]
        + _NOISE * random.normal(size=rows)
    )
    rating = 1 + np.searchsorted(np.quantile(merit, _SHARES), merit, side="right")
    time = _BEGIN + random.integers(0, _DAYS * 86_400, rows)
    titles, makers, moods, genres = (kind.texts for kind in words)
    return Interactions.from_rows(
        (member, item, rating, time),
        scale=10,
        member_names=tuple(str(number) for number in range(1, members + 1)),
        item_texts=tuple(
            item_text(titles[title], creator=makers[maker], kinds=(moods[mood], genres[genre]))
            for title, maker, mood, genre in parts.tolist()
        ),
        synthetic=True,
        source=f"embedded world, seed {seed}",
    )


def _words(random: np.random.Generator) -> tuple[_Words, _Words, _Words, _Words]:
    """Titles, makers, moods and genres. The makers of a theme are drawn, the rest stands above."""
    genres, moods, titles = ([theme[place].split() for theme in _THEMES] for place in range(3))
    makers = [first + last for first in _FIRST for last in _LAST]
    themes = len(_THEMES)
    drawn = np.split(random.permutation(len(makers)), themes)
    by_theme = [[makers[maker] for maker in part] for part in drawn]

    def kind(groups: list[list[str]]) -> _Words:
        texts = [word for group in groups for word in group]
        theme = np.repeat(np.arange(themes), [len(group) for group in groups])
        own = _CHARACTER * random.normal(size=(len(texts), themes))
        return _Words(texts, np.eye(themes)[theme] + own, random.normal(size=len(texts)))

    return kind(titles), kind(by_theme), kind(moods), kind(genres)


def _items(
    random: np.random.Generator, words: tuple[_Words, ...], items: int
) -> tuple[np.ndarray, np.ndarray]:
    """Theme (items,) and words (items, 4) of different items."""
    themes = words[0].factors.shape[1]
    found = np.empty((0, 1 + len(words)), np.int64)
    while len(found) < items:
        theme = random.integers(0, themes, items)
        parts = [theme]
        for kind in words:
            stray = random.random(items) < _STRAY
            wanted = np.where(stray, random.integers(0, themes, items), theme)
            size = len(kind.texts) // themes  # words are sorted by theme, as many of each
            parts.append(wanted * size + random.integers(0, size, items))
        found = np.concatenate([found, np.stack(parts, axis=1)])
        _, first = np.unique(found[:, 1:], axis=0, return_index=True)
        found = found[np.sort(first)]
    return found[:items, 0], found[:items, 1:]


def _row_counts(random: np.random.Generator, members: int, rows: int) -> np.ndarray:
    fewest = min(_FEWEST_ROWS, rows // members)
    weights = random.gamma(6.0, size=members)
    return fewest + random.multinomial(rows - fewest * members, weights / weights.sum())


def _choices(
    random: np.random.Generator,
    pull: np.ndarray,
    theme: np.ndarray,
    popularity: np.ndarray,
    count: np.ndarray,
) -> np.ndarray:
    """count[m] different items for each member m, in random order; all members' in one array.

    pull (members, themes) times popularity (items,) are the odds. Without replacement, for many
    members at once: each item has an exponential clock of that rate, and the first to ring count.
    """
    chosen = []
    step = max(1, _CHUNK // len(theme))
    for begin in range(0, len(count), step):
        sizes = count[begin : begin + step]
        odds = (pull[begin : begin + step, theme] * popularity).astype(np.float32)
        clocks = random.standard_exponential(odds.shape, dtype=np.float32) / odds
        most = sizes.max()
        first = np.argpartition(clocks, most - 1, axis=1)[:, :most]
        order = np.argsort(np.take_along_axis(clocks, first, axis=1), axis=1)
        first = np.take_along_axis(first, order, axis=1)
        chosen += [
            random.permutation(row[:size]) for row, size in zip(first, sizes.tolist(), strict=True)
        ]
    return np.concatenate(chosen)
