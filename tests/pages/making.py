"""Receipts for the tests of pages: what `fit` writes, small and by hand; and texts that mean harm."""

import copy
from html.parser import HTMLParser
from typing import Any

FIT: dict[str, Any] = {
    "verdict": "hybrid",
    "metric": "perplexity",
    "float": {"value": 10.0},
    "final": {"name": "hybrid", "value": 10.1, "loss": 0.01},
    "tolerance": 0.02,
    "scheme": "w4a16-g32",
    "method": "gptq+qat",
    "steps": [
        {"name": "float", "value": 10.0, "reason": "what the tolerance is measured from", "seconds": 1.0, "loss": 0.0,
         "change_interval": None, "result": {"interval": [9.0, 11.0], "nats_per_token": 2.3026, "num_tokens": 4096}},
        {"name": "gptq", "value": 11.0, "reason": "the cheapest: no solver, seconds", "seconds": 2.0, "loss": 0.1,
         "change_interval": [0.5, 1.5], "result": {"interval": [10.0, 12.0], "nats_per_token": 2.3979}},
        {"name": "hybrid", "value": 10.1, "reason": "gptq lost 10.00%, over 2.00%: 40 steps of QAT from there",
         "seconds": 6.0, "loss": 0.01, "change_interval": [-0.1, 0.3],
         "result": {"interval": [9.1, 11.1], "nats_per_token": 2.3125, "kl": 0.0123, "kl_interval": [0.01, 0.02],
                    "top1_agreement": 0.91},
         "training": {"steps": 40, "best_step": 40, "learning_rate": 1e-3, "scale_learning_rate": 5e-4,
                      "curve": [[0, 2.4], [20, 2.5], [40, 2.3]], "losses": [[10, 1.0], [20, 1.1], [30, 0.9], [40, 5.0]],
                      "notes": ["training diverged once; it went on from its best iterate at half the learning rate"]}},
    ],
    "size_bytes": 1_000_000, "bits_per_weight": 4.5, "float_size_bytes": 8_000_000, "float_bits_per_weight": 32.0,
    "num_weights": 2_000_000, "coverage": 0.9, "recovery": 0.9, "recovery_control": 0.75,
    "check": {"equal": True, "layers": 14, "integers_compared": 90_624, "max_logit_difference": 1.5e-7,
              "tolerance": 1e-5, "top1_equal": True, "differing": []},
    "notes": ["2 layers have a shorter last group"],
    "inventory": [
        {"name": "model.embed", "type": "Embedding", "num_weights": 1000, "scheme": None, "reason": "in float"},
        *({"name": f"model.layers.{block}.{part}_proj", "type": "Linear", "num_weights": 4096, "scheme": "w4a16-g32",
           "reason": "in a repeated block", "report": {"method": "gptq", "output_error": 0.1 + 0.01 * block}}
          for block in range(3) for part in "qk"),
        {"name": "", "type": "Whole", "num_weights": 5, "scheme": None, "reason": "output head: kept"},
    ],
    "seed": 7,
    "command": "quantailor fit ./model --scheme w4a16-g32",
    "environment": {"quantailor": "0.1.0", "torch": "2.13", "threads": "1"},
}  # fmt: skip
RECEIPT: dict[str, Any] = {
    "scheme": "w4a16-g32", "method": "gptq+qat", "format": "compressed-tensors",
    "format_reason": "stock transformers reads it", "coverage": 0.9, "notes": ["a note"], "inventory": FIT["inventory"],
    "digests": {}, "details": {"parent": {"folder": "model", "hash": "ab" * 32}, "training": None},
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "versions": {"quantailor": "0.1.0", "torch": "2.13"},
    "files": {
        "model.safetensors": {"size_bytes": 1_000_000, "sha256": "cd" * 32},
        "parity.safetensors": {"size_bytes": 999, "sha256": "ef" * 32},
    },
    "checksum": "12" * 32,
}
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>document.title='owned'</script>",
    "</style></title></textarea><img src=x onerror=alert(1)>",
    "\" onmouseover=\"alert(1)\" x=\"",
    "' onfocus='alert(1)' autofocus='",
    "{{ 7 * 7 }}{% raw %}{0}{key}",
    "javascript:alert(1) http://example.org/p.png //example.org/x",
    "a\x00b\x08c\x1b[31md\x7f\x85",
    "\u202etxt.exe\u202c \u2066x\u2069 \u200b\ufeff \u2028",
    "\ud800 alone \udfff",
    "שלום עולם مرحبا",
    "]]><!--<![CDATA[ <svg onload=alert(1)>",
    "x" * 1_000_000,
    "%s %(name)s \\u003c &lt; &amp;",
]  # fmt: skip


def hostile_fit(text: str) -> dict[str, Any]:
    """FIT with `text` wherever a stranger could put it."""
    data = copy.deepcopy(FIT)
    data["notes"] = [text]
    data["scheme"] = data["method"] = data["command"] = text
    data["environment"][text[:5000]] = text
    for entry in data["inventory"][1:4]:
        entry["name"] = entry["type"] = entry["reason"] = text
    data["inventory"][5]["name"] = f"model.layers.1.{text}"
    data["steps"][1]["name"] = data["steps"][1]["reason"] = text
    data["steps"][2]["training"]["notes"] = [text, f"diverged {text}"]
    data["steps"][2]["training"]["alarms"] = [{"step": 20, "what": text}]
    data["check"]["differing"] = [{"layer": text, "what": text}]
    return data


VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page taken apart, strictly: every element that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.inside.setdefault(self.open[-1] if self.open else "", []).append(data)
        if "style" not in self.open and "script" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
