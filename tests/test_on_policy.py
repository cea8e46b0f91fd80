"""The student's own text: what is drawn, which batches, how old it may be, and what is left alone.

Fake servers stand in for real ones; everything else runs a model of two layers of width 32.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import llama

from slmperf.check import InputError
from slmperf.distill import (
    DistillationConfig,
    DistillationTrainer,
    OnPolicySampler,
    PackedBatches,
)
from slmperf.distill.on_policy import (
    ContinuousBatching,
    PaddedGeneration,
    ServerGenerator,
    default_generator,
    stop_tokens,
)
from slmperf.distill.on_policy.generators import draw

NONE = frozenset()
PROMPTS = [np.random.default_rng(4).integers(3, 64, n).tolist() for n in (1, 5, 9, 20, 3, 30)]
IN_PROCESS = [PaddedGeneration, lambda: PaddedGeneration(rows=2), ContinuousBatching]
NAMES = ["padded", "padded by two", "continuous"]


def written(generator, model, prompts=PROMPTS, new=20, temperature=1.0, top_p=1.0, stop=NONE):
    """Texts of seeds 0, 1, ...; `new` is a number, or one for each prompt."""
    generator.update(model, 0)
    return generator.generate(
        prompts,
        new_tokens=[new] * len(prompts) if isinstance(new, int) else new,
        temperature=temperature,
        top_p=top_p,
        seeds=list(range(len(prompts))),
        stop=stop,
    )


@torch.no_grad()
def likeliest(model, prompt, new):
    """The argmax of the model's own logits, one token after the other, without a cache."""
    ids = list(prompt)
    for _ in range(new):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def examples(count=40, seed=0):
    """Prompts of 2 to 12 tokens with answers of 1 to 12."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, answer = random.integers(2, 13), random.integers(1, 13)
        ids = random.integers(3, 64, prompt + answer)
        made.append({"input_ids": ids, "answer": np.arange(len(ids)) >= prompt})
    return made


def batches(tmp_path, world_size=1, given=None, **settings):
    chosen = {"context": 32, "max_steps": 8, "per_device_train_batch_size": 2} | settings
    config = DistillationConfig(output_dir=str(tmp_path), **chosen)
    return PackedBatches(examples() if given is None else given, config, world_size)


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def own(batch):
    """Whether a batch is generated text."""
    return bool((batch["examples"] == -1).all())


def texts_of(batch):
    """The examples of a batch: their tokens and which are answers, in a fixed order."""
    ids, first, found = batch["input_ids"].reshape(-1).tolist(), 0, []
    for length, count in zip(batch["lengths"].tolist(), batch["counts"].tolist(), strict=True):
        begin = int(batch["positions"][first])
        answers = batch["answer"][first : first + count].tolist()
        found.append((tuple(ids[begin : begin + length]), tuple(answers)))
        first += count
    return found


# What is drawn.


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (0.7, 0.9)])
def test_draw_has_the_probabilities_it_should(temperature, top_p):
    logits = torch.randn(16, generator=torch.Generator().manual_seed(1))
    wanted = torch.softmax(logits.double() / temperature, -1)
    order = wanted.argsort(descending=True)
    before = wanted[order].cumsum(0) - wanted[order]
    wanted[order[before >= top_p]] = 0.0
    wanted /= wanted.sum()
    # A number from the middle of each of so many equal parts of [0, 1): shares are exact.
    parts = 20_000
    uniform = (torch.arange(parts, dtype=torch.float64) + 0.5) / parts
    tokens = draw(logits.expand(parts, -1), uniform, temperature, top_p)
    shares = torch.bincount(tokens, minlength=16).double() / parts
    torch.testing.assert_close(shares, wanted, atol=1.5 / parts, rtol=0)


def test_draw_at_the_ends():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    top = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for temperature, top_p in ((1.0, 1.0), (1.0, 0.99), (1e-4, 1.0), (1.0, 1e-9), (0.0, 1.0)):
        for uniform in (torch.zeros(1, dtype=torch.float64), top):
            assert int(draw(logits, uniform, temperature, top_p)) in (1, 2)
    assert int(draw(logits, top, 1.0, 1e-9)) == 2


@pytest.mark.parametrize("make", [IN_PROCESS[0], IN_PROCESS[2]], ids=["padded", "continuous"])
def test_texts_follow_the_model(make):
    """Counts of two-token texts against the model's exact probabilities, chi-square over 600."""
    model, count, prompt = llama(vocab_size=16, initializer_range=0.05), 600, [3, 7, 5]
    temperature = 0.5
    texts = written(make(), model, [prompt] * count, new=2, temperature=temperature)
    with torch.no_grad():
        rows = torch.tensor([[*prompt, first] for first in range(16)])
        logits = model(input_ids=rows, use_cache=False).logits.double() / temperature
    first = torch.softmax(logits[0, 2], -1)
    pairs = first[:, None] * torch.softmax(logits[:, 3], -1)
    for wanted, found in (
        (first, torch.tensor([text[0] for text in texts])),
        (pairs.sum(0), torch.tensor([text[1] for text in texts])),
    ):
        seen = torch.bincount(found, minlength=16).double()
        chi_square = float(((seen - wanted * count) ** 2 / (wanted * count)).sum())
        assert chi_square < 45  # 15 degrees of freedom: 1 in 10 000
    assert len({tuple(text) for text in texts}) > 100


