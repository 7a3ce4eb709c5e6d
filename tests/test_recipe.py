import pytest
import torch
from torch import nn

from quantailor.errors import UsageError
from quantailor.recipe import Keep, Recipe, Rule, block_prefixes, in_features
from quantailor.spec import Scheme
from tests.models import zoo

W4 = Scheme.parse("w4a16-g32")
W8 = Scheme.parse("w8a8")
FLOAT = Scheme.parse("float")


def assign(model, *rules, scheme=W4):
    return {e.name: e for e in Recipe(scheme, rules).assign(model)}


@pytest.mark.parametrize(
    "make",
    [
        *(zoo.llama, lambda: zoo.llama(tie=True), zoo.bert, zoo.masked_bert, zoo.albert, zoo.gpt2, zoo.t5),
        *(zoo.qwen3_moe, zoo.mlp, zoo.cnn),
    ],
)
def test_every_parameter_is_in_the_inventory_once(make):
    model = make()
    inventory = Recipe(W4).assign(model)
    unique = {id(p): p.numel() for p in model.parameters()}
    assert sum(e.num_weights for e in inventory if e.tied_to is None) == sum(unique.values())
    with_parameters = [n for n, m in model.named_modules() if list(m.parameters(recurse=False))]
    assert [e.name for e in inventory] == with_parameters
    assert all(e.reason for e in inventory)
    quantized = sum(model.get_submodule(n).weight.numel() for n in inventory.quantized)
    assert inventory.coverage == quantized / sum(unique.values())
    assert f"{inventory.coverage:.1%} of all weights quantized" in str(inventory)
    assert {e["name"]: e["scheme"] for e in (e.to_json() for e in inventory)} == {
        e.name: str(e.scheme) if e.scheme else None for e in inventory
    }


def test_by_default_the_blocks_are_quantized_and_the_rest_is_kept_with_its_reason():
    found = assign(zoo.llama())
    inside = {n for n in found if ".layers." in n and n.endswith("_proj")}
    assert {n for n, e in found.items() if e.scheme == W4} == inside and len(inside) == 14
    reasons = {n: e.reason for n, e in found.items() if e.scheme is None}
    assert reasons["model.embed_tokens"] == "embedding: kept unless a rule names it"
    assert reasons["lm_head"] == "output head: kept unless a rule names it"
    assert reasons["model.norm"] == "not a matrix product: kept in float"
    assert {found[n].reason for n in inside} == {"in a repeated block"}
    assert assign(zoo.bert())["classifier"].reason == "outside the repeated blocks: kept unless a rule names it"


def test_convolutions_of_gpt2_are_linears_stored_the_other_way_round():
    found = assign(zoo.gpt2())
    assert found["transformer.h.0.mlp.c_fc"].kind == "Conv1D" and found["transformer.h.0.mlp.c_fc"].scheme == W4
    assert in_features("Conv1D", found["transformer.h.0.mlp.c_fc"].shape) == 32
    assert in_features("Linear", (5, 32)) == 32 and in_features("Conv2d", (8, 3, 5, 7)) == 105


def test_fused_experts_are_named_and_never_skipped():
    found = assign(zoo.qwen3_moe())
    experts = found["model.layers.1.mlp.experts"]
    assert experts.scheme is None and experts.num_weights == 4 * 48 * 32 + 4 * 32 * 24
    assert experts.reason.startswith("fused 3-D tensor [4, 48, 32], as experts are stored: not quantized")
    assert found["model.layers.1.mlp.gate"].reason.startswith("a Qwen3MoeTopKRouter is none of Linear, Conv1D")
    with pytest.raises(UsageError, match=r"cannot be quantized, such as model\.layers\.\d\.mlp\.experts, a Qwen3Moe"):
        assign(zoo.qwen3_moe(), Rule(W8, pattern="*.experts"))


def test_models_without_blocks_are_quantized_whole():
    found = assign(zoo.mlp())
    assert {n: e.reason for n, e in found.items() if e.scheme} == {"0": "default scheme", "3": "default scheme"}
    found = assign(zoo.cnn())
    assert {n for n, e in found.items() if e.scheme} == {"stem", "same", "head"}
    assert found["depthwise"].reason.startswith("grouped convolution: too few inputs a channel for groups")
    assert assign(zoo.cnn(), scheme=W8)["depthwise"].scheme == W8


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)


