#!/usr/bin/env python3
"""llama.cpp's own speed on a model file, by the low-level interface of llama-cpp-python: what `verbund bench` measures of ours.

    peer.py --model F --threads 2 -p 512 -n 64 --batch 1,4,8,16 --repeats 3

Prints one JSON object: prefill_tokens_per_s of one prompt, and for each batch size the tokens a second of that many sequences
that decode at once, from a context of one token each, all sequences together. The best of the repeats counts, after a warm-up.
Tokens are the same pseudo-random ones in every run; nothing is sampled, because our figures leave sampling out as well.
"""

import argparse
import ctypes
import json
import sys
import time

try:
    import llama_cpp
except ImportError as error:
    sys.exit(f"llama-cpp-python is not here ({error}); run `ops/setup bench`")


def noise(count, vocabulary):
    state = 0x9E3779B97F4A7C15
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        yield (state >> 33) % vocabulary


class Peer:
    """A loaded model with one context for `sequences` sequences."""

    def __init__(self, path, threads, context, sequences):
        llama_cpp.llama_backend_init()
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        self.keep = quiet
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            sys.exit(f"{path}: llama.cpp does not load it")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context * sequences
        params.n_batch = max(512, sequences)
        params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"llama.cpp gives no context of {context} positions for {sequences} sequences")
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def step(self, rows, every_logits):
        """One pass over rows of (token, position, sequence)."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            self.batch.token[i] = token
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = every_logits or i == len(rows) - 1
        code = llama_cpp.llama_decode(self.context, self.batch)
        if code != 0:
            sys.exit(f"llama_decode answers {code}")
        llama_cpp.llama_synchronize(self.context)

    def forget(self):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def prefill(self, tokens):
        self.forget()
        prompt = list(noise(tokens, self.vocabulary))
        start = time.perf_counter()
        for first in range(0, tokens, 512):
            self.step([(t, first + i, 0) for i, t in enumerate(prompt[first : first + 512])], False)
        return tokens / (time.perf_counter() - start)

    def decode(self, sequences, tokens):
        self.forget()
        ids = noise((tokens + 1) * sequences, self.vocabulary)
        rows = [[(next(ids), position, s) for s in range(sequences)] for position in range(tokens + 1)]
        self.step(rows[0], True)
        start = time.perf_counter()
        for row in rows[1:]:
            self.step(row, True)
        return tokens * sequences / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-p", "--prefill", type=int, default=512)
    parser.add_argument("-n", "--decode", type=int, default=64)
    parser.add_argument("--decode-many", type=int, default=0, help="tokens of each sequence where several decode; 0 for as many")
    parser.add_argument("--batch", default="1", help="comma-separated numbers of sequences")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    sizes = [int(n) for n in args.batch.split(",") if n]
    most = max(sizes, default=1)
    peer = Peer(args.model, args.threads, max(args.prefill, args.decode + 1, 64), most)
    peer.prefill(min(args.prefill, 64) or 1)
    report = {"program": f"llama-cpp-python {llama_cpp.__version__}", "threads": args.threads, "batches": {}}
    if args.prefill:
        report["prefill_tokens_per_s"] = max(peer.prefill(args.prefill) for _ in range(args.repeats))
    if args.decode:
        for size in sizes:
            tokens = args.decode if size == 1 else args.decode_many or args.decode
            report["batches"][size] = max(peer.decode(size, tokens) for _ in range(args.repeats))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
