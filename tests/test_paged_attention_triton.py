"""paged_attention's Triton kernels: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from slmperf.ops import HeadMap
from slmperf.ops.paged_attention import PagedAttention, paged_attention
from slmperf.testing.attention_cases import BF16, FP8, FP16, FP32, PADDING, PagedAttentionCase
from slmperf.testing.interpreter import cure

GPU = torch.cuda.is_available()
if not GPU:
    cure()

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if GPU else "cpu"
# A decoded token, a prefill, a suffix behind a prefix, none at all, a padded one, one of no keys.
MIXED = ((1, 40), (17, 17), (5, 33), (0, 12), (1, 0), (0, 0))
PRUNED = (2, 1, 3)

CASES = [
    PagedAttentionCase(FP32, MIXED, PRUNED, page=1, pool=True),
    PagedAttentionCase(BF16, MIXED, (2, 2), page=64),
    PagedAttentionCase(FP16, ((3, 19), (1, 8)), (1, 4, 1), size=80, page=7),
    PagedAttentionCase(FP32, ((2, 9),), (1,), size=5, page=128),
    PagedAttentionCase(BF16, MIXED, PRUNED, size=64, fp8=True),
    PagedAttentionCase(FP32, ((1, 8), (3, 20)), PRUNED, fp8=True, return_lse=False),
    PagedAttentionCase(FP32, MIXED, PRUNED, window=9),
    PagedAttentionCase(FP16, ((1, 40), (5, 20), (1, 0)), PRUNED, window=20, split_keys=16),
    PagedAttentionCase(BF16, ((1, 40), (4, 33), (1, 0)), PRUNED, split_keys=20, return_lse=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: PagedAttentionCase) -> None:
    tensors = case.tensors(DEVICE)
    case.check(tensors, case.run(tensors, "triton"))


@pytest.mark.parametrize("processors", [1, 132])
def test_splits_are_chosen_by_the_device(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    """Few programs for many processors: keys are split; many: they are not. The same comes out."""
    from slmperf.triton_kernels import common
    from slmperf.triton_kernels import paged_attention as kernels

    case = PagedAttentionCase(FP32, ((1, 50), (1, 11), (1, 0)), PRUNED, page=4)
    tensors, taken = case.tensors(DEVICE), []
    merge = kernels._merge
    real = common.machine(tensors["query"])
    monkeypatch.setattr(common, "machine", lambda tensor: real._replace(processors=processors))
    monkeypatch.setattr(kernels, "LEAST_KEYS", 16)

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            taken.append(grid)
            return merge[grid]

    monkeypatch.setattr(kernels, "_merge", Counted())
    case.check(tensors, case.run(tensors, "triton"))
    assert taken == ([(6 * (3 + PADDING),)] if processors > 1 else [])


def test_pages_change_nothing() -> None:
    """Bit for bit: keys in pages of 1, 16, 64 and 128, in any order."""
    plain = PagedAttentionCase(FP32, ((3, 70), (1, 20)), PRUNED, page=128).tensors(DEVICE)
    rows = []
    for row, keys in enumerate((70, 20)):
        page = plain["page_table"][row].long()
        rows.append(
            [plain[name][page].flatten(0, 1)[:keys] for name in ("key_pages", "value_pages")]
        )
    found = []
    for page, seed in ((1, 0), (1, 1), (16, 0), (16, 1), (64, 0), (128, 0)):
        case = PagedAttentionCase(FP32, ((3, 70), (1, 20)), PRUNED, page=page)
        tensors = case.tensors(DEVICE)
        order = torch.randperm(
            len(tensors["key_pages"]), generator=torch.Generator().manual_seed(seed)
        ).to(DEVICE)
        tensors["page_table"] = order[tensors["page_table"].long()].int()
        for row, both in enumerate(rows):
            at = torch.arange(len(both[0]), device=DEVICE)
            slots = tensors["page_table"][row, at // page].long(), at % page
            for name, given in zip(("key_pages", "value_pages"), both, strict=True):
                if row == 0:
                    tensors[name] = torch.full_like(tensors[name], torch.nan)
                tensors[name][slots] = given
        found.append(case.run(tensors | {"query": plain["query"]}, "triton").output)
    assert all(torch.equal(one, found[0]) for one in found[1:])


def alone(tensors: dict[str, Tensor], row: int, first: int, last: int) -> dict[str, Tensor]:
    """Some queries of one sequence of a batch, as a call of their own."""
    start, end = tensors["query_starts"][row : row + 2].tolist()
    return tensors | {
        "query": tensors["query"][start + first : start + last],
        "query_starts": torch.tensor([0, last - first], device=DEVICE),
        "lengths": tensors["lengths"][row : row + 1] - (end - start - last),
        "page_table": tensors["page_table"][row : row + 1],
    }


@pytest.mark.parametrize("window", [None, 21])
def test_with_a_fixed_split_a_query_has_the_same_bits_in_any_company(window: int | None) -> None:
    """Alone, as the last of several queries and in a batch; a tile has other rows each time."""
    sizes, split_keys = ((1, 33), (19, 40)), 32
    if DEVICE == "cuda":
        sizes, split_keys = ((1, 400), (900, 2500), (50, 330)), 512
    case = PagedAttentionCase(BF16, sizes, (2, 1), window=window, split_keys=split_keys)
    tensors = case.tensors(DEVICE)
    wanted = case.run(tensors, "triton")
    starts = tensors["query_starts"].tolist()
    assert wanted.lse is not None
    for row, (queries, _) in enumerate(sizes):
        for first, last in {(0, queries), (queries - 1, queries), (queries // 3, queries)}:
            rows = slice(starts[row] + first, starts[row] + last)
            found = case.run(alone(tensors, row, first, last), "triton", longest_query=None)
            assert torch.equal(found.output, wanted.output[rows]), (row, first, last)
            assert torch.equal(found.lse, wanted.lse[rows]), (row, first, last)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_with_a_fixed_split_the_tile_is_fixed(
    monkeypatch: pytest.MonkeyPatch, capability: int, dtype: torch.dtype
) -> None:
    from slmperf.triton_kernels import common, paged_attention

    monkeypatch.setattr(common, "machine", lambda tensor: common.Machine(capability, 100))
    query = torch.empty(1, 6, 128, dtype=dtype, device=DEVICE)
    for repeatable in (True, False):
        tiles = {paged_attention._tile(query, query, rows, repeatable) for rows in (1, 20, 999)}
        assert (len(tiles) == 1) == repeatable


@pytest.mark.parametrize("capability", [80, 90])
def test_every_code_of_e4m3(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """One key: the output is its value. As bytes on an A100, as numbers on an H100."""
    from slmperf.triton_kernels import common

    if DEVICE == "cpu":
        monkeypatch.setattr(common, "machine", lambda tensor: common.Machine(capability, 1))
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)[None, None, None].to(DEVICE)
    one = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    for dtype in (FP16, BF16):
        keys = torch.zeros_like(codes.view(torch.uint8)).view(FP8)
        query = torch.ones(1, 1, 256, dtype=dtype, device=DEVICE)
        found = paged_attention(
            query, keys, codes, page_table=one[None, :1], query_starts=one, lengths=one[1:],
            impl="triton",
        ).output  # fmt: skip
        wanted = codes.to(dtype).flatten()
        if DEVICE == "cpu" and capability == 90:  # the interpreter's own load of the two NaN codes
            found, wanted = found.nan_to_num(0.0), wanted.nan_to_num(0.0)
        torch.testing.assert_close(found.flatten(), wanted, rtol=0, atol=0, equal_nan=True)


def test_views_are_taken_as_they_are() -> None:
    case = PagedAttentionCase(FP32, ((4, 20), (1, 9)), PRUNED)
    tensors = case.tensors(DEVICE)
    wanted = case.run(tensors, "triton")
    fused = torch.full((5 + PADDING, 33, 12), torch.nan, device=DEVICE).mT
    fused[:, 3:9, 1:] = tensors["query"]
    cache = torch.full((len(tensors["key_pages"]), 2, 3, 16, 35), torch.nan, device=DEVICE)
    views = tensors | {"query": fused[:, 3:9, 1:]}
    for place, name in enumerate(("key_pages", "value_pages")):
        views[name] = cache[:, place, :, :, 3:].transpose(1, 2)
        views[name].copy_(tensors[name])
    views["value_pages"] = tensors["value_pages"].mT.contiguous().mT  # sizes far apart
    found = case.run(views, "triton")
    assert torch.equal(found.output, wanted.output) and torch.equal(found.lse, wanted.lse)


def test_nothing_to_do_and_heads_too_large() -> None:
    case = PagedAttentionCase(FP32, ((0, 5), (0, 0)), PRUNED)
    tensors = case.tensors(DEVICE)
    found = case.run(tensors, "triton")
    assert not found.output.any() and (found.lse == -torch.inf).all()
    empty = tensors | {"query": tensors["query"][:0]}
    assert case.run(empty, "triton").output.shape == (0, 6, 32)
    with pytest.raises(NotImplementedError, match="heads of .* at most in .*, found 300"):
        wide = replace(case, size=300)
        wide.run(wide.tensors(DEVICE), "triton")


def test_every_tile_is_among_the_compiled(root: Path) -> None:
    """In the record that tests/test_kernels_compile.py holds against what compiles now."""
    from slmperf.triton_kernels.paged_attention import CONFIGS

    rows = json.loads((root / "bench" / "kernels.json").read_text())["rows"]
    pages = {1: ("*u8", "*fp8e4nv"), 2: ("*bf16", "*fp16"), 4: ("*fp32",)}
    for (capability, size), by_head in CONFIGS.items():
        launches = [row["launch"] for row in rows
                    if row["kernel"] == "_attend" and row["sm"] == f"sm_{capability}"
                    and row["launch"].split()[1].split(":")[0] in pages[size]]  # fmt: skip
        for head, tiles in by_head.items() if capability else ():
            for tile in tiles:
                words = (
                    f"BLOCK_C={head}, ROWS={tile.rows}, KEYS={tile.keys},",
                    f"num_stages={tile.stages}, num_warps={tile.warps})",
                )
                found = [launch for launch in launches if all(word in launch for word in words)]
                assert found, f"sm_{capability} {pages[size]} {words}"


WRONG = {
    "another map": {"head_map": HeadMap((1, 2, 3))},
    "another scale": {"scale": 0.17},
    "a window": {"window": 12},
}


@pytest.mark.parametrize("what", [*WRONG, "a key more", "a key less", "values of a neighbour"])
def test_the_judge_can_fail(what: str) -> None:
    case = PagedAttentionCase(BF16, ((2, 18), (3, 33)), PRUNED)
    tensors = case.tensors()
    spoilt = dict(tensors)
    if what == "values of a neighbour":
        spoilt["value_pages"] = tensors["value_pages"].roll(1, dims=2)
    elif what.startswith("a key"):
        spoilt["lengths"] = tensors["lengths"] + (1 if what.endswith("more") else -1)
    found = case.run(spoilt, "reference", **WRONG.get(what, {}))
    with pytest.raises(AssertionError, match="over|places"):
        case.check(tensors, found)


LARGE = [
    PagedAttentionCase(BF16, ((4096, 4096), (1, 5000), (300, 1700)), (2, 1, 1, 2, 1, 2, 1, 2), 128),
    PagedAttentionCase(BF16, tuple((1, 3000 + 37 * i) for i in range(9)), (3, 3, 3, 3), 128, page=1,
                       pool=True),
    PagedAttentionCase(BF16, ((64, 9000), (1, 9000)), (4, 4), 128, fp8=True),
    PagedAttentionCase(FP16, ((700, 700), (33, 2000)), (5, 3), 64, page=64, window=300),
    PagedAttentionCase(BF16, ((200, 1000),), (1, 2), 256, page=128),
    PagedAttentionCase(FP32, ((200, 1000), (1, 77)), PRUNED, 96, split_keys=256),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_on_a_device(case: PagedAttentionCase) -> None:
    tensors = case.tensors("cuda")
    found = case.run(tensors, "triton")
    case.check(tensors, found)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = case.run(tensors, "auto")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again.output, found.output) and torch.equal(again.lse, found.lse)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Replayed with other lengths, queries and pages than it was captured with."""
    case = PagedAttentionCase(BF16, ((1, 3000), (1, 900), (1, 0)), PRUNED, 128)
    tensors = case.tensors("cuda")
    other = replace(case, sequences=((1, 2999), (1, 3), (1, 700))).tensors("cuda")
    assert {k: x.shape for k, x in other.items() if "pages" not in k} == {
        k: x.shape for k, x in tensors.items() if "pages" not in k
    }
    held = {k: x.clone() for k, x in tensors.items()}
    for name in ("key_pages", "value_pages"):
        held[name] = torch.cat([tensors[name], other[name]])  # room for either
    case.run(held, "triton")  # compiles, and copies the head map
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made: PagedAttention = case.run(held, "triton")
    for given in (tensors, other, tensors):
        for name, x in given.items():
            held[name][: len(x)].copy_(x)
        graph.replay()
        wanted = case.run(held, "triton")
        assert torch.equal(made.output, wanted.output) and torch.equal(made.lse, wanted.lse)
