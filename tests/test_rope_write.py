"""slmperf.ops.rope_write: what lies in the pages afterwards, fp8 to the bit, padding, views.

How near turned queries, keys and values come to fp64 is the battery's question (test_ops.py).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from slmperf.check import InputError
from slmperf.ops.paged_attention import paged_attention
from slmperf.ops.rope_write import FP8, rope_write
from slmperf.testing.battery import run_case
from slmperf.testing.case import BF16, FP16, FP32
from slmperf.testing.interpreter import cure
from slmperf.testing.rope_cases import RopeWriteCase

GPU = torch.cuda.is_available()
if not GPU:
    cure()

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if GPU else "cpu"
IMPLS = ["triton", "cpu"]
PAGES = ("key_pages", "value_pages")


def device_of(impl: str) -> str:
    return DEVICE if impl == "triton" else "cpu"


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With pages of their own."""
    return tensors | {name: tensors[name].clone() for name in PAGES}


def slots_of(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that are none of padding, and their slots."""
    tokens = (tensors["slots"] >= 0).nonzero()[:, 0]
    return tokens, tensors["slots"][tokens].long()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_reference_turns_as_transformers_does(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    case = RopeWriteCase(dtype, 8, (6, 2), 64, 64, wide=True)
    tensors = case.tensors()
    found = rope_write(**tensors, impl="reference")
    tokens, slots = slots_of(tensors)
    rows = tensors["positions"][tokens]
    cos, sin = (torch.cat([tensors[name][rows]] * 2, dim=-1) for name in ("cos", "sin"))
    query, key = (tensors[name][tokens].float() for name in ("query", "key"))
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    assert torch.equal(found[tokens], query.to(dtype))
    assert torch.equal(tensors["key_pages"].flatten(0, 1)[slots], key.to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case",
    [
        RopeWriteCase(BF16, 12, (6, 2), 64, 64, page=16, wide=True),
        RopeWriteCase(FP32, 12, (3, 3), 40, 24, page=1),
        RopeWriteCase(FP16, 7, (5, 1), 128, 128, page=128, wide=True),
    ],
    ids=str,
)
def test_fp8_pages_hold_the_codes_of_plain_ones(impl: str, case: RopeWriteCase) -> None:
    """To the bit, saturating; no other slot is touched, and padding gives 0 and reads nothing."""
    plain = case.tensors(device_of(impl))
    output = rope_write(**plain, impl=impl)
    tensors = replace(case, fp8=True).tensors(device_of(impl))
    tensors |= {name: plain[name] for name in plain if name not in PAGES}
    assert torch.equal(rope_write(**tensors, impl=impl), output)
    tokens, slots = slots_of(plain)
    padding = plain["slots"] < 0
    assert padding.any() and not output[padding].any() and not output.isnan().any()
    others = torch.ones(plain["key_pages"].shape[0] * case.page, dtype=torch.bool)
    others[slots.cpu()] = False
    saturated = 0
    for name, scale in zip(PAGES, ("key_scale", "value_scale"), strict=True):
        numbers, codes = plain[name].flatten(0, 1), tensors[name].flatten(0, 1)
        assert (numbers[others] == 7).all() and (codes.float()[others] == 7).all()
        wanted = (numbers[slots].float() / tensors[scale][:, None]).clamp(-448, 448).to(FP8)
        assert torch.equal(codes[slots].view(torch.uint8), wanted.view(torch.uint8))
        saturated += int((wanted.float().abs() == 448).sum())
    assert torch.equal(plain["value_pages"].flatten(0, 1)[slots], plain["value"][tokens])
    assert saturated or case.heads[1] == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_without_scales_and_positions(impl: str) -> None:
    """A scale of 1, and the table's row t for token t."""
    case = RopeWriteCase(BF16, 9, (4, 2), 32, 32, fp8=True, wide=True)
    tensors = case.tensors(device_of(impl))
    tensors |= {name: torch.ones_like(tensors[name]) for name in ("key_scale", "value_scale")}
    rows = torch.arange(9, device=device_of(impl))
    wanted = copied(tensors | {"positions": rows})
    found = copied(tensors)
    for name in ("key_scale", "value_scale", "positions"):
        del found[name]
    found |= {name: tensors[name][:9] for name in ("cos", "sin")}
    assert torch.equal(rope_write(**found, impl=impl), rope_write(**wanted, impl=impl))
    for name in PAGES:
        assert torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_views_of_engines(impl: str) -> None:
    """Queries, keys and values in one matrix; keys and values in one pool, with room behind."""
    case = RopeWriteCase(BF16, 8, (4, 2), 32, 32, wide=True)
    tensors = copied(case.tensors(device_of(impl)))
    views = dict(tensors)
    fused = torch.cat([tensors[name].flatten(1) for name in ("query", "key", "value")], dim=1)
    parts = fused.split([4 * 32, 2 * 32, 2 * 32], dim=1)
    for name, part in zip(("query", "key", "value"), parts, strict=True):
        views[name] = part.unflatten(1, (-1, 32))
    pool = torch.full((*tensors["key_pages"].shape[:2], 2, 2, 40), 7.0, device=fused.device)
    pool = pool.to(BF16)
    both = torch.cat([tensors["cos"], tensors["sin"]], dim=1)
    views |= {"cos": both[:, :16], "sin": both[:, 16:]}
    views |= {name: pool[:, :, place, :, 5:37] for place, name in enumerate(PAGES)}
    wanted = rope_write(**tensors, impl=impl)
    assert torch.equal(rope_write(**views, impl=impl), wanted)
    for name in PAGES:
        assert torch.equal(views[name], tensors[name])
    assert (pool[..., :5] == 7).all() and (pool[..., 37:] == 7).all()
    # Channels far apart, which no engine has: of the pages and of what is read.
    odd = dict(tensors) | {name: torch.full_like(tensors[name], 7.0).mT.contiguous().mT
                           for name in PAGES}  # fmt: skip
    odd |= {name: tensors[name].mT.contiguous().mT for name in ("query", "key", "value", "cos")}
    assert torch.equal(rope_write(**odd, impl=impl), wanted)
    for name in PAGES:
        assert torch.equal(odd[name], tensors[name])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_all_padding_and_no_tokens(impl: str) -> None:
    case = RopeWriteCase(FP32, 6, (2, 1), 32, 32)
    tensors = case.tensors(device_of(impl))
    tensors["slots"].fill_(-1)
    tensors["positions"].fill_(10**6)
    before = copied(tensors)
    assert not rope_write(**tensors, impl=impl).any()
    none = {name: one[:0] if name in case.row_axis else one for name, one in tensors.items()}
    assert rope_write(**none, impl=impl).shape == (0, 2, 32)
    assert all(torch.equal(tensors[name], before[name]) for name in PAGES)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_written_is_what_attention_reads(impl: str) -> None:
    """A token that sees itself alone gets its own value back, from fp8 pages within their step."""
    case = RopeWriteCase(FP32, 4, (4, 2), 32, 32, page=4, fp8=True)
    tensors = case.tensors(device_of(impl))
    tensors["value_scale"] = torch.tensor([0.02, 0.05], device=device_of(impl))
    query = rope_write(**tensors, impl=impl)
    slots = tensors["slots"].long()
    # One sequence of one token for each: its page, and as many keys as reach to its slot.
    found = paged_attention(
        query, tensors["key_pages"], tensors["value_pages"], page_table=(slots // 4)[:, None].int(),
        query_starts=torch.arange(5, device=slots.device), lengths=slots % 4 + 1, window=1,
        key_scale=tensors["key_scale"], value_scale=tensors["value_scale"], impl="reference",
    ).output  # fmt: skip
    wanted = tensors["value"].repeat_interleave(2, dim=1)
    torch.testing.assert_close(found, wanted, rtol=2.0**-4, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_in_a_compiled_graph(impl: str) -> None:
    torch.compiler.reset()
    case = RopeWriteCase(BF16, 8, (4, 2), 32, 32, fp8=True)
    wanted, found = (case.tensors(device_of(impl)) for _ in range(2))
    output = rope_write(**wanted, impl=impl)
    run = torch.compile(
        lambda given: rope_write(**given, impl=impl) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(run(found), output + 1)
    for name in PAGES:
        assert torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8))


def test_what_does_not_fit_is_refused() -> None:
    case = RopeWriteCase(BF16, 6, (4, 2), 32, 32, wide=True)
    good = case.tensors()
    bad = [
        ({"key": good["key"][:5]}, InputError, r"key is \(5, 2, 32\), expected \(T, G, C\)"),
        ({"key_pages": good["key_pages"][:, :, :1]}, InputError, r"key_pages is \(2, 16, 1, 32\)"),
        ({"cos": good["cos"][:, :15]}, InputError, r"sin is \(4096, 16\), expected"),
        ({"cos": good["cos"].half()}, InputError, "cos is torch.float16 on cpu, wanted"),
        ({"cos": good["cos"].to(BF16)}, InputError, "sin is torch.float32, cos torch.bfloat16"),
        ({"positions": None}, InputError, r"cos is \(4096, 16\), expected \(T, half\)"),
        ({"slots": good["slots"].short()}, InputError, "slots is torch.int16 on cpu, wanted"),
        ({"value": good["value"].float()}, InputError, "value is torch.float32 on cpu, wanted"),
        ({"value_pages": good["value_pages"].to(FP8)}, InputError, "value_pages are"),
        ({"key_scale": torch.ones(2)}, InputError, "pages are torch.bfloat16, found scales"),
        ({"query": good["query"].clone().requires_grad_()}, NotImplementedError, "gradient"),
        ({"slots": good["slots"] + 32}, RuntimeError, "slot .* of token .*, expected less than 32"),
        ({"positions": good["positions"] + 4096}, RuntimeError, "position .* expected 0 to 4095"),
    ]
    before = copied(good)
    for change, kind, words in bad:
        with pytest.raises(kind, match=words):
            rope_write(**good | change, impl="cpu")
    wide = {name: torch.cat([good[name]] * 2, dim=1) for name in ("cos", "sin")}
    with pytest.raises(InputError, match="cos has 32 columns, wanted half as many as the 32"):
        rope_write(**good | wide)
    assert all(torch.equal(good[name], before[name]) for name in PAGES)


def test_a_gpu_never_writes_beyond_the_pages() -> None:
    """A slot that there is none of counts as padding."""
    tensors = RopeWriteCase(BF16, 6, (4, 2), 32, 32, wide=True).tensors(DEVICE)
    pool = torch.full((6, 16, 2, 32), 7.0, dtype=BF16, device=DEVICE)
    slots = tensors["slots"].clone()
    slots[1], slots[2] = 32, 2**40
    given = tensors | {"key_pages": pool[1:3], "value_pages": pool[4:], "slots": slots}
    found = rope_write(**given, impl="triton")
    assert not found[[1, 2, 4]].any() and found[[0, 3, 5]].any()
    assert (pool[[0, 3]] == 7).all()


@pytest.mark.parametrize("what", ["query", "key", "value", "sin"])
def test_the_judge_can_fail(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    from slmperf.testing import rope_cases

    def wrong(*, impl: str, **given: torch.Tensor) -> torch.Tensor:
        if impl == "cpu":
            given[what] = -given[what]
        return rope_write(impl=impl, **given)

    monkeypatch.setattr(rope_cases, "rope_write", wrong)
    with pytest.raises(AssertionError, match="over"):
        run_case(RopeWriteCase(FP16, 8, (4, 2), 32, 32, read_back=True), "cpu")


@pytest.mark.gpu
def test_on_a_device() -> None:
    """Nothing waits for the device; a CUDA graph is replayed with other tokens."""
    case = RopeWriteCase(BF16, 3000, (24, 8), 128, 128, fp8=True, wide=True)
    held, other = case.tensors("cuda"), replace(case, page=8).tensors("cuda")
    rope_write(**held)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = rope_write(**held)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in case.row_axis:
        held[name].copy_(other[name])
    graph.replay()
    wanted = copied(held)
    assert torch.equal(found, rope_write(**wanted, impl="reference"))
    for name in PAGES:
        assert torch.equal(held[name].view(torch.uint8), wanted[name].view(torch.uint8))
