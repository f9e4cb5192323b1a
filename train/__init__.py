"""The DeepSpeed pretraining backend. `pretrain.py` is the launcher's target and holds the loop; the rest serves it.

A recipe (`recipe.py`, JSON in `recipes/`) says what to train; a DeepSpeed JSON (`ds_configs/`) says how to run it on
given hardware; `plan.py` joins the two into numbers before anything is launched.
"""
