"""What reinforcement learning rewards: plain callables from videos, prompts and metadata to scores."""
