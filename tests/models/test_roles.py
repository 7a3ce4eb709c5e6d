"""What layers are for, on models that name them in their own ways."""

import pytest
import torch
from torch import nn

from quantailor.models.roles import find_roles
from tests.models import zoo


def by_role(model, block=0, probe=None):
    """{role: names of the first block's units and of what stands outside}, and the notes."""
    found = find_roles(model, probe)
    table = {}
    for unit in found:
        if unit.block in (None, block):
            table.setdefault(unit.role, []).append(unit.name)
    return table, found.notes


def test_a_llama():
    table, notes = by_role(zoo.llama())
    assert notes == ()
    assert table == {
        "embedding": ["model.embed_tokens"],
        "scores": ["model.layers.0"],
        "q/k/v": ["model.layers.0.self_attn.{q_proj,k_proj,v_proj}"],
        "o": ["model.layers.0.self_attn.o_proj"],
        "ffn in": ["model.layers.0.mlp.{gate_proj,up_proj}"],
        "ffn out": ["model.layers.0.mlp.down_proj"],
        "norm": ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"],
        "head": ["lm_head"],
    }


def test_a_bert():
    table, notes = by_role(zoo.bert())
    assert notes == () and table["q/k/v"] == ["bert.encoder.layer.0.attention.self.{query,key,value}"]
    assert table["o"] == ["bert.encoder.layer.0.attention.output.dense"]
    assert table["ffn in"] == ["bert.encoder.layer.0.intermediate.dense"]
    assert table["ffn out"] == ["bert.encoder.layer.0.output.dense"]
    assert table["head"] == ["bert.pooler.dense", "classifier"] and len(table["embedding"]) == 3


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("gpt2", ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
        ("albert", ["{query,key,value}", "attention.dense", "ffn", "ffn_output"]),
        ("t5", ["{q,k,v}", "SelfAttention.o", "wi", "wo"]),
    ],
)
def test_other_families(name, roles):
    table, notes = by_role(getattr(zoo, name)())
    assert notes == ()
    for role, ending in zip(("q/k/v", "o", "ffn in", "ffn out"), roles):
        assert [n for n in table[role] if n.endswith(ending)] == table[role], role


class Renamed(nn.Module):
    """A block whose names say nothing, or the wrong thing: a.w1 is the value, a.q_proj the output of attention."""

    def __init__(self, width=16):
        super().__init__()
        self.norm, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.a = nn.ModuleDict({n: nn.Linear(width, width) for n in ("w1", "w2", "w3", "q_proj")})
        self.b = nn.ModuleDict(
            {"v_proj": nn.Linear(width, 24), "down": nn.Linear(width, 24), "k": nn.Linear(24, width)}
        )

    def forward(self, hidden):
        x = self.norm(hidden)
        value, query, key = self.a["w1"](x), self.a["w2"](x), self.a["w3"](x)
        p = (query @ key.transpose(1, 2) / 4).softmax(-1)
        hidden = hidden + self.a["q_proj"](p @ value)
        x = self.other(hidden)
        return hidden + self.b["k"](self.b["v_proj"](x).relu() * self.b["down"](x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList([Renamed(), Renamed()])
        self.out = nn.Linear(16, 20)

    def forward(self, input_ids):
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def test_it_is_found_by_watching_and_not_by_names():
    table, notes = by_role(Model().eval(), probe={"input_ids": torch.arange(1, 9)[None]})
    assert notes == ()
    assert {k: v for k, v in table.items() if k not in ("norm", "scores")} == {
        "embedding": ["table"],
        "q/k/v": ["blocks.0.a.{w1,w2,w3}"],
        "o": ["blocks.0.a.q_proj"],
        "ffn in": ["blocks.0.b.{v_proj,down}"],
        "ffn out": ["blocks.0.b.k"],
        "head": ["out"],
    }


def test_shared_weights_are_one_unit():
    units = {u.name: u for u in find_roles(zoo.llama(tie=True))}
    tied = units["{model.embed_tokens,lm_head}"]
    assert tied.role == "embedding" and tied.layers == ("model.embed_tokens", "lm_head") and tied.num_weights == 50 * 32


def test_every_layer_and_norm_is_in_exactly_one_unit():
    for name in ("llama", "bert", "masked_bert", "gpt2", "albert", "t5", "qwen3_moe", "mlp", "cnn"):
        model = getattr(zoo, name)()
        wanted = [n for n, m in model.named_modules() if "weight" in m._parameters and m.weight is not None]
        wanted = [n for n in wanted if model.get_submodule(n).weight.dim() != 3]
        found = [layer for unit in find_roles(model) if unit.role != "scores" for layer in unit.layers]
        kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
        known = [
            n
            for n in wanted
            if isinstance(model.get_submodule(n), kinds)
            or type(model.get_submodule(n)).__name__ == "Conv1D"
            or model.get_submodule(n).weight.dim() == 1
        ]
        assert sorted(found) == sorted(known), name


def test_names_are_the_fallback_and_a_note_says_so():
    class Silent(nn.Module):
        """Its blocks run, but nothing can be fed to them."""

        def __init__(self):
            super().__init__()
            self.h = zoo.llama().model.layers

    table, notes = by_role(Silent())
    assert "roles are read from names" in notes[0]
    assert table["q/k/v"] == [f"h.0.self_attn.{n}_proj" for n in "qkv"] and table["o"] == ["h.0.self_attn.o_proj"]
    assert table["ffn in"] == ["h.0.mlp.gate_proj", "h.0.mlp.up_proj"] and table["ffn out"] == ["h.0.mlp.down_proj"]


def test_the_model_is_left_as_it_was():
    model = zoo.llama().train()
    model.model.norm.eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    find_roles(model)
    assert model.training and not model.model.norm.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_untied_takes_units_of_a_block_apart_and_leaves_shared_weights_together():
    model = zoo.llama(tie=True)
    found = find_roles(model)
    alone = found.untied(model)
    assert [u.num_weights for u in alone.of("q/k/v")][:3] == [1024, 512, 512]
    assert alone.of("embedding") == found.of("embedding") and alone.of("scores") == found.of("scores")
    assert [n for u in alone for n in u.layers] == [n for u in found for n in u.layers]
