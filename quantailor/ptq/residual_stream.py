"""Which modules read and write the residual stream, found by watching one run: what a rotation of it needs to know.

No table of architectures. A model that is no chain of pre-norm blocks between embeddings and an RMSNorm with a head, or
a norm that is no RMSNorm, is Unfit, with the reason in a line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantailor.models.prepare import FAKE_QUANT
from quantailor.models.structure import blocks, modules_of


class Unfit(Exception):
    """Why a model or a block cannot be rotated exactly."""


@dataclass(frozen=True)
class BlockPlan:
    """A block's part, by names inside it. `norms`: each residual norm with the Linears that read it."""

    norms: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    values: tuple[tuple[str, str, int], ...]  # (v_proj, o_proj, elements a head)

    @property
    def stream(self) -> tuple[str, ...]:
        """Every Linear that reads or writes the residual stream."""
        return (*(name for readers in self.norms.values() for name in readers), *self.writers)


@dataclass(frozen=True)
class Ends:
    """What stands before and after the blocks, by name; `readers` take the last norm's output."""

    embeddings: tuple[str, ...]
    norm: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """One call of a module: its first tensor in, its first tensor out."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor

    def inside(self, prefix: str) -> Call:
        return dataclasses.replace(self, name=self.name.removeprefix(f"{prefix}."))


@torch.no_grad()
def plan_model(model: nn.Module, run: Callable[[], Any]) -> tuple[list[BlockPlan], Ends, int]:
    """The plan of each block, that of the ends, and the width of the residual stream, from one run of the model.

    Raises: Unfit where the model is not a chain of pre-norm blocks between embeddings and an RMSNorm with a head.
    """
    chain = blocks(model)
    if not chain[0][0]:
        raise Unfit("it has no repeated blocks")
    calls = watch(model, run, {id(block) for _, block in chain})
    order = [call for call in calls if any(call.module is block for _, block in chain)]
    if [id(call.module) for call in order] != [id(block) for _, block in chain]:
        raise Unfit("its blocks do not run once each, in order")
    for (name, _), last, call in zip(chain[1:], order, order[1:]):
        if not _same(last.output, call.input):
            raise Unfit(f"{name} does not work on the output of the block before it")
    width = order[0].input.shape[-1]
    plans = [
        _plan(block, [c.inside(prefix) for c in calls if c.name.startswith(f"{prefix}.")], width)
        for prefix, block in chain
    ]
    prefixes = tuple(f"{prefix}." for prefix, _ in chain)
    outside = [c for c in calls if not f"{c.name}.".startswith(prefixes)]
    ends = _plan_ends(outside, order[-1].output, width)
    _check_shared(model, chain, plans, ends)
    return plans, ends, width


@torch.no_grad()
def plan_block(block: nn.Module, run: Callable[[], Any]) -> BlockPlan:
    """One block's plan, from one run of it alone. Raises: Unfit."""
    calls = watch(block, run, {id(block)})
    width = next(c for c in calls if c.module is block).input.shape[-1]
    return _plan(block, [c for c in calls if c.module is not block], width)


