"""An adapter trained inside the rounding merges exactly:   python examples/lora_qat.py [STEPS]"""

import sys

import torch

import quantailor as qt
from quantailor.demo import MODEL, texts

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
train, valid = (documents[:40] for documents in texts())
settings = qt.Settings(steps=steps, batch_size=2, evaluations=1, learning_rate=5e-3)
ids = torch.arange(3, 67)[None]
for inside in (True, False):  # LoRA-QAT, and QLoRA beside the rounding
    lora = qt.LoRA(r=8, target_modules=("q_proj", "v_proj"), inside=inside)
    options = {"scheme": "w3a16-g32", "method": "rtn", "samples": 8, "context": 64, "lora": lora, "settings": settings}
    tuned = qt.train(MODEL, train, eval_data=valid[:4], **options)
    with torch.no_grad():
        trained, merged = (m.model.eval()(input_ids=ids).logits for m in (tuned, qt.merge(tuned)))
    print(
        "inside" if inside else "beside", "the rounding: merging moves logits by", float((trained - merged).abs().max())
    )
    qt.save_adapter(tuned, f"adapter-{inside}")
print(qt.lora_size(tuned, lora))