class PartLayer(Part):
    pass


def test_what_counts_as_blocks():
    stack = nn.Sequential(Part(), Part(), Part())
    assert block_prefixes(nn.ModuleDict({"body": stack, "head": nn.Linear(8, 2)})) == ("body.",)
    assert block_prefixes(stack) == ("",)  # the model is the list
    assert {n for n, e in assign(stack, scheme=W8).items() if e.scheme} == {
        f"{i}.{n}" for i in range(3) for n in ("up", "down")
    }
    two_lists = nn.ModuleDict({"encoder": nn.ModuleList([Part(), Part()]), "decoder": nn.ModuleList([Part(), Part()])})
    assert block_prefixes(two_lists) == ("encoder.", "decoder.")
    nested = nn.ModuleList([nn.ModuleList([Part(), Part()]), nn.ModuleList([Part(), Part()])])
    assert block_prefixes(nn.ModuleDict({"layers": nested})) == ("layers.",)  # the outermost
    assert block_prefixes(nn.ModuleDict({"layers": nn.ModuleList([Part()])})) == ()
    assert block_prefixes(nn.ModuleDict({"layers": nn.ModuleList([PartLayer()])})) == ("layers.",)
    assert block_prefixes(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})) == ()
    assert block_prefixes(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ()


def test_the_first_rule_that_matches_decides():
    first, keep = Rule(W8, pattern="*.down_proj"), Rule(Keep("too sensitive"), pattern="*.layers.0.*")
    found = assign(zoo.llama(), first, keep)
    assert found["model.layers.0.mlp.down_proj"].scheme == W8
    assert found["model.layers.0.mlp.down_proj"].reason == "rule: name '*.down_proj'"
    assert found["model.layers.0.mlp.up_proj"].scheme is None
    assert found["model.layers.0.mlp.up_proj"].reason == "too sensitive"
    assert found["model.layers.1.mlp.up_proj"].scheme == W4
    found = assign(zoo.llama(), keep, first)
    assert found["model.layers.0.mlp.down_proj"].scheme is None and found["model.layers.1.mlp.down_proj"].scheme == W8


def test_a_rule_holds_where_all_its_conditions_do():
    found = assign(
        zoo.llama(),
        Rule(W8, pattern="model.layers.*", module_type="Linear", more_than=1024, fewer_than=1409),
        Rule(FLOAT, more_than=511, fewer_than=513, module_type="Linear"),
    )
    by_size = {n.split(".")[-1]: e for n, e in found.items() if "layers.0" in n}
    assert by_size["q_proj"].num_weights == 1024 and by_size["q_proj"].scheme == W4
    assert by_size["k_proj"].num_weights == 512 and by_size["k_proj"].scheme is None
    assert by_size["k_proj"].reason == "rule: type Linear and more than 511 weights and fewer than 513 weights"
    assert by_size["up_proj"].num_weights == 1408 and by_size["up_proj"].scheme == W8
    assert found["lm_head"].scheme is None  # 1600 weights
    assert str(Rule(W8)) == "every module"


def test_small_layers_stay_float_and_each_other_one_keeps_its_own_reason():
    """Partial quantization by size: the default scheme for what is large, norms, embeddings and head as ever."""
    found = assign(zoo.llama(), Rule(Keep("rule: size<1000=keep"), fewer_than=1000))
    quantized = {n.split(".")[-1] for n, e in found.items() if e.scheme is not None}
    assert quantized == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    reasons = {n.split(".")[-1]: e.reason for n, e in found.items() if e.scheme is None}
    assert reasons["k_proj"] == reasons["v_proj"] == "rule: size<1000=keep"
    assert reasons["norm"] == reasons["input_layernorm"] == "not a matrix product: kept in float"
    assert reasons["embed_tokens"].startswith("embedding: kept") and reasons["lm_head"].startswith("output head: kept")


def test_a_size_that_only_norms_fall_under_is_refused():
    with pytest.raises(UsageError, match=r"hits only what cannot be quantized, such as .*norm.*fewer than 100"):
        assign(zoo.llama(), Rule(Keep("small"), fewer_than=100))


def test_rules_reach_the_head_and_embeddings():
    found = assign(zoo.llama(), Rule(W8, module_type="Embedding"), Rule(W8, pattern="lm_head"))
    assert found["model.embed_tokens"].scheme == W8 and found["lm_head"].scheme == W8


@pytest.mark.parametrize("rule", [Rule(W8, pattern="model.layer.*"), Rule(Keep("no"), module_type="Conv2d")])
def test_a_rule_that_matches_nothing_is_an_error(rule):
    with pytest.raises(UsageError) as error:
        assign(zoo.llama(), Rule(W8, pattern="*.down_proj"), rule)
    assert str(error.value).startswith(f"a rule matches nothing: {rule}; names look like model.layers.0.self_attn.q_pr")


@pytest.mark.parametrize("pattern", ["model.norm", "*norm*"])
def test_a_rule_that_could_quantize_nothing_it_matches_is_an_error(pattern):
    with pytest.raises(UsageError) as error:
        assign(zoo.llama(), Rule(W8, pattern=pattern))
    assert "LlamaRMSNorm (not a matrix product: kept in float)" in str(error.value)
    assert assign(zoo.llama(), Rule(Keep("as it is"), pattern=pattern))["model.norm"].reason == "as it is"
    assert assign(zoo.llama(), Rule(FLOAT, pattern=pattern))["model.norm"].scheme is None
    assert assign(zoo.llama(), Rule(W8, pattern="*"))["model.norm"].scheme is None  # it hits Linears as well


def test_a_ragged_group_may_be_refused():
    assert assign(zoo.llama())["model.layers.0.mlp.down_proj"].scheme == W4  # 44 = 32 + 12
    with pytest.raises(UsageError) as error:
        assign(zoo.llama(), scheme=W4.with_ragged(False))
    told = "model.layers.0.mlp.down_proj: group_size=32 does not divide in_features=44; use 4, allow a ragged last"
    assert str(error.value).startswith(told)
    with pytest.raises(UsageError, match="group_size=32 does not divide in_features=40; use 4, 8"):
        assign(zoo.mlp(), Rule(Keep("20 inputs"), pattern="0"), scheme=W4.with_ragged(False))
    with pytest.raises(UsageError, match="use 47, allow"):  # a prime
        assign(nn.Sequential(nn.Linear(47, 4)), scheme=W4.with_ragged(False))
    assert assign(zoo.llama(), scheme=Scheme.parse("w4a16-g4").with_ragged(False))


def test_tied_weights_need_one_scheme():
    tied = zoo.llama(tie=True)
    head = assign(tied)["lm_head"]
    assert head.tied_to == "model.embed_tokens" and head.scheme is None
    with pytest.raises(UsageError) as error:
        assign(tied, Rule(W4, pattern="lm_head"))
    assert str(error.value).startswith("model.embed_tokens and lm_head share one weight but not one scheme; add a rule")
    with pytest.raises(UsageError, match="share one weight but not one scheme"):
        assign(tied, Rule(W4, pattern="lm_head"), Rule(Scheme.parse("w4a16-g64"), pattern="*.embed_tokens"))
    both = assign(tied, Rule(W8, pattern="lm_head"), Rule(Scheme.parse("w8a16"), pattern="*.embed_tokens"))
    assert both["lm_head"].scheme == W8  # the weight's spec is the same; inputs may differ


def test_quantizing_nothing_is_an_error_unless_asked_for():
    with pytest.raises(UsageError, match="would quantize nothing in this model; its modules are kept: in vain"):
        assign(zoo.mlp(), Rule(Keep("in vain")))
    with pytest.raises(UsageError, match="its modules are kept: it has no weights"):
        assign(nn.ReLU())
    assert {e.reason for e in assign(zoo.mlp(), scheme=FLOAT).values() if e.kind == "Linear"} == {"scheme float"}


def test_layers_that_have_no_packed_form_are_kept():
    odd = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4)
    )
    found = assign(odd, scheme=W8)
    assert found["0"].reason == "padding_mode='reflect': only zeros can be packed; kept in float"
    assert found["1"].reason == "max_norm=1.0 rewrites the table at each look-up; kept in float"
    assert assign(odd, Rule(W8), scheme=W8)["2"].scheme == W8


def test_only_names_types_and_shapes_are_read():
    with torch.device("meta"):
        on_meta = zoo.gpt2()
    assert {n: e.scheme for n, e in assign(on_meta).items()} == {n: e.scheme for n, e in assign(zoo.gpt2()).items()}