@pytest.mark.parametrize("make", IN_PROCESS, ids=NAMES)
def test_greedy_is_the_models_argmax(make):
    model = llama()
    found = written(make(), model, temperature=0.0, new=16)
    assert found == [likeliest(model, prompt, 16) for prompt in PROMPTS]


def test_texts_do_not_depend_on_what_is_beside_them():
    model = llama()
    whole = written(PaddedGeneration(), model)
    for make in IN_PROCESS[1:]:
        assert written(make(), model) == whole
    assert len({tuple(text) for text in whole}) == len(whole)
    last = PaddedGeneration()
    last.update(model, 0)
    alone = last.generate(
        PROMPTS[3:4], new_tokens=[20], temperature=1.0, top_p=1.0, seeds=[3], stop=NONE
    )
    assert alone == whole[3:4]


@pytest.mark.parametrize("make", IN_PROCESS, ids=NAMES)
def test_texts_end_at_stop_tokens_and_at_their_length(make):
    model, lengths = llama(), [20, 1, 20, 7, 20, 34]  # 30 + 34 is the model's whole context
    free = written(make(), model, new=lengths)
    assert [len(text) for text in free] == lengths
    stop = frozenset({free[0][2], free[3][4], free[5][20]})
    found = written(make(), model, new=lengths, stop=stop)
    for text, whole in zip(found, free, strict=True):
        ends = [at for at, token in enumerate(whole) if token in stop]
        assert text == (whole[: ends[0] + 1] if ends else whole)
    assert found[0][-1] in stop and len(found[0]) <= 3


