"""Training data: reading documents, tokenizing them into stores, and the exact order in which training sees them.

`documents` reads input files, `prepare` writes a token store from them, `store` is the format, `order` decides which
window of which source is sample number i, `loader` fetches batches. `corpus` collects the text that CPython ships.
"""
