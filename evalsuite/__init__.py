"""Evaluation: lm-eval wrapped, so that its numbers can be compared, reproduced offline and trusted.

`suites` names the benchmarks, `bundle` points lm-eval at local data, `backends` makes the model, `runner` evaluates one
benchmark after the other and keeps what is finished, `sandbox` contains model-written programs, `table` shows it.
`own_suites` are the user's, `leaves` and `data_sets` what ours are made of; `packing` makes bundles, `manifest` proves them;
`passing` and `completions` are pass@k. `compare` tests what differs between several results, with `tinyllama.stats`, item by
item from their `samples`.
"""