def test_learned_positions_are_not_left():
    """Texts beside one whose prompt fills the context: no position beyond it is asked for."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config).eval()
    prompts, new = [PROMPTS[5], *PROMPTS[:3], PROMPTS[4]], [2, 20, 20, 20, 20]
    found = written(PaddedGeneration(), model, prompts, new=new, temperature=0.0)
    assert found == [likeliest(model, *one) for one in zip(prompts, new, strict=True)]


# Weights.


@pytest.mark.parametrize("make", IN_PROCESS, ids=NAMES)
def test_no_cache_of_older_weights_is_read(make):
    """Prompts that share several pages, before and after the weights were changed in place."""
    model = llama(max_position_embeddings=1024)
    start = np.random.default_rng(0).integers(3, 64, 600).tolist()
    prompts = [[*start, *prompt] for prompt in PROMPTS]
    generator = make()
    before = written(generator, model, prompts, temperature=0.0, new=4)
    assert before == [likeliest(model, prompt, 4) for prompt in prompts]
    with torch.no_grad():
        for index, weight in enumerate(model.parameters()):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
            weight += 0.3 * noise * weight.std()
    after = written(generator, model, prompts, temperature=0.0, new=4)
    assert after == [likeliest(model, prompt, 4) for prompt in prompts]
    assert after != before


@pytest.mark.parametrize("make", [IN_PROCESS[0], IN_PROCESS[2]], ids=["padded", "continuous"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_the_model_and_the_random_state_are_as_before(make, attention):
    model = llama(attn_implementation=attention, attention_dropout=0.5)
    model.generation_config.repetition_penalty = 5.0  # what the student's policy has not
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    settings, config = model.generation_config, model.config.to_dict()
    torch.manual_seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = written(make(), model, temperature=0.0, new=8)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings and settings.repetition_penalty == 5.0
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == attention
    assert model.model.layers[0].gradient_checkpointing
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    model.eval()
    assert found == [likeliest(model, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("make", [IN_PROCESS[0], IN_PROCESS[2]], ids=["padded", "continuous"])
def test_adapters_take_part(make):
    peft = pytest.importorskip("peft")
    plain = llama()
    before = [likeliest(plain, prompt, 8) for prompt in PROMPTS]
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(plain, settings).eval()
    found = written(make(), model, temperature=0.0, new=8)
    assert found == [likeliest(model, prompt, 8) for prompt in PROMPTS]
    assert found != before


@pytest.mark.parametrize(
    "device,attention,dtype,continuous",
    [
        ("cpu", "flash_attention_2", torch.bfloat16, False),
        ("cuda", "sdpa", torch.bfloat16, False),
        ("cuda", "flash_attention_2", torch.float32, False),  # autocast is not where it runs
        ("cuda", "flash_attention_2", torch.bfloat16, True),
        ("cuda", "flash_attention_2", torch.float16, True),
    ],
)
def test_the_default_is_padded_unless_flash_attention_runs(
    monkeypatch, device, attention, dtype, continuous
):
    model = llama().to(dtype)
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device(device)))
    model.config._attn_implementation = attention
    found = default_generator(model)
    assert isinstance(found, ContinuousBatching if continuous else PaddedGeneration)
    refused = attention != "sdpa" and dtype == torch.float32
    if refused:
        with pytest.raises(InputError, match=r"weights of torch.float32, expected bf16 or fp16"):
            ContinuousBatching().check(model)
    else:
        ContinuousBatching().check(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_keeps_the_models_attention(monkeypatch, attention):
    """Where flash attention is installed, too, to which Transformers would switch."""
    from transformers.generation.continuous_batching import continuous_api

    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: False)
    monkeypatch.setattr(continuous_api, "is_flash_attn_2_available", lambda **_: True)
    model, seen = llama(attn_implementation=attention), set()
    model.register_forward_pre_hook(lambda *_: seen.add(model.config._attn_implementation))
    found = written(ContinuousBatching(), model, temperature=0.0, new=4)
    assert found == [likeliest(model, prompt, 4) for prompt in PROMPTS]
    seen = {kind.removeprefix("paged|") for kind in seen}
    assert seen == {attention} and model.config._attn_implementation == attention


@pytest.mark.parametrize("make", [IN_PROCESS[0], IN_PROCESS[2]], ids=["padded", "continuous"])
def test_a_generator_without_a_model_is_refused(make):
    with pytest.raises(InputError, match=r"it has no model, expected update\(model, step\) before"):
        make().generate([[3]], new_tokens=[1], temperature=1.0, top_p=1.0, seeds=[0], stop=NONE)


# Batches.


def test_fraction(tmp_path):
    numbers = range(4000)
    for fraction in (0.0, 0.3, 1.0):
        share = np.mean([OnPolicySampler(fraction, seed=1).chosen(one) for one in numbers])
        assert abs(share - fraction) <= 4 * (fraction * (1 - fraction) / 4000) ** 0.5
    chosen = [[OnPolicySampler(0.5, seed=seed).chosen(one) for one in numbers] for seed in (0, 1)]
    assert chosen[0] != chosen[1]
    data, model = batches(tmp_path), llama()
    for fraction in (0.0, 1.0):
        sampler = OnPolicySampler(fraction, new_tokens=4)
        assert all(
            own(sampler.replace(data[one], data, model, one)) == bool(fraction) for one in range(4)
        )
        assert sampler.logs()["on_policy_share"] == fraction


def test_a_batch_of_own_text(tmp_path):
    """Prompts as they were, and the answers are the generated tokens, the stop token among them."""
    data, model = batches(tmp_path), llama()
    sampler = OnPolicySampler(1.0, new_tokens=25, temperature=0.0, stop=[50, 35, 8])
    batch = sampler.replace(data[3], data, model, 3)
    assert own(batch) and int(batch["number"]) == 3
    wanted = {}
    for index in data[3]["examples"].tolist():
        prompt = data.prompt(index).tolist()
        text = likeliest(model, prompt, min(25, 32 - len(prompt)))
        ends = [at for at, token in enumerate(text) if token in (50, 35, 8)]
        wanted[tuple(prompt)] = text[: ends[0] + 1] if ends else text
    found = {}
    for ids, answers in texts_of(batch):
        length = len(ids) - sum(answers)
        assert answers == tuple(place >= length for place in range(1, len(ids)))
        found[ids[:length]] = list(ids[length:])
    assert found == wanted
    assert any(text[-1] in (50, 35, 8) for text in wanted.values())
    logs = sampler.logs()
    assert logs["on_policy_tokens"] == sum(map(len, wanted.values()))
    stopped = np.mean([text[-1] in (50, 35, 8) for text in wanted.values()])
    assert logs["on_policy_stopped"] == pytest.approx(stopped)
    assert logs["on_policy_length"] == pytest.approx(np.mean([*map(len, wanted.values())]))
    assert logs["on_policy_staleness_max"] == logs["on_policy_empty"] == 0
    assert sampler.logs() == {}


def test_the_models_own_end_token_ends_a_text(tmp_path):
    data, model = batches(tmp_path), llama()
    model.generation_config.eos_token_id = list(range(10, 20))
    given = OnPolicySampler(1.0, new_tokens=20, stop=range(10, 20))
    default = OnPolicySampler(1.0, new_tokens=20)
    same(default.replace(data[0], data, model, 0), given.replace(data[0], data, model, 0))
    assert default.logs()["on_policy_stopped"] > 0
    assert stop_tokens(model) == frozenset(range(10, 20))
    for ends, wanted in ((7, {7}), (None, set())):
        model.generation_config.eos_token_id = ends
        assert stop_tokens(model) == wanted


def test_every_text_has_its_own_numbers(tmp_path):
    """One prompt in two examples and in two steps: four different texts."""
    given = [{"input_ids": np.arange(20) + 3, "answer": np.arange(20) >= 4}] * 2
    data, model = batches(tmp_path, given=given), llama()
    sampler = OnPolicySampler(1.0, new_tokens=12)
    made = [sampler.replace(data[step], data, model, step) for step in (0, 1)]
    assert len({ids for batch in made for ids, _ in texts_of(batch)}) == 4


def step_of_training(model, step):
    """Weights that differ from step to step, and are the same at the same step."""
    fresh = llama().state_dict()
    random = torch.Generator().manual_seed(step)
    for value in fresh.values():
        value += 0.1 * torch.randn(value.shape, generator=random) * value.std()
    model.load_state_dict(fresh)


@pytest.mark.parametrize("refresh_steps", [1, 3])
def test_any_cut_into_ranks_and_accumulation_gives_the_same_text(tmp_path, refresh_steps):
    """Eight steps of four rows, and weights that change with every step."""
    model, settings = llama(), {"new_tokens": 6, "refresh_steps": refresh_steps, "seed": 5}
    found = []
    for ranks, accumulation in ((1, 1), (1, 4), (2, 1), (2, 2)):
        data = batches(tmp_path, ranks, gradient_accumulation_steps=accumulation, rows_per_step=4)
        per_step = ranks * accumulation
        made = [[] for _ in range(8)]
        for rank in range(ranks):
            sampler = OnPolicySampler(0.5, **settings)
            for number in range(rank, len(data), ranks):
                step = number // per_step
                step_of_training(model, step)
                batch = sampler.replace(data[number], data, model, step)
                assert own(batch) == sampler.chosen(step)
                made[step] += texts_of(batch)
            assert not sampler.state()["numbers"].numel()
        found.append([sorted(step) for step in made])
    assert 2 <= sum(sampler.chosen(step) for step in range(8)) <= 6
    for other in found[1:]:
        assert other == found[0]


@pytest.mark.parametrize("refresh_steps", [1, 4])
def test_a_resumed_run_draws_the_same_text(tmp_path, refresh_steps):
    """Stopped between two refreshes: text that was drawn ahead is in the state."""
    model, data = llama(), batches(tmp_path, max_steps=9)
    settings = {"new_tokens": 6, "refresh_steps": refresh_steps}

    def run(sampler, first, last):
        made = []
        for step in range(first, last):
            step_of_training(model, step)
            made.append(sampler.replace(data[step], data, model, step))
        return made

    whole = run(OnPolicySampler(0.7, **settings), 0, 9)
    stopped = OnPolicySampler(0.7, **settings)
    start = run(stopped, 0, 5)
    save_file(stopped.state(), tmp_path / "sampler.safetensors")
    assert bool(stopped.state()["numbers"].numel()) == (refresh_steps > 1)
    resumed = OnPolicySampler(0.7, **settings)
    resumed.check(data, model)
    resumed.load_state(load_file(tmp_path / "sampler.safetensors"))
    for one, other in zip(whole, start + run(resumed, 5, 9), strict=True):
        same(one, other)
    chosen = [step % refresh_steps for step in range(5, 9) if resumed.chosen(step)]
    assert resumed.logs()["on_policy_staleness_max"] == max(chosen)
    if refresh_steps > 1:  # and without the state it would not
        fresh = run(OnPolicySampler(0.7, **settings), 5, 9)
        assert any(
            not torch.equal(one["input_ids"], other["input_ids"])
            for one, other in zip(whole[5:], fresh, strict=True)
        )


def test_the_examples_of_a_batch(tmp_path):
    """Those of the batch itself, over an epoch's end and in any order."""
    data = batches(tmp_path, max_steps=30)
    assert data.steps_per_epoch < 20
    for number in (29, 0, 12, 3):
        assert data.examples_of(number).tolist() == data[number]["examples"].tolist()
    assert data.examples_of(0).dtype == np.int64
    with pytest.raises(IndexError):
        data.examples_of(30)


