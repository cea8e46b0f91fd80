"""slmperf.ops.paged_attention: the reference against torch's attention, views, bad arguments."""

from __future__ import annotations

import random
from importlib import import_module

import pytest
import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops import HeadMap, implementations
from slmperf.testing.attention_cases import BF16, FP8, FP32, PADDING, PagedAttentionCase

pytestmark = pytest.mark.usefixtures("one_thread")

FP64 = torch.float64
# A decoded token, a prefill, a suffix behind a prefix, none at all, a padded one, one of no keys.
MIXED = ((1, 40), (17, 17), (5, 33), (0, 12), (1, 0), (0, 0))
PRUNED = (2, 1, 3)  # 12 query heads over 8, in small


def stock(case: PagedAttentionCase, tensors: dict[str, Tensor]) -> Tensor:
    """The same by torch's own attention, sequence by sequence, each query head with its keys."""
    reads = list(HeadMap(case.counts).reads)
    output = torch.zeros_like(tensors["query"])
    starts = tensors["query_starts"].tolist()
    for row, (queries, keys) in enumerate(case.sequences):
        if not queries or not keys:
            continue
        page = tensors["page_table"][row].long()
        both = [tensors[name][page].flatten(0, 1)[:keys][:, reads].transpose(0, 1)
                for name in ("key_pages", "value_pages")]  # fmt: skip
        at = torch.arange(keys)
        positions = at[keys - queries :, None]
        seen = at <= positions
        if case.window is not None:
            seen &= at > positions - case.window
        rows = slice(starts[row], starts[row + 1])
        output[rows] = torch.nn.functional.scaled_dot_product_attention(
            tensors["query"][rows].transpose(0, 1), *both, attn_mask=seen
        ).transpose(0, 1)
    return output


@pytest.mark.parametrize("page", [1, 7, 16, 64, 128])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_the_reference_is_torchs_attention(page: int, window: int | None) -> None:
    case = PagedAttentionCase(FP64, MIXED, PRUNED, page=page, window=window)
    tensors = case.tensors()
    found = case.run(tensors, "reference")
    torch.testing.assert_close(found.output, stock(case, tensors), rtol=0, atol=1e-12)
    assert found.lse is not None
    gone = sum(queries for queries, _ in MIXED[:4])
    assert not found.output[gone:].any() and (found.lse[gone:] == -torch.inf).all()
    assert found.output.isfinite().all() and found.lse[:gone].isfinite().all()


def test_an_even_map_is_no_map_and_grouped_attention() -> None:
    case = PagedAttentionCase(FP32, ((31, 31),), (3, 3))
    tensors = case.tensors()
    found = case.run(tensors, "reference").output
    assert torch.equal(case.run(tensors, "reference", head_map=None).output, found)
    page = tensors["page_table"][0].long()
    query, keys, values = (
        x.transpose(0, 1)
        for x in (
            tensors["query"][:31],
            *(tensors[name][page].flatten(0, 1)[:31] for name in ("key_pages", "value_pages")),
        )
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found[:31], wanted.transpose(0, 1), rtol=0, atol=2e-6)


