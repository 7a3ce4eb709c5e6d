"""What looks and measures: `evaluate`, `check`, `adequacy`, `generate`."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from quantailor import ptq
from quantailor.data.encode import encode, start_token
from quantailor.data.examples import Examples
from quantailor.data.loading import Data
from quantailor.errors import UntrustedInput, UsageError
from quantailor.evaluate.adequacy import Adequacy, Solve, examine
from quantailor.evaluate.parity import Parity, compare
from quantailor.evaluate.run import evaluate as measure
from quantailor.formats import folder as folders
from quantailor.formats.probe import stored_probe
from quantailor.models.generation import continued, decoder_of, told
from quantailor.models.loading import (
    device_of,
)
from quantailor.models.prepare import unpack_model
from quantailor.models.serving import serving
from quantailor.nn.weight_quantizer import WeightQuantizer
from quantailor.numerics.measures import relative_max_difference
from quantailor.progress import Progress
from quantailor.ptq.chain import Chain
from quantailor.ptq.statistics import Statistics
from quantailor.spec import Scheme
from quantailor.verbs.model import (
    Model,
    Result,
    as_model,
    check_comparable,
    default_probe,
    examples_for,
    is_foreign,
    load,
)


def adequacy(
    model: str | Path | Model,
    data: Data | Examples,
    *,
    eval_data: Data | Examples | None = None,
    scheme: str | Scheme = "w4a16-g32",
    method: str = "gptq",
    samples: int = 128,
    context: int = 256,
    seed: int = 0,
    at_most: int | None = None,
    progress: Progress | None = None,
) -> Adequacy:
    """Whether the calibration rows that `quantize` would draw are enough for `scheme`, and of the right kind.

    `eval_data`: what the quantized model will be measured on; without it the model's own expectations are all there is
    to compare with. `at_most` looks at so many rows only, and extrapolates. Nothing is quantized.
    Raises: UsageError, UntrustedInput as the parts do.
    """
    source = as_model(model)
    if source.state is not None:
        raise UsageError("the model is quantized already; judge calibration data with its float parent")
    if not 0 <= seed < 2**31:
        raise UsageError(f"seed={seed} must be 0 or more and below 2^31")
    solve = _solver(scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme), ptq.method(method))
    calibration = examples_for(source, data, context=context)
    evaluation = None if eval_data is None else examples_for(source, eval_data, context=context)
    with (progress or Progress()).counted("looking at rows") as report:
        return examine(
            source.model,
            calibration,
            evaluation=evaluation,
            solve=solve,
            solver=method,
            samples=samples,
            seed=seed,
            at_most=at_most,
            progress=report,
            **({} if at_most is None else {"splits": 2, "max_layers": 2}),
        )


def _solver(scheme: Scheme, method: Chain) -> Solve:
    """`method`'s answer for one weight and one X^T X, back on real numbers; a float path counts as unchanged."""
    spec = scheme.weight
    if spec is None:
        raise UsageError(f"scheme {scheme} leaves weights in float, and nothing is calibrated for them; name another")

    def solve(weight_ON: Tensor, hessian_NN: Tensor, num_rows: int) -> Tensor:
        statistics = Statistics(hessian_NN.diagonal().clone(), hessian_NN, hessian_NN, num_rows)
        found = method.solve(weight_ON, statistics, spec)
        quantizer = WeightQuantizer(spec, weight_ON.shape[0], weight_ON.shape[1], weight_ON.device)
        quantizer.set_scale(found.scale, found.zero_point)
        return quantizer.dequantize(found.q).detach()

    return solve