def test_refreshes_and_how_old_text_is(tmp_path):
    """Three steps' text is written at once, by the weights of the first of them."""
    data, model, seen = batches(tmp_path, max_steps=6), llama(), []

    class Watched(PaddedGeneration):
        def generate(self, prompts, **settings):
            seen.append((self.step, len(prompts)))
            return super().generate(prompts, **settings)

    sampler = OnPolicySampler(
        1.0, new_tokens=5, generator=Watched(), refresh_steps=3, max_staleness=2
    )
    single = OnPolicySampler(1.0, new_tokens=5)
    sampler.check(data, model)
    for step in range(6):
        step_of_training(model, step - step % 3)
        now = single.replace(data[step], data, model, step)
        step_of_training(model, step)
        same(sampler.replace(data[step], data, model, step), now)
    sizes = [len(data[step]["examples"]) for step in range(6)]
    assert seen == [(0, sum(sizes[:3])), (3, sum(sizes[3:]))]
    logs = sampler.logs()
    assert logs["on_policy_staleness_mean"] == 1 and logs["on_policy_staleness_max"] == 2
    # Where the step of a refresh is not chosen, its weights write all the same.
    chosen = [[OnPolicySampler(0.5, seed=seed).chosen(one) for one in (3, 4)] for seed in range(99)]
    seed = chosen.index([False, True])
    sampler = OnPolicySampler(0.5, 5, generator=Watched(), refresh_steps=3, seed=seed)
    seen.clear()
    for step in range(6):
        sampler.replace(data[step], data, model, step)
    assert seen and all(step in (0, 3) for step, _ in seen)


