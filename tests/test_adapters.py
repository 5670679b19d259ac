"""Adapters: where they go, what they compute, and the equations of LoRA-SB."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clients.cohort import Task, train_cohort
from clients.training import LocalTraining
from fedsys.adapters import FFA, Adapter, Full, LoRA, LoRASB, LoRAXS, load_shared, lora_sb
from fedsys.adapters.lora_sb import (
    basis,
    layer_shapes,
    shared_factors,
    summed_gradients,
    truncated_svd,
)
from fedsys.adapters.lowrank import LowRank, targets_of
from fedsys.cohort import CohortModel
from fedsys.data.examples import Batch, Examples
from fedsys.params import Params, digest
from fedsys.seeds import generator
from tests.cohorts import (
    CPU,
    Plain,
    examples_of,
    network,
    nothing,
    plan,
    texts,
    together,
    trainable,
    vectors,
    written_out,
)

ADAPTERS = [LoRA(2, 6), FFA(2, 6), LoRASB(2, alpha=6), LoRAXS(2, alpha=6)]
NAMES = ["lora", "ffa", "lora_sb", "lora_xs"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def worked(rows: str) -> Tensor:
    return torch.tensor(
        [[float(x) for x in row.split()] for row in rows.split(";")], dtype=torch.float64
    )


def layer(rank: int, out: int = 5, inside: int = 7, scaling: float = 1.0) -> LowRank:
    """Return an adapted linear layer with random B, R, A, all of them trainable."""
    adapter = LowRank(nn.Linear(inside, out).double(), rank, scaling, middle=True)
    for seed, p in enumerate(adapter.parameters()):
        p.data = drawn(*p.shape, seed=seed)
    return adapter


# ---- where adapters go


def names(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    return [name for name, _ in targets_of(model, targets)]


def test_all_linear_leaves_the_output_layer_out():
    assert names(network("mlp"), "all-linear") == ["fc1", "fc2"]
    found = names(network("gpt2"), "all-linear")
    kinds = {name.split(".", 4)[-1] for name in found}
    assert kinds == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert len(found) == 8


def test_targets_are_endings_of_whole_names():
    model = network("bert")
    assert len(names(model, ["query", "value"])) == 4
    assert len(names(model, "output.dense")) == 4  # attention.output.dense among them
    assert len(names(model, ["attention.output.dense"])) == 2
    assert names(model, "backbone.bert.pooler.dense") == ["backbone.bert.pooler.dense"]
    with pytest.raises(
        ValueError, match=r"no linear layer is named uery, k; this model has .*query"
    ):
        names(model, ["query", "uery", "k"])


def test_a_fresh_head_is_trained_in_full_and_never_adapted():
    model = nn.ModuleDict(
        {"fc": nn.Linear(3, 3), "top": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))}
    )
    model.heads = ("top",)
    assert names(model, "all-linear") == ["fc"]
    with pytest.raises(ValueError, match=r"no linear layer is named top\.0"):
        names(model, ["fc", "top.0"])
    LoRASB(2).attach(model, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"fc.R.weight", "top.0.weight", "top.0.bias", "top.1.weight", "top.1.bias"}


def test_tied_weights_are_not_adapted():
    model = network("gpt2")
    assert model.backbone.lm_head.weight is model.backbone.transformer.wte.weight
    with pytest.raises(ValueError, match="no linear layer is named lm_head"):
        names(model, ["lm_head"])
    twins = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    twins[2].weight = twins[0].weight
    assert names(twins, "all-linear") == ["1"]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_ranks_that_do_not_fit_are_refused(adapter: Adapter):
    with pytest.raises(ValueError, match=r"rank must be at least 1, got 0"):
        type(adapter)(0, 1.0)
    with pytest.raises(ValueError, match=r"alpha must be positive.*, got -1"):
        type(adapter)(2, -1.0)
    with pytest.raises(ValueError, match=r"adapter\.rank is at most 10 for layer fc2, got 11"):
        type(adapter)(11, 1.0).attach(network("mlp"), 0)
    with pytest.raises(ValueError, match="'all-linear' matches no linear layer"):
        type(adapter)(1, 1.0).attach(network("cnn"), 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"init": "central"},
            "init is one of client_sum, private, public, seeded_random, got 'central'",
        ),
        ({"gradient": "mean"}, "gradient is one of raw, sign"),
        ({"start": "one"}, "start is one of zero, singular"),
        ({"init_lr": 0}, "init_lr must be positive"),
        ({"init_examples": 0}, "init_examples must be at least 1"),
    ],
)
def test_lora_sb_refuses(words: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        LoRASB(2, **words)


# ---- what is trained, and how much of it


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (LoRA(32, 32), 1_181_955),
        (FFA(32, 32), 592_131),
        (LoRASB(32), 26_883),
        (LoRASB(48), 57_603),
        (LoRASB(64), 100_611),
    ],
)
def test_published_numbers_of_trained_values(adapter: Adapter, expected: int):
    # BERT-base with three classes: query and value of 12 layers.
    model = nn.Module()
    for number in range(12):
        attention = nn.ModuleDict({n: nn.Linear(768, 768) for n in ("query", "key", "value")})
        model.add_module(f"layer{number}", attention)
    model.add_module("classifier", nn.Linear(768, 3))
    model.heads = ("classifier",)
    dataclasses.replace(adapter, targets=["query", "value"]).attach(model, 0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("model", ["mlp", "vit", "bert", "llama", "gpt2"])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_trained_are_the_factors_and_the_head(adapter: Adapter, model: str):
    built = network(model)
    sizes = {n: built.get_submodule(n) for n, _ in targets_of(built, "all-linear")}
    adapter.attach(built, 0)
    shapes = layer_shapes(built)
    assert shapes.keys() == sizes.keys()
    values = {
        "LoRA": lambda m, n: 2 * (m + n),
        "FFA": lambda m, n: 2 * m,
        "LoRASB": lambda m, n: 4,
        "LoRAXS": lambda m, n: 4,
    }[type(adapter).__name__]
    head = sum(p.numel() for h in built.heads for p in built.get_submodule(h).parameters())
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert trained == head + sum(values(*shape) for shape in shapes.values())
    assert head > 0 or model in ("llama", "gpt2")


def test_full_trains_everything():
    model = network("mlp").requires_grad_(False)
    Full().attach(model, 0)
    assert all(p.requires_grad for p in model.parameters())


# ---- how adapters start


@pytest.mark.parametrize("adapter", [LoRA(2, 6), FFA(2, 6), LoRASB(2)], ids=NAMES[:3])
@pytest.mark.parametrize("model", ["mlp", "gpt2"])
def test_the_model_is_unchanged_at_the_start(adapter: Adapter, model: str):
    built = network(model)
    batch = examples_of(model, 4, torch.float64).batch(torch.arange(4))
    batch.pop("labels")
    before = built(**batch)
    adapter.attach(built, 0)
    assert torch.equal(built(**batch), before)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_a_seed_gives_the_same_bits_and_every_layer_its_own(adapter: Adapter):
    def attached(seed: int) -> dict[str, Tensor]:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        for p in model.parameters():
            p.data.fill_(0.5)
        adapter.attach(model, seed)
        return dict(model.named_parameters())

    first = attached(0)
    torch.rand(5)
    assert digest(attached(0)) == digest(first)
    assert digest(attached(1)) != digest(first)
    drawn_factor = "R" if isinstance(adapter, LoRAXS) else "A"
    assert not torch.equal(first[f"0.{drawn_factor}.weight"], first[f"1.{drawn_factor}.weight"])


def test_lora_draws_a_as_peft_does():
    model = nn.Sequential(nn.Linear(400, 30))
    LoRA(20, 1).attach(model, 0)
    a = model[0].A.weight
    bound = 1 / math.sqrt(400)
    assert a.abs().max() <= bound
    # 8,000 draws: the deviation of U(-c, c) is c / sqrt(3), known to about one per cent.
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04)
    assert model[0].B.weight.eq(0).all()


@pytest.mark.parametrize(("out", "inside"), [(9, 4), (4, 9), (6, 6), (3, 7), (7, 3), (3, 3)])
def test_random_factors_are_orthonormal(out: int, inside: int):
    model = nn.Sequential(nn.Linear(inside, out).double())
    LoRASB(3).attach(model, 0)
    a, b = model[0].A.weight, model[0].B.weight
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(a @ a.T, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(b.T @ b, eye, rtol=0, atol=1e-12)


def test_lora_xs_decomposes_the_weight():
    model = nn.Sequential(nn.Linear(8, 6).double())
    weight = model[0].weight.detach().clone()
    LoRAXS(6).attach(model, 0)
    torch.testing.assert_close(model[0].B.weight @ model[0].A.weight, weight, rtol=0, atol=1e-12)
    assert 0 < model[0].R.weight.abs().max() < 6e-5
    model = nn.Sequential(nn.Linear(100, 100))
    LoRAXS(100).attach(model, 0)
    assert model[0].R.weight.std().item() == pytest.approx(1e-5, rel=0.05)


# ---- what adapters compute


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
@pytest.mark.parametrize("model", ["mlp", "bert", "gpt2"])
def test_logits_and_gradients_are_those_of_the_dense_weight(adapter: Adapter, model: str):
    built = network(model)
    adapter.attach(built, 0)
    for p in built.parameters():
        p.data += drawn(*p.shape) / 9 if p.requires_grad else 0
    dense = written_out(built)
    batch = examples_of(model, 4, torch.float64).batch(torch.arange(4))
    batch.pop("labels")
    found, expected = built(**batch), dense(**batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    mine = {n: p.grad for n, p in built.named_parameters() if p.requires_grad}
    for name, p in dense.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(mine[name], p.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("middle", [True, False])
def test_conv1d_is_a_transposed_linear_layer(middle: bool):
    linear, conv = nn.Linear(7, 5).double(), Conv1D(5, 7).double()
    conv.weight.data, conv.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
    pair = [LowRank(base, 3, 0.7, middle=middle) for base in (linear, conv)]
    for adapter in pair:
        for factor in ("A", "R", "B") if middle else ("A", "B"):
            weight = getattr(adapter, factor).weight
            weight.data = drawn(*weight.shape)
    x = drawn(2, 4, 7)
    outputs = [adapter(x) for adapter in pair]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-13)
    for output in outputs:
        output.cos().sum().backward()
    grads = [{n: p.grad for n, p in adapter.named_parameters()} for adapter in pair]
    assert grads[0].keys() == grads[1].keys()
    grads[1]["base.weight"] = grads[1]["base.weight"].T
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=0, atol=1e-12)


def test_frozen_factors_in_float32_serve_a_base_in_bfloat16():
    adapter = layer(2)
    adapter.base.bfloat16()
    for factor in (adapter.A, adapter.R, adapter.B):
        factor.float()
    assert adapter(torch.ones(3, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert adapter.A.weight.dtype == torch.float32


# ---- LoRA-SB, section 7 of its specification


@pytest.mark.parametrize("shape", [(6, 7), (3, 4, 7)])
def test_gradient_of_r(shape: tuple[int, ...]):
    # T2: s B^T (dL/dW) A^T, also summed over tokens.
    adapter = layer(3, scaling=0.6)
    adapter(drawn(*shape)).sin().sum().backward()
    a, b, s = adapter.A.weight, adapter.B.weight, adapter.scaling
    expected = s * b.T @ adapter.base.weight.grad @ a.T
    torch.testing.assert_close(adapter.R.weight.grad, expected, rtol=0, atol=1e-12)


G = worked("3 -1 .2 .4; .5 2 -.3 -1; -2 .1 1 .6")
SIGN_2 = """-.064645 .135355 -.085355 -.085355; -.05 -.05 .120711 .120711;
            .135355 -.064645 -.085355 -.085355"""
SIGN_1 = """.035355 .035355 -.085355 -.085355; -.05 -.05 .120711 .120711;
            .035355 .035355 -.085355 -.085355"""


def factorised(adapter: LoRASB, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    factors, starts = adapter.factorise({"l": gradient.clone()})
    return factors["l.B.weight"], starts["l.R.weight"], factors["l.A.weight"]


@pytest.mark.parametrize(
    ("rank", "product", "error"), [(2, SIGN_2, 0.108239), (1, SIGN_1, 0.227411)]
)
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_worked_start_from_signs(rank: int, product: str, error: float, alpha: float | None):
    # T3, whatever the scaling: R_0 is divided by it.
    adapter = LoRASB(rank, alpha, gradient="sign", start="singular", init_lr=0.1)
    b, r, a = factorised(adapter, G)
    move = adapter.scaling * b @ r @ a
    torch.testing.assert_close(move, worked(product), rtol=0, atol=1e-6)
    assert torch.linalg.norm(-0.1 * G.sign() - move).item() == pytest.approx(error, abs=1e-6)


def test_worked_singular_values():
    _, r, _ = factorised(LoRASB(3, gradient="sign", start="singular", init_lr=0.1), G)
    assert r.diagonal().tolist() == pytest.approx([0.261313, 0.2, 0.108239], abs=1e-6)
    _, r, _ = factorised(LoRASB(3, gradient="raw", start="singular", init_lr=0.1), G)
    assert r.diagonal().tolist() == pytest.approx([0.373375, 0.248452, 0.089233], abs=1e-6)
    assert r.equal(r.diagonal().diag())


def test_signs_of_zero_are_zero():
    b, r, a = factorised(
        LoRASB(1, gradient="sign", start="singular", init_lr=1.0), 4 * G.new_ones(2, 2).tril()
    )
    torch.testing.assert_close(b @ r @ a, basis_product(-torch.ones_like(b @ a).tril(), 1))


def basis_product(step: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(step, full_matrices=False)
    return u[:, :rank] @ s[:rank].diag() @ vt[:rank]


def test_learning_rate_of_the_start_scales_r_only():
    small = factorised(LoRASB(2, start="singular", init_lr=0.1), G)
    large = factorised(LoRASB(2, start="singular", init_lr=0.4), G)
    assert small[0].equal(large[0])
    assert small[2].equal(large[2])
    torch.testing.assert_close(4 * small[1], large[1])
    assert factorised(LoRASB(2, start="zero"), G)[1].eq(0).all()


def test_worked_optimal_gradient():
    # T4: the best step within B . A is that of orthonormal factors of the same spaces, for every s;
    # there autograd's gradient of R is already it.
    b, a = worked("1 0; 1 1; 0 2"), worked("1 0 1 0; 0 2 0 1")
    g = worked("1 2 -1 0; 0 1 3 -2; 2 -1 0 1")
    expected = worked(
        """.444444 .977778 .444444 .488889; 1.055556 .622222 1.055556 .311111;
           1.222222 -.711111 1.222222 -.355556"""
    )
    adapter = LowRank(nn.Linear(4, 3, bias=False).double(), 2, 1.0, middle=True)
    adapter.B.weight.data = torch.linalg.qr(b)[0]
    adapter.A.weight.data = torch.linalg.qr(a.T)[0].T.contiguous()
    adapter.R.weight.data = torch.zeros(2, 2, dtype=torch.float64)
    (adapter(torch.eye(4, dtype=torch.float64)).T * g).sum().backward()
    equivalent = adapter.B.weight @ adapter.R.weight.grad @ adapter.A.weight
    torch.testing.assert_close(equivalent, expected, rtol=0, atol=1e-6)
    assert torch.linalg.norm(equivalent - g).item() == pytest.approx(4.251797, abs=1e-6)
    # With factors that are not orthonormal the gradient of R is not, as the worked numbers say.
    assert torch.linalg.norm(b @ (b.T @ g @ a.T) @ a - g).item() == pytest.approx(
        25.690465, abs=1e-6
    )


def test_first_step_is_the_best_of_its_rank():
    # T5: with the raw gradient's factors one SGD step on R moves W by Eckart and Young's matrix.
    rank, lr = 3, 0.2
    model, examples = network("mlp"), vectors(16, torch.float64)
    rows = torch.arange(16)
    gradients = dense_gradients(model, examples, rows, mean=True)
    adapter = LoRASB(rank, targets=["fc1", "fc2"])
    adapter.attach(model, 0)
    cohort_model = copy.deepcopy(model)
    factors, _ = adapter.factorise({n: g.clone() for n, g in gradients.items()})
    load_shared(cohort_model, factors)
    training = LocalTraining(lr=lr, batch_size=16)
    (trained,), _ = together(cohort_model, examples, training, [rows[None]])
    for name in ("fc1", "fc2"):
        move = (
            factors[f"{name}.B.weight"] @ trained[f"{name}.R.weight"] @ factors[f"{name}.A.weight"]
        )
        expected = basis_product(-lr * gradients[name], rank)
        torch.testing.assert_close(move, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaling", [0.1, 10.0])
def test_scaling_is_a_learning_rate_for_sgd(scaling: float):
    # T6: R / s and lr / s^2 give the same W; that is why alpha = rank by default.
    def weight(scaling: float) -> Tensor:
        model = network("mlp")
        model.heads = ()
        LoRASB(2, alpha=2 * scaling, targets="fc1").attach(model, 0)
        training = LocalTraining(lr=0.3 / scaling**2, batch_size=8, epochs=2)
        examples = vectors(30, torch.float64)
        (trained,), _ = together(model, examples, training, plan(training, (30,)))
        found = {n: model.fc1.get_submodule(n).weight for n in "AB"}
        return scaling * found["B"] @ trained["fc1.R.weight"] @ found["A"]

    torch.testing.assert_close(weight(scaling), weight(1.0), rtol=1e-9, atol=1e-12)
    assert weight(1.0).norm() > 1e-2


def test_orthonormal_factors_keep_the_norm():
    # T7
    b, _, a = factorised(LoRASB(3), drawn(9, 6))
    r = drawn(3, 3)
    torch.testing.assert_close(torch.linalg.norm(b @ r @ a), torch.linalg.norm(r))


# ---- the gradient phase


def dense_gradients(
    model: nn.Module, examples: Examples, rows: Tensor, mean: bool = False
) -> Params:
    """Return autograd's gradients of linear layers, (out, in), by a plain loss over ``rows``."""
    model = copy.deepcopy(model).requires_grad_(True)
    plain = Plain(model, examples, lambda params: torch.optim.SGD(params, lr=1.0))
    for row in rows:
        loss = plain.loss(model, row[None])
        batch = examples.batch(row[None])["labels"]
        targets = 1 if batch.dim() == 1 else int((batch[:, 1:] != -100).sum())
        (loss * targets / (len(rows) if mean else 1)).backward()
    return {
        name: base.weight.grad.T if isinstance(base, Conv1D) else base.weight.grad
        for name, base in targets_of(model, "all-linear")
    }


