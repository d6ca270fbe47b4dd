"""Adjoints: how the gradient of a solution is made, as values passed to `solve`.

    Direct        record every operation. Exact; can be differentiated again; memory grows with every evaluation.
    Checkpoint    (default) keep the accepted steps and some states; go back step by step, taking each again with its
                  graph, but for the first ones, whose graphs are kept. Exact: the gradient of the numbers that were
                  computed (checkpoint.py).
    Reversible    the same, the states computed backwards by a solver that can; memory does not grow (reversible.py).
    Interpolated  keep the dense output; solve the adjoint equation along it (continuous.py).
    Backsolve     keep the output states only; solve state and adjoint backwards (Chen et al. 2018; continuous.py).
    Implicit      the solution is a fixed point; apply the implicit-function theorem there (implicit.py).

Every one but Direct solves first, in place and without gradients, with a `Tape` that looks on; then `attach` makes the
numbers depend on what they came from. A gradient goes to the state, to the times, to the tensors in args, and to
parameters. These are, unless params= names them,

* those of modules, and leaf tensors, that the field is or holds: as the owner of a bound method, in a closure, a
  functools.partial, a container, as an attribute, or under a global name that the function uses;
* leaf tensors in the graph of the first evaluation of the field, wherever it has them from.

The first evaluations that the backward pass makes again are searched too: a leaf that was not found
before is an error, never a missing gradient. Gradients of parameters are ordinary outputs of one autograd node, so that
what listens to their accumulation (DistributedDataParallel) hears one; `Tensor.register_hook` on a parameter itself
hears every step.

Inside torch.func transforms and forward-mode differentiation every operation is seen anyway: `direct` is used.

Files: problem (what a solve, its tape and an adjoint are), sources (what the gradient may go to), attach (the autograd
node), replay (steps taken again), checkpoint, reversible, continuous (the adjoint equation), implicit (fixed points).
"""
