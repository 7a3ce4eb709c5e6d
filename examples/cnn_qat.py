"""QAT of a MobileNetV2 with folded norms, packed, saved and proved:   python examples/cnn_qat.py OUT"""

import sys

import torch
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

import quantailor as qt


def images(count):  # a bright quarter in noise, and which
    pixels, labels = torch.randn(count, 3, 32, 32), torch.arange(count) % 4
    for image, label in zip(pixels, labels.tolist()):
        image[:, 16 * (label // 2) :, 16 * (label % 2) :][:, :16, :16] += 2
    return [{"pixel_values": p, "label": n} for p, n in zip(pixels, labels.tolist())]


torch.manual_seed(0)
config = MobileNetV2Config(depth_multiplier=0.1, image_size=32, num_labels=4)
MobileNetV2ForImageClassification(config).save_pretrained("float-cnn")
settings = qt.Settings(steps=30, batch_size=16, learning_rate=5e-3, evaluations=2)
model = qt.train("float-cnn", images(160), scheme="float", eval_data=images(40), settings=settings)
print("float:", qt.eval(model, test := images(100)))
trained = qt.train(model, images(160), scheme="w4a4-static", method="rtn", samples=16, settings=settings)
print("QAT:  ", qt.eval(trained, test), trained.state.notes[:1])
print(qt.check(qt.save(trained, sys.argv[1] if len(sys.argv) > 1 else "cnn-w4a4")).to_json())
