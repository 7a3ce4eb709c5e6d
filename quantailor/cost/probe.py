"""What this machine does in a second: products, passes over memory, and a small training step.

A round times each once; rounds are repeated and medians taken, so that rounds may be interleaved with other work and
one busy moment decides nothing. The table that comes out says, for each operator and size, seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantailor.cost.trace import Tracer
from quantailor.kernels import passes
from quantailor.kernels.ops import IntegerInput, IntegerWeight, int_linear
from quantailor.models.structure import replace
from quantailor.nn.fake_quant import fake_quantized
from quantailor.recipe import Recipe
from quantailor.spec import Scheme

_SHAPES = ((64, 64, 64), (256, 128, 128), (512, 256, 256), (512, 512, 1024), (1024, 1024, 1024))  # M, K, N
_SIZES = (2**12, 2**15, 2**18, 2**21, 2**23)  # elements of a pass
_WIDTH = 256  # of the rows that passes by row see
_SHORT = 2e-3  # seconds of repetition that one timing takes at least


@dataclass(frozen=True)
class Sample:
    """One operator at one size. `work`: flops of a product, bytes moved of a pass."""

    name: str
    dtype: str
    work: int


@dataclass
class Probe:
    """`round()` as often as there is time, then `medians()`."""

    seconds: dict[Sample, list[float]] = field(default_factory=dict)
    steps: dict[str, list[float]] = field(default_factory=dict)

    def round(self) -> None:
        """About ten seconds on one core of a server."""
        for sample, run in _products():
            self.seconds.setdefault(sample, []).append(_timed(run) / (3 if sample.name == "mm" else 1))
        for n in _SIZES:
            for sample, run in _passes(n):
                self.seconds.setdefault(sample, []).append(_timed(run))
        for name, shape in TRAINED.items():
            self.steps.setdefault(name, []).append(training_step(shape))

    def medians(self) -> dict[Sample, float]:
        return {sample: statistics.median(values) for sample, values in self.seconds.items()}

    def step_medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.steps.items()}

    def spread(self) -> float:
        """Half of the middle half of (step / its median): how far the machine's own speed moved while it was probed."""
        values = [v / statistics.median(vs) for vs in self.steps.values() for v in vs]
        if len(values) < 4:
            return 0.0
        low, _, high = statistics.quantiles(values, n=4)
        return (high - low) / 2


def _timed(run: Callable[[], Any]) -> float:
    """Seconds a call, after one that is not counted."""
    run()
    count, took = 0, 0.0
    begin = time.perf_counter()
    while took < _SHORT:
        run()
        count += 1
        took = time.perf_counter() - begin
    return took / count


