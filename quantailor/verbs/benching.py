"""`bench`: how fast a packed model answers here, by which kernels, and where it would be faster."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantailor.environment import environment
from quantailor.errors import QuantailorError, UsageError
from quantailor.evaluate import speed
from quantailor.evaluate.measuring import measuring
from quantailor.evaluate.speed import Product, Speed
from quantailor.formats import engines
from quantailor.kernels.native import library as native
from quantailor.kernels.triton import library as gpu
from quantailor.models.dequantize import dequantize_model
from quantailor.models.generation import decoder_of, told
from quantailor.models.loading import device_of
from quantailor.models.serving import serving
from quantailor.progress import Progress
from quantailor.verbs.exporting import export
from quantailor.verbs.model import Model, as_model, default_images, pack

OURS, FLOAT = "quantailor", "float32"
_Rates = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One engine: its speeds by what they count, such as {"prefill tokens": Speed, "decode tokens": Speed}."""

    engine: str
    speeds: dict[str, Speed]
    bytes_a_token: int | None = None
    gb_per_s: float | None = None

    @property
    def share_of_limit(self) -> float | None:
        """How much of what this memory reads decoding used; None where no token is decoded."""
        if self.bytes_a_token is None or self.gb_per_s is None or "decode tokens" not in self.speeds:
            return None
        return self.speeds["decode tokens"].median * self.bytes_a_token / 1e9 / self.gb_per_s


