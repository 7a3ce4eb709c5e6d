"""Run by an environment that has transformers and compressed-tensors and no quantailor (test_stock_environment.py).

python stock_loads.py FOLDER...      prints, of each folder, how far the logits are from those in its FOLDER.safetensors
"""

import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

transformers.logging.set_verbosity_error()


def main():
    torch.set_num_threads(1)
    assert importlib.util.find_spec("quantailor") is None, "this environment was to be without quantailor"
    told = {"path": sys.path, "distributions": sorted(d.metadata["Name"] for d in metadata.distributions())}
    for folder in sys.argv[1:]:
        names = json.loads(Path(folder, "config.json").read_text())["architectures"]
        kind = "SequenceClassification" if "Classification" in names[0] else "CausalLM"
        model, report = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder, output_loading_info=True)
        kept = load_file(f"{folder}.safetensors")
        inputs = {name.removeprefix("input."): value for name, value in kept.items() if name.startswith("input.")}
        with torch.inference_mode():
            logits = model.eval()(**inputs).logits.float()
        told[folder] = {"missing": sorted(report["missing_keys"]), "unexpected": sorted(report["unexpected_keys"])}
        for way in ("as_stock", "ours"):
            theirs = kept[way]
            told[folder][way] = float((logits - theirs).abs().max() / theirs.abs().max())
            told[folder][f"{way}_argmax"] = float((logits.argmax(-1) == theirs.argmax(-1)).float().mean())
    print(json.dumps(told))


if __name__ == "__main__":
    main()