def _products() -> list[tuple[Sample, Callable[[], Any]]]:
    found: list[tuple[Sample, Callable[[], Any]]] = []
    for m, k, n in _SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            name = str(dtype).removeprefix("torch.")
            c = torch.randn(m, n).to(dtype)
            work = 2 * m * k * n  # forward, and both products of backward, which are as large
            found.append((Sample("mm", name, work), lambda a=a, b=b, c=c: (a @ b.t(), c @ b, c.t() @ a)))  # type: ignore[misc]
        q, w = torch.ones(m, k, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8)
        x_q, w_q = IntegerInput(q, torch.ones(m, 1)), IntegerWeight(w, torch.ones(n, 1), None, None)
        found.append(
            (Sample("int_linear", "float32", 2 * m * k * n), lambda x=x_q, w=w_q: int_linear(x, w, None))  # type: ignore[misc]
        )
        found.append((Sample("_int_mm", "int32", 2 * m * k * n), lambda q=q, w=w: torch._int_mm(q, w.t())))  # type: ignore[misc]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for rows, length in ((1, 32), (4, 64), (4, 256)):
        q4 = torch.randn(rows, 4, length, 32, requires_grad=True)
        flops = 4 * rows * 4 * length * length * 32
        out = F.scaled_dot_product_attention(q4, q4, q4, is_causal=True)
        found.append(
            (
                Sample(attention, "float32", flops),
                lambda q=q4: F.scaled_dot_product_attention(q, q, q, is_causal=True),  # type: ignore[misc]
            )
        )
        given = torch.ones_like(out)
        found.append(
            (
                Sample(f"{attention}_backward", "float32", 5 * flops // 2),
                lambda o=out, q=q4, g=given: torch.autograd.grad(o, q, g, retain_graph=True),  # type: ignore[misc]
            )
        )
    return found


def _passes(n: int) -> list[tuple[Sample, Callable[[], Any]]]:
    x, y, z = (torch.randn(n // _WIDTH, _WIDTH) for _ in range(3))
    square = x.abs() + 1
    weight, shift = torch.ones(_WIDTH), torch.zeros(_WIDTH)
    table = torch.randn(512, _WIDTH)
    index = torch.randint(0, 512, (n // _WIDTH,))
    q = torch.ones(x.shape, dtype=torch.int8)
    scale, groups = torch.ones(x.shape[0], 1), torch.ones(x.shape[0], _WIDTH // 32)
    mean, rstd = torch.zeros(x.shape[0], 1), torch.ones(x.shape[0], 1)
    soft = x.log_softmax(-1)
    aten = torch.ops.aten
    runs: dict[str, Callable[[], Any]] = {
        "mul": lambda: x * y,
        "mul_": lambda: z.mul_(1.0),
        "add": lambda: x + y,
        "add_": lambda: z.add_(0.0),
        "div": lambda: x / 1.5,
        "neg": lambda: -x,
        "pow": lambda: x.pow(2),
        "rsqrt": lambda: square.rsqrt(),
        "sqrt": lambda: square.sqrt(),
        "exp": lambda: x.exp(),
        "tanh": lambda: x.tanh(),
        "silu": lambda: F.silu(x),
        "silu_backward": lambda: aten.silu_backward(x, y),
        "gelu": lambda: F.gelu(x),
        "gelu_backward": lambda: aten.gelu_backward(x, y),
        "_softmax": lambda: x.softmax(-1),
        "_log_softmax": lambda: x.log_softmax(-1),
        "_log_softmax_backward_data": lambda: aten._log_softmax_backward_data(x, soft, -1, torch.float32),
        "native_layer_norm": lambda: F.layer_norm(x, (_WIDTH,), weight, shift),
        "native_layer_norm_backward": lambda: aten.native_layer_norm_backward(
            x, y, [_WIDTH], mean, rstd, weight, shift, [True, True, True]
        ),
        "sum": lambda: x.sum(-1),
        "mean": lambda: x.mean(-1),
        "linalg_vector_norm": lambda: torch.linalg.vector_norm(x),
        "lerp_": lambda: z.lerp_(y, 0.1),
        "addcmul_": lambda: z.addcmul_(x, y, value=0.0),
        "addcdiv_": lambda: z.addcdiv_(x, square, value=0.0),
        "clone": lambda: x.clone(),
        "cat": lambda: torch.cat((x, y)),
        "_to_copy": lambda: x.to(torch.bfloat16),
        "zeros": lambda: torch.zeros(x.shape),
        "native_dropout": lambda: aten.native_dropout(x, 0.1, True),
        "embedding": lambda: F.embedding(index, table),
        "index": lambda: x[index % x.shape[0]],
        "embedding_dense_backward": lambda: aten.embedding_dense_backward(x, index, 512, -1, False),
        "quantize_tokens": lambda: passes.quantize_tokens(x, -128, 127),
        "quantize_weight": lambda: passes.quantize_weight(x, scale, None, 0.0, -128, 127, _WIDTH),
        "fake_quantize_weight": lambda: passes.fake_quantize_weight(x, groups, None, 0.0, -8, 7, 32),
        "lsq_backward": lambda: passes.lsq_backward(x, y, groups, None, 0.0, 0.0, 1.0, -8, 7, 32),
        "fold_scales": lambda: passes.fold_scales(x, None, scale),
        "int8_to_bf16": lambda: passes.int8_to_bf16(q),
    }
    # What a pass of ours reads and writes, in bytes an element: it is called directly, so no dispatch tells.
    own = {
        "quantize_tokens": 5,
        "quantize_weight": 5,
        "fake_quantize_weight": 8,
        "lsq_backward": 12,
        "fold_scales": 8,
        "int8_to_bf16": 3,
    }
    found = []
    for name, run in runs.items():
        if name in own:
            found.append((Sample(name, "float32", own[name] * n), run))
            continue
        with Tracer() as tracer:
            tracer.own((x, y, z, square, weight, shift, table, index, mean, rstd, soft))
            run()
        moved = max((op.moved for op in tracer.trace.ops if op.name == name), default=0)
        if moved:
            found.append((Sample(name, "float32", moved), run))
    return found


@dataclass(frozen=True)
class Shape:
    """A small Llama and its batch."""

    hidden: int
    ffn: int
    layers: int
    vocabulary: int
    rows: int
    length: int
    scheme: str = "w4a16-g32"

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
        )


TRAINED = {
    "nano": Shape(16, 32, 2, 64, 1, 8),  # nothing but calls: what an operator costs before it computes
    "small": Shape(192, 512, 2, 2048, 4, 64),
    "middle": Shape(256, 704, 2, 4096, 4, 128),
}


def training_step(shape: Shape, repeats: int = 3) -> float:
    """Median seconds of a step of plain QAT on the task's loss, AdamW, after one that is not counted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(shape.config).train()
        for name, scheme in Recipe(Scheme.parse(shape.scheme)).assign(model).quantized.items():
            replace(model, name, fake_quantized(model.get_submodule(name), scheme))
        ids = torch.randint(0, shape.vocabulary, (shape.rows, shape.length))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
        return statistics.median([_one(model, ids, optimizer) for _ in range(1 + repeats)][1:])


def _one(model: nn.Module, ids: Tensor, optimizer: torch.optim.Optimizer) -> float:
    begin = time.perf_counter()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits.float(), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - begin
