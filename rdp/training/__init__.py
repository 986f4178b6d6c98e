"""Training an attached model: what a call of the model and a step of the optimizer do.

`hooks` and `optimizer` are called from outside, `run` answers them, `step` keeps the record of the current step.
"""
