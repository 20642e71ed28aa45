"""PyTorch's own cases for its modules, of sparse layers without a zero: everything is as of the dense module.

What is asked of each case is what ``test/test_modules.py`` of torch asks.
"""

from __future__ import annotations

import copy
import io
import pickle
from inspect import signature
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

import sparselab
from sparselab.nn.layers.kinds import kind_names, kinds_named

cases = pytest.importorskip("torch.testing._internal.common_modules", reason="needs expecttest")

SPARSE = {
    nn.Linear: sparselab.SparseLinear,
    nn.Conv1d: sparselab.SparseConv1d,
    nn.Conv2d: sparselab.SparseConv2d,
    nn.Conv3d: sparselab.SparseConv3d,
    nn.ConvTranspose1d: sparselab.SparseConvTranspose1d,
    nn.ConvTranspose2d: sparselab.SparseConvTranspose2d,
    nn.ConvTranspose3d: sparselab.SparseConvTranspose3d,
    nn.MultiheadAttention: sparselab.SparseMultiheadAttention,
    nn.Embedding: sparselab.SparseEmbedding,
    nn.RNN: sparselab.SparseRNN,
    nn.GRU: sparselab.SparseGRU,
    nn.LSTM: sparselab.SparseLSTM,
}
INFOS = {info.module_cls: info for info in cases.module_db if info.module_cls in SPARSE}


