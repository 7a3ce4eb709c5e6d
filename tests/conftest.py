"""What the tests share: one thread, a fixed seed, the real models and data, and two tiny models made on the spot.

The real ones are looked for in the folder that QUANTAILOR_DATA names, by default ../shared/data beside the repository.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in two processes side by side
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may be fetched: a test that tries fails at once

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with `models/`, `text/` and `tasks/`; without it, the tests that need it say so and are skipped."""
    folder = Path(os.environ.get("QUANTAILOR_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / "models").is_dir():
        pytest.skip(f"no real models and data in {folder}; set QUANTAILOR_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def stories260k(data_dir: Path) -> Path:
    """A published Llama of 260,032 parameters with an ffn width (172) that no group of 32 or 64 divides."""
    return data_dir / "models" / "stories260k"


@pytest.fixture(scope="session")
def tinystories_4m(data_dir: Path) -> Path:
    """A Llama of 3.7 M parameters whose widths suit groups of 32, 64 and 128."""
    return data_dir / "models" / "tinystories-llama-4m"


@pytest.fixture(scope="session")
def minilm(data_dir: Path) -> Path:
    """A published BERT encoder of 22.7 M parameters, without a classification head."""
    return data_dir / "models" / "minilm-l6-v2"


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama: 2 layers, hidden 64, 4 heads on 2 KV heads, ffn 172, 303 byte-level tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_lm")
    tokenizer = _byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,  # at 0.02 the logits are almost flat, and no quantization would show
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT classifier of two classes: 2 layers, hidden 32, 4 heads, ffn 72, tokens = letters."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny_bert")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=64).save_pretrained(
        folder
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.5,  # at 0.1 every text gets the same class
        num_labels=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def _byte_level_tokenizer():
    """303 tokens: <pad>, <s>, </s>, every byte, and merges of what is frequent in English; <s> opens each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pairs = "h e|i n|r e|o n|e r|a t|o u|s t|e n|o r|a n|i t|i s|e d|a r|a l|l e|v e|i ng|l y|a y|o w|e s|w h|i m|a d"
    pairs += "|Ġ t|Ġ a|Ġ s|Ġ w|Ġ b|Ġ h|Ġ m|Ġ f|Ġ d|Ġ p|Ġ c|Ġt he|Ġa n|Ġt o|Ġw as|Ġan d"
    merges = [("n", "g"), ("a", "s"), *(tuple(pair.split()) for pair in pairs.split("|"))]
    words = [
        *("<pad>", "<s>", "</s>"),
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *dict.fromkeys(a + b for a, b in merges),
    ]
    core = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
