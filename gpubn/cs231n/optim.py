"""The assignment's ``cs231n.optim``: ``next_w, config = rule(w, dw, config)``."""

from gpubn.train.optim import adam, rmsprop, sgd, sgd_momentum

__all__ = ["adam", "rmsprop", "sgd", "sgd_momentum"]