def batches_of(examples: Examples, rows: Tensor, size: int) -> Iterator[Batch]:
    return (examples.batch(part) for part in rows.split(size))


@pytest.mark.parametrize("model", ["mlp", "bert", "llama", "gpt2"])
def test_summed_gradients_are_those_of_the_dense_weights(model: str):
    built, examples = network(model), examples_of(model, 11, torch.float64)
    expected = dense_gradients(built, examples, torch.arange(11))
    LoRASB(2).attach(built, 0)
    cohort = CohortModel(built)
    for size in (11, 4, 1):  # whatever the batches, the last being short
        found = summed_gradients(cohort, batches_of(examples, torch.arange(11), size))
        assert found.keys() == expected.keys() == layer_shapes(cohort.model).keys()
        for name, gradient in expected.items():
            assert found[name].shape == layer_shapes(cohort.model)[name]
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["raw", "sign"])
def test_clients_sums_give_the_factors_of_the_union(kind: str):
    # Compared by projectors, because singular vectors have no sign.
    model, examples = network("bert"), texts(30, labelled=True)
    adapter = LoRASB(2, gradient=kind)
    adapter.attach(model, 0)
    cohort = CohortModel(model)
    parts = torch.arange(30).split([3, 20, 7])
    sums = [summed_gradients(cohort, batches_of(examples, part, 8)) for part in parts]
    union = summed_gradients(cohort, batches_of(examples, torch.arange(30), 8))
    total = {name: sum(part[name] for part in sums) for name in union}
    for name in union:
        torch.testing.assert_close(total[name], union[name], rtol=0, atol=1e-12)
    (mine, _), (other, _) = adapter.factorise(total), adapter.factorise(union)
    for name, found in mine.items():
        expected = other[name]
        if name.endswith("A.weight"):
            found, expected = found.T, expected.T
        torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-8)


