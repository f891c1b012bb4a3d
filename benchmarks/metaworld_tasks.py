"""What the two Meta-World benchmarks share: names of tasks, environments, evaluation.

Transitions are collected from EnvPool's C++ tasks, about four times as fast as metaworld's own.
Both run MuJoCo, and the test of this file steps them side by side from the same state: same
observations, rewards and successes. Where that cannot be shown, and for the old rewards (V1), which
EnvPool does not have, transitions come from metaworld. Success is always measured on metaworld.

EnvPool draws a goal at every reset. Metaworld chooses one of 50 that are fixed by the seed. So
those that are collected are of the same distribution as those that are evaluated, and not the same.

The packages are imported when they are needed: `pip install -e ".[rl]"`.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from benchmarks.sac import Transitions

NUM_ACTIONS = 4
EPISODE = 500  # steps; an episode ends by its time limit only
SIZE = 39  # of an observation without the number of its task
NUM_GOALS = 50  # per task, in an evaluation
EASY = ("reach-v3", "drawer-close-v3", "window-close-v3")

# Stepped side by side, EnvPool gave other observations, other rewards before contact (by up to 0.4
# of 10 in sweep), a return that was off by more than one per cent, or another number of steps with
# success; or metaworld could not be put into its state. In window-close, say, metaworld reads the
# handle's place before it has moved it, and EnvPool after.
ONLY_METAWORLD = frozenset(
    {
        "button-press-topdown-wall-v3",
        "dial-turn-v3",
        "disassemble-v3",
        "door-lock-v3",
        "door-open-v3",
        "faucet-open-v3",
        "handle-pull-side-v3",
        "lever-pull-v3",
        "peg-unplug-side-v3",
        "plate-slide-v3",
        "plate-slide-back-v3",
        "plate-slide-back-side-v3",
        "plate-slide-side-v3",
        "push-back-v3",
        "shelf-place-v3",
        "soccer-v3",
        "stick-pull-v3",
        "stick-push-v3",
        "sweep-into-v3",
        "sweep-v3",
        "window-close-v3",
    }
)


class DeadEnvironmentError(Exception):
    """An environment, or the process it ran in, is gone."""


class Collector(Protocol):
    """Environments of T tasks, one of each, whose episodes end together, by their time limit."""

    size: int  # of an observation

    def reset(self) -> np.ndarray:
        """New episodes; their first observations, of shape (T, size)."""
        ...

    def step(self, actions: np.ndarray) -> tuple[Transitions, np.ndarray, np.ndarray]:
        """One step of every task.

        Args:
          actions: (T, actions) in [-1, 1].

        Returns:
          The transitions with leading axis (T,), whose `next_observation` is what was seen before
          any reset; the observations to act on next, of a new episode if one has ended; and
          whether each task is now solved, (T,).
        """
        ...


def import_metaworld():
    """The package, without a window for pictures."""
    os.environ.setdefault("MUJOCO_GL", "disable")
    import metaworld

    return metaworld


def suite(name: str) -> tuple[str, ...]:
    """The names of the tasks of `easy3` (no published suite), `mt10`, `mt25`, or `mt50`."""
    if name == "easy3":
        return EASY
    import_metaworld()
    from metaworld import env_dict

    return tuple(getattr(env_dict, f"{name.upper()}_V3"))


SUITES = ("easy3", "mt10", "mt25", "mt50")


def with_one_hot(observations: np.ndarray) -> np.ndarray:
    """(T, size) observations of T tasks, with the number of each task as a one-hot."""
    return np.concatenate([observations, np.eye(len(observations))], axis=-1).astype(np.float32)


class EnvPoolTask:
    """One task in C++. It steps in a thread of its own: `send`, then `receive`."""

    def __init__(self, name: str, seed: int):
        import_metaworld()
        import envpool
        from envpool.mujoco.metaworld.registration import metaworld_task_id

        self.pool = envpool.make(
            metaworld_task_id(name),
            env_type="gymnasium",
            num_envs=1,
            num_threads=1,
            seed=seed,
            max_episode_steps=EPISODE,
            # By default goals are hidden.
            partially_observable=False,
        )
        self.numbers = np.zeros(1, np.int32)

    def reset(self):
        return self.pool.reset()[0][0]

    def send(self, action):
        self.pool.send(action[None].astype(np.float32), self.numbers)

    def receive(self):
        observation, reward, _, _, info = self.pool.recv()
        return observation[0], reward[0], info["success"][0]


class MetaWorldTask:
    """One task of metaworld, which chooses one of its 50 goals at every reset."""

    def __init__(self, name: str, seed: int, rewards: str = "v2"):
        self.environment = make_environments([name], seed, rewards, "random")[0]

    def reset(self):
        return self.environment.reset()[0]

    def send(self, action):
        self.action = action

    def receive(self):
        observation, reward, _, _, info = self.environment.step(self.action)
        return observation, reward, info["success"]


class Tasks:
    """A `Collector` of Meta-World tasks, with a one-hot of the task after each observation."""

    def __init__(self, names: Sequence[str], seed: int, rewards: str = "v2"):
        """Makes them.

        Args:
          names: of the tasks, 'reach-v3' and so on.
          seed: of the goals and places of objects, from 0 on.
          rewards: 'v2', or 'v1', the old ones, up to about 1,200.
        """
        self.size = SIZE + len(names)
        self.tasks = [
            EnvPoolTask(name, len(names) * seed + number)
            if rewards == "v2" and name not in ONLY_METAWORLD
            else MetaWorldTask(name, len(names) * seed + number, rewards)
            for number, name in enumerate(names)
        ]
        self.observation = np.zeros((len(names), self.size), np.float32)
        self.steps = 0

    def reset(self):
        self.observation = with_one_hot(np.stack([task.reset() for task in self.tasks]))
        self.steps = 0
        return self.observation

    def step(self, actions):
        try:
            # All threads work before anyone waits.
            for task, action in zip(self.tasks, actions, strict=True):
                task.send(action)
            seen, rewards, solved = zip(*(task.receive() for task in self.tasks), strict=True)
        except (OSError, EOFError, RuntimeError) as error:
            raise DeadEnvironmentError(f"{type(error).__name__}: {error}") from error
        after = with_one_hot(np.stack(seen))
        arrays: dict[str, Any] = {
            "observation": self.observation,
            "action": np.asarray(actions, np.float32),
            "reward": np.array(rewards, np.float32),
            "next_observation": after,
            # A time limit ends no task: what would have come next has its value all the same.
            "continues": np.ones(len(self.tasks), np.float32),
        }
        self.observation, self.steps = after, self.steps + 1
        if self.steps == EPISODE:
            self.reset()
        return Transitions(**arrays), self.observation, np.array(solved) > 0


def make_environments(
    names: Sequence[str], seed: int, rewards: str, goals: str, max_steps: int = EPISODE
) -> list[Any]:
    """Metaworld's environments of the tasks, goals observed, without one-hot.

    Args:
      names: of the tasks.
      seed: from 0 on.
      rewards: 'v1' or 'v2'.
      goals: how one of the 50 is chosen at a reset: 'random', or 'pseudorandom', each of them once.
      max_steps: of an episode.
    """
    import_metaworld()
    import gymnasium

    made: Any = gymnasium.make_vec(
        "Meta-World/custom-mt-envs",
        vector_strategy="sync",
        envs_list=list(names),
        seed=seed + 1,  # 0 would mean: no seed
        reward_function_version=rewards,
        task_select=goals,
        max_episode_steps=max_steps,
    )
    return made.envs


class Evaluation:
    """Episodes on metaworld that end at success, over all 50 goals of each task in turn."""

    def __init__(self, names: Sequence[str], seed: int, max_steps: int = EPISODE):
        self.environments = make_environments(names, seed, "v2", "pseudorandom", max_steps)
        for environment in self.environments:
            environment.get_wrapper_attr("toggle_terminate_on_success")(True)

    def __call__(self, act: Callable[[np.ndarray], np.ndarray], episodes: int) -> np.ndarray:
        """Whether each episode succeeded, (T, episodes).

        Args:
          act: from observations with one-hot (T, size) to actions (T, actions).
          episodes: of each task.
        """
        num_tasks = len(self.environments)
        for environment in self.environments:
            # A new order of all goals.
            environment.set_wrapper_attr("current_task_idx", -1)
        solved = [[] for _ in range(num_tasks)]
        observations = np.stack([self.start(each) for each in self.environments])
        # Episodes that fail are long. A task with enough of them steps no more.
        while left := [n for n in range(num_tasks) if len(solved[n]) < episodes]:
            actions = np.asarray(act(with_one_hot(observations)))
            for n in left:
                environment = self.environments[n]
                observations[n], _, success, timeout, _ = environment.step(actions[n])
                if success or timeout:
                    solved[n].append(bool(success))
                    observations[n] = self.start(environment)
        return np.array(solved)

    @staticmethod
    def start(environment):
        # By itself a reset keeps the goal.
        return environment.get_wrapper_attr("sample_tasks")()[0]


def evaluate(
    names: Sequence[str],
    act: Callable[[np.ndarray], np.ndarray],
    episodes: int,
    seed: int,
    max_steps: int = EPISODE,
) -> np.ndarray:
    """Whether each of some episodes per task succeeded, (T, episodes). See `Evaluation`."""
    return Evaluation(names, seed, max_steps)(act, episodes)
