"""Serving: an exported model in vLLM, how many tokens per second it gives and how long a request waits.

`engine` is the only module that touches vllm (and `server` runs vLLM's own server as a process). The rest is
arithmetic, files and tables, and imports nothing heavy.
"""
