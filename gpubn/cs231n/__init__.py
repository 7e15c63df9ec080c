"""CS231n's second assignment on gpubn: its module names, its conventions, its random numbers.

A notebook of the assignment runs after ``cs231n`` is replaced by ``gpubn.cs231n`` in its imports::

    from gpubn.cs231n.classifiers.fc_net import *
    from gpubn.cs231n.data_utils import get_CIFAR10_data
    from gpubn.cs231n.gradient_check import eval_numerical_gradient, eval_numerical_gradient_array
    from gpubn.cs231n.solver import Solver

The layers are those of ``gpubn.layers``, the network and the Solver those of ``gpubn.train``, on
the device in force (``gpubn.use``, ``GPUBN_DEVICE``). Random numbers are the assignment's: all are
drawn from NumPy's legacy global stream, ``np.random.seed`` and what follows it, in the assignment's
order, so that seeded cells print the notebook's numbers. Without that need, use ``gpubn.train``:
its seeds are explicit, and its dropout costs no mask.
"""