def test_nothing_is_left_of_the_gradient_phase(monkeypatch: pytest.MonkeyPatch):
    model, examples = network("gpt2"), texts(12, labelled=False)
    LoRASB(2).attach(model, 0)
    cohort = CohortModel(model)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in cohort.named_parameters()}
    held = []
    plain = lora_sb._move_gradient

    def watched(total: Tensor, layer: LowRank) -> Callable[[Tensor], None]:
        move = plain(total, layer)

        def count(weight: Tensor) -> None:
            held.append(sum(p.grad is not None for p in cohort.parameters()))
            move(weight)

        return count

    monkeypatch.setattr(lora_sb, "_move_gradient", watched)
    summed_gradients(cohort, batches_of(examples, torch.arange(12), 4))
    assert held == [1] * (3 * 8)  # one at a time, of 8 layers in 3 batches
    for name, p in cohort.named_parameters():
        assert p.grad is None
        assert p.requires_grad == before[name][0]
        assert torch.equal(p, before[name][1])
        assert not p._post_accumulate_grad_hooks


def test_the_gradient_phase_cleans_up_after_a_failure():
    model = network("mlp")
    LoRASB(2).attach(model, 0)
    cohort = CohortModel(model)
    with pytest.raises(KeyError):
        summed_gradients(cohort, [vectors(4, torch.float64).batch(torch.arange(4)), {}])
    assert not any(p.requires_grad for n, p in cohort.named_parameters() if "base" in n)
    assert all(p.grad is None for p in cohort.parameters())


