"""What a program without quantailor makes of saved folders, then what it makes of them after `import quantailor.hf`.

python strangers.py COMPRESSED... -- OWN...      prints one JSON document; run from outside the repository
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

transformers.logging.set_verbosity_error()


def auto(folder):
    names = json.loads((Path(folder) / "config.json").read_text())["architectures"]
    return AutoModelForSequenceClassification if "Classification" in names[0] else AutoModelForCausalLM


def difference(model, folder):
    """max |logits - those of the simulated model| / max |those|, on the probe that lies in the folder."""
    kept = load_file(Path(folder) / "parity.safetensors")
    then = kept.pop("logits")
    with torch.inference_mode():
        now = model.eval()(**{name.removeprefix("input."): value for name, value in kept.items()}).logits.float()
    now = now[:, -then.shape[1] :] if now.dim() == 3 else now
    return float((now - then).abs().max() / then.abs().max())


def refusal(load):
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main():
    torch.set_num_threads(1)
    sys.modules["quantailor"] = None  # whoever asks for it is told that it is not installed
    split = sys.argv.index("--")
    compressed, own = sys.argv[1:split], sys.argv[split + 1 :]
    result = {"stock": {f: difference(auto(f).from_pretrained(f), f) for f in compressed}}
    result["refused"] = {
        f: [refusal(lambda f=f: auto(f).from_pretrained(f))]
        + [
            refusal(lambda f=f, name=name: getattr(transformers, name).from_pretrained(f))
            for name in json.loads((Path(f) / "config.json").read_text())["architectures"]
        ]
        for f in own
    }
    del sys.modules["quantailor"]
    result["quantailor_imported"] = any(name.split(".")[0] == "quantailor" for name in sys.modules)
    import quantailor.hf  # noqa: F401

    result["plugin"] = {f: difference(auto(f).from_pretrained(f), f) for f in own}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
