"""kd_loss over two processes: vocabulary shards, a sharded head (FSDP2), shards of the sequence.

The tests run in two gloo processes on this machine; what one process finds alone is the truth.
"""

import multiprocessing
import os
import socket
import traceback
from contextlib import closing

import pytest
import torch
import torch.distributed as dist

from slmperf.ops import (
    JSD,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    StudentHead,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    TotalVariation,
    kd_loss,
)
from slmperf.ops.routing import interpreted

KINDS = (
    ForwardKL(),
    ReverseKL(),
    JSD(0.3),
    JSD(0.2, rescale=True),
    SkewForwardKL(0.1),
    SkewReverseKL(0.2),
    TotalVariation(),
)
PARTS = (17000, 15000)  # of the vocabulary: unequal, neither a multiple of the other's blocks
TIMEOUT_S = 180


def _serve(rank, port, commands, answers):
    """A rank: runs what it is sent, and says what went wrong or None, until it is sent None."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    while work := commands.get():
        try:
            work(rank)
            answers.put((rank, None))
        except BaseException:
            answers.put((rank, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Two processes in one group, that import torch once for all tests."""

    def __init__(self):
        with closing(socket.socket()) as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.answers = context.Queue()
        self.commands = [context.Queue() for _ in range(2)]
        self.processes = [
            context.Process(target=_serve, args=(rank, port, queue, self.answers), daemon=True)
            for rank, queue in enumerate(self.commands)
        ]
        for process in self.processes:
            process.start()

    def run(self, work):
        """work(rank) on both; AssertionError with the traceback of the first that fails."""
        for queue in self.commands:
            queue.put(work)
        for _ in self.processes:
            rank, trouble = self.answers.get(timeout=TIMEOUT_S)
            assert trouble is None, f"rank {rank}:\n{trouble}"

    def stop(self, kill=False):
        for queue in self.commands:
            queue.put(None)
        for process in self.processes:
            process.join(timeout=0 if kill else 20)
            if process.is_alive():
                process.kill()


_ranks: list[Ranks] = []


@pytest.fixture
def in_two_processes():
    """Runs work(rank) in two processes of one group."""
    if not _ranks:
        _ranks.append(Ranks())

    def run(work):
        try:
            _ranks[0].run(work)
        except BaseException:
            # After a failure one rank may wait for the other: the next test starts new ones.
            _ranks.pop().stop(kill=True)
            raise

    return run


@pytest.fixture(scope="module", autouse=True)
def stop_ranks():
    """Ends the processes with the last test."""
    yield
    while _ranks:
        _ranks.pop().stop()


def assert_close(what, found, wanted, tolerance=5e-6):
    """Within fp32 rounding of the largest entry of each tensor."""
    for index, (one, truth) in enumerate(zip(found, wanted, strict=True)):
        assert one.shape == truth.shape, f"{what} {index}: {one.shape}, {truth.shape}"
        top = truth.abs().max().item() if truth.numel() else 0.0
        error = (one - truth).abs().max().item() if truth.numel() else 0.0
        assert error <= tolerance * top, f"{what}, result {index}: {error} off, largest {top}"


