"""Derivatives of every order and mode, of every kind of layer, beside a dense twin in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import sparselab
from tests.nn.ops.rows import F64, KINDS
from tests.nn.twin import twin_of

#: torch's own, of its forward mode and of `torch.func.linearize`.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

kinds = pytest.mark.parametrize("kind", KINDS)
#: These go every way; the others, which differ from one of them in little, those that tell them apart.
EVERY_WAY = ("linear", "blocks", "conv", "transposed", "attention")


def ways(calls: Iterable[str], telling: set[str]) -> Any:
    """Which kind goes which way."""
    assert telling <= set(calls)
    # In torch's own attention, too, a backward pass through the tangent of a softmax fails.
    refused = {("attention", "dual numbers")}
    pairs = [each for each in product(KINDS, calls) if each[0] in EVERY_WAY or each[1] in telling]
    return pytest.mark.parametrize(("kind", "how"), [each for each in pairs if each not in refused])


class Case:
    """A layer, its twin, and an input."""

    def __init__(self, kind: str) -> None:
        make, shape = KINDS[kind]
        self.layer = make()
        self.twin = twin_of(self.layer)
        self.x = torch.randn(shape, dtype=F64)
        assert [name for name, _ in self.layer.named_parameters()] == [
            name for name, _ in self.twin.named_parameters()
        ]

    def compare(self, call: Callable[[nn.Module, Tensor], Any]) -> None:
        """The call gives the same for both, tensor by tensor, and not only zeros."""
        got, wanted = call(self.layer, self.x), call(self.twin, self.x)
        found = _pytree.tree_leaves(got)
        assert found
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
        assert any(bool(each.any()) for each in found)


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss_of(model: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Neither quadratic in the input nor in a parameter."""
    y: Tensor = functional_call(model, params, (x,))
    return (y.tanh() + y.square()).sum()


def several(params: dict[str, Tensor], n: int = 3) -> dict[str, Tensor]:
    """As many members of an ensemble."""
    return {name: torch.stack([each * (i + 1) for i in range(n)]) for name, each in params.items()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("partly")])
def test_derivatives_are_those_of_finite_differences(kind: str) -> None:
    """With a mask they are not: its gradient reaches what it leaves out."""
    layer, x = Case(kind).layer, Case(kind).x.requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    inputs = x, *(each.detach().clone().requires_grad_() for each in layer.parameters())

    def call(x: Tensor, *params: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, params, strict=True)), (x,)).tanh()  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, check_fwd_over_rev=True, fast_mode=True)


Call = Callable[[nn.Module, dict[str, Tensor], Tensor], Any]


def per_sample(model: nn.Module, params: dict[str, Tensor], x: Tensor) -> Any:
    samples = torch.stack([x, 2 * x, -x])
    return torch.func.vmap(torch.func.grad(lambda p, x: loss_of(model, p, x)), (None, 0))(params, samples)


def vjp(model: nn.Module, params: dict[str, Tensor], x: Tensor) -> Any:
    y, back = torch.func.vjp(lambda p, x: functional_call(model, p, (x,)).tanh(), params, x)
    return y, back(y + 1)


def linearize(model: nn.Module, params: dict[str, Tensor], x: Tensor) -> Any:
    y, forward = torch.func.linearize(lambda x: functional_call(model, params, (x,)).tanh(), x)
    return y, forward(x + 1)


