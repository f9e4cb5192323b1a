"""tinyllama: pretrain a ~1B Llama on far more tokens than compute-optimal, prove what it can do, know what it costs.

This package is the core: command line, model, tokenizer, data, export. `train`, `evalsuite` and `serve` build on it and
never on one another. Importing it imports none of torch, numpy, transformers, deepspeed, lm_eval, vllm or datasets.
"""

__version__ = "0.1.0"
