"""transformers' plug-in point: folders in our own layout load through `AutoModel...from_pretrained`.

    import quantailor.hf            # registers; then as usual
    AutoModelForCausalLM.from_pretrained(folder)

Without that import such a folder must not load at all: an unknown `quant_method` alone would give random weights and
a warning. So its config.json has `model_type: quantailor`, which only this registration knows, and its weights are
called quantailor.safetensors, which nothing else looks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantailor.errors import UntrustedInput, UsageError
from quantailor.models.experts import experts_of, split_experts
from quantailor.models.points import install_points
from quantailor.models.prepare import State
from quantailor.models.structure import replace, replace_all
from quantailor.nn.packed import PackedWeight, QuantConv2d, QuantEmbedding, QuantLinear
from quantailor.points import PointEntry
from quantailor.spec import Scheme, from_json, to_json

WEIGHTS_NAME = "quantailor.safetensors"
FORMAT_VERSION = 2  # 2: points inside blocks; folders without any say 1, which older readers take


class QuantailorConfig(QuantizationConfigMixin):
    """`quantization_config` of our own layout: a scheme a layer, by exact name.

    `schemes`: JSON of each scheme; `layers`: name -> {"scheme": index, "kind", "shape" [O, N], "bias", and where they
    apply "conv", "tied_to"}; `points`: the quantized ones, as `PointEntry.to_json` has them; `folded`: names of norms
    that are part of a convolution, and gone.
    """

    def __init__(
        self,
        version: int = FORMAT_VERSION,
        schemes: list[Any] | None = None,
        layers: dict[str, Any] | None = None,
        points: list[Any] | None = None,
        folded: list[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = "quantailor"  # type: ignore[assignment]
        self.version, self.schemes, self.layers = version, schemes or [], layers or {}
        self.points = points or []
        self.folded = folded or []
        if type(version) is not int or version < 1:
            raise UntrustedInput(f"the folder says format version {version!r}, which never was one; it is damaged")
        if version > FORMAT_VERSION:
            raise UntrustedInput(
                f"the folder is in format version {version}; this quantailor reads up to {FORMAT_VERSION}: upgrade it"
            )


class QuantailorQuantizer(HfQuantizer):
    """Puts packed modules, still without weights, where the config names them."""

    requires_calibration = True
    quantization_config: QuantailorConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        install_packed(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, layer in self.quantization_config.layers.items():
            if layer.get("tied_to"):
                model.get_submodule(name).packed = model.get_submodule(layer["tied_to"]).packed
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def install_packed(model: nn.Module, config: QuantailorConfig, device: str = "meta") -> None:
    """Replace the named modules by packed ones with empty buffers.

    Raises: UntrustedInput where a name is not in the model or what is said of it contradicts the module there.
    """
    try:
        _install(model, config, device)
    except UntrustedInput:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, UsageError, ValueError) as error:
        raise UntrustedInput(
            f"quantization_config is damaged ({type(error).__name__}: {error}); use a sound copy"
        ) from error


def _install(model: nn.Module, config: QuantailorConfig, device: str) -> None:
    schemes = [from_json(scheme) for scheme in config.schemes]
    split_experts(model, experts_of(config.layers))
    layers: dict[str, nn.Module] = {}
    for name, layer in config.layers.items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise UntrustedInput(
                f"the config quantizes {name}, which this model does not have; the folder is damaged"
            ) from error
        scheme = schemes[layer["scheme"]]
        if not isinstance(scheme, Scheme) or scheme.weight is None or type(old).__name__ != layer["kind"]:
            raise UntrustedInput(
                f"the config quantizes {name} as a {layer['kind']}, and the model has a {type(old).__name__} there; "
                "the folder is damaged"
            )
        rows, length = layer["shape"]
        weight = PackedWeight(scheme.weight, rows, length, device)
        if layer.get("tied_to"):  # gets the other layer's once that is loaded; the files have none for it
            for part, buffer in list(weight.named_buffers()):
                weight.register_buffer(part, buffer, persistent=False)
        bias = torch.zeros(rows, device=device) if layer["bias"] else None
        new: nn.Module
        if layer["kind"] == "Embedding":
            new = QuantEmbedding(scheme, weight, None, old.weight.dtype)  # type: ignore[arg-type]
        elif layer["kind"] == "Conv2d":
            settings = {k: tuple(v) if isinstance(v, list) else v for k, v in layer["conv"].items()}
            new = QuantConv2d(scheme, weight, bias, settings)
        else:
            new = QuantLinear(scheme, weight, bias)
        layers[name] = new.train(old.training)
    replace_all(model, layers)
    for name in config.folded:
        if not isinstance(model.get_submodule(name), nn.BatchNorm2d):
            raise UntrustedInput(f"the config has {name} folded, and that is no BatchNorm2d; the folder is damaged")
        replace(model, name, nn.Identity())
    _untie(model, config)
    install_points(model, [PointEntry.from_json(point) for point in config.points], packed=True, device=device)


def _untie(model: nn.Module, config: QuantailorConfig) -> None:
    """Packed layers share integers, not the parameters that transformers would look for to tie them."""
    gone = {f"{name}.weight" for name in config.layers}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {k: v for k, v in tied.items() if k not in gone and v not in gone}  # type: ignore[assignment]


def assembled(architecture: Any, config: Any, tensors: dict[str, Tensor], where: object) -> Any:
    """A model of class `architecture` whose `config` holds our quantization_config, from all of its tensors, in eval
    mode and without marks that would keep Trainer from training it further.

    `where`: what an error names. Raises: UntrustedInput where a tensor is missing, too many or of another shape.
    """
    inside = tuple(f"{name}." for name in experts_of(config.quantization_config["layers"]))
    apart = {k: v for k, v in tensors.items() if k.startswith(inside) and k.endswith("_proj.weight")}
    model, info = architecture.from_pretrained(
        None,
        config=config,
        state_dict={k: v for k, v in tensors.items() if k not in apart},  # transformers would fuse these
        dtype=config.dtype or torch.float32,
        ignore_mismatched_sizes=True,  # an error below, where the tensor is named
        output_loading_info=True,
    )
    for kind, keys in (
        ("lacks", set(info["missing_keys"]) - set(apart)),
        ("has", info["unexpected_keys"]),
        ("misshapes", [key for key, *_ in info.get("mismatched_keys") or []]),
    ):
        if keys:
            raise UntrustedInput(f"{where} {kind} tensor {sorted(keys)[0]}, against its config.json; use a sound copy")
    for name, tensor in apart.items():
        model.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(tensor.to(model.dtype))
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model.eval()


class _Wrapper(PreTrainedConfig):
    """Stands in config.json for the config of the architecture inside; reading it gives that one."""

    model_type = "quantailor"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        inner = unwrapped(config_dict)
        return CONFIG_MAPPING[inner["model_type"]].from_dict(inner, **kwargs)


def wrapped(config: dict[str, Any], quantization: dict[str, Any]) -> dict[str, Any]:
    """What config.json holds for our own layout, from the architecture's own config."""
    return {
        "model_type": "quantailor",
        "requires": "pip install quantailor, then: import quantailor.hf",
        "architectures": config.get("architectures"),
        "quantailor_config": config,
        "quantization_config": quantization,
    }