TRANSFORMS: dict[str, Call] = {
    "grad": lambda m, p, x: torch.func.grad(lambda p, x: loss_of(m, p, x), (0, 1))(p, x),
    "grad of grad": lambda m, p, x: torch.func.grad(
        lambda p: torch.func.grad(lambda x: loss_of(m, p, x))(x).tanh().sum()
    )(p),
    "vjp": vjp,
    "jacrev": lambda m, p, x: torch.func.jacrev(lambda p: functional_call(m, p, (x,)))(p),
    "jvp": lambda m, p, x: torch.func.jvp(lambda p, x: functional_call(m, p, (x,)), (p, x), (p, x)),
    "jvp by parameters": lambda m, p, x: torch.func.jvp(lambda p: loss_of(m, p, x), (p,), (p,)),
    "jvp of grad": lambda m, p, x: torch.func.jvp(
        lambda p, x: torch.func.grad(lambda p: loss_of(m, p, x))(p), (p, x), (p, x)
    ),
    "grad of jvp": lambda m, p, x: torch.func.grad(
        lambda p: torch.func.jvp(lambda p, x: loss_of(m, p, x), (p, x), (p, x + 1))[1]
    )(p),
    "jacfwd": lambda m, p, x: torch.func.jacfwd(lambda p: functional_call(m, p, (x,)))(p),
    "hessian": lambda m, p, x: torch.func.hessian(lambda x: loss_of(m, p, x))(x),
    "hessian by parameters": lambda m, p, x: torch.func.hessian(lambda p: loss_of(m, p, x))(p),
    "jacfwd of jacfwd": lambda m, p, x: torch.func.jacfwd(torch.func.jacfwd(lambda x: loss_of(m, p, x)))(x),
    "jacrev of jacrev": lambda m, p, x: torch.func.jacrev(torch.func.jacrev(lambda p: loss_of(m, p, x)))(p),
    "jacrev of jacfwd": lambda m, p, x: torch.func.jacrev(torch.func.jacfwd(lambda p: loss_of(m, p, x)))(p),
    "linearize": linearize,
    "vmap": lambda m, p, x: torch.func.vmap(m)(torch.stack([x, 2 * x])),
    "vmap along the last": lambda m, p, x: torch.func.vmap(m, -1, -1)(torch.stack([x, 2 * x], -1)),
    "vmap of vmap": lambda m, p, x: torch.func.vmap(
        torch.func.vmap(lambda p, x: functional_call(m, p, (x,)), (None, 0)), (0, None)
    )(several(p), torch.stack([x, 2 * x])),
    "an ensemble": lambda m, p, x: torch.func.vmap(lambda p: functional_call(m, p, (x,)))(several(p)),
    "an ensemble with its own inputs": lambda m, p, x: torch.func.vmap(
        torch.func.grad(lambda p, x: loss_of(m, p, x), (0, 1))
    )(several(p), torch.stack([x, 2 * x, x])),
    "per-sample gradients": per_sample,
    "vmap of jvp": lambda m, p, x: torch.func.vmap(
        lambda t: torch.func.jvp(lambda x: loss_of(m, p, x), (x,), (t,))[1]
    )(torch.stack([x, x + 1])),
}  # fmt: skip


@ways(
    TRANSFORMS,
    {"grad", "jvp", "grad of jvp", "hessian by parameters", "vmap of vmap", "per-sample gradients"},
)
def test_torch_func(kind: str, how: str) -> None:
    case = Case(kind)
    case.compare(lambda m, x: TRANSFORMS[how](m, params_of(m), x))


@kinds
def test_a_batch_of_nothing(kind: str) -> None:
    case = Case(kind)
    none = case.x.new_empty(0, *case.x.shape)
    call = torch.func.grad(lambda p, x: loss_of(case.layer, p, x), (0, 1))
    of_params, of_x = torch.func.vmap(call, (None, 0))(params_of(case.layer), none)
    assert of_x.shape == none.shape
    for name, parameter in case.layer.named_parameters():
        assert of_params[name].shape == (0, *parameter.shape)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("how", ["grad", "jacfwd", "vmap"])
def test_members_that_differ_in_one_parameter_only(kind: str, how: str) -> None:
    def call(m: nn.Module, x: Tensor) -> Any:
        params = params_of(m)
        transform = {
            "grad": lambda f: torch.func.grad(lambda b: f(b).square().sum()),
            "jacfwd": torch.func.jacfwd, "vmap": lambda f: f,
        }[how]  # fmt: skip

        def of(bias: Tensor) -> Tensor:
            return functional_call(m, {**params, "bias": bias}, (x,))  # type: ignore[no-any-return]

        return torch.func.vmap(transform(of))(several(params)["bias"])

    Case(kind).compare(call)


