"""What do few bits cost a MobileNetV2, and what does QAT take back? transformers' own class on images drawn here.

Ten classes of 32 x 32 colour images: one of five shapes, upright or turned by 45 degrees, any size, place and colour,
under clutter and noise. A seed draws the images, the weights and the order. The float model is trained first; its norms
are folded into the convolutions, every convolution and the head are quantized (a scale a channel; activations static),
and QAT trains the folded model. `float+`: the float model trained as long as QAT, with the same settings.

    python bench/mobilenet.py --out bench/results/mobilenet.json

Each seed is kept in --cache and only what is missing is run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from seeds import interval
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

import quantailor as qt
from quantailor.api import environment, examples_for
from quantailor.store.processor import ImageProcessor

SIZE, CLASSES = 32, 10
SCHEMES = ("w8a8-static", "w4a4-static")


def images(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """float32 [count, 3, 32, 32] and int64 [count]: class = shape + 5 * turned."""

    def some(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(more or (1, 1)), generator=draw)

    labels = torch.randint(0, CLASSES, (count,), generator=draw)
    at = torch.arange(SIZE).float()
    x, y = at[None, None, :] - some(11, 21), at[None, :, None] - some(11, 21)
    angle = (labels >= 5).float()[:, None, None] * (math.pi / 4) + some(-0.25, 0.25)
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    r = some(6, 10)
    wide, tall = (u.abs() < r) & (v.abs() < 0.35 * r), (v.abs() < r) & (u.abs() < 0.35 * r)
    square = (u.abs() < 0.8 * r) & (v.abs() < 0.8 * r)
    shapes = torch.stack(
        [square, wide | tall, wide, square & ~((u.abs() < 0.45 * r) & (v.abs() < 0.45 * r)), square & (u + 0 * v < 0)]
    ).float()
    shape = shapes[labels % 5, torch.arange(count)]
    colour, behind = some(-1, 1, 3, 1, 1), some(-1, 1, 3, 1, 1)
    clutter = F.interpolate(torch.randn(count, 3, 5, 5, generator=draw), size=SIZE, mode="bilinear")
    picture = behind + shape[:, None] * (colour - behind) * 1.5 + 0.5 * clutter
    return picture + 0.5 * torch.randn(count, 3, SIZE, SIZE, generator=draw), labels


def records(pixels: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    return [{"pixel_values": p, "label": n} for p, n in zip(pixels, labels.tolist())]


def float_model(pixels: Tensor, labels: Tensor, epochs: int, seed: int) -> qt.Model:
    """Trained from nothing: AdamW, one cycle."""
    torch.manual_seed(seed)
    config = MobileNetV2Config(
        depth_multiplier=0.25, image_size=SIZE, num_labels=CLASSES, output_stride=8, classifier_dropout_prob=0.0,
        finegrained_output=False,
    )  # fmt: skip
    model = MobileNetV2ForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.05  # the class has 0.997 there, with which the averages are the last batch's
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    batches = -(-len(labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[rows]).logits, labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return qt.Model(model.eval(), ImageProcessor(), "images")


def run(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One seed: accuracy on the test images of every way."""
    began = time.process_time()
    draw = torch.Generator().manual_seed(seed)
    pixels, labels = images(options.images, draw)
    model = float_model(pixels, labels, options.epochs, seed)
    names = [str(n) for n in range(CLASSES)]
    model.model.config.id2label = dict(enumerate(names))
    train = examples_for(model, records(pixels, labels))
    choose, test = (examples_for(model, records(*images(n, draw))) for n in (200, 1000))
    settings = qt.Settings(
        steps=options.steps, batch_size=32, evaluations=3, seed=seed, learning_rate=options.rate, kl_weight=0.5,
        task_weight=0.5,
    )  # fmt: skip
    control = qt.Settings(**{**vars(settings), "kl_weight": 0.0, "task_weight": 1.0})
    tuned = qt.train(model, train, scheme="float", eval_data=choose, settings=control)
    found = {"float": qt.eval(model, test).value, "float+": qt.eval(tuned, test).value}
    for scheme in SCHEMES:
        rules = [qt.Rule(qt.Scheme.parse(scheme), module_type=kind) for kind in ("Conv2d", "Linear")]
        ptq = qt.quantize(model, scheme, data=train, samples=128, rules=rules, method="rtn", seed=seed)
        assert ptq.state is not None and len(ptq.state.folded) == 52
        done = qt.train(ptq, train, eval_data=choose, teacher=model, settings=settings)
        found[f"{scheme} PTQ"], found[f"{scheme} QAT"] = qt.eval(ptq, test).value, qt.eval(done, test).value
        served = qt.pack(done)
        found[f"{scheme} packed"] = qt.eval(served, test).value
    return {"accuracy": found, "seconds": time.process_time() - began, "load": os.getloadavg()[0]}


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "interval": interval(values), "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30, help="of QAT")
    parser.add_argument("--rate", type=float, default=5e-4, help="of QAT and float+")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "quantailor-mobilenet")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in range(options.seeds):
        path = options.cache / f"{options.images}x{options.epochs}-{options.steps}at{options.rate}-seed{seed}.json"
        if not path.exists():
            result = run(seed, options)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result) + "\n")
        runs.append(json.loads(path.read_text()))
        print(seed, runs[-1], flush=True)
    ways = {way: spread([r["accuracy"][way] for r in runs]) for way in runs[0]["accuracy"]}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    document = {
        "question": "W8A8 and W4A4 of a MobileNetV2 with folded norms: float, PTQ, QAT",
        "ways": ways,
        "seeds": list(range(options.seeds)),
        "settings": {n: v for n, v in vars(options).items() if n not in ("cache", "out")},
        "loads": [r["load"] for r in runs],
        "environment": environment(),
        "commit": commit.stdout.strip(),
        "command": shlex.join(["python", "bench/mobilenet.py", *sys.argv[1:]]),
    }
    for way, row in ways.items():
        print(f"{way:20}{row['mean']:.4f}  {row['interval']}")
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
