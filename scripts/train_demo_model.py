"""Train the demo model that ships in quantailor/assets/demo:   python scripts/train_demo_model.py

A 0.9 M parameter Llama and its byte-level BPE tokenizer, from scratch, on the documentation that Python itself carries,
so that `quantailor demo` needs no download and its licence is nobody else's business. Takes some twenty minutes of
one core. The aim is the best model that time buys: an undertrained model has slack, and hides what quantization costs.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantailor.data.python_docs import documents, split

REPOSITORY = Path(__file__).resolve().parents[1]
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
MAX_POSITIONS = 512


@dataclass(frozen=True)
class Settings:
    steps: int = 3200
    batch_size: int = 16
    context: int = 256
    vocab_size: int = 1024
    peak_learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    dropout: float = 0.1  # while training only: the text is seen some twenty times over
    clip_norm: float = 1.0
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte has a token, so nothing is unknown. Puts `<|bos|>` before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [BOS, EOS, PAD]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents in one row, each between `<|bos|>` and `<|eos|>`."""
    rows = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Dropout on what each block adds to the residual stream. By hooks: Llama's own code has none there, and the
    saved configuration must not ask for any when someone fine-tunes the model later.
    """
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.register_forward_hook(lambda module, args, out: dropout(out, rate, module.training))


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < settings.warmup_steps:
        return settings.peak_learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.peak_learning_rate * (1 + math.cos(math.pi * done)) / 2


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean nats per predicted token; each window [batch, length] predicts its last length - 1 tokens."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, stream: Tensor, context: int) -> float:
    """Nats per token over the stream cut into windows of `context` tokens that do not overlap; the rest is left out."""
    model.eval()
    windows = stream[: len(stream) // context * context].view(-1, context)
    losses = [next_token_loss(model, chunk) * len(chunk) for chunk in windows.split(32)]
    model.train()
    return float(torch.stack(losses).sum() / len(windows))


def train(model: LlamaForCausalLM, stream: Tensor, valid: Tensor, settings: Settings) -> list[dict[str, float]]:
    """Returns the curve: every hundred steps the mean training loss since the last, now and then the validation loss.

    Each pass cuts the stream at a new random place and shuffles the windows: all text is seen equally often, and the
    windows are not the same twice. The validation loss is only written down; nothing is chosen by it.
    """
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)
    length = settings.context + 1
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    batches: list[Tensor] = []
    start = time.perf_counter()
    model.train()
    for step in range(settings.steps):
        if not batches:
            offset = int(torch.randint(length, ()))
            windows = stream[offset : offset + (len(stream) - offset) // length * length].view(-1, length)
            shuffled = windows[torch.randperm(len(windows))]
            batches = [batch for batch in shuffled.split(settings.batch_size) if len(batch) == settings.batch_size]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        with torch.autocast("cpu", torch.bfloat16):  # 1.3 times as fast as float32 on a CPU with AMX
            loss = next_token_loss(model, batches.pop())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == settings.steps:
            point = {"step": step + 1, "train_nats_per_token": round(sum(recent) / len(recent), 4)}
            if (step + 1) % 400 == 0:
                point["valid_nats_per_token"] = round(validation_loss(model, valid, settings.context), 4)
            curve.append(point)
            print(f"{time.perf_counter() - start:7.1f} s  {point}", flush=True)
            recent.clear()
    return curve


def cpu_name() -> str:
    """As the kernel names it; platform.processor() is empty on most Linux machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def readme(log: dict) -> str:
    """The model's card, from the same numbers as the log."""
    result, text = log["result"], log["text"]
    return f"""\
# The demo model

A Llama of {log["parameters"]:,} parameters (4 layers, hidden size 128, vocabulary {log["settings"]["vocab_size"]}) for
`quantailor demo` and for tests. It completes Python documentation passably and knows nothing else. It has never
seen more than {log["settings"]["context"]} tokens at once, though the config allows {MAX_POSITIONS}.

- **Trained on** the documentation that CPython {log["versions"]["python"]} carries: its help topics and the standard
  library's docstrings (PSF-2.0), as `quantailor.data.python_docs` collects them; {text["train_tokens"]:,} tokens,
  seen {text["passes"]:.0f} times.
- **Made by** `{log["command"]}` in {log["cpu_seconds"] / 60:.0f} minutes of one core.
- **Perplexity {result["perplexity"]:.2f}** ({result["valid_nats_per_token"]:.4f} nats per token) on the valid split of
  the same text, {text["valid_tokens"]:,} tokens in windows of {log["settings"]["context"]} that do not overlap.
  Another Python version has slightly different text and gives a slightly different figure.
- **Files**: weights are stored in float16 and load as float32; `train_log.json` has the settings, the machine and the
  loss curve.
- **Licence of the weights**: Apache-2.0, as the rest of this project.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="fewer for a trial")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "quantailor" / "assets" / "demo")
    options = parser.parse_args()
    settings = Settings(steps=options.steps)

    start = time.perf_counter()
    torch.set_num_threads(1)  # the sums, and so the result, depend on the number of threads
    torch.manual_seed(settings.seed)
    train_texts, valid_texts = split(documents())
    tokenizer = train_tokenizer(train_texts, settings.vocab_size)
    stream, valid = token_stream(tokenizer, train_texts), token_stream(tokenizer, valid_texts)
    model = new_model(settings, tokenizer)
    add_dropout(model, settings.dropout)
    print(f"{model.num_parameters():,} parameters; {len(stream):,} tokens to train on, {len(valid):,} to validate")
    curve = train(model, stream, valid, settings)

    options.out.mkdir(parents=True, exist_ok=True)
    # Half the size; the config goes on saying float32, so that the model loads in what it is measured in.
    model.save_pretrained(options.out, state_dict={name: w.half() for name, w in model.named_parameters()})
    tokenizer.save_pretrained(options.out)
    saved = AutoModelForCausalLM.from_pretrained(options.out)  # what is shipped is what is measured
    valid_nats = validation_loss(saved, valid, settings.context)
    valid_bytes = sum(len(text.encode()) for text in valid_texts)
    log = {
        "command": " ".join(["python scripts/train_demo_model.py", *sys.argv[1:]]),
        "settings": {**asdict(settings), "optimizer": "AdamW", "schedule": "cosine to 0", "autocast": "bfloat16"},
        "parameters": model.num_parameters(),
        "text": {
            "train_documents": len(train_texts),
            "valid_documents": len(valid_texts),
            "train_tokens": len(stream),
            "valid_tokens": len(valid),
            "passes": round(settings.steps * settings.batch_size * settings.context / len(stream), 2),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time(), 1),  # the better figure where other programs ran meanwhile
        "result": {
            "dataset": "quantailor.data.python_docs, valid split",
            "context": settings.context,
            "valid_nats_per_token": round(valid_nats, 5),
            "perplexity": round(math.exp(valid_nats), 4),
            "valid_bits_per_byte": round(valid_nats * len(valid) / valid_bytes / math.log(2), 4),
        },
        "curve": curve,
    }
    (options.out / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")
    (options.out / "README.md").write_text(readme(log))
    (options.out / "model.safetensors").chmod(0o644)  # safetensors writes for its owner alone
    print(json.dumps(log["result"]))


if __name__ == "__main__":
    main()
