"""llama.cpp on a GGUF file, through llama.h as the wheel xllamacpp exports it.

    python3 tests/llama_cpp.py FILE.gguf < REQUEST > ANSWER

REQUEST is {"texts": [text, ...], "windows": [[token, ...], ...]}; ANSWER is {"ids": the tokens of each text, special ones
added and found, "nats": for each window what its tokens but the first cost, "pieces": the text of token 5, ...}.
"""

import ctypes
import importlib.util
import json
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_void_p
from pathlib import Path

import numpy as np


class Parameters(ctypes.Structure):
    """Parameters of a model or a context, longer than llama.cpp's: passed by value, of which it reads its own part."""

    _fields_ = [("words", ctypes.c_uint64 * 128)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]


FUNCTIONS = {
    "llama_backend_init": (None,),
    "llama_log_set": (None, c_void_p, c_void_p),
    "llama_model_default_params": (Parameters,),
    "llama_context_default_params": (Parameters,),
    "llama_model_load_from_file": (c_void_p, c_char_p, Parameters),
    "llama_init_from_model": (c_void_p, c_void_p, Parameters),
    "llama_set_n_threads": (None, c_void_p, c_int32, c_int32),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_model_n_ctx_train": (c_int32, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    "llama_batch_init": (Batch, c_int32, c_int32, c_int32),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits": (POINTER(c_float), c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
}


def load():
    folder = Path(importlib.util.find_spec("xllamacpp").origin).parent
    library = ctypes.CDLL(str(next(folder.glob("*.so"))))
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Model:
    def __init__(self, path):
        self.library = load()
        self.library.llama_backend_init()
        # Kept: llama.cpp calls it as long as it runs. Errors and warnings (levels 4 and 3) are shown.
        log = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
        self.log = log(lambda level, text, _: level in (3, 4) and sys.stderr.buffer.write(text))
        self.library.llama_log_set(ctypes.cast(self.log, c_void_p), None)
        self.model = self.library.llama_model_load_from_file(str(path).encode(), self.library.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp does not load {path}")
        self.vocabulary = self.library.llama_model_get_vocab(self.model)

    def ids(self, text):
        text = text.encode()
        tokens = (c_int32 * (2 * len(text) + 8))()
        count = self.library.llama_tokenize(self.vocabulary, text, len(text), tokens, len(tokens), True, True)
        assert count >= 0, text
        return list(tokens[:count])

    def nats(self, windows, threads):
        """What each token of each window but the first costs; windows do not see each other."""
        longest = max(map(len, windows))
        parameters = self.library.llama_context_default_params()
        sizes = (ctypes.c_uint32 * 4).from_buffer(parameters)
        # n_ctx, n_batch, n_ubatch and n_seq_max: anything else means that the structure has changed.
        assert list(sizes) == [512, 2048, 512, 1] and longest <= 2048, list(sizes)
        sizes[0] = -(-longest // 256) * 256
        context = self.library.llama_init_from_model(self.model, parameters)
        self.library.llama_set_n_threads(context, threads, threads)
        rows = self.library.llama_vocab_n_tokens(self.vocabulary)
        batch = self.library.llama_batch_init(longest, 0, 1)
        for window in windows:
            self.library.llama_memory_clear(self.library.llama_get_memory(context), True)
            batch.n_tokens = len(window)
            for at, token in enumerate(window):
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, at, 1, 1
                batch.seq_id[at][0] = 0
            assert self.library.llama_decode(context, batch) == 0
            logits = np.ctypeslib.as_array(self.library.llama_get_logits(context), (len(window), rows))
            nats = []
            for row, target in zip(logits[:-1], window[1:]):
                row = row.astype("f8")
                peak = row.max()
                nats.append(float(peak + np.log(np.exp(row - peak).sum()) - row[target]))
            yield nats


def main():
    request = json.load(sys.stdin)
    model = Model(sys.argv[1])
    answer = {
        "ids": [model.ids(text) for text in request.get("texts", [])],
        "nats": list(model.nats(request["windows"], request.get("threads", 2))) if request.get("windows") else [],
        "context": model.library.llama_model_n_ctx_train(model.model),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
