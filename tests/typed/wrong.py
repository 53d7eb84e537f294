"""What both type checkers must refuse: every line that ends in `# wrong`, and no other. It never runs."""

from collections.abc import Iterator

import numpy as np

import cbn
from cbn.functional import batch_norm, native_batch_norm


def inputs(bn: cbn.BatchNorm2d, words: list[str], numbers: Iterator[float], table: dict[str, float]) -> None:
    x = np.ones((2, 3, 4, 4))
    bn("hello")  # wrong
    bn(b"hello")  # wrong
    bn(None)  # wrong
    bn(1.0)  # wrong
    bn(1j)  # wrong
    bn({1.0, 2.0})  # wrong
    bn(words)  # wrong
    bn(numbers)  # wrong
    bn(table)  # wrong
    bn(object())  # wrong
    bn()  # wrong
    bn(x, x)  # wrong
    bn(x, training=True)  # wrong
    bn(x, out="y")  # wrong
    bn(x, out=[1.0])  # wrong
    bn(x, residual="z")  # wrong
    bn.forward("hello")  # wrong
    bn.backward()  # wrong
    bn.backward("hello")  # wrong
    bn(x).nonsense()  # wrong


def layers() -> None:
    cbn.BatchNorm2d()  # wrong
    cbn.BatchNorm2d("3")  # wrong
    cbn.BatchNorm2d(3, eps="1e-5")  # wrong
    cbn.BatchNorm2d(3, momentum="0.1")  # wrong
    cbn.BatchNorm2d(3, running_var="sample")  # wrong
    cbn.BatchNorm2d(3, activation="gelu")  # wrong
    cbn.BatchNorm2d(3, activation=("leaky_relu", "0.1"))  # wrong
    cbn.BatchNorm2d(3, affin=False)  # wrong
    cbn.recalibrated  # wrong # noqa: B018
    cbn.BatchNorm4d  # wrong # noqa: B018


def attributes(bn: cbn.BatchNorm2d) -> None:
    bn.num_features = 4  # wrong
    bn.dtype = np.dtype(np.float64)  # wrong
    bn.channel_axis = 1  # wrong
    bn.frozen = True  # wrong
    bn.weight = "ones"  # wrong
    bn.weight = [1.0, 2.0, 3.0]  # wrong
    bn.training = "no"  # wrong
    bn.eps = "1e-5"  # wrong
    bn.eps = None  # wrong
    bn.momentum = "0.1"  # wrong
    bn.activation = "gelu"  # wrong
    bn.momentun = 0.1  # wrong
    bn.wieght  # wrong # noqa: B018
    bn.load_state_dict([1.0])  # wrong
    bn.train("yes")  # wrong


def plans(bn: cbn.BatchNorm2d) -> None:
    bn.plan(3)  # wrong
    bn.plan((None, 3))  # wrong
    bn.plan((2.5, 3))  # wrong
    bn.plan("23")  # wrong
    plan = bn.plan((2, 3, 4, 4))
    plan("hello")  # wrong
    plan(np.ones((2, 3, 4, 4)), training=True)  # wrong
    plan()  # wrong


def functions() -> None:
    x = np.ones((2, 3))
    batch_norm("hello", None, None)  # wrong
    batch_norm(x)  # wrong
    batch_norm(x, None, None, eps="1e-5")  # wrong
    batch_norm(x, None, None, weight="ones")  # wrong
    native_batch_norm(x, None, None)  # wrong
    cbn.moments("hello")  # wrong
    cbn.moments(x, mask=1.5)  # wrong
    cbn.standardize(x, 0, 1, zero_var="zero")  # wrong
    cbn.RunningMoments(3).update(x, weight=x)  # wrong
    cbn.BatchNorm(3, activation=("clip", 0))  # wrong
    cbn.moments(x, axis=1)  # wrong
    cbn.Moments("3", x, x)  # wrong
    cbn.Moments.merge([x])  # wrong
    cbn.recalibrate([1], [x])  # wrong
    cbn.recalibrate(cbn.BatchNorm(3), 3)  # wrong
    cbn.BatchNorm(3).running_moments("many")  # wrong
    cbn.BatchNorm(3).set_running_moments(x)  # wrong
    cbn.BatchNorm(3).check("hello")  # wrong
    cbn.set_num_threads("4")  # wrong
    cbn.num_threads("4")  # wrong
    cbn.fuse_linear_bn("hello", None, cbn.BatchNorm1d(3))  # wrong