def test_parts_of_the_keys_merge_by_their_lse() -> None:
    """One query over the first keys and over the rest, at 50 places, none and all among them."""
    case = PagedAttentionCase(FP64, ((1, 70),), PRUNED, page=1)
    tensors = case.tensors()
    whole = case.run(tensors, "reference")
    assert whole.lse is not None
    chance = random.Random(0)
    for cut in (0, 70, *(chance.randrange(71) for _ in range(48))):
        parts = []
        for table, length in ((tensors["page_table"], cut),
                              (tensors["page_table"][:, cut:], 70 - cut)):  # fmt: skip
            lengths = torch.tensor([length], dtype=torch.int32)
            parts.append(case.run(tensors | {"page_table": table, "lengths": lengths}, "reference"))
        lse = torch.stack([part.lse for part in parts if part.lse is not None])
        weights = lse.softmax(dim=0)[:, :1]  # the padding rows have no lse in either
        output = sum(w[..., None] * part.output[:1] for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(output, whole.output[:1], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse.logsumexp(dim=0), whole.lse, rtol=0, atol=1e-12)


def test_queries_in_pieces_and_scores_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill in chunks is the prefill; so it is where the reference holds few scores."""
    case = PagedAttentionCase(FP64, ((30, 50),), PRUNED, window=17)
    tensors = case.tensors()
    whole = case.run(tensors, "reference")
    for cut in (0, 1, 13, 30):
        for rows, length in ((slice(0, cut), 20 + cut), (slice(cut, 30), 50)):
            piece = tensors | {
                "query": tensors["query"][rows],
                "query_starts": torch.tensor([0, rows.stop - rows.start]),
                "lengths": torch.tensor([length]),
            }
            found = case.run(piece, "reference", longest_query=None)
            torch.testing.assert_close(found.output, whole.output[rows], rtol=0, atol=1e-12)
    module = import_module("slmperf.ops.paged_attention")  # by its name: the package's is the op
    monkeypatch.setattr(module, "SCORES", 6 * 50 * 4)
    torch.testing.assert_close(case.run(tensors, "reference"), whole, rtol=0, atol=1e-12)


def test_fp8_pages_are_their_numbers_times_the_scales() -> None:
    case = PagedAttentionCase(FP32, MIXED, PRUNED, fp8=True, pool=True)
    tensors = case.tensors()
    assert tensors["key_pages"].dtype == FP8
    found = case.run(tensors, "reference")
    plain = {name: x for name, x in tensors.items() if not name.endswith("scale")}
    for name in ("key", "value"):
        plain[f"{name}_pages"] = plain[f"{name}_pages"].float() * tensors[f"{name}_scale"][:, None]
    torch.testing.assert_close(found, case.run(plain, "reference"), rtol=0, atol=1e-5)


def test_views_are_taken_as_their_copies() -> None:
    """A query out of a fused projection; pages laid out as engines have them, NaN around them."""
    case = PagedAttentionCase(BF16, MIXED, PRUNED)
    tensors = case.tensors()
    wanted = case.run(tensors, "reference")
    tokens, heads, size = tensors["query"].shape
    fused = torch.full((tokens, heads + 6, size), torch.nan, dtype=BF16)
    fused[:, :heads] = tensors["query"]
    pages, slots, kv_heads, _ = tensors["key_pages"].shape
    cache = torch.full((pages, 2, kv_heads, slots, size + 3), torch.nan, dtype=BF16)
    views = tensors | {"query": fused[:, :heads]}
    for place, name in enumerate(("key_pages", "value_pages")):
        views[name] = cache[:, place, :, :, :size].transpose(1, 2)
        views[name].copy_(tensors[name])
    torch.testing.assert_close(case.run(views, "reference"), wanted, rtol=0, atol=0)


def test_nothing_to_do() -> None:
    case = PagedAttentionCase(FP32, MIXED, PRUNED)
    tensors = case.tensors()
    none = tensors | {
        "query": tensors["query"][:0],
        "query_starts": tensors["query_starts"][:1],
        "lengths": tensors["lengths"][:0],
        "page_table": tensors["page_table"][:0],
    }
    assert case.run(none, "reference").output.shape == (0, 6, 32)
    padding = none | {"query": tensors["query"][-PADDING:]}
    assert not case.run(padding, "reference").output.any()


def test_the_operator_is_registered_and_compiles() -> None:
    case = PagedAttentionCase(BF16, MIXED, PRUNED, pool=True)
    tensors = {name: x.nan_to_num(0.5) if x.is_floating_point() else x
               for name, x in case.tensors().items()}  # fmt: skip
    for return_lse in (False, True):
        torch.library.opcheck(
            torch.ops.slmperf.paged_attention.reference,
            (
                *(tensors[name] for name in (
                    "query", "key_pages", "value_pages", "page_table", "table_rows",
                    "query_starts", "lengths",
                )),
                list(PRUNED), 0.125, torch.ones(3), torch.ones(3), 0, 0, return_lse, 17,
            ),
        )  # fmt: skip
    compiled = torch.compile(
        lambda given: case.run(given, "auto"), fullgraph=True, backend="aot_eager"
    )
    found, wanted = compiled(tensors), case.run(tensors, "auto")
    assert torch.equal(found.output, wanted.output) and torch.equal(found.lse, wanted.lse)
    assert case.run(tensors, "auto", return_lse=False).lse is None


def test_what_does_not_fit_is_refused() -> None:
    case = PagedAttentionCase(FP32, ((3, 9),), (2, 1, 3))
    good = case.tensors()

    def refused(words: str, error: type[Exception] = InputError, **changes: object) -> None:
        settings = {k: changes.pop(k) for k in list(changes) if k not in {*good, "key_scale"}}
        with pytest.raises(error, match=words):
            case.run(good | changes, settings.pop("impl", "auto"), **settings)

    refused("without a head map .* found 5 over 3", query=good["query"][:, :5], head_map=None)
    refused("head_map has 6 query heads over 3, the tensors have 5 over 3",
            query=good["query"][:, :5])  # fmt: skip
    refused("head_map has 6 query heads over 2", head_map=HeadMap((3, 3)))
    refused(r"value_pages is .*, expected \(N, P, G, C\)", value_pages=good["value_pages"][:-1])
    refused(r"query_starts is \(3,\)", query_starts=torch.zeros(3, dtype=torch.int32))
    refused(
        r"page_table is \(2, 3\), expected \(B, M\)", page_table=good["page_table"].repeat(2, 1)
    )
    refused("page_table is torch.float32", page_table=good["page_table"].float())
    refused("lengths is on meta, the query on cpu", lengths=good["lengths"].to("meta"))
    refused("key_pages is torch.bfloat16 on cpu, wanted float32 or float8_e4m3fn on cpu",
            key_pages=good["key_pages"].bfloat16())  # fmt: skip
    refused("value_pages are torch.float8_e4m3fn, key_pages torch.float32",
            value_pages=good["value_pages"].to(FP8))  # fmt: skip
    refused("key_scale is torch.float64", key_scale=torch.ones(3, dtype=FP64))
    refused(r"key_scale is \(2,\), expected \(G,\) = \(3,\)", key_scale=torch.ones(2))
    for name, wrong in (
        ("window", 0), ("split_keys", -1), ("longest_query", -1), ("scale", 0.0),
        ("scale", torch.inf),
    ):  # fmt: skip
        refused(f"{name} is {wrong}, wanted", **{name: wrong})
    refused("wants a gradient", NotImplementedError, query=good["query"].requires_grad_())
    refused("impl='cuda' on cpu tensors", NotImplementedError, query=good["query"].detach(),
            impl="cuda")  # fmt: skip
    with torch.no_grad():
        assert case.run(good, "auto").output.isfinite().all()


def test_what_there_is_says_so() -> None:
    listed = implementations()["paged_attention"]
    assert listed["auto"] == "cpu: reference, cuda: triton"
    assert listed["reference"] == "ready" and "triton" in listed