def test_factorising_empties_what_it_is_given():
    gradients = {"x": drawn(4, 4), "y": drawn(5, 3)}
    factors, starts = LoRASB(2).factorise(gradients)
    assert gradients == {}
    assert set(factors) == {"x.A.weight", "x.B.weight", "y.A.weight", "y.B.weight"}
    assert set(starts) == {"x.R.weight", "y.R.weight"}


# ---- singular values


def test_basis_is_that_of_the_descent_step():
    b, a, s = basis(G, 3)
    torch.testing.assert_close(b @ s.diag() @ a, -G)


def test_large_matrices_are_decomposed_at_random():
    # Rank 5 and noise of a hundredth: beyond 2048 the factors span what the exact ones do.
    torch.manual_seed(3)
    left, right = torch.linalg.qr(torch.randn(2100, 5))[0], torch.linalg.qr(torch.randn(2060, 5))[0]
    sizes = torch.tensor([9.0, 7.0, 5.0, 3.0, 2.0])
    matrix = left * sizes @ right.T + 1e-4 * torch.randn(2100, 2060)
    state = torch.get_rng_state()
    u, s, vt = truncated_svd(matrix, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert u.shape == (2100, 5)
    assert vt.shape == (5, 2060)
    torch.testing.assert_close(s, sizes, rtol=1e-3, atol=0)
    torch.testing.assert_close(u.T @ u, torch.eye(5), rtol=0, atol=1e-5)
    error = torch.linalg.norm(u * s @ vt - left * sizes @ right.T)
    assert error < 0.02
    again = truncated_svd(matrix, 5)
    assert all(map(torch.equal, again, (u, s, vt)))


def test_up_to_the_limit_it_is_exact(monkeypatch: pytest.MonkeyPatch):
    matrix = drawn(60, 40)
    u, s, vt = truncated_svd(matrix, 7)
    torch.testing.assert_close(u * s @ vt, basis_product(matrix, 7), rtol=0, atol=1e-12)
    monkeypatch.setattr("fedsys.adapters.lora_sb.EXACT_SVD", 39)
    flat = matrix.sign()  # a spectrum without gaps is the hard case
    exact = torch.linalg.svdvals(flat)[:7]
    torch.testing.assert_close(truncated_svd(flat, 7)[1], exact, rtol=1e-3, atol=0)
    assert truncated_svd(flat, 38)[0].shape == (60, 38)  # no room for oversampling


# ---- factors that clients share


def test_shared_factors_are_loaded_by_name_and_shape():
    model, other = network("mlp"), network("mlp")
    adapter = LoRASB(2)
    adapter.attach(model, 0)
    adapter.attach(other, 1)
    assert digest(shared_factors(model)) != digest(shared_factors(other))
    load_shared(other, shared_factors(model))
    assert digest(shared_factors(model)) == digest(shared_factors(other))
    wrong = dict(shared_factors(model))
    wrong.pop("fc1.A.weight")
    with pytest.raises(ValueError, match="do not fit"):
        load_shared(other, wrong)
    thin = {n: f[:1] for n, f in shared_factors(model).items()}
    with pytest.raises(ValueError, match="do not fit"):
        load_shared(other, thin)


def test_only_adapters_with_r_share_factors():
    for adapter in (LoRA(2, 2), FFA(2, 2)):
        model = network("mlp")
        adapter.attach(model, 0)
        assert shared_factors(model) == {}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=NAMES)
