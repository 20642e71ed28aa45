"""Whose gradient a backward pass forms: that of a layer's Parameter, or of another leaf in its place."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor

from sparselab.nn.ops.tracing import is_plain


class Hideable(Protocol):
    """How products of a layer are computed, and whether its gradient hook sees their operands."""

    def is_trained(self, leaf: Tensor, indptr: Tensor, indices: Tensor) -> bool:
        """Whether gradients by a leaf of the graph are those of the layer's Parameter."""

    def hidden(self) -> Any:
        """The same, but that no hook sees the operands."""


Form = TypeVar("Form", bound=Hideable)


def leaf_of(node: Any, operand: int) -> Tensor | None:
    """The leaf that an operand of a node of the graph was computed from; None if from several, or unknown.

    Parameters
    ----------
    node : of autograd
        As a Function's ``ctx`` in its backward pass.
    operand : int
        Its number among the tensors that the node was given.
    """
    node = node.next_functions[operand][0]
    while node is not None:
        leaf: Tensor | None = getattr(node, "variable", None)
        if leaf is not None:
            return leaf
        before = [parent for parent, _ in node.next_functions if parent is not None]
        node = before[0] if len(before) == 1 else None
    return None


def may_be_shown(node: Any, operand: int, topology: Any) -> bool:
    """Whether some hook wants to see the operands of the gradient by the values, and may.

    Parameters
    ----------
    node, operand
        As of `leaf_of`: where the values are.
    topology : TensorTopology
    """
    return bool(topology.is_watched and topology.is_trained(leaf_of(node, operand)))


def shown_form(node: Any, operand: int, form: Form, indptr: Tensor, indices: Tensor) -> Form:
    """The form for the backward pass of a node, of which that operand is the layer's values.

    Hidden, if they come from another leaf than the layer's Parameter, as `torch.func.functional_call` puts in
    its place: what makes up that one's gradient is not for the layer to grow by. Where torch traces or
    transforms the pass, this cannot be told.
    """
    leaf = leaf_of(node, operand) if is_plain(indptr, indices) else None
    if leaf is None or form.is_trained(leaf, indptr, indices):
        return form
    hidden: Form = form.hidden()
    return hidden
