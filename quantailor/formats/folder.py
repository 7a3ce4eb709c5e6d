"""A quantized model as a folder that transformers loads: written whole or not at all, read strictly.

Beside the weights lie the tokenizer, `quantailor.json` (what was done to each layer, and the digests of the integers
that the simulated model had when it was packed), `parity.safetensors` (probe tokens and the simulated model's last
logits) and the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantailor.errors import QuantailorError, UntrustedInput, UsageError
from quantailor.evaluate.parity import Digests, digests
from quantailor.formats import layout, plugin
from quantailor.formats.probe import store_probe
from quantailor.formats.stored_grids import check_grids
from quantailor.models.loading import (
    CLASSES,
    CONFIG_ERRORS,
    Task,
    check_shapes,
    device_of,
    load_reader,
    quiet_transformers,
    task_of,
)
from quantailor.models.prepare import FAKE_QUANT, PACKED, SIMULATED, State, packed_twin, state_of
from quantailor.models.structure import logits_of
from quantailor.nn.activation_quantizer import ActivationQuantizer
from quantailor.nn.packed import PackedWeight
from quantailor.nn.points import PointQuantizer
from quantailor.points import PointEntry
from quantailor.recipe import Entry, Inventory
from quantailor.spec import Scheme, from_json, to_json
from quantailor.store.jsonio import read_json, write_json
from quantailor.store.manifest import write_manifest
from quantailor.store.publish import recover
from quantailor.store.reading import Reading, reading
from quantailor.store.untrusted import check_finite

RECEIPT = "quantailor.json"


@dataclass(frozen=True)
class Folder:
    """A loaded quantized folder."""

    model: PreTrainedModel
    tokenizer: Any  # PreTrainedTokenizerBase; ImageProcessor where the task is images
    task: Task
    state: State
    format: layout.Format
    receipt: dict[str, Any]
    manifest: dict[str, Any]


def choose_format(inventory: Inventory, wanted: str | None) -> tuple[layout.Format, str]:
    """(format, why). Raises: UsageError if compressed-tensors is asked for and cannot say the inventory."""
    if wanted not in (None, "compressed-tensors", "quantailor"):
        raise UsageError(f"format {wanted!r} is none of compressed-tensors, quantailor")
    reason = layout.why_not_compressed_tensors(inventory)
    if wanted == "compressed-tensors" and reason:
        raise UsageError(
            f"compressed-tensors cannot hold this model: {reason}; "
            "leave --format out, or change that layer's scheme by a rule"
        )
    if wanted == "quantailor" or reason:
        return "quantailor", reason or "asked for"
    return "compressed-tensors", "stock transformers reads it"


def write_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    format: str | None = None,
    probe: Mapping[str, Tensor] | None = None,
    details: dict[str, Any] | None = None,
) -> layout.Format:
    """Fill an empty `folder`; the caller publishes it. The model is left as it is; layers are packed one at a time.

    `probe`: tokens whose logits are kept for `check`. Raises: UsageError as `choose_format`; QuantailorError where a
    static activation scale was never calibrated, or a weight is no longer finite.
    """
    state = state_of(model)
    assert state is not None, "prepare or load the model first"
    chosen, why = choose_format(state.inventory, format)
    tensors, own = stored_tensors(model, state, chosen)
    config, state_dict = model.config, {k: v.contiguous() for k, v in tensors.items()}
    quantizer, model.hf_quantizer = getattr(model, "hf_quantizer", None), None  # type: ignore[assignment]
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        del config.quantization_config
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    finally:
        model.hf_quantizer = quantizer  # type: ignore[assignment]
        if stored is not None:
            config.quantization_config = stored
    write_config(folder, chosen, state, own)
    logits = last_logits(model, probe) if probe is not None else None
    write_rest(folder, tokenizer, state, chosen, why, digests(model), probe, logits, details)
    return chosen


def write_rest(
    folder: Path,
    tokenizer: Any,
    state: State,
    chosen: layout.Format,
    why: str,
    held: Digests,
    probe: Mapping[str, Tensor] | None,
    logits: Tensor | None,
    details: dict[str, Any] | None,
) -> None:
    """What lies beside the weights: tokenizer, probe with its `logits`, receipt, and the manifest last.

    `held`: the digests of the simulated model's layers.
    """
    tokenizer.save_pretrained(folder)
    if probe is not None and logits is not None:
        store_probe(folder, probe, logits)
    write_json(
        folder / RECEIPT,
        {
            "scheme": str(state.scheme),
            "method": state.method,
            "format": chosen,
            "format_reason": why,
            "coverage": state.inventory.coverage,
            "notes": state.notes,
            **({"folded": state.folded} if state.folded else {}),
            "inventory": [
                {**entry.to_json(), "spec": to_json(entry.scheme) if entry.scheme else None, **_report(state, entry)}
                for entry in state.inventory
            ],
            **({"points": [point.to_json() for point in state.inventory.points]} if state.inventory.points else {}),
            "digests": held,
            "details": details or {},
        },
    )
    write_manifest(
        folder, kind="quantized model", details={"scheme": str(state.scheme), "format": chosen, "method": state.method}
    )


def _report(state: State, entry: Entry) -> dict[str, Any]:
    report = state.layers.get(entry.name)
    return {"report": report} if report else {}


@torch.no_grad()
def last_logits(model: nn.Module, probe: Mapping[str, Tensor], positions: int = 4) -> Tensor:
    """Logits float32 of the last few positions (all of a classifier's): enough to compare, small enough to keep.

    Computed on the CPU, as `check` does, wherever the model is: a last bit that another device rounds otherwise is a
    whole step of the next layer's grid.
    """
    was_training, device = model.training, device_of(model)
    model.eval().to("cpu")
    try:
        return last_of(logits_of(model(**probe)), positions)
    finally:
        model.train(was_training).to(device)


def last_of(logits: Tensor, positions: int = 4) -> Tensor:
    """Logits [B, T, V] or [B, classes] -> float32, the last few positions."""
    logits = logits.float().cpu()
    return (logits[:, -positions:] if logits.dim() == 3 else logits).contiguous()


def stored_tensors(
    root: nn.Module, state: State, chosen: layout.Format, name: str = "", stores: dict[int, PackedWeight] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that is stored of `root`, the model or its module called `name`, by names on disk; and what our own config
    says of shapes, biases and kernels. `stores` remembers packed weights that tied layers share.

    Raises: QuantailorError where a static activation scale was never calibrated, or a tensor is no longer finite.
    """
    result: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, int]] = {}
    biases: set[str] = set()
    conv: dict[str, dict[str, Any]] = {}
    stores = {} if stores is None else stores
    tied_to = {entry.name: entry.tied_to for entry in state.inventory}
    found = [(_joined(name, n), n) for n, module in root.named_modules() if isinstance(module, SIMULATED + PACKED)]
    for full, inner in found:
        module = root.get_submodule(inner)
        twin: Any
        if isinstance(module, FAKE_QUANT):
            _check_calibrated(full, module)
            key = id(module.weight_quantizer)
        else:
            key = id(module.packed)
        first = key not in stores
        twin = packed_twin(module, stores) if isinstance(module, SIMULATED) else module
        stores[key] = twin.packed
        shapes[full] = (twin.packed.out_features, twin.packed.in_features)
        if hasattr(twin, "settings"):
            conv[full] = twin.settings
        if twin.bias is not None:
            biases.add(full)
            result[f"{full}.bias"] = twin.bias
        buffers = dict(twin.packed.named_buffers())
        if chosen == "compressed-tensors":
            scheme = state.inventory.quantized[full]
            result |= layout.to_compressed_tensors(full, buffers, scheme, twin.packed.in_features)
            result |= {f"{full}.input_scale": twin.input_scale} if hasattr(twin, "input_scale") else {}
            continue
        if first or tied_to[full] is None:
            result |= {f"{full}.packed.{k}": v for k, v in buffers.items()}
        result |= {f"{full}.{k}": getattr(twin, k) for k in ("input_scale", "output_scale") if hasattr(twin, k)}
    points = [(_joined(name, n), m) for n, m in root.named_modules() if isinstance(m, PointQuantizer)]
    for full, point in points:
        if not point.spec.dynamic:
            _check_set(full, point)
            result[f"{full}.scale"] = point.scale
    inside = tuple(f"{full}." for full, _ in (*found, *points))
    for key_, tensor in root.state_dict(prefix=f"{name}." if name else "").items():
        if not key_.startswith(inside):
            result[key_] = tensor
    bad = next((n for n, t in result.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if bad is not None:
        raise QuantailorError(
            f"{bad} holds NaN or Inf after quantization; nothing was saved: start again from the float model"
        )
    return result, {"shapes": shapes, "bias": biases, "conv": conv}


def _joined(prefix: str, name: str) -> str:
    return ".".join(filter(None, (prefix, name)))


def _check_calibrated(name: str, module: Any) -> None:
    for quantizer in (module.input_quantizer, module.output_quantizer):
        if quantizer is not None and not quantizer.spec.dynamic:
            _check_set(name, quantizer)


def _check_set(name: str, quantizer: ActivationQuantizer) -> None:
    if not bool(quantizer.calibrated):
        raise QuantailorError(
            f"{name}: its static activation scale was never calibrated; give calibration data, or use dynamic scales"
        )


def write_config(folder: Path, chosen: layout.Format, state: State, own: dict[str, Any]) -> None:
    """Put what was quantized into the config.json that lies there; our own layout renames the weights as well."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if chosen == "compressed-tensors":
        write_json(path, {**config, "quantization_config": layout.compressed_tensors_config(state.inventory)})
        return
    wrapped = plugin.wrapped(config, plugin.own_config(state, **own))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listing = json.loads(index.read_text())
        listing["weight_map"] = {k: v.replace("model-", "quantailor-", 1) for k, v in listing["weight_map"].items()}
        index.unlink()
        write_json(folder / f"{plugin.WEIGHTS_NAME}.index.json", listing)
        wrapped["weights_file"] = f"{plugin.WEIGHTS_NAME}.index.json"
    for shard in folder.glob("model*.safetensors"):
        shard.rename(folder / shard.name.replace("model", "quantailor", 1))
    write_json(path, wrapped)


def read_folder(folder: Path, *, verify_hashes: bool = True) -> Folder:
    """Load what `write_folder` wrote, strictly: every tensor there, none too many, each of the right shape, finite
    and in range. Raises: UntrustedInput otherwise."""
    quiet_transformers()
    folder = Path(folder)
    if not folder.exists():
        recover(folder)
    with reading(folder, verify_hashes=verify_hashes) as stored:
        found = _read(folder, stored)
    return replace(found, manifest=stored.manifest)


def _read(folder: Path, arriving: Reading) -> Folder:
    """The folder while its weights are on their way, all but the manifest."""
    files = arriving.files
    receipt = _read_receipt(folder)
    state = _state(receipt, folder)
    own = files.config.get("model_type") == "quantailor"
    if own:
        plugin.register()
    inner = plugin.unwrapped(files.config) if own else files.config
    task = task_of(inner)
    if task is None:
        raise UntrustedInput(f"{folder}: config.json names no architecture for language modelling or classification")
    reader = load_reader(folder, task)
    check_finite(files, arriving)
    turned: list[Tensor] = []
    with _damage_told(folder):
        quantization, tensors = _own_names(files.config, state, dict(arriving), own, turned)
        _check_agreement(files.config, quantization, state, own)
        check_grids(quantization, tensors)
    model = _assembled(folder, inner, task, quantization, tensors)
    arriving.wait_for_digests()
    for values in turned:
        layout.turn_highest_bits(values)
    model.quantailor_state = state  # type: ignore[assignment]
    return Folder(model, reader, task, state, "quantailor" if own else "compressed-tensors", receipt, {})


@contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except UntrustedInput as error:
        raise UntrustedInput(f"{folder}: {error}") from error
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = error.args[0] if error.args else type(error).__name__
        raise UntrustedInput(f"{folder} does not hold what its config says: {what}; use a sound copy") from error


def _assembled(
    folder: Path,
    inner: dict[str, Any],
    task: Task,
    quantization: plugin.QuantailorConfig,
    tensors: dict[str, Tensor],
) -> PreTrainedModel:
    plugin.register()
    try:
        config = CONFIG_MAPPING[inner["model_type"]].from_dict(
            {k: v for k, v in inner.items() if k != "transformers_weights"}
        )
        config.quantization_config = quantization.to_dict()
        architecture: Any = CLASSES[task]._model_mapping[type(config)]
        with torch.device("meta"):
            plugin.install_packed(skeleton := architecture(config), quantization)
        check_shapes(folder, skeleton, {name: tensor.shape for name, tensor in tensors.items()})
        return plugin.assembled(architecture, config, tensors, folder)
    except UntrustedInput as error:
        raise error if str(folder) in str(error) else UntrustedInput(f"{folder}: {error}") from error
    except CONFIG_ERRORS as error:
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise UntrustedInput(f"{folder} does not load: {first}") from error


def _read_receipt(folder: Path) -> dict[str, Any]:
    path = folder / RECEIPT
    if not path.exists():
        raise UntrustedInput(f"{folder} has no {RECEIPT}; only folders that quantailor wrote can be read so far")
    receipt = read_json(path, max_bytes=100_000_000)
    if (
        not isinstance(receipt, dict)
        or not isinstance(receipt.get("inventory"), list)
        or not isinstance(receipt.get("digests"), dict)
        or not all(isinstance(parts, dict) for parts in receipt["digests"].values())
        or not isinstance(receipt.get("scheme"), str)
        or not isinstance(receipt.get("notes", []), list)
    ):
        raise UntrustedInput(f"{path} is damaged: it has no inventory, digests, scheme or notes of the right form")
    return receipt


def _state(receipt: dict[str, Any], folder: Path) -> State:
    try:
        entries = [
            Entry(
                e["name"],
                e["type"],
                tuple(e["shape"]),
                e["num_weights"],
                from_json(e["spec"]),
                e["reason"],
                e.get("tied_to"),
                e.get("method"),
            )
            for e in receipt["inventory"]
        ]
        points = tuple(PointEntry.from_json(line) for line in receipt.get("points", []))
        scheme = _scheme(receipt["scheme"], entries)
        if wrong := next((e for e in entries if not _is_sound(e)), None):
            raise TypeError(f"the entry of {wrong.name!r} has a value of the wrong type")
    except (AttributeError, KeyError, TypeError, UsageError) as error:
        raise UntrustedInput(f"{folder / RECEIPT} is damaged: {error}") from error
    layers = {e["name"]: e["report"] for e in receipt["inventory"] if "report" in e}
    folded = receipt.get("folded", [])
    if not isinstance(folded, list) or not all(isinstance(name, str) for name in folded):
        raise UntrustedInput(f"{folder / RECEIPT} is damaged: folded must be a list of names")
    inventory, notes = Inventory(tuple(entries), points), list(receipt.get("notes", []))
    return State(scheme, inventory, receipt.get("method", "none"), notes, layers, folded)


def _is_sound(entry: Entry) -> bool:
    numbers = (*entry.shape, entry.num_weights)
    texts = isinstance(entry.name, str) and isinstance(entry.kind, str) and isinstance(entry.tied_to, str | None)
    schemes = entry.scheme is None or (isinstance(entry.scheme, Scheme) and entry.scheme.weight is not None)
    return texts and schemes and all(type(n) is int and n >= 0 for n in numbers)


def _scheme(text: str, entries: list[Entry]) -> Scheme:
    try:
        return Scheme.parse(text)
    except UsageError:  # a scheme without a string: the commonest of the layers stands for it
        used = [e.scheme for e in entries if e.scheme is not None]
        return max(used, key=used.count) if used else Scheme()


def _own_names(
    config: dict[str, Any], state: State, stored: dict[str, Tensor], own: bool, turned: list[Tensor]
) -> tuple[plugin.QuantailorConfig, dict[str, Tensor]]:
    """(our quantization config, tensors by the names our modules have), from either layout; `turned` gets those whose
    highest bits are still to be turned, which must wait until digests are taken."""
    if own:
        settings = {k: v for k, v in config["quantization_config"].items() if k != "quant_method"}
        return plugin.QuantailorConfig(**settings), stored
    shapes: dict[str, tuple[int, int]] = {}
    biases: set[str] = set()
    for entry in state.inventory:
        if entry.scheme is None:
            continue
        name = entry.name
        buffers = layout.from_compressed_tensors(name, stored, entry.scheme, turned.append)
        shapes[name] = (entry.shape[0], entry.shape[1])
        if f"{name}.bias" in stored:
            biases.add(name)
        for suffix in layout.COMPRESSED_NAMES:
            stored.pop(f"{name}.{suffix}", None)
        stored |= {f"{name}.packed.{k}": v for k, v in buffers.items()}
    settings = plugin.own_config(state, shapes, biases, {})
    return plugin.QuantailorConfig(**{k: v for k, v in settings.items() if k != "quant_method"}), stored


def _check_agreement(config: dict[str, Any], quantization: plugin.QuantailorConfig, state: State, own: bool) -> None:
    """Whoever loads the folder by its config.json must get what the receipt says."""
    if not own:
        groups = config["quantization_config"]["config_groups"]
        if groups != layout.compressed_tensors_config(state.inventory)["config_groups"]:
            raise UntrustedInput(f"config.json quantizes other layers or grids than {RECEIPT} says; use a sound copy")
        return
    if quantization.folded != state.folded:
        raise UntrustedInput(f"config.json and {RECEIPT} tell different things of folded norms; use a sound copy")
    said: dict[str, Any] = {
        name: (from_json(quantization.schemes[layer["scheme"]]), layer["kind"], layer.get("tied_to"))
        for name, layer in quantization.layers.items()
    }
    kept: dict[str, Any] = {e.name: (e.scheme, e.kind, e.tied_to) for e in state.inventory if e.scheme is not None}
    points = [PointEntry.from_json(point) for point in quantization.points]
    said |= {point.name: point for point in points}
    kept |= {point.name: point for point in state.inventory.points if point.spec is not None}
    for name in {**said, **kept}:
        if said.get(name) != kept.get(name):
            raise UntrustedInput(f"config.json and {RECEIPT} tell different things of {name}; use a sound copy")


def expected_digests(receipt: dict[str, Any]) -> Digests:
    """What the simulated model's layers held when they were packed."""
    return receipt["digests"]
