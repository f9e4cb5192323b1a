"""Serving: vLLM measured, and kept up behind the OpenAI-compatible API.

`engine` is the door to vLLM, `bench` measures, `roofline` and `statistics` are pure arithmetic, `listen` runs the server,
`table` shows the results.
"""
