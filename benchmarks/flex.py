"""torch's flex_attention as a contender for masks: it is compiled, and its list of blocks made, before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from benchmarks.cases import Case
from benchmarks.contenders import Contender, Inputs, Run, torch_backward_run, torch_run
from benchmarks.sparse_cases import BLOCK, MaskedCase


def find(device: str, what: str) -> list[Contender]:
    """For a pass of `benchmarks.passes`, on a GPU; elsewhere it keeps N x N scores, or has no gradients."""
    if device != "cuda" or not find_spec("torch"):
        return []
    return [contender(device, what, compiled=True)]


def contender(device: str, what: str, compiled: bool) -> Contender:
    def prepare(case: Case, inputs: Inputs) -> Run:
        attend = _attention(case, device, compiled)
        if what == "forward":
            return torch_run(inputs, device, attend)
        return torch_backward_run(inputs, device, attend, with_forward=what == "forward_backward")

    return Contender("torch flex", version("torch"), prepare)


def _attention(case: Case, device: str, compiled: bool) -> Callable[..., Any]:
    import torch
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not isinstance(case, MaskedCase):
        raise ValueError(f"{case.mask}: has no function of indices")
    visible = _function(case, device)
    # Not compiled: that takes minutes.
    blocks = create_block_mask(visible, None, None, case.seqlen, case.seqlen, device=device)
    if compiled:
        torch.compiler.reset()  # else one case after another counts as recompilation, of which there is a limit
        torch._functorch.config.donated_buffer = False  # the graph is kept from sample to sample
        flex_attention = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex_attention(q, k, v, block_mask=blocks, enable_gqa=case.num_heads != case.num_kv_heads)


def _function(case: MaskedCase, device: str) -> Callable[..., Any]:
    """Whether a pair is visible, as torch traces it."""
    import torch

    amount = case.amount
    if case.pattern == "window":
        return lambda batch, head, q, k: (q - k).abs() <= amount
    if case.pattern == "random":
        blocks = torch.from_numpy(case.blocks().copy()).to(device)
        return lambda batch, head, q, k: blocks[q // BLOCK, k // BLOCK]

    def butterfly(batch: Any, head: Any, q: Any, k: Any) -> Any:
        differing = (q // amount) ^ (k // amount)
        return (differing & (differing - 1)) == 0

    return butterfly