def unwrapped(config: dict[str, Any]) -> dict[str, Any]:
    """The architecture's config with the quantization config and the name of the weights file put in."""
    inner = config.get("quantailor_config")
    if not isinstance(inner, dict) or inner.get("model_type") not in CONFIG_MAPPING:
        raise UntrustedInput(
            "config.json says model_type quantailor but holds no known quantailor_config; the folder is damaged"
        )
    weights, quantization = config.get("weights_file", WEIGHTS_NAME), config.get("quantization_config")
    if weights not in (WEIGHTS_NAME, f"{WEIGHTS_NAME}.index.json") or not isinstance(quantization, dict):
        raise UntrustedInput(
            f"config.json says model_type quantailor and names weights {weights!r}, or no quantization_config; "
            "the folder is damaged"
        )
    return {**inner, "quantization_config": quantization, "transformers_weights": weights}


def register() -> None:
    """Make transformers know our layout; a second call does nothing."""
    if "quantailor" in CONFIG_MAPPING:
        return
    as_config: Callable[[type], type] = register_quantization_config("quantailor")
    as_quantizer: Callable[[type], type] = register_quantizer("quantailor")
    as_config(QuantailorConfig)
    as_quantizer(QuantailorQuantizer)
    AutoConfig.register("quantailor", _Wrapper)


def own_config(
    state: State, shapes: dict[str, tuple[int, int]], bias: set[str], conv: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The `quantization_config` of our own layout for what `state` quantized. `shapes`: name -> (O, N)."""
    from_scheme: dict[Scheme, int] = {}
    layers = {}
    for entry in state.inventory:
        if entry.scheme is None:
            continue
        layers[entry.name] = {
            "scheme": from_scheme.setdefault(entry.scheme, len(from_scheme)),
            "kind": entry.kind,
            "shape": list(shapes[entry.name]),
            "bias": entry.name in bias,
        }
        if entry.name in conv:
            layers[entry.name]["conv"] = {
                k: list(v) if isinstance(v, tuple) else v for k, v in conv[entry.name].items()
            }
        if entry.tied_to is not None:
            layers[entry.name]["tied_to"] = entry.tied_to
    schemes = [to_json(scheme) for scheme in from_scheme]
    points = [point.to_json() for point in state.inventory.points if point.spec is not None]
    found = {"quant_method": "quantailor", "version": 1, "schemes": schemes, "layers": layers}
    more = ({"points": points} if points else {}) | ({"folded": state.folded} if state.folded else {})
    return {**found, "version": 2, **more} if more else found