def watch(root: nn.Module, run: Callable[[], Any], also: set[int]) -> list[Call]:
    """Calls of all modules with parameters of their own, and of those whose ids are in `also`, in order of their end.

    Tensors are kept, so that no two of them have the same memory unless one is a view of the other.
    """
    calls: list[Call] = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            first = next((a for a in (*args, kwargs.get("hidden_states"), *kwargs.values()) if is_tensor(a)), None)
            out = result[0] if isinstance(result, tuple) else result
            if first is not None and is_tensor(out):
                calls.append(Call(name, module, first, out))

        return hook

    handles = []
    for name, module in _modules(root):
        if id(module) in also or any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(hook_for(name), with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def value_pairs(block: nn.Module) -> tuple[tuple[str, str, int], ...]:
    """(v_proj, o_proj, elements a head) of each attention in a block that names its layers so."""
    found = []
    for name, module in block.named_modules():
        value = getattr(module, "v_proj", None)
        output, child = next(((o, c) for c in ("o_proj", "out_proj") if (o := getattr(module, c, None))), (None, ""))
        size = getattr(module, "head_dim", None)
        if isinstance(value, nn.Linear) and isinstance(output, nn.Linear) and isinstance(size, int) and size > 1:
            prefix = f"{name}." if name else ""
            if value.out_features % size == 0 and output.in_features % size == 0:
                found.append((f"{prefix}v_proj", f"{prefix}{child}", size))
    return tuple(found)


def _modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all modules but the quantizers inside fake-quantized layers."""
    inside = tuple(f"{name}." for name, _ in modules_of(root, FAKE_QUANT))
    yield from ((name, module) for name, module in root.named_modules() if not name.startswith(inside))


def _plan(block: nn.Module, calls: Sequence[Call], width: int) -> BlockPlan:
    """`calls`: those of the block's own modules, named from the block."""
    for name, module in _modules(block):
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3:
                raise Unfit(f"{name} holds a fused 3-D tensor {list(parameter.shape)}, as experts are stored")
    if len({c.name for c in calls}) != len(calls):
        raise Unfit("a module inside a block runs more than once")
    norms: dict[str, tuple[str, ...]] = {}
    for call in calls:
        if _is_gain(call, width):
            _check_rms_norm(call.name, call.module)
            norms[call.name] = _readers(call, calls)
    if not norms:
        raise Unfit("a block has no norm of the residual stream")
    reading = {name for readers in norms.values() for name in readers}
    writers = tuple(
        c.name
        for c in calls
        if isinstance(c.module, nn.Linear) and c.module.out_features == width and c.name not in reading
    )
    return BlockPlan(norms, writers, value_pairs(block))


def _plan_ends(calls: Sequence[Call], last: Tensor, width: int) -> Ends:
    """`calls`: those of modules outside the blocks; `last`: the last block's output."""
    tables = tuple(c.name for c in calls if isinstance(c.module, nn.Embedding) and c.module.embedding_dim == width)
    norm = next((c for c in calls if _is_gain(c, width) and _same(c.input, last)), None)
    if norm is not None:
        _check_rms_norm(norm.name, norm.module)
    for call in calls:
        if call.name not in tables and (norm is None or (call is not norm and not _same(call.input, norm.output))):
            if _is_gain(call, width):
                _check_rms_norm(call.name, call.module)
            kind = type(call.module).__name__
            raise Unfit(f"{call.name}, a {kind}, is neither embedding nor last norm nor a head that reads it")
    if norm is None or not tables:
        raise Unfit("no embedding as wide as the residual stream" if norm else "no norm reads the last block's output")
    return Ends(tuple(dict.fromkeys(tables)), norm.name, _readers(norm, calls))


def _check_shared(
    model: nn.Module, chain: Sequence[tuple[str, nn.Module]], plans: Sequence[BlockPlan], ends: Ends
) -> None:
    """Raises: Unfit if two modules share a weight that would be turned twice; embedding and head may share theirs."""
    names = [f"{prefix}.{name}" for (prefix, _), plan in zip(chain, plans) for name in (*plan.norms, *plan.stream)]
    owner: dict[int, str] = {}
    for name in (*names, *ends.embeddings, ends.norm):
        first = owner.setdefault(id(model.get_submodule(name).weight), name)
        if first != name:
            raise Unfit(f"{first} and {name} share one weight")
    for name in ends.readers:
        first = owner.get(id(model.get_submodule(name).weight), name)
        if first != name and first not in ends.embeddings:
            raise Unfit(f"{first} and {name} share one weight")


def _readers(norm: Call, calls: Sequence[Call]) -> tuple[str, ...]:
    """The Linears that read a norm's output. Raises: Unfit if there are none, or other modules do."""
    found = [c for c in calls if c is not norm and _same(c.input, norm.output)]
    if not found:
        raise Unfit(f"no Linear reads the output of {norm.name}, so its gain cannot be folded")
    for call in found:
        if not isinstance(call.module, nn.Linear):
            raise Unfit(f"{call.name}, a {type(call.module).__name__}, reads {norm.name}; only Linears can be rotated")
    return tuple(c.name for c in found)


def _is_gain(call: Call, width: int) -> bool:
    """Whether a module works on the residual stream element by element: it has vectors of its width and no matrix."""
    own = list(call.module.parameters(recurse=False))
    return call.input.shape == call.output.shape and all(p.shape == (width,) for p in own) and len(own) > 0


def _check_rms_norm(name: str, norm: nn.Module) -> None:
    """Raises: Unfit unless `norm` is x / rms(x) times a gain, and that gain its weight or 1 + its weight."""
    kind = type(norm).__name__
    if [n for n, _ in norm.named_parameters(recurse=False)] != ["weight"] or isinstance(norm, nn.LayerNorm):
        raise Unfit(f"{name} is a {kind}, not an RMSNorm: its mean and bias do not survive a rotation")
    if gain_offset(norm) is None:
        raise Unfit(f"{name} is a {kind} that does not compute x / rms(x) times its gain")


def gain_offset(norm: Any) -> float | None:
    """0 where a norm multiplies by its weight, 1 where by 1 + its weight, None where by neither."""
    weight = norm.weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = (1 + torch.randn(8, len(weight), generator=generator)).to(weight.device, weight.dtype)
    unit = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    y = norm(x).double()
    limit = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    for offset in (0.0, 1.0):
        expected = unit * (offset + weight.double())
        if difference(expected, y) < limit:
            return offset
    return None


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference, of the largest expected value; NaN if any value is."""
    top = (expected.double() - found.double()).abs().max()
    return float(top / expected.double().abs().max().clamp(min=1e-30))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same numbers in the same memory, seen in whatever shape."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