def evaluate(
    model: str | Path | Model,
    data: Data | Examples,
    *,
    reference: str | Path | Model | None = None,
    context: int = 256,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Perplexity of a language model, accuracy of a classifier, or F1 and exact match of answers out of a text, with a
    95 % interval; against `reference` also KL and agreement. Raises: UsageError, UntrustedInput as the parts do."""
    ready = as_model(model)
    early = limit if ready.task == "qa" else None  # cutting texts into windows is what takes long there
    examples = examples_for(ready, data, context=context, limit=early)
    other = as_model(reference) if reference is not None else None
    if other is not None:
        check_comparable(ready, other, "reference")
    bar = progress or Progress()
    with bar.counted("evaluating") as report:
        return measure(ready.model, examples, reference=other.model if other else None, limit=limit, progress=report)


def check(path: str | Path) -> Parity:
    """Prove that a saved folder serves what was trained.

    Every layer's integers and scales are held against the digests that the simulated model had when it was packed;
    then both executions of the folder run on the probe, layer by layer, and the simulated model's own logits of that
    day are compared as well. A folder or GGUF file that others made has no such digests: there both executions of
    what was read are held against each other.
    """
    if is_foreign(Path(path)):
        return _check_foreign(Path(path))
    loaded = folders.read_folder(Path(path))
    simulated = unpack_model(copy.deepcopy(loaded.model))
    stored = stored_probe(Path(path), loaded.model.config)
    probe = stored[0] if stored else default_probe(Model(loaded.model, loaded.tokenizer, loaded.task))
    parity = compare(simulated, loaded.model, probe, expected=folders.expected_digests(loaded.receipt))
    if stored is None:
        return parity
    now, then = folders.last_logits(loaded.model, probe), stored[1]
    if now.shape != then.shape:
        raise UntrustedInput(f"{path}: the logits kept with the probe have another shape; use a sound copy")
    difference = relative_max_difference(now, then)
    top1 = bool((now.argmax(-1) == then.argmax(-1)).all())
    return dataclasses.replace(
        parity, max_logit_difference=max(parity.max_logit_difference, difference), top1_equal=parity.top1_equal and top1
    )


def _check_foreign(path: Path) -> Parity:
    model = load(path)
    if model.state is None:
        raise UsageError(f"{path} holds no quantized layer: there are no integers to check")
    return compare(unpack_model(copy.deepcopy(model.model)), model.model, default_probe(model))


def generate(
    model: str | Path | Model,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    fast: bool = False,
    cache_bits: int | None = None,
    on_text: Callable[[str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> str:
    """Greedy text from a language model: the prompt and what follows it.

    `fast`: products of packed weights by shape (models/serving.py), decoder blocks by native calls (models/decoding.py)
    and a cache of keys and values laid out once; without it, the path that `check` proves. `cache_bits` 8: keys and
    values in int8. `on_text` gets what follows the prompt as it comes, some words at a time; `on_note` gets a line on
    the warm-up and on what runs.
    """
    ready = as_model(model)
    if ready.task != "lm":
        raise UsageError("only a language model generates text; this one classifies")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens} generates nothing; use 1 or more")
    if not prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in prompt):
        raise UsageError("the prompt is not UTF-8; give valid text")
    tokens = next(encode([prompt], ready.tokenizer))
    if not tokens:
        raise UsageError("the prompt has no tokens; give some text")
    ids = torch.tensor([*start_token(ready.tokenizer), *tokens])[None]  # as documents open in training and measuring
    positions = getattr(ready.model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and ids.shape[1] + max_new_tokens > positions:
        raise UsageError(
            f"{ids.shape[1]} tokens of prompt and max_new_tokens={max_new_tokens} are more than the model's "
            f"{positions} positions; ask for fewer"
        )
    pad = ready.tokenizer.pad_token_id if ready.tokenizer.pad_token_id is not None else ready.tokenizer.eos_token_id
    ids = ids.to(device_of(ready.model))
    streamer = None if on_text is None else _Told(ready.tokenizer, on_text)
    decoder = None
    with torch.inference_mode(), serving(ready.model) if fast else nullcontext():
        if fast:
            start = time.perf_counter()
            decoder, why = decoder_of(ready.model)
            if on_note is not None:
                on_note(f"warmed up in {time.perf_counter() - start:.1f} s; {told(why)}")
        output = continued(
            ready.model,
            ids,
            max_new_tokens,
            streamer,
            decoder=decoder,
            cache_bits=cache_bits,
            laid_out=fast,
            pad=pad or 0,
        )
    return str(ready.tokenizer.decode(output[0], skip_special_tokens=True))


class _Told(TextStreamer):
    """Hands text on as soon as it is whole words, the prompt left out."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