@dataclass(frozen=True)
class Bench:
    """What was measured, all in one run on one machine; `left_out`: what was not, and why."""

    task: str
    scheme: str
    rows: list[Row]
    products: list[Product]
    memory_gb_per_s: float
    native: str
    threads: int
    load: float
    rounds: int
    left_out: dict[str, str]
    decoding: str = ""  # how a token is made, of a language model

    @property
    def fastest(self) -> dict[str, str]:
        """What is counted -> the engine to serve it with, by the median of this run."""
        counted = {name for row in self.rows for name in row.speeds}
        having = {name: [row for row in self.rows if name in row.speeds] for name in sorted(counted)}
        return {name: max(rows, key=lambda r: r.speeds[name].median).engine for name, rows in having.items()}

    def to_json(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            speeds = {name: dataclasses.asdict(value) for name, value in row.speeds.items()}
            share = row.share_of_limit
            rows.append({"engine": row.engine, "per_second": speeds, "bytes_a_token": row.bytes_a_token}
                        | ({} if share is None else {"share_of_limit": share}))  # fmt: skip
        return {
            "task": self.task,
            "scheme": self.scheme,
            "rows": rows,
            "fastest": self.fastest,
            "products": [dataclasses.asdict(p) | {"is_fastest": p.is_fastest} for p in self.products],
            "memory_gb_per_s": self.memory_gb_per_s,
            "native_kernels": self.native,
            "decoding": self.decoding,
            "threads": self.threads,
            "load_before": self.load,
            "rounds": self.rounds,
            "left_out": self.left_out,
            "environment": environment(),
        }


def bench(
    model: str | Path | Model,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batches: tuple[int, ...] = (1, 32),
    rounds: int = 3,
    with_float: bool = True,
    with_engines: bool = True,
    progress: Progress | None = None,
) -> Bench:
    """Time a packed model, the same model in float32, and the ONNX file made of it, in turn and in one run.

    A language model reads `prompt_tokens` and makes `new_tokens`, one row; any other gets rows of `prompt_tokens` in
    each of `batches`. Raises: UsageError where the model is float, or the sizes cannot be.
    """
    if min(prompt_tokens, rounds, *batches) < 1 or new_tokens < 2:
        raise UsageError(
            f"prompt_tokens={prompt_tokens}, new_tokens={new_tokens}, batches={batches}, rounds={rounds}: "
            "use 1 or more, and 2 or more new tokens"
        )
    ready = as_model(model)
    if ready.state is None:
        raise UsageError("the model is float, and bench shows what quantizing gave; quantize it first")
    ready = ready if ready.is_packed else pack(ready)
    longest = getattr(ready.model.config, "max_position_embeddings", None)
    needed = prompt_tokens + (new_tokens if ready.task == "lm" else 0)
    if isinstance(longest, int) and needed > longest and ready.task != "images":
        raise UsageError(f"{needed} tokens are more than the model's {longest} positions; ask for fewer")
    load = os.getloadavg()[0]
    left_out: dict[str, str] = {}
    bars = progress or Progress()
    with ExitStack() as stack:
        device = stack.enter_context(measuring(ready.model)).type
        runs: dict[str, Callable[[], _Rates]] = {OURS: _torch_run(ready, prompt_tokens, new_tokens, batches, True)}
        sizes = {OURS: speed.bytes_a_token(ready.model)}
        if with_float:
            plain = dataclasses.replace(ready, model=copy.deepcopy(ready.model))
            dequantize_model(plain.model)
            runs[FLOAT] = _torch_run(plain, prompt_tokens, new_tokens, batches, False)
            sizes[FLOAT] = speed.bytes_a_token(plain.model)
        else:
            left_out[FLOAT] = "not asked for"
        if with_engines and device != "cpu":
            left_out |= dict.fromkeys(engines.PACKAGES, f"runs on the CPU here, and the model is on {device}")
        elif with_engines:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            made = _engine_runs(ready, folder, left_out, prompt_tokens, new_tokens, batches)
            runs |= made
        else:
            left_out |= dict.fromkeys(engines.PACKAGES, "not asked for")
        gb_per_s = speed.memory_gb_per_s(device=device)
        found = _in_turn(runs, rounds, bars, left_out)
        rows_of_shapes = (1, prompt_tokens) if ready.task == "lm" else tuple(b * prompt_tokens for b in batches)
        products = speed.products(ready.model, tuple(dict.fromkeys(rows_of_shapes)))
    decodes = ready.task == "lm"
    way = ""
    if decodes:
        with torch.inference_mode(), serving(ready.model):
            way = told(decoder_of(ready.model)[1])
    return Bench(
        ready.task,
        str(ready.state.scheme) if ready.state is not None else "",
        [Row(name, found[name], sizes.get(name) if decodes else None, gb_per_s) for name in found],
        products,
        gb_per_s,
        _own_kernels(device),
        torch.get_num_threads(),
        load,
        rounds,
        left_out,
        way,
    )


def _own_kernels(device: str) -> str:
    """Whether machine code of ours runs on a device of this type, or why not."""
    if device == "cuda":
        return gpu.why_not(device) or "Triton's, made for this GPU"
    return native.why_not() or "built for this processor"


def _in_turn(
    runs: dict[str, Callable[[], _Rates]], rounds: int, bars: Progress, left_out: dict[str, str]
) -> dict[str, dict[str, Speed]]:
    """Every contestant once a round, the order turned round by round, after one round that does not count."""
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    with bars.task("timing", (rounds + 1) * len(runs)) as advance:
        for turn in range(rounds + 1):
            for name in list(runs)[:: 1 if turn % 2 else -1]:
                if name in left_out:
                    advance(1)
                    continue
                try:
                    result = runs[name]()
                except (RuntimeError, ValueError) as error:  # another engine's own failure
                    if name in (OURS, FLOAT):
                        raise
                    left_out[name] = f"could not run the file: {' '.join(str(error).split())[:200]}"
                    continue
                if turn:
                    for counted, values in result.items():
                        rates[name].setdefault(counted, []).extend(values)
                advance(1)
    return {
        name: {counted: Speed.of(values) for counted, values in found.items()} for name, found in rates.items() if found
    }


def _prompt(model: Model, tokens: int, batch: int = 1) -> Tensor:
    vocab = int(model.model.config.vocab_size)
    return (torch.arange(batch * tokens) * 7919 % max(1, vocab - 1) + 1).clamp(max=vocab - 1).reshape(batch, tokens)


def _inputs(model: Model, tokens: int, batch: int) -> dict[str, Tensor]:
    if model.task == "images":
        images = default_images(model.model.config)["pixel_values"][:1]
        return {"pixel_values": images.repeat(batch, 1, 1, 1)}
    ids = _prompt(model, tokens, batch)
    takes_types = getattr(model.model.config, "type_vocab_size", 0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
        {"token_type_ids": torch.zeros_like(ids)} if takes_types else {}
    )


def _torch_run(
    model: Model, prompt_tokens: int, new_tokens: int, batches: tuple[int, ...], served: bool
) -> Callable[[], _Rates]:
    timed, device = speed.serving_speed if served else speed.generation_speed, device_of(model.model)

    def generate(prompt: Tensor, tokens: int) -> tuple[float, float]:
        return timed(model.model, prompt.to(device), tokens)

    def one_pass(inputs: dict[str, Tensor]) -> Any:
        return model.model(**{name: value.to(device) for name, value in inputs.items()})

    def around() -> AbstractContextManager[Any]:
        return serving(model.model) if served else nullcontext()

    return _run(model, prompt_tokens, new_tokens, batches, generate, one_pass, around)


def _run(
    model: Model,
    prompt_tokens: int,
    new_tokens: int,
    batches: tuple[int, ...],
    generate: Callable[[Tensor, int], tuple[float, float]],
    one_pass: Callable[[dict[str, Tensor]], Any],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[], _Rates]:
    """A round: `generate` where the model makes text, else `one_pass` of each batch, within `around()`."""
    if model.task == "lm":
        prompt = _prompt(model, prompt_tokens)

        def generated() -> _Rates:
            prefill, decoding = generate(prompt, new_tokens)
            return {"prefill tokens": [prefill], "decode tokens": [decoding]}

        return generated

    def passed() -> _Rates:
        rates = {}
        for batch in batches:
            inputs = _inputs(model, prompt_tokens, batch)
            with around():
                rates[f"examples at batch {batch}"] = [batch / speed.seconds_of(partial(one_pass, inputs), 0.0)]
        return rates

    return passed


def _engine_runs(
    model: Model,
    folder: Path,
    left_out: dict[str, str],
    prompt_tokens: int,
    new_tokens: int,
    batches: tuple[int, ...],
) -> dict[str, Callable[[], _Rates]]:
    """The engines that are installed and take the file; the others go to `left_out`, with the reason."""
    installed = engines.available()
    for name, package in engines.PACKAGES.items():
        if name not in installed:
            left_out[name] = f"not installed: pip install {package}"
    if not installed:
        return {}
    form = "onnx-cache" if model.task == "lm" else "onnx"
    try:
        export(model, folder / "exported", [form])
    except QuantailorError as error:
        left_out |= dict.fromkeys(installed, f"no file for it: {error}")
        return {}
    file = next((folder / "exported").rglob("*.onnx"))
    runs: dict[str, Callable[[], _Rates]] = {}
    for name in installed:
        try:
            engine = engines.Engine(name, file)
        except RuntimeError as error:
            left_out[name] = f"does not take the file: {' '.join(str(error).split())[:200]}"
            continue
        runs[name] = _run(model, prompt_tokens, new_tokens, batches, engine.generation_speed, engine)
    return runs
