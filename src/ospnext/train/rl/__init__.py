"""Reinforcement learning: rollouts, rewards, advantages and the updates of an adapter.

``run`` is a run; ``rollout`` makes videos, ``grpo`` advantages and the loss; ``update`` learns.
"""
