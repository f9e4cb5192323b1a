"""The GPU day: everything worth knowing of a GPU machine in one command of 500 seconds (`benchmarks/gpu_day.sh`).

`plan.py` has the stages and their time limits, `conduct.py` runs them one after the other, `rows.py` keeps what each finds;
the other modules are the stages themselves. `device_under_test.py` beside this folder is the only place that touches
torch.cuda, so that a machine without a GPU runs the same lines (`benchmarks/gpu_standin.sh`).
"""
