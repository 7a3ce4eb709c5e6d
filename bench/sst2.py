"""What does W8A8 cost a sentence classifier? MiniLM fine-tuned on SST-2 in float, then fitted to w8a8.

    python bench/sst2.py [--steps 216]

QUANTAILOR_DATA points at the model and the task (docs/BENCHMARKS.md). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import quantailor as qt
from quantailor.api import environment

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=216, help="of the float fine-tune, batches of 32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    train, dev = (DATA / "tasks" / "sst2" / f"{name}.jsonl" for name in ("train", "dev"))
    settings = qt.Settings(steps=options.steps, batch_size=32, learning_rate=1e-4)
    model = qt.train(DATA / "models" / "minilm-l6-v2", train, scheme="float", eval_data=dev, settings=settings)
    with tempfile.TemporaryDirectory() as folder:
        result = qt.fit(model, train, "w8a8", Path(folder) / "out", eval_data=dev, goal=qt.Goal(tolerance=0.005))
        checked = qt.check(Path(folder) / "out").to_json()
    data = result.data
    final = data["steps"][-1]
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here).stdout
    document = {
        "question": "W8A8 of MiniLM on SST-2 dev",
        "verdict": data["verdict"],
        "float_accuracy": data["float"]["value"],
        "accuracy": data["final"]["value"],
        "lost_points": 100 * (data["float"]["value"] - data["final"]["value"]),
        "change_interval": final["change_interval"],
        "agreement": final["result"]["agreement"],
        "kl": final["result"]["kl"],
        "check": checked,
        "size_bytes": data["size_bytes"],
        "commit": commit.strip(),
        "environment": environment(),
        "seed": 0,
        "command": f"python bench/sst2.py --steps {options.steps}",
    }
    print(
        f"accuracy {document['float_accuracy']:.4f} -> {document['accuracy']:.4f}, "
        f"agreement {document['agreement']:.2%}"
    )
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
