"""One bit a weight, three ways to train it:   python examples/binary.py [STEPS]"""

import sys

import quantailor as qt
from quantailor.demo import MODEL, texts

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
train, valid = (documents[:20] for documents in texts())
# learned scales; XNOR-Net's mean magnitudes and gradient; BinaryConnect's fixed levels and clipped float weights.
# The scheme w1a1 makes the activations binary as well.
for gradient in ("lsq", "xnor", "binaryconnect"):
    settings = qt.Settings(steps=steps, gradient=gradient, evaluations=1)
    options = {"eval_data": valid[:2], "samples": 8, "context": 128, "settings": settings}
    model = qt.train(MODEL, train, scheme="w1a16-g32", **options)
    packed = qt.pack(model)
    words = packed.model.model.layers[0].self_attn.q_proj.packed.words
    print(f"{gradient}: {qt.eval(packed, valid[2:8])}; q_proj in {words.numel() * words.element_size()} bytes")