def problem(rows, parts, width=12, seed=0):
    """The same tensors on every rank: hidden, weight, bias; the teacher's; labels, weights."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = sum(parts)

    def normal(*size, scale=1.0):
        return scale * torch.randn(*size, generator=generator)

    student = (normal(rows, width), normal(vocabulary, width, scale=0.9), normal(vocabulary))
    teacher = (normal(rows, 8), normal(vocabulary, 8, scale=1.1))
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[0], labels[1], labels[2] = 0, vocabulary - 1, -100
    token_weight = 0.5 + torch.rand(rows, generator=generator)
    return student, teacher, labels, token_weight


def results(student, teacher, leaves, upstream=1.7, **settings):
    loss = kd_loss(student, teacher, **settings)
    up = torch.full_like(loss.loss, upstream)
    return [part.detach() for part in loss], list(torch.autograd.grad(loss.loss, leaves, up))


def vocabulary_shards(rank, parts=PARTS, kinds=KINDS, impl="cpu", only=None):
    """Every divergence, teacher and mixture, whole here and in shards with the other rank."""
    student, (states, theirs), labels, token_weight = problem(6, parts)
    first = sum(parts[:rank])
    own = slice(first, first + parts[rank])
    logits = states @ theirs.mT
    log_probs, indices = torch.log_softmax(logits, dim=-1).topk(7)
    # One row whose tokens are all the other rank's, one with the ends of both shards.
    indices[3] = torch.arange(7) + 5
    indices[4] = torch.arange(7) + parts[0] - 3
    teachers = {
        "head": (TeacherHead(states, theirs), TeacherHead(states, theirs[own])),
        "logits": (TeacherLogits(logits), TeacherLogits(logits[:, own])),
    }
    for tail in ("renormalise", "zero", "bucket"):
        teachers[tail] = (TeacherTopK(indices, log_probs, tail),) * 2
    for kind in kinds:
        for name, (whole, part) in teachers.items():
            if only and (type(kind), name) not in only:
                continue
            if name == "zero" and kind != ForwardKL():
                continue
            if name == "renormalise" and kind == ReverseKL():
                continue
            for settings in (
                {"reduction": "mean"},
                {"reduction": "none", "cross_entropy": 0.4},
                {"reduction": "sum", "cross_entropy": 0.4, "extras": True},
            ):
                settings = dict(settings)
                extras = settings.pop("extras", False)
                more = {"softcap": 9.0, "scale": 0.8} if extras else {}
                if extras and name == "head":
                    whole, part = (
                        TeacherHead(x.hidden, x.weight, scale=1.2) for x in (whole, part)
                    )
                settings |= {"divergence": kind, "labels": labels, "token_weight": token_weight}
                leaves = [x.clone().requires_grad_() for x in student]
                truth, wanted = results(
                    StudentHead(*leaves, **more), whole, leaves, **settings, impl="cpu"
                )
                hidden, weight, bias = (x.clone() for x in student)
                leaves = [
                    x.requires_grad_() for x in (hidden, weight[own].clone(), bias[own].clone())
                ]
                found, gradients = results(
                    StudentHead(*leaves, **more), part, leaves, **settings, impl=impl,
                    group=dist.group.WORLD,
                )  # fmt: skip
                what = f"rank {rank}, {kind}, {name}, {settings['reduction']}"
                assert_close(what, found, truth)
                wanted = [wanted[0], wanted[1][own], wanted[2][own]]
                assert_close(f"{what}: gradient", gradients, wanted, 2e-5)


def cross_entropy_shards(rank):
    """No teacher; gradients of a frozen head, of nothing, of a label that no rank has."""
    (hidden, weight, _), _, labels, _ = problem(150, (50, 31))  # rows of several chunks
    own = slice(0, 50) if rank == 0 else slice(50, 81)
    settings = {"labels": labels, "cross_entropy": 1.0}
    leaf = hidden.clone().requires_grad_()
    truth, wanted = results(StudentHead(leaf, weight), None, [leaf], **settings)
    group = dist.group.WORLD
    found, gradients = results(
        StudentHead(leaf, weight[own]), None, [leaf], **settings, group=group
    )
    assert_close(f"rank {rank}", [*found, *gradients], [*truth, *wanted])
    with torch.no_grad():
        quiet = kd_loss(StudentHead(hidden, weight[own]), None, **settings, group=group)
    assert_close(f"rank {rank}, no grad", quiet, truth)
    with pytest.raises(ValueError, match="chunk_bytes is 4096, expected None with a group"):
        kd_loss(StudentHead(hidden, weight[own]), None, **settings, group=group, chunk_bytes=4096)
    labels[4] = 81
    with pytest.raises(ValueError, match="labels holds 81, expected 0 to 80"):
        kd_loss(StudentHead(hidden, weight[own]), None, **settings, group=group)
    with pytest.raises(NotImplementedError, match="group"):
        kd_loss(StudentHead(hidden, weight), None, **settings, group=group, impl="reference")


def interpreted_shards(rank):
    """Triton cuts the rows of each rank into ranges of its own."""
    from slmperf.testing.interpreter import cure

    cure()
    some = {(ForwardKL, "head"), (ReverseKL, "head"), (ForwardKL, "bucket"), (JSD, "head")}
    vocabulary_shards(rank, (150, 131), KINDS[:3], "triton", some)


def sharded_head(rank):
    """FSDP2: ranks hold other rows; the sharded gradients are the mean of theirs, head included."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    (hidden, weight, _), (states, theirs), labels, token_weight = problem(12, (50, 31))
    mesh = init_device_mesh("cpu", (2,))

    def loss_of(head, own, teacher):
        return kd_loss(
            StudentHead(*head), TeacherHead(states[own], teacher), labels=labels[own],
            token_weight=token_weight[own], cross_entropy=0.3,
        ).loss  # fmt: skip

    class Model(torch.nn.Module):
        """A head that is no call of a module: the loss takes its weights."""

        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(12, 12)
            self.head = torch.nn.Linear(12, 81)

        def forward(self, own):
            head = self.body(hidden[own]), self.head.weight, self.head.bias
            return loss_of(head, own, theirs)

    halves = slice(0, 6), slice(6, 12)
    for groups in (("body", "head"), ("body",), ()):
        torch.manual_seed(0)
        plain, model = Model(), Model()
        model.load_state_dict(plain.state_dict())
        for name in groups:
            fully_shard(getattr(model, name), mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses = [plain(own) for own in halves]
        (sum(losses) / 2).backward()
        found = model(halves[rank])
        found.backward()
        assert_close(f"rank {rank}, {groups}", [found.detach()], [losses[rank].detach()])
        for (name, mine), truth in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert mine.grad.placements[0].is_shard(0), name
            what = f"rank {rank}, {groups}, {name}"
            assert_close(what, [mine.grad.full_tensor()], [truth.grad], 2e-5)
    # A bare DTensor that nobody's hook gathers, and a teacher sharded alike.
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    loss_of((hidden[halves[rank]], sharded), halves[rank],
            distribute_tensor(theirs, mesh, [Shard(0)])).backward()  # fmt: skip
    leaf = weight.clone().requires_grad_()
    (sum(loss_of((hidden[own], leaf), own, theirs) for own in halves) / 2).backward()
    assert_close(f"rank {rank}, bare", [sharded.grad.full_tensor()], [leaf.grad], 2e-5)


def sharded_model(rank):
    """FSDP2 around a language model as one group, whose hooks begin at its logits."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from slmperf.distill import student_head

    config = LlamaConfig(
        vocab_size=81, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(81, (2, 1, 6), generator=generator)
    teacher = torch.randn(2, 6, 81, generator=generator)

    def loss_of(model, half):
        head = student_head(model, {"input_ids": ids[half]})
        return kd_loss(head, TeacherLogits(teacher[half])).loss

    torch.manual_seed(0)
    plain, model = LlamaForCausalLM(config), LlamaForCausalLM(config)
    model.load_state_dict(plain.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    (sum(loss_of(plain, half) for half in (0, 1)) / 2).backward()
    loss_of(model, rank).backward()
    for (name, mine), truth in zip(model.named_parameters(), plain.parameters(), strict=True):
        what = f"rank {rank}, {name}"
        assert_close(what, [mine.grad.full_tensor()], [truth.grad], 1e-4)


def sequence_shards(rank):
    """Half the rows on each rank, by the sum of weights of all: losses and gradients add up."""
    student, (states, theirs), labels, token_weight = problem(11, (60, 47))
    counts = token_weight.masked_fill(labels == -100, 0.0)
    settings = {"cross_entropy": 0.3, "divergence": JSD(0.4)}
    leaves = [x.clone().requires_grad_() for x in student]
    truth, wanted = results(
        StudentHead(*leaves), TeacherHead(states, theirs), leaves, labels=labels,
        token_weight=token_weight, **settings,
    )  # fmt: skip
    own = slice(0, 4) if rank == 0 else slice(4, 11)
    total = counts[own].sum()
    dist.all_reduce(total)
    hidden, weight, bias = (x.clone() for x in student)
    leaves = [x.requires_grad_() for x in (hidden[own].clone(), weight, bias)]
    found, gradients = results(
        StudentHead(*leaves), TeacherHead(states[own], theirs), leaves, labels=labels[own],
        token_weight=token_weight[own], normalizer=total, **settings,
    )  # fmt: skip
    for part in (*found, *gradients[1:]):
        dist.all_reduce(part)
    assert_close(f"rank {rank}", found, truth)
    wanted[0] = wanted[0][own]
    assert_close(f"rank {rank}: gradient", gradients, wanted)


def test_vocabulary_shards(in_two_processes):
    in_two_processes(vocabulary_shards)


def test_cross_entropy_shards(in_two_processes):
    in_two_processes(cross_entropy_shards)


@pytest.mark.slow
def test_vocabulary_shards_of_interpreted_kernels(in_two_processes):
    if not interpreted():
        pytest.skip("Triton kernels run on a device here")
    in_two_processes(interpreted_shards)


def test_sharded_head(in_two_processes):
    in_two_processes(sharded_head)


def test_sharded_model(in_two_processes):
    in_two_processes(sharded_model)


def test_sequence_shards(in_two_processes):
    in_two_processes(sequence_shards)
