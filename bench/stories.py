"""Distillation on real text: the recipe examples/recipes/stories.yaml on TinyStories.

    python bench/stories.py --data DATA --out runs/stories [--dry-run]

The teacher is the pretrained model of 260K parameters in the data folder, written as a Transformers
checkpoint with its tokenizer; the stories are written as JSONL of token ids, "eval" for validation,
all others to train on (the teacher has seen them all in its own training: it is a teacher, and no
measure of generalisation). Both lie in OUT/input, the run in OUT/run: a second call goes on.
"""

import argparse
import json
import os
import shutil
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "recipes" / "stories.yaml"
FIRST_BYTE, BYTES = 3, 256  # ids of the raw bytes; before them <unk>, <s>, </s>


def tokenizer(data: Path):
    """llama2.c's tokenizer of the model as a fast one: BPE by score, unknown letters by bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    raw, position = (data / "models" / "tok512.bin").read_bytes(), 4
    pieces = []
    while position < len(raw):
        score, length = struct.unpack_from("<fi", raw, position)
        pieces.append((raw[position + 8 : position + 8 + length], score))
        position += 8 + length
    end = FIRST_BYTE + BYTES
    words = [piece.decode().replace(" ", "▁") for piece, _ in pieces[end:]]
    control = ["<unk>", "<s>", "</s>"]
    vocabulary = control + [f"<0x{byte:02X}>" for byte in range(BYTES)] + words
    ids = {word: index for index, word in enumerate(vocabulary)}
    known = set(words)
    merges = [
        (word[:cut], word[cut:])
        for word, _ in sorted(zip(words, pieces[end:], strict=True), key=lambda one: -one[1][1])
        for cut in range(1, len(word))
        if word[:cut] in known and word[cut:] in known
    ]
    built = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    built.add_special_tokens([AddedToken(word, special=True) for word in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_input(data: Path, folder: Path, count: int = 10**6) -> None:
    """The teacher's checkpoint, `count` stories of each split and the recipe, in `folder`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from stories260k import load_stories260k, story_tokens

    from slmperf import models
    from slmperf.models.files import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "teacher").is_dir():
        models.save(load_stories260k(data), tokenizer(data), folder / "teacher")
    lines = []
    for split, name in (("other", "train"), ("calib", "train"), ("eval", "eval")):
        for tokens in story_tokens(data, split, count):
            lines.append(json.dumps({"input_ids": tokens.tolist(), "split": name}))
    write_atomically(folder / "stories.jsonl", "\n".join(lines) + "\n")
    shutil.copy(RECIPE, folder)


def main() -> None:
    """Write the input, then run the recipe or tell what it would take."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, required=True, help="folder with models/ and text/")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--dry-run", action="store_true")
    given = options.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from slmperf.recipe import distillation

    write_input(given.data, given.out / "input")
    recipe = given.out / "input" / RECIPE.name
    if given.dry_run:
        print(distillation.preview(recipe))
    else:
        distillation.run(recipe, given.out / "run")


if __name__ == "__main__":
    main()