# Servers.


class FakeServer:
    """CompletionServer's `complete`, with the answers it is given, or a text of each seed."""

    def __init__(self, answers=None):
        self.answers, self.asked = answers, []

    def check(self):
        return "fake"

    def complete(self, prompts, *, new_tokens, temperature, top_p, seeds, stop):
        self.asked.append((prompts, new_tokens, temperature, top_p, seeds, stop))
        if self.answers is not None:
            return [list(self.answers[place % len(self.answers)]) for place in range(len(prompts))]
        return [[3 + seed % 60] * new for seed, new in zip(seeds, new_tokens, strict=True)]


def test_a_servers_text(tmp_path):
    data, model, server = batches(tmp_path), llama(), FakeServer()
    sampler = OnPolicySampler(
        1.0, 7, 0.8, 0.9, generator=ServerGenerator(server), max_staleness=7, stop=[2], seed=11
    )
    sampler.check(data, model)
    batch = sampler.replace(data[2], data, model, 2)
    (prompts, new_tokens, *rest, seeds, stop) = server.asked[0]
    assert prompts == [data.prompt(index).tolist() for index in data[2]["examples"].tolist()]
    assert all(type(token) is int for prompt in prompts for token in prompt)
    assert rest == [0.8, 0.9] and stop == frozenset({2}) and set(new_tokens) == {7}
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert int(batch["answer"].sum()) == 7 * len(prompts)
    assert sampler.logs()["on_policy_staleness_max"] == 2  # the weights of step 0


