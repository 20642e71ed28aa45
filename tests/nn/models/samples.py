"""Small models of layers of several classes, whose layers are chosen by keys."""

from __future__ import annotations

from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.attn = nn.MultiheadAttention(12, 2)
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 5)


PARTS = [f"attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
ALL = ["stem", *PARTS, "fc1", "fc2", "head"]


def sparsities(model: nn.Module) -> dict[str, float]:
    return {name: round(each.sparsity, 2) for name, each in model.named_modules() if hasattr(each, "nnz")}


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 7)})
    model["lm_head"].weight = model["embed"].weight
    return model
