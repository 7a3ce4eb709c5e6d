"""One form of receipt for every export."""

import dataclasses
import json

import pytest

from quantailor.formats.receipt import ExportReceipt, refusal


def test_a_receipt_is_frozen_and_plain_data():
    receipt = ExportReceipt("gguf", ("a.gguf",), 2, True, 0.5, ("note",), None, {"x": "scales"}, 1e-4)
    data = json.loads(json.dumps(receipt.to_json()))
    assert data["differing"] == [{"layer": "x", "what": "scales"}]
    assert data["integers_equal"] is True and data["refused"] is None and data["max_logit_difference"] == 0.5
    assert set(data) == {f.name for f in dataclasses.fields(ExportReceipt)} - {"differences"} | {"differing"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        receipt.layers = 3


def test_a_refusal_claims_nothing():
    receipt = refusal("gguf", "nf4 has no block")
    assert receipt.refused == "nf4 has no block" and not receipt.integers_equal and receipt.files == ()
