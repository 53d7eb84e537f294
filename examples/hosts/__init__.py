"""cbn behind the interfaces of its hosts: tools that compute means, variances and normalizations with numpy or numba.

====================  ==================================================================================================
`running_mean_std`    gymnasium's and stable-baselines3's `RunningMeanStd`
`gymnasium_`          gymnasium's `NormalizeObservation` for vectors of environments
`stable_baselines3_`  stable-baselines3's `VecNormalize`
`fast_array_utils_`   fast-array-utils' `mean_var`
`scanpy_`             scanpy's `scale`
`dask_ml_`            dask-ml's `StandardScaler`, with `partial_fit`
`lerobot_`            running statistics of lerobot and openpi
`anemoi_`             the statistics collector of anemoi-datasets
`onnx_`               `BatchNormalization` for onnx's reference evaluator
====================  ==================================================================================================

Each module is what its host's maintainers could take over: the same arguments, attributes and results. `formulas` has
the hosts' own formulas, which stand in for a host that is not installed. `table` compares both: errors and times.
"""

from examples.hosts.table import main  # noqa: F401  as every example has one
