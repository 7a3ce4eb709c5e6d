"""The half of llamacpp_parity.py that runs where llama_cpp is installed: reads JSON, writes JSON and an .npz.

    python llamacpp_worker.py < request.json        needs numpy and llama_cpp, nothing of quantailor

Request: {"file": GGUF, "prompts": [text], "rows": [[token]], "new_tokens": n, "logits": path of the .npz}.
Answer: {"tokens": [[token]], "generated": [[token]], "texts": [text]}; the .npz has the logits of each
row's positions. Texts are made with llama.cpp's defaults.
"""

import json
import sys

import llama_cpp
import numpy as np

FLOAT32 = 0  # ggml's number for it


def main() -> None:
    request = json.load(sys.stdin)
    answer: dict = {"tokens": [], "generated": [], "texts": [], "version": llama_cpp.__version__}
    llm = loaded(request["file"])
    for prompt in request["prompts"]:
        tokens = llm.tokenize(prompt.encode(), add_bos=True, special=False)
        generated = greedy(llm, tokens, request["new_tokens"])
        answer["tokens"].append(tokens)
        answer["generated"].append(generated)
        answer["texts"].append(llm.detokenize(generated, prev_tokens=tokens).decode(errors="replace"))
    # Logits with keys and values kept in float32, so that what is left is the arithmetic of the weights.
    llm = loaded(request["file"], type_k=FLOAT32, type_v=FLOAT32)
    np.savez(request["logits"], *[logits_of(llm, row) for row in request["rows"]])
    print(json.dumps(answer))


def loaded(file: str, **options: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        file, n_ctx=512, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1, seed=0, **options
    )


def greedy(llm: llama_cpp.Llama, tokens: list[int], count: int) -> list[int]:
    """The likeliest token, again and again; it does not stop at an end token, so that lengths are equal."""
    llm.reset()
    llm.eval(tokens)
    generated: list[int] = []
    for _ in range(count):
        generated.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
        llm.eval(generated[-1:])
    return generated


def logits_of(llm: llama_cpp.Llama, row: list[int]) -> np.ndarray:
    """float32 [positions, vocabulary]."""
    llm.reset()
    llm.eval(row)
    return np.array(llm.scores[: len(row)], dtype=np.float32)


if __name__ == "__main__":
    main()
