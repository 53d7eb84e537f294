"""gymnasium's NormalizeObservation for vectors of environments.

The contract: observations (n_envs, *shape) move the running statistics, unless `update_running_mean` is False, and come
back as (x - mean)/sqrt(var + epsilon) in float32.
"""

from gymnasium.wrappers import vector

from examples.hosts.running_mean_std import RunningMeanStd


class NormalizeObservation(vector.NormalizeObservation):
    """The wrapper with cbn's statistics and arithmetic."""

    def __init__(self, env, epsilon=1e-8):
        super().__init__(env, epsilon)
        self.obs_rms = RunningMeanStd(shape=self.single_observation_space.shape)

    def observations(self, observations):
        if self.update_running_mean:
            self.obs_rms.update(observations)
        return self.obs_rms.normalize(observations, self.epsilon)
