"""PTQ: `quantize`, and the same for any `nn.Module`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from quantailor import ptq
from quantailor.data.examples import Examples
from quantailor.data.loading import Data
from quantailor.errors import UsageError
from quantailor.models.folding import fold_norms
from quantailor.models.prepare import FAKE_QUANT, State, pack_model, prepare
from quantailor.models.structure import modules_of
from quantailor.points import Points, PointSpec
from quantailor.progress import Progress
from quantailor.ptq.chain import Chain
from quantailor.ptq.defaults import one_pass
from quantailor.ptq.driver import calibrate, methods_of, round_without_data
from quantailor.recipe import Recipe, Rule
from quantailor.spec import Scheme
from quantailor.verbs.model import Model, as_model, default_probe, examples_for, probe_of

PointsLike = Mapping[str, str | PointSpec] | Points | None


def recipe_for(
    scheme: str | Scheme,
    rules: Sequence[Rule] = (),
    *,
    method: str | None = None,
    ragged: bool = True,
    points: PointsLike = None,
) -> Recipe:
    """A recipe from what the commands take. Raises: UsageError for an unknown scheme, method or point."""
    parsed = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
    for name in (method, *(rule.method for rule in rules)):
        if name is not None:
            ptq.method(name)
    if not ragged:
        parsed = parsed.with_ragged(False)
        rules = [
            dataclasses.replace(r, action=r.action.with_ragged(False)) if isinstance(r.action, Scheme) else r
            for r in rules
        ]
    asked = Points.of(points)
    if asked and parsed.is_float and not rules:
        raise UsageError(f"points ({asked}) go with a scheme that quantizes weights; w8a16 is the nearest to float")
    return Recipe(parsed, tuple(rules), method or one_pass(parsed), asked)


def quantize(
    model: str | Path | Model,
    scheme: str | Scheme,
    *,
    method: str | None = None,
    data: Data | Examples | None = None,
    samples: int = 128,
    context: int = 256,
    rules: Sequence[Rule] = (),
    points: PointsLike = None,
    ragged: bool = True,
    fold: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Model:
    """Post-training quantization with one method: the given model is left as it is, a simulated one comes back.

    `points`: what is quantized inside the blocks besides (points.py), such as {"scores": "a8", "norm": "a8-static"}.

    `method`: one of `ptq.METHODS`, or a chain such as `smoothquant+gptq`; None: what ptq/defaults.py has for the
    scheme. `data`: calibration samples (`samples` rows are drawn); without data only what needs none (RTN, HQQ), on
    dynamic or weight-only schemes. `fold`: a BatchNorm behind a convolution that is quantized becomes part of it first.
    Raises: UsageError, UntrustedInput as the parts do.
    """
    source = as_model(model)
    if source.state is not None:
        raise UsageError("the model is quantized already; start from its float parent")
    recipe = recipe_for_ptq(scheme, rules, method or ("rtn" if data is None else None), ragged, seed, points)
    copied = dataclasses.replace(source, model=copy.deepcopy(source.model), notes=list(source.notes))
    examples = None if data is None else examples_for(copied, data, context=context)
    folded = _folded(copied, recipe, examples) if fold and copied.task == "images" else []
    state = prepare(copied.model, recipe)
    state.method, state.folded = recipe.method, folded
    if folded:
        state.notes.append(f"{len(folded)} norms were folded into the convolutions before them")
    chain = methods_of(state, recipe.method)
    if examples is None:
        check_without_data(state, chain)
        round_without_data(modules_of(copied.model, FAKE_QUANT), state, chain)
        state.notes.append(WITHOUT_DATA)
        return copied
    batches, notes = drawn(examples, samples, seed)
    calibrate(copied.model, batches, chain, progress)
    state.notes += notes
    copied.probe = probe_of(examples)
    return copied


def _folded(model: Model, recipe: Recipe, examples: Examples | None) -> list[str]:
    """Fold the norms behind the convolutions that the recipe quantizes; a kept one keeps its norm."""
    quantized = set(recipe.assign(model.model).quantized)
    inputs = default_probe(model) if examples is None else next(iter(examples.batches(4)))
    return fold_norms(model.model, quantized, inputs)


WITHOUT_DATA = "quantized without data: every input channel counted alike"


def recipe_for_ptq(
    scheme: str | Scheme,
    rules: Sequence[Rule],
    method: str | None,
    ragged: bool,
    seed: int,
    points: PointsLike = None,
) -> Recipe:
    if not 0 <= seed < 2**31:
        raise UsageError(f"seed={seed} must be 0 or more and below 2^31")
    recipe = recipe_for(scheme, rules, method=method, ragged=ragged, points=points)
    if recipe.scheme.is_float and not rules:
        raise UsageError("scheme float quantizes nothing; use `train` with it, or another scheme")
    return recipe


def check_without_data(state: State, chain: Callable[[str], Chain]) -> None:
    """Raises: UsageError if a method or a static range needs data."""
    static = state.scheme.input is not None and not state.scheme.input.dynamic
    if point := next((p for p in state.inventory.points if p.spec is not None and not p.spec.quant.dynamic), None):
        raise UsageError(
            f"point {point.point}={point.spec} needs calibration data; give --data, or use a scale found at each call: "
            f"{point.point}=a{point.spec.quant.grid.bits}"  # type: ignore[union-attr]
        )
    if any(chain(e.name).needs_data for e in state.inventory if e.scheme) or static:
        raise UsageError(
            f"{state.method} at {state.scheme} needs calibration data; give --data, "
            "or use --method rtn with a scheme without static ranges"
        )


def drawn(examples: Examples, samples: int, seed: int) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Calibration batches, and what the receipt says of them."""
    batches, notes = examples.calibration_batches(samples, seed=seed)
    return batches, [f"calibration data: {note}" for note in (*examples.notes, *notes)]


def quantize_module(
    module: nn.Module,
    scheme: str | Scheme,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    method: str | None = None,
    rules: Sequence[Rule] = (),
    points: PointsLike = None,
    ragged: bool = True,
    progress: Progress | None = None,
) -> nn.Module:
    """PTQ of any `nn.Module` with Linear, Conv1D, Conv2d or Embedding layers; a simulated copy comes back.

    `batches`: keyword arguments of `module.forward`, one mapping a call. `pack_module` makes integers of the result;
    `quantailor_state` on it is the inventory. Raises: UsageError, UntrustedInput as the parts do.
    """
    recipe = recipe_for(scheme, rules, method=method, ragged=ragged, points=points)
    copied = copy.deepcopy(module)
    state = prepare(copied, recipe, batches[0] if batches else None)
    state.method = recipe.method
    calibrate(copied, batches, methods_of(state, recipe.method), progress)
    return copied


def pack_module(module: nn.Module) -> nn.Module:
    """The packed twin of what `quantize_module` returned: integers only. The given module is left as it is."""
    return pack_model(copy.deepcopy(module))
