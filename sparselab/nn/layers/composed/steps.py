"""One step in time of recurrent networks, given what the input has added to the gates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: What is carried from step to step, the output first: each (batch, hidden_size).
State = tuple[Tensor, ...]
#: From the state's output to the gates.
Hidden = Callable[[Tensor], Tensor]
#: The next state, of the gates of the input (batch, gates * hidden_size), `Hidden`, and the state.
Step = Callable[[Tensor, Hidden, State], State]


def gru(gates: Tensor, hidden: Hidden, state: State) -> State:
    """As `torch.nn.GRU`: gates are reset, update and new, in this order."""
    (h,) = state
    reset, update, new = gates.chunk(3, 1)
    h_reset, h_update, h_new = hidden(h).chunk(3, 1)
    z = torch.sigmoid(update + h_update)
    n = torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new)
    return ((1 - z) * n + z * h,)


def lstm(gates: Tensor, hidden: Hidden, state: State) -> State:
    """As `torch.nn.LSTM`: gates are input, forget, cell and output, in this order."""
    h, c = state
    i, f, g, o = (gates + hidden(h)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def rnn_tanh(gates: Tensor, hidden: Hidden, state: State) -> State:
    """As `torch.nn.RNN`."""
    return (torch.tanh(gates + hidden(state[0])),)


def rnn_relu(gates: Tensor, hidden: Hidden, state: State) -> State:
    """As `torch.nn.RNN` of nonlinearity "relu"."""
    return (torch.relu(gates + hidden(state[0])),)


def forwards(step: Step, gates: Tensor, sizes: list[int], hidden: Hidden, state: State) -> list[State]:
    """States of all steps, and last the final one of each sequence.

    Parameters
    ----------
    step : callable
    gates : (sum of sizes, gates * hidden_size)
        Step after step.
    sizes : list of int
        How many sequences each step has, which never grows: the longest come first.
    hidden : callable
    state : tuple of (sizes[0], hidden_size)
    """
    states, ended = [], []
    for gates_now, n in zip(torch.split(gates, sizes), sizes, strict=True):
        if n < len(state[0]):
            ended.append(tuple(each[n:] for each in state))
            state = tuple(each[:n] for each in state)
        state = step(gates_now, hidden, state)
        states.append(state)
    final = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return [*states, final]


def backwards(step: Step, gates: Tensor, sizes: list[int], hidden: Hidden, state: State) -> list[State]:
    """As `forwards`, from the last step of each sequence to the first."""
    states: list[State] = []
    now = tuple(each[:0] for each in state)
    for gates_now, n in zip(reversed(torch.split(gates, sizes)), reversed(sizes), strict=True):
        if n > (m := len(now[0])):
            now = tuple(torch.cat((each, first[m:n])) for each, first in zip(now, state, strict=True))
        now = step(gates_now, hidden, now)
        states.append(now)
    return [*reversed(states), now]
