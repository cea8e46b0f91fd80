"""The example recipes, as they are and at toy size."""

import re
import shutil
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"


def toy(name: str, folder: Path) -> Path:
    """A recipe with a small world and short trainings, in a folder of its own."""
    text = (RECIPES / f"{name}.yaml").read_text()
    for old, new in (
        (r"world: \{.*\}", "world: {members: 80, items: 100, rows: 1600, seed: 0}"),
        (r"scored_members: \d+", "scored_members: 30"),
        (r"(epochs: [\d.]+|steps: \d+)", "steps: 4"),
        (r"batch_tokens: \d+", "batch_tokens: 1024"),
        (r"vocabulary: \d+", "vocabulary: 600"),
        (r"context: 256", "context: 128"),
        (r"repeats: \d+", "repeats: 3"),
        (r"\.\./\.\./README\.md", "text.md"),
    ):
        text = re.sub(old, new, text)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    shutil.copy(RECIPES.parents[1] / "README.md", folder / "text.md")
    return path
