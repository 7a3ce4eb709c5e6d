"""What does it cost to solve one layer, and how good are the integers?

Seconds and relative output error ||(W - W_hat) X|| / ||W X|| of our methods and of the rivals' own routines, at the
sizes of a BERT and of a 1.1B Llama, groups of 128, asymmetric, from X^T X of 65,536 tokens (correlated inputs, 1 % of
them outlier channels). Gathering X^T X is timed apart: everybody needs it. Range search, factorization and rounding
are inside. The rounds are interleaved, each rival in a process of its own environment (bench/rivals/README.md).

    OMP_NUM_THREADS=2 python bench/ptq_cost.py [--venvs DIR] [--rounds 5] [--out FILE]

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantailor import ptq
from quantailor.api import environment
from quantailor.numerics import grids
from quantailor.numerics.grouping import from_groups, to_groups
from quantailor.ptq.statistics import Statistics
from quantailor.spec import Scheme

SIZES = {"768x3072": (768, 3072), "2048x5632": (2048, 5632)}  # inputs x outputs
TOKENS, GROUP = 65_536, 128
OURS = ("rtn", "hqq", "gptq", "qronos")
RIVALS = ("gptqmodel", "llmcompressor", "hqq")
HERE = Path(__file__).parent


def problem(inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(weight [O, N], X^T X [N, N], seconds for the latter)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.02
    rank = inputs // 4
    mix = torch.randn(rank, inputs, generator=generator) / rank**0.5
    gain = torch.ones(inputs)
    gain[torch.randperm(inputs, generator=generator)[: inputs // 100]] = 20.0
    hessian, seconds = torch.zeros(inputs, inputs), 0.0
    for _ in range(TOKENS // 4096):
        x = torch.randn(4096, rank, generator=generator) @ mix
        x = (x + 0.3 * torch.randn(4096, inputs, generator=generator)) * gain
        start = time.perf_counter()
        hessian.addmm_(x.t(), x)
        seconds += time.perf_counter() - start
    return weight, hessian, seconds


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """||(W - W_hat) X|| / ||W X||, in float64."""
    h, w, d = hessian.double(), weight.double(), (weight - rounded).double()
    return float(((d @ h * d).sum() / (w @ h * w).sum()).sqrt())


class Ours:
    """One of our methods on the layer's statistics."""

    def __init__(self, method: str, folder: Path, bits: int) -> None:
        data = load_file(folder / "layer.safetensors")
        self.weight, hessian = data["weight"], data["hessian"]
        self.spec = Scheme.parse(f"w{bits}a16-g{GROUP}-asym").weight
        self.chain = ptq.method(method)
        self.statistics = Statistics.empty(self.weight.shape[1], True, torch.device("cpu"))
        self.statistics.hessian, self.statistics.diagonal = hessian, hessian.diagonal().clone()
        self.statistics.cross, self.statistics.num_rows = hessian.clone(), TOKENS
        self.solution: Any = None

    def seconds(self) -> float:
        assert self.spec is not None
        start = time.perf_counter()
        self.solution = self.chain.solve(self.weight, self.statistics, self.spec)
        return time.perf_counter() - start

    def rounded(self) -> torch.Tensor:
        assert self.spec is not None
        q = to_groups(self.solution.q, GROUP)
        return from_groups(
            grids.decode(q, self.solution.scale, self.solution.zero_point, self.spec.grid), self.weight.shape[1]
        )

    def close(self) -> None:
        """Nothing to end."""


class Rival:
    """A rival's routine behind a pipe: it solves the layer once for each line it is sent."""

    def __init__(self, name: str, python: Path, folder: Path, bits: int) -> None:
        self.folder, self.name = folder, name
        self.process = subprocess.Popen(
            [python, HERE / "rivals" / f"cost_{name}.py", folder, str(bits), str(GROUP)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / f"{name}.log").open("w"), text=True,
        )  # fmt: skip
        self.versions = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        log = (self.folder / f"{self.name}.log").read_text().strip().splitlines()
        raise RuntimeError(log[-1] if log else "it ended without a word")

    def _ask(self, what: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._read()

    def seconds(self) -> float:
        return float(self._ask("solve")["seconds"])

    def rounded(self) -> torch.Tensor:
        path = self.folder / f"{self.name}.safetensors"
        self._ask(f"save {path}")
        return load_file(path)["weight"]

    def close(self) -> None:
        self.process.kill()


def case(size: str, bits: int, rounds: int, venvs: Path) -> list[dict[str, Any]]:
    inputs, outputs = SIZES[size]
    weight, hessian, gathering = problem(inputs, outputs)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_file({"weight": weight, "hessian": hessian}, folder / "layer.safetensors")
        makers: dict[str, Callable[[], Ours | Rival]] = {
            **{f"quantailor {m}": lambda m=m: Ours(m, folder, bits) for m in OURS},
            **{r: lambda r=r: Rival(r, venvs / r / "bin" / "python", folder, bits) for r in RIVALS},
        }
        running: dict[str, Ours | Rival] = {}
        for name, make in makers.items():
            try:
                running[name] = make()
                running[name].seconds()  # warm
            except Exception as error:  # a rival that cannot be run is a line of the table
                running.pop(name, None)
                rows.append(
                    {"size": size, "bits": bits, "tool": name, "failed": f"{type(error).__name__}: {error}"[:300]}
                )
        times: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(rounds):
            for name, contestant in running.items():
                times[name].append(contestant.seconds())
        for name, contestant in running.items():
            low, middle, high = statistics.quantiles(times[name], n=4)
            error = output_error(weight, contestant.rounded(), hessian)
            versions = contestant.versions if isinstance(contestant, Rival) else None
            rows.append(
                {"size": size, "bits": bits, "tool": name, "seconds": middle, "quartiles": [low, high], "error": error,
                 "rounds": rounds, "about": versions, "gathering_seconds": gathering}
            )  # fmt: skip
            print(
                f"{size:>10} {bits} bit  {name:<18} {middle:8.3f} s [{low:.3f}, {high:.3f}]   error {error:.4f}",
                flush=True,
            )
            contestant.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "quantailor-rivals")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for bits in arguments.bits if size == "768x3072" else arguments.bits[:1]:
            rows += case(size, bits, arguments.rounds, arguments.venvs)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    document = {
        "bench": "ptq_cost", "tokens": TOKENS, "group_size": GROUP, "seed": 0, "rows": rows,
        "environment": environment(), "commit": commit.stdout.strip() or None,
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python bench/ptq_cost.py --rounds {arguments.rounds}",
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