@pytest.mark.parametrize("kind", ["linear", "fan-in", "blocks", "conv"])
def test_an_ensemble_of_members_with_connections_of_their_own(kind: str) -> None:
    members = [KINDS[kind][0]() for _ in range(3)]
    x = torch.randn(KINDS[kind][1], dtype=F64)
    params, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    base = KINDS[kind][0]().to("meta")

    def call(params: Any, buffers: Any) -> Tensor:
        return functional_call(base, (params, buffers), (x,)).tanh().sum()  # type: ignore[no-any-return]

    got = torch.func.vmap(torch.func.grad_and_value(call))(params, buffers)
    for i, member in enumerate(members):
        member.zero_grad()
        loss = twin_of(member)
        value = loss(x).tanh().sum()
        value.backward()
        torch.testing.assert_close(got[1][i], value)
        for name, parameter in loss.named_parameters():
            torch.testing.assert_close(got[0][name][i], parameter.grad)


def of_all(loss: Tensor, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients by x and by every parameter that is trained, with a graph."""
    of = [x, *(each for each in model.parameters() if each.requires_grad)]
    found = torch.autograd.grad(loss, of, create_graph=True, allow_unused=True)
    return [torch.zeros_like(i) if each is None else each for i, each in zip(of, found, strict=True)]


def gradient_penalty(m: nn.Module, x: Tensor) -> Any:
    """WGAN-GP."""
    (dx,) = torch.autograd.grad(m(x).tanh().sum(), x, create_graph=True)
    return of_all(m(x).mean() + 10 * (dx.flatten(1).norm(dim=1) - 1).square().mean(), m, x)


def physics(m: nn.Module, x: Tensor) -> Any:
    """The residual of a wave equation, with two derivatives by the input."""
    u = m(x).sin().sum()
    (first,) = torch.autograd.grad(u, x, create_graph=True)
    (second,) = torch.autograd.grad(first[..., 0].sum(), x, create_graph=True)
    return of_all((second[..., 0] - first[..., 1]).square().sum(), m, x)


def inner_step(m: nn.Module, x: Tensor) -> Any:
    """MAML: the loss after a step, by the parameters before it."""
    params = dict(m.named_parameters())
    grads = torch.autograd.grad(loss_of(m, params, x), list(params.values()), create_graph=True)
    after = {name: params[name] - 0.1 * grad for name, grad in zip(params, grads, strict=True)}
    return of_all(loss_of(m, after, x + 1), m, x)


def third_order(m: nn.Module, x: Tensor) -> Any:
    """A gradient of a gradient of a gradient, by everything at once."""
    found = of_all(m(x).sin().sum(), m, x)
    for _ in range(2):
        found = of_all(sum((each.sin().sum() for each in found), x.new_zeros(())), m, x)
    return found


def batched(m: nn.Module, x: Tensor) -> Any:
    y = m(x).tanh()
    several = torch.stack([torch.ones_like(y), y.detach(), y.detach() + 1])
    return torch.autograd.grad(y, [x, *m.parameters()], several, is_grads_batched=True)


def dual_numbers(m: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(m(forward_ad.make_dual(x, x + 1)).tanh())
    return y, tangent, of_all(tangent.sum(), m, x)


def tangents_of_gradients(m: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x + 1)
        of = [dual, *m.parameters()]
        grads = torch.autograd.grad(m(dual).sin().sum(), of)
        return [forward_ad.unpack_dual(each).tangent for each in grads]


EAGER: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "gradient penalty": gradient_penalty,
    "physics": physics,
    "inner step": inner_step,
    "third order": third_order,
    "batched": batched,
    "dual numbers": dual_numbers,
    "tangents of gradients": tangents_of_gradients,
    "jacobian": torch.autograd.functional.jacobian,
    "jacobian with a graph": lambda m, x: of_all(
        torch.autograd.functional.jacobian(lambda x: m(x).tanh(), x, create_graph=True).square().sum(), m, x
    ),
    "jacobian, vectorized": lambda m, x: torch.autograd.functional.jacobian(m, x, vectorize=True),
    "jacobian, forward": lambda m, x: torch.autograd.functional.jacobian(
        m, x, vectorize=True, strategy="forward-mode"
    ),
    "hessian": lambda m, x: torch.autograd.functional.hessian(lambda x: m(x).sin().sum(), x),
    "hessian, vectorized": lambda m, x: torch.autograd.functional.hessian(
        lambda x: m(x).sin().sum(), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "hvp": lambda m, x: torch.autograd.functional.hvp(lambda x: m(x).sin().sum(), x, x + 1),
    "vhp": lambda m, x: torch.autograd.functional.vhp(lambda x: m(x).sin().sum(), x, x + 1),
    "jvp": lambda m, x: torch.autograd.functional.jvp(lambda x: m(x).sin(), x, x + 1),
}


@ways(EAGER, {"gradient penalty", "third order", "inner step", "batched", "dual numbers"})
def test_autograd(kind: str, how: str) -> None:
    Case(kind).compare(lambda m, x: EAGER[how](m, x.clone().requires_grad_()))


def saved_on_cpu(m: nn.Module, x: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return gradient_penalty(m, x)


AROUND: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "save_on_cpu": saved_on_cpu,
    "checkpoint": lambda m, x: gradient_penalty(Checkpointed(m), x),
}


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.model, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("kind", ["linear", "blocks", "conv", "partly used"])
@pytest.mark.parametrize("how", AROUND)
def test_what_moves_or_recomputes_what_is_saved(kind: str, how: str) -> None:
    Case(kind).compare(lambda m, x: AROUND[how](m, x.clone().requires_grad_()))


@pytest.mark.parametrize("kind", ["linear", "blocks", "conv", "partly used"])
@pytest.mark.parametrize("trained", [(), ("bias",), ("weight_values",)], ids=["nothing", "bias", "values"])
@pytest.mark.parametrize("how", ["gradient penalty", "third order", "dual numbers"])
def test_what_is_not_trained_costs_no_order(kind: str, trained: tuple[str, ...], how: str) -> None:
    case = Case(kind)
    for model in (case.layer, case.twin):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    case.compare(lambda m, x: EAGER[how](m, x.clone().requires_grad_()))


@pytest.mark.parametrize("kind", ["linear", "blocks", "conv"])
@pytest.mark.parametrize("n_grow", [0, 1])
def test_connections_replaced_before_the_second_backward_pass_are_refused(kind: str, n_grow: int) -> None:
    case = Case(kind)
    layer, x = case.layer, case.x.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
    layer.rewrite(torch.tensor([0]), layer.positions()[:n_grow])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        dx.square().sum().backward()


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: sparselab.SparseLinear(6, 4, sparsity=0.3), (3, 6)),
        (lambda: sparselab.BlockSparseLinear(6, 4, sparsity=0.3, block_shape=(2, 2)), (3, 6)),
        (lambda: sparselab.SparseConv2d(2, 3, 2, sparsity=0.3), (1, 2, 3, 3)),
        (lambda: sparselab.SparseConvTranspose1d(2, 3, 2, sparsity=0.3), (1, 2, 3)),
        (lambda: sparselab.MaskedLinear(6, 4, sparsity=0.3), (3, 6)),
    ],
)
def test_batched_gradients_keep_their_graph_or_are_refused(make: Any, shape: Any, watched: bool) -> None:
    layer, x = make(), torch.randn(shape)
    if watched:
        layer.gradient_hook = lambda operands: None

    def f(x: Tensor) -> Tensor:
        return layer(x).tanh()  # type: ignore[no-any-return]

    plain = torch.autograd.functional.jacobian(f, x, vectorize=True)
    slow = torch.autograd.functional.jacobian(f, x, create_graph=True)
    torch.testing.assert_close(plain, slow)
    try:
        found = torch.autograd.functional.jacobian(f, x, create_graph=True, vectorize=True)
    except RuntimeError as error:
        assert "create_graph must be False" in str(error)  # noqa: PT017
    else:
        wanted = torch.autograd.grad(slow.square().sum(), list(layer.parameters()))
        for ours, theirs in zip(
            torch.autograd.grad(found.square().sum(), list(layer.parameters())), wanted, strict=True
        ):
            torch.testing.assert_close(ours, theirs)
