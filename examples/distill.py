"""What a teacher can say beside its logits, at 2 bits:   python examples/distill.py [STEPS]"""

import sys

import quantailor as qt
from quantailor.demo import MODEL, texts

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
train, valid = (documents[:20] for documents in texts())
ways = {
    "KL of logits": {},
    "CAKLD": {"divergence": "cakld"},  # KL both ways, by how sure the teacher is
    "JSD": {"divergence": "jsd"},
    "and hidden states, attention scores": {"hidden_weight": 1.0, "attention_weight": 1.0},  # TernaryBERT
}
start = qt.quantize(MODEL, "w2a16-g32", data=train, samples=8)
print("PTQ:", qt.eval(start, valid[2:8]))
for name, options in ways.items():
    settings = qt.Settings(steps=steps, evaluations=1, **options)
    model = qt.train(start, train, eval_data=valid[:2], teacher=MODEL, settings=settings, context=128)
    print(f"{name}:", qt.eval(model, valid[2:8]), [n for n in model.notes if "gamma" in n])
