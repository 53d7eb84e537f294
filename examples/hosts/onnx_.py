"""BatchNormalization of opset 15 for onnx's reference evaluator: `ReferenceEvaluator(model, new_ops=[...])`.

The contract: y = (x - mean)/sqrt(var + epsilon)*scale + bias by the statistics given. With `training_mode` by those of
x itself, with the biased variance, and two more outputs: momentum*given + (1 - momentum)*own.
"""

from onnx.reference.op_run import OpRun

import cbn


class BatchNormalization(OpRun):
    """The operator in cbn's arithmetic."""

    op_domain = ""

    def _run(self, x, scale, bias, mean, var, epsilon=1e-5, momentum=0.9, training_mode=0):
        if not training_mode:
            return (cbn.functional.batch_norm(x, mean, var, scale, bias, eps=epsilon),)
        m = cbn.moments(x)
        y = cbn.functional.batch_norm(x, m.mean, m.var(), scale, bias, eps=epsilon)
        return y, *(
            (momentum * given + (1 - momentum) * own).astype(given.dtype)
            for given, own in ((mean, m.mean), (var, m.var()))
        )
