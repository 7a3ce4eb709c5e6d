"""Does a score under quantization rank architectures as training does, and does it beat float NAS followed by QAT?

    python bench/nas.py [--only tau | comparison] [--seeds 0] [--steps 16] [--supernet 80] [--out FILE]

stories260k as the largest network, windows of 64 tokens of TinyStories. For each seed: a supernet trained on grids; 12
networks of it drawn evenly, scored (shared weights, RTN on their own grid, held-out training rows) and each trained
by QAT; Kendall's tau between score and the loss on validation text afterwards. Beside it the tau of the packed bytes
alone, which cost nothing to know. Then both searches at equal compute, within the bytes of a network in the middle of
the space: ours chooses shape and bits under quantization; float NAS trains its supernet in float, scores shapes in
float and takes 4 bits; as many supernet steps, candidates and QAT steps each. Rows in --out already are not run again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from quantailor.api import Settings, environment, evaluate, examples_for, load
from quantailor.data.loading import split
from quantailor.evaluate.lm import evaluate_lm
from quantailor.searching.nas import kendall_tau, packed_size, quantized_part, search
from quantailor.searching.supernet import Architecture, ArchitectureSpace, Supernet
from quantailor.verbs.nas import trained_part

DATA = Path(os.environ.get("QUANTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
SPACE = ArchitectureSpace(depth=(3, 4, 5), width=(32, 48, 64), heads=(4, 6, 8), ffn=(86, 128, 172), bits=(4, 3, 2))
CONTEXT, ROWS, CHOOSING, JUDGING, TRAINED, CANDIDATES = 64, 3000, 32, 200, 12, 24


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.model = options, load(DATA / "models" / "stories260k")
        text = DATA / "text" / "tinystories"
        self.train, held = split(examples_for(self.model, text / "train.txt", context=CONTEXT, limit=ROWS), 0.1, 0)
        self.choosing = held.take(CHOOSING)
        self.valid = examples_for(self.model, text / "valid.txt", context=CONTEXT, limit=JUDGING)
        held_file = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
        same = held_file.get("settings") == self.settings_json()
        self.data: dict[str, Any] = held_file if same else {"settings": self.settings_json(), "seeds": {}}

    def settings_json(self) -> dict[str, Any]:
        fixed = {"context": CONTEXT, "candidates": CANDIDATES, "trained": TRAINED, "space": SPACE.to_json()}
        return json.loads(json.dumps({"steps": self.options.steps, "supernet": self.options.supernet, **fixed}))

    def write(self) -> None:
        commit = ["git", "rev-parse", "--short", "HEAD"]
        self.data |= {
            "question": "ranking by score under quantization, and against float NAS followed by QAT",
            "environment": environment(),
            "commit": subprocess.run(commit, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip(),
            "command": " ".join(["python", "bench/nas.py", *sys.argv[1:]]),
        }
        if self.options.out:
            self.options.out.write_text(json.dumps(self.data, indent=1) + "\n")

    def net(self, seed: int, quantized: bool) -> tuple[Supernet, float]:
        began = time.process_time()
        net = Supernet(copy.deepcopy(self.model.model), SPACE, quantized=quantized)
        net.train(self.train, self.options.supernet, seed=seed)
        return net, time.process_time() - began

    def final(self, net: Supernet, one: Architecture, seed: int) -> float:
        """Nats a token on validation text after QAT."""
        settings = Settings(steps=self.options.steps, batch_size=8, evaluations=2, seed=seed)
        made, _ = trained_part(net, one, self.model, self.train, self.choosing, settings, samples=8)
        return evaluate_lm(made.model, self.valid).nats_per_token

    def seed(self, seed: int) -> None:
        row = self.data["seeds"].setdefault(str(seed), {"networks": []})
        row["float_nats"] = evaluate(self.model, self.valid).nats_per_token  # type: ignore[union-attr]
        net, row["supernet_processor_seconds"] = self.net(seed, quantized=True)
        batches, _ = self.train.calibration_batches(8, seed=seed)

        def score(one: Architecture) -> float:
            return evaluate_lm(quantized_part(net, one, batches), self.choosing).nats_per_token

        draw, drawn = random.Random(seed), []
        while len(drawn) < TRAINED:
            one = SPACE.drawn(draw)
            if one not in drawn:
                drawn.append(one)
        for one in drawn[len(row["networks"]) :] if self.options.only != "comparison" else []:
            found = {"name": str(one), "score": score(one), "size_bytes": packed_size(net, one)}
            row["networks"].append(found | {"final": self.final(net, one, seed)})
            print(row["networks"][-1], file=sys.stderr, flush=True)
            self.write()
        if len(row["networks"]) == TRAINED:
            scores, finals = ([n[key] for n in row["networks"]] for key in ("score", "final"))
            row["tau"] = kendall_tau(scores, finals)
            row["tau_of_bytes"] = kendall_tau([-n["size_bytes"] for n in row["networks"]], finals)
            self.write()
        if "comparison" not in row and self.options.only != "tau":
            row["comparison"] = self.comparison(net, score, seed)
            self.write()

    def comparison(self, net: Supernet, score: Any, seed: int) -> dict[str, Any]:
        budget = packed_size(net, Architecture(4, 48, 6, 128, 4))
        ours = search(net, score, lambda one: packed_size(net, one), budget, CANDIDATES, seed)[0]
        plain, _ = self.net(seed, quantized=False)
        plain.space = dataclasses.replace(SPACE, bits=(4,))

        def float_score(one: Architecture) -> float:
            return evaluate_lm(plain.inherited(one), self.choosing).nats_per_token

        theirs = search(plain, float_score, lambda one: packed_size(plain, one), budget, CANDIDATES, seed)[0]
        found = {
            "budget_bytes": budget,
            "ours": {"name": str(ours.architecture), "size_bytes": ours.size_bytes},
            "float_nas": {"name": str(theirs.architecture), "size_bytes": theirs.size_bytes},
        }
        found["ours"]["final"] = self.final(net, ours.architecture, seed)
        found["float_nas"]["final"] = self.final(plain, theirs.architecture, seed)
        print(found, file=sys.stderr, flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--only", choices=("tau", "comparison"), help="one question of the two")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--supernet", type=int, default=80)
    parser.add_argument("--out", type=Path)
    bench = Bench(parser.parse_args())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    for seed in bench.options.seeds:
        bench.seed(seed)
    bench.data["processor_seconds_of_last_call"] = time.process_time()
    bench.write()
    print(json.dumps(bench.data))


if __name__ == "__main__":
    main()