def test_empty_and_overlong_answers_of_a_server(tmp_path):
    data, model = batches(tmp_path), llama()
    count = len(data[0]["examples"])
    for answers, kept, tokens in (
        ([[]], 0, 0),
        ([[], [4, 5, 2, 9]], count // 2, 3 * (count // 2)),  # cut behind the stop token
        ([[4] * 99], count, 6 * count),
    ):
        sampler = OnPolicySampler(
            1.0, new_tokens=6, stop=[2], generator=ServerGenerator(FakeServer(answers))
        )
        batch = sampler.replace(data[0], data, model, 0)
        if not kept:
            same(batch, data[0])
        else:
            assert len(batch["examples"]) == kept and int(batch["answer"].sum()) == tokens
        logs = sampler.logs()
        assert logs["on_policy_empty"] == pytest.approx((count - kept) / count)
        assert logs["on_policy_share"] == bool(kept)


def test_a_server_of_other_tokens_is_refused(tmp_path):
    data = batches(tmp_path)
    sampler = OnPolicySampler(1.0, generator=ServerGenerator(FakeServer([[5, 64]])), stop=[2])
    with pytest.raises(InputError, match=r"wrote token 64, expected ids from 0 to 63"):
        sampler.replace(data[0], data, llama(), 0)


def test_staleness_is_bounded(tmp_path):
    data, model = batches(tmp_path), llama()
    published = []

    def settings(publish=None):
        return {
            "generator": ServerGenerator(FakeServer(), publish),
            "new_tokens": 4,
            "stop": [2],
        }

    with pytest.raises(InputError, match=r"7 steps old at the last step, .* max_staleness = 6"):
        OnPolicySampler(1.0, max_staleness=6, **settings()).check(data, model)
    OnPolicySampler(1.0, max_staleness=7, **settings()).check(data, model)
    with pytest.raises(InputError, match=r"7 steps old at the last step, .* that says so$"):
        OnPolicySampler(1.0, refresh_steps=20, **settings()).check(data, model)
    # By itself the bound is what the refreshes make of it.
    unsaid = OnPolicySampler(1.0, refresh_steps=3, **settings())
    assert own(unsaid.replace(data[2], data, model, 2))
    with pytest.raises(InputError, match=r"3 steps old, expected at most max_staleness = 2"):
        unsaid.replace(data[3], data, model, 3)
    bounded = OnPolicySampler(1.0, max_staleness=2, **settings())
    assert own(bounded.replace(data[2], data, model, 2))
    with pytest.raises(InputError, match=r"3 steps old, expected at most max_staleness = 2"):
        bounded.replace(data[3], data, model, 3)
    fed = OnPolicySampler(
        1.0,
        max_staleness=1,
        refresh_steps=2,
        **settings(lambda model, step: published.append(step)),
    )
    fed.check(data, model)
    for step in range(5):
        assert own(fed.replace(data[step], data, model, step))
    assert published == [2, 4]  # the server starts with the weights of step 0
    assert fed.logs()["on_policy_staleness_max"] == 1


# What is refused.


@pytest.mark.parametrize(
    "change,message",
    [
        ({"fraction": -0.1}, "fraction is -0.1, expected 0 to 1"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"fraction": float("nan")}, "fraction is nan"),
        ({"new_tokens": 0}, "new_tokens is 0, expected a whole number of at least 1"),
        ({"new_tokens": 2.5}, "new_tokens is 2.5"),
        ({"temperature": -1.0}, "temperature is -1.0, expected at least 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"refresh_steps": 0}, "refresh_steps is 0"),
        ({"max_staleness": -1}, "max_staleness is -1"),
        ({"refresh_steps": 4, "max_staleness": 2}, "refresh_steps is 4, .* at most max_staleness"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [1, -1]}, r"stop is \[1, -1\], expected token ids"),
    ],
)
def test_wrong_settings_are_refused_at_once(change, message):
    with pytest.raises(InputError, match=message) as caught:
        OnPolicySampler(**({"fraction": 0.5} | change))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_continued_is_refused_before_training(tmp_path):
    model = llama()
    full = {"input_ids": np.arange(32) + 3, "answer": np.zeros(32, bool)}
    almost = {"input_ids": np.arange(32) + 3, "answer": np.arange(32) == 31}
    data = batches(tmp_path, given=[almost, full])
    with pytest.raises(
        InputError, match=r"prompt of example 1 has 32 tokens, expected 1 to 31, .* context = 32"
    ):
        OnPolicySampler(0.5).check(data, model)
    OnPolicySampler(0.0).check(data, model)
    data = batches(tmp_path, given=[almost, almost])
    sampler = OnPolicySampler(1.0, new_tokens=300)
    sampler.check(data, model)
    batch = sampler.replace(data[0], data, model, 0)  # one more token is what fits
    assert batch["lengths"].tolist() == [32, 32] and int(batch["answer"].sum()) == 2
    with pytest.raises(InputError, match="stop holds token 64, expected ids below 64"):
        OnPolicySampler(0.5, stop=[2, 64]).check(data, model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="'flex_attention', expected sdpa"):
        OnPolicySampler(0.5, generator=ContinuousBatching()).check(data, model)


def test_a_training_on_own_text(tmp_path):
    """Accumulated or not: one curve. With another seed of the sampler: another."""

    def losses(accumulation, seed=0):
        config = DistillationConfig(
            output_dir=str(tmp_path / f"{accumulation} {seed}"),
            context=32,
            max_steps=5,
            rows_per_step=4,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
        )
        sampler = OnPolicySampler(0.6, new_tokens=8, refresh_steps=2, seed=seed)
        trainer = DistillationTrainer(
            llama(), config, examples(), teacher=llama(initializer_range=0.3), on_policy=sampler
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["on_policy_share"] for entry in logs] == [
            float(sampler.chosen(step)) for step in range(5)
        ]
        assert sum(entry.get("on_policy_tokens", 0) for entry in logs) > 50
        return [entry["loss"] for entry in logs]

    once = losses(1)
    assert losses(4) == pytest.approx(once, rel=1e-5)
    assert losses(1, seed=1) != pytest.approx(once, rel=1e-5)