def test_training_leaves_what_is_frozen_alone(adapter: Adapter):
    model, examples = network("vit"), vectors(20, torch.float64)
    adapter.attach(model, 0)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    cohort = CohortModel(model)
    training = LocalTraining(lr=0.1, optimizer="adamw", weight_decay=0.5, batch_size=8)
    start = cohort.initial.clone()
    task = Task(cohort, examples, training, nothing, CPU)
    trained, _ = train_cohort(task, cohort.initial, plan(training, (13, 7)), 0.1)
    assert not torch.equal(trained[0], start)
    assert torch.equal(cohort.initial, start)
    after = dict(cohort.model.named_parameters())
    for name, value in frozen.items():
        assert torch.equal(after[name], value)
    assert digest(frozen) == digest({n: after[n].detach() for n in frozen})


def test_generators_are_named_by_layer():
    # The draw of a layer is known without the model: another program can derive the same factors.
    model = network("mlp")
    FFA(2, 1).attach(model, 5)
    bound = 12**-0.5
    expected = torch.empty(2, 12).double()
    expected.uniform_(-bound, bound, generator=generator(5, "adapter", 1))
    assert torch.equal(model.fc2.A.weight, expected)
    assert trainable(model).keys() == {"fc1.B.weight", "fc2.B.weight", "head.weight", "head.bias"}
