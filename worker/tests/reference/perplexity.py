#!/usr/bin/env python3
"""Perplexity of the LICENSE's text as llama.cpp's perplexity tool computes it, with llama.cpp's own tokens and logits.

Prints what worker/tests/perplexity.rs compares with. Needs llama-cpp-python, built natively from its source package (CMAKE_ARGS=-DGGML_NATIVE=ON). Usage: perplexity.py MODEL.gguf [TEXT]
"""

import hashlib
import pathlib
import sys

import llama_cpp
import numpy as np

CONTEXT = 512


def main() -> None:
    default = pathlib.Path(__file__).parents[3] / "LICENSE"
    text = (pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else default).read_bytes()
    model = llama_cpp.Llama(
        sys.argv[1], n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=2, logits_all=True, verbose=False
    )
    adds_bos = llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(model.model))
    tokens = model.tokenize(text, add_bos=adds_bos, special=False)
    chunks = len(tokens) // CONTEXT
    total, scored = 0.0, 0
    for chunk in range(chunks):
        part = tokens[chunk * CONTEXT : (chunk + 1) * CONTEXT]
        given = [model.token_bos(), *part[1:]] if adds_bos else part
        model.reset()
        model.eval(given)
        for row in range(CONTEXT // 2, CONTEXT - 1):
            logits = model.scores[row].astype(np.float64)
            largest = logits.max()
            total -= logits[part[row + 1]] - largest - np.log(np.exp(logits - largest).sum())
            scored += 1
    print("text sha256", hashlib.sha256(text).hexdigest())
    print("tokens", len(tokens), "sum of ids", sum(tokens), "chunks", chunks, "scored", scored)
    print("perplexity", np.exp(total / scored))


if __name__ == "__main__":
    main()
