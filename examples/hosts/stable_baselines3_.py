"""stable-baselines3's VecNormalize.

The contract: observations, an array or a dictionary of arrays, come back as (x - mean)/sqrt(var + epsilon) between
±clip_obs; rewards are divided by the standard deviation of the discounted returns and come back between ±clip_reward;
both are float32. `normalize_obs` and `normalize_reward` move no statistics, and never change their input.
"""

from copy import deepcopy

from stable_baselines3.common import running_mean_std, vec_env

from examples.hosts import running_mean_std as ours


class RunningMeanStd(ours.RunningMeanStd, running_mean_std.RunningMeanStd):
    """Of the class that the wrapper's `reset` asks for."""


class VecNormalize(vec_env.VecNormalize):
    """The wrapper with cbn's statistics and arithmetic."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ret_rms = RunningMeanStd()
        if self.norm_obs and isinstance(self.obs_rms, dict):
            self.obs_rms = {key: RunningMeanStd(shape=rms.mean.shape) for key, rms in self.obs_rms.items()}
        elif self.norm_obs:
            self.obs_rms = RunningMeanStd(shape=self.obs_rms.mean.shape)

    def normalize_obs(self, obs):
        if not self.norm_obs:
            return deepcopy(obs)
        if isinstance(obs, dict):
            return {key: self._normalize_obs(x, self.obs_rms.get(key)) for key, x in obs.items()}
        return self._normalize_obs(obs, self.obs_rms)

    def _normalize_obs(self, obs, obs_rms):
        return deepcopy(obs) if obs_rms is None else obs_rms.normalize(obs, self.epsilon, self.clip_obs)

    def normalize_reward(self, reward):
        if not self.norm_reward:
            return super().normalize_reward(reward)
        return self.ret_rms.normalize(reward, self.epsilon, self.clip_reward, center=False)