def cases_of(cls: Any, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> list[Any]:
    """Those that there can be: sparse networks make no projections of their states."""
    info = INFOS[cls]
    found = info.module_inputs_func(info, "cpu", dtype, requires_grad=requires_grad, training=True)
    return [case for case in found if not case.constructor_input.kwargs.get("proj_size")]


N_CASES = {cls: len(cases_of(cls)) for cls in INFOS}


def case_of(cls: Any, number: int, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any, Any]:
    """The dense module of a case, the sparse one with its weights, and what both are called with."""
    torch.manual_seed(number)
    case = cases_of(cls, dtype, requires_grad=True)[number]
    dense = cls(*case.constructor_input.args, **case.constructor_input.kwargs, dtype=dtype)
    sparse = sparselab.sparsify(nn.Sequential(copy.deepcopy(dense)), 0.0, init="magnitude")[0]
    assert type(sparse) is SPARSE[cls]
    return dense, sparse, case.forward_input.args, case.forward_input.kwargs


def tensors(tree: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def floating(tree: Any) -> list[Tensor]:
    return [each for each in tensors(tree) if each.is_floating_point()]


def dense_gradients(sparse: nn.Module, dense: nn.Module) -> list[Tensor]:
    """Of the sparse module, by the names and shapes of the dense one's Parameters."""
    twin = sparselab.densify(nn.Sequential(sparse))[0]
    return [twin.get_parameter(name) for name, _ in dense.named_parameters()]


def results(module: nn.Module, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients by the inputs, of numbers that are fixed."""
    args, kwargs = pytree.tree_map(
        lambda x: x.detach().clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x,
        (args, kwargs),
    )
    outputs = [each for each in tensors(module(*args, **kwargs)) if each.requires_grad]
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, dtype=y.dtype, generator=generator)).sum() for y in outputs)
    loss.backward()
    return outputs, [x.grad for x in floating((args, kwargs))]


#: Many cases of one module differ little: four of each are tried in every run.
STRIDES = {cls: -(-n_cases // 4) | 1 for cls, n_cases in N_CASES.items()}
each_case = pytest.mark.parametrize(
    ("cls", "number"),
    [
        pytest.param(
            cls, number, id=f"{cls.__name__}-{number}", marks=[pytest.mark.slow] * bool(number % STRIDES[cls])
        )
        for cls, n_cases in N_CASES.items()
        for number in range(n_cases)
    ],
)


def test_importing_them_leaves_the_settings_of_hypothesis(pytestconfig: pytest.Config) -> None:
    ours = settings.get_profile(pytestconfig.getoption("--hypothesis-profile") or "repeatable")
    assert settings().max_examples == ours.max_examples
    assert settings().derandomize


def test_every_module_has_cases() -> None:
    assert INFOS.keys() == SPARSE.keys()
    assert min(N_CASES.values()) > 1


def test_what_has_no_case_is_refused() -> None:
    with pytest.raises(ValueError, match="proj_size must be 0"):
        sparselab.SparseLSTM(2, 3, proj_size=2, sparsity=0.0)
    with pytest.raises(ValueError, match="projections"):
        sparselab.sparsify(nn.Sequential(nn.LSTM(2, 3, proj_size=2)), 0.0)


REPLACED = [
    *SPARSE.items(),
    *((dense, kind.cls) for name in kind_names() for kind in kinds_named(name) for dense in kind.dense_types),
]


@pytest.mark.parametrize(("dense", "sparse"), REPLACED)
def test_forward_takes_what_torchs_does(dense: Any, sparse: Any) -> None:
    assert list(signature(sparse.forward).parameters) == list(signature(dense.forward).parameters)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_grad(cls: Any, number: int, dtype: torch.dtype) -> None:
    dense, sparse, args, kwargs = case_of(cls, number, dtype)
    close = {} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for ours, theirs in zip(results(sparse, args, kwargs), results(dense, args, kwargs), strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    before = {name: p.detach().clone() for name, p in dense.named_parameters()}
    for module in (dense, sparse):
        torch.optim.SGD(module.parameters(), lr=1.0).step()
    for name, ours in zip(before, dense_gradients(sparse, dense), strict=True):
        torch.testing.assert_close(ours, dense.get_parameter(name), **close)
    assert any(not torch.equal(p, before[name]) for name, p in dense.named_parameters())


@each_case
def test_gradcheck_and_gradgradcheck(cls: Any, number: int) -> None:
    _, sparse, args, kwargs = case_of(cls, number)
    parameters = tuple(sparse.parameters())
    leaves, spec = pytree.tree_flatten((args, kwargs))
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    inputs = tuple(leaves[i].detach().clone().requires_grad_() for i in where)

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        for i, x in zip(where, given[: len(where)], strict=True):
            leaves[i] = x
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return tuple(y for y in tensors(sparse(*args, **kwargs)) if y.requires_grad)

    assert gradcheck(call, (*inputs, *parameters), fast_mode=True)
    if INFOS[cls].supports_gradgrad:
        assert gradgradcheck(call, (*inputs, *parameters), fast_mode=True)


@each_case
def test_non_contiguous_inputs_and_output_gradients(cls: Any, number: int) -> None:
    _, sparse, args, kwargs = case_of(cls, number)
    expected = results(sparse, args, kwargs)

    def spread(x: Any) -> Any:
        return torch.stack([x, x], -1)[..., 0] if isinstance(x, Tensor) else x

    given, named = pytree.tree_map(spread, (args, kwargs))
    assert not all(x.is_contiguous() for x in tensors((given, named)))
    sparse.zero_grad()
    for ours, theirs in zip(results(sparse, given, named), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_case
def test_copies_files_and_states(cls: Any, number: int) -> None:
    _, sparse, args, kwargs = case_of(cls, number)
    expected, _ = results(sparse, args, kwargs)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    other = case_of(cls, number)[1]
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.25)
    other.load_state_dict(sparse.state_dict())
    twins = copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), torch.load(file, weights_only=False)
    for twin in (*twins, other):
        assert repr(twin) == repr(sparse)
        for ours, theirs in zip(results(twin, args, kwargs)[0], expected, strict=True):
            assert torch.equal(ours, theirs)


@each_case
def test_constructor(cls: Any, number: int) -> None:
    """The same arguments, the dtype and the device of its factory, and both modes."""
    info, case = INFOS[cls], cases_of(cls)[number]
    dense = cls(*case.constructor_input.args, **case.constructor_input.kwargs, dtype=torch.float64)
    settings = {"sparsity": 0.0, "dtype": torch.float64, "device": "cpu"}
    sparse = SPARSE[cls](*case.constructor_input.args, **case.constructor_input.kwargs, **settings)
    assert {p.dtype for p in sparse.parameters()} == {torch.float64}
    assert sum(p.numel() for p in sparse.parameters()) == sum(p.numel() for p in dense.parameters())
    if not info.train_and_eval_differ:
        outputs = []
        for training in (True, False):
            sparse.train(training)
            outputs.append(tensors(sparse(*case.forward_input.args, **case.forward_input.kwargs)))
        for ours, theirs in zip(*outputs, strict=True):
            assert torch.equal(ours, theirs)
    meta = SPARSE[cls](
        *case.constructor_input.args, **case.constructor_input.kwargs, **(settings | {"device": "meta"})
    )
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert repr(meta) == repr(sparse)


@each_case
def test_casts(cls: Any, number: int) -> None:
    dense, sparse, args, kwargs = case_of(cls, number)

    def narrow(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    given = pytree.tree_map(narrow, (args, kwargs))
    for cast in (lambda m: m.float(), lambda m: m.to(torch.float32), lambda m: m.to("cpu", torch.float32)):
        ours, theirs = cast(copy.deepcopy(sparse)), cast(copy.deepcopy(dense))
        for a, b in zip(results(ours, *given)[0], results(theirs, *given)[0], strict=True):
            assert a.dtype is torch.float32
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d, nn.ConvTranspose3d])
def test_memory_formats(cls: Any) -> None:
    dense, sparse, (x,), _ = case_of(cls, 0)
    memory_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    x = x.detach().to(memory_format=memory_format)
    for ours, theirs in zip(results(sparse, (x,), {}), results(dense, (x,), {}), strict=True):
        torch.testing.assert_close(ours, theirs)
